//! A head whose classes are sharded over ranks: threads, processes, GPUs.
//!
//! Rank `r` holds the classes `start..stop`, rows of the classifier and numbers of the bias; embeddings and targets
//! are the same on every rank. Targets stay global: a class of `0..V`.
//!
//! With `m_r`, `s_r` and `t_r` the maximum of a row's logits on rank `r`, its `sum_j exp(z_j - m_r)` there, and its
//! target's logit where the target lies there (else 0):
//!
//! ```text
//! m    = max_r m_r                      one all-reduce, N numbers
//! s, t = sum_r s_r exp(m_r - m), t_r    one all-reduce, 3 N numbers (the third counts the ranks with the target)
//! lse  = m + log s,   nll = lse - t
//! dE   = sum_r dE_r                     one all-reduce, N D numbers
//! ```
//!
//! Every rank returns the same loss and lse, the gradients of its own classes, and the whole gradient of the
//! embeddings. `docs/vocab_parallel.md` in the repository says what is sent, and what it should cost.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use candle_cut_cross_entropy::vocab_parallel::{ThreadCommunicator, VocabParallel};
//! use candle_cut_cross_entropy::{backward, linear_cross_entropy, Options};
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! # fn main() -> candle_core::Result<()> {
//! let (n, d, v) = (16, 8, 101);
//! let hidden = Tensor::randn(0f32, 1., (n, d), &Device::Cpu)?;
//! let head = Tensor::randn(0f32, 0.1, (v, d), &Device::Cpu)?;
//! let targets = Tensor::zeros(n, candle_core::DType::I64, &Device::Cpu)?;
//! let rank = |communicator: ThreadCommunicator| -> candle_core::Result<f32> {
//!     let shard = VocabParallel::from_vocab(v, Arc::new(communicator))?;
//!     let head = Var::from_tensor(&head.narrow(0, shard.start, shard.stop - shard.start)?)?;
//!     let options = Options::default().vocab_parallel(shard);
//!     let loss = linear_cross_entropy(&hidden, &head, &targets, &options)?.loss;
//!     let grads = backward(&loss)?; // of this rank's classes
//!     assert_eq!(grads.get(&head).unwrap().dims(), head.dims());
//!     loss.to_scalar()
//! };
//! let losses: Vec<f32> = std::thread::scope(|scope| {
//!     let ranks: Vec<_> = ThreadCommunicator::group(3, Duration::from_secs(60))?
//!         .into_iter()
//!         .map(|communicator| scope.spawn(|| rank(communicator)))
//!         .collect();
//!     ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<candle_core::Result<_>>()
//! })?;
//! let whole = linear_cross_entropy(&hidden, &head, &targets, &Options::default())?.loss;
//! assert!((losses[2] - whole.to_scalar::<f32>()?).abs() < 1e-5);
//! # Ok(())
//! # }
//! ```

pub(crate) mod collective;
#[cfg(feature = "nccl")]
mod nccl;
mod thread;

use candle_core::{bail, Result, Tensor};
use std::sync::Arc;

#[cfg(feature = "nccl")]
pub use nccl::{NcclCommunicator, NcclId};
pub use thread::ThreadCommunicator;

/// What an all-reduce makes of the ranks' numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// The largest.
    Max,
    /// The sum.
    Sum,
}

/// How the ranks of a sharded head reach each other: all that a transport has to do.
///
/// Every rank makes the same calls in the same order, with tensors of the same shape and dtype: f32, or f64 where the
/// inputs of the loss are. The calls of a loss are made by the thread that calls
/// [`linear_cross_entropy`](crate::linear_cross_entropy) or the backward.
pub trait Communicator: Send + Sync {
    /// This rank, in `0..world_size`.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn world_size(&self) -> usize;

    /// The elementwise maximum or sum of the ranks' tensors, the same bits on every rank, with the shape, dtype and
    /// device of `tensor`.
    ///
    /// On a GPU the result is ordered like that of any Candle operation: after what this thread launched before the
    /// call, before what it launches after it. The memory of `tensor` is the callee's: it may hold the result.
    ///
    /// # Errors
    /// Another rank failed, or did not come within a time that the transport sets: no call hangs.
    fn all_reduce(&self, tensor: Tensor, op: ReduceOp) -> Result<Tensor>;
}

/// A rank's part of the classes, and how it reaches the other ranks. For
/// [`Options::vocab_parallel`](crate::Options::vocab_parallel).
#[derive(Clone)]
pub struct VocabParallel {
    /// The first class here: row 0 of this rank's classifier and bias.
    pub start: usize,
    /// The class after the last one here.
    pub stop: usize,
    /// The other ranks.
    pub communicator: Arc<dyn Communicator>,
    /// Whether the gradient of the embeddings is summed over the ranks. If not, every rank gets the part of it that
    /// comes from its own classes, and the sum is left to the caller.
    pub reduce_e_grad: bool,
}

impl std::fmt::Debug for VocabParallel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VocabParallel")
            .field("start", &self.start)
            .field("stop", &self.stop)
            .field("rank", &self.communicator.rank())
            .field("world_size", &self.communicator.world_size())
            .field("reduce_e_grad", &self.reduce_e_grad)
            .finish()
    }
}

impl VocabParallel {
    /// The shard of this rank, of `vocab_size` classes cut evenly: where they do not divide, the first ranks have one
    /// more. The gradient of the embeddings is summed.
    ///
    /// # Errors
    /// More ranks than classes: a shard would be empty.
    pub fn from_vocab(vocab_size: usize, communicator: Arc<dyn Communicator>) -> Result<Self> {
        let (rank, ranks) = (communicator.rank(), communicator.world_size());
        if rank >= ranks {
            bail!("rank {rank} is not one of {ranks} ranks")
        }
        if vocab_size < ranks {
            bail!("{vocab_size} classes over {ranks} ranks: a shard would be empty")
        }
        let (share, more) = (vocab_size / ranks, vocab_size % ranks);
        let start = rank * share + rank.min(more);
        Ok(Self {
            start,
            stop: start + share + usize::from(rank < more),
            communicator,
            reduce_e_grad: true,
        })
    }

    /// # Errors
    /// An empty shard, or one that is not as long as the classifier has rows.
    pub(crate) fn validate(&self, classifier_rows: usize) -> Result<()> {
        let Self { start, stop, .. } = *self;
        if start >= stop {
            bail!("empty shard: classes {start}..{stop}")
        }
        if stop - start != classifier_rows {
            bail!(
                "classifier must have a row for each of the classes {start}..{stop} of this rank's shard, \
                 {}, got {classifier_rows}",
                stop - start
            )
        }
        Ok(())
    }

    /// Where a target lies in this shard, if it does.
    pub(crate) fn local(&self, target: i64) -> Option<u32> {
        let target = usize::try_from(target).ok()?;
        (self.start..self.stop)
            .contains(&target)
            .then(|| (target - self.start) as u32)
    }
}

/// Where the id is written before it is renamed to `path`: beside it, and another file for every name.
#[cfg(any(feature = "nccl", test))]
fn draft(path: &std::path::Path) -> Result<std::path::PathBuf> {
    let Some(name) = path.file_name() else {
        bail!("the ranks meet at a file, {} is none", path.display())
    };
    let mut name = name.to_owned();
    name.push(".draft");
    Ok(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::draft;
    use std::path::Path;

    #[test]
    fn every_name_has_a_draft_of_its_own() {
        for (path, want) in [
            ("/shared/run.17", "/shared/run.17.draft"),
            ("/shared/run.18", "/shared/run.18.draft"),
            ("run", "run.draft"),
        ] {
            assert_eq!(draft(Path::new(path)).unwrap(), Path::new(want));
        }
        let error = draft(Path::new("/shared/..")).unwrap_err().to_string();
        assert!(error.contains("/shared/.."), "{error}");
    }
}
