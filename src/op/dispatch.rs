//! The choice among the implementations.

use super::contract::{Forward, KeptTiles, Wanted};
use crate::native;
use crate::problem::Problem;
use crate::Implementation;
use candle_core::{bail, Result};
use std::sync::Arc;

pub(super) fn forward(problem: &Problem, wanted: Wanted, kept: &Arc<KeptTiles>) -> Result<Forward> {
    if problem.settings.implementation != Implementation::Native {
        match no_kernels(problem)? {
            #[cfg(feature = "cuda")]
            None => return crate::cuda::forward(problem, wanted, kept),
            Some(_) if problem.settings.implementation == Implementation::Auto => {}
            Some(why) => bail!(
                "Implementation::{:?}: the CUDA kernels cannot run: {why}",
                problem.settings.implementation
            ),
            #[cfg(not(feature = "cuda"))]
            None => {}
        }
    }
    native::forward(problem, wanted, kept)
}

/// Why the CUDA kernels cannot run, if they cannot.
#[cfg(feature = "cuda")]
fn no_kernels(problem: &Problem) -> Result<Option<String>> {
    crate::cuda::unsupported(problem)
}

/// Why the CUDA kernels cannot run.
#[cfg(not(feature = "cuda"))]
fn no_kernels(problem: &Problem) -> Result<Option<String>> {
    Ok(Some(format!(
        "this program was built without the feature `cuda`, and the inputs are on {:?}",
        problem.embeddings.device().location()
    )))
}
