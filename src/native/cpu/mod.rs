//! The implementation for tensors in main memory: matrix products of blocks of the logits on all
//! threads, everything between the products done while a block's tile is in a core's cache.
//!
//! Half-precision inputs are widened tile by tile, and every sum is an f32 one (f64 for f64 inputs).
//! Tiles are handed to the threads in any order, but every sum has one order: a run repeats bit by bit on
//! the same machine with as many threads, on which the sizes of the blocks depend.

mod average;
mod backward;
mod blocks;
mod element;
mod gradients;
mod kept;
mod passes;
mod plan;
mod product;

use super::rows::Rows;
use crate::op::{Backward, Forward, Gradients, KeptTiles, Wanted};
use crate::problem::{Matrices, Problem, Settings};
use crate::vocab_parallel::ShardRows;
use average::Averages;
use backward::{gradients, Known, Sums};
use blocks::{blocks, Inputs, RowLoss, RowSum, Scale, Softmax, TILE};
use candle_core::{DType, Device, Result, Storage, Tensor};
use element::Element;
pub(crate) use element::Real;
use gradients::{ClassesGradient, EmbeddingsGradient};
use half::{bf16, f16};
use kept::{Kept, CLASSIFIER, EMBEDDINGS};
use plan::Plan;
use rayon::prelude::*;
use std::sync::{Arc, Mutex};

pub(super) fn forward(
    problem: &Problem,
    rows: Rows,
    wanted: Wanted,
    kept: Arc<KeptTiles>,
) -> Result<Forward> {
    match problem.embeddings.dtype() {
        DType::BF16 => forward_of::<bf16>(problem, rows, wanted, kept),
        DType::F16 => forward_of::<f16>(problem, rows, wanted, kept),
        DType::F64 => forward_of::<f64>(problem, rows, wanted, kept),
        _ => forward_of::<f32>(problem, rows, wanted, kept),
    }
}

/// Calls `f` with the values of a contiguous tensor.
fn with_slice<T: Element, O>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<O>) -> Result<O> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => {
            let values = T::cpu_storage_as_slice(storage)?;
            let start = layout.start_offset();
            f(&values[start..start + layout.shape().elem_count()])
        }
        other => candle_core::bail!(
            "expected a tensor on the CPU, got one on {:?}",
            other.device().location()
        ),
    }
}

/// Calls `f` with the operands of a call.
fn with_inputs<T: Element, O>(
    matrices: Matrices<'_>,
    rows: &Rows,
    settings: &Settings,
    lanes: usize,
    f: impl FnOnce(&Inputs<'_, T>) -> Result<O>,
) -> Result<O> {
    let (vocab, hidden) = matrices.classifier.dims2()?;
    let bias = match matrices.bias {
        None => None,
        Some(bias) => Some(with_slice::<T, _>(bias, |values| {
            let mut wide = vec![T::Real::default(); values.len()];
            T::widen(values, &mut wide);
            Ok(wide)
        })?),
    };
    with_slice::<T, _>(matrices.embeddings, |embeddings| {
        with_slice::<T, _>(matrices.classifier, |classifier| {
            f(&Inputs {
                embeddings,
                classifier,
                bias,
                hidden,
                vocab,
                rows,
                softcap: settings.softcap.map(T::Real::from_f64),
                lanes,
            })
        })
    })
}

/// Gradients that the forward has formed, for an upstream gradient of 1 of the reduced loss.
struct Formed<T> {
    embeddings: Option<Vec<T>>,
    classifier: Option<Vec<T>>,
    bias: Option<Vec<T>>,
}

struct Saved<T: Element> {
    rows: Rows,
    softmax: Vec<Softmax<T::Real>>,
    kept: Kept<T::Real>,
    settings: Settings,
    plan: Plan,
    formed: Mutex<Option<Formed<T>>>,
    report: Arc<KeptTiles>,
}

fn forward_of<T: Element>(
    problem: &Problem,
    rows: Rows,
    wanted: Wanted,
    report: Arc<KeptTiles>,
) -> Result<Forward> {
    let detached = problem.detached();
    let matrices = detached.matrices();
    let settings = problem.settings.clone();
    let n = rows.len();
    let (vocab, hidden) = matrices.classifier.dims2()?;
    let plan = Plan::new::<T>(
        &rows,
        vocab,
        hidden,
        matrices.bias.is_some(),
        &settings,
        wanted,
    );
    let mut kept = Kept::new(
        n,
        vocab.div_ceil(TILE),
        plan.thresholds,
        !settings.drop_filtered,
    );
    let mut softmax = Vec::with_capacity(n);
    let mut losses = Vec::with_capacity(n);
    let mut formed = None;
    if n > 0 {
        with_inputs::<T, _>(matrices, &rows, &settings, plan.lanes, |inputs| {
            match plan.fused_rows {
                Some(block) => {
                    formed = Some(fused(
                        inputs,
                        block,
                        &settings,
                        wanted,
                        &mut kept,
                        &mut softmax,
                        &mut losses,
                    ));
                }
                None if settings.vocab_parallel.is_some() => {
                    losses = sharded(inputs, plan.rows, problem, &mut kept, &mut softmax)?;
                }
                None => {
                    for block in blocks(n, plan.rows) {
                        let embeddings = inputs.block_embeddings(&block);
                        losses.extend(inputs.forward(
                            &embeddings,
                            &block,
                            None,
                            &mut kept,
                            &mut softmax,
                        ));
                    }
                }
            }
            Ok(())
        })?;
    }
    let packed = pack(&rows, &losses, &settings)?;
    let backward = Box::new(Saved::<T> {
        rows,
        softmax,
        kept,
        settings,
        plan,
        formed: Mutex::new(formed),
        report,
    });
    Ok(Forward {
        packed,
        backward,
        loss: None,
    })
}

/// The losses and lse of all positions, and the reduced loss.
fn pack(rows: &Rows, losses: &[RowLoss], settings: &Settings) -> Result<Tensor> {
    let mut packed = vec![0f32; 2 * rows.positions + 1];
    let mut sum = 0.;
    for (position, &RowLoss { nll, lse }) in rows.position.iter().zip(losses) {
        let loss = settings.loss(nll, lse);
        packed[*position as usize] = loss as f32;
        packed[rows.positions + *position as usize] = lse as f32;
        sum += loss;
    }
    packed[2 * rows.positions] = (sum * rows.scale(settings.reduction)) as f32;
    let len = packed.len();
    Tensor::from_vec(packed, len, &Device::Cpu)
}

/// The forward of a shard: what the rows are over the classes here, and then over those of all ranks.
fn sharded<T: Element>(
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
    rows: &Rows,
    here: &[RowSum<R>],
) -> Result<Vec<RowSum<R>>> {
    let Some(shard) = &problem.settings.vocab_parallel else {
        return Ok(here.to_vec());
    };
    let dtype = match problem.embeddings.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let tensor = |number: fn(&RowSum<R>) -> f64| {
        let numbers: Vec<f64> = here.iter().map(number).collect();
        Tensor::new(numbers, &Device::Cpu)?.to_dtype(dtype)
    };
    let all = shard.rows(ShardRows {
        max: tensor(|row| row.max.to_f64())?,
        sum: tensor(|row| row.sum)?,
        target: tensor(|row| row.target.to_f64())?,
        ranks: Tensor::new(rows.here(), &Device::Cpu)?.to_dtype(dtype)?,
    })?;
    problem.check_shards(&all.ranks)?;
    let numbers = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (max, sum, target) = (
        numbers(&all.max)?,
        numbers(&all.sum)?,
        numbers(&all.target)?,
    );
    let row = |i: usize| RowSum {
        max: R::from_f64(max[i]),
        sum: sum[i],
        target: R::from_f64(target[i]),
    };
    Ok((0..here.len()).map(row).collect())
}

/// The forward that forms the gradients while a block of rows has its logits in memory.
fn fused<T: Element>(
    inputs: &Inputs<'_, T>,
    block_rows: usize,
    settings: &Settings,
    wanted: Wanted,
    kept: &mut Kept<T::Real>,
    softmax: &mut Vec<Softmax<T::Real>>,
    losses: &mut Vec<RowLoss>,
) -> Formed<T> {
    let n = inputs.rows.len();
    let tiles = 0..inputs.tiles();
    let zeros = |wanted: bool, len: usize| wanted.then(|| vec![T::Real::default(); len]);
    let mut classifier = zeros(wanted.classifier, inputs.vocab * inputs.hidden);
    let mut bias = zeros(wanted.bias, inputs.vocab);
    let mut embeddings = wanted.embeddings.then(|| EmbeddingsGradient::new(inputs));
    let gradients = gradients(wanted.embeddings, wanted.classifier || wanted.bias);
    let scale = inputs.rows.scale(settings.reduction);
    let mut scales = Vec::with_capacity(n);
    let mut logits = vec![T::Real::default(); block_rows * tiles.len() * TILE];
    for block in blocks(n, block_rows) {
        let logits = &mut logits[..block.len() * tiles.len() * TILE];
        let values = inputs.block_embeddings(&block);
        losses.extend(inputs.forward(&values, &block, Some(&mut *logits), kept, softmax));
        scales.extend(losses[block.clone()].iter().map(|loss| Scale {
            softmax: T::Real::from_f64(scale * settings.softmax_share(loss.lse)),
            one_hot: T::Real::from_f64(scale),
        }));
        if let Some(embeddings) = &mut embeddings {
            embeddings.begin(&block);
        }
        let mut sums = Sums {
            embeddings: embeddings.as_mut().map(|e| e.block(&block)),
            classifier: classifier.as_deref_mut(),
            bias: bias.as_deref_mut(),
            first: block.start == 0,
        };
        let averages = Averages::begin(inputs, kept, &block, gradients).map(|mut averages| {
            averages.add(inputs, kept, &values, &block);
            averages.finish(inputs)
        });
        let known = Known {
            kept,
            softmax,
            scales: &scales,
            averages: averages.as_ref(),
        };
        inputs.backward(&values, &block, &tiles, logits, false, known, &mut sums);
        if let Some(embeddings) = &mut embeddings {
            embeddings.end(inputs);
        }
    }
    drop(logits);
    Formed {
        embeddings: embeddings.map(EmbeddingsGradient::finish),
        classifier: classifier.map(T::from_real),
        bias: bias.map(T::from_real),
    }
}

impl<T: Element> Backward for Saved<T> {
    fn backward(
        &self,
        matrices: Matrices<'_>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        self.report_kept(wanted)?;
        let upstream = upstream.to_vec1::<f32>()?;
        let gradients = match self.take_formed(&upstream, wanted) {
            Some(formed) => formed,
            None => with_inputs::<T, _>(
                matrices,
                &self.rows,
                &self.settings,
                self.plan.lanes,
                |inputs| Ok(self.recompute(inputs, &upstream, wanted)),
            )?,
        };
        let tensor = |values: Option<Vec<T>>, of: Option<&Tensor>| match (values, of) {
            (Some(values), Some(of)) => {
                Tensor::from_vec(values, of.shape(), &Device::Cpu).map(Some)
            }
            _ => Ok(None),
        };
        Ok(Gradients {
            embeddings: tensor(gradients.embeddings, Some(matrices.embeddings))?,
            classifier: tensor(gradients.classifier, Some(matrices.classifier))?,
            bias: tensor(gradients.bias, matrices.bias)?,
        })
    }
}

impl<T: Element> Saved<T> {
    fn report_kept(&self, wanted: Wanted) -> Result<()> {
        let count = |wanted: bool, gradient: u8| wanted.then(|| self.kept.count(gradient));
        let embeddings = count(wanted.embeddings, EMBEDDINGS);
        let classifier = count(wanted.classifier || wanted.bias, CLASSIFIER);
        if let Some((kept, all)) = embeddings.max(classifier) {
            self.report
                .set(Tensor::new(&[kept as f64, all as f64], &Device::Cpu)?);
        }
        Ok(())
    }

    /// The gradients that the forward formed, scaled, if this is the first backward and they fit it. They
    /// are given up where they do not: what is computed instead is not to lie in memory beside them.
    fn take_formed(&self, upstream: &[f32], wanted: Wanted) -> Option<Formed<T>> {
        let mut formed = self
            .formed
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take()?;
        let (of_loss, others) = upstream.split_last()?;
        if others.iter().any(|u| *u != 0.)
            || (*of_loss != 1. && !T::SCALES_EXACTLY)
            || (wanted.embeddings && formed.embeddings.is_none())
            || (wanted.classifier && formed.classifier.is_none())
            || (wanted.bias && formed.bias.is_none())
        {
            return None;
        }
        if *of_loss != 1. {
            let factor = T::Real::from_f64(*of_loss as f64);
            let values = [
                &mut formed.embeddings,
                &mut formed.classifier,
                &mut formed.bias,
            ];
            for values in values.into_iter().flatten() {
                values.par_chunks_mut(1 << 14).for_each_init(
                    Vec::new,
                    |wide: &mut Vec<T::Real>, values| {
                        wide.resize(values.len(), T::Real::default());
                        T::widen(values, wide);
                        passes::scale(wide, factor);
                        T::narrow(wide, values);
                    },
                );
            }
        }
        Some(formed)
    }

    fn recompute(&self, inputs: &Inputs<'_, T>, upstream: &[f32], wanted: Wanted) -> Formed<T> {
        let scales = self.scales(upstream);
        let classes_too = wanted.classifier || wanted.bias;
        let averages = self.averages(inputs, gradients(wanted.embeddings, classes_too));
        let known = Known {
            kept: &self.kept,
            softmax: &self.softmax,
            scales: &scales,
            averages: averages.as_ref(),
        };
        if !classes_too || (wanted.embeddings && !self.plan.one_sweep) {
            return Formed {
                embeddings: wanted.embeddings.then(|| self.sweep_rows(inputs, known)),
                ..self.sweep_classes(
                    inputs,
                    known,
                    Wanted {
                        embeddings: false,
                        ..wanted
                    },
                )
            };
        }
        self.sweep_classes(inputs, known, wanted)
    }

    /// What all rows have in common in the tiles that are averaged.
    fn averages(&self, inputs: &Inputs<'_, T>, gradients: u8) -> Option<Averages<T::Real>> {
        let rows = 0..self.rows.len();
        let mut averages = Averages::begin(inputs, &self.kept, &rows, gradients)?;
        for block in blocks(rows.len(), self.plan.rows) {
            let values = inputs.block_embeddings(&block);
            averages.add(inputs, &self.kept, &values, &block);
        }
        Some(averages.finish(inputs))
    }

    /// The gradient of the embeddings alone, block of rows by block of rows.
    fn sweep_rows(&self, inputs: &Inputs<'_, T>, known: Known<'_, T::Real>) -> Vec<T> {
        let mut gradient = EmbeddingsGradient::new(inputs);
        let mut logits = Vec::new();
        for block in blocks(self.rows.len(), self.plan.rows) {
            let values = inputs.block_embeddings(&block);
            gradient.begin(&block);
            for tiles in blocks(inputs.tiles(), self.plan.tiles) {
                logits.resize(block.len() * tiles.len() * TILE, T::Real::default());
                let mut sums = Sums {
                    embeddings: Some(gradient.block(&block)),
                    classifier: None,
                    bias: None,
                    first: false,
                };
                inputs.backward(&values, &block, &tiles, &mut logits, true, known, &mut sums);
            }
            gradient.end(inputs);
        }
        gradient.finish()
    }

    /// The gradients wanted, range of classes by range of classes.
    fn sweep_classes(
        &self,
        inputs: &Inputs<'_, T>,
        known: Known<'_, T::Real>,
        wanted: Wanted,
    ) -> Formed<T> {
        let n = self.rows.len();
        let hidden = inputs.hidden;
        let mut embeddings = wanted.embeddings.then(|| {
            let mut gradient = EmbeddingsGradient::new(inputs);
            gradient.begin(&(0..n));
            gradient
        });
        let mut classifier = ClassesGradient::<T>::new(wanted.classifier, inputs.vocab * hidden);
        let mut bias = ClassesGradient::<T>::new(wanted.bias, inputs.vocab);
        let mut logits = Vec::new();
        let ranges = if wanted.classifier || wanted.bias {
            inputs.tiles()
        } else {
            0
        };
        for tiles in blocks(ranges, self.plan.tiles) {
            let classes = inputs.classes(&tiles);
            let of_classes = classes.start * hidden..classes.end * hidden;
            classifier.begin(of_classes.len());
            bias.begin(classes.len());
            for block in blocks(n, self.plan.rows) {
                let values = inputs.block_embeddings(&block);
                logits.resize(block.len() * tiles.len() * TILE, T::Real::default());
                let mut sums = Sums {
                    embeddings: embeddings.as_mut().map(|e| e.block(&block)),
                    classifier: classifier.range(&of_classes),
                    bias: bias.range(&classes),
                    first: block.start == 0,
                };
                inputs.backward(&values, &block, &tiles, &mut logits, true, known, &mut sums);
            }
            classifier.end(&of_classes);
            bias.end(&classes);
        }
        if let Some(embeddings) = &mut embeddings {
            embeddings.end(inputs);
        }
        Formed {
            embeddings: embeddings.map(EmbeddingsGradient::finish),
            classifier: classifier.finish(),
            bias: bias.finish(),
        }
    }

    /// With the upstream gradients `g` of a row's loss (through the reduced loss or not) and `h` of
    /// its lse, the gradient of its logits is `(g + h) softmax(z) - g onehot(y)`, and `g` has a share more
    /// in the softmax where there is a z-loss.
    fn scales(&self, upstream: &[f32]) -> Vec<Scale<T::Real>> {
        let positions = self.rows.positions;
        let loss = upstream[2 * positions] as f64 * self.rows.scale(self.settings.reduction);
        let scale = |(position, softmax): (&u32, &Softmax<T::Real>)| {
            let of_loss = upstream[*position as usize] as f64 + loss;
            let of_lse = upstream[positions + *position as usize] as f64;
            let lse = softmax.max.to_f64() - softmax.inverse_sum.to_f64().ln();
            Scale {
                softmax: T::Real::from_f64(of_loss * self.settings.softmax_share(lse) + of_lse),
                one_hot: T::Real::from_f64(of_loss),
            }
        };
        self.rows
            .position
            .iter()
            .zip(&self.softmax)
            .map(scale)
            .collect()
    }
}
