//! All that the ranks of a sharded head tell each other: two all-reduces in a forward, one in a backward; in a forward one
//! or two more with label smoothing, and one with the predicted class.

use super::{ReduceOp, VocabParallel};
use crate::op::contract::accumulator;
use candle_core::{bail, DType, Result, Tensor};

/// What is known of each row that counts over some classes: tensors `(n)`.
#[derive(Debug)]
pub(crate) struct ShardRows {
    /// The largest logit.
    pub max: Tensor,
    /// `sum_j exp(z_j - max)`
    pub sum: Tensor,
    /// The target's logit, 0 where it is not among these classes.
    pub target: Tensor,
    /// On how many ranks the target is.
    pub ranks: Tensor,
}

impl VocabParallel {
    /// Rows over all ranks' classes, from what they are over the classes here.
    pub(crate) fn rows(&self, here: ShardRows) -> Result<ShardRows> {
        let (max, sums) = self.maxima_and_sums(here.max.copy()?, |max| {
            let sum = (here.sum * (here.max - max)?.exp()?)?;
            Tensor::stack(&[sum, here.target, here.ranks], 0)
        })?;
        Ok(ShardRows {
            max,
            sum: sums.get(0)?,
            target: sums.get(1)?,
            ranks: sums.get(2)?,
        })
    }

    /// The maxima over the ranks, and the sums over them of what `sums` makes of the maxima.
    pub(crate) fn maxima_and_sums(
        &self,
        here: Tensor,
        sums: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let max = self.all_reduce(here, ReduceOp::Max)?;
        let sums = self.all_reduce(sums(&max)?, ReduceOp::Sum)?;
        Ok((max, sums))
    }

    /// The sum over the ranks.
    pub(crate) fn sum(&self, here: Tensor) -> Result<Tensor> {
        self.all_reduce(here, ReduceOp::Sum)
    }

    /// The gradient of the embeddings over all ranks' classes, in the dtype of the embeddings.
    pub(crate) fn embeddings_gradient(&self, here: Tensor, dtype: DType) -> Result<Tensor> {
        let here = here.to_dtype(accumulator(dtype))?;
        match self.reduce_e_grad {
            true => self.all_reduce(here, ReduceOp::Sum)?.to_dtype(dtype),
            false => here.to_dtype(dtype),
        }
    }

    fn all_reduce(&self, tensor: Tensor, op: ReduceOp) -> Result<Tensor> {
        let (shape, dtype) = (tensor.shape().clone(), tensor.dtype());
        let device = tensor.device().clone();
        let reduced = self.communicator.all_reduce(tensor, op)?;
        if *reduced.shape() != shape
            || reduced.dtype() != dtype
            || !reduced.device().same_device(&device)
        {
            bail!(
                "a communicator's all_reduce must return {dtype:?} {shape:?} on {:?}, it returned {:?} {:?} on {:?}",
                device.location(),
                reduced.dtype(),
                reduced.shape(),
                reduced.device().location()
            )
        }
        reduced.detach().contiguous()
    }
}
