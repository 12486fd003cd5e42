//! NCCL's errors and the driver's events.

use candle_core::cuda_backend::WrapErr;
use candle_core::{bail, Result};
use cudarc::driver::{result, sys as cuda};
use cudarc::nccl::sys::{self as nccl, ncclResult_t as Status};
use std::ffi::CStr;

/// An error with NCCL's words for it; work in progress is none.
pub(super) fn check(what: &str, status: Status) -> Result<()> {
    if matches!(status, Status::ncclSuccess | Status::ncclInProgress) {
        return Ok(());
    }
    // SAFETY: NCCL returns a string that lives as long as the program.
    let words = unsafe { CStr::from_ptr(nccl::ncclGetErrorString(status)) };
    bail!("NCCL cannot {what}: {}", words.to_string_lossy())
}

/// An event of the driver.
pub(super) struct Event(pub(super) cuda::CUevent);

impl Event {
    /// # Safety
    /// The stream must be alive, and its context be the thread's.
    pub unsafe fn record(stream: cuda::CUstream) -> Result<Self> {
        let event = Self(result::event::create(cuda::CUevent_flags::CU_EVENT_DISABLE_TIMING).w()?);
        result::event::record(event.0, stream).w()?;
        Ok(event)
    }

    pub fn reached(&self) -> Result<bool> {
        // SAFETY: the event is alive.
        match unsafe { result::event::query(self.0) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == cuda::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(error).w(),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the driver keeps what it still needs of the event.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
