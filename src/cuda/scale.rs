//! A gradient times the upstream gradient, one number on the device (`cuda/fused.cu`).

use super::launch::{Gpu, Kernel, FUSED};
use super::operands::Kind;
use super::params::fused::UpstreamParams;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CudaStorage, DType, InplaceOp2, Layout, Result, Tensor};

/// `gradient` and `upstream` are addresses; the gradient begins on 16 bytes.
pub(super) fn scale(
    gpu: &Gpu,
    kind: Kind,
    gradient: u64,
    numbers: usize,
    upstream: u64,
) -> Result<()> {
    let params = UpstreamParams {
        upstream,
        gradient,
        numbers: numbers as i64,
    };
    let grid = (gpu.multiprocessors()? * 4, 1);
    let kernel = Kernel::new(FUSED, kind.kernel("scale_gradient"), grid, 512);
    gpu.launch(&kernel, &params)
}

/// Multiplies a gradient in place; false where there is no kernel for it.
pub(crate) fn in_place(gradient: &Tensor, upstream: &Tensor) -> Result<bool> {
    let runs = gradient.device().is_cuda()
        && gradient.dtype() == DType::BF16
        && gradient.layout().is_contiguous()
        && gradient.layout().start_offset() == 0;
    if runs {
        gradient.inplace_op2(&upstream.to_dtype(DType::F32)?, &Scale)?;
    }
    Ok(runs)
}

struct Scale;

impl InplaceOp2 for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        bail!("expected CUDA tensors, got some on the CPU")
    }

    fn cuda_fwd(
        &self,
        gradient: &mut CudaStorage,
        layout: &Layout,
        upstream: &CudaStorage,
        of_upstream: &Layout,
    ) -> Result<()> {
        let gpu = Gpu::new(gradient.device());
        let kind = Kind::of(gradient.dtype())?;
        let (upstream, _until_read) = gpu.address(upstream, of_upstream)?;
        let numbers = layout.shape().elem_count();
        let (gradient, _until_written) = gpu.address_to_write(gradient, layout)?;
        scale(&gpu, kind, gradient, numbers, upstream)
    }
}
