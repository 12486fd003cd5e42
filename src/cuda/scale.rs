//! A gradient times the upstream gradient, one number on the device (`cuda/fused.cu`).

use super::launch::{Gpu, Kernel, FUSED};
use super::operands::{kernels, Kind};
use super::params::fused::UpstreamParams;
use super::write::write;
use candle_core::{DType, Result, Tensor};

/// `gradient`, `upstream` and `unit`, another number (0: 1), are addresses; the gradient begins on 16 bytes.
pub(super) fn scale(
    gpu: &Gpu,
    kind: Kind,
    gradient: u64,
    numbers: usize,
    upstream: u64,
    unit: u64,
) -> Result<()> {
    let params = UpstreamParams {
        upstream,
        unit,
        gradient,
        numbers: numbers as i64,
    };
    let grid = (gpu.multiprocessors()? * 4, 1);
    let kernel = Kernel::new(FUSED, kind.kernel("scale_gradient"), grid, 512);
    gpu.launch(&kernel, &params)
}

/// Multiplies a gradient in place; false where there is no kernel for it.
pub(crate) fn in_place(gradient: &Tensor, upstream: &Tensor) -> Result<bool> {
    let Some((gpu, kind)) = kernels(gradient)? else {
        return Ok(false);
    };
    let layout = gradient.layout();
    let runs = kind.dtype == DType::BF16 && layout.is_contiguous() && layout.start_offset() == 0;
    if runs {
        gpu.read(&upstream.to_dtype(DType::F32)?, |upstream| {
            write(gradient, &|address| {
                scale(&gpu, kind, address, gradient.elem_count(), upstream, 0)
            })
        })?;
    }
    Ok(runs)
}
