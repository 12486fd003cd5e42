//! Cut Cross-Entropy for [Candle](https://docs.rs/candle-core): the cross-entropy loss of a linear
//! classifier, and its gradients, in a workspace of fixed size instead of memory for the `N x V` logits.
//!
//! [`linear_cross_entropy`] takes the place of
//! `candle_nn::loss::cross_entropy(&hidden.matmul(&head.t()?)?, &targets)`:
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use candle_cut_cross_entropy::{backward, linear_cross_entropy, Options};
//!
//! # fn main() -> candle_core::Result<()> {
//! let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?; // (.., D)
//! let head = Var::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?; // (V, D)
//! let tokens = Tensor::zeros((2, 16), DType::U32, &Device::Cpu)?; // (..)
//! let loss = linear_cross_entropy(&hidden, &head, &tokens, &Options::default().shift(1))?.loss;
//! let grads = backward(&loss)?; // optimizer.step(&grads)?
//! # assert!(grads.get(&head).is_some());
//! # Ok(())
//! # }
//! ```
//!
//! - [`Options`]: bias, softcap, temperature, `ignore_index`, shift, reduction, label smoothing, weights, entropy, predicted
//!   classes, gradient filters, workspace, and the [`Preset`]s of the [reference implementation](https://github.com/apple/ml-cross-entropy).
//! - [`LinearCrossEntropy`]: the same as a layer that owns or shares the head's weight; [`cut_cross_entropy`] makes one with
//!   a `VarBuilder`.
//! - [`backward()`]: `loss.backward()` with a third of the memory for the head's gradient.
//! - [`vocab_parallel`]: a head whose classes are sharded over threads, processes or GPUs.
//! - `ops`: attention, norms, rotary embeddings and gated activations with a backward, for any Candle model (feature
//!   `models`).
//! - [`objectives`]: perplexity, accuracy, and losses over preferences (DPO and others) and rewards (PPO, GRPO and others) on
//!   top of the loss.
//! - [`soft_targets`]: distillation from a teacher's likeliest classes or from its whole distribution, and the logits of
//!   chosen classes.
//!
//! Features: `cuda` for this crate's kernels on NVIDIA GPUs, `nccl` for a head sharded over several of them,
//! `metal` for Candle's Metal backend. Without any, the loss runs on the CPU, on all threads.
//!
//! # Threads and GPUs
//!
//! A loss may be computed and differentiated in any thread. But `Device::new_cuda` gives every thread a CUDA
//! stream of its own, and neither Candle nor this crate makes one wait for another: a tensor that one thread
//! has computed may not be finished when another thread reads it, or still be read when the other frees it.
//! So on such a device make the inputs, the loss and the backward in one thread, or call
//! `Device::synchronize` in the thread that hands a tensor (or a loss that is to be differentiated) over.
//! The one stream of a `Device::new_cuda_with_stream` serves all threads that use the device or its clones.
//!
//! The method is that of Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*,
//! [arXiv 2411.09009](https://arxiv.org/abs/2411.09009).
#![deny(missing_docs)]

mod backward;
mod blocks;
mod by_class;
#[cfg(feature = "cuda")]
mod cuda;
mod devices;
mod layer;
mod loss;
mod low_rank;
mod matrices;
#[cfg(feature = "models")]
pub mod models;
mod native;
mod node;
pub mod objectives;
mod op;
#[cfg(feature = "models")]
pub mod ops;
mod options;
#[cfg(any(feature = "cuda", test))]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, unused_imports))]
mod plan;
mod positions;
mod problem;
pub mod soft_targets;
mod terms;
pub mod vocab_parallel;

pub use backward::backward;
pub use layer::{cut_cross_entropy, cut_cross_entropy_no_bias, LinearCrossEntropy};
pub use loss::{linear_cross_entropy, Output};
pub use low_rank::LowRank;
pub use options::{Entropy, Filter, Implementation, Options, Preset, Reduction, Strategy};
pub use vocab_parallel::VocabParallel;
