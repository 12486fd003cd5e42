//! The logits of all classes of a group of rows, down to what lse and the filter need of them.

use super::{adapter_column, classifier_maps, clusters, THREADS};
use crate::cuda::call::{Call, Group};
use crate::cuda::launch::{Buffer, Kernel, FORWARD_OUTPUTS_SM90A, FORWARD_SM90A};
use crate::cuda::operands::Operands;
use crate::cuda::params::forward_sm90a::ForwardParams;
use crate::cuda::tensor_map::TensorMap;
use crate::plan::{Groups, PANEL};
use candle_core::Result;

/// Shared memory, as `cuda/forward_sm90a.cuh` asserts.
const SHARED_BYTES: usize = 207_872;
/// Classes of a tile.
const CLASSES: usize = 192;
/// Panels that walk the classes together, so that both operands come from the L2 cache.
const RASTER: usize = 8;

pub(in crate::cuda) fn forward(
    call: Call<'_>,
    plan: Groups,
    group: Group,
    count: u64,
    gathered: &Buffer,
) -> Result<()> {
    let Call {
        gpu,
        operands,
        rows,
        ..
    } = call;
    let Operands {
        hidden,
        vocab,
        kind,
        ..
    } = operands;
    // Row arrays begin at the group's first row.
    let offset = group.first_row as u64 * 4;
    let pace = gpu.zeros(4)?;
    let params = ForwardParams {
        count,
        row_target: rows.target.address + offset,
        bias: operands.bias,
        partials: group.partials,
        extra: group.extra,
        target_logit: group.target_logit + offset,
        pace: pace.address,
        statistics: group.statistics,
        first_row: group.first_row as u32,
        rows: plan.rows as u32,
        vocab: vocab as u32,
        hidden: hidden as u32,
        adapter_column: adapter_column(operands),
        splits: plan.splits as u32,
        tiles_per_split: plan.tiles_per_split as u32,
        raster: RASTER as u32,
        softcap: operands.softcap,
        logit_scale: operands.logit_scale,
    };
    let embeddings = TensorMap::new(
        gathered.address,
        kind.dtype,
        (plan.rows, hidden),
        hidden,
        64,
    )?;
    // Each block of a cluster copies half of a tile of classes.
    let [classifier, adapter] = classifier_maps(operands, CLASSES / 2)?;
    let (module, name) = match (group.statistics, group.extra) {
        (0, 0) => (FORWARD_SM90A, "forward_sm90a"),
        (_, 0) => (FORWARD_SM90A, "forward_statistics_sm90a"),
        (0, _) => (FORWARD_OUTPUTS_SM90A, "forward_outputs_sm90a"),
        _ => (FORWARD_OUTPUTS_SM90A, "forward_statistics_outputs_sm90a"),
    };
    let items = plan.rows.div_ceil(PANEL) * plan.splits.div_ceil(2);
    let kernel = Kernel {
        module,
        name: kind.kernel(name),
        grid: (clusters(gpu)?.min(items) * 2, 1),
        threads: THREADS,
        shared_bytes: SHARED_BYTES,
    };
    gpu.launch_on_maps(&kernel, [&embeddings, &classifier, &adapter], &params)
}
