//! What to learn from: sequences of tokens, made of records or of plain text.

use super::arguments::Learn;
use super::chat::Template;
use super::records::{self, Chat, Content, Example};
use crate::common::corpus;
use crate::common::tokens::{Encoder, Sequence};
use anyhow::{bail, ensure, Context, Result};
use std::collections::BTreeMap;
use std::ops::Range;
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
        let content = records::read(path).with_context(|| name.clone())?;
        if let Content::Records(records) = &content {
            ensure!(!records.records.is_empty(), "{name} has no records");
        }
        Ok(Self { name, content })
    }

    /// What errors call it.
    pub fn name(&self) -> &str {
        &self.name
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
                    Example::Text { prompt, text, .. } => vec![&**prompt, &**text],
                    Example::Chat { chat, .. } => chat
                        .messages
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
            Self::Text {
                prompt,
                text,
                weight,
            } => {
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
                let mut sequence = Sequence::from(ids, start);
                if rules.learn == Learn::All {
                    sequence.weights.fill(1.);
                }
                sequence.weights.iter_mut().for_each(|w| *w *= weight);
                sequence
            }
            Self::Chat {
                chat,
                weight,
                answers,
            } => {
                let Some(template) = rules.template else {
                    bail!("`messages` need a chat template: the tokenizer has none, --chat-template names one")
                };
                let others = match rules.learn {
                    Learn::All => *weight,
                    Learn::Answers => 0.,
                };
                match chat_sequence(chat, others, answers, template, rules.encoder)? {
                    Ok(sequence) => sequence,
                    Err(why) => return Ok(Err(why)),
                }
            }
        };
        if sequence.positions() == 0 {
            return Ok(Err("no token to learn".into()));
        }
        let cut = sequence.ids.len() > rules.length;
        sequence.ids.truncate(rules.length);
        sequence.weights.truncate(rules.length);
        Ok(match sequence.positions() {
            0 => Err("what comes before the text to learn fills --length".into()),
            _ => Ok((sequence, cut)),
        })
    }
}

/// A conversation's sequence by the weights of its answers and of all else, or why it has none.
fn chat_sequence(
    chat: &Chat,
    others: f32,
    weights: &[f32],
    template: &Template,
    encoder: &Encoder,
) -> Result<Result<Sequence, String>> {
    let (text, answers) = match template.answers(chat) {
        Ok(rendered) => rendered,
        Err(e) => return Ok(Err(format!("{e:#}"))),
    };
    let alike = weights.iter().all(|weight| Some(weight) == weights.first());
    if answers.len() != weights.len() && !alike {
        return Ok(Err(format!(
            "{} answers with weights of their own, of which the chat template marks {} parts",
            weights.len(),
            answers.len()
        )));
    }
    // The template writes the special tokens.
    let tokens = encoder.encode_spans(&text)?;
    let weight = |span: &Range<usize>| {
        // As in transformers, a token is an answer's if any of it is.
        let within = |answer: &Range<usize>| span.start < answer.end && answer.start < span.end;
        match answers.iter().position(within) {
            Some(answer) => weights
                .get(answer)
                .or(weights.first())
                .copied()
                .unwrap_or(1.),
            None => others,
        }
    };
    Ok(Ok(Sequence {
        weights: tokens.iter().map(|(_, span)| weight(span)).collect(),
        ids: tokens.into_iter().map(|(id, _)| id).collect(),
    }))
}
