//! `cuda/rope.cu`.

use super::{addresses, aligned, kernel, operands, Operand};
use crate::cuda::launch::ROPE;
use crate::cuda::params::rope::RopeParams;
use crate::ops::angles::Angles;
use candle_core::cuda_backend::CudaStorage;
use candle_core::Result;

const THREADS: usize = 128;

/// `x` `(batch, time, heads, head_dim)` turned by the angles, or back. Its last dimension is contiguous.
pub(crate) fn turn(x: Operand<'_>, angles: &Angles) -> Result<CudaStorage> {
    let (gpu, kind) = (x.gpu(), x.kind()?);
    let (batch, time, heads, head_dim) = x.layout.shape().dims4()?;
    let pairs = angles.cos.dim(1)?;
    let out = gpu.unfinished(kind.dtype, x.layout.shape(), false)?;
    let strides = x.layout.stride();
    operands([&angles.cos, &angles.sin], |[cos, sin]| {
        addresses(&gpu, [x, cos, sin], |read| {
            let apart = [strides[0], strides[1], strides[2], head_dim, pairs];
            let aligned = aligned(kind, &read[..1], &apart);
            let params = RopeParams {
                x: read[0],
                cos: read[1],
                sin: read[2],
                out: out.address,
                batch_stride: strides[0] as i64,
                time_stride: strides[1] as i64,
                head_stride: strides[2] as i64,
                time: time as u32,
                heads: heads as u32,
                head_dim: head_dim as u32,
                pairs: pairs as u32,
                direction: if angles.back { -1. } else { 1. },
                aligned: aligned.into(),
            };
            let width = if aligned { 16 / kind.size } else { 1 };
            let units = heads * (head_dim - pairs) / width;
            let grid = (batch * time, units.div_ceil(THREADS));
            let name = kind.kernel("rope");
            gpu.launch(&kernel(ROPE, name, grid, THREADS as u32, 0), &params)
        })
    })?;
    Ok(out.finish_storage(&gpu))
}
