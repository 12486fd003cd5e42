//! The products of the gradient of the logits: dE, dC and the gradient of an adapter.

use super::{adapter_column, classifier_maps, clusters, keep_from, THREADS};
use crate::cuda::adapter::{self, EmbeddingRows};
use crate::cuda::call::Range;
use crate::cuda::launch::{
    Buffer, Gpu, Kernel, Module, PRODUCTS_MIXED_SM90A, PRODUCTS_RAGGED_SM90A, PRODUCTS_SM90A,
};
use crate::cuda::operands::Operands;
use crate::cuda::params::product_tiles_sm90a::ProductParams;
use crate::cuda::tensor_map::TensorMap;
use crate::plan::{
    mixed_strips, shares_outputs, wide_strips, PARTIALS_BYTES, PART_BYTES, PIECE_ROWS, STRIP, TILE,
};
use candle_core::Result;

/// Shared memory, as `cuda/products_sm90a.cuh` asserts.
const SHARED_BYTES: usize = 232_448;
/// Bytes of an operand that stay in the L2 cache while others go by.
const RESIDENT_BYTES: usize = 40 << 20;

/// dE += G C and dC = scale G^T E for a range of classes and some rows.
pub(in crate::cuda) fn products(
    gpu: &Gpu,
    operands: Operands,
    count: u64,
    scale: u64,
    part: Range,
    gathered: &Buffer,
) -> Result<()> {
    let Operands {
        hidden,
        embedding_columns,
        vocab,
        kind,
        ..
    } = operands;
    let classes = part.classes.min(vocab - part.first_class);
    let map = |address, columns, stride| {
        TensorMap::new(address, kind.dtype, (part.rows, columns), stride, 64)
    };
    // To the end of the last tile: its columns past the last class are zeros.
    let gradient = map(part.gradient, classes.next_multiple_of(TILE), part.stride)?;
    let blocks = clusters(gpu)? * 2;
    let of_classifier = part.classifier_grad != 0 && operands.rank() == 0;
    let partials = match of_classifier && part.rows > PIECE_ROWS {
        true => Some(gpu.buffer(blocks * PARTIALS_BYTES)?),
        false => None,
    };
    let prepare = |(module, name): (Module, &str), out: u64, inner: usize, overwrite: bool| {
        let band = match part.keep {
            0 => hidden.div_ceil(STRIP),
            _ => (RESIDENT_BYTES / (inner * STRIP * kind.size)).max(1),
        };
        let params = ProductParams {
            count,
            keep: keep_from(operands, part.keep, part.first_row),
            scale,
            out,
            slots: part.slots,
            target_rows: part.target_rows,
            shares: part.averages.shares,
            mass_rows: part.averages.mass_rows,
            list: part.averages.list,
            combined: part.averages.combined,
            parts: 0,
            partials: partials.as_ref().map_or(0, |partials| partials.address),
            embeddings: gathered.address,
            first_row: part.first_row as u32,
            rows: part.rows as u32,
            vocab: vocab as u32,
            hidden: hidden as u32,
            adapter_column: adapter_column(operands),
            grad_columns: embedding_columns as u32,
            first_class: part.first_class as u32,
            range: classes as u32,
            class_tiles: operands.class_tiles() as u32,
            overwrite: overwrite.into(),
            exponents: part.chunk.exponents,
            last: part.chunk.last.into(),
            wide: wide_strips(hidden) as u32,
            band: band as u32,
        };
        let kernel = Kernel {
            module,
            name: kind.kernel(name),
            grid: (blocks, 1),
            threads: THREADS,
            shared_bytes: SHARED_BYTES,
        };
        (kernel, params)
    };
    if part.sums != 0 {
        let kernel = embeddings_product(operands);
        let (kernel, mut params) = prepare(kernel, part.sums, classes, !part.add_to_sums);
        let shared =
            part.shared && part.keep == 0 && shares_outputs(operands.sizes(), part.rows, classes);
        let parts = match shared {
            true => Some(gpu.buffer(blocks * PART_BYTES)?),
            false => None,
        };
        params.parts = parts.as_ref().map_or(0, |parts| parts.address);
        let [classifier, adapter] = classifier_maps(operands, 64)?;
        gpu.launch_on_maps(&kernel, [&gradient, &classifier, &adapter], &params)?;
        if parts.is_some() {
            let (module, name) = embeddings_parts(operands);
            gpu.launch(&Kernel::new(module, name, (blocks, 1), 512), &params)?;
        }
    }
    if of_classifier {
        let kernel = classifier_product(operands, part.averages.shares != 0);
        let first = part.chunk.first;
        let (kernel, params) = prepare(kernel, part.classifier_grad, part.rows, first);
        let embeddings = map(gathered.address, hidden, hidden)?;
        gpu.launch_on_maps(&kernel, [&gradient, &embeddings], &params)?;
    } else if part.classifier_grad != 0 {
        let rows = EmbeddingRows {
            address: gathered.address,
            index: 0,
            count,
        };
        adapter::product(gpu, operands, rows, scale, part)?;
    }
    Ok(())
}

fn embeddings_product(operands: Operands) -> (Module, &'static str) {
    match mixed_strips(operands.sizes()) {
        false => (PRODUCTS_SM90A, "embeddings_gradient_sm90a"),
        true => (PRODUCTS_MIXED_SM90A, "mixed_embeddings_gradient_sm90a"),
    }
}

/// The kernel that adds up what clusters have of the outputs that they share.
fn embeddings_parts(operands: Operands) -> (Module, &'static str) {
    match mixed_strips(operands.sizes()) {
        false => (PRODUCTS_SM90A, "embeddings_parts_sm90a"),
        true => (PRODUCTS_MIXED_SM90A, "mixed_embeddings_parts_sm90a"),
    }
}

/// `averaged`: with what stands in the place of tiles.
fn classifier_product(operands: Operands, averaged: bool) -> (Module, &'static str) {
    let (module, [plain, with_averages]) = if operands.embedding_columns < operands.hidden {
        let names = [
            "ragged_classifier_gradient_sm90a",
            "ragged_averaged_classifier_gradient_sm90a",
        ];
        (PRODUCTS_RAGGED_SM90A, names)
    } else if mixed_strips(operands.sizes()) {
        let names = [
            "mixed_classifier_gradient_sm90a",
            "mixed_averaged_classifier_gradient_sm90a",
        ];
        (PRODUCTS_MIXED_SM90A, names)
    } else {
        let names = [
            "classifier_gradient_sm90a",
            "averaged_classifier_gradient_sm90a",
        ];
        (PRODUCTS_SM90A, names)
    };
    (module, if averaged { with_averages } else { plain })
}
