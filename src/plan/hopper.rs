//! The backward's chunks of rows and ranges of classes on compute capability 9.0.

use super::{Sizes, TILE};

/// Classes of a range that a backward must have room for to be worth these kernels ...
const LEAST_RANGE: usize = 2048;
/// ... and chunks of rows it is cut into at most.
const MOST_CHUNKS: usize = 64;
/// Rows whose products take as long as reading and writing dC once.
pub(super) const ROWS_A_CHUNK: usize = 375;
/// What a launch costs, in steps of 128 x 192 products: 10 microseconds.
const LAUNCH: usize = 1200;

/// Rows of a cluster's panel.
pub(crate) const PANEL: usize = 256;
/// Rows whose part of dC the tensor cores sum at a time, and the bytes of a block that has to keep such parts: as
/// `products_sm90a.cu` asserts.
pub(crate) const PIECE_ROWS: usize = 128 * TILE;
pub(crate) const PARTIALS_BYTES: usize = 2 * 192 * 128 * 4;
/// Columns of a strip of the products: what a cluster computes side by side.
pub(crate) const STRIP: usize = 384;
/// What the kernels' lists have room for: tiles along either side of a range, words of 32 tiles that an output is
/// summed over times outputs, and tiles of a range a cluster.
pub(super) const TILES: usize = 2048;
const WORDS: usize = 4096;
const LISTED: usize = 2048;

/// Classes of a range of the backward at most.
pub(crate) fn longest_range(sizes: Sizes, all_rows: usize) -> usize {
    let rows = all_rows / TILE;
    let tiles = (LISTED * (sizes.multiprocessors / 2) / rows)
        .min(WORDS / rows * 32)
        .min(WORDS / rows.div_ceil(32));
    tiles.min(TILES) * TILE
}

/// Rows of a chunk and classes of a range of a backward: of what fits the workspace, where a row of a chunk takes
/// `row_bytes` beside its classes, the pair that leaves the fewest clusters idle and goes through its sums least often.
/// `chunk_steps` is what a chunk costs besides, in steps of the products. `None` where nothing fits.
pub(super) fn chunk_and_range(
    sizes: Sizes,
    all_rows: usize,
    row_bytes: usize,
    workspace: usize,
    chunk_steps: usize,
) -> Option<(usize, usize)> {
    const COLUMNS: usize = 2 * TILE;
    let (hidden, vocab, size) = (sizes.hidden, sizes.vocab, sizes.number);
    let clusters = sizes.clusters();
    let strips = hidden.div_ceil(STRIP);
    let rounds = |outputs: usize| outputs.div_ceil(clusters);
    // Steps of 128 x 192 products that a block goes through for a chunk and a range.
    let steps = |rows: usize, range: usize| {
        let tiles = rounds(rows.div_ceil(PANEL) * range / TILE) * hidden * 2 / 3;
        let embeddings = rounds(rows / TILE * strips) * (range + 2 * ROWS_A_CHUNK);
        let classifier = rounds(range / TILE * strips) * (rows + ROWS_A_CHUNK);
        tiles + embeddings + classifier + 3 * LAUNCH
    };
    // Beside the rows: of sums in several pieces, and of several chunks.
    let fixed = |rows: usize| {
        let between = match rows < all_rows {
            true => sizes.between_bytes(),
            false => 0,
        };
        sizes.partials_bytes(rows) + between
    };
    let panels = all_rows.div_ceil(PANEL);
    let step = panels.div_ceil(MOST_CHUNKS);
    let mut best = None;
    for rows in [panels].into_iter().chain((step..panels).step_by(step)) {
        let rows = (rows * PANEL).min(all_rows);
        let left = workspace.saturating_sub(fixed(rows) + rows * row_bytes);
        let most = (left / (rows * size)).min(longest_range(sizes, rows));
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
pub(super) fn averaging_steps(sizes: Sizes) -> usize {
    sizes.vocab * sizes.hidden / 8000
}
