//! A forward outside of any graph, for nodes that are more than the loss.

use super::contract::{Forward, KeptTiles, Wanted};
use super::dispatch::Choice;
use crate::matrices::Matrices;
use crate::native;
use crate::problem::Problem;
use candle_core::{CpuStorage, Device, Result, Tensor};
use std::sync::Arc;

/// The matrices are outside of the user's graph. Label smoothing is not added, as the graph of the loss does.
pub(crate) fn forward(
    problem: &Problem,
    matrices: Matrices<&Tensor>,
    wanted: Wanted,
) -> Result<Forward<Tensor>> {
    let kept = Arc::new(KeptTiles::default());
    match Choice::new(problem)? {
        Choice::Cpu => matrices.read::<CpuStorage, _>(|views| {
            let Forward { packed, left } = native::on_cpu(problem, views, wanted, &kept)?;
            let packed = Tensor::new(packed, &Device::Cpu)?;
            Ok(Forward { packed, left })
        }),
        Choice::Kernels => with_kernels(problem, matrices, wanted, &kept),
        Choice::TensorOperations => native::in_tensors(problem, matrices, &kept),
    }
}

#[cfg(feature = "cuda")]
fn with_kernels(
    problem: &Problem,
    matrices: Matrices<&Tensor>,
    wanted: Wanted,
    kept: &Arc<KeptTiles>,
) -> Result<Forward<Tensor>> {
    use candle_core::op::BackpropOp;
    use candle_core::{CudaStorage, Storage};
    matrices.read::<CudaStorage, _>(|views| {
        let Forward { packed, left } = crate::cuda::forward(problem, views, wanted, kept)?;
        let len = super::packed::Packed::of(problem).len();
        let storage = Storage::Cuda(packed);
        let packed = Tensor::from_storage(storage, len, BackpropOp::none(), false);
        Ok(Forward { packed, left })
    })
}

#[cfg(not(feature = "cuda"))]
fn with_kernels(
    _: &Problem,
    _: Matrices<&Tensor>,
    _: Wanted,
    _: &Arc<KeptTiles>,
) -> Result<Forward<Tensor>> {
    candle_core::bail!("no kernels without the feature `cuda`")
}
