//! How the workspace is spent.

use super::element::Element;
use super::kept::thresholds;
use super::statistics::{gathered_rows, LEAST_ROWS, TILE};
use crate::native::rows::HostRows;
use crate::native::workspace::workspace;
use crate::op::contract::Wanted;
use crate::problem::Settings;
use crate::{Entropy, Reduction, Strategy};

/// Rows of a block from which on forming the gradients in the forward is faster: with fewer, every
/// block reads and writes a gradient of the classifier that its product does not pay for.
const WORTH_FUSING: usize = 128;
/// Rows of a block that a tile is multiplied with in one go where the logits are computed again.
const RECOMPUTE_ROWS: usize = 512;
/// What `gemm` allocates on a thread beyond its operands: packed blocks of both.
const PACKING: usize = 5 << 18;

/// Columns of the embeddings, and of what is trained of the classifier: an adapter has fewer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns {
    pub hidden: usize,
    pub trained: usize,
}

/// The sizes of blocks such that everything beyond inputs and gradients fits the workspace. At the
/// least a block is [`LEAST_ROWS`] rows by a tile, however small the workspace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Threads that work at once: each has memory of its own.
    pub lanes: usize,
    /// Those of the filter; `None` where all is exact, be it that what averaging has to know of every row and tile is
    /// too much for the workspace.
    pub thresholds: Option<(f64, f64)>,
    /// Rows of a block whose logits of all classes fit; `None` where the backward recomputes them.
    pub fused_rows: Option<usize>,
    /// Rows of a block elsewhere.
    pub rows: usize,
    /// Tiles of a block there.
    pub tiles: usize,
    /// The sums of all gradients fit while the logits are computed again once.
    pub one_sweep: bool,
}

impl Plan {
    pub fn new<T: Element>(
        rows: &HostRows,
        vocab: usize,
        Columns { hidden, trained }: Columns,
        bias: bool,
        settings: &Settings,
        wanted: Wanted,
    ) -> Self {
        let real = size_of::<T::Real>();
        let workspace = workspace(settings);
        let n = rows.len().max(1);
        let all_tiles = vocab.div_ceil(TILE);
        let direct = T::REAL && rows.all;
        let when = |condition: bool, bytes: usize| if condition { bytes } else { 0 };
        let thresholds = thresholds(settings);
        // A lane widens a tile of the classifier, or puts an adapter's columns beside it, and gathers rows where a filter
        // leaves some out.
        let lane = PACKING
            + when(!T::REAL || trained < hidden, TILE * hidden * real)
            + when(
                thresholds.is_some(),
                gathered_rows(hidden) * (hidden + TILE) * real,
            );
        let lanes = (workspace / 2 / lane).clamp(1, rayon::current_num_threads());
        // Masses of all rows and tiles, and of each tile its shares and its mean.
        let averages = (n * all_tiles + vocab + all_tiles * (hidden + 1)) * real;
        let room = workspace.saturating_sub(lanes * lane) / 4 * 3;
        let thresholds = thresholds.filter(|_| settings.drop_filtered || averages <= room);
        let averages = when(!settings.drop_filtered, averages);
        // The sum of the rows that average a tile.
        let by_mass = when(thresholds.is_some(), (hidden + 1) * real);
        let fixed = lanes * lane
            + when(
                thresholds.is_some(),
                n * all_tiles + averages,
            )
            + when(bias, vocab * real)
            + when(wanted.bias && !T::REAL, vocab * real)
            // Lists of rows, their scales, softmax and losses.
            + n * (12 + 7 * real + 40);
        let left = workspace.saturating_sub(fixed);
        // A row has a copy where it is gathered or widened, and so has its gradient.
        let row = when(!direct, hidden * real);
        let asked = settings.entropy != Entropy::Off || settings.predicted;
        let statistics = all_tiles * (3 * real + when(asked, real + 4));

        let fused_row = all_tiles * TILE * real + statistics + 2 * row;
        let sums = when(!T::REAL && wanted.classifier, vocab * trained * real);
        let fits = left.saturating_sub(sums + all_tiles * by_mass) / fused_row;
        let least = match settings.strategy {
            Strategy::Recompute => usize::MAX,
            Strategy::Fused => LEAST_ROWS.min(n),
            // A loss scale, without which f16 is seldom trained, makes what was formed useless.
            Strategy::Auto if !T::SCALES_EXACTLY => usize::MAX,
            // Who asks for a gradient through the entropy has an upstream gradient that is not of the loss alone.
            Strategy::Auto if settings.entropy == Entropy::Differentiable => usize::MAX,
            Strategy::Auto => WORTH_FUSING.min(n),
        };
        let fused = wanted.any() && settings.reduction != Reduction::None && fits >= least;
        let fused_rows = fused.then(|| even(n, fits));

        // In the forward every lane has a tile of logits.
        let forward_row = lanes * TILE * real + statistics + row;
        let fits = (left / forward_row).min(RECOMPUTE_ROWS);
        let block_rows = even(n, fits);
        let all_sums = when(!direct && wanted.embeddings, n * hidden * real);
        let one_sweep = all_sums <= left / 2;
        let left = left
            .saturating_sub(block_rows * 2 * row)
            .saturating_sub(when(one_sweep, all_sums));
        let tile = block_rows * (TILE + 1) * real
            + by_mass
            + when(!T::REAL && wanted.classifier, TILE * trained * real);
        Self {
            lanes,
            thresholds,
            fused_rows,
            rows: block_rows,
            tiles: (left / tile).clamp(1, all_tiles),
            one_sweep,
        }
    }
}

/// Rows of blocks of about equal size, at most `most` each, or the least there may be.
fn even(rows: usize, most: usize) -> usize {
    let most = (most / LEAST_ROWS * LEAST_ROWS).max(LEAST_ROWS);
    rows.div_ceil(rows.div_ceil(most))
        .next_multiple_of(LEAST_ROWS)
        .min(rows)
}
