//! The products for compute capability 9.0: `cuda/*_sm90a.cu`.
//!
//! The copy engine cannot pick rows, so the rows that count are gathered first: a group of them in the forward,
//! all of them in the backward.

mod forward;
mod products;
mod tiles;

use super::call::{Call, Range, Scales};
use super::launch::{Buffer, Gpu};
use super::operands::Operands;
use super::params::classifier::ClassifierParams;
use super::tensor_map::TensorMap;
use crate::plan::TILE;
use candle_core::{DType, Result};

pub(super) use forward::forward;
pub(super) use products::products;
pub(super) use tiles::{tiles, Making, Tiles};

const THREADS: u32 = 384;
/// What the kernels' lists have room for.
const MOST_ROW_TILES: usize = 2048;

/// Whether the kernels take these matrices on this GPU.
pub(super) fn can_run(gpu: &Gpu, operands: Operands, rows: usize) -> Result<bool> {
    let half = matches!(operands.kind.dtype, DType::BF16 | DType::F16);
    Ok(gpu.compute_capability()? == (9, 0)
        && half
        && operands.aligned
        && rows.div_ceil(TILE) <= MOST_ROW_TILES)
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
