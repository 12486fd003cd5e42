//! `cuda/gated.cu`.

use super::{addresses, aligned, kernel, operands, Operand};
use crate::cuda::launch::{Gpu, GATED};
use crate::cuda::operands::Kind;
use crate::cuda::params::gated::GatedParams;
use crate::ops::activation::Activation;
use crate::ops::Rows;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{Result, Tensor};

const THREADS: usize = 256;

/// `activation(gate) * up`. Rows of both may lie apart.
pub(crate) fn forward(
    gate: Operand<'_>,
    up: Operand<'_>,
    activation: Activation,
) -> Result<CudaStorage> {
    let (gpu, kind) = (gate.gpu(), gate.kind()?);
    let out = gpu.unfinished(kind.dtype, gate.layout.shape(), false)?;
    let rows = [Rows::of(gate.layout)?, Rows::of(up.layout)?];
    addresses(&gpu, [gate, up], |read| {
        let params = GatedParams {
            out: out.address,
            ..params(kind, &read, rows, activation)
        };
        launch(&gpu, kind, "gated_forward", rows[0].count, &params)
    })?;
    Ok(out.finish_storage(&gpu))
}

/// The gradients of gate and up. The upstream gradient is contiguous.
pub(crate) fn backward(tensors: [&Tensor; 3], activation: Activation) -> Result<(Tensor, Tensor)> {
    operands(tensors, |all| {
        let (gpu, kind) = (all[0].gpu(), all[0].kind()?);
        let shape = tensors[0].shape();
        let of_gate = gpu.unfinished(kind.dtype, shape, false)?;
        let of_up = gpu.unfinished(kind.dtype, shape, false)?;
        let rows = [Rows::of(all[0].layout)?, Rows::of(all[1].layout)?];
        addresses(&gpu, all, |read| {
            let params = GatedParams {
                upstream: read[2],
                gate_grad: of_gate.address,
                up_grad: of_up.address,
                ..params(kind, &read, rows, activation)
            };
            launch(&gpu, kind, "gated_backward", rows[0].count, &params)
        })?;
        Ok((of_gate.finish(&gpu), of_up.finish(&gpu)))
    })
}

fn params(kind: Kind, read: &[u64], [gate, up]: [Rows; 2], activation: Activation) -> GatedParams {
    GatedParams {
        gate: read[0],
        up: read[1],
        gate_stride: gate.stride as i64,
        up_stride: up.stride as i64,
        columns: gate.columns as u32,
        gelu: (activation == Activation::GeluTanh).into(),
        aligned: aligned(kind, read, &[gate.columns, gate.stride, up.stride]).into(),
        ..GatedParams::default()
    }
}

fn launch(gpu: &Gpu, kind: Kind, name: &str, rows: usize, params: &GatedParams) -> Result<()> {
    let width = if params.aligned == 1 {
        16 / kind.size
    } else {
        1
    };
    let grid = (rows, (params.columns as usize).div_ceil(THREADS * width));
    let kernel = kernel(GATED, kind.kernel(name), grid, THREADS as u32, 0);
    gpu.launch(&kernel, params)
}
