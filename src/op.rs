//! The hook into Candle's autograd.
//!
//! An implementation computes a packed f32 vector `[losses (n), lse (n), loss (1)]` over the `n` positions
//! of the result, where `loss` is the reduced loss. [`CutCrossEntropy`] makes that vector a node of the
//! user's graph, so that one backward sees every upstream gradient at once.

use crate::native;
use crate::node::{attach, Node};
use crate::problem::{Detached, Matrices, Problem};
use crate::{Implementation, VocabParallel};
use candle_core::{bail, Result, Tensor};
use std::sync::{Arc, Mutex};

/// Which gradients are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub embeddings: bool,
    pub classifier: bool,
    pub bias: bool,
}

impl Wanted {
    pub fn any(self) -> bool {
        self.embeddings || self.classifier || self.bias
    }
}

/// Gradients in the dtype and shape of what they belong to, `None` where not wanted. That of the embeddings may be f32
/// where the classes are sharded: then it is this rank's part of a sum.
#[derive(Debug, Default)]
pub(crate) struct Gradients {
    pub embeddings: Option<Tensor>,
    pub classifier: Option<Tensor>,
    pub bias: Option<Tensor>,
}

/// What a forward leaves behind. Used as often as the user differentiates the graph.
pub(crate) trait Backward: Send + Sync {
    /// `upstream` is the gradient of the packed vector, contiguous f32.
    fn backward(
        &self,
        matrices: Matrices<'_>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients>;
}

/// What a forward returns.
pub(crate) struct Forward {
    /// `[losses (n), lse (n), loss (1)]`, f32.
    pub packed: Tensor,
    pub backward: Box<dyn Backward>,
    /// Where the gradients of the reduced loss are formed already: their source. It takes one number as upstream
    /// gradient, and `backward` is then for the other numbers only.
    pub loss: Option<Box<dyn Backward>>,
}

impl<B: Backward + ?Sized> Backward for Arc<B> {
    fn backward(
        &self,
        matrices: Matrices<'_>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        (**self).backward(matrices, upstream, wanted)
    }
}

/// The tiles that the last backward kept, as known on the host or still counted on a device.
#[derive(Debug, Default)]
pub(crate) struct KeptTiles(Mutex<Option<Tensor>>);

impl KeptTiles {
    /// `kept` holds two u32 numbers or f64 numbers: tiles kept, tiles there are.
    pub fn set(&self, kept: Tensor) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = Some(kept);
    }

    pub fn share(&self) -> Result<Option<f64>> {
        let kept = self.0.lock().unwrap_or_else(|e| e.into_inner()).clone();
        match kept {
            None => Ok(None),
            Some(kept) => {
                let kept = kept
                    .to_device(&candle_core::Device::Cpu)?
                    .to_dtype(candle_core::DType::F64)?
                    .to_vec1::<f64>()?;
                Ok(Some(if kept[1] == 0. { 0. } else { kept[0] / kept[1] }))
            }
        }
    }
}

/// The results of a forward, parts of the graph.
pub(crate) struct Applied {
    /// One number a position.
    pub losses: Tensor,
    pub lse: Tensor,
    /// One number.
    pub loss: Tensor,
    pub kept: Arc<KeptTiles>,
}

/// Runs the chosen implementation and makes its result part of the graph.
pub(crate) fn apply(problem: &Problem) -> Result<Applied> {
    let wanted = Wanted {
        embeddings: problem.embeddings.track_op(),
        classifier: problem.classifier.track_op(),
        bias: problem.bias.as_ref().is_some_and(Tensor::track_op),
    };
    let kept = Arc::new(KeptTiles::default());
    let Forward {
        packed,
        backward,
        loss,
    } = forward(problem, wanted, &kept)?;
    let node = |value: Tensor, backward| -> Result<Tensor> {
        if !wanted.any() {
            return Ok(value);
        }
        let mut arguments = vec![&problem.embeddings, &problem.classifier];
        arguments.extend(&problem.bias);
        let op = CutCrossEntropy {
            backward,
            vocab_parallel: problem.settings.vocab_parallel.clone(),
        };
        attach(value, &arguments, op)
    };
    let n = problem.positions.len();
    let loss = match loss {
        None => None,
        Some(backward) => Some(node(
            packed.narrow(0, 2 * n, 1)?.force_contiguous()?,
            backward,
        )?),
    };
    let packed = node(packed, backward)?;
    Ok(Applied {
        losses: packed.narrow(0, 0, n)?,
        lse: packed.narrow(0, n, n)?,
        loss: match loss {
            None => packed.narrow(0, 2 * n, 1)?,
            Some(loss) => loss,
        },
        kept,
    })
}

fn forward(problem: &Problem, wanted: Wanted, kept: &Arc<KeptTiles>) -> Result<Forward> {
    if problem.settings.implementation != Implementation::Native {
        match no_kernels(problem)? {
            #[cfg(feature = "cuda")]
            None => return crate::cuda::forward(problem, wanted, kept),
            Some(_) if problem.settings.implementation == Implementation::Auto => {}
            Some(why) => bail!(
                "Implementation::{:?}: the CUDA kernels cannot run: {why}",
                problem.settings.implementation
            ),
            #[cfg(not(feature = "cuda"))]
            None => {}
        }
    }
    native::forward(problem, wanted, kept)
}

/// Why the CUDA kernels cannot run, if they cannot.
#[cfg(feature = "cuda")]
fn no_kernels(problem: &Problem) -> Result<Option<String>> {
    crate::cuda::unsupported(problem)
}

/// Why the CUDA kernels cannot run.
#[cfg(not(feature = "cuda"))]
fn no_kernels(problem: &Problem) -> Result<Option<String>> {
    Ok(Some(format!(
        "this program was built without the feature `cuda`, and the inputs are on {:?}",
        problem.embeddings.device().location()
    )))
}

/// The node of the graph.
struct CutCrossEntropy {
    backward: Box<dyn Backward>,
    vocab_parallel: Option<VocabParallel>,
}

impl Node for CutCrossEntropy {
    const NAME: &'static str = "cut-cross-entropy";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let (embeddings, classifier) = (arguments[0], arguments[1]);
        let bias = arguments.get(2).copied();
        let wanted = Wanted {
            embeddings: embeddings.track_op(),
            classifier: classifier.track_op(),
            bias: bias.is_some_and(Tensor::track_op),
        };
        let detached = Detached::new(embeddings, classifier, bias);
        let upstream = upstream.detach().contiguous()?;
        let gradients = self
            .backward
            .backward(detached.matrices(), &upstream, wanted)?;
        let of_embeddings = match (&self.vocab_parallel, gradients.embeddings) {
            (Some(shard), Some(here)) => Some(shard.embeddings_gradient(here, embeddings.dtype())?),
            (_, gradient) => gradient,
        };
        Ok(vec![of_embeddings, gradients.classifier, gradients.bias])
    }
}
