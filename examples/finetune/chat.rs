//! Conversations as text: the Jinja template that comes with a tokenizer.

use crate::common::files;
use crate::common::tokens::{special_token, tokenizer_config};
use anyhow::{anyhow, ensure, Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::Value;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

const NAME: &str = "chat template";
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

/// A template, with the special tokens that it may name.
pub struct Template {
    environment: Environment<'static>,
    special: serde_json::Map<String, Value>,
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
        Ok(Some(Self::new(source, special.collect())?))
    }

    /// Set up as transformers sets up Jinja.
    pub fn new(source: String, special: serde_json::Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| anyhow!("{e}"))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, source)
            .map_err(|e| anyhow!("the chat template cannot be read: {e:#}"))?;
        Ok(Self {
            environment,
            special,
        })
    }

    /// The text of a conversation, and before an answer that is to come what begins one.
    pub fn render(&self, messages: &[Value], tools: &Value, answer: bool) -> Result<String> {
        let mut context = self.special.clone();
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), tools.clone());
        context.insert("add_generation_prompt".into(), answer.into());
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(Serde(context)))
            // The first line says what the template says.
            .map_err(|e| anyhow!("{}", e.detail().map_or(e.to_string(), str::to_owned)))
    }

    /// The text of a conversation, and the bytes of it that are the assistant's: each answer, with the end
    /// token that the template puts after it.
    pub fn answers(
        &self,
        messages: &[Value],
        tools: &Value,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let whole = self.render(messages, tools, false)?;
        let mut answers = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let before = self.render(&messages[..i], tools, true)?;
            let after = self.render(&messages[..=i], tools, false)?;
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

/// JSON as Python writes it.
fn to_json(value: minijinja::Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // It keeps other characters in any case.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let spaces = " ".repeat(indent.unwrap_or(0));
    let mut json = Vec::new();
    let written = match indent {
        Some(_) => {
            let format = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut json, format))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, Spaced)),
    };
    let text = written
        .map_err(|e| e.to_string())
        .and_then(|()| String::from_utf8(json).map_err(|e| e.to_string()));
    text.map_err(|e| Error::new(ErrorKind::InvalidOperation, e))
}

/// A space after commas and colons.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: Write + ?Sized>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: Write + ?Sized>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}
