//! Launches of the kernels of [`crate::ops`] and of the optimizer. As in the loss, nothing waits for the device.

pub(crate) mod attention;
pub(crate) mod gated;
pub(crate) mod optimizer;
pub(crate) mod rms_norm;
pub(crate) mod rope;

use super::launch::{Gpu, Kernel, Module};
use super::operands::{aligned, Kind};
use candle_core::cuda_backend::CudaStorage;
use candle_core::{bail, DType, Device, Layout, Result, Storage, Tensor};

/// What a kernel reads.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub storage: &'a CudaStorage,
    pub layout: &'a Layout,
}

impl Operand<'_> {
    fn gpu(&self) -> Gpu {
        use candle_core::backend::BackendStorage;
        Gpu::new(self.storage.device())
    }

    fn kind(&self) -> Result<Kind> {
        use candle_core::backend::BackendStorage;
        Kind::of(self.storage.dtype())
    }
}

/// Runs `with` while the tensors are held for reading.
pub(crate) fn operands<const N: usize, R>(
    tensors: [&Tensor; N],
    with: impl FnOnce([Operand<'_>; N]) -> Result<R>,
) -> Result<R> {
    let opened = tensors.map(Tensor::storage_and_layout);
    let mut all = [None; N];
    for (operand, (storage, layout)) in all.iter_mut().zip(&opened) {
        *operand = match &**storage {
            Storage::Cuda(storage) => Some(Operand { storage, layout }),
            other => bail!(
                "expected a CUDA tensor, got one on {:?}",
                other.device().location()
            ),
        };
    }
    let all: Option<Vec<Operand<'_>>> = all.into_iter().collect();
    match all.map(<[Operand<'_>; N]>::try_from) {
        Some(Ok(all)) => with(all),
        _ => bail!("{N} operands"),
    }
}

/// Runs `with` on the addresses of the operands, ready to be read on this stream.
fn addresses<const N: usize, R>(
    gpu: &Gpu,
    operands: [Operand<'_>; N],
    with: impl FnOnce([u64; N]) -> Result<R>,
) -> Result<R> {
    let mut addresses = [0; N];
    let mut held = Vec::with_capacity(N);
    for (address, operand) in addresses.iter_mut().zip(&operands) {
        let (at, guard) = gpu.address(operand.storage, operand.layout)?;
        *address = at;
        held.push(guard);
    }
    with(addresses)
}

/// Whether the kernels run on this tensor: its device and dtype, and that it has numbers.
pub(crate) fn can_run(tensor: &Tensor) -> Result<bool> {
    let Device::Cuda(device) = tensor.device() else {
        return Ok(false);
    };
    let dtype = matches!(tensor.dtype(), DType::BF16 | DType::F16 | DType::F32);
    Ok(dtype && tensor.elem_count() > 0 && Gpu::new(device).compute_capability()?.0 >= 8)
}

fn kernel(
    module: Module,
    name: String,
    grid: (usize, usize),
    threads: u32,
    shared_bytes: usize,
) -> Kernel {
    Kernel {
        module,
        name,
        grid,
        threads,
        shared_bytes,
    }
}
