//! What chunks of rows leave of dC and db for those that follow, so that each is rounded to its dtype once.

use super::call::RowChunk;
use super::launch::{Buffer, Gpu};
use super::operands::Operands;
use super::outputs::Results;
use candle_core::Result;

/// dC itself lies in its place meanwhile, in 16 bits a number: see `cuda/between.cuh`.
#[derive(Default)]
pub(super) struct Between {
    exponents: Option<Buffer>,
    adapter_sums: Option<Buffer>,
    bias_sums: Option<Buffer>,
}

impl Between {
    /// For `chunks` of rows. Of a single one nothing is left.
    pub fn new(gpu: &Gpu, operands: Operands, results: Results, chunks: usize) -> Result<Self> {
        let sizes = operands.sizes();
        let buffer = |grad: u64, bytes: usize| match grad != 0 && chunks > 1 {
            true => gpu.buffer(bytes).map(Some),
            false => Ok(None),
        };
        let (of_classifier, of_adapter) = match sizes.rank {
            0 => (results.classifier, 0),
            _ => (0, results.classifier),
        };
        Ok(Self {
            exponents: buffer(of_classifier, sizes.exponent_bytes())?,
            adapter_sums: buffer(of_adapter, sizes.vocab * sizes.rank * 4)?,
            bias_sums: buffer(results.bias, sizes.vocab * 4)?,
        })
    }

    pub fn chunk(&self, first: bool, last: bool) -> RowChunk {
        let address = |buffer: &Option<Buffer>| buffer.as_ref().map_or(0, |buffer| buffer.address);
        RowChunk {
            first,
            last,
            exponents: address(&self.exponents),
            adapter_sums: address(&self.adapter_sums),
            bias_sums: address(&self.bias_sums),
        }
    }
}
