//! The statistics of rows over the classes of all ranks, where this one has a shard of them.

use super::call::Statistics;
use super::launch::{Gpu, Kernel, LOSS};
use super::params::loss::ShardParams;
use super::rows::Rows;
use super::terms::Loss;
use crate::problem::Problem;
use candle_core::{DType, Result};

const THREADS: usize = 256;

/// Puts losses, lse and statistics over all ranks' classes in the place of those over this rank's.
pub(super) fn merge(
    gpu: &Gpu,
    problem: &Problem,
    rows: &Rows,
    statistics: &Statistics,
    loss: Loss,
) -> Result<()> {
    let Some(shard) = &problem.settings.vocab_parallel else {
        return Ok(());
    };
    let n = rows.positions;
    let params = ShardParams {
        row_max: statistics.row_max.address,
        row_log_sum: statistics.row_log_sum.address,
        target_logit: statistics.target_logit.address,
        row_position: rows.position.address,
        row_target: rows.target.address,
        count: rows.count.address,
        packed: loss.packed,
        terms: loss.terms,
        positions: n as u32,
        ..Default::default()
    };
    let launch = |name: &str, params: ShardParams| {
        let grid = (n.div_ceil(THREADS), 1);
        gpu.launch(&Kernel::new(LOSS, name, grid, THREADS as u32), &params)
    };

    let maxima = gpu.unfinished(DType::F32, n, false)?;
    launch(
        "shard_maxima",
        ShardParams {
            here: maxima.address,
            ..params
        },
    )?;
    let (max, all) = shard.maxima_and_sums(maxima.finish(gpu), |max| {
        let sums = gpu.unfinished(DType::F32, (3, n), false)?;
        gpu.read(max, |max| {
            launch(
                "shard_sums",
                ShardParams {
                    max,
                    here: sums.address,
                    ..params
                },
            )
        })?;
        Ok(sums.finish(gpu))
    })?;

    gpu.read(&max, |max| {
        gpu.read(&all, |all| {
            launch("merge_shards", ShardParams { max, all, ..params })
        })
    })?;
    if problem.settings.check_targets {
        // Waits for the device.
        problem.check_shards(&all.get(2)?)?;
    }
    Ok(())
}
