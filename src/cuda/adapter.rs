//! `cuda/adapter.cu`: the gradient of a classifier's low-rank adapter.

use super::call::Range;
use super::launch::{Gpu, Kernel, ADAPTER};
use super::operands::Operands;
use super::params::adapter::AdapterParams;
use crate::plan::TILE;
use candle_core::Result;

const THREADS: u32 = 256;
/// Shared memory of a block.
const BYTES: usize = 48 << 10;
/// Columns of a block, and of one where that is enough.
const COLUMNS: usize = 64;
const FEW_COLUMNS: usize = 16;

/// Rows of embeddings as wide as those of the call.
#[derive(Debug, Clone, Copy)]
pub(super) struct EmbeddingRows {
    pub address: u64,
    /// Which of them each row is, or 0 where they lie in order from the launch's first on.
    pub index: u64,
    /// How many rows count.
    pub count: u64,
}

/// dB = scale G^T U for a range of classes and some rows; a scale of 0 is none.
pub(super) fn product(
    gpu: &Gpu,
    operands: Operands,
    rows: EmbeddingRows,
    scale: u64,
    part: Range,
) -> Result<()> {
    let Operands {
        hidden,
        vocab,
        kind,
        ..
    } = operands;
    let rank = operands.rank();
    let params = AdapterParams {
        gradient: part.gradient,
        embeddings: rows.address + (operands.trained().start * kind.size) as u64,
        row_embedding: rows.index,
        count: rows.count,
        scale,
        slots: part.slots,
        target_rows: part.target_rows,
        result: part.classifier_grad,
        sums: part.chunk.adapter_sums,
        gradient_stride: part.stride as i64,
        embeddings_stride: hidden as i64,
        vocab: vocab as i64,
        first_class: part.first_class as i64,
        first_row: part.first_row as u32,
        rows: part.rows as u32,
        rank: rank as u32,
        overwrite: part.chunk.first.into(),
        last: part.chunk.last.into(),
    };
    let name = match rank <= FEW_COLUMNS {
        true => "adapter_product_16",
        false => "adapter_product_64",
    };
    let classes = part.classes.min(vocab - part.first_class);
    let kernel = Kernel {
        module: ADAPTER,
        name: kind.kernel(name),
        grid: (classes.div_ceil(TILE), rank.div_ceil(COLUMNS)),
        threads: THREADS,
        shared_bytes: BYTES,
    };
    gpu.launch(&kernel, &params)
}
