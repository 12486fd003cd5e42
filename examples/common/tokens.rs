//! From texts to the tensors that a decoder reads.

use super::files;
use anyhow::{bail, ensure, Context, Result};
use candle_core::{Device, Shape, Tensor, D};
use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder};
use candle_cut_cross_entropy::{Options, Reduction};
use serde_json::Value;
use std::ops::Range;
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

    /// The tokens of the text itself and the bytes of it that each stands for.
    pub fn encode_spans(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
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
        let spans = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| start..end);
        Ok(ids.iter().copied().zip(spans).collect())
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

/// Tokens, and what each weighs in the loss: those that weigh 0 are not learnt.
pub struct Sequence {
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
}

impl Sequence {
    /// Tokens that are learnt from this one on.
    pub fn from(ids: Vec<u32>, start: usize) -> Self {
        let weights = (0..ids.len()).map(|i| if i >= start { 1. } else { 0. });
        Self {
            weights: weights.collect(),
            ids,
        }
    }

    /// How many tokens count. Nothing predicts the first.
    pub fn positions(&self) -> usize {
        let counted = |&&weight: &&f32| weight > 0.;
        self.weights.iter().skip(1).filter(counted).count()
    }

    /// What they weigh together.
    pub fn weight(&self) -> f64 {
        self.weights
            .iter()
            .skip(1)
            .map(|&weight| f64::from(weight))
            .sum()
    }
}

/// Sequences as tensors.
pub struct Batch {
    /// `(batch, time)`, padded on the right, or `(tokens)`, one sequence after the other.
    pub ids: Tensor,
    /// Of the same shape; tokens that do not count, and those that nothing of their sequence predicts, are [`IGNORED`].
    pub labels: Tensor,
    /// What each position's loss is multiplied by: the weight of the label that it predicts. `None` where all that
    /// count weigh 1.
    pub weights: Option<Tensor>,
    /// Of the sequences that lie one after the other.
    lengths: Option<Vec<usize>>,
}

impl Batch {
    /// Rows of the longest sequence's length.
    pub fn padded(sequences: &[&Sequence], device: &Device) -> candle_core::Result<Self> {
        let time = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
        let lengths = vec![time; sequences.len()];
        Self::new(
            sequences,
            &lengths,
            (sequences.len(), time).into(),
            None,
            device,
        )
    }

    /// One row without padding.
    pub fn packed(sequences: &[&Sequence], device: &Device) -> candle_core::Result<Self> {
        let lengths: Vec<usize> = sequences.iter().map(|s| s.ids.len()).collect();
        let tokens: usize = lengths.iter().sum();
        Self::new(
            sequences,
            &lengths,
            tokens.into(),
            Some(lengths.clone()),
            device,
        )
    }

    /// Each sequence is filled up to its length.
    fn new(
        sequences: &[&Sequence],
        filled: &[usize],
        shape: Shape,
        lengths: Option<Vec<usize>>,
        device: &Device,
    ) -> candle_core::Result<Self> {
        let (mut ids, mut labels, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut end = 0;
        for (sequence, filled) in sequences.iter().zip(filled) {
            end += filled;
            ids.extend(&sequence.ids);
            for (i, (&id, &weight)) in sequence.ids.iter().zip(&sequence.weights).enumerate() {
                labels.push(match i > 0 && weight > 0. {
                    true => i64::from(id),
                    false => IGNORED,
                });
            }
            weights.extend(sequence.weights.iter().skip(1));
            ids.resize(end, 0);
            labels.resize(end, IGNORED);
            weights.resize(end, 0.);
        }
        let alike = weights.iter().all(|&weight| weight == 0. || weight == 1.);
        Ok(Self {
            ids: Tensor::from_vec(ids, &shape, device)?,
            labels: Tensor::from_vec(labels, &shape, device)?,
            weights: match alike {
                true => None,
                false => Some(Tensor::from_vec(weights, &shape, device)?),
            },
            lengths,
        })
    }

    /// What the model's head reads of them.
    pub fn hidden_states(&self, model: &Decoder) -> candle_core::Result<Tensor> {
        match &self.lengths {
            None => model.hidden_states(&self.ids),
            Some(lengths) => model.packed_hidden_states(&self.ids, lengths),
        }
    }

    /// The sum of the losses of all that count, each times its weight.
    pub fn summed_loss(&self, model: &Decoder, options: &Options) -> candle_core::Result<Tensor> {
        let options = options.clone().reduction(match self.weights {
            None => Reduction::Sum,
            Some(_) => Reduction::None,
        });
        let head = model.head(&options)?;
        let loss = head
            .forward(&self.hidden_states(model)?, &self.labels)?
            .loss;
        match &self.weights {
            None => Ok(loss),
            Some(weights) => {
                let predicting = loss.dim(D::Minus1)?;
                (loss * weights.narrow(D::Minus1, 0, predicting)?)?.sum_all()
            }
        }
    }
}
