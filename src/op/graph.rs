//! The loss as a node of Candle's graph.
//!
//! An implementation computes a packed f32 vector `[losses (n), lse (n), loss (1)]` over the `n` positions
//! of the result, where `loss` is the reduced loss. [`CutCrossEntropy`] makes that vector a node of the
//! user's graph, so that one backward sees every upstream gradient at once.

use super::contract::{Backward, Forward, KeptTiles, Wanted};
use super::dispatch::forward;
use crate::node::{attach, Node};
use crate::problem::{Detached, Problem};
use crate::VocabParallel;
use candle_core::{Result, Tensor};
use std::sync::Arc;

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
