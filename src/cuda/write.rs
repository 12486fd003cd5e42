//! Tensors that kernels change in place.

use super::launch::Gpu;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Tensor};

/// Runs `with` on the address of a contiguous tensor that is held for writing.
pub(super) fn write(tensor: &Tensor, with: &dyn Fn(u64) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Write(with))
}

struct Write<'a>(&'a dyn Fn(u64) -> Result<()>);

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("expected a CUDA tensor, got one on the CPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let gpu = Gpu::new(storage.device());
        let (address, _until_written) = gpu.address_to_write(storage, layout)?;
        (self.0)(address)
    }
}
