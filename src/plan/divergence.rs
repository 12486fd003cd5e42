//! The chunks of rows of a divergence from a whole teacher.

use super::fused::{best_chunk, gradient_stride, most_rows};
use super::hopper::{longest_range, rows_as_dealt};
use super::{Sizes, Workspace, TILE};

/// Bytes of the workspace unless the user says otherwise.
const WORKSPACE: usize = 5 << 29;
/// Rows whose logits of both heads are there at once, at most.
const MOST_ROWS: usize = 512;

/// A head, and whether a gradient of it is wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Side {
    pub sizes: Sizes,
    pub wanted: bool,
}

/// How many rows go through the products of gradients at a time, and how many of these have logits at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rounds {
    pub chunk: usize,
    pub block: usize,
}

/// `None` where the workspace is too small.
pub(crate) fn divergence(sides: [Side; 2], rows: usize, workspace: Workspace) -> Option<Rounds> {
    let all_rows = rows.next_multiple_of(TILE);
    let of_row = |side: Side| {
        let Sizes { hidden, number, .. } = side.sizes;
        // The gathered row, and its gradients: of the logits, and the sums of dE.
        hidden * number
            + match side.wanted {
                true => gradient_stride(side.sizes) * number + hidden * 4,
                false => 0,
            }
    };
    let of_logits = |side: Side| gradient_stride(side.sizes) * 4 + side.sizes.class_tiles() * 8;
    let row_bytes: usize = sides.into_iter().map(of_row).sum();
    let block_bytes: usize = sides.into_iter().map(of_logits).sum();
    let wanted = || sides.into_iter().filter(|side| side.wanted);
    let Some(first) = wanted().next() else {
        // A block is a chunk of its own.
        let most = workspace.or(WORKSPACE) / (row_bytes + block_bytes) / TILE * TILE;
        let block = most.min(MOST_ROWS).min(all_rows);
        return (block > 0).then_some(Rounds {
            chunk: block,
            block,
        });
    };
    let between: usize = wanted().map(|side| side.sizes.between_bytes()).sum();
    let budget = workspace.or(WORKSPACE);
    for block in (TILE..=MOST_ROWS.min(all_rows)).rev().step_by(TILE) {
        let left = budget.saturating_sub(block * block_bytes);
        let most = most_rows(first.sizes, all_rows, row_bytes, left, between);
        // More logits at once are worth less than a chunk of their rows.
        let least = match block {
            TILE => TILE,
            _ => (2 * block).min(all_rows),
        };
        if most < least {
            continue;
        }
        let chunk = best_chunk(all_rows, least..=most, |chunk| {
            rows_as_dealt(first.sizes, chunk)
        });
        if wanted().all(|side| longest_range(side.sizes, chunk) > 0) {
            return Some(Rounds { chunk, block });
        }
    }
    None
}
