//! The products for compute capability 9.0: `cuda/*_sm90a.cu`.
//!
//! The copy engine cannot pick rows, so the rows that count are gathered first: a group of them in the forward,
//! all of them in the backward.

use super::adapter::{self, EmbeddingRows};
use super::call::{Call, Group, Range, Scales};
use super::launch::{
    Buffer, Gpu, Kernel, Module, FORWARD_OUTPUTS_SM90A, FORWARD_SM90A, GRADIENT_OUTPUTS_SM90A,
    GRADIENT_SM90A, LOGITS_SM90A, PRODUCTS_MIXED_SM90A, PRODUCTS_RAGGED_SM90A, PRODUCTS_SM90A,
};
use super::operands::Operands;
use super::params::classifier::ClassifierParams;
use super::params::forward_sm90a::ForwardParams;
use super::params::gradient_sm90a::GradientParams;
use super::params::product_tiles_sm90a::ProductParams;
use super::tensor_map::TensorMap;
use crate::plan::{
    mixed_strips, shares_outputs, wide_strips, Groups, PANEL, PARTIALS_BYTES, PART_BYTES,
    PIECE_ROWS, STRIP, TILE,
};
use candle_core::{DType, Result};

const THREADS: u32 = 384;
/// Shared memory of the three kernels; each file asserts its own.
const FORWARD_BYTES: usize = 207_872;
const GRADIENT_BYTES: usize = 207_872;
const PRODUCT_BYTES: usize = 232_448;

/// Classes of a tile of the forward.
const FORWARD_CLASSES: usize = 192;
/// Panels that walk the classes together, so that both operands come from the L2 cache.
const RASTER: usize = 8;
/// What the kernels' lists have room for.
const MOST_ROW_TILES: usize = 2048;
/// Bytes of an operand that stay in the L2 cache while others go by.
const RESIDENT_BYTES: usize = 40 << 20;
const ROWS_BYTES: usize = 18 << 20;

/// Whether the kernels take these matrices on this GPU.
pub(super) fn can_run(gpu: &Gpu, operands: Operands, rows: usize) -> Result<bool> {
    let half = matches!(operands.kind.dtype, DType::BF16 | DType::F16);
    Ok(gpu.compute_capability()? == (9, 0)
        && half
        && operands.aligned
        && rows.div_ceil(TILE) <= MOST_ROW_TILES)
}

pub(super) fn forward(
    call: Call<'_>,
    plan: Groups,
    group: Group,
    count: u64,
    gathered: &Buffer,
) -> Result<()> {
    let Call {
        gpu,
        operands,
        rows,
        ..
    } = call;
    let Operands {
        hidden,
        vocab,
        kind,
        ..
    } = operands;
    // Row arrays begin at the group's first row.
    let offset = group.first_row as u64 * 4;
    let pace = gpu.zeros(4)?;
    let params = ForwardParams {
        count,
        row_target: rows.target.address + offset,
        bias: operands.bias,
        partials: group.partials,
        extra: group.extra,
        target_logit: group.target_logit + offset,
        pace: pace.address,
        statistics: group.statistics,
        first_row: group.first_row as u32,
        rows: plan.rows as u32,
        vocab: vocab as u32,
        hidden: hidden as u32,
        adapter_column: adapter_column(operands),
        splits: plan.splits as u32,
        tiles_per_split: plan.tiles_per_split as u32,
        raster: RASTER as u32,
        softcap: operands.softcap,
        logit_scale: operands.logit_scale,
    };
    let embeddings = TensorMap::new(
        gathered.address,
        kind.dtype,
        (plan.rows, hidden),
        hidden,
        64,
    )?;
    // Each block of a cluster copies half of a tile of classes.
    let [classifier, adapter] = classifier_maps(operands, FORWARD_CLASSES / 2)?;
    let (module, name) = match (group.statistics, group.extra) {
        (0, 0) => (FORWARD_SM90A, "forward_sm90a"),
        (_, 0) => (FORWARD_SM90A, "forward_statistics_sm90a"),
        (0, _) => (FORWARD_OUTPUTS_SM90A, "forward_outputs_sm90a"),
        _ => (FORWARD_OUTPUTS_SM90A, "forward_statistics_outputs_sm90a"),
    };
    let items = plan.rows.div_ceil(PANEL) * plan.splits.div_ceil(2);
    let kernel = Kernel {
        module,
        name: kind.kernel(name),
        grid: (clusters(gpu)?.min(items) * 2, 1),
        threads: THREADS,
        shared_bytes: FORWARD_BYTES,
    };
    gpu.launch_on_maps(&kernel, [&embeddings, &classifier, &adapter], &params)
}

/// Of the classifier and of its adapter, in boxes of so many classes. Where there is no adapter, its map is not read.
fn classifier_maps(operands: Operands, box_rows: usize) -> Result<[TensorMap; 2]> {
    let ClassifierParams {
        own,
        adapter,
        own_columns,
        rank,
        ..
    } = operands.classifier;
    let (dtype, vocab) = (operands.kind.dtype, operands.vocab);
    let map = |address, columns: i64| {
        let columns = columns as usize;
        TensorMap::new(address, dtype, (vocab, columns), columns, box_rows)
    };
    let of_adapter = match rank {
        0 => map(own, own_columns)?,
        rank => map(adapter, rank)?,
    };
    Ok([map(own, own_columns)?, of_adapter])
}

/// Gradient tiles of rows and classes: addresses of what a kernel reads and writes of them, 0 for none.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tiles {
    pub count: u64,
    pub row_target: u64,
    pub row_max: u64,
    pub row_log_sum: u64,
    pub p_scale: u64,
    pub target_scale: u64,
    pub log_scale: u64,
    pub keep: u64,
    pub gradient: u64,
    pub sums: u64,
    pub maxima: u64,
    pub masses: u64,
    pub outputs: u64,
    pub target_logit: u64,
    pub first_row: usize,
    pub rows: usize,
    pub first_class: usize,
    pub range: usize,
    /// From one row of the gradient to the next.
    pub stride: usize,
}

/// What is made of the logits of tiles: `Tile` in `cuda/gradient_sm90a.cuh`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Making {
    Gradient,
    EntropyGradient,
    Probabilities,
    ProbabilitiesAndOutputs,
    Logits,
}

/// Computes the logits of tiles and makes something of them. `gathered` is the address of the rows' embeddings.
pub(super) fn tiles(
    gpu: &Gpu,
    operands: Operands,
    making: Making,
    gathered: u64,
    tiles: &Tiles,
) -> Result<()> {
    let Operands {
        hidden,
        vocab,
        kind,
        ..
    } = operands;
    let rows = (tiles.rows, hidden);
    let embeddings = TensorMap::new(gathered, kind.dtype, rows, hidden, 64)?;
    let [classifier, adapter] = classifier_maps(operands, 64)?;
    let raster = match tiles.keep {
        // Every tile: rows that fit the cache next to the classes that pass through.
        0 => (ROWS_BYTES / (TILE * hidden * kind.size) / 2 * 2).clamp(2, 32),
        // Few of them: more rows, so that those which share a class meet.
        _ => 32,
    };
    let params = GradientParams {
        count: tiles.count,
        row_target: tiles.row_target,
        bias: operands.bias,
        row_max: tiles.row_max,
        row_log_sum: tiles.row_log_sum,
        p_scale: tiles.p_scale,
        target_scale: tiles.target_scale,
        log_scale: tiles.log_scale,
        keep: keep_from(operands, tiles.keep, tiles.first_row),
        gradient: tiles.gradient,
        sums: tiles.sums,
        maxima: tiles.maxima,
        masses: tiles.masses,
        outputs: tiles.outputs,
        target_logit: tiles.target_logit,
        first_row: tiles.first_row as u32,
        rows: tiles.rows as u32,
        vocab: vocab as u32,
        hidden: hidden as u32,
        adapter_column: adapter_column(operands),
        first_class: tiles.first_class as u32,
        range: tiles.range as u32,
        gradient_stride: tiles.stride as u32,
        class_tiles: operands.class_tiles() as u32,
        raster: raster as u32,
        softcap: operands.softcap,
        logit_scale: operands.logit_scale,
    };
    let (module, name) = match making {
        Making::Gradient => (GRADIENT_SM90A, "gradient_sm90a"),
        Making::EntropyGradient => (GRADIENT_OUTPUTS_SM90A, "entropy_gradient_sm90a"),
        Making::Probabilities => (GRADIENT_SM90A, "probabilities_sm90a"),
        Making::ProbabilitiesAndOutputs => (GRADIENT_OUTPUTS_SM90A, "probabilities_outputs_sm90a"),
        Making::Logits => (LOGITS_SM90A, "logits_sm90a"),
    };
    let kernel = Kernel {
        module,
        name: kind.kernel(name),
        grid: (clusters(gpu)? * 2, 1),
        threads: THREADS,
        shared_bytes: GRADIENT_BYTES,
    };
    gpu.launch_on_maps(&kernel, [&embeddings, &classifier, &adapter], &params)
}

pub(super) fn backward(
    call: Call<'_>,
    scales: &Scales,
    part: Range,
    gathered: &Buffer,
) -> Result<()> {
    let Call {
        gpu,
        operands,
        rows,
        statistics,
    } = call;
    // Row arrays begin at the chunk's first row.
    let offset = part.first_row as u64 * 4;
    let of_part = Tiles {
        count: rows.count.address,
        row_target: rows.target.address + offset,
        row_max: statistics.row_max.address + offset,
        row_log_sum: statistics.row_log_sum.address + offset,
        p_scale: scales.p.address + offset,
        target_scale: scales.target.address + offset,
        log_scale: scales.log.as_ref().map_or(0, |log| log.address + offset),
        keep: part.keep,
        gradient: part.gradient,
        first_row: part.first_row,
        rows: part.rows,
        first_class: part.first_class,
        range: part.classes.min(operands.vocab - part.first_class),
        stride: part.stride,
        ..Default::default()
    };
    let making = match scales.log {
        None => Making::Gradient,
        Some(_) => Making::EntropyGradient,
    };
    tiles(gpu, operands, making, gathered.address, &of_part)?;
    let (count, scale) = (rows.count.address, scales.result.address);
    products(gpu, operands, count, scale, part, gathered)
}

/// dE += G C and dC = scale G^T E for a range of classes and some rows.
pub(super) fn products(
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
            shared_bytes: PRODUCT_BYTES,
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

/// From which column on the classifier is its adapter; beyond all where it has none.
fn adapter_column(operands: Operands) -> u32 {
    match operands.classifier.rank {
        0 => u32::MAX,
        _ => operands.classifier.adapter_column as u32,
    }
}

/// The table of kept tiles from a row on; 0 where there is none.
fn keep_from(operands: Operands, keep: u64, first_row: usize) -> u64 {
    match keep {
        0 => 0,
        _ => keep + (first_row / TILE * operands.class_tiles()) as u64,
    }
}

/// Clusters of two blocks that run at the same time.
fn clusters(gpu: &Gpu) -> Result<usize> {
    Ok((gpu.multiprocessors()? / 2).max(1))
}
