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
/// `products_sm90a.cuh` asserts.
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

/// Strips of whole width: all but the last one or two, where two thirds of a width each are enough for the columns left.
pub(crate) fn wide_strips(hidden: usize) -> usize {
    const NARROW: usize = STRIP / 3 * 2;
    let strips = hidden.div_ceil(STRIP);
    let columns = |narrow: usize| (strips - narrow) * STRIP + narrow * NARROW;
    let narrow = (1..=strips.min(2)).take_while(|&narrow| columns(narrow) >= hidden);
    strips - narrow.count()
}

/// Whether two strips are narrow: then outputs are dealt out by their widths. Where an adapter's columns are among them,
/// at most the last strip is.
pub(crate) fn mixed_strips(sizes: Sizes) -> bool {
    sizes.rank == 0 && sizes.hidden.div_ceil(STRIP) - wide_strips(sizes.hidden) == 2
}

/// dE's work where so many row tiles are dealt out to clusters: that of the one with the most, in row tiles of all columns.
pub(super) fn most_work(sizes: Sizes, row_tiles: usize) -> f64 {
    let (strips, clusters) = (sizes.hidden.div_ceil(STRIP), sizes.clusters());
    let all = row_tiles * strips;
    if !mixed_strips(sizes) {
        return all.div_ceil(clusters) as f64 / strips as f64;
    }
    // Round by round, forwards and backwards in turn; outputs of whole strips, of three thirds, before narrow ones, of two.
    let share = |outputs: usize, cluster: usize| {
        let (rounds, rest) = (outputs / clusters, outputs % clusters);
        let at = match rounds % 2 {
            0 => cluster,
            _ => clusters - 1 - cluster,
        };
        rounds + usize::from(at < rest)
    };
    let wide = wide_strips(sizes.hidden);
    let thirds = |cluster| share(row_tiles * wide, cluster) + 2 * share(all, cluster);
    let most = (0..clusters).map(thirds).max().unwrap_or(0);
    most as f64 / (wide + 2 * strips) as f64
}

/// As many rows as all clusters together go through in dE's product while the one with the most work goes through these.
pub(super) fn rows_as_dealt(sizes: Sizes, rows: usize) -> f64 {
    most_work(sizes, rows / TILE) * (sizes.clusters() * TILE) as f64
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
