//! The implementation without a GPU's kernels: on the CPU, matrix products with the passes between
//! them fused in; on any other device, Candle tensor operations over blocks of rows and classes.
//!
//! Both need to know on the host which positions count, so on a GPU the targets are waited for once a
//! call.

mod cpu;
mod rows;
mod tensor;
#[cfg(test)]
mod tests;
mod workspace;

pub(crate) use cpu::{Element, Real};

use crate::matrices::{Matrices, View};
use crate::op::contract::{Forward, KeptTiles, Wanted};
use crate::problem::Problem;
use candle_core::{CpuStorage, Result, Tensor};
pub(crate) use rows::HostRows;
use std::sync::Arc;

/// In main memory; the packed vector is one of numbers.
pub(crate) fn on_cpu(
    problem: &Problem,
    matrices: Matrices<View<'_, CpuStorage>>,
    wanted: Wanted,
    kept: &Arc<KeptTiles>,
) -> Result<Forward<Vec<f32>>> {
    cpu::forward(problem, matrices, HostRows::new(problem)?, wanted, kept)
}

/// On any device; the matrices are outside of the user's graph.
pub(crate) fn in_tensors(
    problem: &Problem,
    matrices: Matrices<&Tensor>,
    kept: &Arc<KeptTiles>,
) -> Result<Forward<Tensor>> {
    tensor::forward(problem, matrices, HostRows::new(problem)?, kept)
}
