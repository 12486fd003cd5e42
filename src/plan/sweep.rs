//! How a backward goes through the rows and classes.

use super::hopper::{averaging_steps, chunk_and_range};
use super::{Path, Sizes, Workspace, TILE};
use crate::op::contract::Wanted;

/// Bytes of the workspace unless the user says otherwise.
const PORTABLE_WORKSPACE: usize = 256 << 20;
const HOPPER_WORKSPACE: usize = 448 << 20;

/// A pass over all classes for some rows, `range` classes at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sweep {
    pub path: Path,
    pub first_row: usize,
    pub rows: usize,
    pub range: usize,
    pub wanted: Wanted,
}

/// On Hopper chunk of rows by chunk. By the portable kernels, where those have no room, one sweep if the sums of dE
/// leave as much again for the gradient of the logits of a range; otherwise dE chunk of rows by chunk, then dC and
/// db, which computes the logits once more.
pub(crate) fn sweeps(
    path: Path,
    sizes: Sizes,
    rows: usize,
    wanted: Wanted,
    workspace: Workspace,
    averaging: bool,
) -> Vec<Sweep> {
    let all_rows = rows.next_multiple_of(TILE);
    let hopper = match path {
        Path::Portable => None,
        Path::Hopper => hopper(sizes, all_rows, wanted, workspace, averaging),
    };
    hopper.unwrap_or_else(|| portable(sizes, all_rows, wanted, workspace, averaging))
}

/// Bytes of a row of the sums of dE, in f32.
fn sum_bytes(sizes: Sizes, wanted: Wanted) -> usize {
    match wanted.embeddings {
        true => sizes.hidden * 4,
        false => 0,
    }
}

/// `None` where nothing fits.
fn hopper(
    sizes: Sizes,
    all_rows: usize,
    wanted: Wanted,
    workspace: Workspace,
    averaging: bool,
) -> Option<Vec<Sweep>> {
    // And of the gathered embeddings.
    let row_bytes = sum_bytes(sizes, wanted) + sizes.hidden * sizes.number;
    let workspace = workspace.or(HOPPER_WORKSPACE.max(2 * all_rows * row_bytes));
    let (fixed, a_row, chunk_steps) = match averaging {
        true => (
            sizes.averages_bytes(),
            sizes.averages_row_bytes(),
            averaging_steps(sizes),
        ),
        false => (0, 0, 0),
    };
    let left = workspace.saturating_sub(fixed);
    let (chunk, range) = chunk_and_range(sizes, all_rows, row_bytes + a_row, left, chunk_steps)?;
    let sweep = |first_row: usize| Sweep {
        path: Path::Hopper,
        first_row,
        rows: chunk.min(all_rows - first_row),
        range,
        wanted,
    };
    Some((0..all_rows).step_by(chunk).map(sweep).collect())
}

fn portable(
    sizes: Sizes,
    all_rows: usize,
    wanted: Wanted,
    workspace: Workspace,
    averaging: bool,
) -> Vec<Sweep> {
    let path = Path::Portable;
    let sums = |rows: usize| rows * sum_bytes(sizes, wanted);
    let workspace = workspace.or(PORTABLE_WORKSPACE.max(2 * sums(all_rows)));
    let averages = match averaging {
        true => sizes.averages_bytes() + all_rows * sizes.averages_row_bytes(),
        false => 0,
    };
    let workspace = workspace.saturating_sub(averages);
    // Whole blocks, and ranges of about the same length.
    let columns = 2 * TILE;
    let range = |bytes: usize, rows: usize| {
        let most = bytes / (rows * sizes.number) / columns * columns;
        let ranges = sizes.vocab.div_ceil(most.max(columns));
        sizes.vocab.div_ceil(ranges).next_multiple_of(columns)
    };
    if 2 * sums(all_rows) <= workspace {
        return vec![Sweep {
            path,
            first_row: 0,
            rows: all_rows,
            range: range(workspace - sums(all_rows), all_rows),
            wanted,
        }];
    }
    let chunk = workspace / (sizes.hidden * 4 + 8 * columns * sizes.number);
    let chunk = (chunk / TILE * TILE).clamp(TILE, all_rows);
    let mut sweeps = Vec::new();
    if wanted.embeddings {
        sweeps.extend((0..all_rows).step_by(chunk).map(|first_row| Sweep {
            path,
            first_row,
            rows: chunk.min(all_rows - first_row),
            range: range(workspace.saturating_sub(sums(chunk)), chunk),
            wanted: Wanted {
                classifier: false,
                bias: false,
                ..wanted
            },
        }));
    }
    if wanted.classifier || wanted.bias {
        sweeps.push(Sweep {
            path,
            first_row: 0,
            rows: all_rows,
            range: range(workspace, all_rows),
            wanted: Wanted {
                embeddings: false,
                ..wanted
            },
        });
    }
    sweeps
}
