//! `cuda/attention_*.cu`.

use super::{addresses, aligned, kernel, operands, Operand};
use crate::cuda::launch::{
    Array, Gpu, Kernel, Module, ATTENTION_BF16, ATTENTION_F16, ATTENTION_F32,
};
use crate::cuda::operands::Kind;
use crate::cuda::params::attention::{AttentionParams, StrideParams};
use crate::ops::attention::sizes::Settings;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{bail, DType, Layout, Result, Tensor};

/// The most dimensions of a head.
pub(crate) const MOST: usize = 256;
const DELTA_ROWS: usize = 8;

/// Dimensions of a head that a chunk of 16 bytes holds: head sizes are multiples of it.
pub(crate) fn granule(dtype: DType) -> usize {
    16 / dtype.size_in_bytes()
}

/// Whether the kernels can read a tensor where it lies.
pub(crate) fn readable(tensor: &Tensor) -> Result<bool> {
    operands([tensor], |[operand]| {
        let kind = operand.kind()?;
        let strides = operand.layout.stride();
        addresses(&operand.gpu(), [operand], |read| {
            Ok(strides[3] == 1 && aligned(kind, &read, &strides[..3]))
        })
    })
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Keys,
    Queries,
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

/// A call: what its kernels are named for and how many heads they have.
struct Call {
    gpu: Gpu,
    kind: Kind,
    module: Module,
    params: AttentionParams,
}

impl Call {
    fn new([q, k, v]: [Operand<'_>; 3], settings: Settings) -> Result<Self> {
        let (batch, queries, heads, head_dim) = q.layout.shape().dims4()?;
        let (_, keys, key_heads, _) = k.layout.shape().dims4()?;
        let kind = q.kind()?;
        Ok(Self {
            gpu: q.gpu(),
            kind,
            module: match kind.dtype {
                DType::BF16 => ATTENTION_BF16,
                DType::F16 => ATTENTION_F16,
                _ => ATTENTION_F32,
            },
            params: AttentionParams {
                q_strides: strides(q.layout),
                k_strides: strides(k.layout),
                v_strides: strides(v.layout),
                batch: batch as u32,
                queries: queries as u32,
                keys: keys as u32,
                heads: heads as u32,
                group: (heads / key_heads) as u32,
                head_dim: head_dim as u32,
                causal: settings.causal.into(),
                window: settings
                    .window
                    .map_or(i32::MAX as usize, |w| w.min(i32::MAX as usize))
                    as u32,
                scale: settings.scale as f32,
                softcap: settings.softcap.unwrap_or(0.) as f32,
                ..AttentionParams::default()
            },
        })
    }

    fn launch(&self, pass: Pass, name: &str, params: &AttentionParams) -> Result<()> {
        let head_dim = self.params.head_dim as usize;
        let Some(size) = [64, 96, 128, MOST]
            .into_iter()
            .find(|size| head_dim <= *size)
        else {
            bail!("attention: heads of {head_dim} dimensions, the CUDA kernels have at most {MOST}")
        };
        let tiles = Tiles::new(pass, self.kind.size == 2, size);
        let AttentionParams {
            batch,
            queries,
            keys,
            heads,
            group,
            ..
        } = *params;
        let blocks = match pass {
            Pass::Keys => (keys as usize).div_ceil(tiles.rows) * (batch * heads / group) as usize,
            _ => (queries as usize).div_ceil(tiles.rows) * (batch * heads) as usize,
        };
        let kernel = Kernel {
            module: self.module,
            name: self.kind.kernel(&format!("attention_{name}_{size}")),
            grid: (blocks, 1),
            threads: tiles.threads as u32,
            shared_bytes: tiles.shared_bytes(self.kind.size, size),
        };
        self.gpu.launch(&kernel, params)
    }
}

fn strides(layout: &Layout) -> StrideParams {
    let strides = layout.stride();
    StrideParams {
        batch: strides[0] as i64,
        time: strides[1] as i64,
        head: strides[2] as i64,
    }
}

/// The result, contiguous, and the log-sum-exp of its rows, `(batch, heads, queries)`. The operands are
/// [`readable`].
pub(crate) fn forward(qkv: [Operand<'_>; 3], settings: Settings) -> Result<(CudaStorage, Tensor)> {
    let call = Call::new(qkv, settings)?;
    let shape = qkv[0].layout.shape();
    let (batch, queries, heads, _) = shape.dims4()?;
    let out = call.gpu.unfinished(call.kind.dtype, shape, false)?;
    let lse = call
        .gpu
        .unfinished(DType::F32, (batch, heads, queries), false)?;
    addresses(&call.gpu, qkv, |[q, k, v]| {
        let params = AttentionParams {
            q,
            k,
            v,
            out: out.address,
            lse: lse.address,
            ..call.params
        };
        call.launch(Pass::Forward, "forward", &params)
    })?;
    Ok((out.finish_storage(&call.gpu), lse.finish(&call.gpu)))
}

/// The gradients of queries, keys and values, contiguous. `out` and its gradient are contiguous and begin on 16 bytes.
pub(crate) fn backward(
    qkv: [&Tensor; 3],
    [out, out_grad, lse]: [&Tensor; 3],
    settings: Settings,
) -> Result<[Tensor; 3]> {
    let [q, k, v] = qkv;
    operands([q, k, v, out, out_grad, lse], |all| {
        let call = Call::new([all[0], all[1], all[2]], settings)?;
        let gpu = &call.gpu;
        let made = |like: &Tensor| gpu.unfinished(call.kind.dtype, like.shape(), false);
        let (of_q, of_k, of_v) = (made(q)?, made(k)?, made(v)?);
        let delta: Array<f32> = gpu.array(lse.elem_count())?;
        addresses(gpu, all, |[q, k, v, out, out_grad, lse]| {
            let params = AttentionParams {
                q,
                k,
                v,
                out,
                lse,
                out_grad,
                delta: delta.address,
                q_grad: of_q.address,
                k_grad: of_k.address,
                v_grad: of_v.address,
                ..call.params
            };
            let name = call.kind.kernel("attention_delta");
            let rows = params.batch as usize * params.queries as usize * params.heads as usize;
            let blocks = (rows.div_ceil(DELTA_ROWS), 1);
            gpu.launch(&kernel(call.module, name, blocks, 256, 0), &params)?;
            call.launch(Pass::Keys, "keys", &params)?;
            call.launch(Pass::Queries, "queries", &params)
        })?;
        Ok([of_q.finish(gpu), of_k.finish(gpu), of_v.finish(gpu)])
    })
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
