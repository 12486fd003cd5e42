//! The targets' part of the gradients of the classifier and the bias.

use super::chunk::Chunk;
use crate::cuda::launch::{Buffer, Kernel, FUSED};
use crate::cuda::operands::Operands;
use crate::cuda::params::fused::TargetsParams;
use crate::cuda::rows::sort_targets;
use candle_core::Result;

/// Columns of a block that sums the targets' part of dC.
const TARGET_COLUMNS: usize = 1024;

/// The classes that are targets of a chunk, and their part of db.
pub(super) struct Targets {
    pub slots: Buffer,
    pub bias: Buffer,
}

impl Chunk<'_> {
    /// Sums the targets' part of dC, into `wide`, and of db.
    pub(super) fn targets(&self, first_row: usize, rows: usize) -> Result<Targets> {
        let (gpu, count) = (self.call.gpu, self.call.rows.count.address);
        let Operands {
            embedding_columns,
            vocab,
            kind,
            ..
        } = self.call.operands;
        let trained = self.call.operands.trained();
        let target_columns = self.call.operands.trained_padded();
        let targets = Targets {
            slots: gpu.zeros(vocab * 4)?,
            bias: gpu.buffer(rows * 4)?,
        };
        let sorted = sort_targets(gpu, self.call.rows, first_row, rows)?;
        let params = TargetsParams {
            embeddings: self.call.operands.embeddings + (trained.start * kind.size) as u64,
            target_part: self.target_part.address,
            row_embedding: self.call.rows.embedding.address,
            sorted_row: sorted.row.address,
            sorted_target: sorted.target.address,
            count,
            slots: targets.slots.address,
            target_rows: match self.results.classifier {
                0 => 0,
                _ => self.wide.address,
            },
            target_bias: targets.bias.address,
            unit: self.units.targets(),
            columns: trained.len() as i64,
            embeddings_stride: embedding_columns as i64,
            target_columns: target_columns as i64,
            first_row: first_row as u32,
            rows: rows as u32,
        };
        let blocks = match self.results.classifier {
            0 => 1,
            _ => target_columns.div_ceil(TARGET_COLUMNS),
        };
        let kernel = kind.kernel("sum_targets");
        gpu.launch(&Kernel::new(FUSED, kernel, (rows, blocks), 256), &params)?;
        Ok(targets)
    }
}
