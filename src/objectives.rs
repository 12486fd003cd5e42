//! What is made of a loss's outputs: z-loss, perplexity, log-probabilities of sequences, DPO, PPO.
//!
//! All are ordinary, differentiable Candle operations on tensors of one number a position.

use crate::problem::pick_positions;
use crate::{Options, Reduction};
use candle_core::{bail, DType, Result, Tensor, D};

/// Which positions of a result count: 1 where the target is not the `ignore_index` of the options,
/// else 0.
///
/// `targets` of shape `(.., T)` give a u8 tensor `(.., T - shift)`, the shape of
/// [`Output::lse`](crate::Output::lse).
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::{objectives::counted, Options};
/// # fn main() -> candle_core::Result<()> {
/// let targets = Tensor::new(&[[5i64, -100, 7]], &Device::Cpu)?;
/// let mask = counted(&targets, &Options::default().shift(1))?;
/// assert_eq!(mask.to_vec2::<u8>()?, [[0, 1]]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// `shift >= T`.
pub fn counted(targets: &Tensor, options: &Options) -> Result<Tensor> {
    let (_, shape) = pick_positions(targets.dims(), options.shift)?;
    let targets = match options.shift {
        0 => targets.clone(),
        shift => targets.narrow(D::Minus1, shift, shape[shape.len() - 1])?,
    };
    targets
        .to_dtype(DType::I64)?
        .contiguous()?
        .ne(options.ignore_index)
}

/// The z-loss: the square of the log-partition, `lse_i^2`, of the positions that count, reduced as the
/// options say.
///
/// Added to the loss with a small factor it keeps logits from drifting. `lse` is
/// [`Output::lse`](crate::Output::lse), `targets` and `options` those of the loss. The mean is over the
/// positions that count, 0 when none does.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// use candle_cut_cross_entropy::{linear_cross_entropy, objectives::z_loss, Options};
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?;
/// # let head = Var::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// # let tokens = Tensor::zeros((2, 16), DType::I64, &Device::Cpu)?;
/// let options = Options::default().shift(1);
/// let output = linear_cross_entropy(&hidden, &head, &tokens, &options)?;
/// let loss = (output.loss + 1e-4 * z_loss(&output.lse, &tokens, &options)?)?;
/// assert!(loss.backward()?.get(&head).is_some());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// `shift >= T`; an `lse` whose shape is not that of the positions.
///
/// Source: Chowdhery et al., *PaLM*, [arXiv 2204.02311](https://arxiv.org/abs/2204.02311), section 5;
/// `compute_z_loss` of [ml-cross-entropy](https://github.com/apple/ml-cross-entropy), which multiplies
/// the mean by the share of positions that count where this divides by it.
pub fn z_loss(lse: &Tensor, targets: &Tensor, options: &Options) -> Result<Tensor> {
    let counted = counted(targets, options)?;
    let squares = keep("lse", &lse.sqr()?, &counted)?;
    match options.reduction {
        Reduction::None => Ok(squares),
        Reduction::Sum => squares.sum_all(),
        Reduction::Mean => mean_over(&squares, &counted),
    }
}

/// The perplexity, `exp(mean nll)` over the positions that count: a scalar, 1 when none does.
///
/// `loss` is [`Output::loss`](crate::Output::loss) under any reduction, `targets` and `options` those
/// of the loss, which must be without [`Options::z_loss`]: that part is no log-probability.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// use candle_cut_cross_entropy::{linear_cross_entropy, objectives::perplexity, Options};
/// # fn main() -> candle_core::Result<()> {
/// # let tokens = Tensor::zeros((2, 16), DType::I64, &Device::Cpu)?;
/// # let options = Options::default().shift(1);
/// // A head of zeros finds every one of 1000 classes as likely.
/// let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?;
/// let head = Tensor::zeros((1000, 64), DType::F32, &Device::Cpu)?;
/// let loss = linear_cross_entropy(&hidden, &head, &tokens, &options)?.loss;
/// let perplexity = perplexity(&loss, &tokens, &options)?.to_scalar::<f32>()?;
/// assert!((perplexity - 1000.).abs() < 0.1);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// `shift >= T`; a `loss` whose shape is not the one the options give it.
pub fn perplexity(loss: &Tensor, targets: &Tensor, options: &Options) -> Result<Tensor> {
    let counted = counted(targets, options)?;
    if options.reduction == Reduction::None {
        return mean_over(&keep("loss", loss, &counted)?, &counted)?.exp();
    }
    if loss.rank() != 0 {
        bail!(
            "loss must be a scalar under Reduction::{:?}, got shape {:?}",
            options.reduction,
            loss.dims()
        )
    }
    match options.reduction {
        Reduction::Sum => (loss / number_of(&counted, loss.dtype())?)?.exp(),
        _ => loss.exp(),
    }
}

/// The log-probability of each sequence, `-sum_t nll_t`: from `nll` of shape `(.., T)` one of shape
/// `(..)`.
///
/// `nll` is [`Output::loss`](crate::Output::loss) under [`Reduction::None`], without
/// [`Options::z_loss`], so positions whose target
/// is the `ignore_index` (a prompt, padding) add nothing. `mask`, u8 of the same shape, keeps only
/// positions where it is not 0.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// use candle_cut_cross_entropy::{
///     linear_cross_entropy, objectives::sequence_log_probs, Options, Reduction,
/// };
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (4, 16, 64), &Device::Cpu)?;
/// # let head = Tensor::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// # let tokens = Tensor::zeros((4, 16), DType::I64, &Device::Cpu)?;
/// let options = Options::default().shift(1).reduction(Reduction::None);
/// let nll = linear_cross_entropy(&hidden, &head, &tokens, &options)?.loss;
/// assert_eq!(sequence_log_probs(&nll, None)?.dims(), [4]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A scalar `nll`; a mask of another shape or dtype.
pub fn sequence_log_probs(nll: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    if nll.rank() == 0 {
        bail!("nll must have shape (.., T), got a scalar: is the reduction Reduction::None?")
    }
    let nll = match mask {
        Some(mask) => keep("nll", nll, mask)?,
        None => nll.clone(),
    };
    nll.sum(D::Minus1)?.neg()
}

/// The log-probabilities, `(B)` each, that one model gives to pairs of answers.
#[derive(Debug, Clone, Copy)]
pub struct Preferences<'a> {
    /// Of the answers that were preferred.
    pub chosen: &'a Tensor,
    /// Of the others.
    pub rejected: &'a Tensor,
}

/// The loss of direct preference optimisation, a scalar: the mean over the pairs of
/// `-log sigmoid(beta ((chosen - rejected) - (reference chosen - reference rejected)))`.
///
/// The log-probabilities come from [`sequence_log_probs`]; those of the reference model should be
/// detached. `beta` (often 0.1) weighs staying close to it.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::{dpo_loss, Preferences};
/// # fn main() -> candle_core::Result<()> {
/// // Log-probabilities of the chosen and rejected half of a batch.
/// let policy = Tensor::new(&[-10f32, -12., -11., -12.], &Device::Cpu)?;
/// let (chosen, rejected) = (policy.narrow(0, 0, 2)?, policy.narrow(0, 2, 2)?);
/// let policy = Preferences { chosen: &chosen, rejected: &rejected };
/// // A policy that is its reference has loss ln 2.
/// let loss = dpo_loss(policy, policy, 0.1)?.to_scalar::<f32>()?;
/// assert!((loss - 2f32.ln()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Shapes that differ, no pairs, a `beta` that is not positive and finite.
///
/// Source: Rafailov et al., *Direct Preference Optimization*,
/// [arXiv 2305.18290](https://arxiv.org/abs/2305.18290), equation 7.
pub fn dpo_loss(policy: Preferences<'_>, reference: Preferences<'_>, beta: f64) -> Result<Tensor> {
    if !(beta > 0. && beta.is_finite()) {
        bail!("beta must be positive and finite, got {beta}")
    }
    let shape = policy.chosen.dims();
    if policy.chosen.elem_count() == 0 {
        bail!("empty input: policy.chosen {shape:?}")
    }
    for (name, tensor) in [
        ("policy.rejected", policy.rejected),
        ("reference.chosen", reference.chosen),
        ("reference.rejected", reference.rejected),
    ] {
        same_shape(name, tensor, "policy.chosen", shape)?;
    }
    let policy = (policy.chosen - policy.rejected)?;
    let reference = (reference.chosen - reference.rejected)?;
    softplus(&((policy - reference)? * -beta)?)?.mean_all()
}

/// The clipped policy loss of proximal policy optimisation, a scalar: with the ratio
/// `r = exp(log_probs - old_log_probs)` and advantages `A`, the mean of
/// `-min(r A, clip(r, 1 - clip, 1 + clip) A)` over the tokens that count.
///
/// All of one shape, one number a token. `log_probs` are `-nll`, the negative
/// [`Output::loss`](crate::Output::loss) under [`Reduction::None`]; `old_log_probs` and `advantages`
/// should be detached. `mask`, u8, says which tokens count (see [`counted`]); `None` is all.
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
    let ratio = keep("log_probs", &(log_probs - old_log_probs)?, mask)?.exp()?;
    let clipped = ratio.clamp(1. - clip, 1. + clip)?;
    let worse = (&ratio * advantages)?.minimum(&(clipped * advantages)?)?;
    mean_over(&keep("advantages", &worse, mask)?, mask)?.neg()
}

/// `values` where the mask is not 0, else 0, whatever (NaN, infinity) stands there.
fn keep(name: &str, values: &Tensor, mask: &Tensor) -> Result<Tensor> {
    if mask.dtype() != DType::U8 {
        bail!("mask must be u8, got {:?}", mask.dtype())
    }
    same_shape(name, values, "mask", mask.dims())?;
    mask.where_cond(values, &values.zeros_like()?)
}

fn same_shape(name: &str, tensor: &Tensor, other: &str, shape: &[usize]) -> Result<()> {
    if tensor.dims() != shape {
        bail!(
            "{name} must have the shape of {other}, {shape:?}, got {:?}",
            tensor.dims()
        )
    }
    Ok(())
}

/// The positions that count, at least 1, as a scalar: counted on the device.
fn number_of(mask: &Tensor, dtype: DType) -> Result<Tensor> {
    let zero = mask.zeros_like()?;
    mask.ne(&zero)?.to_dtype(dtype)?.sum_all()?.maximum(1f64)
}

/// The mean of values that are 0 where the mask is.
fn mean_over(values: &Tensor, mask: &Tensor) -> Result<Tensor> {
    values.sum_all()? / number_of(mask, values.dtype())?
}

/// `log(1 + e^x)`, whose gradient is the sigmoid for every `x`.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let larger = x.detach().relu()?;
    let one = larger.neg()?.exp()?;
    (one + (x - &larger)?.exp()?)?.log()? + larger
}
