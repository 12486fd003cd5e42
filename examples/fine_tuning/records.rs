//! The records of a file, by what they say is to be learnt.

use crate::common::files;
use anyhow::{anyhow, bail, Context, Result};
use parquet::file::reader::SerializedFileReader;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// What a Parquet file begins with.
const PARQUET: &[u8] = b"PAR1";
/// The names of what a model thinks before it answers; templates ask for one or another.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What a file holds.
pub enum Content {
    Records(Records),
    Plain(String),
}

pub struct Records {
    pub records: Vec<Record>,
    /// Fields that are not read, and how many records have them.
    pub unread: BTreeMap<String, usize>,
    /// Whether there are instructions among them.
    pub instructions: bool,
}

/// A record and what messages call it, such as `line 3`.
pub struct Record {
    pub place: String,
    pub example: Example,
}

pub enum Example {
    /// A text to learn, after a prompt that may be empty, and what each of its tokens weighs.
    Text {
        prompt: String,
        text: String,
        weight: f32,
    },
    /// A conversation, what each of its tokens weighs, and each of its answers' tokens, answer by answer.
    Chat {
        chat: Chat,
        weight: f32,
        answers: Vec<f32>,
    },
}

/// A conversation for the chat template, the tools that it may name, and what else it may read.
#[derive(Default)]
pub struct Chat {
    pub messages: Vec<Value>,
    pub tools: Value,
    pub kwargs: Map<String, Value>,
}

/// The text before an output. `Run::data` shows it to the user.
pub fn instruction_prompt(instruction: &str, input: &str) -> String {
    let input = match input {
        "" => String::new(),
        input => format!("### Input:\n{input}\n\n"),
    };
    format!("### Instruction:\n{instruction}\n\n{input}### Response:\n")
}

/// Reads the rows of a Parquet file, records from JSON and from JSON lines, whatever the file is called; any other text
/// is plain.
pub fn read(path: &Path) -> Result<Content> {
    let mut begin = Vec::new();
    File::open(path)
        .and_then(|file| file.take(PARQUET.len() as u64).read_to_end(&mut begin))
        .with_context(|| format!("reading {}", path.display()))?;
    match begin == PARQUET {
        true => read_parquet(path),
        false => parse(path, files::read_text(path)?),
    }
}

fn read_parquet(path: &Path) -> Result<Content> {
    let rows = SerializedFileReader::new(File::open(path)?)?.into_iter();
    let values = (1..)
        .zip(rows)
        .map(|(number, row)| Ok((format!("row {number}"), row?.to_json_value())))
        .collect::<Result<Vec<_>>>()?;
    Ok(Content::Records(records(values)?))
}

fn parse(path: &Path, text: String) -> Result<Content> {
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    let named = ["jsonl", "json", "ndjson"].iter().any(|e| extension == *e);
    let begin = text.trim_start();
    if begin.starts_with('[') && (named || serde_json::from_str::<Vec<Map<_, _>>>(begin).is_ok()) {
        let values: Vec<Value> = serde_json::from_str(&text)?;
        let places = (1..).map(|number| format!("record {number}"));
        return Ok(Content::Records(records(places.zip(values))?));
    }
    let first = begin.lines().next().unwrap_or_default();
    if serde_json::from_str::<Map<_, _>>(first).is_err() {
        if !named {
            return Ok(Content::Plain(text));
        }
        if serde_json::from_str::<Map<_, _>>(begin).is_ok() {
            bail!("one JSON object, where an array of records or one record a line is wanted")
        }
    }
    let lines = (1..).zip(text.lines());
    let values = lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| {
            let value = serde_json::from_str(line).map_err(|e| {
                // To the parser every line is the first.
                let error = e.to_string().replace(" at line 1 column", ", column");
                anyhow!("line {number}: {error}")
            })?;
            Ok((format!("line {number}"), value))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Content::Records(records(values)?))
}

fn records(values: impl IntoIterator<Item = (String, Value)>) -> Result<Records> {
    let mut unread = BTreeMap::new();
    let mut instructions = false;
    let mut records = Vec::new();
    for (place, value) in values {
        let (example, used) = example(&value).with_context(|| place.clone())?;
        instructions |= used.contains(&"instruction");
        for field in value.as_object().into_iter().flat_map(Map::keys) {
            if !used.contains(&field.as_str()) {
                *unread.entry(field.clone()).or_insert(0) += 1;
            }
        }
        records.push(Record { place, example });
    }
    Ok(Records {
        records,
        unread,
        instructions,
    })
}

/// The example in a record, and the fields that it is made of.
fn example(value: &Value) -> Result<(Example, &'static [&'static str])> {
    let Value::Object(fields) = value else {
        bail!("a record is a JSON object, got {value}")
    };
    // A field that is null is as one that is not there.
    let given = |name: &str| fields.get(name).filter(|value| !value.is_null());
    let string = |name: &str| match given(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(anyhow!("`{name}` is {other}, a string is wanted")),
    };
    let weight = weight(value)?;
    if let Some(messages) = given("messages") {
        let messages = check_messages(messages)?;
        let answers = messages.iter().filter(|m| m["role"] == "assistant");
        let answers = answers
            .map(|message| Ok(weight * self::weight(message)?))
            .collect::<Result<_>>()?;
        let kwargs = match given("chat_template_kwargs") {
            None => Map::new(),
            Some(Value::Object(kwargs)) => kwargs.clone(),
            Some(other) => bail!("`chat_template_kwargs` is {other}, an object is wanted"),
        };
        let chat = Chat {
            messages,
            tools: given("tools").cloned().unwrap_or(Value::Null),
            kwargs,
        };
        let used = &["messages", "tools", "chat_template_kwargs", "weight"];
        let example = Example::Chat {
            chat,
            weight,
            answers,
        };
        return Ok((example, used));
    }
    for (before, after, used) in [
        (
            "instruction",
            "output",
            &["instruction", "input", "output", "weight"] as &[&str],
        ),
        ("prompt", "completion", &["prompt", "completion", "weight"]),
    ] {
        match (string(before)?, string(after)?) {
            (Some(prompt), Some(text)) => {
                let prompt = match before {
                    "prompt" => prompt,
                    _ => instruction_prompt(&prompt, &string("input")?.unwrap_or_default()),
                };
                let example = Example::Text {
                    prompt,
                    text,
                    weight,
                };
                return Ok((example, used));
            }
            (Some(_), None) => bail!("`{before}` without `{after}`"),
            (None, Some(_)) => bail!("`{after}` without `{before}`"),
            (None, None) => {}
        }
    }
    match string("text")? {
        Some(text) => {
            let example = Example::Text {
                prompt: String::new(),
                text,
                weight,
            };
            Ok((example, &["text", "weight"]))
        }
        None => bail!(
            "none of `messages`, `instruction` and `output`, `prompt` and `completion`, `text`; it has {}",
            match fields.is_empty() {
                true => "no fields".into(),
                false => fields.keys().cloned().collect::<Vec<_>>().join(", "),
            }
        ),
    }
}

/// What the tokens of a record or of a message weigh.
fn weight(of: &Value) -> Result<f32> {
    match &of["weight"] {
        Value::Null => Ok(1.),
        value => match value.as_f64().map(|weight| weight as f32) {
            Some(weight) if weight >= 0. && weight.is_finite() => Ok(weight),
            _ => bail!("`weight` is {value}, a number that is at least 0 is wanted"),
        },
    }
}

/// The messages as transformers hands them to a template: without what is null, and with what the model thinks by the
/// names that templates ask for.
fn check_messages(messages: &Value) -> Result<Vec<Value>> {
    let Some(messages) = messages.as_array() else {
        bail!("`messages` is {messages}, an array is wanted")
    };
    let check = |message: &Value| match message {
        Value::Object(fields) if fields.get("role").is_some_and(Value::is_string) => {
            let mut fields = fields.clone();
            fields.retain(|_, value| !value.is_null());
            if let Some(thought) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
                fields.entry("thinking").or_insert(thought.clone());
                fields.insert("reasoning_content".into(), thought);
            }
            Ok(Value::Object(fields))
        }
        other => bail!("a message is an object with a `role` and a `content`, got {other}"),
    };
    messages.iter().map(check).collect()
}
