//! Losses and lse of all rows.

use super::backward::TensorBackward;
use super::blocks::{blocks, logits, Blocks, DeviceRows};
use crate::matrices::Matrices;
use crate::native::rows::HostRows;
use crate::native::workspace::workspace;
use crate::op::contract::{accumulator, Forward, KeptTiles, Left, Ran};
use crate::problem::{Problem, Settings};
use crate::vocab_parallel::collective::ShardRows;
use crate::{Implementation, Strategy};
use candle_core::{DType, Device, Result, Tensor, D};
use std::sync::Arc;

/// Not above any logit but -inf, and finite: a block whose every logit is -inf stays without a NaN. In
/// f32, as Metal has no f64.
const LOWEST: f32 = f32::MIN;

pub(in crate::native) fn forward(
    problem: &Problem,
    matrices: Matrices<&Tensor>,
    rows: HostRows,
    kept: &Arc<KeptTiles>,
) -> Result<Forward<Tensor>> {
    let device = matrices.embeddings.device();
    let rows = Arc::new(DeviceRows::new(rows, device)?);
    let all = match rows.rows.len() {
        0 => Statistics::empty(accumulator(matrices.embeddings.dtype()), device)?,
        _ => Statistics::new(problem, matrices, &rows)?,
    };
    let packed = pack(&rows, &all, &problem.settings, device)?;
    let backward = TensorBackward {
        rows,
        max: all.max.unsqueeze(1)?,
        sum: all.sum.unsqueeze(1)?,
        settings: problem.settings.clone(),
        kept: kept.clone(),
    };
    let left = Left {
        ran: Ran {
            implementation: Implementation::Native,
            strategy: Strategy::Recompute,
        },
        predicted: None,
        backward: Box::new(backward),
        loss: None,
    };
    Ok(Forward { packed, left })
}

/// What the rows that count are over all classes, those of all ranks: tensors `(n)` in accumulator dtype.
struct Statistics {
    max: Tensor,
    sum: Tensor,
    target: Tensor,
}

impl Statistics {
    /// Of no rows.
    fn empty(dtype: DType, device: &Device) -> Result<Self> {
        let none = Tensor::zeros(0, dtype, device)?;
        Ok(Self {
            max: none.clone(),
            sum: none.clone(),
            target: none,
        })
    }

    fn new(problem: &Problem, matrices: Matrices<&Tensor>, rows: &DeviceRows) -> Result<Self> {
        let settings = &problem.settings;
        let device = matrices.embeddings.device();
        let dtype = accumulator(matrices.embeddings.dtype());
        let n = rows.rows.len();
        let (vocab, hidden) = matrices.classifier.dims2()?;
        let size = Blocks::new(n, vocab, hidden, dtype.size_in_bytes(), workspace(settings));
        let (mut maxima, mut sums, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for row_block in blocks(n, size.rows) {
            let e = rows.embeddings(matrices.embeddings, &row_block)?;
            let shape = (row_block.len(), 1);
            let mut max = Tensor::full(LOWEST, shape, device)?.to_dtype(dtype)?;
            let mut sum = Tensor::zeros(shape, dtype, device)?;
            let mut target = Tensor::zeros(shape, dtype, device)?;
            for classes in blocks(vocab, size.classes) {
                let z = logits(&e, matrices, &classes, settings)?;
                if let Some((index, inside)) = rows.targets(&row_block, &classes)? {
                    target = inside.where_cond(&z.gather(&index, 1)?, &target)?;
                }
                let larger = max.maximum(&z.max_keepdim(D::Minus1)?)?;
                let here = z.broadcast_sub(&larger)?.exp()?.sum_keepdim(D::Minus1)?;
                sum = ((sum * (max - &larger)?.exp()?)? + here)?;
                max = larger;
            }
            maxima.push(max);
            sums.push(sum);
            targets.push(target);
        }
        let cat = |blocks: &[Tensor]| Tensor::cat(blocks, 0)?.flatten_all();
        let here = Self {
            max: cat(&maxima)?,
            sum: cat(&sums)?,
            target: cat(&targets)?,
        };
        match &settings.vocab_parallel {
            None => Ok(here),
            Some(shard) => {
                let all = shard.rows(ShardRows {
                    max: here.max,
                    sum: here.sum,
                    target: here.target,
                    ranks: Tensor::new(rows.rows.here(), device)?.to_dtype(dtype)?,
                })?;
                problem.check_shards(&all.ranks)?;
                Ok(Self {
                    max: all.max,
                    sum: all.sum,
                    target: all.target,
                })
            }
        }
    }
}

/// The losses and lse of all positions, and the reduced loss.
fn pack(
    rows: &DeviceRows,
    all: &Statistics,
    settings: &Settings,
    device: &Device,
) -> Result<Tensor> {
    let n = rows.rows.len();
    let positions = rows.rows.positions;
    if n == 0 {
        return Tensor::zeros(2 * positions + 1, DType::F32, device);
    }
    let log_sum = all.sum.log()?;
    let lse = (&all.max + &log_sum)?.unsqueeze(1)?;
    let nll = ((&all.max - &all.target)? + log_sum)?.unsqueeze(1)?;
    let losses = rows.losses(&nll, &lse)?;
    let loss = (losses.sum_all()? * rows.rows.scale(settings.reduction))?.reshape(1)?;
    let spread = |values: &Tensor| -> Result<Tensor> {
        let values = values.flatten_all()?.to_dtype(DType::F32)?;
        if n == positions {
            return Ok(values);
        }
        Tensor::zeros(positions, DType::F32, device)?.index_add(&rows.position, &values, 0)
    };
    Tensor::cat(
        &[spread(&losses)?, spread(&lse)?, loss.to_dtype(DType::F32)?],
        0,
    )
}
