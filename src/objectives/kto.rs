//! The objective over answers of which each is desirable or not.

use super::{at_least_zero, flags, positive, same_shape, wide};
use candle_core::{bail, Result, Tensor};
use candle_nn::ops::sigmoid;

/// The options of [`kto_loss`], built up from [`KtoOptions::default`].
///
/// ```
/// use candle_cut_cross_entropy::objectives::KtoOptions;
///
/// // Three times as many undesirable answers as desirable ones.
/// let options = KtoOptions::default().beta(0.1).weights(3., 1.);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KtoOptions {
    beta: f64,
    desirable: f64,
    undesirable: f64,
}

impl Default for KtoOptions {
    fn default() -> Self {
        Self {
            beta: 0.1,
            desirable: 1.,
            undesirable: 1.,
        }
    }
}

impl KtoOptions {
    /// How much staying close to the reference model weighs; positive. Default: 0.1.
    pub fn beta(mut self, beta: f64) -> Self {
        self.beta = beta;
        self
    }

    /// The weights of desirable and of undesirable answers, each at least 0: where a batch has more of one kind, the other
    /// can be given a larger weight. Default: 1 and 1.
    pub fn weights(mut self, desirable: f64, undesirable: f64) -> Self {
        (self.desirable, self.undesirable) = (desirable, undesirable);
        self
    }
}

/// The loss of Kahneman-Tversky optimisation, a scalar: with `r = log_probs - reference_log_probs`, the mean over the
/// answers of `w_d (1 - sigmoid(beta (r - kl)))` for desirable ones and of `w_u (1 - sigmoid(beta (kl - r)))` for others.
///
/// | argument | shape | |
/// |---|---|---|
/// | `log_probs` | `(B)` | of the answers, from [`sequence_log_probs`](super::sequence_log_probs) |
/// | `reference_log_probs` | `(B)` | those of the reference model; detached |
/// | `desirable` | `(B)`, u8 | 0 where an answer is undesirable |
/// | `kl` | `()` | the point from which gain and loss are seen, from [`kto_kl`]; no gradient goes through it |
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::{kto_kl, kto_loss, KtoOptions};
/// # fn main() -> candle_core::Result<()> {
/// let policy = Tensor::new(&[-10f32, -12., -11.], &Device::Cpu)?;
/// let desirable = Tensor::new(&[1u8, 0, 1], &Device::Cpu)?;
/// // Here of the same answers; better of answers to other prompts.
/// let kl = kto_kl(&policy, &policy)?;
/// let loss = kto_loss(&policy, &policy, &desirable, &kl, &KtoOptions::default())?;
/// assert_eq!(loss.to_scalar::<f32>()?, 0.5);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Shapes that differ, no answers, a `desirable` that is not u8, a `kl` that is no scalar, options out of their range.
///
/// Source: Ethayarajh et al., *KTO*, [arXiv 2402.01306](https://arxiv.org/abs/2402.01306).
pub fn kto_loss(
    log_probs: &Tensor,
    reference_log_probs: &Tensor,
    desirable: &Tensor,
    kl: &Tensor,
    options: &KtoOptions,
) -> Result<Tensor> {
    positive("beta", options.beta)?;
    at_least_zero("the weight of desirable answers", options.desirable)?;
    at_least_zero("the weight of undesirable answers", options.undesirable)?;
    let ratio = log_ratios(log_probs, reference_log_probs)?;
    flags("desirable", desirable)?;
    same_shape("desirable", desirable, "log_probs", ratio.dims())?;
    if kl.rank() != 0 {
        bail!("kl must be a scalar, got shape {:?}", kl.dims())
    }
    let gain = ratio.broadcast_sub(&wide(&kl.detach())?)?;
    let gain = (gain * options.beta)?;
    // 1 - sigmoid(x) = sigmoid(-x)
    let if_desirable = (sigmoid(&gain.neg()?)? * options.desirable)?;
    let if_undesirable = (sigmoid(&gain)? * options.undesirable)?;
    desirable
        .where_cond(&if_desirable, &if_undesirable)?
        .mean_all()
}

/// The estimate of the divergence of the policy from the reference that [`kto_loss`] measures from, a scalar:
/// `max(0, mean(log_probs - reference_log_probs))`.
///
/// Both are of shape `(B)`, from [`sequence_log_probs`](super::sequence_log_probs), of answers that belong to other prompts:
/// the paper pairs each prompt of a batch with the next one's answer.
///
/// # Errors
/// Shapes that differ, no answers.
///
/// Source: Ethayarajh et al., *KTO*, [arXiv 2402.01306](https://arxiv.org/abs/2402.01306).
pub fn kto_kl(log_probs: &Tensor, reference_log_probs: &Tensor) -> Result<Tensor> {
    log_ratios(log_probs, reference_log_probs)?
        .mean_all()?
        .relu()
}

fn log_ratios(log_probs: &Tensor, reference_log_probs: &Tensor) -> Result<Tensor> {
    let shape = log_probs.dims();
    if log_probs.elem_count() == 0 {
        bail!("empty input: log_probs {shape:?}")
    }
    same_shape(
        "reference_log_probs",
        reference_log_probs,
        "log_probs",
        shape,
    )?;
    wide(log_probs)? - wide(reference_log_probs)?
}
