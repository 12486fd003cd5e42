//! Time and memory, measured where the work is done.

use super::memory;
use candle_core::{Device, Result};
use std::time::Instant;

pub enum Meter {
    /// Wall-clock time, and the counting allocator.
    Host,
    /// Events on the device's stream, and the high-water mark of its memory pool.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Pool),
}

impl Meter {
    pub fn new(device: &Device) -> Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(cuda::Pool::new(device)?)),
            _ => Ok(Self::Host),
        }
    }

    /// Waits for the device, starts a new peak, and returns the bytes in use.
    pub fn start(&self) -> Result<usize> {
        match self {
            Self::Host => {
                memory::reset_peak();
                Ok(memory::in_use())
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(pool) => pool.start(),
        }
    }

    /// The most bytes in use since [`Meter::start`].
    pub fn peak(&self) -> Result<usize> {
        match self {
            Self::Host => Ok(memory::peak()),
            #[cfg(feature = "cuda")]
            Self::Cuda(pool) => pool.peak(),
        }
    }

    /// What `work` returns, and its milliseconds.
    pub fn time<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
        match self {
            Self::Host => {
                let start = Instant::now();
                let result = work()?;
                Ok((result, start.elapsed().as_secs_f64() * 1e3))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(pool) => pool.time(work),
        }
    }

    pub fn device_name(&self) -> String {
        match self {
            Self::Host => "host".to_string(),
            #[cfg(feature = "cuda")]
            Self::Cuda(pool) => pool.device_name(),
        }
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::cuda_backend::cudarc::driver::{result, sys, CudaStream};
    use candle_core::cuda_backend::{CudaDevice, WrapErr};
    use candle_core::Result;
    use std::ffi::c_void;
    use std::sync::Arc;
    use sys::CUmemPool_attribute_enum as Attribute;

    pub struct Pool {
        stream: Arc<CudaStream>,
        pool: sys::CUmemoryPool,
    }

    impl Pool {
        pub fn new(device: &CudaDevice) -> Result<Self> {
            let stream = device.cuda_stream();
            // SAFETY: the device is the one of a live context.
            let pool =
                unsafe { result::device::get_default_mem_pool(stream.context().cu_device()) }
                    .w()?;
            let pool = Self { stream, pool };
            // Freed memory stays in the pool, as it does in PyTorch's allocator: by default the
            // driver takes it back whenever the host waits, and every step pays for getting it again.
            pool.set(Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
            Ok(pool)
        }

        pub fn start(&self) -> Result<usize> {
            self.stream.synchronize().w()?;
            self.set(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
            self.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
        }

        pub fn peak(&self) -> Result<usize> {
            self.get(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
        }

        pub fn time<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
            let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            let start = self.stream.record_event(timed).w()?;
            let result = work()?;
            let end = self.stream.record_event(timed).w()?;
            Ok((result, start.elapsed_ms(&end).w()? as f64))
        }

        pub fn device_name(&self) -> String {
            let name = self.stream.context().name();
            name.unwrap_or_else(|error| format!("CUDA device ({error})"))
        }

        fn get(&self, attribute: Attribute) -> Result<usize> {
            let mut value = 0u64;
            // SAFETY: the pool lives as long as its device; these attributes are u64.
            unsafe {
                sys::cuMemPoolGetAttribute(self.pool, attribute, (&raw mut value).cast::<c_void>())
            }
            .result()
            .w()?;
            Ok(value as usize)
        }

        fn set(&self, attribute: Attribute, mut value: u64) -> Result<()> {
            // SAFETY: as in `get`.
            unsafe {
                sys::cuMemPoolSetAttribute(self.pool, attribute, (&raw mut value).cast::<c_void>())
            }
            .result()
            .w()
        }
    }
}
