//! Checks that the divergences share.

use crate::Options;
use candle_core::{bail, Result};

/// # Errors
/// Options that a divergence has no use for.
pub(super) fn ruled_out(options: &Options) -> Result<()> {
    if options.z_loss_weight != 0. {
        bail!(
            "a divergence has no z-loss, got z_loss_weight {}: objectives::squared_lse makes one of an lse",
            options.z_loss_weight
        )
    }
    if options.vocab_parallel.is_some() {
        bail!("a divergence is over the classes of one classifier, got the shard of a vocab_parallel one")
    }
    Ok(())
}

/// # Errors
/// It is none.
pub(super) fn temperature(temperature: f64) -> Result<()> {
    if !(temperature > 0. && (temperature as f32).is_normal()) {
        bail!("temperature must be positive and finite, as an f32 too, got {temperature}")
    }
    Ok(())
}
