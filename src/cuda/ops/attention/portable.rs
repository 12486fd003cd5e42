//! `cuda/attention_{bf16,f16,f32}.cu`: any dtype, heads of at most [`MOST`] dimensions, compute capability 8.0 and later.

use super::call::{Call, Pass};
use crate::cuda::launch::{Array, Kernel, Module, ATTENTION_BF16, ATTENTION_F16, ATTENTION_F32};
use crate::cuda::ops::kernel;
use crate::cuda::params::attention_problem::AttentionParams;
use candle_core::{bail, DType, Result};

/// The most dimensions of a head.
pub(crate) const MOST: usize = 256;
const DELTA_ROWS: usize = 8;

pub(super) fn forward(call: &Call, params: &AttentionParams) -> Result<()> {
    launch(call, Pass::Forward, params)
}

pub(super) fn backward(call: &Call, params: &AttentionParams) -> Result<()> {
    let rows = params.batch as usize * params.queries as usize * params.heads as usize;
    let delta: Array<f32> = call.gpu.array(rows)?;
    let params = AttentionParams {
        delta: delta.address,
        ..*params
    };
    let name = call.kind.kernel("attention_delta");
    let blocks = (rows.div_ceil(DELTA_ROWS), 1);
    let of_delta = kernel(module(call), name, blocks, 256, 0);
    call.gpu.launch(&of_delta, &params)?;
    launch(call, Pass::Keys, &params)?;
    launch(call, Pass::Queries, &params)
}

fn module(call: &Call) -> Module {
    match call.kind.dtype {
        DType::BF16 => ATTENTION_BF16,
        DType::F16 => ATTENTION_F16,
        _ => ATTENTION_F32,
    }
}

fn launch(call: &Call, pass: Pass, params: &AttentionParams) -> Result<()> {
    let head_dim = params.head_dim as usize;
    let Some(size) = [64, 96, 128, MOST]
        .into_iter()
        .find(|size| head_dim <= *size)
    else {
        bail!("attention: heads of {head_dim} dimensions, the CUDA kernels have at most {MOST}")
    };
    let tiles = Tiles::new(pass, call.kind.size == 2, size);
    let blocks = pass.tiles(params, tiles.rows);
    let name = pass.name();
    let kernel = Kernel {
        module: module(call),
        name: call.kind.kernel(&format!("attention_{name}_{size}")),
        grid: (blocks, 1),
        threads: tiles.threads as u32,
        shared_bytes: tiles.shared_bytes(call.kind.size, size),
    };
    call.gpu.launch(&kernel, params)
}

/// How a kernel tiles its work: `ForwardSizes`, `KeySizes` and `QuerySizes` in `cuda/attention_*.cuh`.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    /// Rows of a block: queries, or keys in the kernel for their gradients.
    rows: usize,
    /// Threads of a block.
    threads: usize,
    /// Rows of a tile of the others, two of which are in each stage.
    columns: usize,
    stages: usize,
    /// Tiles of `rows` rows that are kept.
    kept: usize,
    /// Whether statistics of the columns are kept too.
    statistics: bool,
}

impl Tiles {
    fn new(pass: Pass, half: bool, size: usize) -> Self {
        let columns = match (pass, half, size) {
            (Pass::Keys, true, ..=64) => 32,
            (_, true, ..=128) => 64,
            (_, true, _) | (_, false, ..=128) => 32,
            (_, false, _) => 16,
        };
        let (rows, threads, stages) = match (pass, half, size) {
            (Pass::Forward, true, ..=128) | (_, true, ..=64) => (128, 128, 2),
            (Pass::Forward, true, _) | (Pass::Forward, false, ..=128) => (64, 128, 2),
            (Pass::Forward, false, _) => (64, 128, 1),
            (_, true, ..=128) | (_, false, ..=64) => (64, 128, 2),
            (_, false, ..=128) => (64, 128, 1),
            (Pass::Keys, true, _) => (64, 256, 1),
            (Pass::Keys, false, _) => (32, 128, 1),
            (Pass::Queries, true, _) => (64, 128, 1),
            (Pass::Queries, false, _) => (32, 64, 1),
        };
        Self {
            rows,
            threads,
            columns,
            stages,
            kept: if pass == Pass::Forward { 1 } else { 2 },
            statistics: pass == Pass::Keys,
        }
    }

    fn shared_bytes(&self, number: usize, size: usize) -> usize {
        let row = (size * number).next_multiple_of(128);
        let statistics = match self.statistics {
            true => self.stages * 2 * self.columns * 4,
            false => 0,
        };
        (self.kept * self.rows + self.stages * 2 * self.columns) * row + statistics
    }
}

#[cfg(test)]
mod tests {
    use super::{Pass, Tiles};

    /// The kernels' files say the same, and a GPU of 99 KB runs all of them.
    #[test]
    fn kernels_get_the_shared_memory_that_they_take() {
        let bytes = |pass| {
            let sizes = [
                (2, 64),
                (2, 96),
                (2, 128),
                (2, 256),
                (4, 64),
                (4, 96),
                (4, 128),
                (4, 256),
            ];
            sizes.map(|(number, size)| {
                Tiles::new(pass, number == 2, size).shared_bytes(number, size)
            })
        };
        assert_eq!(
            bytes(Pass::Forward),
            [49152, 98304, 98304, 98304, 49152, 73728, 98304, 98304]
        );
        assert_eq!(
            bytes(Pass::Keys),
            [49664, 99328, 99328, 98560, 66048, 73984, 98560, 98432]
        );
        assert_eq!(
            bytes(Pass::Queries),
            [65536, 98304, 98304, 98304, 65536, 73728, 98304, 98304]
        );
    }
}
