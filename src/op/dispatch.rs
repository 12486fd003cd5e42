//! The choice among the implementations.

use crate::problem::Problem;
use crate::Implementation;
use candle_core::{bail, Device, Result};

/// What can compute a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// The CUDA kernels.
    Kernels,
    /// The native implementation for the CPU.
    Cpu,
    /// The native implementation in Candle tensor operations.
    TensorOperations,
}

impl Choice {
    pub fn new(problem: &Problem) -> Result<Self> {
        if problem.settings.implementation != Implementation::Native {
            match no_kernels(problem)? {
                None => return Ok(Self::Kernels),
                Some(_) if problem.settings.implementation == Implementation::Auto => {}
                Some(why) => bail!(
                    "Implementation::{:?}: the CUDA kernels cannot run: {why}",
                    problem.settings.implementation
                ),
            }
        }
        Ok(match problem.device {
            Device::Cpu => Self::Cpu,
            _ => Self::TensorOperations,
        })
    }
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
        problem.device.location()
    )))
}
