//! The gradients from what a forward left: the logits are computed again, a range of classes at a time.

use super::averages::{Averages, Masses};
use super::between::Between;
use super::call::{AverageAddresses, Call, Range, Scales, Statistics};
use super::filter::{count_kept, Filtered};
use super::launch::{Buffer, Gpu, Kernel, BACKWARD};
use super::operands::Operands;
use super::outputs::{Outputs, Results};
use super::params::backward::{BiasParams, FinishParams, ScaleParams};
use super::prepared::Prepared;
use super::room::with_room;
use super::rows::Rows;
use super::terms::Terms;
use super::{hopper, portable};
use crate::matrices::{Matrices, View};
use crate::op::contract::{self as op, Gradients, KeptTiles, Wanted};
use crate::plan::{sweeps, Path, Sweep};
use crate::problem::Settings;
use crate::Reduction;
use candle_core::{CudaStorage, DType, Result, Tensor};
use std::sync::Arc;

/// What a forward leaves for a backward.
pub(super) struct Saved {
    pub gpu: Gpu,
    pub rows: Rows,
    pub statistics: Statistics,
    /// Where something is filtered.
    pub filtered: Option<Filtered>,
    pub terms: Terms,
    pub settings: Settings,
    pub kept: Arc<KeptTiles>,
}

impl op::Backward for Saved {
    fn backward(
        &self,
        matrices: Matrices<&Tensor>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        matrices.read(|matrices| self.gradients(matrices, upstream, wanted))
    }
}

impl Saved {
    fn gradients(
        &self,
        matrices: Matrices<View<'_, CudaStorage>>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        let gpu = &self.gpu;
        // A part of a sum over ranks is not rounded yet.
        let embeddings_grad = match self.settings.vocab_parallel {
            Some(_) => DType::F32,
            None => matrices.classifier.dtype(),
        };
        let outputs = Outputs::new(gpu, matrices, wanted, embeddings_grad)?;
        let results = outputs.results();
        let n = self.rows.positions;
        let scales = Scales {
            p: gpu.buffer(n * 4)?,
            target: gpu.buffer(n * 4)?,
            log: match self.settings.differentiates_entropy() {
                true => Some(gpu.buffer(n * 4)?),
                false => None,
            },
            result: gpu.buffer(4)?,
        };
        gpu.read(upstream, |upstream| {
            let params = ScaleParams {
                upstream,
                row_max: self.statistics.row_max.address,
                row_log_sum: self.statistics.row_log_sum.address,
                row_entropy: match (&scales.log, &self.statistics.row_entropy) {
                    (Some(_), Some(entropy)) => entropy.address,
                    _ => 0,
                },
                row_position: self.rows.position.address,
                count: self.rows.count.address,
                p_scale: scales.p.address,
                target_scale: scales.target.address,
                log_scale: scales.log.as_ref().map_or(0, |log| log.address),
                scale: scales.result.address,
                positions: n as u32,
                mean: u32::from(self.settings.reduction == Reduction::Mean),
                terms: self.terms.params,
                logit_scale: self.settings.logit_scale as f32,
            };
            gpu.launch(&Kernel::one_block(BACKWARD, "upstream_scales"), &params)
        })?;
        let (softcap, scale) = (self.settings.softcap, self.settings.logit_scale);
        Operands::read(gpu, matrices, softcap, scale, |operands| {
            let prepared = Prepared::new(gpu, operands, n, &self.settings)?;
            let averaging = matches!(&self.filtered, Some(f) if f.masses.is_some());
            with_room(prepared.workspace, |workspace| {
                let sizes = prepared.operands.sizes();
                let sweeps = sweeps(prepared.path, sizes, n, wanted, workspace, averaging);
                let hopper = sweeps.iter().filter(|sweep| sweep.path == Path::Hopper);
                let chunks = hopper.count();
                // The portable kernels, which run where the others have no room, read the matrices as they are given.
                let operands = match chunks {
                    0 => operands,
                    _ => prepared.operands,
                };
                let call = self.call(operands);
                let between = Between::new(gpu, operands, results, chunks)?;
                sweeps
                    .iter()
                    .try_for_each(|sweep| self.sweep(call, results, &scales, sweep, &between))
            })?;
            self.kept.set(count_kept(self.call(operands), self.keep())?);
            Ok(())
        })?;
        Ok(outputs.finish(gpu))
    }
}

impl Saved {
    fn call(&self, operands: Operands) -> Call<'_> {
        Call {
            gpu: &self.gpu,
            operands,
            rows: &self.rows,
            statistics: &self.statistics,
        }
    }

    /// The table of kept tiles, 0 where all are.
    fn keep(&self) -> u64 {
        self.filtered.as_ref().map_or(0, |f| f.keep.address)
    }

    /// What stands in the place of tiles that are not kept, where they are averaged; it begins the sums of dE.
    fn averages(
        &self,
        call: Call<'_>,
        results: Results,
        scales: &Scales,
        sweep: &Sweep,
        gathered: Option<&Buffer>,
        sums: u64,
    ) -> Result<Option<Averages>> {
        let Some(filtered) = &self.filtered else {
            return Ok(None);
        };
        let Some(masses) = &filtered.masses else {
            return Ok(None);
        };
        let masses = Masses {
            call,
            path: sweep.path,
            filter: filtered.filter,
            masses: masses.address,
            keep: self.keep(),
            first_row: sweep.first_row,
            len: sweep.rows,
            gathered,
            p_scale: scales.p.address,
            row_scale: 0,
        };
        let rows = (sweep.first_row, sweep.rows);
        Averages::new(masses, results, sums)?
            .with_entries(call, scales, self.keep(), rows)
            .map(Some)
    }

    fn sweep(
        &self,
        call: Call<'_>,
        results: Results,
        scales: &Scales,
        sweep: &Sweep,
        between: &Between,
    ) -> Result<()> {
        let Call { gpu, operands, .. } = call;
        let Operands {
            hidden,
            vocab,
            kind,
            ..
        } = operands;
        let Sweep {
            path,
            first_row,
            rows,
            range,
            wanted,
        } = *sweep;
        let results = results.of(wanted);
        let last = first_row + rows >= self.rows.positions;
        let chunk = between.chunk(first_row == 0, last);
        let class_tiles = operands.class_tiles() as u32;
        let keep = self.keep();
        let count = self.rows.count.address;
        let sums = match results.embeddings {
            0 => None,
            _ => Some(gpu.buffer(rows * hidden * 4)?),
        };
        let gathered = match path {
            Path::Portable => None,
            Path::Hopper => {
                let gathered = gpu.buffer(rows * hidden * kind.size)?;
                self.rows
                    .gather(gpu, operands, first_row, rows, &gathered)?;
                Some(gathered)
            }
        };
        let of_sums = sums.as_ref().map_or(0, |sums| sums.address);
        let averages = self.averages(call, results, scales, sweep, gathered.as_ref(), of_sums)?;
        let of_averages = match &averages {
            None => AverageAddresses::default(),
            Some(averages) => averages.addresses(),
        };
        // What the averages need for a while is given back before this is taken.
        let gradient = gpu.buffer(rows * range * kind.size)?;
        for first_class in (0..vocab).step_by(range) {
            let part = Range {
                first_class,
                classes: range,
                stride: range,
                first_row,
                rows,
                gradient: gradient.address,
                keep,
                sums: of_sums,
                add_to_sums: first_class > 0 || averages.is_some(),
                classifier_grad: results.classifier,
                chunk,
                averages: of_averages,
                ..Default::default()
            };
            match &gathered {
                None => portable::backward(call, scales, part)?,
                Some(gathered) => hopper::backward(call, scales, part, gathered)?,
            }
            if results.bias != 0 {
                let params = BiasParams {
                    gradient: gradient.address,
                    count,
                    keep,
                    scale: scales.result.address,
                    slots: of_averages.slots,
                    target_bias: of_averages.target_bias,
                    shares: of_averages.shares,
                    mass_sums: of_averages.mass_sums,
                    bias_grad: results.bias,
                    vocab: vocab as i64,
                    first_class: first_class as i64,
                    range: range as i64,
                    first_row: first_row as u32,
                    rows: rows as u32,
                    class_tiles,
                    overwrite: chunk.first.into(),
                    bias_sums: chunk.bias_sums,
                    last: chunk.last.into(),
                    ..Default::default()
                };
                let grid = (range.div_ceil(32), 1);
                gpu.launch(
                    &Kernel::new(BACKWARD, kind.kernel("bias_gradient"), grid, 256),
                    &params,
                )?;
            }
        }
        if let Some(sums) = sums {
            let params = FinishParams {
                sums: sums.address,
                target_part: of_averages.embeddings_entry,
                row_target: self.rows.target.address,
                classifier: operands.classifier,
                row_embedding: self.rows.embedding.address,
                count,
                scale: scales.result.address,
                embeddings_grad: results.embeddings,
                hidden: hidden as i64,
                embedding_columns: operands.embedding_columns as i64,
                first_row: first_row as u32,
                ..Default::default()
            };
            let name = match self.settings.vocab_parallel {
                Some(_) => "finish_part",
                None => "finish_embeddings",
            };
            let kernel = Kernel::new(BACKWARD, kind.kernel(name), (rows, 1), 256);
            gpu.launch(&kernel, &params)?;
        }
        Ok(())
    }
}
