//! What f16 has no room for above. Probabilities measured from their target's logit are 2^16 at most: rows where they are not are
//! measured from lse once that is known, and their row tiles written again.

use super::chunk::Chunk;
use crate::cuda::hopper::{tiles, Making, Tiles};
use crate::cuda::launch::{Buffer, Kernel, FUSED};
use crate::cuda::params::fused::RebaseParams;
use crate::plan::TILE;
use candle_core::Result;

impl Chunk<'_> {
    /// Writes the probabilities of row tiles again that f16 has no room for: `again` holds the count of rows if there are
    /// any, then which.
    pub(super) fn write_again(&self, again: &Buffer, written: &Tiles) -> Result<()> {
        let (call, first_row) = (self.call, written.first_row);
        let class_tiles = call.operands.class_tiles();
        let row_tiles = written.rows / TILE;
        let keep = call.gpu.buffer(row_tiles * class_tiles)?;
        let params = RebaseParams {
            again: again.address,
            keep: keep.address,
            reference: written.row_max,
            row_max: call.statistics.row_max.address,
            row_log_sum: call.statistics.row_log_sum.address,
            count: call.rows.count.address,
            first_row: first_row as u32,
            class_tiles: class_tiles as u32,
        };
        let kernel = Kernel::new(FUSED, "rebase_rows", (row_tiles, 1), TILE as u32);
        call.gpu.launch(&kernel, &params)?;
        for first_class in (0..call.operands.vocab).step_by(self.plan.range) {
            // Of arrays with a number of each row and class tile.
            let offset = (first_class / TILE * written.rows * 4) as u64;
            let of_range = |array: u64| if array == 0 { 0 } else { array + offset };
            let range = Tiles {
                count: again.address,
                // That of the chunk's first row tile.
                keep: keep.address - (first_row / TILE * class_tiles) as u64,
                gradient: written.gradient + (first_class * call.operands.kind.size) as u64,
                sums: of_range(written.sums),
                maxima: of_range(written.maxima),
                masses: of_range(written.masses),
                outputs: 0,
                first_class,
                range: self.plan.range.min(call.operands.vocab - first_class),
                ..*written
            };
            let making = Making::Probabilities;
            tiles(
                call.gpu,
                call.operands,
                making,
                self.gathered.address,
                &range,
            )?;
        }
        Ok(())
    }
}
