//! Which tiles of the gradient of the logits the filter keeps.

use super::call::Call;
use super::launch::{Buffer, Gpu, Kernel, FILTER};
use super::operands::Operands;
use super::params::filter::{CountParams, FilterParams};
use crate::op::contract::Wanted;
use crate::plan::TILE;
use crate::problem::Settings;
use candle_core::{DType, Result, Tensor};

/// Class tiles of a block of `filter_tiles`.
const FILTER_TILES: usize = 32;

/// What the filter is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filter {
    /// What the gradient of the embeddings and that of the classifier must reach to keep a tile.
    pub thresholds: [f32; 2],
    /// Tiles that are not kept are dropped, not averaged.
    pub drop: bool,
}

impl Filter {
    /// What the gradients that are wanted ask of the filter; `None` if neither is filtered.
    pub fn of(settings: &Settings, wanted: Wanted) -> Option<Self> {
        let classifier = wanted.classifier || wanted.bias;
        // A gradient that is not wanted must not keep a tile: its threshold is above every gradient.
        let threshold = |filter: Option<f64>, wanted: bool| match (wanted, filter) {
            (false, _) => f32::INFINITY,
            (true, Some(eps)) => eps as f32,
            (true, None) => -1.,
        };
        let thresholds = [
            threshold(settings.filter_embeddings, wanted.embeddings),
            threshold(settings.filter_classifier, classifier),
        ];
        let filters = thresholds.iter().any(|t| (0. ..=1.).contains(t));
        filters.then_some(Filter {
            thresholds,
            drop: settings.drop_filtered,
        })
    }

    /// Whether both gradients keep the same tiles, or only one is wanted.
    pub fn is_uniform(self) -> bool {
        let [embeddings, classifier] = self.thresholds;
        embeddings == classifier || embeddings > 1. || classifier > 1.
    }
}

/// What the filter found.
pub(super) struct Filtered {
    pub filter: Filter,
    /// `(row tiles, class tiles)`
    pub keep: Buffer,
    /// `(rows, stride)` in the inputs' dtype, of all rows; none where tiles are dropped.
    pub masses: Option<Buffer>,
}

impl Filtered {
    pub fn new(gpu: &Gpu, operands: Operands, rows: usize, filter: Filter) -> Result<Self> {
        let masses = rows * operands.mass_stride() * operands.kind.size;
        Ok(Self {
            filter,
            keep: gpu.buffer(rows / TILE * operands.class_tiles())?,
            masses: match filter.drop {
                true => None,
                false => Some(gpu.buffer(masses)?),
            },
        })
    }

    /// Decides which tiles of a group of rows are kept, from what the forward left of them.
    /// `group`: its first row, the rows of a group, the row tiles of this one.
    pub fn decide(
        &self,
        call: Call<'_>,
        count: u64,
        of_tiles: u64,
        group: (usize, usize, usize),
    ) -> Result<()> {
        let Call {
            gpu,
            operands,
            rows,
            statistics,
        } = call;
        let (first_row, group_rows, row_tiles) = group;
        let params = FilterParams {
            statistics: of_tiles,
            row_max: statistics.row_max.address,
            row_log_sum: statistics.row_log_sum.address,
            row_target: rows.target.address,
            count,
            keep: self.keep.address,
            masses: self.masses.as_ref().map_or(0, |masses| masses.address),
            first_row: first_row as u32,
            group_rows: group_rows as u32,
            class_tiles: operands.class_tiles() as u32,
            mass_stride: operands.mass_stride() as u32,
            embeddings_threshold: self.filter.thresholds[0],
            classifier_threshold: self.filter.thresholds[1],
            keep_targets: self.filter.drop.into(),
        };
        let grid = (filter_blocks(operands), row_tiles);
        let name = operands.kind.kernel("filter_tiles");
        gpu.launch(&Kernel::new(FILTER, name, grid, TILE as u32), &params)
    }
}

/// Blocks along the classes of a kernel that filters.
pub(super) fn filter_blocks(operands: Operands) -> usize {
    operands.mass_stride() / FILTER_TILES
}

/// Tiles that a table keeps (0: all of them), and tiles there are.
pub(super) fn count_kept(call: Call<'_>, keep: u64) -> Result<Tensor> {
    let Call {
        gpu,
        operands,
        rows,
        ..
    } = call;
    let kept = gpu.unfinished(DType::F32, 2, false)?;
    let params = CountParams {
        keep,
        count: rows.count.address,
        kept: kept.address,
        class_tiles: operands.class_tiles() as u32,
    };
    gpu.launch(&Kernel::one_block(FILTER, "count_kept"), &params)?;
    Ok(kept.finish(gpu))
}
