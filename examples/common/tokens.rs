//! From texts to the tensors that a decoder reads.

use super::files;
use anyhow::{bail, ensure, Context, Result};
use candle_core::{Device, Tensor};
use candle_cut_cross_entropy::models::Config;
use serde_json::Value;
use std::path::Path;
use tokenizers::Tokenizer;

/// The label of a token that does not count, the default of the loss.
pub const IGNORED: i64 = -100;

/// A checkpoint's tokenizer, which makes only tokens that its model knows.
pub struct Encoder {
    pub tokenizer: Tokenizer,
    /// The tokens that the tokenizer puts before a text.
    begin: Vec<u32>,
    /// The tokens that end a text, the first of which is put after one.
    ends: Vec<u32>,
    vocab: usize,
}

impl Encoder {
    pub fn load(folder: &Path, config: &Config) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let mut tokenizer = Tokenizer::from_file(&path)
            .map_err(anyhow::Error::from_boxed)
            .with_context(|| format!("reading the tokenizer {}", path.display()))?;
        // Some files ask for texts of one length.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(anyhow::Error::from_boxed)?;
        // Which tokens it adds, and on which side, shows on a text.
        let probe = tokenizer
            .encode("a", true)
            .map_err(anyhow::Error::from_boxed)?;
        let added = probe.get_special_tokens_mask().iter();
        let added = added.take_while(|&&special| special == 1).count();
        let vocab = config.vocab_size;
        let known = |&id: &u32| (id as usize) < vocab;
        if let Some(end) = config.eos_token_ids.iter().find(|id| !known(id)) {
            bail!(
                "{}: eos_token_id {end} is beyond the vocab_size {vocab}",
                folder.join("config.json").display()
            )
        }
        let mut ends = config.eos_token_ids.clone();
        if ends.is_empty() {
            let end = special_token(&tokenizer_config(folder)?, "eos_token");
            ends.extend(end.and_then(|token| tokenizer.token_to_id(&token)));
        }
        Ok(Self {
            begin: probe.get_ids()[..added].to_vec(),
            ends: ends.into_iter().filter(known).collect(),
            tokenizer,
            vocab,
        })
    }

    /// The tokens that end a text.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The tokens of the text itself.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = self.encode_spans(text)?;
        Ok(tokens.into_iter().map(|(id, _)| id).collect())
    }

    /// The tokens of a text, and before them those that begin one, unless it has them already.
    pub fn encode_from_begin(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        if !ids.starts_with(&self.begin) {
            ids.splice(0..0, self.begin.iter().copied());
        }
        Ok(ids)
    }

    /// Adds the token that ends a text, unless there is one.
    pub fn end(&self, ids: &mut Vec<u32>) {
        let ended = ids.last().is_some_and(|id| self.ends.contains(id));
        if !ended {
            ids.extend(self.ends.first());
        }
    }

    /// The tokens of the text itself and the bytes where each begins in it.
    pub fn encode_spans(&self, text: &str) -> Result<Vec<(u32, usize)>> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(anyhow::Error::from_boxed)?;
        let ids = encoding.get_ids();
        let unknown = |&id: &u32| id as usize >= self.vocab;
        if let Some(at) = ids.iter().position(unknown) {
            bail!(
                "the tokenizer's token {:?} is number {}, the model's vocab_size is {}",
                encoding.get_tokens()[at],
                ids[at],
                self.vocab
            )
        }
        let starts = encoding.get_offsets().iter().map(|&(start, _)| start);
        Ok(ids.iter().copied().zip(starts).collect())
    }

    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(anyhow::Error::from_boxed)
    }
}

/// What `tokenizer_config.json` says, nothing where there is none.
pub fn tokenizer_config(folder: &Path) -> Result<Value> {
    let path = folder.join("tokenizer_config.json");
    if !path.exists() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&files::read_text(&path)?)
        .with_context(|| format!("reading {}", path.display()))
}

/// A special token by its name in `tokenizer_config.json`.
pub fn special_token(config: &Value, name: &str) -> Option<String> {
    let token = config.get(name)?;
    let token = token.get("content").unwrap_or(token);
    Some(token.as_str()?.to_owned())
}

/// How many positions the model is made for, where its config says so.
pub fn max_positions(config: &Config) -> Result<Option<usize>> {
    let json: Value = serde_json::from_str(config.json())?;
    let most = json.get("max_position_embeddings").and_then(Value::as_u64);
    Ok(most.map(|most| most as usize))
}

/// An error for sequences that are longer than the model is made for.
pub fn check_length(length: usize, config: &Config) -> Result<()> {
    if let Some(most) = max_positions(config)? {
        ensure!(
            length <= most,
            "--length {length} is more than the model's max_position_embeddings, {most}"
        );
    }
    Ok(())
}

/// Tokens, and which of them are learnt.
pub struct Sequence {
    pub ids: Vec<u32>,
    pub learnt: Vec<bool>,
}

impl Sequence {
    /// Tokens that are learnt from this one on.
    pub fn from(ids: Vec<u32>, start: usize) -> Self {
        let learnt = (0..ids.len()).map(|i| i >= start).collect();
        Self { ids, learnt }
    }

    /// How many tokens count. Nothing predicts the first.
    pub fn positions(&self) -> usize {
        self.learnt.iter().skip(1).filter(|&&learnt| learnt).count()
    }
}

/// Ids and labels, `(batch, time)`, padded on the right with tokens that do not count.
pub fn batch(sequences: &[&Sequence], device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
    let time = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let (mut ids, mut labels) = (Vec::new(), Vec::new());
    for sequence in sequences {
        ids.extend(&sequence.ids);
        let tokens = sequence.ids.iter().zip(&sequence.learnt);
        labels.extend(tokens.map(|(&id, &learnt)| match learnt {
            true => i64::from(id),
            false => IGNORED,
        }));
        ids.resize(ids.len() + time - sequence.ids.len(), 0);
        labels.resize(ids.len(), IGNORED);
    }
    let shape = (sequences.len(), time);
    Ok((
        Tensor::from_vec(ids, shape, device)?,
        Tensor::from_vec(labels, shape, device)?,
    ))
}
