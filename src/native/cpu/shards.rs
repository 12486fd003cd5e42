//! The forward of a shard of the classes.

use super::element::{Element, Real};
use super::inputs::Inputs;
use super::kept::Kept;
use super::statistics::{RowLoss, RowSum, Softmax};
use crate::blocks::blocks;
use crate::native::rows::HostRows;
use crate::op::contract::accumulator;
use crate::problem::Problem;
use crate::vocab_parallel::collective::ShardRows;
use crate::Entropy;
use candle_core::{DType, Device, Result, Tensor};

/// The forward of a shard: what the rows are over the classes here, and then over those of all ranks.
pub(super) fn sharded<T: Element>(
    inputs: &Inputs<'_, T>,
    block_rows: usize,
    problem: &Problem,
    kept: &mut Kept<T::Real>,
    softmax: &mut Vec<Softmax<T::Real>>,
) -> Result<Vec<RowLoss>> {
    let n = inputs.rows.len();
    let mut here = Vec::with_capacity(n);
    let mut tiles = Vec::new();
    for block in blocks(n, block_rows) {
        let embeddings = inputs.block_embeddings(&block);
        let sums = inputs.sums(&embeddings, &block, None, kept.averaging());
        here.extend(sums.rows);
        // What is kept is decided once lse is known.
        tiles.push(match kept.filters() {
            true => sums.tiles,
            false => Vec::new(),
        });
    }
    let all = over_ranks(problem, inputs.rows, &here)?;
    let mut losses = Vec::with_capacity(n);
    for (block, tiles) in blocks(n, block_rows).zip(&tiles) {
        let sums = &all[block.clone()];
        losses.extend(inputs.finish(&block, tiles, sums, kept, softmax));
    }
    Ok(losses)
}

/// The sums of rows over the classes of all ranks, from those over the classes here.
fn over_ranks<R: Real>(
    problem: &Problem,
    rows: &HostRows,
    here: &[RowSum<R>],
) -> Result<Vec<RowSum<R>>> {
    let Some(shard) = &problem.settings.vocab_parallel else {
        return Ok(here.to_vec());
    };
    let dtype = accumulator(problem.dtype);
    let tensor = |number: fn(&RowSum<R>) -> f64| {
        let numbers: Vec<f64> = here.iter().map(number).collect();
        Tensor::new(numbers, &Device::Cpu)?.to_dtype(dtype)
    };
    let max_here = tensor(|row| row.max.to_f64())?;
    let has_entropy = problem.settings.entropy != Entropy::Off;
    let all = shard.rows(ShardRows {
        max: max_here.clone(),
        sum: tensor(|row| row.sum)?,
        target: tensor(|row| row.target.to_f64())?,
        ranks: Tensor::new(rows.here(), &Device::Cpu)?.to_dtype(dtype)?,
        weighted: has_entropy
            .then(|| tensor(|row| row.weighted))
            .transpose()?,
    })?;
    let predicted = match problem.settings.predicted {
        false => None,
        true => {
            let classes: Vec<u32> = here.iter().map(|row| row.predicted).collect();
            let classes = Tensor::new(classes, &Device::Cpu)?;
            let all = shard.predicted(&classes, &max_here, &all.max)?;
            Some(all.to_vec1::<u32>()?)
        }
    };
    problem.check_shards(&all.ranks)?;
    let numbers = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (max, sum, target) = (
        numbers(&all.max)?,
        numbers(&all.sum)?,
        numbers(&all.target)?,
    );
    let weighted = all.weighted.as_ref().map(numbers).transpose()?;
    let row = |i: usize| RowSum {
        max: R::from_f64(max[i]),
        sum: sum[i],
        target: R::from_f64(target[i]),
        weighted: weighted.as_ref().map_or(0., |weighted| weighted[i]),
        predicted: predicted.as_ref().map_or(0, |predicted| predicted[i]),
    };
    Ok((0..here.len()).map(row).collect())
}
