//! `cuda/attention_*.cu`.

mod call;
mod hopper;
mod portable;

use super::{addresses, aligned, operands, Operand};
use crate::cuda::params::attention_problem::AttentionParams;
use crate::ops::attention::sizes::Settings;
use call::Call;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{DType, Result, Tensor};

pub(crate) use portable::MOST;

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
        match hopper::can_run(&call)? {
            true => hopper::forward(&call, &params),
            false => portable::forward(&call, &params),
        }
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
        addresses(gpu, all, |[q, k, v, out, out_grad, lse]| {
            let params = AttentionParams {
                q,
                k,
                v,
                out,
                lse,
                out_grad,
                q_grad: of_q.address,
                k_grad: of_k.address,
                v_grad: of_v.address,
                ..call.params
            };
            match hopper::can_run(&call)? {
                true => hopper::backward(&call, &params),
                false => portable::backward(&call, &params),
            }
        })?;
        Ok([of_q.finish(gpu), of_k.finish(gpu), of_v.finish(gpu)])
    })
}
