//! What a user can choose about the loss.

use crate::VocabParallel;
use candle_core::{bail, DType, Error, Result, Tensor};
use std::str::FromStr;

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

/// Which tiles of the gradient of the logits are computed entry by entry. The others are averaged.
///
/// A tile is a block of rows (positions that count) by a block of classes: 1 row by 256 classes in this crate's CPU
/// implementation, 128 by 128 in its CUDA kernels. Let `p = softmax(z)`. A tile in which some `p_ij`, targets
/// apart, reaches the threshold is computed entry by entry. In any other the gradient has `M_it w_tj` in the place
/// of `p_ij`, where
///
/// - `M_it = sum_j p_ij` is the row's own probability in the tile, without its target's, and
/// - `w_tj = softmax_j(C_j . e_t + b_j)` over the tile's classes (logits capped where there is a softcap), with
///   `e_t = sum_i M_it E_i / sum_i M_it`, the mean row that sees the tile.
///
/// The entry of a row's target is computed exactly and added to its class's share. So every row of the gradient
/// still sums to zero, as `softmax - onehot` does. An implementation that goes through the rows in chunks may take
/// each chunk's own mean row. Dropping such tiles instead, as
/// the reference implementation does, loses a push that always has the same direction: see [`Filter::Drop`].
///
/// ```
/// use candle_cut_cross_entropy::{Filter, Options};
///
/// // Exact gradients of the head; those of the embeddings averaged where every probability is below 1e-3.
/// let options = Options::default()
///     .filter_classifier(Filter::Off)
///     .filter_embeddings(Filter::Threshold(1e-3));
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Filter {
    /// Every tile is computed entry by entry: the exact gradient.
    Off,
    /// [`Filter::Threshold`] with a threshold for the inputs' dtype: 2^-11 for bf16 and f16, 2^-28 for f32 and
    /// 2^-57 for f64, where it is as good as exact. On CUDA, gradients that the forward forms ([`Strategy::Fused`]) are
    /// exact where there are fewer than 65,536 classes: nearly every tile of such a head matters, and exact is faster.
    #[default]
    Auto,
    /// A threshold of your own, in `[0, 1)`. 0 is the exact gradient.
    Threshold(f64),
    /// Tiles whose every `|softmax(z) - onehot(y)|` is below the threshold, in `[0, 1)`, are left out, as in the
    /// reference implementation, whose threshold is the machine epsilon of the dtype divided by 32 (2^-12 for
    /// bf16). For comparison only: what is left out always pushes classes down, and a model that trains without
    /// it ends 20% above the perplexity of exact gradients, or diverges.
    Drop(f64),
}

impl Filter {
    /// The threshold for inputs of this dtype; `None` where every tile is computed.
    pub(crate) fn threshold(self, dtype: DType) -> Result<Option<f64>> {
        Ok(match self {
            Filter::Off => None,
            Filter::Auto => Some(match dtype {
                DType::BF16 | DType::F16 => 2f64.powi(-11),
                DType::F32 => 2f64.powi(-28),
                _ => 2f64.powi(-57),
            }),
            Filter::Threshold(eps) | Filter::Drop(eps) if (0. ..1.).contains(&eps) => Some(eps),
            Filter::Threshold(eps) | Filter::Drop(eps) => {
                bail!("filter threshold must be in [0, 1), got {eps}")
            }
        })
    }
}

impl std::fmt::Display for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Filter::Off => f.write_str("off"),
            Filter::Auto => f.write_str("auto"),
            Filter::Threshold(eps) => write!(f, "{eps}"),
            Filter::Drop(eps) => write!(f, "drop:{eps}"),
        }
    }
}

impl FromStr for Filter {
    type Err = Error;

    /// `off`, `auto`, a threshold such as `0.001`, or `drop:0.001`.
    fn from_str(text: &str) -> Result<Self> {
        let number = |number: &str| number.parse::<f64>().map_err(Error::wrap);
        let filter = match (text, text.strip_prefix("drop:")) {
            ("off", _) => Ok(Filter::Off),
            ("auto", _) => Ok(Filter::Auto),
            (_, Some(eps)) => number(eps).map(Filter::Drop),
            (eps, None) => number(eps).map(Filter::Threshold),
        };
        match filter {
            Ok(filter) => filter.threshold(DType::F32).map(|_| filter),
            Err(_) => bail!(
                "expected the filter off, auto, a threshold such as 0.001 or drop:0.001, got {text:?}"
            ),
        }
    }
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
    /// for bf16 and f16 inputs whose hidden size is a multiple of 8, these are kernels made for it.
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
    /// [`Filter::Auto`] and fewer than 65,536 classes: of few tiles, recomputed logits cost less than logits that are all
    /// written.
    #[default]
    Auto,
    /// The backward computes the logits again: 4 matrix products for loss and gradients.
    Recompute,
    /// The forward forms the gradients while it has the logits at hand, for an upstream gradient
    /// that is one number (reduction mean or sum): 3 products. A forward whose loss is never
    /// differentiated pays for gradients nobody reads; detach its inputs. Where it cannot be done
    /// (reduction none, a workspace too small for a block of rows with all classes, Candle tensor
    /// operations, CUDA kernels other than those for bf16 on compute capability 9.0, a shard of the classes),
    /// or where it would round the gradient of the classifier too often (on CUDA: rows that do not fit the workspace
    /// in 4 blocks, or in one where there are more than 16,384), this is `Recompute`.
    /// For any other upstream gradient (of lse; on the CPU, for f16 a loss scale) or a second backward the
    /// gradients are computed anew: 6 products, so choose `Recompute` there. [`Options::z_loss`] is no such
    /// case.
    Fused,
}

/// The names users know from the reference implementation.
///
/// Every implementation here accumulates gradients in f32 (f64 for f64 inputs), so the presets
/// differ only in what they filter, and `cce` and `cce_kahan` are the same thing.
///
/// ```
/// use candle_cut_cross_entropy::{Options, Preset};
///
/// # fn main() -> candle_core::Result<()> {
/// let preset: Preset = "cce_kahan_full_c".parse()?;
/// let options = Options::preset(preset);
/// # let _ = options;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preset {
    /// Filters both gradients: the default.
    #[default]
    Cce,
    /// The same as [`Preset::Cce`].
    CceKahan,
    /// Filters the gradient of the embeddings only; the reference's choice for pretraining.
    CceKahanFullC,
    /// Filters the gradient of the classifier only.
    CceKahanFullE,
    /// Filters nothing. Also known as `cce_kahan_full_c_full_e`.
    CceExact,
    /// [`Implementation::Native`] with nothing filtered.
    Native,
}

impl Preset {
    /// Every preset, in the order of their names in the documentation.
    pub const ALL: [Preset; 6] = [
        Preset::Cce,
        Preset::CceKahan,
        Preset::CceKahanFullC,
        Preset::CceKahanFullE,
        Preset::CceExact,
        Preset::Native,
    ];

    /// The name on command lines and in tables, such as `cce_exact`.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Cce => "cce",
            Preset::CceKahan => "cce_kahan",
            Preset::CceKahanFullC => "cce_kahan_full_c",
            Preset::CceKahanFullE => "cce_kahan_full_e",
            Preset::CceExact => "cce_exact",
            Preset::Native => "native",
        }
    }
}

impl std::fmt::Display for Preset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if name == "cce_kahan_full_c_full_e" {
            return Ok(Preset::CceExact);
        }
        match Preset::ALL.into_iter().find(|p| p.name() == name) {
            Some(preset) => Ok(preset),
            None => bail!(
                "unknown preset {name:?}, expected one of {}",
                Preset::ALL.map(Preset::name).join(", ")
            ),
        }
    }
}

/// The options of [`linear_cross_entropy`](crate::linear_cross_entropy), built up from
/// [`Options::default`] or [`Options::preset`].
///
/// ```
/// use candle_cut_cross_entropy::{Options, Preset, Reduction};
///
/// // Next-token prediction of a Gemma-2 head, exact gradients, one loss a position.
/// let options = Options::preset(Preset::CceExact)
///     .shift(1)
///     .softcap(30.)
///     .reduction(Reduction::None);
/// # let _ = options;
/// ```
#[derive(Debug, Clone)]
pub struct Options {
    pub(crate) bias: Option<Tensor>,
    pub(crate) ignore_index: i64,
    pub(crate) softcap: Option<f64>,
    pub(crate) reduction: Reduction,
    pub(crate) z_loss: f64,
    pub(crate) shift: usize,
    pub(crate) filter_embeddings: Filter,
    pub(crate) filter_classifier: Filter,
    pub(crate) implementation: Implementation,
    pub(crate) strategy: Strategy,
    pub(crate) workspace: Option<usize>,
    pub(crate) check_targets: bool,
    pub(crate) vocab_parallel: Option<VocabParallel>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bias: None,
            ignore_index: -100,
            softcap: None,
            reduction: Reduction::default(),
            z_loss: 0.,
            shift: 0,
            filter_embeddings: Filter::default(),
            filter_classifier: Filter::default(),
            implementation: Implementation::default(),
            strategy: Strategy::default(),
            workspace: None,
            check_targets: false,
            vocab_parallel: None,
        }
    }
}

impl Options {
    /// The defaults with the switches of a preset.
    pub fn preset(preset: Preset) -> Self {
        let filters = |embeddings, classifier| Self {
            filter_embeddings: embeddings,
            filter_classifier: classifier,
            ..Self::default()
        };
        match preset {
            Preset::Cce | Preset::CceKahan => Self::default(),
            Preset::CceKahanFullC => filters(Filter::Auto, Filter::Off),
            Preset::CceKahanFullE => filters(Filter::Off, Filter::Auto),
            Preset::CceExact => filters(Filter::Off, Filter::Off),
            Preset::Native => {
                filters(Filter::Off, Filter::Off).implementation(Implementation::Native)
            }
        }
    }

    /// A bias of shape `(V)` and the dtype of the inputs, added to the logits before the softcap.
    /// Default: none.
    pub fn bias(mut self, bias: &Tensor) -> Self {
        self.bias = Some(bias.clone());
        self
    }

    /// The target of positions that do not count: they have loss 0, no gradient, and cost
    /// nothing. Default: -100.
    pub fn ignore_index(mut self, ignore_index: i64) -> Self {
        self.ignore_index = ignore_index;
        self
    }

    /// Caps the logits, `z <- softcap * tanh(z / softcap)`, as Gemma 2 does with 30. Takes a number
    /// or an `Option`. Default: none.
    pub fn softcap(mut self, softcap: impl Into<Option<f64>>) -> Self {
        self.softcap = softcap.into();
        self
    }

    /// Adds `weight * lse_i^2` to the loss of every position that counts (z-loss, with `weight` around 1e-4):
    /// it keeps logits from drifting. [`Output::z_loss`](crate::Output::z_loss) is this part by itself. Unlike
    /// [`objectives::z_loss`](crate::objectives::z_loss), which is made of the outputs, it costs nothing, for
    /// gradients formed in the forward ([`Strategy::Fused`]) hold it already. Default: 0, none.
    ///
    /// Source: Chowdhery et al., *PaLM*, [arXiv 2204.02311](https://arxiv.org/abs/2204.02311), section 5.
    pub fn z_loss(mut self, weight: f64) -> Self {
        self.z_loss = weight;
        self
    }

    /// How the positions' losses become one. Default: mean.
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// Position `t` of the embeddings predicts the target at `t + shift` of the same sequence (the
    /// last dimension of the targets). 1 is next-token prediction. Default: 0.
    pub fn shift(mut self, shift: usize) -> Self {
        self.shift = shift;
        self
    }

    /// The filter of both gradients. Default: [`Filter::Auto`]. Where the gradients have filters of their own,
    /// [`Filter::Drop`] goes together with itself and [`Filter::Off`] only.
    pub fn filter(self, filter: Filter) -> Self {
        self.filter_embeddings(filter).filter_classifier(filter)
    }

    /// The filter of the gradient of the embeddings.
    pub fn filter_embeddings(mut self, filter: Filter) -> Self {
        self.filter_embeddings = filter;
        self
    }

    /// The filter of the gradients of the classifier and the bias.
    pub fn filter_classifier(mut self, filter: Filter) -> Self {
        self.filter_classifier = filter;
        self
    }

    /// Which code computes the loss. Default: the fastest that can run.
    pub fn implementation(mut self, implementation: Implementation) -> Self {
        self.implementation = implementation;
        self
    }

    /// How the gradients come about. Default: the fastest within the workspace.
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.strategy = strategy;
        self
    }

    /// The bytes that a forward or backward may use beyond its inputs, its outputs and the gradients. Default:
    /// 64 MiB for the native implementation. Of the CUDA kernels those that form gradients in the forward
    /// ([`Strategy::Fused`]) read it, 1.5 GiB by default, and backwards that recompute: 256 MiB (448 MiB on
    /// compute capability 9.0) or, for long batches, twice what is held of every row, 4 bytes (6) times the
    /// hidden size.
    ///
    /// The native implementation uses some 200 bytes a position and, for half-precision inputs, 2 KiB times the
    /// hidden size however small this is. Inputs that are not contiguous are copied, beyond this.
    ///
    /// On CUDA, where the GPU has no room for a default, half of it is tried, and so on.
    pub fn workspace(mut self, bytes: usize) -> Self {
        self.workspace = Some(bytes);
        self
    }

    /// Makes a target outside `[0, V)` an error also on a GPU, where the check has to wait for the
    /// device. Without it such a target is never read out of bounds and its loss is NaN. The native
    /// implementation always checks. Default: false.
    pub fn check_targets(mut self, check: bool) -> Self {
        self.check_targets = check;
        self
    }

    /// The classifier and the bias are this rank's shard of the classes; loss, lse and the gradient of the embeddings
    /// are those over the classes of all ranks. Takes a [`VocabParallel`] or an `Option`. Default: none.
    ///
    /// Every rank calls [`linear_cross_entropy`](crate::linear_cross_entropy) and the backward, in the same order, with
    /// the same embeddings, targets and options, and differentiates by the embeddings where the others do. Targets are
    /// global: a class of any rank. One that is a class of no rank, or of two whose shards overlap, is an error on every
    /// rank where targets are checked ([`Options::check_targets`]), and elsewhere its loss is NaN.
    ///
    /// The gradients are computed in the backward ([`Strategy::Recompute`]): before that lse is not known. With a
    /// filter, one number of every position and block of classes (128 by the CUDA kernels, 256 on the CPU) stays in
    /// memory until then, beyond the workspace.
    /// [`Output::kept_tiles`](crate::Output::kept_tiles) is that of this rank's shard.
    pub fn vocab_parallel(mut self, shard: impl Into<Option<VocabParallel>>) -> Self {
        self.vocab_parallel = shard.into();
        self
    }
}
