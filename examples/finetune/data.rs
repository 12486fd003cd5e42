//! What to learn from: sequences of tokens, made of records or of plain text.

use crate::arguments::Learn;
use crate::chat::Template;
use crate::common::tokens::{Encoder, Sequence};
use crate::common::{corpus, files};
use crate::records::{self, Content, Example};
use anyhow::{bail, ensure, Context, Result};
use rand::{rngs::StdRng, seq::SliceRandom, SeedableRng};
use std::collections::BTreeMap;
use std::path::Path;

pub struct Data {
    /// What errors call it.
    name: String,
    content: Content,
}

/// How sequences are made.
pub struct Rules<'a> {
    pub encoder: &'a Encoder,
    pub template: Option<&'a Template>,
    pub learn: Learn,
    /// The most tokens of a sequence.
    pub length: usize,
    /// Whether a record that cannot be used is an error.
    pub strict: bool,
}

/// Sequences, and what became of the records that are not whole in them.
#[derive(Default)]
pub struct Sequences {
    pub sequences: Vec<Sequence>,
    /// Records that were longer.
    pub cut: usize,
    /// Records that cannot be used, by why.
    pub skipped: BTreeMap<String, Vec<String>>,
}

impl Data {
    /// Reads a file, or the texts of this crate.
    pub fn read(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self {
                name: "the sources of this crate".into(),
                content: Content::Plain(corpus::read_texts(&[])?.concat()),
            });
        };
        let name = path.display().to_string();
        let content = records::parse(path, files::read_text(path)?).context(name.clone())?;
        if let Content::Records(records) = &content {
            ensure!(!records.records.is_empty(), "{name} has no records");
        }
        Ok(Self { name, content })
    }

    /// What it was read as, and what of it is not read.
    pub fn describe(&self) -> String {
        match &self.content {
            Content::Plain(text) => format!("{}: plain text, {} bytes", self.name, text.len()),
            Content::Records(records) => {
                let unread = records.unread.iter();
                let unread = unread.map(|(name, n)| format!("; `{name}` of {n} is not read"));
                let count = records.records.len();
                format!(
                    "{}: {count} records{}",
                    self.name,
                    unread.collect::<String>()
                )
            }
        }
    }

    /// Whether there are conversations, which need a template.
    pub fn has_chats(&self) -> bool {
        match &self.content {
            Content::Plain(_) => false,
            Content::Records(records) => records
                .records
                .iter()
                .any(|record| matches!(record.example, Example::Chat { .. })),
        }
    }

    /// A text as a prompt: an instruction, where the records are instructions.
    pub fn prompt(&self, text: &str) -> String {
        match &self.content {
            Content::Records(records) if records.instructions => {
                records::instruction_prompt(text, "")
            }
            _ => text.to_owned(),
        }
    }

    pub fn texts(&self) -> Vec<&str> {
        match &self.content {
            Content::Records(records) => records
                .records
                .iter()
                .flat_map(|record| match &record.example {
                    Example::Text { prompt, text } => vec![&**prompt, &**text],
                    Example::Chat { messages, .. } => messages
                        .iter()
                        .filter_map(|message| message["content"].as_str())
                        .collect(),
                })
                .collect(),
            Content::Plain(text) => vec![text],
        }
    }

    /// The sequences of at most as many tokens as the rules say.
    pub fn sequences(&self, rules: &Rules) -> Result<Sequences> {
        let mut made = Sequences::default();
        match &self.content {
            Content::Plain(text) => {
                let ids = rules.encoder.encode(text).context(self.name.clone())?;
                // Nothing can be learnt from a single token.
                let windows = ids.chunks(rules.length).filter(|window| window.len() > 1);
                made.sequences
                    .extend(windows.map(|window| Sequence::from(window.to_vec(), 0)));
            }
            Content::Records(records) => {
                for record in &records.records {
                    let place = || format!("{}, {}", self.name, record.place);
                    match record.example.sequence(rules).with_context(place)? {
                        Ok((sequence, cut)) => {
                            made.sequences.push(sequence);
                            made.cut += usize::from(cut);
                        }
                        Err(why) if rules.strict => bail!("{}: {why}", place()),
                        Err(why) => {
                            let places = made.skipped.entry(why).or_default();
                            places.push(record.place.clone());
                        }
                    }
                }
            }
        }
        ensure!(
            !made.sequences.is_empty(),
            "{}: nothing to learn{}",
            self.name,
            made.describe_skipped()
                .map(|skipped| format!("; {skipped}"))
                .unwrap_or_default()
        );
        Ok(made)
    }
}

impl Sequences {
    /// Which records are skipped and why.
    pub fn describe_skipped(&self) -> Option<String> {
        const NAMED: usize = 5;
        let count: usize = self.skipped.values().map(Vec::len).sum();
        let reasons: Vec<_> = self
            .skipped
            .iter()
            .map(|(why, places)| {
                let named = places[..places.len().min(NAMED)].join(", ");
                match places.len().saturating_sub(NAMED) {
                    0 => format!("{why} ({named})"),
                    more => format!("{why} ({named} and {more} more)"),
                }
            })
            .collect();
        (count > 0).then(|| format!("{count} records skipped: {}", reasons.join("; ")))
    }
}

impl Example {
    /// Its sequence and whether it is cut, or why it cannot be used.
    fn sequence(&self, rules: &Rules) -> Result<Result<(Sequence, bool), String>> {
        let encoder = rules.encoder;
        let mut sequence = match self {
            Self::Text { text, .. } if text.is_empty() => {
                return Ok(Err("the text to learn is empty".into()))
            }
            Self::Text { prompt, text } => {
                let mut ids = Vec::new();
                if !prompt.is_empty() {
                    ids = encoder.encode_from_begin(prompt)?;
                }
                let start = ids.len();
                // What begins a text begins the prompt, if there is one.
                ids.extend(match prompt.is_empty() {
                    true => encoder.encode_from_begin(text)?,
                    false => encoder.encode(text)?,
                });
                encoder.end(&mut ids);
                Sequence::from(ids, start)
            }
            Self::Chat { messages, tools } => {
                let Some(template) = rules.template else {
                    bail!("`messages` need a chat template: the tokenizer has none, --chat-template names one")
                };
                let (text, answers) = match template.answers(messages, tools) {
                    Ok(rendered) => rendered,
                    Err(e) => return Ok(Err(format!("{e:#}"))),
                };
                // The template writes the special tokens.
                let tokens = encoder.encode_spans(&text)?;
                let inside = |start: &usize| answers.iter().any(|answer| answer.contains(start));
                let learnt = tokens.iter().map(|(_, start)| inside(start)).collect();
                let ids = tokens.into_iter().map(|(id, _)| id).collect();
                Sequence { ids, learnt }
            }
        };
        if rules.learn == Learn::All {
            sequence.learnt.fill(true);
        }
        if sequence.positions() == 0 {
            return Ok(Err("no token to learn".into()));
        }
        let cut = sequence.ids.len() > rules.length;
        sequence.ids.truncate(rules.length);
        sequence.learnt.truncate(rules.length);
        Ok(match sequence.positions() {
            0 => Err("what comes before the text to learn fills --length".into()),
            _ => Ok((sequence, cut)),
        })
    }
}

/// Sets a share of the sequences apart, the same ones for the same seed: (to train on, to validate on).
pub fn hold_out(
    mut sequences: Vec<Sequence>,
    share: f64,
    seed: u64,
) -> Result<(Vec<Sequence>, Vec<Sequence>)> {
    let count = sequences.len();
    if share == 0. {
        return Ok((sequences, Vec::new()));
    }
    ensure!(
        count > 1,
        "{count} sequence, one to train on and one to validate on are the least; --validation 0 does without"
    );
    sequences.shuffle(&mut StdRng::seed_from_u64(seed));
    let held_out = (count as f64 * share).round() as usize;
    let validation = sequences.split_off(count - held_out.clamp(1, count - 1));
    Ok((sequences, validation))
}

/// A number that tells whether data is the same.
pub fn fingerprint(sequences: &[Sequence]) -> u64 {
    let mut hash = files::Fnv::default();
    for sequence in sequences {
        hash.add(&(sequence.ids.len() as u64).to_le_bytes());
        for (id, &learnt) in sequence.ids.iter().zip(&sequence.learnt) {
            hash.add(&id.to_le_bytes());
            hash.add(&[u8::from(learnt)]);
        }
    }
    hash.0
}
