//! What to learn from: records of a JSONL file, or plain text.

use crate::corpus::read_texts;
use crate::tokens::{Encoder, Sequence};
use anyhow::{bail, ensure, Context, Result};
use rand::{rngs::StdRng, seq::SliceRandom, SeedableRng};
use serde::Deserialize;
use std::path::Path;

pub struct Data {
    /// What errors call it.
    name: String,
    content: Content,
}

enum Content {
    Records(Vec<Record>),
    Plain(String),
}

/// A text to learn, after a prompt that may be empty.
struct Record {
    line: usize,
    prompt: String,
    text: String,
}

/// A line of a JSONL file as it is written.
#[derive(Deserialize)]
struct Line {
    instruction: Option<String>,
    #[serde(default)]
    input: String,
    output: Option<String>,
    text: Option<String>,
}

/// The text before an output. `Args::data` shows it to the user.
fn prompt(instruction: &str, input: &str) -> String {
    let input = match input {
        "" => String::new(),
        input => format!("### Input:\n{input}\n\n"),
    };
    format!("### Instruction:\n{instruction}\n\n{input}### Response:\n")
}

impl Data {
    /// Reads a file, or the texts of this crate.
    pub fn read(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self {
                name: "this crate".into(),
                content: Content::Plain(read_texts(&[])?.concat()),
            });
        };
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {name}"))?;
        ensure!(!text.trim().is_empty(), "{name} is empty");
        let content = match path.extension().is_some_and(|e| e == "jsonl") {
            true => Content::Records(records(&name, &text)?),
            false => Content::Plain(text),
        };
        Ok(Self { name, content })
    }

    pub fn texts(&self) -> Vec<&str> {
        match &self.content {
            Content::Records(records) => records
                .iter()
                .flat_map(|record| [&*record.prompt, &*record.text])
                .collect(),
            Content::Plain(text) => vec![text],
        }
    }

    /// The sequences of at most `length` tokens, and how many records were longer. `end` ends a record.
    pub fn sequences(
        &self,
        encoder: &Encoder,
        end: Option<u32>,
        length: usize,
    ) -> Result<(Vec<Sequence>, usize)> {
        let (mut sequences, mut cut) = (Vec::new(), 0);
        match &self.content {
            Content::Plain(text) => {
                let ids = encoder.encode(text, false).context(self.name.clone())?;
                // Nothing can be learnt from a single token.
                let windows = ids.chunks(length).filter(|window| window.len() > 1);
                sequences.extend(windows.map(|window| Sequence {
                    ids: window.to_vec(),
                    ignored: 0,
                }));
            }
            Content::Records(records) => {
                for record in records {
                    let sequence = record
                        .sequence(encoder, end, length, &mut cut)
                        .with_context(|| format!("{}, line {}", self.name, record.line))?;
                    sequences.push(sequence);
                }
            }
        }
        Ok((sequences, cut))
    }

    /// Sets a share of the sequences apart, the same ones for the same seed: (to train on, to validate on).
    pub fn hold_out(
        &self,
        mut sequences: Vec<Sequence>,
        share: f64,
        seed: u64,
    ) -> Result<(Vec<Sequence>, Vec<Sequence>)> {
        let count = sequences.len();
        ensure!(
            count > 1,
            "{}: {count} sequence, one to train on and one to validate on are the least",
            self.name
        );
        sequences.shuffle(&mut StdRng::seed_from_u64(seed));
        let held_out = (count as f64 * share).round() as usize;
        let validation = sequences.split_off(count - held_out.clamp(1, count - 1));
        Ok((sequences, validation))
    }
}

fn records(name: &str, text: &str) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let number = i + 1;
        let parsed: Line = serde_json::from_str(line).map_err(|e| {
            // To the parser every line is the first.
            let error = e.to_string().replace(" at line 1 column", ", column");
            anyhow::anyhow!("{name}, line {number}: {error}")
        })?;
        let (prompt, text) = match (parsed.instruction, parsed.output, parsed.text) {
            (Some(instruction), Some(output), _) => (prompt(&instruction, &parsed.input), output),
            (None, None, Some(text)) => (String::new(), text),
            (Some(_), None, _) => bail!("{name}, line {number}: instruction without output"),
            (None, Some(_), _) => bail!("{name}, line {number}: output without instruction"),
            (None, None, None) => {
                bail!("{name}, line {number}: neither instruction and output nor text")
            }
        };
        records.push(Record {
            line: number,
            prompt,
            text,
        });
    }
    Ok(records)
}

impl Record {
    fn sequence(
        &self,
        encoder: &Encoder,
        end: Option<u32>,
        length: usize,
        cut: &mut usize,
    ) -> Result<Sequence> {
        ensure!(!self.text.is_empty(), "nothing to learn: the text is empty");
        let mut ids = Vec::new();
        if !self.prompt.is_empty() {
            ids = encoder.encode(&self.prompt, true)?;
        }
        let ignored = ids.len();
        // What begins a text begins the prompt, if there is one.
        ids.extend(encoder.encode(&self.text, self.prompt.is_empty())?);
        ids.extend(end);
        ensure!(
            ignored < length,
            "nothing to learn: the prompt has {ignored} tokens, --length is {length}"
        );
        ensure!(
            ids.len() > 1,
            "nothing to learn: the text is a single token"
        );
        if ids.len() > length {
            *cut += 1;
            ids.truncate(length);
        }
        Ok(Sequence { ids, ignored })
    }
}

/// A number that tells whether data is the same, by FNV-1a.
pub fn fingerprint(sequences: &[Sequence]) -> u64 {
    let numbers = sequences.iter().flat_map(|s| {
        let sizes = [s.ids.len() as u32, s.ignored as u32];
        sizes.into_iter().chain(s.ids.iter().copied())
    });
    numbers.fold(0xcbf2_9ce4_8422_2325, |hash, number| {
        (hash ^ u64::from(number)).wrapping_mul(0x0100_0000_01b3)
    })
}
