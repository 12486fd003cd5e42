//! How a forward goes through the rows and classes.

use super::hopper::PANEL;
use super::{Path, Sizes, TILE};

/// Bytes of what a portable forward holds at once for the filter.
const STATISTICS_BYTES: usize = 16 << 20;
/// Bytes of embeddings that blocks of the portable kernels share in the L2 cache at the same time.
const PANEL_BYTES: usize = 18 << 20;
/// Blocks of a launch of the portable forward, per multiprocessor.
const WAVES: usize = 4;
/// Classes of a tile of the forward on compute capability 9.0.
const FORWARD_CLASSES: usize = 192;
/// What that holds for a group of rows, in bytes: where gradients will be wanted, and where not.
const TRAINING_BYTES: usize = 44 << 20;
pub(super) const EVALUATION_BYTES: usize = 15 << 20;

/// Groups of rows, and parts of the classes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups {
    /// Rows of a launch, a multiple of 128.
    pub rows: usize,
    /// Parts of the classes that a row's partial results come from.
    pub splits: usize,
    /// Hopper: tiles of a split.
    pub tiles_per_split: usize,
}

/// The groups of a forward of so many rows.
pub(crate) fn forward(path: Path, sizes: Sizes, all_rows: usize, filtering: bool) -> Groups {
    match path {
        Path::Portable => portable(sizes, all_rows, filtering),
        Path::Hopper => hopper(sizes, all_rows, filtering),
    }
}

/// Classes of a block of the portable forward.
fn portable_columns(number: usize) -> usize {
    match number {
        4 => 128,
        _ => 256,
    }
}

fn portable(sizes: Sizes, all_rows: usize, filtering: bool) -> Groups {
    let mut group_rows = PANEL_BYTES / (sizes.hidden * sizes.number);
    if filtering {
        group_rows =
            group_rows.min(STATISTICS_BYTES / (sizes.class_tiles() * sizes.statistics_bytes()));
    }
    let group_rows = (group_rows / TILE * TILE).clamp(TILE, all_rows);
    let tiles = sizes.vocab.div_ceil(portable_columns(sizes.number));
    Groups {
        rows: group_rows,
        splits: (WAVES * sizes.multiprocessors / (group_rows / TILE)).clamp(1, tiles),
        tiles_per_split: 0,
    }
}

/// The group of rows and the splits of the classes that leave the fewest clusters idle at the end of a launch.
fn hopper(sizes: Sizes, all_rows: usize, filtering: bool) -> Groups {
    let tiles = sizes.vocab.div_ceil(FORWARD_CLASSES);
    let clusters = sizes.clusters();
    let budget = if filtering {
        TRAINING_BYTES
    } else {
        EVALUATION_BYTES
    };
    let mut row_bytes = sizes.hidden * sizes.number;
    if filtering {
        row_bytes += sizes.class_tiles() * sizes.statistics_bytes();
    }
    let mut best = (
        f64::INFINITY,
        Groups {
            rows: PANEL,
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
                    Groups {
                        rows: group_rows,
                        splits,
                        tiles_per_split,
                    },
                );
            }
        }
    }
    best.1
}
