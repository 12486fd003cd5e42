//! Logits of tiles, and what is made of them.

use super::{adapter_column, classifier_maps, clusters, keep_from, THREADS};
use crate::cuda::launch::{Gpu, Kernel, GRADIENT_OUTPUTS_SM90A, GRADIENT_SM90A, LOGITS_SM90A};
use crate::cuda::operands::Operands;
use crate::cuda::params::gradient_sm90a::GradientParams;
use crate::cuda::tensor_map::TensorMap;
use crate::plan::TILE;
use candle_core::Result;

/// Shared memory, as `cuda/gradient_sm90a.cuh` asserts.
const SHARED_BYTES: usize = 207_872;
/// Bytes of rows that stay in the L2 cache while classes go by.
const ROWS_BYTES: usize = 18 << 20;

/// Gradient tiles of rows and classes: addresses of what a kernel reads and writes of them, 0 for none.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::cuda) struct Tiles {
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
pub(in crate::cuda) enum Making {
    Gradient,
    EntropyGradient,
    Probabilities,
    ProbabilitiesAndOutputs,
    Logits,
}

/// Computes the logits of tiles and makes something of them. `gathered` is the address of the rows' embeddings.
pub(in crate::cuda) fn tiles(
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
        shared_bytes: SHARED_BYTES,
    };
    gpu.launch_on_maps(&kernel, [&embeddings, &classifier, &adapter], &params)
}
