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

use crate::op::contract::{Forward, KeptTiles, Wanted};
use crate::problem::Problem;
use candle_core::Result;
use rows::HostRows;
use std::sync::Arc;

pub(crate) fn forward(problem: &Problem, wanted: Wanted, kept: &Arc<KeptTiles>) -> Result<Forward> {
    let rows = HostRows::new(problem)?;
    if problem.embeddings.device().is_cpu() {
        cpu::forward(problem, rows, wanted, kept.clone())
    } else {
        tensor::forward(problem, rows, kept.clone())
    }
}
