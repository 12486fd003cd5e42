//! What is made of a loss's outputs: the squared log-sum-exp of the z-loss, perplexity, accuracy, log-probabilities of
//! sequences, and the objectives of learning from preferences and from rewards.
//!
//! | learns from | objectives |
//! |---|---|
//! | pairs of answers, with a reference model | [`dpo_loss`], [`ipo_loss`] |
//! | pairs of answers, without one | [`cpo_loss`], [`simpo_loss`], [`orpo_loss`] |
//! | answers, each desirable or not | [`kto_loss`] |
//! | sampled answers and their rewards | [`ppo_loss`]; [`grpo_loss`], which is DAPO, Dr. GRPO and GSPO too |
//!
//! All are ordinary, differentiable Candle operations on tensors of one number a position or a sequence. They compute
//! in f32, in f64 where their input is; bf16 and f16 come out as f32. Log-probabilities of tokens are `-nll`, the
//! negative [`Output::loss`](crate::Output::loss) under [`Reduction::None`]; masks come from [`counted`].

mod kto;
mod policy;
mod preferences;

use crate::positions::{pick_positions, to_i64};
use crate::{Options, Reduction};
use candle_core::{bail, DType, Result, Tensor, D};

pub use kto::{kto_kl, kto_loss, KtoOptions};
pub use policy::{group_advantages, grpo_loss, ppo_loss, Average, GrpoOptions};
pub use preferences::{cpo_loss, dpo_loss, ipo_loss, orpo_loss, simpo_loss, Preferences};

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
    to_i64(&shifted(targets, options.shift)?)?
        .contiguous()?
        .ne(options.ignore_index)
}

/// The targets of the positions.
fn shifted(targets: &Tensor, shift: usize) -> Result<Tensor> {
    let (_, shape) = pick_positions(targets.dims(), shift)?;
    match shift {
        0 => Ok(targets.clone()),
        shift => targets.narrow(D::Minus1, shift, shape[shape.len() - 1]),
    }
}

/// The square of the log-sum-exp, `lse_i^2`, of the positions that count, reduced as the options say.
///
/// Added to the loss with a small factor it is the z-loss, which keeps logits from drifting;
/// [`Options::z_loss_weight`] does that within the loss. `lse` is
/// [`Output::lse`](crate::Output::lse), `targets` and `options` those of the loss. The mean is over the
/// positions that count, 0 when none does.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// use candle_cut_cross_entropy::{linear_cross_entropy, objectives::squared_lse, Options};
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?;
/// # let head = Var::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// # let tokens = Tensor::zeros((2, 16), DType::I64, &Device::Cpu)?;
/// let options = Options::default().shift(1);
/// let output = linear_cross_entropy(&hidden, &head, &tokens, &options)?;
/// let loss = (output.loss + 1e-4 * squared_lse(&output.lse, &tokens, &options)?)?;
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
pub fn squared_lse(lse: &Tensor, targets: &Tensor, options: &Options) -> Result<Tensor> {
    let counted = counted(targets, options)?;
    // Masked before the square: an infinite lse there would make its gradient NaN.
    let squares = keep("lse", &wide(lse)?, &counted)?.sqr()?;
    match options.reduction {
        Reduction::None => Ok(squares),
        Reduction::Sum => squares.sum_all(),
        Reduction::Mean => mean_over(&squares, &counted),
    }
}

/// The perplexity, `exp(mean nll)` over the positions that count: a scalar, 1 when none does.
///
/// `loss` is [`Output::loss`](crate::Output::loss) under any reduction, `targets` and `options` those
/// of the loss, which must be without [`Options::z_loss_weight`], label smoothing and weights: the loss is to be the
/// negative log-probability.
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
    let loss = &wide(loss)?;
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

/// The share of the positions that count whose predicted class is the target: a scalar f32, 0 when none counts.
///
/// `predicted` is [`Output::predicted`](crate::Output::predicted), `targets` and `options` those of the loss. Weights do not
/// matter to it, nor does the reduction.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::{linear_cross_entropy, objectives::accuracy, Options};
/// # fn main() -> candle_core::Result<()> {
/// // Each row of the head is the embedding of its class.
/// let head = Tensor::new(&[[1f32, 0.], [0., 1.]], &Device::Cpu)?;
/// let hidden = Tensor::new(&[[2f32, 0.], [0., 3.], [1., 0.], [0., 0.]], &Device::Cpu)?;
/// let targets = Tensor::new(&[0i64, 1, 1, -100], &Device::Cpu)?;
/// let options = Options::default().predicted(true);
/// let predicted = linear_cross_entropy(&hidden, &head, &targets, &options)?.predicted.unwrap();
/// assert_eq!(predicted.to_vec1::<u32>()?, [0, 1, 0, u32::MAX]);
/// let accuracy = accuracy(&predicted, &targets, &options)?.to_scalar::<f32>()?;
/// assert!((accuracy - 2. / 3.).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// `shift >= T`; a `predicted` that is not u32 or whose shape is not that of the positions.
pub fn accuracy(predicted: &Tensor, targets: &Tensor, options: &Options) -> Result<Tensor> {
    if predicted.dtype() != DType::U32 {
        bail!("predicted must be u32, got {:?}", predicted.dtype())
    }
    let counted = counted(targets, options)?;
    same_shape("predicted", predicted, "the positions", counted.dims())?;
    let targets = shifted(targets, options.shift)?;
    let right = to_i64(&targets)?
        .contiguous()?
        .eq(&predicted.to_dtype(DType::I64)?.contiguous()?)?
        .to_dtype(DType::F32)?;
    mean_over(&keep("predicted", &right, &counted)?, &counted)
}

/// The log-probability of each sequence, `-sum_t nll_t`: from `nll` of shape `(.., T)` one of shape
/// `(..)`.
///
/// `nll` is [`Output::loss`](crate::Output::loss) under [`Reduction::None`], without
/// [`Options::z_loss_weight`], label smoothing and weights, so positions whose target
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
    let nll = wide(nll)?;
    let nll = match mask {
        Some(mask) => keep("nll", &nll, mask)?,
        None => nll,
    };
    nll.sum(D::Minus1)?.neg()
}

/// The mean log-probability of the tokens of each sequence, `-sum_t nll_t / n` over the `n` tokens that count: from
/// `nll` of shape `(.., T)` one of shape `(..)`. 0 for a sequence without such tokens.
///
/// `nll` is as for [`sequence_log_probs`]. `mask`, u8 of the same shape, says which tokens count; [`counted`] makes it of
/// the targets.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::mean_log_probs;
/// # fn main() -> candle_core::Result<()> {
/// let nll = Tensor::new(&[[1f32, 2., 0.], [0.5, 0., 0.]], &Device::Cpu)?;
/// let mask = Tensor::new(&[[1u8, 1, 0], [1, 0, 0]], &Device::Cpu)?;
/// assert_eq!(mean_log_probs(&nll, &mask)?.to_vec1::<f32>()?, [-1.5, -0.5]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`sequence_log_probs`].
pub fn mean_log_probs(nll: &Tensor, mask: &Tensor) -> Result<Tensor> {
    sequence_log_probs(nll, Some(mask))? / number_of_last(mask, wide(nll)?.dtype())?
}

/// In a dtype that can be summed: a bf16 sum of ones ends at 256.
fn wide(values: &Tensor) -> Result<Tensor> {
    match values.dtype() {
        DType::F64 => Ok(values.clone()),
        _ => values.to_dtype(DType::F32),
    }
}

/// `values` where the mask is not 0, else 0, whatever (NaN, infinity) stands there.
fn keep(name: &str, values: &Tensor, mask: &Tensor) -> Result<Tensor> {
    flags("mask", mask)?;
    same_shape(name, values, "mask", mask.dims())?;
    mask.where_cond(values, &values.zeros_like()?)
}

/// Of what is true or not, 0 is false.
fn flags(name: &str, flags: &Tensor) -> Result<()> {
    if flags.dtype() != DType::U8 {
        bail!("{name} must be u8, got {:?}", flags.dtype())
    }
    Ok(())
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

fn positive(name: &str, number: f64) -> Result<()> {
    if !(number > 0. && number.is_finite()) {
        bail!("{name} must be positive and finite, got {number}")
    }
    Ok(())
}

fn at_least_zero(name: &str, number: f64) -> Result<()> {
    if !(number >= 0. && number.is_finite()) {
        bail!("{name} must be at least 0 and finite, got {number}")
    }
    Ok(())
}

/// 1 where a position counts, else 0.
fn ones_of(mask: &Tensor, dtype: DType) -> Result<Tensor> {
    mask.ne(&mask.zeros_like()?)?.to_dtype(dtype)
}

/// The positions that count, at least 1, as a scalar: counted on the device.
fn number_of(mask: &Tensor, dtype: DType) -> Result<Tensor> {
    ones_of(mask, dtype)?.sum_all()?.maximum(1f64)
}

/// The positions that count in each row of the last dimension, at least 1.
fn number_of_last(mask: &Tensor, dtype: DType) -> Result<Tensor> {
    ones_of(mask, dtype)?.sum(D::Minus1)?.maximum(1f64)
}

/// The mean of values that are 0 where the mask is.
fn mean_over(values: &Tensor, mask: &Tensor) -> Result<Tensor> {
    values.sum_all()? / number_of(mask, values.dtype())?
}

/// The mean over the last dimension of values that are 0 where the mask is.
fn mean_over_last(values: &Tensor, mask: &Tensor) -> Result<Tensor> {
    values.sum(D::Minus1)? / number_of_last(mask, values.dtype())?
}

/// `log(1 + e^x)`, whose gradient is the sigmoid for every `x`.
fn softplus(x: &Tensor) -> Result<Tensor> {
    // Candle's gradient of relu at 0 is 1 and that of abs too, which makes 1/2 here.
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.)?.log()?
}
