//! All that the ranks of a sharded head tell each other: two all-reduces in a forward, one in a backward; in a forward one
//! or two more with label smoothing, and two with the predicted class.

use super::{ReduceOp, VocabParallel};
use crate::op::contract::accumulator;
use candle_core::{bail, DType, Result, Tensor};

/// `exp` of less is 0 in f64 too: a factor beside it may be this, where an infinity would make NaN.
pub(crate) const LEAST_LOGARITHM: f64 = -1e4;

/// Classes of which the high digits of a class are the same.
const LOW_DIGITS: i64 = 1 << 12;

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
    /// `sum_j exp(z_j - max) (z_j - max)`, where the entropy is asked for: it is `ln sum - weighted / sum`.
    pub weighted: Option<Tensor>,
}

impl VocabParallel {
    /// Rows over all ranks' classes, from what they are over the classes here.
    pub(crate) fn rows(&self, here: ShardRows) -> Result<ShardRows> {
        let (max, sums) = self.maxima_and_sums(here.max.copy()?, |max| {
            let down = (here.max - max)?;
            let share = down.exp()?;
            let mut sums = vec![(&here.sum * &share)?, here.target, here.ranks];
            if let Some(weighted) = here.weighted {
                let down = down.maximum(LEAST_LOGARITHM)?;
                sums.push(((weighted + (down * here.sum)?)? * share)?);
            }
            Tensor::stack(&sums, 0)
        })?;
        let weighted = (sums.dim(0)? > 3).then(|| sums.get(3)).transpose()?;
        Ok(ShardRows {
            max,
            sum: sums.get(0)?,
            target: sums.get(1)?,
            ranks: sums.get(2)?,
            weighted,
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

    /// The lowest class, as one of all ranks' classes, that has the largest logit: tensors `(n)`, of u32. `classes` are
    /// the lowest of this rank, counted from its first, that have the largest logits here, `max_here`; `max` are those over
    /// all ranks. Every rank with the maximum offers its class, and the lowest is minus the largest of minus the offers: first
    /// that of the high digits, then that of the low ones, for f32 has not every class. [`u32::MAX`] where no rank has it.
    pub(crate) fn predicted(
        &self,
        classes: &Tensor,
        max_here: &Tensor,
        max: &Tensor,
    ) -> Result<Tensor> {
        let dtype = max.dtype();
        let none = Tensor::full(f32::NEG_INFINITY, max.shape(), max.device())?.to_dtype(dtype)?;
        // The lowest of what ranks offer that have something to, at most `most`.
        let lowest = |digits: &Tensor, has: &Tensor, most: i64| -> Result<Tensor> {
            let offers = has.where_cond(&digits.to_dtype(dtype)?.neg()?, &none)?;
            let lowest = self.all_reduce(offers, ReduceOp::Max)?.neg()?;
            lowest.minimum(most as f64)?.to_dtype(DType::I64)
        };
        let number = |n: i64| Tensor::full(n, max.shape(), max.device());
        let classes = (classes.to_dtype(DType::I64)? + number(self.start as i64)?)?;
        let digits = number(LOW_DIGITS)?;
        let high = (&classes / &digits)?;
        let low = (&classes - (&high * &digits)?)?;
        let has = max_here.eq(max)?;
        let lowest_high = lowest(&high, &has, i64::from(u32::MAX) / LOW_DIGITS)?;
        let has = (has * high.eq(&lowest_high)?)?;
        let lowest_low = lowest(&low, &has, LOW_DIGITS - 1)?;
        ((lowest_high * digits)? + lowest_low)?.to_dtype(DType::U32)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocab_parallel::ThreadCommunicator;
    use candle_core::Device;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn predicted_classes_are_exact_where_f32_has_them_not() -> Result<()> {
        let start = (1 << 24) + 1;
        let group = ThreadCommunicator::group(1, Duration::from_secs(60))?;
        for communicator in group {
            let shard = VocabParallel {
                start,
                stop: start + 10_000,
                communicator: Arc::new(communicator),
                reduce_e_grad: true,
            };
            let classes = Tensor::new(&[0u32, 1, 4095, 4096, 9_999, 7], &Device::Cpu)?;
            let here = Tensor::new(&[1f32, 2., 3., 4., 5., 6.], &Device::Cpu)?;
            let max = Tensor::new(&[1f32, 2., 3., 4., 5., 7.], &Device::Cpu)?;
            let predicted = shard.predicted(&classes, &here, &max)?.to_vec1::<u32>()?;
            let start = start as u32;
            let has = [start, start + 1, start + 4095, start + 4096, start + 9_999];
            assert_eq!(predicted[..5], has);
            // Of no rank.
            assert_eq!(predicted[5], u32::MAX);
        }
        Ok(())
    }
}
