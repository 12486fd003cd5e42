//! Conversations as text: the Jinja template that comes with a tokenizer.

use super::python;
use super::records::Chat;
use crate::common::files;
use crate::common::tokens::{special_token, tokenizer_config};
use anyhow::{anyhow, ensure, Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value};
use std::ops::Range;
use std::path::Path;

const NAME: &str = "chat template";
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];
/// Where `{% generation %}` begins and ends: characters that no text has.
const MARKS: [char; 2] = ['\u{FDD0}', '\u{FDD1}'];

/// A template, with the special tokens that it may name.
pub struct Template {
    environment: Environment<'static>,
    special: Map<String, Value>,
    /// Whether it says by `{% generation %}` what the model is to write.
    marks: bool,
}

/// A conversation as text.
pub struct Rendered {
    pub text: String,
    /// The bytes that the template marks as the model's.
    pub marked: Vec<Range<usize>>,
}

impl Template {
    /// The template in a file, or else that of a checkpoint: `chat_template.jinja`, or in
    /// `tokenizer_config.json` the one named `default` where there are several. `None` where there is none.
    pub fn load(folder: &Path, file: Option<&Path>) -> Result<Option<Self>> {
        let config = tokenizer_config(folder)?;
        let beside = folder.join("chat_template.jinja");
        let source = match file.or(beside.is_file().then_some(&*beside)) {
            Some(path) => files::read_text(path)?,
            None => match config.get("chat_template") {
                None | Some(Value::Null) => return Ok(None),
                Some(Value::String(source)) => source.clone(),
                Some(several) => several
                    .as_array()
                    .and_then(|all| all.iter().find(|one| one["name"] == "default"))
                    .and_then(|one| one["template"].as_str())
                    .context("tokenizer_config.json has no chat_template named default")?
                    .to_owned(),
            },
        };
        let special = SPECIAL
            .iter()
            .filter_map(|name| Some((name.to_string(), special_token(&config, name)?.into())));
        Ok(Some(Self::new(&source, special.collect())?))
    }

    /// Set up as transformers sets up Jinja.
    pub fn new(source: &str, special: Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| anyhow!("{e}"))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(python::format);
        environment.add_function("raise_exception", |message: String| -> Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", python::strftime_now);
        environment.add_filter("tojson", |value: minijinja::Value, options: Kwargs| {
            python::to_json(&value, &options)
        });
        environment.add_filter("generation", |text: String| {
            format!("{}{text}{}", MARKS[0], MARKS[1])
        });
        let as_filter = generation_as_filter(source);
        let marks = as_filter.is_some();
        environment
            .add_template_owned(NAME, as_filter.unwrap_or_else(|| source.to_owned()))
            .map_err(|e| anyhow!("the chat template cannot be read: {e:#}"))?;
        Ok(Self {
            environment,
            special,
            marks,
        })
    }

    /// The text of these messages of a conversation, and before an answer that is to come what begins one.
    pub fn render(&self, messages: &[Value], chat: &Chat, answer: bool) -> Result<Rendered> {
        let mut context = self.special.clone();
        context.insert("tools".into(), chat.tools.clone());
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), answer.into());
        context.extend(chat.kwargs.clone());
        context.insert("messages".into(), messages.into());
        let text = self
            .environment
            .get_template(NAME)
            .and_then(|template| template.render(Serde(context)))
            // The first line says what the template says.
            .map_err(|e| anyhow!("{}", e.detail().map_or(e.to_string(), str::to_owned)))?;
        Ok(Rendered::without_marks(&text))
    }

    /// The text of a conversation, and the bytes of each answer: what the template marks, or else what it writes
    /// for the assistant, with the end token that it puts after it.
    pub fn answers(&self, chat: &Chat) -> Result<(String, Vec<Range<usize>>)> {
        let messages = chat.messages.as_slice();
        let whole = self.render(messages, chat, false)?;
        if self.marks {
            return Ok((whole.text, whole.marked));
        }
        let whole = whole.text;
        let mut answers = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let before = self.render(&messages[..i], chat, true)?.text;
            let after = self.render(&messages[..=i], chat, false)?.text;
            ensure!(
                whole.starts_with(&after) && after.starts_with(&before),
                "the chat template writes answer {} otherwise once more follows: where it is cannot be told",
                answers.len() + 1
            );
            // White space after the end token is not the model's to write.
            answers.push(before.len()..after.trim_end().len());
        }
        Ok((whole, answers))
    }
}

impl Rendered {
    fn without_marks(text: &str) -> Self {
        let (mut plain, mut marked, mut start) = (String::new(), Vec::new(), 0);
        for part in text.split_inclusive(MARKS) {
            plain.push_str(part.trim_end_matches(MARKS));
            if part.ends_with(MARKS[0]) {
                start = plain.len();
            } else if part.ends_with(MARKS[1]) {
                marked.push(start..plain.len());
            }
        }
        Self {
            text: plain,
            marked,
        }
    }
}

/// The template with `{% generation %}`, a tag of transformers' own, as a filter of that name; `None` where it has none.
fn generation_as_filter(source: &str) -> Option<String> {
    let (mut made, mut rest, mut found) = (String::new(), source, false);
    while let Some((before, after)) = rest.split_once("{%") {
        made.push_str(before);
        made.push_str("{%");
        rest = after;
        let Some((tag, after)) = after.split_once("%}") else {
            break;
        };
        let signs = ['-', '+'];
        let put = match tag.trim_matches(signs).trim() {
            "generation" => "filter generation",
            "endgeneration" => "endfilter",
            _ => continue,
        };
        found = true;
        let sign = |sign: Option<char>| {
            sign.filter(|c| signs.contains(c))
                .map_or(String::new(), String::from)
        };
        let (left, right) = (sign(tag.chars().next()), sign(tag.chars().last()));
        made.push_str(&format!("{left} {put} {right}%}}"));
        rest = after;
    }
    made.push_str(rest);
    found.then_some(made)
}
