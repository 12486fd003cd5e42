//! Objectives over the tokens of sampled answers, each with an advantage.

use super::{keep, mean_over, same_shape, wide};
use candle_core::{bail, DType, Result, Tensor};

/// The clipped policy loss of proximal policy optimisation, a scalar: with the ratio
/// `r = exp(log_probs - old_log_probs)` and advantages `A`, the mean of
/// `-min(r A, clip(r, 1 - clip, 1 + clip) A)` over the tokens that count.
///
/// All of one shape, one number a token. `log_probs` are `-nll`, the negative
/// [`Output::loss`](crate::Output::loss) under [`Reduction::None`](crate::Reduction::None); `old_log_probs` and `advantages`
/// should be detached. `mask`, u8, says which tokens count (see [`counted`](super::counted)); `None` is all.
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
    let shape = log_probs.dims();
    same_shape("old_log_probs", old_log_probs, "log_probs", shape)?;
    same_shape("advantages", advantages, "log_probs", shape)?;
    let all;
    let mask = match mask {
        Some(mask) => mask,
        None => {
            all = Tensor::ones(shape, DType::U8, log_probs.device())?;
            &all
        }
    };
    // Masked before the exponential: an infinite ratio there would make its gradient NaN.
    let log_ratio = (wide(log_probs)? - wide(old_log_probs)?)?;
    let log_ratio = keep("log_probs", &log_ratio, mask)?;
    let advantages = wide(advantages)?;
    let ratio = clipped(&log_ratio, &advantages, (1. - clip, 1. + clip))?.exp()?;
    let surrogate = keep("advantages", &(ratio * advantages)?, mask)?;
    mean_over(&surrogate, mask)?.neg()
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
