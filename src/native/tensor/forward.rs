//! Losses and lse of all rows.

use super::backward::TensorBackward;
use super::blocks::{logits, Blocks, DeviceRows};
use crate::blocks::blocks;
use crate::matrices::Matrices;
use crate::native::rows::HostRows;
use crate::native::workspace::workspace;
use crate::op::contract::{accumulator, Forward, KeptTiles, Left, Ran};
use crate::op::packed::Packed;
use crate::problem::{Problem, Settings};
use crate::vocab_parallel::collective::{ShardRows, LEAST_LOGARITHM};
use crate::{Entropy, Implementation, Strategy, VocabParallel};
use candle_core::{bail, DType, Device, Result, Tensor, D};
use std::ops::Range;
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
    let dtype = accumulator(matrices.embeddings.dtype());
    let rows = Arc::new(DeviceRows::new(rows, dtype, device)?);
    let all = match rows.rows.len() {
        0 => Statistics::empty(&problem.settings, dtype, device)?,
        _ => Statistics::new(problem, matrices, &rows)?,
    };
    let packed = pack(&rows, &all, problem, device)?;
    let predicted = match &all.predicted {
        None => None,
        Some(classes) => Some(rows.spread_classes(classes)?),
    };
    let mean = match &all.weighted {
        None => None,
        Some(weighted) => Some((weighted / &all.sum)?.unsqueeze(1)?),
    };
    let backward = TensorBackward {
        rows,
        max: all.max.unsqueeze(1)?,
        sum: all.sum.unsqueeze(1)?,
        mean,
        layout: Packed::of(problem),
        settings: problem.settings.clone(),
        kept: kept.clone(),
    };
    let left = Left {
        ran: Ran {
            implementation: Implementation::Native,
            strategy: Strategy::Recompute,
        },
        predicted,
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
    /// `sum_j exp(z_j - max) (z_j - max)`, where the entropy is asked for.
    weighted: Option<Tensor>,
    /// u32, where it is asked for.
    predicted: Option<Tensor>,
}

impl Statistics {
    /// Of no rows.
    fn empty(settings: &Settings, dtype: DType, device: &Device) -> Result<Self> {
        let none = Tensor::zeros(0, dtype, device)?;
        let no_class = Tensor::zeros(0, DType::U32, device)?;
        Ok(Self {
            max: none.clone(),
            sum: none.clone(),
            target: none.clone(),
            weighted: (settings.entropy != Entropy::Off).then_some(none),
            predicted: settings.predicted.then_some(no_class),
        })
    }

    fn new(problem: &Problem, matrices: Matrices<&Tensor>, rows: &DeviceRows) -> Result<Self> {
        let settings = &problem.settings;
        let n = rows.rows.len();
        let vocab = matrices.classifier.dim(0)?;
        let hidden = matrices.embeddings.dim(1)?;
        let dtype = accumulator(matrices.embeddings.dtype());
        let size = Blocks::new(n, vocab, hidden, dtype.size_in_bytes(), workspace(settings));
        let blocks = blocks(n, size.rows)
            .map(|block| Self::of_block(settings, matrices, rows, &block, size.classes))
            .collect::<Result<Vec<_>>>()?;
        let cat = |of: fn(&Self) -> Option<&Tensor>| -> Result<Option<Tensor>> {
            let blocks: Option<Vec<&Tensor>> = blocks.iter().map(of).collect();
            blocks
                .map(|blocks| Tensor::cat(&blocks, 0)?.flatten_all())
                .transpose()
        };
        let one = |of: fn(&Self) -> Option<&Tensor>| -> Result<Tensor> {
            match cat(of)? {
                Some(tensor) => Ok(tensor),
                None => bail!("no statistics of {n} rows"),
            }
        };
        let here = Self {
            max: one(|block| Some(&block.max))?,
            sum: one(|block| Some(&block.sum))?,
            target: one(|block| Some(&block.target))?,
            weighted: cat(|block| block.weighted.as_ref())?,
            predicted: cat(|block| block.predicted.as_ref())?,
        };
        match &settings.vocab_parallel {
            None => Ok(here),
            Some(shard) => here.over_ranks(problem, shard, rows),
        }
    }

    /// Of a block of rows over all classes here, `(rows, 1)` each.
    fn of_block(
        settings: &Settings,
        matrices: Matrices<&Tensor>,
        rows: &DeviceRows,
        block: &Range<usize>,
        classes_at_once: usize,
    ) -> Result<Self> {
        let device = matrices.embeddings.device();
        let e = rows.embeddings(matrices.embeddings, block)?;
        let shape = (block.len(), 1);
        let zeros = Tensor::zeros(shape, e.dtype(), device)?;
        let mut all = Self {
            max: Tensor::full(LOWEST, shape, device)?.to_dtype(e.dtype())?,
            sum: zeros.clone(),
            target: zeros.clone(),
            weighted: (settings.entropy != Entropy::Off).then_some(zeros),
            predicted: match settings.predicted {
                true => Some(Tensor::zeros(shape, DType::U32, device)?),
                false => None,
            },
        };
        for classes in blocks(matrices.classifier.dim(0)?, classes_at_once) {
            let z = logits(&e, matrices, &classes, settings)?;
            if let Some((index, inside)) = rows.targets(block, &classes)? {
                all.target = inside.where_cond(&z.gather(&index, 1)?, &all.target)?;
            }
            all.add(&z, &classes)?;
        }
        Ok(all)
    }

    /// Adds the logits of some classes, all but what the target has.
    fn add(&mut self, z: &Tensor, classes: &Range<usize>) -> Result<()> {
        let max_here = z.max_keepdim(D::Minus1)?;
        if let Some(predicted) = &mut self.predicted {
            let here = first(z, &max_here, classes.start)?;
            *predicted = max_here.gt(&self.max)?.where_cond(&here, predicted)?;
        }
        let max = self.max.maximum(&max_here)?;
        let down = z.broadcast_sub(&max)?;
        let p = down.exp()?;
        let moved = (&self.max - &max)?;
        let share = moved.exp()?;
        if let Some(weighted) = &mut self.weighted {
            let here = (&p * down.maximum(LEAST_LOGARITHM)?)?.sum_keepdim(D::Minus1)?;
            let before = (&*weighted + (moved.maximum(LEAST_LOGARITHM)? * &self.sum)?)?;
            *weighted = ((before * &share)? + here)?;
        }
        self.sum = ((&self.sum * share)? + p.sum_keepdim(D::Minus1)?)?;
        self.max = max;
        Ok(())
    }

    fn over_ranks(
        self,
        problem: &Problem,
        shard: &VocabParallel,
        rows: &DeviceRows,
    ) -> Result<Self> {
        let ranks = Tensor::new(rows.rows.here(), self.max.device())?;
        let all = shard.rows(ShardRows {
            ranks: ranks.to_dtype(self.max.dtype())?,
            max: self.max.clone(),
            sum: self.sum,
            target: self.target,
            weighted: self.weighted,
        })?;
        let predicted = match &self.predicted {
            None => None,
            Some(classes) => Some(shard.predicted(classes, &self.max, &all.max)?),
        };
        problem.check_shards(&all.ranks)?;
        Ok(Self {
            max: all.max,
            sum: all.sum,
            target: all.target,
            weighted: all.weighted,
            predicted,
        })
    }
}

/// The first of some classes whose logit is the largest of them. (Which of several Candle's `argmax` finds is not said.)
fn first(z: &Tensor, max: &Tensor, start: usize) -> Result<Tensor> {
    let (_, classes) = z.dims2()?;
    let device = z.device();
    let left = Tensor::arange_step(classes as f32, 0., -1., device)?;
    let are = z.broadcast_eq(max)?.to_dtype(DType::F32)?;
    let left = are.broadcast_mul(&left)?.max_keepdim(D::Minus1)?;
    let index = left.affine(-1., classes as f64)?.to_dtype(DType::U32)?;
    index.broadcast_add(&Tensor::new(&[[start as u32]], device)?)
}

/// The packed vector.
fn pack(rows: &DeviceRows, all: &Statistics, problem: &Problem, device: &Device) -> Result<Tensor> {
    let n = rows.rows.len();
    let positions = rows.rows.positions;
    if n == 0 {
        return Tensor::zeros(Packed::of(problem).len(), DType::F32, device);
    }
    let log_sum = all.sum.log()?;
    let lse = (&all.max + &log_sum)?.unsqueeze(1)?;
    let nll = ((&all.max - &all.target)? + &log_sum)?.unsqueeze(1)?;
    let entropy = match &all.weighted {
        None => None,
        Some(weighted) => Some((log_sum - (weighted / &all.sum)?)?.unsqueeze(1)?),
    };
    let losses = rows.losses(&nll, &lse, entropy.as_ref())?;
    let scale = rows.rows.scale(problem.settings.reduction);
    let loss = (losses.sum_all()? * scale)?.reshape(1)?;
    let spread = |values: &Tensor| -> Result<Tensor> {
        let values = values.flatten_all()?.to_dtype(DType::F32)?;
        if n == positions {
            return Ok(values);
        }
        Tensor::zeros(positions, DType::F32, device)?.index_add(&rows.position, &values, 0)
    };
    let mut packed = vec![spread(&losses)?, spread(&lse)?, loss.to_dtype(DType::F32)?];
    if let Some(entropy) = &entropy {
        packed.push(spread(entropy)?);
    }
    Tensor::cat(&packed, 0)
}
