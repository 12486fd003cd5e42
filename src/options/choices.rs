//! Choices among a few.

/// How the losses of the positions become one.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cut_cross_entropy::{linear_cross_entropy, Options, Reduction};
///
/// # fn main() -> candle_core::Result<()> {
/// let e = Tensor::randn(0f32, 1., (4, 8), &Device::Cpu)?;
/// let c = Tensor::randn(0f32, 1., (10, 8), &Device::Cpu)?;
/// let y = Tensor::zeros(4, DType::U32, &Device::Cpu)?;
/// let loss = |r| linear_cross_entropy(&e, &c, &y, &Options::default().reduction(r)).map(|o| o.loss);
/// assert_eq!(loss(Reduction::Mean)?.rank(), 0);
/// assert_eq!(loss(Reduction::None)?.dims(), [4]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// The mean over the positions that count; 0 when none does.
    #[default]
    Mean,
    /// The sum over the positions that count.
    Sum,
    /// One loss a position, 0 where the target is `ignore_index`.
    None,
}

/// Whether the entropy of each position's distribution is computed.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cut_cross_entropy::{linear_cross_entropy, Entropy, Options};
///
/// # fn main() -> candle_core::Result<()> {
/// let e = Tensor::randn(0f32, 1., (4, 8), &Device::Cpu)?;
/// let c = Tensor::zeros((10, 8), DType::F32, &Device::Cpu)?;
/// let y = Tensor::zeros(4, DType::U32, &Device::Cpu)?;
/// let output = linear_cross_entropy(&e, &c, &y, &Options::default().entropy(Entropy::Value))?;
/// // A head of zeros finds every one of 10 classes as likely.
/// let entropy = output.entropy.unwrap().to_vec1::<f32>()?;
/// assert!(entropy.iter().all(|h| (h - 10f32.ln()).abs() < 1e-5));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Entropy {
    /// It is not.
    #[default]
    Off,
    /// Its value, to be reported: no gradient goes through it.
    Value,
    /// Its value, and a gradient through it, for whatever is made of it; a bonus of a known weight is cheaper as
    /// [`Options::entropy_bonus`](crate::Options::entropy_bonus). The gradients of this loss are then exact: no filter
    /// is applied, for entries of little probability may matter to the entropy. On the CPU [`Strategy::Auto`] is then
    /// [`Strategy::Recompute`].
    Differentiable,
}

/// Which code computes the loss.
///
/// ```
/// use candle_cut_cross_entropy::{Implementation, Options};
///
/// // On a GPU, a second opinion of the kernels:
/// let options = Options::default().implementation(Implementation::Native);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Implementation {
    /// The CUDA kernels where they can run (an NVIDIA GPU of compute capability 8.0 or later, bf16,
    /// f16 or f32, feature `cuda`), the native implementation elsewhere.
    #[default]
    Auto,
    /// Blocks of rows and classes in Candle tensor operations, on any device; on the CPU, matrix
    /// products with the passes between them fused in.
    Native,
    /// The CUDA kernels, or an error that says why they cannot run. On compute capability 9.0 (H100, H200),
    /// for bf16 and f16 inputs, these are kernels made for it. Where the hidden size is not a multiple of 8, they take
    /// a copy of the classifier, within the workspace if one is given: if that is less than twice as much, or the
    /// classifier has an adapter, the kernels for every GPU run.
    Cuda,
    /// The CUDA kernels for every GPU, on compute capability 9.0 too.
    CudaPortable,
}

/// How the gradients come about, a trade of time for memory.
///
/// ```
/// use candle_cut_cross_entropy::{Options, Strategy};
///
/// // A forward that is cheap when its loss may never be differentiated:
/// let options = Options::default().strategy(Strategy::Recompute);
/// # let _ = options;
/// ```
///
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Strategy {
    /// `Fused` where it is faster within the workspace, else `Recompute`. On CUDA that is where no filter is on, or
    /// [`Filter::Auto`](crate::Filter::Auto) and fewer than 65,536 classes: of few tiles, recomputed logits cost less than
    /// logits that are all written.
    #[default]
    Auto,
    /// The backward computes the logits again: 4 matrix products for loss and gradients.
    Recompute,
    /// The forward forms the gradients while it has the logits at hand, for an upstream gradient
    /// that is one number (reduction mean or sum): 3 products. A forward whose loss is never
    /// differentiated pays for gradients nobody reads; detach its inputs.
    ///
    /// This is `Recompute`, and [`Output::strategy`](crate::Output::strategy) says so, where it cannot be done: with
    /// reduction none, with a workspace too small for a block of rows with all classes, in Candle tensor operations, in CUDA
    /// kernels other than those for compute capability 9.0, there in f16 with weights of classes or tokens, a z-loss, an
    /// entropy bonus or a filter that averages, and in bf16 with such weights together with such a filter, on a shard of the
    /// classes, on CUDA with an entropy that is differentiated or an
    /// [`entropy_bonus`](crate::Options::entropy_bonus) under a softcap, and where no gradient is wanted.
    ///
    /// For any other upstream gradient (of lse or the entropy; on the CPU, for f16 a loss scale) or a second backward the
    /// gradients are computed anew: 6 products, so choose `Recompute` there. A
    /// [`z_loss_weight`](crate::Options::z_loss_weight) or an [`entropy_bonus`](crate::Options::entropy_bonus) is no such case.
    Fused,
}
