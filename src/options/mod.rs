//! What a user can choose about the loss.

mod choices;
mod filter;
mod preset;

use crate::{LowRank, VocabParallel};
use candle_core::Tensor;

pub use choices::{Entropy, Implementation, Reduction, Strategy};
pub use filter::Filter;
pub use preset::Preset;

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
    pub(crate) adapter: Option<LowRank>,
    pub(crate) ignore_index: i64,
    pub(crate) softcap: Option<f64>,
    pub(crate) logit_scale: f64,
    pub(crate) reduction: Reduction,
    pub(crate) label_smoothing: f64,
    pub(crate) class_weights: Option<Tensor>,
    pub(crate) token_weights: Option<Tensor>,
    pub(crate) z_loss_weight: f64,
    pub(crate) entropy_bonus: f64,
    pub(crate) entropy: Entropy,
    pub(crate) predicted: bool,
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
            adapter: None,
            ignore_index: -100,
            softcap: None,
            logit_scale: 1.,
            reduction: Reduction::default(),
            label_smoothing: 0.,
            class_weights: None,
            token_weights: None,
            z_loss_weight: 0.,
            entropy_bonus: 0.,
            entropy: Entropy::default(),
            predicted: false,
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

    /// A bias of shape `(V)` and the dtype of the inputs, added to the logits before the softcap. Takes a tensor or an
    /// `Option`. Default: none.
    pub fn bias<'a>(mut self, bias: impl Into<Option<&'a Tensor>>) -> Self {
        self.bias = bias.into().cloned();
        self
    }

    /// A low-rank adapter (LoRA) of the classifier: the loss is that of `C + scale B A`, with `C` frozen, and the adapter
    /// has the gradient. Neither that sum nor its gradient is formed: the logits' product has `r` more columns, the
    /// gradient of the embeddings too, and that of `B` is a product of `r` columns. Takes a [`LowRank`] or an `Option`.
    /// Default: none.
    ///
    /// Goes together with all other options; [`soft_targets`](crate::soft_targets) take none. Nothing is filtered, whatever the
    /// filter. On a shard of the classes `B` is the shard's, and `A` the same on every rank; its gradient is summed where
    /// that of the embeddings is, so without
    /// [`reduce_e_grad`](crate::VocabParallel::reduce_e_grad) the caller sums both. Each call keeps a copy of the embeddings
    /// with `r` more columns until the backward, after `D` rounded up to a multiple of 64. `A` multiplies every row of the
    /// embeddings: NaN or infinity in one that does not count makes the gradient of `A` NaN, though nothing else.
    ///
    /// # Errors
    /// Of the call: shapes that do not match, a scale that is not finite, a classifier that is tracked.
    pub fn adapter(mut self, adapter: impl Into<Option<LowRank>>) -> Self {
        self.adapter = adapter.into();
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

    /// Multiplies the logits, after the bias and the softcap: the inverse of a temperature. Loss, lse, entropy and gradients
    /// are those of the logits so scaled. Positive. Default: 1.
    pub fn logit_scale(mut self, scale: f64) -> Self {
        self.logit_scale = scale;
        self
    }

    /// Mixes the target with the uniform distribution over the classes: with `s` the smoothing, in `[0, 1]`, and `w` the
    /// [class weights](Self::class_weights) or ones, a position's loss is
    /// `(1 - s) w_y (lse - z_y) + s / V sum_j w_j (lse - z_j)`, as in PyTorch's `cross_entropy`. Not together with a
    /// softcap. Default: 0.
    ///
    /// The uniform part is a sum over the classes `u = sum_j w_j C_j` and the products `E_i . u`. It costs no matrix product
    /// but a pass over the memory of classifier and embeddings in the forward, and one over the embeddings and the gradients
    /// in the backward. In bf16 and f16 the gradients are rounded once more.
    ///
    /// Source: Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*,
    /// [arXiv 1512.00567](https://arxiv.org/abs/1512.00567), section 7.
    pub fn label_smoothing(mut self, smoothing: f64) -> Self {
        self.label_smoothing = smoothing;
        self
    }

    /// A weight for each class, `(V)`, by which the loss of a position is multiplied according to its target, though not
    /// the [z-loss](Self::z_loss_weight) and the [entropy bonus](Self::entropy_bonus): a float dtype, not differentiated. Under [`Reduction::Mean`] the sum is divided by
    /// the sum of the weights of the positions that count, as in PyTorch's `cross_entropy`, where that is not 0. On a shard
    /// of the classes these are the weights of all classes. Takes a tensor or an `Option`. Default: none.
    pub fn class_weights<'a>(mut self, weights: impl Into<Option<&'a Tensor>>) -> Self {
        self.class_weights = weights.into().cloned();
        self
    }

    /// A weight for each target, of the shape of the targets, by which its loss is multiplied, z-loss and entropy bonus included: a float
    /// dtype, not differentiated. Under [`Reduction::Mean`] the sum is divided by the sum of the weights (each times its
    /// target's class weight, if there are any) over the positions that count, where that is not 0. With a
    /// [shift](Self::shift) a weight is that of the target it lies beside. A weight of 0 is no `ignore_index`: the position is
    /// computed, and a NaN there stays one. Unlike weights applied to the losses of [`Reduction::None`] these leave
    /// [`Strategy::Fused`] possible, except on CUDA in f16. Takes a tensor or an `Option`. Default: none.
    pub fn token_weights<'a>(mut self, weights: impl Into<Option<&'a Tensor>>) -> Self {
        self.token_weights = weights.into().cloned();
        self
    }

    /// Adds `weight * lse_i^2` to the loss of every position that counts (z-loss, with `weight` around 1e-4):
    /// it keeps logits from drifting. [`Output::z_loss`](crate::Output::z_loss) is this part by itself. Unlike
    /// [`objectives::squared_lse`](crate::objectives::squared_lse), which is made of the outputs, it costs nothing, for
    /// gradients formed in the forward ([`Strategy::Fused`]) hold it already; only on CUDA in f16 they are then computed in
    /// the backward. Default: 0, none.
    ///
    /// Source: Chowdhery et al., *PaLM*, [arXiv 2204.02311](https://arxiv.org/abs/2204.02311), section 5.
    pub fn z_loss_weight(mut self, weight: f64) -> Self {
        self.z_loss_weight = weight;
        self
    }

    /// Subtracts `weight * H_i` from the loss of every position that counts, `H_i` its entropy: an entropy bonus, as of
    /// `loss - weight * entropy.mean()` in training by reinforcement, where the weight is known beforehand. Unlike a loss made
    /// of a [differentiable entropy](Entropy::Differentiable) it leaves [`Strategy::Fused`] possible, except on CUDA in f16
    /// or with a softcap. [`Output::entropy`](crate::Output::entropy) is then there, as a value at least. As with a differentiable
    /// entropy the gradients are exact: no filter is applied. A token's [weight](Self::token_weights) multiplies its bonus,
    /// its class's weight does not. Negative weights keep the entropy low. Default: 0, none.
    ///
    /// Source: Williams and Peng, *Function Optimization Using Connectionist Reinforcement Learning Algorithms*, Connection
    /// Science 3, 1991; Mnih et al., *Asynchronous Methods for Deep Reinforcement Learning*,
    /// [arXiv 1602.01783](https://arxiv.org/abs/1602.01783), section 4.
    pub fn entropy_bonus(mut self, weight: f64) -> Self {
        self.entropy_bonus = weight;
        self
    }

    /// Whether [`Output::entropy`](crate::Output::entropy) is computed, and whether it can be differentiated. Default: it is
    /// not computed, except where there is an [`entropy_bonus`](Self::entropy_bonus).
    pub fn entropy(mut self, entropy: Entropy) -> Self {
        self.entropy = entropy;
        self
    }

    /// Whether [`Output::predicted`](crate::Output::predicted), the likeliest class of each position, is computed. On a shard
    /// of the classes it is the likeliest of all ranks'. Default: false.
    pub fn predicted(mut self, predicted: bool) -> Self {
        self.predicted = predicted;
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
    /// Where the kernels for compute capability 9.0 take a copy of the classifier ([`Implementation::Cuda`]), it is a part
    /// of a workspace that is given, and comes on top of a default.
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
