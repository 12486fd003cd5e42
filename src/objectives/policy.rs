//! Objectives over the tokens of sampled answers, each with an advantage.

use super::{at_least_zero, keep, mean_over, mean_over_last, same_shape, wide};
use candle_core::{bail, DType, Result, Tensor, D};

/// The clipped policy loss of proximal policy optimisation, a scalar: with the ratio
/// `r = exp(log_probs - old_log_probs)` and advantages `A`, the mean of
/// `-min(r A, clip(r, 1 - clip, 1 + clip) A)` over the tokens that count.
///
/// This is [`grpo_loss`] with one `clip` for both sides, [`Average::Tokens`] and nothing else; shapes, dtypes and what
/// happens at extremes are described there. The advantages are of one number a token.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// use candle_cut_cross_entropy::{
///     linear_cross_entropy, objectives::{counted, ppo_loss}, Options, Reduction,
/// };
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (4, 16, 64), &Device::Cpu)?;
/// # let head = Var::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// # let tokens = Tensor::zeros((4, 16), DType::I64, &Device::Cpu)?;
/// # let advantages = Tensor::ones((4, 15), DType::F32, &Device::Cpu)?;
/// let options = Options::default().shift(1).reduction(Reduction::None);
/// let log_probs = linear_cross_entropy(&hidden, &head, &tokens, &options)?.loss.neg()?;
/// let old_log_probs = log_probs.detach(); // in the first step the policy is the old one
/// let mask = counted(&tokens, &options)?;
/// let loss = ppo_loss(&log_probs, &old_log_probs, &advantages, Some(&mask), 0.2)?;
/// assert_eq!(loss.to_scalar::<f32>()?, -1.);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Shapes that differ, a mask of another dtype, a `clip` outside `(0, 1)`.
///
/// Source: Schulman et al., *Proximal Policy Optimization Algorithms*,
/// [arXiv 1707.06347](https://arxiv.org/abs/1707.06347), equation 7.
pub fn ppo_loss(
    log_probs: &Tensor,
    old_log_probs: &Tensor,
    advantages: &Tensor,
    mask: Option<&Tensor>,
    clip: f64,
) -> Result<Tensor> {
    if !(clip > 0. && clip < 1.) {
        bail!("clip must be in (0, 1), got {clip}")
    }
    let options = GrpoOptions::default()
        .clip(clip, clip)
        .average(Average::Tokens);
    same_shape("advantages", advantages, "log_probs", log_probs.dims())?;
    grpo_loss(log_probs, old_log_probs, advantages, mask, &options)
}

/// How the losses of tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Average {
    /// The mean over the sequences of the mean over the tokens of each that count: every sequence weighs the same. One
    /// without such tokens has mean 0.
    #[default]
    Sequences,
    /// The mean over all tokens that count: every token weighs the same.
    Tokens,
    /// The sum over the tokens that count, divided by the number of sequences times this length: a token weighs the same
    /// in every batch.
    Length(usize),
}

/// The options of [`grpo_loss`], built up from [`GrpoOptions::default`].
///
/// ```
/// use candle_cut_cross_entropy::objectives::{Average, GrpoOptions};
///
/// let dapo = GrpoOptions::default().clip(0.2, 0.28).average(Average::Tokens);
/// let dr_grpo = GrpoOptions::default().average(Average::Length(1024));
/// let gspo = GrpoOptions::default().clip(3e-4, 4e-4).sequence_ratios(true);
/// # let _ = (dapo, dr_grpo, gspo);
/// ```
#[derive(Debug, Clone)]
pub struct GrpoOptions {
    clip: (f64, f64),
    average: Average,
    sequence_ratios: bool,
    kl: Option<(Tensor, f64)>,
    entropy: Option<(Tensor, f64)>,
}

impl Default for GrpoOptions {
    fn default() -> Self {
        Self {
            clip: (0.2, 0.2),
            average: Average::default(),
            sequence_ratios: false,
            kl: None,
            entropy: None,
        }
    }
}

impl GrpoOptions {
    /// A ratio is clipped to `1 - low ..= 1 + high`. `low` is in `(0, 1)`, `high` positive, infinite for
    /// no upper bound. Default: 0.2 and 0.2.
    pub fn clip(mut self, low: f64, high: f64) -> Self {
        self.clip = (low, high);
        self
    }

    /// How the losses of the tokens become one. Default: [`Average::Sequences`].
    pub fn average(mut self, average: Average) -> Self {
        self.average = average;
        self
    }

    /// All tokens of a sequence have one ratio, the geometric mean of the tokens' ratios, over those that count.
    /// Default: false.
    pub fn sequence_ratios(mut self, on: bool) -> Self {
        self.sequence_ratios = on;
        self
    }

    /// Adds `weight` times the estimate of the Kullback-Leibler divergence from a reference model to the loss of each
    /// token: `exp(d) - d - 1` with `d = reference_log_probs - log_probs`, which is never negative. The log-probabilities
    /// have the shape of `log_probs` and should be detached; `weight` is at least 0. Default: none.
    ///
    /// Source: the estimator k3 of Schulman, [*Approximating KL Divergence*](http://joschu.net/blog/kl-approx.html).
    pub fn kl(mut self, reference_log_probs: &Tensor, weight: f64) -> Self {
        self.kl = Some((reference_log_probs.clone(), weight));
        self
    }

    /// Subtracts `weight` times the mean entropy of the tokens that count, whatever the average of the losses is. The
    /// entropies of the policy, `-sum_j p_j log p_j` at each position, have the shape of `log_probs`:
    /// [`Output::entropy`](crate::Output::entropy), asked for as [`Entropy::Differentiable`](crate::Entropy::Differentiable).
    /// `weight` is at least 0. Default: none.
    pub fn entropy(mut self, entropies: &Tensor, weight: f64) -> Self {
        self.entropy = Some((entropies.clone(), weight));
        self
    }

    fn check(&self) -> Result<()> {
        let (low, high) = self.clip;
        if !(low > 0. && low < 1.) {
            bail!("the lower clip must be in (0, 1), got {low}")
        }
        if high.is_nan() || high <= 0. {
            bail!("the upper clip must be positive, got {high}")
        }
        if self.average == Average::Length(0) {
            bail!("the length of Average::Length must be at least 1, got 0")
        }
        for (name, of) in [
            ("the weight of kl", &self.kl),
            ("the weight of entropy", &self.entropy),
        ] {
            if let Some((_, weight)) = of {
                at_least_zero(name, *weight)?;
            }
        }
        Ok(())
    }
}

/// The loss of group relative policy optimisation and of the methods that came of it, a scalar: with the ratio
/// `r = exp(log_probs - old_log_probs)` and advantages `A`, the average of
/// `-min(r A, clip(r, 1 - low, 1 + high) A) + kl_weight (exp(d) - d - 1)` over the tokens that count, less
/// `entropy_weight` times their mean entropy.
///
/// | argument | shape | |
/// |---|---|---|
/// | `log_probs` | `(.., T)` | `-nll`: the negative [`Output::loss`](crate::Output::loss) under [`Reduction::None`](crate::Reduction::None) |
/// | `old_log_probs` | `(.., T)` | those of the policy that sampled the answers; detached |
/// | `advantages` | `(.., T)` or `(..)` | of each token, or of each sequence ([`group_advantages`]); detached |
/// | `mask` | `(.., T)`, u8 | not 0 where a token counts, see [`counted`](super::counted); `None`: all do |
///
/// | method | options |
/// |---|---|
/// | GRPO, [arXiv 2402.03300](https://arxiv.org/abs/2402.03300) | `kl(&reference_log_probs, 0.04)` |
/// | DAPO, [arXiv 2503.14476](https://arxiv.org/abs/2503.14476) | `clip(0.2, 0.28)`, [`Average::Tokens`] |
/// | Dr. GRPO, [arXiv 2503.20783](https://arxiv.org/abs/2503.20783) | [`Average::Length`] of the longest answer that may be sampled, advantages that are not scaled |
/// | GSPO, [arXiv 2507.18071](https://arxiv.org/abs/2507.18071) | `clip(3e-4, 4e-4)`, `sequence_ratios(true)` |
/// | PPO | [`ppo_loss`] |
///
/// What is clipped has gradient 0, and what stands at positions that do not count changes nothing, be it NaN or infinite.
/// In two cases loss and gradient overflow, to infinity, in f32 from a log-ratio of 89 on: where the advantage is
/// negative, nothing bounds the ratio of a token that has become likelier; and the divergence grows without bound where
/// the policy finds a token far less likely than the reference does.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_cut_cross_entropy::objectives::{group_advantages, grpo_loss, GrpoOptions};
/// # fn main() -> candle_core::Result<()> {
/// // Two answers of two tokens to one prompt; the second is one token long.
/// let log_probs = Var::new(&[[-1f32, -2.], [-3., 0.]], &Device::Cpu)?;
/// let mask = Tensor::new(&[[1u8, 1], [1, 0]], &Device::Cpu)?;
/// let rewards = Tensor::new(&[[1f32, 0.]], &Device::Cpu)?;
/// let advantages = group_advantages(&rewards, true)?.flatten_all()?;
/// let options = GrpoOptions::default().clip(0.2, 0.28);
/// let old = log_probs.detach();
/// let loss = grpo_loss(&log_probs, &old, &advantages, Some(&mask), &options)?;
/// let gradient = loss.backward()?.get(&log_probs).unwrap().to_vec2::<f32>()?;
/// assert!(gradient[0][1] < 0. && gradient[1][0] > 0. && gradient[1][1] == 0.);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A scalar or an empty tensor for `log_probs`, shapes that differ, a mask of another dtype, options out of their range.
pub fn grpo_loss(
    log_probs: &Tensor,
    old_log_probs: &Tensor,
    advantages: &Tensor,
    mask: Option<&Tensor>,
    options: &GrpoOptions,
) -> Result<Tensor> {
    options.check()?;
    let shape = log_probs.dims();
    if log_probs.rank() == 0 || log_probs.elem_count() == 0 {
        bail!("log_probs must have shape (.., T) and not be empty, got {shape:?}")
    }
    same_shape("old_log_probs", old_log_probs, "log_probs", shape)?;
    let advantages = of_tokens(&wide(advantages)?, shape)?;
    let all;
    let mask = match mask {
        Some(mask) => mask,
        None => {
            all = Tensor::ones(shape, DType::U8, log_probs.device())?;
            &all
        }
    };
    let log_probs = wide(log_probs)?;
    // Masked before the exponential: an infinite ratio there would make its gradient NaN.
    let mut log_ratio = keep("log_probs", &(&log_probs - wide(old_log_probs)?)?, mask)?;
    if options.sequence_ratios {
        let means = mean_over_last(&log_ratio, mask)?;
        log_ratio = keep("log_probs", &of_tokens(&means, shape)?, mask)?;
    }
    let (low, high) = options.clip;
    let ratio = clipped(&log_ratio, &advantages, (1. - low, 1. + high))?.exp()?;
    let mut losses = keep("advantages", &(ratio * advantages)?.neg()?, mask)?;
    if let Some((reference, weight)) = &options.kl {
        same_shape("reference_log_probs", reference, "log_probs", shape)?;
        let d = keep("log_probs", &(wide(reference)? - &log_probs)?, mask)?;
        losses = (losses + (((d.exp()? - d)? - 1.)? * *weight)?)?;
    }
    let loss = average(&losses, mask, options.average)?;
    match &options.entropy {
        Some((entropies, weight)) => {
            same_shape("entropies", entropies, "log_probs", shape)?;
            let entropies = keep("entropies", &wide(entropies)?, mask)?;
            loss - (mean_over(&entropies, mask)? * *weight)?
        }
        None => Ok(loss),
    }
}

/// The advantages of answers by their rewards, within groups of answers to one prompt: `r - mean(r)`, and where they are
/// scaled `(r - mean(r)) / (std(r) + 1e-4)` with the sample's standard deviation.
///
/// `rewards` of shape `(.., G)`, a group in the last dimension, give a tensor of that shape, detached. A group whose
/// rewards are all equal has advantages 0: nothing can be learnt from it.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::group_advantages;
/// # fn main() -> candle_core::Result<()> {
/// let rewards = Tensor::new(&[[1f32, 0., 0., 1.], [3., 3., 3., 3.]], &Device::Cpu)?;
/// let advantages = group_advantages(&rewards, false)?;
/// assert_eq!(advantages.to_vec2::<f32>()?, [[0.5, -0.5, -0.5, 0.5], [0.; 4]]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A scalar, a group of fewer than two answers.
///
/// Source: Shao et al., *DeepSeekMath*, [arXiv 2402.03300](https://arxiv.org/abs/2402.03300); Liu et al.,
/// *Understanding R1-Zero-Like Training*, [arXiv 2503.20783](https://arxiv.org/abs/2503.20783), for those not scaled.
pub fn group_advantages(rewards: &Tensor, scaled: bool) -> Result<Tensor> {
    let group = rewards.dims().last().copied().unwrap_or(0);
    if group < 2 {
        bail!(
            "rewards must have shape (.., G) with groups of at least 2 answers, got {:?}",
            rewards.dims()
        )
    }
    let rewards = wide(&rewards.detach())?;
    // Seen from the first, so that equal rewards are zeros and not what rounding leaves of them.
    let rewards = rewards.broadcast_sub(&rewards.narrow(D::Minus1, 0, 1)?)?;
    let above = rewards.broadcast_sub(&rewards.mean_keepdim(D::Minus1)?)?;
    if !scaled {
        return Ok(above);
    }
    let variance = (above.sqr()?.sum_keepdim(D::Minus1)? / (group - 1) as f64)?;
    above.broadcast_div(&(variance.sqrt()? + 1e-4)?)
}

/// One number a token: values of that shape as they are, those of sequences for each of its tokens.
fn of_tokens(values: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let sequences = &shape[..shape.len() - 1];
    if values.dims() == sequences {
        return values.unsqueeze(D::Minus1)?.broadcast_as(shape);
    }
    if values.dims() != shape {
        bail!(
            "advantages must have the shape of log_probs, {shape:?}, or of its sequences, {sequences:?}, got {:?}",
            values.dims()
        )
    }
    Ok(values.clone())
}

/// The average of losses that are 0 where the mask is.
fn average(losses: &Tensor, mask: &Tensor, average: Average) -> Result<Tensor> {
    match average {
        Average::Sequences => mean_over_last(losses, mask)?.mean_all(),
        Average::Tokens => mean_over(losses, mask),
        Average::Length(length) => {
            let sequences = losses.elem_count() / losses.dim(D::Minus1)?;
            losses.sum_all()? / (sequences * length) as f64
        }
    }
}

/// The logarithm of the ratio that `min(r A, clip(r, low, high) A)` takes: that of `min(r, high)` where
/// the advantage `A` is not negative, of `max(r, low)` where it is.
///
/// What is clipped never becomes a ratio: an infinite one would make its gradient 0 times infinity.
fn clipped(log_ratio: &Tensor, advantages: &Tensor, (low, high): (f64, f64)) -> Result<Tensor> {
    let bound = |bound: f64| log_ratio.zeros_like()?.affine(1., bound.ln());
    let at_most = log_ratio
        .gt(high.ln())?
        .where_cond(&bound(high)?, log_ratio)?;
    let at_least = log_ratio
        .lt(low.ln())?
        .where_cond(&bound(low)?, log_ratio)?;
    advantages.ge(0.)?.where_cond(&at_most, &at_least)
}
