//! The implementation in Candle's own terms: tensor operations over blocks of rows and classes.
//!
//! It needs to know on the host which positions count, so on a GPU it waits for the targets once a call.

mod rows;
mod tensor;

use crate::op::{Forward, KeptTiles, Wanted};
use crate::problem::Problem;
use candle_core::Result;
use std::sync::Arc;

pub(crate) const DEFAULT_WORKSPACE: usize = 64 << 20;

pub(crate) fn forward(
    problem: &Problem,
    _wanted: Wanted,
    kept: &Arc<KeptTiles>,
) -> Result<Forward> {
    let rows = rows::Rows::new(problem)?;
    tensor::forward(problem, rows, kept.clone())
}
