//! The records of a file, by what they say is to be learnt.

use anyhow::{anyhow, bail, ensure, Context, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

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
    /// A text to learn, after a prompt that may be empty.
    Text { prompt: String, text: String },
    /// A conversation for the chat template, and the tools that it may name.
    Chat { messages: Vec<Value>, tools: Value },
}

/// The text before an output. `Run::data` shows it to the user.
pub fn instruction_prompt(instruction: &str, input: &str) -> String {
    let input = match input {
        "" => String::new(),
        input => format!("### Input:\n{input}\n\n"),
    };
    format!("### Instruction:\n{instruction}\n\n{input}### Response:\n")
}

/// Reads records from JSON and from JSON lines, whatever the file is called; any other text is plain.
pub fn parse(path: &Path, text: String) -> Result<Content> {
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
    if let Some(messages) = given("messages") {
        let messages = check_messages(messages)?;
        let tools = given("tools").cloned().unwrap_or(Value::Null);
        return Ok((Example::Chat { messages, tools }, &["messages", "tools"]));
    }
    for (before, after, used) in [
        (
            "instruction",
            "output",
            &["instruction", "input", "output"] as &[&str],
        ),
        ("prompt", "completion", &["prompt", "completion"]),
    ] {
        match (string(before)?, string(after)?) {
            (Some(prompt), Some(text)) => {
                let prompt = match before {
                    "prompt" => prompt,
                    _ => instruction_prompt(&prompt, &string("input")?.unwrap_or_default()),
                };
                return Ok((Example::Text { prompt, text }, used));
            }
            (Some(_), None) => bail!("`{before}` without `{after}`"),
            (None, Some(_)) => bail!("`{after}` without `{before}`"),
            (None, None) => {}
        }
    }
    match string("text")? {
        Some(text) => {
            let prompt = String::new();
            Ok((Example::Text { prompt, text }, &["text"]))
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

fn check_messages(messages: &Value) -> Result<Vec<Value>> {
    let Some(messages) = messages.as_array() else {
        bail!("`messages` is {messages}, an array is wanted")
    };
    for message in messages {
        ensure!(
            message.get("role").is_some_and(Value::is_string),
            "a message is an object with a `role` and a `content`, got {message}"
        );
    }
    Ok(messages.clone())
}
