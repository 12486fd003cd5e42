//! The products for compute capability 9.0: `cuda/*_sm90a.cu`.
//!
//! The copy engine cannot pick rows, so the rows that count are gathered first: a group of them in the forward,
//! all of them in the backward.

use super::averages::statistics_bytes;
use super::launch::{
    Buffer, Gpu, Kernel, TensorMap, FORWARD_SM90A, GRADIENT_SM90A, PRODUCTS_SM90A,
};
use super::params::{HopperForwardParams, HopperGradientParams, HopperProductParams};
use super::{ForwardPlan, Group, Operands, Range, Rows, Saved, Scales, TILE};
use candle_core::{DType, Result};

/// Bytes of a backward's workspace unless the user says otherwise.
pub(super) const WORKSPACE: usize = 448 << 20;

const THREADS: u32 = 384;
/// Shared memory of the three kernels; each file asserts its own.
const FORWARD_BYTES: usize = 207_872;
const GRADIENT_BYTES: usize = 207_872;
const PRODUCT_BYTES: usize = 232_448;

/// Classes of a range that a backward must have room for to be worth these kernels ...
const LEAST_RANGE: usize = 2048;
/// ... and chunks of rows it is cut into at most: dC is rounded once in each.
const MOST_CHUNKS: usize = 8;
/// Rows whose products take as long as reading and writing dC once.
pub(super) const ROWS_A_CHUNK: usize = 375;
/// What a launch costs, in steps of 128 x 192 products: 10 microseconds.
const LAUNCH: usize = 1200;

/// Classes of a tile of the forward, and rows of a cluster's panel.
const FORWARD_CLASSES: usize = 192;
const PANEL: usize = 256;
/// Panels that walk the classes together, so that both operands come from the L2 cache.
const RASTER: usize = 8;
/// What a forward holds for a group of rows, in bytes: where gradients will be wanted, and where not.
const TRAINING_BYTES: usize = 44 << 20;
pub(super) const EVALUATION_BYTES: usize = 15 << 20;

/// Rows whose part of dC the tensor cores sum at a time, and the bytes of a block that has to keep such parts: as
/// `products_sm90a.cu` asserts.
pub(super) const PIECE_ROWS: usize = 128 * TILE;
const PARTIALS_BYTES: usize = 2 * 192 * 128 * 4;

/// Columns of a strip of the products: what a cluster computes side by side.
pub(super) const STRIP: usize = 384;
/// What the kernels' lists have room for: tiles along either side of a range, words of 32 tiles that an output is
/// summed over times outputs, and tiles of a range a cluster.
const TILES: usize = 2048;
const WORDS: usize = 4096;
const LISTED: usize = 2048;
/// Bytes of an operand that stay in the L2 cache while others go by.
const RESIDENT_BYTES: usize = 40 << 20;
const ROWS_BYTES: usize = 18 << 20;

/// Whether the kernels take these matrices, on a GPU of compute capability 9.0.
pub(super) fn can_run(operands: Operands, rows: usize) -> bool {
    let half = matches!(operands.kind.dtype, DType::BF16 | DType::F16);
    half && operands.aligned && rows.div_ceil(TILE) <= TILES
}

/// Classes of a range of the backward at most.
pub(super) fn longest_range(all_rows: usize, multiprocessors: usize) -> usize {
    let rows = all_rows / TILE;
    let tiles = (LISTED * (multiprocessors / 2) / rows)
        .min(WORDS / rows * 32)
        .min(WORDS / rows.div_ceil(32));
    tiles.min(TILES) * TILE
}

/// Rows of a chunk and classes of a range of a backward: of what fits the workspace, where a row of a chunk takes
/// `row_bytes` beside its classes, the pair that leaves the fewest clusters idle and goes through its sums least often.
/// Very many rows are one chunk where that fits, for dC is rounded once in each. `chunk_steps` is what a chunk costs
/// besides, in steps of the products. `None` where nothing fits.
pub(super) fn chunk_and_range(
    operands: Operands,
    all_rows: usize,
    multiprocessors: usize,
    row_bytes: usize,
    workspace: usize,
    chunk_steps: usize,
) -> Option<(usize, usize)> {
    const COLUMNS: usize = 2 * TILE;
    let (hidden, vocab, size) = (operands.hidden, operands.vocab, operands.kind.size);
    let clusters = (multiprocessors / 2).max(1);
    let strips = hidden.div_ceil(STRIP);
    let rounds = |outputs: usize| outputs.div_ceil(clusters);
    // Steps of 128 x 192 products that a block goes through for a chunk and a range.
    let steps = |rows: usize, range: usize| {
        let tiles = rounds(rows.div_ceil(PANEL) * range / TILE) * hidden * 2 / 3;
        let embeddings = rounds(rows / TILE * strips) * (range + 2 * ROWS_A_CHUNK);
        let classifier = rounds(range / TILE * strips) * (rows + ROWS_A_CHUNK);
        tiles + embeddings + classifier + 3 * LAUNCH
    };
    let partials = match all_rows > PIECE_ROWS {
        true => clusters * 2 * PARTIALS_BYTES,
        false => 0,
    };
    let workspace = workspace.saturating_sub(partials);
    let panels = all_rows.div_ceil(PANEL);
    let (least, step) = (panels.div_ceil(MOST_CHUNKS), panels.div_ceil(64).max(1));
    let mut best = None;
    for rows in [panels].into_iter().chain((least..panels).step_by(step)) {
        if all_rows > PIECE_ROWS && best.is_some_and(|(_, (rows, _))| rows >= all_rows) {
            break;
        }
        let rows = (rows * PANEL).min(all_rows);
        let left = workspace.saturating_sub(rows * row_bytes);
        let most = (left / (rows * size)).min(longest_range(rows, multiprocessors));
        let most = most / COLUMNS * COLUMNS;
        if most < LEAST_RANGE.min(vocab.next_multiple_of(COLUMNS)) {
            continue;
        }
        let fewest = vocab.div_ceil(most);
        for ranges in fewest..=fewest + fewest / 2 {
            let range = vocab.div_ceil(ranges).next_multiple_of(COLUMNS);
            let (whole, rest) = (all_rows / rows, all_rows % rows);
            let of_rest = if rest > 0 { steps(rest, range) } else { 0 };
            let cost = ranges * (whole * steps(rows, range) + of_rest)
                + all_rows.div_ceil(rows) * chunk_steps;
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, (rows, range)));
            }
        }
    }
    best.map(|(_, plan)| plan)
}

/// What a chunk pays for averaging, in steps of the products: 0.7 ms of the 14.2 ms that one product of 1.33 million steps
/// takes, at V = 128,256 and D = 4096. The pass over the classifier is 0.44 ms of it; the thin products are the rest.
pub(super) fn averaging_steps(operands: Operands) -> usize {
    operands.vocab * operands.hidden / 8000
}

/// The group of rows and the splits of the classes that leave the fewest clusters idle at the end of a launch.
pub(super) fn plan(
    operands: Operands,
    all_rows: usize,
    multiprocessors: usize,
    filtering: bool,
) -> ForwardPlan {
    let tiles = operands.vocab.div_ceil(FORWARD_CLASSES);
    let clusters = (multiprocessors / 2).max(1);
    let budget = if filtering {
        TRAINING_BYTES
    } else {
        EVALUATION_BYTES
    };
    let mut row_bytes = operands.hidden * operands.kind.size;
    if filtering {
        row_bytes += operands.class_tiles() * statistics_bytes(operands.kind);
    }
    let mut best = (
        f64::INFINITY,
        ForwardPlan {
            group_rows: PANEL,
            splits: tiles.div_ceil(16),
            tiles_per_split: 16,
        },
    );
    let most_rows = all_rows.next_multiple_of(PANEL).min(8192);
    for group_rows in (PANEL..=most_rows).step_by(PANEL) {
        for tiles_per_split in (2..=32).step_by(2) {
            let splits = tiles.div_ceil(tiles_per_split);
            if group_rows * (row_bytes + splits * 8) > budget {
                continue;
            }
            // Rounds of a launch, each as long as a split, and about a third of a tile for its start and end.
            let cost: f64 = (0..all_rows)
                .step_by(group_rows)
                .map(|first| {
                    let panels = group_rows.min(all_rows - first).div_ceil(PANEL);
                    let items = panels * splits.div_ceil(2);
                    (items.div_ceil(clusters) * tiles_per_split) as f64 + 0.3
                })
                .sum();
            if cost < best.0 {
                best = (
                    cost,
                    ForwardPlan {
                        group_rows,
                        splits,
                        tiles_per_split,
                    },
                );
            }
        }
    }
    best.1
}

pub(super) fn forward(
    gpu: &Gpu,
    operands: Operands,
    rows: &Rows,
    plan: ForwardPlan,
    group: Group,
    count: u64,
    gathered: &Buffer,
) -> Result<()> {
    let Operands {
        hidden,
        vocab,
        kind,
        ..
    } = operands;
    // Row arrays begin at the group's first row.
    let offset = group.first_row as u64 * 4;
    let pace = gpu.zeros(4)?;
    let params = HopperForwardParams {
        count,
        row_target: rows.target.address + offset,
        bias: operands.bias,
        partials: group.partials,
        target_logit: group.target_logit + offset,
        pace: pace.address,
        statistics: group.statistics,
        first_row: group.first_row as u32,
        rows: plan.group_rows as u32,
        classes: vocab as u32,
        depth: hidden as u32,
        splits: plan.splits as u32,
        tiles_per_split: plan.tiles_per_split as u32,
        raster: RASTER as u32,
        softcap: operands.softcap,
    };
    let embeddings = TensorMap::new(
        gathered.address,
        kind.dtype,
        (plan.group_rows, hidden),
        hidden,
        64,
    )?;
    // Each block of a cluster copies half of a tile of classes.
    let classifier = TensorMap::new(
        operands.classifier,
        kind.dtype,
        (vocab, hidden),
        hidden,
        FORWARD_CLASSES / 2,
    )?;
    let items = plan.group_rows.div_ceil(PANEL) * plan.splits.div_ceil(2);
    let kernel = Kernel {
        module: FORWARD_SM90A,
        name: kind.kernel(match group.statistics {
            0 => "forward_sm90a",
            _ => "forward_statistics_sm90a",
        }),
        grid: (clusters(gpu)?.min(items) * 2, 1),
        threads: THREADS,
        shared_bytes: FORWARD_BYTES,
    };
    gpu.launch_on_maps(&kernel, [&embeddings, &classifier], &params)
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
    pub keep: u64,
    pub gradient: u64,
    pub sums: u64,
    pub maxima: u64,
    pub masses: u64,
    pub target_logit: u64,
    pub first_row: usize,
    pub rows: usize,
    pub first_class: usize,
    pub range: usize,
    /// From one row of the gradient to the next.
    pub stride: usize,
}

/// Launches `gradient_sm90a` or `probabilities_sm90a`.
pub(super) fn tiles(
    gpu: &Gpu,
    operands: Operands,
    name: &str,
    gathered: &Buffer,
    tiles: &Tiles,
) -> Result<()> {
    let Operands {
        hidden,
        vocab,
        kind,
        ..
    } = operands;
    let map = |address, rows| TensorMap::new(address, kind.dtype, (rows, hidden), hidden, 64);
    let embeddings = map(gathered.address, tiles.rows)?;
    let classifier = map(operands.classifier, vocab)?;
    let raster = match tiles.keep {
        // Every tile: rows that fit the cache next to the classes that pass through.
        0 => (ROWS_BYTES / (TILE * hidden * kind.size) / 2 * 2).clamp(2, 32),
        // Few of them: more rows, so that those which share a class meet.
        _ => 32,
    };
    let params = HopperGradientParams {
        count: tiles.count,
        row_target: tiles.row_target,
        bias: operands.bias,
        row_max: tiles.row_max,
        row_log_sum: tiles.row_log_sum,
        p_scale: tiles.p_scale,
        target_scale: tiles.target_scale,
        keep: keep_from(operands, tiles.keep, tiles.first_row),
        gradient: tiles.gradient,
        sums: tiles.sums,
        maxima: tiles.maxima,
        masses: tiles.masses,
        target_logit: tiles.target_logit,
        first_row: tiles.first_row as u32,
        rows: tiles.rows as u32,
        classes: vocab as u32,
        depth: hidden as u32,
        first_class: tiles.first_class as u32,
        range: tiles.range as u32,
        gradient_stride: tiles.stride as u32,
        keep_stride: operands.class_tiles() as u32,
        raster: raster as u32,
        softcap: operands.softcap,
    };
    let kernel = Kernel {
        module: GRADIENT_SM90A,
        name: kind.kernel(name),
        grid: (clusters(gpu)? * 2, 1),
        threads: THREADS,
        shared_bytes: GRADIENT_BYTES,
    };
    gpu.launch_on_maps(&kernel, [&embeddings, &classifier], &params)
}

pub(super) fn backward(
    saved: &Saved,
    operands: Operands,
    scales: &Scales,
    part: Range,
    gathered: &Buffer,
) -> Result<()> {
    // Row arrays begin at the chunk's first row.
    let offset = part.first_row as u64 * 4;
    let of_part = Tiles {
        count: saved.rows.count.address,
        row_target: saved.rows.target.address + offset,
        row_max: saved.statistics.row_max.address + offset,
        row_log_sum: saved.statistics.row_log_sum.address + offset,
        p_scale: scales.p.address + offset,
        target_scale: scales.target.address + offset,
        keep: part.keep,
        gradient: part.gradient,
        first_row: part.first_row,
        rows: part.rows,
        first_class: part.first_class,
        range: part.classes.min(operands.vocab - part.first_class),
        stride: part.stride,
        ..Default::default()
    };
    let gpu = &saved.gpu;
    tiles(gpu, operands, "gradient_sm90a", gathered, &of_part)?;
    let (count, scale) = (saved.rows.count.address, scales.result.address);
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
        vocab,
        kind,
        ..
    } = operands;
    let classes = part.classes.min(vocab - part.first_class);
    let map = |address, rows, columns, stride| {
        TensorMap::new(address, kind.dtype, (rows, columns), stride, 64)
    };
    let embeddings = map(gathered.address, part.rows, hidden, hidden)?;
    let classifier = map(operands.classifier, vocab, hidden, hidden)?;
    // To the end of the last tile: its columns past the last class are zeros.
    let columns = classes.next_multiple_of(TILE);
    let gradient = map(part.gradient, part.rows, columns, part.stride)?;
    let blocks = clusters(gpu)? * 2;
    let partials = match part.classifier_grad != 0 && part.rows > PIECE_ROWS {
        true => Some(gpu.buffer(blocks * PARTIALS_BYTES)?),
        false => None,
    };
    let multiply = |name: &str, other: &TensorMap, out: u64, inner: usize, overwrite: bool| {
        let band = match part.keep {
            0 => hidden.div_ceil(STRIP),
            _ => (RESIDENT_BYTES / (inner * STRIP * kind.size)).max(1),
        };
        let params = HopperProductParams {
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
            partials: partials.as_ref().map_or(0, |partials| partials.address),
            embeddings: gathered.address,
            first_row: part.first_row as u32,
            rows: part.rows as u32,
            classes: vocab as u32,
            depth: hidden as u32,
            first_class: part.first_class as u32,
            range: classes as u32,
            keep_stride: operands.class_tiles() as u32,
            overwrite: overwrite.into(),
            band: band as u32,
        };
        let kernel = Kernel {
            module: PRODUCTS_SM90A,
            name: kind.kernel(name),
            grid: (blocks, 1),
            threads: THREADS,
            shared_bytes: PRODUCT_BYTES,
        };
        gpu.launch_on_maps(&kernel, [&gradient, other], &params)
    };
    if part.sums != 0 {
        let name = "embeddings_gradient_sm90a";
        multiply(name, &classifier, part.sums, classes, !part.add_to_sums)?;
    }
    if part.classifier_grad != 0 {
        let name = match part.averages.shares {
            0 => "classifier_gradient_sm90a",
            _ => "averaged_classifier_gradient_sm90a",
        };
        let overwrite = !part.add_to_classifier;
        multiply(
            name,
            &embeddings,
            part.classifier_grad,
            part.rows,
            overwrite,
        )?;
    }
    Ok(())
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
