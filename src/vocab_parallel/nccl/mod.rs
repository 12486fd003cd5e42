//! Ranks on GPUs of their own, over NCCL.

mod id;
mod library;

use super::{draft, Communicator, ReduceOp};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{
    bail, CpuStorage, CudaDevice, CudaStorage, Device, Error, InplaceOp1, Layout, Result, Tensor,
};
use cudarc::driver::{result, sys as cuda, CudaContext, DevicePtrMut};
use cudarc::nccl::sys as nccl;
use library::{check, Event};
use nccl::ncclResult_t as Status;
use std::path::Path;
use std::sync::{mpsc, Arc, Mutex};
use std::time::{Duration, Instant};

pub use id::NcclId;

/// Ranks that have a GPU each, over NCCL: processes, on one machine or several, or threads.
///
/// A call waits for its result on the host, no longer than the timeout. A rank that died makes the others abort their
/// communicator and return an error within it; every later call is an error too. The timeout includes the work that
/// the GPU has still to do before, so it must be longer than a step.
///
/// ```no_run
/// use candle_core::Device;
/// use candle_cut_cross_entropy::vocab_parallel::{NcclCommunicator, VocabParallel};
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// # fn main() -> candle_core::Result<()> {
/// // One process a GPU: a launcher sets these, and a path that no earlier run used.
/// let number = |name| std::env::var(name).unwrap().parse::<usize>().unwrap();
/// let (rank, ranks) = (number("RANK"), number("WORLD_SIZE"));
/// let device = Device::new_cuda(number("LOCAL_RANK"))?;
/// let timeout = Duration::from_secs(60);
/// let nccl = NcclCommunicator::meet("/shared/run-17", &device, rank, ranks, timeout)?;
/// let shard = VocabParallel::from_vocab(256_000, Arc::new(nccl))?;
/// # let _ = shard;
/// # Ok(())
/// # }
/// ```
///
/// The ranks of one communicator are on different GPUs; NCCL 2.14 or later.
pub struct NcclCommunicator {
    rank: usize,
    world_size: usize,
    device: CudaDevice,
    timeout: Duration,
    /// `None` once it has failed.
    live: Mutex<Option<Live>>,
}

impl NcclCommunicator {
    /// Joins the ranks that have this id. `timeout` is for this and for every all-reduce.
    ///
    /// # Errors
    /// A device without CUDA, a rank that is not below `world_size`, what NCCL reports, ranks that do not come.
    pub fn new(
        id: NcclId,
        device: &Device,
        rank: usize,
        world_size: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let Device::Cuda(device) = device else {
            bail!("NCCL needs a CUDA device, got {:?}", device.location())
        };
        let (Ok(ranks), true) = (i32::try_from(world_size), rank < world_size) else {
            bail!("rank {rank} is not one of {world_size} ranks")
        };
        let live = Live::new(id, device, rank as i32, ranks, timeout)?;
        Ok(Self {
            rank,
            world_size,
            device: device.clone(),
            timeout,
            live: Mutex::new(Some(live)),
        })
    }

    /// Joins the ranks that meet at this path, of a file system that all of them see: rank 0 leaves the id there, and
    /// takes it away once all have joined.
    ///
    /// # Errors
    /// Those of [`NcclCommunicator::new`]; a file that is there already, from a run that was killed: another path is
    /// needed, or that file removed before any rank starts.
    pub fn meet(
        path: impl AsRef<Path>,
        device: &Device,
        rank: usize,
        world_size: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let path = path.as_ref();
        if rank > 0 {
            let id = wait_for_id(path, timeout)?;
            return Self::new(id, device, rank, world_size, timeout);
        }
        if path.exists() {
            bail!(
                "{} exists: it is from another run, remove it or choose another path",
                path.display()
            )
        }
        let id = NcclId::new()?;
        // Renamed, so that no rank reads half of it.
        let draft = draft(path)?;
        std::fs::write(&draft, id.to_string()).map_err(|e| Error::from(e).with_path(&draft))?;
        std::fs::rename(&draft, path).map_err(|e| Error::from(e).with_path(path))?;
        let joined = Self::new(id, device, rank, world_size, timeout);
        let removed = std::fs::remove_file(path).map_err(Error::wrap);
        let joined = joined?;
        removed?;
        Ok(joined)
    }
}

fn wait_for_id(path: &Path, timeout: Duration) -> Result<NcclId> {
    let deadline = Instant::now() + timeout;
    loop {
        match std::fs::read_to_string(path) {
            Ok(text) => return text.parse(),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::wrap(error))
            }
            Err(_) if Instant::now() > deadline => {
                bail!("rank 0 left no id at {} within {timeout:?}", path.display())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce(&self, tensor: Tensor, op: ReduceOp) -> Result<Tensor> {
        let ours = Device::Cuda(self.device.clone());
        if tensor.device().location() != ours.location() {
            bail!(
                "rank {}: the communicator is of {:?}, the tensor on {:?}",
                self.rank,
                ours.location(),
                tensor.device().location()
            )
        }
        let tensor = tensor.contiguous()?;
        let mut live = self.live.lock().unwrap_or_else(|e| e.into_inner());
        let Some(at_work) = live.as_mut() else {
            bail!("rank {}: the communicator has failed before", self.rank)
        };
        let reduced = tensor.inplace_op1(&AllReduce {
            live: at_work,
            op,
            deadline: Instant::now() + self.timeout,
        });
        if let Err(error) = reduced {
            if let Some(failed) = live.take() {
                failed.abort();
            }
            // A kernel that the abort did not end may still write to it.
            std::mem::forget(tensor);
            bail!(
                "rank {} of {}: all-reduce failed, a rank is gone or did not come within {:?}: {error}",
                self.rank,
                self.world_size,
                self.timeout
            )
        }
        Ok(tensor)
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        let live = self.live.get_mut().unwrap_or_else(|e| e.into_inner());
        if let Some(live) = live.take() {
            live.close(self.timeout.min(Duration::from_secs(10)));
        }
    }
}

/// The part of NCCL's configuration that its version 2.14 had; later ones take it by its size and version.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: i32,
}

/// A communicator that works.
struct Live {
    comm: nccl::ncclComm_t,
    /// NCCL launches from threads of its own, where Candle's per-thread stream is another one.
    stream: cuda::CUstream,
    context: Arc<CudaContext>,
}

// SAFETY: NCCL's communicators and CUDA's streams are of the process, not of a thread; the mutex around this lets one
// thread use them at a time.
unsafe impl Send for Live {}

impl Live {
    fn new(
        id: NcclId,
        device: &CudaDevice,
        rank: i32,
        ranks: i32,
        timeout: Duration,
    ) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let context = device.cuda_stream().context().clone();
        context.bind_to_thread().w()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).w()?;
        let mut live = Self {
            comm: std::ptr::null_mut(),
            stream,
            context,
        };
        let mut config = Config {
            size: std::mem::size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21400,
            blocking: 0,
        };
        // SAFETY: NCCL reads as many bytes of the configuration as its first field says.
        let status = unsafe {
            nccl::ncclCommInitRankConfig(
                &mut live.comm,
                ranks,
                id.to_nccl(),
                rank,
                (&raw mut config).cast(),
            )
        };
        let joined = check("join the ranks", status)
            .and_then(|()| live.wait("join the ranks", deadline, || Ok(true)));
        match joined {
            Ok(()) => Ok(live),
            Err(error) => {
                live.abort();
                bail!("rank {rank} of {ranks} did not join within {timeout:?}: {error}")
            }
        }
    }

    /// Waits until NCCL has nothing in progress and `done`.
    fn wait(&self, what: &str, deadline: Instant, done: impl Fn() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            let mut status = Status::ncclSuccess;
            // SAFETY: the communicator lives; NCCL writes one status.
            let asked = unsafe { nccl::ncclCommGetAsyncError(self.comm, &mut status) };
            check(what, asked)?;
            check(what, status)?;
            if status != Status::ncclInProgress && done()? {
                return Ok(());
            }
            let now = Instant::now();
            if now > deadline {
                bail!("cannot {what}: no end in time")
            }
            // Small messages take some 20 us; larger work need not burn a core.
            match now - start < Duration::from_millis(1) {
                true => std::hint::spin_loop(),
                false => std::thread::sleep(Duration::from_micros(20)),
            }
        }
    }

    /// Leaves the other ranks in order, or, where that takes too long, without.
    fn close(self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        // SAFETY: no call is under way, every all-reduce has ended.
        let status = unsafe { nccl::ncclCommFinalize(self.comm) };
        let closed =
            check("finalize", status).and_then(|()| self.wait("finalize", deadline, || Ok(true)));
        match closed {
            Ok(()) => {
                // SAFETY: finalized, and not used again; nor is the stream.
                let _ = unsafe { nccl::ncclCommDestroy(self.comm) };
                let _ = unsafe { result::stream::destroy(self.stream) };
            }
            Err(_) => self.abort(),
        }
    }

    /// Ends what is under way. Bounded: an abort that hangs is left behind in its thread.
    fn abort(self) {
        let (ended, end) = mpsc::channel();
        std::thread::spawn(move || {
            let live = self;
            if live.context.bind_to_thread().is_ok() && !live.comm.is_null() {
                // SAFETY: not used again.
                let _ = unsafe { nccl::ncclCommAbort(live.comm) };
            }
            // SAFETY: the driver destroys a stream once its work is done.
            let _ = unsafe { result::stream::destroy(live.stream) };
            let _ = ended.send(());
        });
        let _ = end.recv_timeout(Duration::from_secs(5));
    }
}

/// Replaces a tensor by the result, and waits for it.
struct AllReduce<'a> {
    live: &'a Live,
    op: ReduceOp,
    deadline: Instant,
}

impl InplaceOp1 for AllReduce<'_> {
    fn name(&self) -> &'static str {
        "nccl-all-reduce"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("NCCL needs a tensor on a GPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let stream = storage.device.cuda_stream();
        self.live.context.bind_to_thread().w()?;
        let (start, count) = (layout.start_offset(), layout.shape().elem_count());
        let op = match self.op {
            ReduceOp::Max => nccl::ncclRedOp_t::ncclMax,
            ReduceOp::Sum => nccl::ncclRedOp_t::ncclSum,
        };
        let reduce = |address: u64, dtype| {
            // SAFETY: Candle's stream and ours are alive; `count` numbers lie at the address, which nobody else uses
            // until this returns or, on an error, for ever.
            unsafe {
                let before = Event::record(stream.cu_stream())?;
                let flags = cuda::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                result::stream::wait_event(self.live.stream, before.0, flags).w()?;
                let status = nccl::ncclAllReduce(
                    address as *const _,
                    address as *mut _,
                    count,
                    dtype,
                    op,
                    self.live.comm,
                    self.live.stream as nccl::cudaStream_t,
                );
                check("all-reduce", status)?;
                self.live
                    .wait("launch an all-reduce", self.deadline, || Ok(true))?;
                let after = Event::record(self.live.stream)?;
                self.live
                    .wait("end an all-reduce", self.deadline, || after.reached())
            }
        };
        match &mut storage.slice {
            CudaStorageSlice::F32(slice) => {
                let (address, _written) = slice.device_ptr_mut(&stream);
                reduce(
                    address + 4 * start as u64,
                    nccl::ncclDataType_t::ncclFloat32,
                )
            }
            CudaStorageSlice::F64(slice) => {
                let (address, _written) = slice.device_ptr_mut(&stream);
                reduce(
                    address + 8 * start as u64,
                    nccl::ncclDataType_t::ncclFloat64,
                )
            }
            _ => bail!("an all-reduce is of f32 or f64 numbers"),
        }
    }
}
