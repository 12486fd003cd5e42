//! Whether tensors are on one device.

use candle_core::{bail, Result, Tensor};

/// # Errors
/// They are on two: both are named.
pub(crate) fn same_device(name: &str, tensor: &Tensor, other: &str, of: &Tensor) -> Result<()> {
    if !tensor.device().same_device(of.device()) {
        bail!(
            "{name} must be on the device of {other}, {:?}, got {:?}",
            of.device().location(),
            tensor.device().location()
        )
    }
    Ok(())
}
