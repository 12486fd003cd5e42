//! The loss: validate, run, reduce.

use crate::objectives::squared_lse;
use crate::op::contract::KeptTiles;
use crate::op::graph::apply;
use crate::problem::Problem;
use crate::{Entropy, Implementation, Options, Reduction, Strategy};
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// What [`linear_cross_entropy`] returns. `loss` and `lse` are f32 and differentiable.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_cut_cross_entropy::{linear_cross_entropy, Options};
///
/// # fn main() -> candle_core::Result<()> {
/// let e = Var::randn(0f32, 1., (4, 8), &Device::Cpu)?;
/// let c = Tensor::randn(0f32, 1., (10, 8), &Device::Cpu)?;
/// let y = Tensor::zeros(4, DType::U32, &Device::Cpu)?;
/// let output = linear_cross_entropy(&e, &c, &y, &Options::default())?;
/// // The loss and 1e-4 times the mean of the squared lse, through one backward.
/// let total = (&output.loss + (output.lse.sqr()?.mean_all()? * 1e-4)?)?;
/// total.backward()?;
/// assert!(output.kept_tiles()?.is_some());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Output {
    /// The loss: a scalar, or one number a position under [`Reduction::None`].
    pub loss: Tensor,
    /// `log sum_j exp z_ij`, one number a position whatever the reduction, 0 where the position
    /// does not count. Its gradient reaches the inputs too (z-loss).
    pub lse: Tensor,
    /// The part of the loss that [`Options::z_loss_weight`] has added, reduced as the loss is, to be reported: no
    /// gradient goes through it. `None` where the weight is 0.
    pub z_loss: Option<Tensor>,
    /// The entropy of each position's distribution over the classes, `-sum_j p_ij log p_ij` in nats, 0 where the position
    /// does not count: f32, the shape of `lse`. `None` unless [`Options::entropy`] asks for it
    /// or the loss has an [entropy bonus](Options::entropy_bonus).
    pub entropy: Option<Tensor>,
    /// The likeliest class of each position, the lowest of several: u32, the shape of `lse`, [`u32::MAX`] where the
    /// position does not count; where a logit is NaN, any class. `None` unless [`Options::predicted`] asks for it.
    /// [`objectives::accuracy`](crate::objectives::accuracy) compares it with the targets.
    pub predicted: Option<Tensor>,
    /// Which code has computed this: [`Implementation::Native`], [`Implementation::Cuda`], which are here the kernels
    /// for compute capability 9.0, or [`Implementation::CudaPortable`].
    pub implementation: Implementation,
    /// [`Strategy::Fused`] where the gradients of the loss are formed already; [`Strategy::Recompute`] where a backward
    /// computes the logits again, also where that was not asked for because the other could not be done.
    pub strategy: Strategy,
    kept: Arc<KeptTiles>,
}

impl Output {
    /// The share of gradient tiles that the filter kept in the last backward through this output,
    /// in `[0, 1]`: of the gradient that kept more, where both are computed. 1 where nothing is filtered
    /// or no position counts. `None` before a backward. On a GPU this waits for the device.
    ///
    /// # Errors
    /// Those of copying two numbers from the device.
    pub fn kept_tiles(&self) -> Result<Option<f64>> {
        self.kept.share()
    }
}

/// The cross-entropy of a linear classifier, `-log softmax(softcap(E C^T + b))[y]`, without storing
/// the logits.
///
/// With `z_ij = E_i . C_j + b_j`, capped to `softcap * tanh(z / softcap)` if a softcap is set, and times the
/// `logit_scale`: `lse_i = log sum_j exp z_ij` and `loss_i = lse_i - z_{i, y_i}`, plus `w lse_i^2` if a z-loss of
/// weight `w` is set, less `w H_i` with an entropy bonus of weight `w`. Label smoothing and weights of classes and tokens change a position's loss as [`Options`] says.
///
/// | argument | shape | dtype |
/// |---|---|---|
/// | `embeddings` E | `(.., D)` | bf16, f16, f32, f64 |
/// | `classifier` C | `(V, D)` | that of the embeddings |
/// | `targets` y | `(..)` | i64, u32, i32 |
///
/// Products accumulate in f32 (f64 for f64 inputs). The gradients of the embeddings, the classifier
/// and the bias have their argument's dtype and shape, and one that is not tracked costs nothing.
/// Targets in i32 cost a wait for a GPU where Candle has to copy or cast them: not contiguous ones, and
/// with a z-loss, label smoothing, weights of classes or tokens, or in [`objectives`](crate::objectives).
/// [`backward`](crate::backward()) saves memory over `loss.backward()` where the classifier is a `Var`.
///
/// # Errors
/// Shapes, dtypes or devices that do not match, those of weights too, an empty dimension, a `shift` that reaches beyond the
/// sequence, a softcap, `logit_scale`, label smoothing, z-loss weight, entropy bonus or filter threshold out of range, label smoothing
/// together with a softcap, a target outside `[0, V)` that is not the
/// `ignore_index` (see [`Options::check_targets`]).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_cut_cross_entropy::{linear_cross_entropy, Options};
///
/// # fn main() -> candle_core::Result<()> {
/// let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?;
/// let head = Var::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// let tokens = Tensor::zeros((2, 16), candle_core::DType::I64, &Device::Cpu)?;
/// let output = linear_cross_entropy(&hidden, &head, &tokens, &Options::default().shift(1))?;
/// let grads = output.loss.backward()?;
/// assert_eq!(grads.get(&head).unwrap().dims(), [1000, 64]);
/// # Ok(())
/// # }
/// ```
///
/// Source: Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*,
/// [arXiv 2411.09009](https://arxiv.org/abs/2411.09009).
pub fn linear_cross_entropy(
    embeddings: &Tensor,
    classifier: &Tensor,
    targets: &Tensor,
    options: &Options,
) -> Result<Output> {
    let (problem, matrices) = Problem::new(embeddings, classifier, targets, options)?;
    let applied = apply(&problem, matrices.as_ref())?;
    let loss = match options.reduction {
        Reduction::None => applied.losses.reshape(problem.shape.as_slice())?,
        Reduction::Mean | Reduction::Sum => applied.loss.reshape(())?,
    };
    let lse = applied.lse.reshape(problem.shape.as_slice())?;
    let z_loss = match (options.z_loss_weight, &problem.weights) {
        (0., _) => None,
        (weight, None) => Some((squared_lse(&lse.detach(), targets, options)? * weight)?),
        (_, Some(weights)) => Some(weights.z_loss(&lse.detach(), options.reduction)?),
    };
    let shaped = |values: Tensor| values.reshape(problem.shape.as_slice());
    Ok(Output {
        loss,
        lse,
        z_loss,
        entropy: match (options.entropy, applied.entropy) {
            (Entropy::Differentiable, entropy) => entropy.map(shaped).transpose()?,
            (_, entropy) => entropy.map(|h| shaped(h.detach())).transpose()?,
        },
        predicted: applied.predicted.map(shaped).transpose()?,
        implementation: applied.ran.implementation,
        strategy: applied.ran.strategy,
        kept: applied.kept,
    })
}
