//! A loss and the logits of chosen classes as one node of Candle's graph.
//!
//! As two nodes they would have a gradient of the classifier each, which Candle adds up. Here one backward has the upstream
//! gradients of both, and the few rows of the chosen classes are added to the gradient of the loss where it lies.

use super::class_logits::Chosen;
use crate::matrices::Matrices;
use crate::node::{attach, Node};
use crate::op::contract::{Backward, Forward};
use crate::op::forward::forward;
use crate::op::graph::wanted;
use crate::op::packed::Packed;
use crate::problem::Problem;
use candle_core::{Result, Tensor};
use std::ops::Range;

pub(super) struct LossAndLogits {
    /// One number a position. Not to be differentiated where the problem has a reduction.
    pub losses: Tensor,
    /// One number.
    pub loss: Tensor,
    /// `(rows, k)`
    pub logits: Tensor,
    /// One number a position, outside of the graph.
    pub lse: Tensor,
}

impl LossAndLogits {
    /// Of a problem without label smoothing and shards. `logits` are those of the chosen classes.
    pub fn new(
        problem: &Problem,
        matrices: Matrices<&Tensor>,
        chosen: Chosen,
        logits: Tensor,
    ) -> Result<Self> {
        let wanted = wanted(matrices);
        let Forward { packed, left } = forward(problem, matrices.detach().as_ref(), wanted)?;
        let layout = Packed::of(problem);
        let mut all = Tensor::cat(&[&packed, &logits.flatten_all()?], 0)?;
        if wanted.any() {
            let mut arguments = vec![matrices.embeddings, matrices.classifier];
            arguments.extend(matrices.bias);
            let node = Both {
                logits: chosen.keep(&logits),
                chosen,
                layout,
                reduced: left.loss,
                backward: left.backward,
            };
            all = attach(all, &arguments, node)?;
        }
        let part = |range: Range<usize>| all.narrow(0, range.start, range.len());
        let after = layout.len()..layout.len() + logits.elem_count();
        Ok(Self {
            losses: part(layout.losses())?,
            loss: part(layout.loss()..layout.loss() + 1)?,
            logits: part(after)?.reshape(logits.shape())?,
            lse: part(layout.lse())?.detach(),
        })
    }
}

/// The packed vector of the loss, and the logits after it.
struct Both {
    chosen: Chosen,
    /// What is kept of the logits.
    logits: Option<Tensor>,
    layout: Packed,
    /// The source of the reduced loss's gradients, where the forward has formed them.
    reduced: Option<Box<dyn Backward>>,
    backward: Box<dyn Backward>,
}

impl Node for Both {
    const NAME: &'static str = "loss-and-logits";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let matrices = Matrices::of(arguments);
        let wanted = wanted(matrices);
        let detached = matrices.detach();
        let matrices = detached.as_ref();
        let upstream = upstream.detach();
        let of_loss = match &self.reduced {
            Some(reduced) => {
                let upstream = upstream.narrow(0, self.layout.loss(), 1)?.contiguous()?;
                reduced.backward(matrices, &upstream, wanted)?
            }
            None => {
                let upstream = upstream.narrow(0, 0, self.layout.len())?.contiguous()?;
                self.backward.backward(matrices, &upstream, wanted)?
            }
        };
        let rows = matrices.embeddings.dim(0)?;
        let chosen = upstream.elem_count() - self.layout.len();
        let upstream = upstream.narrow(0, self.layout.len(), chosen)?;
        let upstream = upstream.reshape((rows, chosen / rows))?;
        let kept = self.logits.as_ref();
        let gradients = self
            .chosen
            .gradients(matrices, kept, &upstream, wanted, Some(of_loss))?;
        Ok(vec![
            gradients.embeddings,
            gradients.classifier,
            gradients.bias,
        ])
    }
}
