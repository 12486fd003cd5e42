//! The chunks of rows whose gradients the forward forms.

use super::forward::EVALUATION_BYTES;
use super::hopper::{longest_range, rows_as_dealt, PIECE_ROWS, ROWS_A_CHUNK};
use super::sharing::shares_outputs;
use super::{Sizes, Workspace, TILE};

/// Bytes of the workspace unless the user says otherwise.
const WORKSPACE: usize = 3 << 29;
/// Rows of a chunk below which the logits are computed twice instead, unless the user asks for fused gradients.
const LEAST_ROWS: usize = 1024;
/// Bytes of what entropy and the likeliest class need of a row in a tile.
pub(crate) const OUTPUTS_BYTES: usize = 12;

/// How many rows go through at a time, and how many classes of them through a launch of the products.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunks {
    pub rows: usize,
    pub range: usize,
}

/// How the forward is to form gradients.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Forming {
    pub averaging: bool,
    /// The user wants them formed in the forward.
    pub asked: bool,
    /// Entropy or the likeliest classes are wanted too.
    pub outputs: bool,
}

/// Classes from one row of the workspace to the next.
pub(crate) fn gradient_stride(sizes: Sizes) -> usize {
    sizes.vocab.next_multiple_of(2 * TILE)
}

/// `None` where the gradients are better computed in the backward.
pub(crate) fn fused(
    sizes: Sizes,
    rows: usize,
    forming: Forming,
    workspace: Workspace,
) -> Option<Chunks> {
    let Forming {
        averaging,
        asked,
        outputs,
    } = forming;
    let all_rows = rows.next_multiple_of(TILE);
    let of_capped = if sizes.softcap { 4 } else { 0 };
    let of_outputs = if outputs { OUTPUTS_BYTES } else { 0 };
    let of_tiles = sizes.class_tiles() * (4 + 4 + of_capped + of_outputs);
    let of_masses = if averaging {
        sizes.mass_stride() * 2
    } else {
        0
    };
    let row_bytes =
        gradient_stride(sizes) * 2 + of_tiles + of_masses + sizes.hidden * (sizes.number + 4);
    let least = if asked {
        TILE
    } else {
        LEAST_ROWS.min(all_rows)
    };
    let mut budget = workspace.or(WORKSPACE);
    if averaging {
        budget = budget.saturating_sub(sizes.averages_bytes());
    }
    let budget = budget.saturating_sub(EVALUATION_BYTES);
    let most = most_rows(sizes, all_rows, row_bytes, budget, sizes.between_bytes());
    if most < least {
        return None;
    }
    let work = |chunk: usize| match !averaging && shares_outputs(sizes, chunk, sizes.vocab) {
        true => chunk as f64,
        false => rows_as_dealt(sizes, chunk),
    };
    let rows = best_chunk(all_rows, least..=most, work);
    let range = longest_range(sizes, rows);
    (range > 0).then_some(Chunks { rows, range })
}

/// The rows of a chunk that there is room for, where several chunks need so many bytes between them.
pub(super) fn most_rows(
    sizes: Sizes,
    all_rows: usize,
    row_bytes: usize,
    budget: usize,
    between_bytes: usize,
) -> usize {
    let most = |fixed: usize| budget.saturating_sub(fixed) / row_bytes / TILE * TILE;
    if most(sizes.partials_bytes(all_rows)) >= all_rows {
        return all_rows;
    }
    match most(between_bytes) {
        rows if rows > PIECE_ROWS => {
            most(between_bytes + sizes.partials_bytes(rows)).max(PIECE_ROWS)
        }
        rows => rows,
    }
}

/// The rows of a chunk that leave the fewest clusters idle in the product for dE, which takes as long as `work` rows of each
/// cluster do, and read dC least often.
pub(super) fn best_chunk(
    all_rows: usize,
    rows: std::ops::RangeInclusive<usize>,
    work: impl Fn(usize) -> f64,
) -> usize {
    let cost = |chunk: usize| {
        let chunks = all_rows.div_ceil(chunk);
        chunks as f64 * (work(chunk) + ROWS_A_CHUNK as f64)
    };
    let fewest = *rows.start();
    rows.step_by(TILE)
        .min_by(|&a, &b| cost(a).total_cmp(&cost(b)))
        .unwrap_or(fewest)
}
