//! `cuda/attention_sm90a_{bf16,f16}.cu`: half precision, heads of at most 128 dimensions, compute capability 9.0.

use super::call::{Call, Pass};
use crate::cuda::launch::{Array, Kernel, Module, ATTENTION_SM90A_BF16, ATTENTION_SM90A_F16};
use crate::cuda::ops::kernel;
use crate::cuda::params::attention_problem::{AttentionParams, StrideParams};
use crate::cuda::tensor_map::TensorMap;
use candle_core::{DType, Result};

const MOST: u32 = 128;
/// What rows of statistics are rounded up to.
const STATISTICS_ROWS: usize = 128;
const STATISTICS_THREADS: usize = 256;

pub(super) fn can_run(call: &Call) -> Result<bool> {
    let half = matches!(call.kind.dtype, DType::BF16 | DType::F16);
    Ok(half && call.params.head_dim <= MOST && call.gpu.compute_capability()? == (9, 0))
}

pub(super) fn forward(call: &Call, params: &AttentionParams) -> Result<()> {
    let [q, k, v] = maps(call, params)?;
    let kernel = of_pass(call, Pass::Forward, params)?;
    call.gpu.launch_on_maps(&kernel, [&q, &k, &v], params)
}

pub(super) fn backward(call: &Call, params: &AttentionParams) -> Result<()> {
    let &AttentionParams {
        batch,
        queries,
        heads,
        head_dim,
        ..
    } = params;
    let rows = (queries as usize).next_multiple_of(STATISTICS_ROWS) * (batch * heads) as usize;
    let log2_lse: Array<f32> = call.gpu.array(rows)?;
    let delta: Array<f32> = call.gpu.array(rows)?;
    let params = AttentionParams {
        log2_lse: log2_lse.address,
        delta: delta.address,
        ..*params
    };
    let size = size(&params);
    let blocks = (rows * (size / 8)).div_ceil(STATISTICS_THREADS);
    let statistics = kernel(
        module(call),
        name(call, "statistics", size),
        (blocks, 1),
        STATISTICS_THREADS as u32,
        0,
    );
    call.gpu.launch(&statistics, &params)?;

    let [q, k, v] = maps(call, &params)?;
    let of_time = heads as i64 * head_dim as i64;
    let out_grad = TensorMap::of_heads(
        params.out_grad,
        call.kind.dtype,
        [batch, queries, heads, head_dim],
        [queries as i64 * of_time, of_time, head_dim.into()],
    )?;
    for pass in [Pass::Keys, Pass::Queries] {
        let kernel = of_pass(call, pass, &params)?;
        call.gpu
            .launch_on_maps(&kernel, [&q, &k, &v, &out_grad], &params)?;
    }
    Ok(())
}

fn maps(call: &Call, params: &AttentionParams) -> Result<[TensorMap; 3]> {
    let &AttentionParams {
        batch,
        queries,
        keys,
        heads,
        group,
        head_dim,
        ..
    } = params;
    let map = |address, time, heads, strides: StrideParams| {
        let shape = [batch, time, heads, head_dim];
        let strides = [strides.batch, strides.time, strides.head];
        TensorMap::of_heads(address, call.kind.dtype, shape, strides)
    };
    Ok([
        map(params.q, queries, heads, params.q_strides)?,
        map(params.k, keys, heads / group, params.k_strides)?,
        map(params.v, keys, heads / group, params.v_strides)?,
    ])
}

fn module(call: &Call) -> Module {
    match call.kind.dtype {
        DType::F16 => ATTENTION_SM90A_F16,
        _ => ATTENTION_SM90A_BF16,
    }
}

fn name(call: &Call, name: &str, size: usize) -> String {
    call.kind.kernel(&format!("attention_sm90a_{name}_{size}"))
}

/// Dimensions that the kernels take a head for.
fn size(params: &AttentionParams) -> usize {
    match params.head_dim {
        ..=64 => 64,
        _ => 128,
    }
}

/// A kernel whose blocks, one a multiprocessor, share out the tiles.
fn of_pass(call: &Call, pass: Pass, params: &AttentionParams) -> Result<Kernel> {
    let size = size(params);
    // Groups of 64 rows, and the shared memory that each file asserts.
    let (groups, shared_bytes) = match (pass, size) {
        (Pass::Forward, 64) => (3, 93_184),
        (Pass::Forward, _) => (2, 166_912),
        (Pass::Keys, 64) => (2, 169_984),
        (Pass::Keys, _) => (2, 202_752),
        (Pass::Queries, 64) => (2, 100_352),
        (Pass::Queries, _) => (2, 198_656),
    };
    let tiles = pass.tiles(params, 64 * groups);
    Ok(Kernel {
        module: module(call),
        name: name(call, pass.name(), size),
        grid: (tiles.min(call.gpu.multiprocessors()?), 1),
        threads: 128 * (1 + groups as u32),
        shared_bytes,
    })
}
