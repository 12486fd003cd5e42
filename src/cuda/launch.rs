//! Memory and kernel launches on a Candle device. All that one thread asks for runs on one stream, in order. That of
//! `Device::new_cuda` is another one in every thread, and nothing here orders the one after the other: the
//! documentation of the crate tells users.

use super::tensor_map::TensorMap;
use crate::matrices::View;
use candle_core::cuda_backend::{CudaError, CudaStorage, CudaStorageSlice, WrapErr};
use candle_core::{bail, CudaDevice, DType, Error, Layout, Result, Shape, Storage, Tensor};
use cudarc::driver::{
    sys::{CUdevice_attribute, CUfunction_attribute, CUresult},
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError,
    LaunchConfig, PushKernelArg, SyncOnDrop,
};
use std::sync::Arc;

/// Whether the device had no room for what was asked for.
pub(super) fn is_out_of_memory(error: &Error) -> bool {
    match error {
        Error::WithBacktrace { inner, .. } => is_out_of_memory(inner),
        Error::Cuda(error) => matches!(
            error.downcast_ref(),
            Some(CudaError::Cuda(DriverError(
                CUresult::CUDA_ERROR_OUT_OF_MEMORY
            )))
        ),
        _ => false,
    }
}

/// A file of kernels, compiled by `build.rs`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Module {
    name: &'static str,
    ptx: &'static str,
}

macro_rules! modules {
    ($($(#[$condition:meta])* $name:ident = $file:literal;)*) => {$(
        $(#[$condition])*
        pub(super) const $name: Module = Module {
            name: concat!("candle_cut_cross_entropy_", $file),
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $file, ".ptx")),
        };
    )*};
}

modules! {
    ROWS = "rows";
    LOSS = "loss";
    FUSED = "fused";
    BACKWARD = "backward";
    FILTER = "filter";
    AVERAGES = "averages";
    SMOOTHING = "smoothing";
    CLASS_LOGITS = "class_logits";
    SORT = "sort";
    DIVERGENCE = "divergence";
    FORWARD_SM80 = "forward_sm80";
    FORWARD_OUTPUTS_SM80 = "forward_outputs_sm80";
    GRADIENT_SM80 = "gradient_sm80";
    PRODUCTS_SM80 = "products_sm80";
    ADAPTER = "adapter";
    FORWARD_SM90A = "forward_sm90a";
    FORWARD_OUTPUTS_SM90A = "forward_outputs_sm90a";
    GRADIENT_SM90A = "gradient_sm90a";
    GRADIENT_OUTPUTS_SM90A = "gradient_outputs_sm90a";
    LOGITS_SM90A = "logits_sm90a";
    PRODUCTS_SM90A = "products_sm90a";
    PRODUCTS_MIXED_SM90A = "products_mixed_sm90a";
    PRODUCTS_RAGGED_SM90A = "products_ragged_sm90a";
    #[cfg(feature = "models")]
    OPTIMIZER = "optimizer";
    #[cfg(feature = "models")]
    ATTENTION_BF16 = "attention_bf16";
    #[cfg(feature = "models")]
    ATTENTION_F16 = "attention_f16";
    #[cfg(feature = "models")]
    ATTENTION_F32 = "attention_f32";
    #[cfg(feature = "models")]
    ATTENTION_SM90A_BF16 = "attention_sm90a_bf16";
    #[cfg(feature = "models")]
    ATTENTION_SM90A_F16 = "attention_sm90a_f16";
    #[cfg(feature = "models")]
    GATED = "gated";
    #[cfg(feature = "models")]
    RMS_NORM = "rms_norm";
    #[cfg(feature = "models")]
    ROPE = "rope";
}

/// A kernel and the blocks it is launched with.
#[derive(Debug)]
pub(super) struct Kernel {
    pub module: Module,
    pub name: String,
    pub grid: (usize, usize),
    pub threads: u32,
    pub shared_bytes: usize,
}

/// Threads of the kernels that are one block.
pub(super) const ONE_BLOCK: u32 = 1024;

impl Kernel {
    /// Without shared memory that the launch sizes.
    pub fn new(
        module: Module,
        name: impl Into<String>,
        grid: (usize, usize),
        threads: u32,
    ) -> Self {
        Self {
            module,
            name: name.into(),
            grid,
            threads,
            shared_bytes: 0,
        }
    }

    pub fn one_block(module: Module, name: &str) -> Self {
        Self::new(module, name, (1, 1), ONE_BLOCK)
    }
}

/// A CUDA device and its stream.
#[derive(Debug, Clone)]
pub(super) struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
}

impl Gpu {
    pub fn new(device: &CudaDevice) -> Self {
        Self {
            device: device.clone(),
            stream: device.cuda_stream(),
        }
    }

    pub fn multiprocessors(&self) -> Result<usize> {
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(self.stream.context().attribute(count).w()? as usize)
    }

    pub fn compute_capability(&self) -> Result<(i32, i32)> {
        self.stream.context().compute_capability().w()
    }

    /// Launches a kernel on its parameters.
    pub fn launch<P: DeviceRepr>(&self, kernel: &Kernel, params: &P) -> Result<()> {
        let (func, config) = self.prepare(kernel)?;
        let mut builder = self.stream.launch_builder(&func);
        builder.arg(params);
        // SAFETY: `params` is laid out as the kernel's parameter; its addresses belong to buffers that the caller
        // keeps until after this call, and freeing is ordered after the kernel on the same stream.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }

    /// Launches a kernel of the copy engine on the maps of its operands and its parameters.
    pub fn launch_on_maps<P: DeviceRepr, const N: usize>(
        &self,
        kernel: &Kernel,
        maps: [&TensorMap; N],
        params: &P,
    ) -> Result<()> {
        let (func, config) = self.prepare(kernel)?;
        let mut builder = self.stream.launch_builder(&func);
        for map in maps {
            builder.arg(map);
        }
        builder.arg(params);
        // SAFETY: as in `launch`; the maps are of buffers that the caller keeps too.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }

    fn prepare(&self, kernel: &Kernel) -> Result<(CudaFunction, LaunchConfig)> {
        let Kernel {
            module,
            name,
            grid,
            threads,
            shared_bytes,
        } = kernel;
        let func = self
            .device
            .get_or_load_custom_func(name, module.name, module.ptx)
            .map_err(|e| explain(e, *module))?;
        if *shared_bytes > 48 << 10 {
            let limit = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            func.set_attribute(limit, *shared_bytes as i32).w()?;
        }
        let dim = |n: usize, most: usize| match u32::try_from(n) {
            Ok(n) if n as usize <= most => Ok(n),
            _ => bail!("{name}: a grid of {grid:?} blocks is too large"),
        };
        let config = LaunchConfig {
            grid_dim: (dim(grid.0, i32::MAX as usize)?, dim(grid.1, 65_535)?, 1),
            block_dim: (*threads, 1, 1),
            shared_mem_bytes: *shared_bytes as u32,
        };
        Ok((func.into_cuda_function(), config))
    }

    /// Device memory, not initialised.
    pub fn buffer(&self, bytes: usize) -> Result<Buffer> {
        self.array::<u8>(bytes.max(1))
    }

    /// Device memory, all zeros.
    pub fn zeros(&self, bytes: usize) -> Result<Buffer> {
        Ok(self.own(self.device.alloc_zeros::<u8>(bytes.max(1))?))
    }

    /// One number, to be read by kernels.
    pub fn number(&self, number: f32) -> Result<Array<f32>> {
        self.upload(&[number])
    }

    /// Numbers to be read by kernels.
    pub fn upload<T: DeviceRepr + 'static>(&self, numbers: &[T]) -> Result<Array<T>> {
        Ok(self.own(self.device.clone_htod(numbers)?))
    }

    /// Like [`Gpu::buffer`], for numbers of another type.
    pub fn array<T: DeviceRepr>(&self, len: usize) -> Result<Array<T>> {
        // SAFETY: kernels write every number before one is read.
        let slice = unsafe { self.device.alloc::<T>(len)? };
        Ok(self.own(slice))
    }

    fn own<T>(&self, slice: CudaSlice<T>) -> Array<T> {
        let address = slice.device_ptr(&self.stream).0;
        Array { slice, address }
    }

    /// A tensor's memory to be written to, and the tensor once [`Unfinished::finish`] is called.
    pub fn unfinished(
        &self,
        dtype: DType,
        shape: impl Into<Shape>,
        zeroed: bool,
    ) -> Result<Unfinished> {
        let shape = shape.into();
        let len = shape.elem_count();
        macro_rules! allocate {
            ($variant:ident, $ty:ty) => {{
                let array = match zeroed {
                    true => self.own(self.device.alloc_zeros::<$ty>(len)?),
                    false => self.array::<$ty>(len)?,
                };
                (array.address, CudaStorageSlice::$variant(array.slice))
            }};
        }
        let (address, slice) = match dtype {
            DType::BF16 => allocate!(BF16, half::bf16),
            DType::F16 => allocate!(F16, half::f16),
            DType::F32 => allocate!(F32, f32),
            DType::U32 => allocate!(U32, u32),
            dtype => bail!("no CUDA kernels for {dtype:?}"),
        };
        Ok(Unfinished {
            address,
            slice,
            shape,
        })
    }

    /// The address of a contiguous matrix or vector, ready to be read on this stream while `read` runs.
    pub fn read_view<R>(
        &self,
        view: View<'_, CudaStorage>,
        read: impl FnOnce(u64) -> Result<R>,
    ) -> Result<R> {
        let (address, _until_read) = self.address(view.storage, view.layout)?;
        read(address)
    }

    /// The address of a contiguous tensor, ready to be read on this stream while `read` runs.
    pub fn read<R>(&self, tensor: &Tensor, read: impl FnOnce(u64) -> Result<R>) -> Result<R> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            bail!(
                "expected a CUDA tensor, got one on {:?}",
                tensor.device().location()
            )
        };
        self.read_view(View::new(storage, layout), read)
    }

    /// The address of the first number of a layout, ready to be read on this stream until the guard is dropped.
    pub fn address<'a>(
        &'a self,
        storage: &'a CudaStorage,
        layout: &Layout,
    ) -> Result<(u64, SyncOnDrop<'a>)> {
        macro_rules! address {
            ($slice:expr) => {{
                let (base, guard) = $slice.device_ptr(&self.stream);
                let offset = layout.start_offset() * storage.slice.dtype_size();
                (base + offset as u64, guard)
            }};
        }
        Ok(match &storage.slice {
            CudaStorageSlice::BF16(s) => address!(s),
            CudaStorageSlice::F16(s) => address!(s),
            CudaStorageSlice::F32(s) => address!(s),
            CudaStorageSlice::I64(s) => address!(s),
            CudaStorageSlice::U32(s) => address!(s),
            CudaStorageSlice::I32(s) => address!(s),
            _ => bail!("no CUDA kernels for this dtype"),
        })
    }

    /// Like [`Gpu::address`], to be written to.
    pub fn address_to_write<'a>(
        &'a self,
        storage: &'a mut CudaStorage,
        layout: &Layout,
    ) -> Result<(u64, SyncOnDrop<'a>)> {
        let offset = (layout.start_offset() * storage.slice.dtype_size()) as u64;
        macro_rules! address {
            ($slice:expr) => {{
                let (base, guard) = $slice.device_ptr_mut(&self.stream);
                (base + offset, guard)
            }};
        }
        Ok(match &mut storage.slice {
            CudaStorageSlice::BF16(s) => address!(s),
            CudaStorageSlice::F16(s) => address!(s),
            CudaStorageSlice::F32(s) => address!(s),
            _ => bail!("no CUDA kernels for this dtype"),
        })
    }

    /// Copies numbers to the host, once everything before is done.
    pub fn to_host<T: DeviceRepr>(&self, array: &Array<T>) -> Result<Vec<T>> {
        self.device.clone_dtoh(&array.slice)
    }
}

trait DtypeSize {
    fn dtype_size(&self) -> usize;
}

impl DtypeSize for CudaStorageSlice {
    fn dtype_size(&self) -> usize {
        match self {
            CudaStorageSlice::BF16(_) | CudaStorageSlice::F16(_) => 2,
            CudaStorageSlice::I64(_) => 8,
            _ => 4,
        }
    }
}

/// Device memory and its address.
#[derive(Debug)]
pub(super) struct Array<T> {
    slice: CudaSlice<T>,
    pub address: u64,
}

pub(super) type Buffer = Array<u8>;

/// The memory of a tensor that kernels have yet to write.
pub(super) struct Unfinished {
    pub address: u64,
    slice: CudaStorageSlice,
    shape: Shape,
}

impl Unfinished {
    pub fn elem_count(&self) -> usize {
        self.shape.elem_count()
    }

    /// The tensor, once every kernel that writes it is launched.
    pub fn finish(self, gpu: &Gpu) -> Tensor {
        let shape = self.shape.clone();
        let none = candle_core::op::BackpropOp::none();
        Tensor::from_storage(Storage::Cuda(self.finish_storage(gpu)), shape, none, false)
    }

    /// The same without a tensor around it.
    pub fn finish_storage(mut self, gpu: &Gpu) -> CudaStorage {
        macro_rules! written {
            ($slice:expr) => {
                drop($slice.device_ptr_mut(&gpu.stream))
            };
        }
        match &mut self.slice {
            CudaStorageSlice::BF16(s) => written!(s),
            CudaStorageSlice::F16(s) => written!(s),
            CudaStorageSlice::F32(s) => written!(s),
            CudaStorageSlice::U32(s) => written!(s),
            _ => {}
        }
        CudaStorage {
            slice: self.slice,
            device: gpu.device.clone(),
        }
    }
}

/// Says in words what a driver means that does not take the kernels.
fn explain(error: Error, module: Module) -> Error {
    let text = error.to_string();
    let hint = if text.contains("UNSUPPORTED_PTX_VERSION") {
        "the driver is older than the CUDA toolkit this program was built with: update the driver or build with an older toolkit"
    } else if text.contains("NO_BINARY_FOR_GPU") || text.contains("INVALID_PTX") {
        "the kernels need compute capability 8.0 or later"
    } else {
        return error;
    };
    Error::Msg(format!(
        "cannot load the kernels {}: {hint} ({text})",
        module.name
    ))
}
