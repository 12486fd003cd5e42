//! The CUDA kernels: which can run, what they are launched on, and their workspace.
//!
//! Nothing here waits for the device unless targets are checked. How many rows count, which tiles the filter keeps and what
//! the upstream gradient is stay there; launches are sized for the most there can be, and blocks without work leave at once.
//!
//! The matrix products come in two forms, [`portable`] and [`hopper`]; everything around them is the same.

mod adapter;
mod averages;
mod backward;
mod between;
mod call;
pub(crate) mod class_logits;
pub(crate) mod divergence;
mod filter;
mod forward;
mod fused;
mod hopper;
mod launch;
mod logits;
mod operands;
#[cfg(feature = "models")]
pub(crate) mod ops;
mod outputs;
#[cfg_attr(not(feature = "models"), allow(dead_code))]
mod params;
mod portable;
mod prepared;
mod room;
mod rows;
pub(crate) mod scale;
mod shards;
pub(crate) mod smoothing;
mod sort;
mod tensor_map;
mod terms;
mod write;

pub(crate) use forward::forward;

use crate::problem::Problem;
use crate::Entropy;
use candle_core::{DType, Device, Result};
use launch::Gpu;

/// Why the kernels cannot run on this problem, if they cannot.
pub(crate) fn unsupported(problem: &Problem) -> Result<Option<String>> {
    let location = problem.device.location();
    let Device::Cuda(device) = &problem.device else {
        return Ok(Some(format!("the inputs are on {location:?}")));
    };
    let dtype = problem.dtype;
    if !matches!(dtype, DType::BF16 | DType::F16 | DType::F32) {
        return Ok(Some(format!("there are none for {dtype:?}")));
    }
    let (major, minor) = Gpu::new(device).compute_capability()?;
    if major < 8 {
        return Ok(Some(format!(
            "they need compute capability 8.0, this GPU has {major}.{minor}"
        )));
    }
    let settings = &problem.settings;
    let more = settings.predicted || settings.entropy != Entropy::Off;
    if more && settings.vocab_parallel.is_some() {
        return Ok(Some(
            "they compute no entropy and no predicted classes over shards of the classes"
                .to_owned(),
        ));
    }
    Ok(None)
}
