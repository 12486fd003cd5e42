//! What a chunk of rows adds to the gradients.

use super::chunk::Chunk;
use crate::cuda::averages::{Averages, Masses};
use crate::cuda::call::{AverageAddresses, Range};
use crate::cuda::hopper;
use crate::cuda::launch::{Kernel, BACKWARD};
use crate::cuda::operands::Operands;
use crate::cuda::params::backward::{BiasParams, FinishParams};
use crate::plan::{gradient_stride, Path};
use candle_core::Result;

impl Chunk<'_> {
    /// What stands in the place of tiles that are not kept, where they are averaged; it begins the sums of dE.
    fn averages(&self, first_row: usize, rows: usize) -> Result<Option<Averages>> {
        let (Some(filter), Some(masses)) = (self.filter, &self.masses) else {
            return Ok(None);
        };
        let row_bytes = self.call.operands.mass_stride() * self.call.operands.kind.size;
        let masses = Masses {
            call: self.call,
            path: Path::Hopper,
            filter,
            // Those of the chunk are all there are.
            masses: masses.address.wrapping_sub((first_row * row_bytes) as u64),
            keep: self.keep_table(),
            first_row,
            len: rows,
            gathered: Some(&self.gathered),
            p_scale: 0,
            row_scale: self.factor.address,
        };
        Averages::new(masses, self.results, self.wide.address).map(Some)
    }

    /// dE, then dC and db, whose part of the targets takes the place of dE's sums.
    pub(super) fn products(&self, first_row: usize, rows: usize) -> Result<()> {
        let gpu = self.call.gpu;
        let Operands {
            hidden,
            embedding_columns,
            vocab,
            kind,
            ..
        } = self.call.operands;
        let count = self.call.rows.count.address;
        let averages = self.averages(first_row, rows)?;
        let of_averages = match &averages {
            None => AverageAddresses::default(),
            Some(averages) => averages.addresses(),
        };
        if self.results.embeddings != 0 {
            self.multiply(first_row, rows, |part| Range {
                sums: self.wide.address,
                add_to_sums: part.first_class > 0 || averages.is_some(),
                shared: true,
                ..part
            })?;
            let params = FinishParams {
                sums: self.wide.address,
                target_part: self.target_part.address,
                row_target: self.call.rows.target.address,
                classifier: self.call.operands.classifier,
                row_embedding: self.call.rows.embedding.address,
                count,
                scale: self.units.embeddings(),
                row_scale: self.factor.address,
                embeddings_grad: self.results.embeddings,
                hidden: hidden as i64,
                embedding_columns: embedding_columns as i64,
                first_row: first_row as u32,
            };
            let kernel = Kernel::new(BACKWARD, kind.kernel("finish_embeddings"), (rows, 1), 256);
            gpu.launch(&kernel, &params)?;
        }
        if self.results.classifier == 0 && self.results.bias == 0 {
            return Ok(());
        }
        let targets = self.targets(first_row, rows)?;
        let last = first_row + rows >= self.call.rows.positions;
        let chunk = self.between.chunk(first_row == 0, last);
        if self.results.classifier != 0 {
            self.multiply(first_row, rows, |part| Range {
                classifier_grad: self.results.classifier,
                chunk,
                slots: targets.slots.address,
                target_rows: self.wide.address,
                averages: of_averages,
                ..part
            })?;
        }
        if self.results.bias != 0 {
            let params = BiasParams {
                gradient: self.gradient.address,
                count,
                keep: self.keep_table(),
                scale: self.units.bias(),
                row_scale: self.factor.address,
                slots: targets.slots.address,
                target_bias: targets.bias.address,
                shares: of_averages.shares,
                mass_sums: of_averages.mass_sums,
                bias_grad: self.results.bias,
                vocab: vocab as i64,
                range: gradient_stride(self.call.operands.sizes()) as i64,
                first_row: first_row as u32,
                rows: rows as u32,
                class_tiles: self.call.operands.class_tiles() as u32,
                overwrite: chunk.first.into(),
                bias_sums: chunk.bias_sums,
                last: chunk.last.into(),
                ..Default::default()
            };
            let grid = (vocab.div_ceil(32), 1);
            gpu.launch(
                &Kernel::new(BACKWARD, kind.kernel("bias_gradient"), grid, 256),
                &params,
            )?;
        }
        Ok(())
    }

    /// The products of a chunk, of all ranges of classes, that `results` asks for.
    fn multiply(
        &self,
        first_row: usize,
        rows: usize,
        results: impl Fn(Range) -> Range,
    ) -> Result<()> {
        let Operands { vocab, kind, .. } = self.call.operands;
        let keep = self.keep_table();
        for first_class in (0..vocab).step_by(self.plan.range) {
            let part = results(Range {
                first_class,
                classes: self.plan.range,
                stride: gradient_stride(self.call.operands.sizes()),
                first_row,
                rows,
                gradient: self.gradient.address + (first_class * kind.size) as u64,
                keep,
                ..Default::default()
            });
            let count = self.call.rows.count.address;
            hopper::products(
                self.call.gpu,
                self.call.operands,
                count,
                self.units.classifier(),
                part,
                &self.gathered,
            )?;
        }
        Ok(())
    }
}
