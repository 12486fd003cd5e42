//! How a backward goes through the rows and classes, within how much workspace.

use super::averages::Averages;
use super::launch::is_out_of_memory;
use super::{hopper, portable, Operands, Path, Results, TILE};
use candle_core::Result;

/// Bytes of workspace: as many as the user said, or half of the usual as often as the device had no room.
#[derive(Debug, Clone, Copy)]
pub(super) struct Workspace {
    given: Option<usize>,
    halvings: u32,
}

impl Workspace {
    /// `usual` where none is given.
    pub fn or(self, usual: usize) -> usize {
        self.given.unwrap_or(usual >> self.halvings)
    }
}

/// Calls `with` with the workspace that is given or, where none is, with the usual one and then with ever more halvings of
/// it until the device has the room. It must not rely on what a call that failed has left.
pub(super) fn with_room<R>(
    given: Option<usize>,
    mut with: impl FnMut(Workspace) -> Result<R>,
) -> Result<R> {
    const MOST: u32 = 6;
    for halvings in 0..MOST {
        match with(Workspace { given, halvings }) {
            Err(error) if given.is_none() && is_out_of_memory(&error) => continue,
            result => return result,
        }
    }
    with(Workspace {
        given,
        halvings: MOST,
    })
}

/// A pass over all classes for some rows, `range` classes at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sweep {
    pub path: Path,
    pub first_row: usize,
    pub rows: usize,
    pub range: usize,
    pub results: Results,
}

impl Sweep {
    /// On Hopper chunk of rows by chunk. By the portable kernels, where those have no room, one sweep if the sums of dE
    /// leave as much again for the gradient of the logits of a range; otherwise dE chunk of rows by chunk, then dC and
    /// db, which computes the logits once more.
    pub fn plan(
        path: Path,
        multiprocessors: usize,
        n: usize,
        operands: Operands,
        results: Results,
        workspace: Workspace,
        averaging: bool,
    ) -> Vec<Self> {
        let all_rows = n.next_multiple_of(TILE);
        let (hidden, vocab, size) = (operands.hidden, operands.vocab, operands.kind.size);
        // A row of the sums of dE, in f32.
        let sum_bytes = match results.embeddings {
            0 => 0,
            _ => hidden * 4,
        };
        if path == Path::Hopper {
            // And of the gathered embeddings.
            let row_bytes = sum_bytes + hidden * size;
            let workspace = workspace.or(hopper::WORKSPACE.max(2 * all_rows * row_bytes));
            let (fixed, a_row, chunk_steps) = match averaging {
                true => (
                    Averages::fixed_bytes(operands),
                    Averages::row_bytes(operands),
                    hopper::averaging_steps(operands),
                ),
                false => (0, 0, 0),
            };
            let plan = hopper::chunk_and_range(
                operands,
                all_rows,
                multiprocessors,
                row_bytes + a_row,
                workspace.saturating_sub(fixed),
                chunk_steps,
            );
            if let Some((chunk, range)) = plan {
                let sweep = |first_row: usize| Self {
                    path,
                    first_row,
                    rows: chunk.min(all_rows - first_row),
                    range,
                    results,
                };
                return (0..all_rows).step_by(chunk).map(sweep).collect();
            }
        }
        let path = Path::Portable;
        let sums = |rows: usize| rows * sum_bytes;
        let workspace = workspace.or(portable::WORKSPACE.max(2 * sums(all_rows)));
        let averages = match averaging {
            true => Averages::fixed_bytes(operands) + all_rows * Averages::row_bytes(operands),
            false => 0,
        };
        let workspace = workspace.saturating_sub(averages);
        // Whole blocks, and ranges of about the same length.
        let columns = 2 * TILE;
        let range = |bytes: usize, rows: usize| {
            let most = bytes / (rows * size) / columns * columns;
            let ranges = vocab.div_ceil(most.max(columns));
            vocab.div_ceil(ranges).next_multiple_of(columns)
        };
        if 2 * sums(all_rows) <= workspace {
            return vec![Self {
                path,
                first_row: 0,
                rows: all_rows,
                range: range(workspace - sums(all_rows), all_rows),
                results,
            }];
        }
        let chunk = workspace / (hidden * 4 + 8 * columns * size);
        let chunk = (chunk / TILE * TILE).clamp(TILE, all_rows);
        let mut sweeps = Vec::new();
        if results.embeddings != 0 {
            sweeps.extend((0..all_rows).step_by(chunk).map(|first_row| Self {
                path,
                first_row,
                rows: chunk.min(all_rows - first_row),
                range: range(workspace.saturating_sub(sums(chunk)), chunk),
                results: Results {
                    classifier: 0,
                    bias: 0,
                    ..results
                },
            }));
        }
        if results.classifier != 0 || results.bias != 0 {
            sweeps.push(Self {
                path,
                first_row: 0,
                rows: all_rows,
                range: range(workspace, all_rows),
                results: Results {
                    embeddings: 0,
                    ..results
                },
            });
        }
        sweeps
    }
}
