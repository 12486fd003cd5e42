//! What the CPU forms of the operations share.

use crate::native::Real;
use candle_core::{bail, CpuStorage, Layout, Result, Shape, Storage, Tensor, WithDType};
use rayon::prelude::*;

/// Numbers that a task has at least.
const TASK: usize = 1 << 14;

/// f32 or f64.
pub(crate) trait Number: Real + WithDType {}
impl Number for f32 {}
impl Number for f64 {}

/// The values of a storage from where a layout begins.
pub(crate) fn values<'a, R: Number>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [R]> {
    let values = <R as WithDType>::cpu_storage_as_slice(storage)?;
    Ok(&values[layout.start_offset()..])
}

/// Runs `with` on the storages and layouts of tensors on the CPU.
pub(crate) fn opened<const N: usize, O>(
    tensors: [&Tensor; N],
    with: impl FnOnce([(&CpuStorage, &Layout); N]) -> Result<O>,
) -> Result<O> {
    let opened = tensors.map(Tensor::storage_and_layout);
    let mut all = Vec::with_capacity(N);
    for (storage, layout) in &opened {
        match &**storage {
            Storage::Cpu(storage) => all.push((storage, *layout)),
            other => bail!(
                "expected a tensor on the CPU, got one on {:?}",
                other.device().location()
            ),
        }
    }
    match all.try_into() {
        Ok(all) => with(all),
        Err(_) => bail!("{N} tensors"),
    }
}

pub(super) fn tensor<R: Number>(values: Vec<R>, shape: &Shape) -> Tensor {
    let storage = Storage::Cpu(storage(values));
    let none = candle_core::op::BackpropOp::none();
    Tensor::from_storage(storage, shape.clone(), none, false)
}

pub(super) fn storage<R: Number>(values: Vec<R>) -> CpuStorage {
    <R as WithDType>::to_cpu_storage_owned(values)
}

pub(crate) fn real<R: Number>(x: f64) -> R {
    <R as Real>::from_f64(x)
}

/// Runs `f` on rows of `columns` numbers of an output, on all threads, some rows at a time: their numbers and the index of
/// the first, in the vector instructions of the machine at hand.
pub(super) fn rows<R: Number>(
    out: &mut [R],
    columns: usize,
    f: impl Fn(usize, &mut [R]) + Send + Sync,
) {
    let rows = TASK.div_ceil(columns);
    let task = |(i, chunk): (usize, &mut [R])| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                for (row, out) in chunk.chunks_mut(columns).enumerate() {
                    f(i * rows + row, out)
                }
            },
        )
    };
    out.par_chunks_mut(rows * columns)
        .enumerate()
        .for_each(task);
}

/// Like [`rows`], for two outputs of the same size.
pub(super) fn two_rows<R: Number>(
    [first, second]: [&mut [R]; 2],
    columns: usize,
    f: impl Fn(usize, &mut [R], &mut [R]) + Send + Sync,
) {
    let rows = TASK.div_ceil(columns);
    let chunks = first.par_chunks_mut(rows * columns);
    let chunks = chunks.zip(second.par_chunks_mut(rows * columns));
    chunks.enumerate().for_each(|(i, (first, second))| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let both = first.chunks_mut(columns).zip(second.chunks_mut(columns));
                for (row, (first, second)) in both.enumerate() {
                    f(i * rows + row, first, second)
                }
            },
        )
    });
}

/// The sum of `f(i)` in a fixed number of lanes.
#[inline(always)]
pub(super) fn sum<R: Number>(count: usize, f: impl Fn(usize) -> R) -> R {
    const LANES: usize = 16;
    let mut lanes = [R::default(); LANES];
    let whole = count / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
    }
    let mut total = R::default();
    for lane in lanes {
        total += lane;
    }
    for i in whole..count {
        total += f(i);
    }
    total
}
