//! Losses and lse of all rows and, where the strategy is to form them there, the gradients.

use super::average::Averages;
use super::backward::CpuBackward;
use super::block_gradients::{gradients, Block, Known, Sums};
use super::element::{Element, Real};
use super::gradients::{EmbeddingsGradient, FormedGradients};
use super::inputs::Inputs;
use super::kept::Kept;
use super::operands::inputs;
use super::plan::{Columns, Plan};
use super::recompute::Remembered;
use super::shards::sharded;
use super::statistics::{RowLoss, Scale, Softmax, TILE};
use crate::blocks::blocks;
use crate::matrices::{Matrices, View};
use crate::native::rows::HostRows;
use crate::op::contract::{Forward, KeptTiles, Left, Ran, Wanted};
use crate::op::packed::Packed;
use crate::problem::{Problem, Settings};
use crate::{Implementation, Strategy};
use candle_core::{CpuStorage, DType, Device, Result, Tensor};
use half::{bf16, f16};
use std::sync::Arc;

pub(in crate::native) fn forward(
    problem: &Problem,
    matrices: Matrices<View<'_, CpuStorage>>,
    rows: HostRows,
    wanted: Wanted,
    kept: &Arc<KeptTiles>,
) -> Result<Forward<Vec<f32>>> {
    match problem.dtype {
        DType::BF16 => forward_of::<bf16>(problem, matrices, rows, wanted, kept),
        DType::F16 => forward_of::<f16>(problem, matrices, rows, wanted, kept),
        DType::F64 => forward_of::<f64>(problem, matrices, rows, wanted, kept),
        _ => forward_of::<f32>(problem, matrices, rows, wanted, kept),
    }
}

fn forward_of<T: Element>(
    problem: &Problem,
    matrices: Matrices<View<'_, CpuStorage>>,
    rows: HostRows,
    wanted: Wanted,
    report: &Arc<KeptTiles>,
) -> Result<Forward<Vec<f32>>> {
    let settings = problem.settings.clone();
    let n = rows.len();
    let vocab = matrices.classifier.dims2()?.0;
    let plan = Plan::new::<T>(
        &rows,
        vocab,
        Columns {
            hidden: matrices.embeddings.dims2()?.1,
            trained: matrices.trained().dims2()?.1,
        },
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
        let inputs = inputs::<T>(matrices, &rows, &settings, plan.lanes)?;
        match plan.fused_rows {
            Some(block) => {
                formed = Some(fused(
                    &inputs,
                    block,
                    &settings,
                    wanted,
                    &mut kept,
                    &mut softmax,
                    &mut losses,
                ));
            }
            None if settings.vocab_parallel.is_some() => {
                losses = sharded(&inputs, plan.rows, problem, &mut kept, &mut softmax)?;
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
    }
    let (packed, predicted) = pack(problem, &rows, &losses)?;
    let ran = Ran {
        implementation: Implementation::Native,
        strategy: match formed {
            Some(_) => Strategy::Fused,
            None => Strategy::Recompute,
        },
    };
    let known = Remembered {
        rows,
        softmax,
        kept,
        settings,
        plan,
        layout: Packed::of(problem),
    };
    let left = Left {
        ran,
        predicted,
        backward: Box::new(CpuBackward::<T>::new(known, formed, report.clone())),
        loss: None,
    };
    Ok(Forward { packed, left })
}

/// The packed vector of all positions, and the predicted classes where they are asked for.
fn pack(
    problem: &Problem,
    rows: &HostRows,
    losses: &[RowLoss],
) -> Result<(Vec<f32>, Option<Tensor>)> {
    let layout = Packed::of(problem);
    let mut packed = vec![0f32; layout.len()];
    let mut sum = 0.;
    for (row, (position, of_row)) in rows.position.iter().zip(losses).enumerate() {
        let position = *position as usize;
        let loss = rows.terms(row).loss(of_row.nll, of_row.lse, of_row.entropy);
        packed[layout.losses()][position] = loss as f32;
        packed[layout.lse()][position] = of_row.lse as f32;
        if let Some(entropy) = layout.entropy() {
            packed[entropy][position] = of_row.entropy as f32;
        }
        sum += loss;
    }
    packed[layout.loss()] = (sum * rows.scale(problem.settings.reduction)) as f32;
    if !problem.settings.predicted {
        return Ok((packed, None));
    }
    let mut predicted = vec![u32::MAX; rows.positions];
    for (position, of_row) in rows.position.iter().zip(losses) {
        predicted[*position as usize] = of_row.predicted;
    }
    Ok((packed, Some(Tensor::new(predicted, &Device::Cpu)?)))
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
) -> FormedGradients<T> {
    let n = inputs.rows.len();
    let tiles = 0..inputs.tiles();
    let zeros = |wanted: bool, len: usize| wanted.then(|| vec![T::Real::default(); len]);
    let mut classifier = zeros(wanted.classifier, inputs.vocab * inputs.trained().len());
    let mut bias = zeros(wanted.bias, inputs.vocab);
    let mut embeddings = wanted.embeddings.then(|| EmbeddingsGradient::new(inputs));
    let gradients = gradients(wanted.embeddings, wanted.classifier || wanted.bias);
    let scale = inputs.rows.scale(settings.reduction) * settings.logit_scale;
    let mut scales = Vec::with_capacity(n);
    let mut logits = vec![T::Real::default(); block_rows * tiles.len() * TILE];
    for block in blocks(n, block_rows) {
        let logits = &mut logits[..block.len() * tiles.len() * TILE];
        let values = inputs.block_embeddings(&block);
        losses.extend(inputs.forward(&values, &block, Some(&mut *logits), kept, softmax));
        scales.extend(block.clone().map(|row| {
            let terms = inputs.rows.terms(row);
            let mut in_softmax = terms.softmax(losses[row].lse);
            if terms.entropy != 0. {
                in_softmax += terms.entropy * softmax[row].mean.to_f64();
            }
            Scale {
                softmax: T::Real::from_f64(scale * in_softmax),
                one_hot: T::Real::from_f64(scale * terms.nll),
                log: T::Real::from_f64(-scale * terms.entropy),
            }
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
        let block = Block {
            rows: &block,
            tiles: &tiles,
            embeddings: &values,
            known,
            recompute: false,
        };
        inputs.backward(block, logits, &mut sums);
        if let Some(embeddings) = &mut embeddings {
            embeddings.end(inputs);
        }
    }
    drop(logits);
    FormedGradients {
        embeddings: embeddings.map(EmbeddingsGradient::finish),
        classifier: classifier.map(T::from_real),
        bias: bias.map(T::from_real),
    }
}
