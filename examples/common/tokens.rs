//! From texts to the tensors that a decoder reads.

use anyhow::{bail, Context, Result};
use candle_core::{Device, Tensor};
use candle_cut_cross_entropy::models::Config;
use std::path::Path;
use tokenizers::Tokenizer;

/// The label of a token that does not count, the default of the loss.
pub const IGNORED: i64 = -100;

/// A checkpoint's tokenizer, which makes only tokens that its model knows.
pub struct Encoder {
    pub tokenizer: Tokenizer,
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
        Ok(Self {
            tokenizer,
            vocab: config.vocab_size,
        })
    }

    /// The tokens of a text, those that begin one included where asked.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .tokenizer
            .encode(text, special)
            .map_err(anyhow::Error::from_boxed)?;
        let unknown = |&id: &u32| id as usize >= self.vocab;
        if let Some(at) = encoding.get_ids().iter().position(unknown) {
            bail!(
                "the tokenizer's token {:?} is number {}, the model's vocab_size is {}",
                encoding.get_tokens()[at],
                encoding.get_ids()[at],
                self.vocab
            )
        }
        Ok(encoding.get_ids().to_vec())
    }
}

/// Tokens, the first of which are read but not learnt.
pub struct Sequence {
    pub ids: Vec<u32>,
    pub ignored: usize,
}

impl Sequence {
    /// How many tokens count. Nothing predicts the first.
    pub fn positions(&self) -> usize {
        self.ids.len() - self.ignored.max(1)
    }
}

/// Ids and labels, `(batch, time)`, padded on the right with tokens that do not count.
pub fn batch(sequences: &[&Sequence], device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
    let time = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let (mut ids, mut labels) = (Vec::new(), Vec::new());
    for sequence in sequences {
        let learnt = &sequence.ids[sequence.ignored..];
        ids.extend(&sequence.ids);
        labels.extend(vec![IGNORED; sequence.ignored]);
        labels.extend(learnt.iter().map(|&id| i64::from(id)));
        ids.resize(ids.len() + time - sequence.ids.len(), 0);
        labels.resize(ids.len(), IGNORED);
    }
    let shape = (sequences.len(), time);
    Ok((
        Tensor::from_vec(ids, shape, device)?,
        Tensor::from_vec(labels, shape, device)?,
    ))
}
