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

pub(super) struct LossAndLogits {
    /// One number a position.
    pub losses: Tensor,
    pub lse: Tensor,
    /// One number. Where the problem has a reduction it alone of these three may be differentiated.
    pub loss: Tensor,
    /// `(rows, k)`
    pub logits: Tensor,
}

impl LossAndLogits {
    /// Of a problem without label smoothing and shards.
    pub fn new(problem: &Problem, matrices: Matrices<&Tensor>, chosen: Chosen) -> Result<Self> {
        let wanted = wanted(matrices);
        let detached = matrices.detach();
        let logits = chosen.logits(detached.as_ref())?;
        let Forward { packed, left } = forward(problem, detached.as_ref(), wanted)?;
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
        let part = |start, len| all.narrow(0, start, len);
        Ok(Self {
            losses: part(layout.losses().start, layout.losses().len())?,
            lse: part(layout.lse().start, layout.lse().len())?,
            loss: part(layout.loss(), 1)?,
            logits: part(layout.len(), logits.elem_count())?.reshape(logits.shape())?,
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
