//! The logits: lse, nll, and what the filter wants to know of them.

use super::call::{Call, Group};
use super::filter::{Filter, Filtered};
use super::launch::{Kernel, LOSS};
use super::params::loss::MergeParams;
use super::terms::Loss;
use super::{hopper, portable, shards};
use crate::plan::{forward, Path, TILE};
use crate::problem::Problem;
use candle_core::Result;

/// Of these rows, group by group. `count` is the address of how many rows there are, from row 0 on. Of a `sharded` problem,
/// over the classes of all ranks.
pub(super) fn logits(
    call: Call<'_>,
    path: Path,
    loss: Loss,
    count: u64,
    span: std::ops::Range<usize>,
    filter: Option<Filter>,
    sharded: Option<&Problem>,
) -> Result<Option<Filtered>> {
    let Call {
        gpu,
        operands,
        rows,
        statistics,
    } = call;
    let class_tiles = operands.class_tiles();
    let all_rows = span.len();
    let plan = forward(path, operands.sizes(), all_rows, filter.is_some());
    let (group_rows, splits) = (plan.rows, plan.splits);
    let partials = gpu.buffer(splits * group_rows * 8)?;
    let extra = match loss.more() {
        true => Some(gpu.buffer(splits * group_rows * 8)?),
        false => None,
    };
    let extra = extra.as_ref().map_or(0, |extra| extra.address);
    let groups = span.clone().step_by(group_rows);
    // A shard knows what to keep only after the last group: each has statistics of its own.
    let group_bytes = class_tiles * group_rows * operands.sizes().statistics_bytes();
    let (stored, apart) = match sharded {
        None => (1, 0),
        Some(_) => (groups.len(), group_bytes),
    };
    let filtering = match filter {
        None => None,
        Some(filter) => Some((
            gpu.buffer(stored * group_bytes)?,
            Filtered::new(gpu, operands, all_rows, filter)?,
        )),
    };
    let gathered = match path {
        Path::Portable => None,
        Path::Hopper => Some(gpu.buffer(group_rows * operands.hidden * operands.kind.size)?),
    };
    let of_tiles = |first_row: usize| match &filtering {
        None => 0,
        Some((of_tiles, _)) => {
            of_tiles.address + ((first_row - span.start) / group_rows * apart) as u64
        }
    };
    // The last group may reach beyond the rows there can be.
    let row_tiles = |first_row: usize| (group_rows / TILE).min((span.end - first_row) / TILE);
    let decide = |first_row: usize| match &filtering {
        None => Ok(()),
        Some((_, filtered)) => {
            let group = (first_row, group_rows, row_tiles(first_row));
            let of_tiles = of_tiles(first_row);
            filtered.decide(call, count, of_tiles, group)
        }
    };
    for first_row in groups.clone() {
        let group = Group {
            first_row,
            partials: partials.address,
            extra,
            target_logit: statistics.target_logit.address,
            statistics: of_tiles(first_row),
        };
        match &gathered {
            None => portable::forward(gpu, operands, rows, plan, group)?,
            Some(gathered) => {
                rows.gather(gpu, operands, first_row, group_rows, gathered)?;
                hopper::forward(call, plan, group, count, gathered)?;
            }
        }
        let params = MergeParams {
            partials: partials.address,
            target_logit: statistics.target_logit.address,
            row_position: rows.position.address,
            row_target: rows.target.address,
            count,
            row_max: statistics.row_max.address,
            row_log_sum: statistics.row_log_sum.address,
            packed: loss.packed,
            extra,
            row_entropy: statistics
                .row_entropy
                .as_ref()
                .map_or(0, |entropy| entropy.address),
            entropy: loss.entropy,
            predicted: loss.predicted,
            terms: loss.terms,
            first_row: first_row as u32,
            group_rows: group_rows as u32,
            splits: splits as u32,
            positions: rows.positions as u32,
            sharded: u32::from(sharded.is_some()),
        };
        gpu.launch(
            &Kernel::new(
                LOSS,
                "merge_partials",
                (row_tiles(first_row), 1),
                TILE as u32,
            ),
            &params,
        )?;
        if sharded.is_none() {
            decide(first_row)?;
        }
    }
    if let Some(problem) = sharded {
        shards::merge(gpu, problem, rows, statistics, loss)?;
        groups.clone().try_for_each(decide)?;
    }
    Ok(filtering.map(|(_, filtered)| filtered))
}
