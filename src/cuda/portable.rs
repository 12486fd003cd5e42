//! The products for compute capability 8.0 and later: `cuda/*_sm80.cu`.

use super::adapter::{self, EmbeddingRows};
use super::call::{Call, Group, Range, Scales};
use super::launch::{
    Gpu, Kernel, FORWARD_OUTPUTS_SM80, FORWARD_SM80, GRADIENT_SM80, PRODUCTS_SM80,
};
use super::operands::{Kind, Operands};
use super::params::forward_sm80::ForwardParams;
use super::params::gradient_sm80::GradientParams;
use super::params::products_sm80::ProductParams;
use super::rows::Rows;
use crate::plan::{Groups, TILE};
use candle_core::{DType, Result};

const THREADS: u32 = 256;
/// Classes of a block of the forward and the dense gradient, columns of a block of the products.
fn columns(kind: Kind) -> usize {
    match kind.dtype {
        DType::F32 => 128,
        _ => 256,
    }
}

/// Shared memory of a pipeline whose blocks are `columns` wide: 4 stages of 64 bytes a row.
fn stages(columns: usize) -> usize {
    4 * 64 * (TILE + columns)
}

pub(super) fn forward(
    gpu: &Gpu,
    operands: Operands,
    rows: &Rows,
    plan: Groups,
    group: Group,
) -> Result<()> {
    let kind = operands.kind;
    let params = ForwardParams {
        embeddings: operands.embeddings,
        classifier: operands.classifier,
        bias: operands.bias,
        row_embedding: rows.embedding.address,
        row_target: rows.target.address,
        count: rows.count.address,
        partials: group.partials,
        target_logit: group.target_logit,
        statistics: group.statistics,
        extra: group.extra,
        hidden: operands.hidden as i64,
        vocab: operands.vocab as i64,
        first_row: group.first_row as u32,
        group_rows: plan.rows as u32,
        splits: plan.splits as u32,
        softcap: operands.softcap,
        logit_scale: operands.logit_scale,
        aligned: operands.aligned.into(),
    };
    let (module, name) = match group.extra {
        0 => (FORWARD_SM80, "forward_sm80"),
        _ => (FORWARD_OUTPUTS_SM80, "forward_outputs_sm80"),
    };
    let kernel = Kernel {
        module,
        name: kind.kernel(name),
        grid: (plan.rows / TILE * plan.splits, 1),
        threads: THREADS,
        // What 4 warps have for the filter, and targets.
        shared_bytes: stages(columns(kind))
            + 4 * TILE * operands.sizes().statistics_bytes()
            + TILE * 4,
    };
    gpu.launch(&kernel, &params)
}

pub(super) fn backward(call: Call<'_>, scales: &Scales, part: Range) -> Result<()> {
    let Call {
        gpu,
        operands,
        rows,
        statistics,
    } = call;
    let kind = operands.kind;
    let class_tiles = operands.class_tiles() as u32;
    let params = GradientParams {
        embeddings: operands.embeddings,
        classifier: operands.classifier,
        bias: operands.bias,
        row_embedding: rows.embedding.address,
        row_target: rows.target.address,
        count: rows.count.address,
        row_max: statistics.row_max.address,
        row_log_sum: statistics.row_log_sum.address,
        p_scale: scales.p.address,
        target_scale: scales.target.address,
        log_scale: scales.log.as_ref().map_or(0, |log| log.address),
        keep: part.keep,
        gradient: part.gradient,
        hidden: operands.hidden as i64,
        vocab: operands.vocab as i64,
        first_class: part.first_class as i64,
        range: part.classes as i64,
        first_row: part.first_row as u32,
        class_tiles,
        softcap: operands.softcap,
        logit_scale: operands.logit_scale,
        aligned: operands.aligned.into(),
    };
    let (name, wide) = match part.keep {
        0 => ("gradient_sm80", columns(kind)),
        _ => ("gradient_narrow_sm80", TILE),
    };
    let kernel = Kernel {
        module: GRADIENT_SM80,
        name: kind.kernel(name),
        grid: (part.rows / TILE, part.classes / wide),
        threads: THREADS,
        shared_bytes: stages(wide).max(TILE * wide * kind.size),
    };
    gpu.launch(&kernel, &params)?;
    products(gpu, operands, rows, scales.result.address, part)
}

/// dE += G C and dC = scale G^T E for a range of classes and some rows; a scale of 0 is none.
pub(super) fn products(
    gpu: &Gpu,
    operands: Operands,
    rows: &Rows,
    scale: u64,
    part: Range,
) -> Result<()> {
    let kind = operands.kind;
    let params = ProductParams {
        gradient: part.gradient,
        classifier: operands.classifier,
        embeddings: operands.embeddings,
        row_embedding: rows.embedding.address,
        count: rows.count.address,
        keep: part.keep,
        scale,
        hidden: operands.hidden as i64,
        vocab: operands.vocab as i64,
        first_class: part.first_class as i64,
        range: part.classes as i64,
        first_row: part.first_row as u32,
        rows: part.rows as u32,
        class_tiles: operands.class_tiles() as u32,
        accumulate: part.add_to_sums.into(),
        aligned: operands.aligned.into(),
        shares: part.averages.shares,
        mass_rows: part.averages.mass_rows,
        list: part.averages.list,
        combined: part.averages.combined,
        ..Default::default()
    };
    let multiply = |name: &str, outer: usize, params: &ProductParams| {
        let kernel = Kernel {
            module: PRODUCTS_SM80,
            name: kind.kernel(name),
            grid: (operands.hidden.div_ceil(columns(kind)), outer / TILE),
            threads: THREADS,
            // The list of kept tiles, numbers of 16 bits, and a count a warp.
            shared_bytes: stages(columns(kind)) + 1024 * 2 + 8 * 4,
        };
        gpu.launch(&kernel, params)
    };
    if part.sums != 0 {
        let params = ProductParams {
            result: part.sums,
            ..params
        };
        multiply("embeddings_product_sm80", part.rows, &params)?;
    }
    if part.classifier_grad == 0 {
        return Ok(());
    }
    if operands.rank() > 0 {
        let rows = EmbeddingRows {
            address: operands.embeddings,
            index: rows.embedding.address,
            count: rows.count.address,
        };
        return adapter::product(gpu, operands, rows, scale, part);
    }
    let params = ProductParams {
        result: part.classifier_grad,
        ..params
    };
    multiply("classifier_product_sm80", part.classes, &params)
}
