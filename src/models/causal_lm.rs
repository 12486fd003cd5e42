//! What the loss needs of a language model, and what follows from it.

use crate::{LinearCrossEntropy, Options, Output};
use candle_core::{bail, DType, Device, Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A causal language model that shows the hidden states its head reads, and the head's weight.
///
/// [`Decoder`](super::Decoder) is one, for training. Models of candle-transformers that show their
/// hidden states are ones, for evaluation, through `WithHead` (feature `candle-transformers`).
pub trait CausalLm {
    /// The states that the head reads, `(batch, time, D)`, of tokens `(batch, time)` in u32 or i64.
    ///
    /// # Errors
    /// Tokens of another rank or dtype, no tokens, tokens outside the vocabulary.
    fn hidden_states(&self, ids: &Tensor) -> Result<Tensor>;

    /// The head's weight, `(V, D)`.
    ///
    /// # Errors
    /// Memory that runs out where it has to be computed.
    fn head_weight(&self) -> Result<Tensor>;

    /// Where the model is.
    fn device(&self) -> &Device;

    /// The soft cap of the logits.
    fn softcap(&self) -> Option<f64> {
        None
    }

    /// The head and its loss under these options; where they set no shift it is 1, where they set no softcap that of the
    /// model.
    ///
    /// # Errors
    /// Those of [`head_weight`](CausalLm::head_weight).
    fn head(&self, options: &Options) -> Result<LinearCrossEntropy> {
        let options = head_options(options, self.softcap());
        Ok(LinearCrossEntropy::new(self.head_weight()?, None, options))
    }

    /// The loss of predicting each label from the tokens before it.
    ///
    /// `ids` and `labels` are `(batch, time)`; position `t` predicts the label at `t + 1`, so that
    /// `labels` are `ids` with the `ignore_index` of the options (-100) where a token does not count.
    /// Options of their own go before: a shift of 2 predicts the label at `t + 2`.
    ///
    /// # Errors
    /// Those of [`hidden_states`](CausalLm::hidden_states) and of
    /// [`linear_cross_entropy`](crate::linear_cross_entropy()).
    fn loss(&self, ids: &Tensor, labels: &Tensor, options: &Options) -> Result<Output> {
        self.head(options)?
            .forward(&self.hidden_states(ids)?, labels)
    }

    /// The logits `(.., V)` of hidden states `(.., D)`, softcap included. This stores them: hand it
    /// the positions that matter.
    ///
    /// # Errors
    /// Shapes, dtypes or devices that do not match.
    fn logits(&self, hidden_states: &Tensor) -> Result<Tensor> {
        self.head(&Options::default())?.logits(hidden_states)
    }

    /// The logits `(batch, V)` of the token after the last of `ids` `(batch, time)`.
    ///
    /// # Errors
    /// Those of [`hidden_states`](CausalLm::hidden_states).
    fn next_token_logits(&self, ids: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden_states(ids)?;
        let last = hidden.dim(1)?.saturating_sub(1);
        self.logits(&hidden.narrow(1, last, 1)?.squeeze(1)?)
    }

    /// One sequence, token by token: what [`generate`] reads. [`Decoder`](super::Decoder) keeps the keys and values of the
    /// tokens so far, and computes them anew where rope's angles change with the length; a model without a form of its own
    /// computes them anew with every token. An optimizer's step between two calls leaves what is kept as it was.
    ///
    /// # Errors
    /// None that making the model did not meet.
    fn continuation(&self) -> Result<Box<dyn Continuation + '_>> {
        Ok(Box::new(AnewContinuation {
            model: self,
            tokens: Vec::new(),
        }))
    }
}

/// The options of a head: where they set no shift it is 1, where they set no softcap that of the model.
pub(super) fn head_options(options: &Options, softcap: Option<f64>) -> Options {
    let mut options = options.clone();
    options.shift = options.shift.max(1);
    options.softcap = options.softcap.or(softcap);
    options
}

/// A sequence that goes on, see [`CausalLm::continuation`].
pub trait Continuation {
    /// Appends tokens, at least one, and returns the logits `(V)` of the token after them, outside of any graph.
    ///
    /// # Errors
    /// Those of [`CausalLm::hidden_states`]. The tokens are not appended then.
    fn next_token_logits(&mut self, tokens: &[u32]) -> Result<Tensor>;
}

struct AnewContinuation<'a, M: ?Sized> {
    model: &'a M,
    tokens: Vec<u32>,
}

impl<M: CausalLm + ?Sized> Continuation for AnewContinuation<'_, M> {
    fn next_token_logits(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let before = self.tokens.len();
        self.tokens.extend(tokens);
        let logits = Tensor::new(self.tokens.as_slice(), self.model.device())
            .and_then(|ids| self.model.next_token_logits(&ids.unsqueeze(0)?)?.squeeze(0));
        if logits.is_err() {
            self.tokens.truncate(before);
        }
        Ok(logits?.detach())
    }
}

/// How [`generate`] chooses tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// The most tokens to add.
    pub max_new_tokens: usize,
    /// What the logits are divided by before a token is drawn; 0 takes the likeliest token.
    pub temperature: f64,
    /// The seed of the random numbers.
    pub seed: u64,
    /// Tokens after which to stop, such as [`Config::eos_token_ids`](super::Config::eos_token_ids).
    pub stop: Vec<u32>,
}

impl Default for Sampling {
    /// 64 tokens, the likeliest each, without a token to stop at.
    fn default() -> Self {
        Self {
            max_new_tokens: 64,
            temperature: 0.,
            seed: 0,
            stop: Vec::new(),
        }
    }
}

/// Continues a prompt: the new tokens, the one that it stopped at included.
///
/// The model remembers what it can of the tokens before ([`CausalLm::continuation`]).
///
/// # Errors
/// An empty prompt, a negative temperature, logits that are not finite, and those of
/// [`CausalLm::hidden_states`].
pub fn generate(
    model: &(impl CausalLm + ?Sized),
    prompt: &[u32],
    sampling: &Sampling,
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        bail!("the prompt is empty: begin with the token that begins a text")
    }
    if !(sampling.temperature >= 0. && sampling.temperature.is_finite()) {
        bail!(
            "temperature must be at least 0 and finite, got {}",
            sampling.temperature
        )
    }
    let mut rng = StdRng::seed_from_u64(sampling.seed);
    let mut continuation = model.continuation()?;
    let (mut tokens, mut read) = (prompt.to_vec(), 0);
    for _ in 0..sampling.max_new_tokens {
        let logits = continuation.next_token_logits(&tokens[read..])?;
        read = tokens.len();
        // On the host: Metal has no f64.
        let logits = logits.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let logits: Vec<f64> = logits.to_vec1()?;
        let Some(token) = choose(&logits, sampling.temperature, &mut rng) else {
            bail!("the logits of token {} are not finite", tokens.len())
        };
        tokens.push(token);
        if sampling.stop.contains(&token) {
            break;
        }
    }
    Ok(tokens.split_off(prompt.len()))
}

/// A token by its logits, `None` where they are no numbers to choose by.
fn choose(logits: &[f64], temperature: f64, rng: &mut StdRng) -> Option<u32> {
    let best = (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a })?;
    if logits.iter().any(|z| !z.is_finite()) {
        return None;
    }
    if temperature == 0. {
        return Some(best as u32);
    }
    let weight = |z: &f64| ((z - logits[best]) / temperature).exp();
    let mut left = rng.random::<f64>() * logits.iter().map(weight).sum::<f64>();
    for (token, z) in logits.iter().enumerate() {
        left -= weight(z);
        if left < 0. {
            return Some(token as u32);
        }
    }
    Some(best as u32)
}
