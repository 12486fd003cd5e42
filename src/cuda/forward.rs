//! The loss, and the gradients where it pays to form them at the same time.

use super::backward::Saved;
use super::call::{Call, Statistics};
use super::filter::Filter;
use super::fused::{self, Fused};
use super::launch::{Gpu, Kernel, LOSS};
use super::logits::logits;
use super::operands::Operands;
use super::outputs::Outputs;
use super::params::loss::LossParams;
use super::prepared::Prepared;
use super::room::with_room;
use super::rows::Rows;
use super::terms::{Loss, Terms};
use crate::matrices::{Matrices, View};
use crate::op::contract::{self as op, KeptTiles, Wanted};
use crate::op::packed::Packed;
use crate::plan::{Path, TILE};
use crate::problem::Problem;
use crate::{Implementation, Reduction, Strategy};
use candle_core::{CudaStorage, DType, Result};
use std::sync::Arc;

pub(crate) fn forward(
    problem: &Problem,
    matrices: Matrices<View<'_, CudaStorage>>,
    wanted: Wanted,
    kept: &Arc<KeptTiles>,
) -> Result<op::Forward<CudaStorage>> {
    let gpu = Gpu::new(&matrices.embeddings.storage.device);
    let settings = &problem.settings;
    let n = problem.positions.len();
    let layout = Packed::of(problem);
    let packed = gpu.unfinished(DType::F32, layout.len(), false)?;
    let predicted = match settings.predicted {
        true => Some(gpu.unfinished(DType::U32, n, false)?),
        false => None,
    };
    let terms = Terms::of(&gpu, problem)?;
    let loss = Loss {
        packed: packed.address,
        entropy: match layout.entropy() {
            None => 0,
            Some(range) => packed.address + 4 * range.start as u64,
        },
        predicted: predicted.as_ref().map_or(0, |predicted| predicted.address),
        terms: terms.params,
    };
    let rows = Rows::pick(&gpu, problem, loss)?;
    let statistics = Statistics {
        target_logit: gpu.buffer(n * 4)?,
        row_max: gpu.buffer(n * 4)?,
        row_log_sum: gpu.buffer(n * 4)?,
        row_entropy: match loss.more() {
            true => Some(gpu.buffer(n * 4)?),
            false => None,
        },
    };
    let (softcap, scale) = (settings.softcap, settings.logit_scale);
    let (filtered, formed, path) = Operands::read(&gpu, matrices, softcap, scale, |operands| {
        let prepared = Prepared::new(&gpu, operands, n, settings)?;
        let (path, operands) = (prepared.path, prepared.operands);
        let filter = Filter::of(settings, wanted);
        let call = Call {
            gpu: &gpu,
            operands,
            rows: &rows,
            statistics: &statistics,
        };
        let formed = with_room(prepared.workspace, |workspace| {
            let filter = fused::filter(settings, operands, filter);
            let Some(plan) = fused::plan(path, call, loss, settings, (wanted, filter), workspace)
            else {
                return Ok(None);
            };
            let dtype = matrices.classifier.dtype();
            let formed = Outputs::new(&gpu, matrices, wanted, dtype)?;
            let mean = settings.reduction == Reduction::Mean;
            let beside = fused::forward(call, loss, mean, filter, formed.results(), plan)?;
            Ok(Some((formed, beside)))
        })?;
        if formed.is_some() {
            return Ok((None, formed, path));
        }
        let (all_rows, count) = (n.next_multiple_of(TILE), rows.count.address);
        let sharded = settings.vocab_parallel.is_some().then_some(problem);
        let filtered = logits(call, path, loss, count, 0..all_rows, filter, sharded)?;
        Ok((filtered, None, path))
    })?;
    let params = LossParams {
        packed: packed.address,
        count: rows.count.address,
        terms: terms.params,
        positions: n as u32,
        mean: u32::from(settings.reduction == Reduction::Mean),
    };
    gpu.launch(&Kernel::one_block(LOSS, "reduce_loss"), &params)?;
    let packed = packed.finish_storage(&gpu);
    let predicted = predicted.map(|predicted| predicted.finish(&gpu));
    let saved = Arc::new(Saved {
        gpu,
        rows,
        statistics,
        filtered,
        terms,
        settings: settings.clone(),
        kept: kept.clone(),
    });
    let ran = op::Ran {
        implementation: match path {
            Path::Portable => Implementation::CudaPortable,
            Path::Hopper => Implementation::Cuda,
        },
        strategy: match formed {
            Some(_) => Strategy::Fused,
            None => Strategy::Recompute,
        },
    };
    let left = op::Left {
        ran,
        predicted,
        loss: formed.map(|(formed, beside)| {
            let fused = Fused::new(saved.clone(), formed, beside);
            let fused: Box<dyn op::Backward> = Box::new(fused);
            fused
        }),
        backward: Box::new(saved),
    };
    Ok(op::Forward { packed, left })
}
