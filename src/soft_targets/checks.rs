//! Checks that the divergences share.

use crate::devices::same_device;
use crate::Options;
use candle_core::{bail, DType, Result, Tensor};

/// # Errors
/// Options that a divergence has no use for.
pub(super) fn ruled_out(options: &Options) -> Result<()> {
    if options.z_loss_weight != 0. {
        bail!(
            "a divergence has no z-loss, got z_loss_weight {}: objectives::squared_lse makes one of an lse",
            options.z_loss_weight
        )
    }
    if options.entropy_bonus != 0. {
        bail!(
            "a divergence has no entropy bonus, got entropy_bonus {}: the entropy of linear_cross_entropy is differentiable",
            options.entropy_bonus
        )
    }
    if options.label_smoothing != 0. {
        bail!(
            "a divergence smooths no labels, got label_smoothing {}",
            options.label_smoothing
        )
    }
    if options.class_weights.is_some() {
        bail!("a divergence takes no class_weights, as it does not learn the targets: token_weights weigh its positions")
    }
    if options.adapter.is_some() {
        bail!("a divergence takes no adapter: hand it the classifier with the adapter in it")
    }
    if options.vocab_parallel.is_some() {
        bail!("a divergence takes no vocab_parallel: it needs all classes of the classifier, got a shard of them")
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

/// # Errors
/// Classes of another dtype or on another device than class numbers are.
pub(super) fn classes(classes: &Tensor, embeddings: &Tensor) -> Result<()> {
    if !matches!(classes.dtype(), DType::U32 | DType::I64 | DType::I32) {
        bail!("classes must be u32, i64 or i32, got {:?}", classes.dtype())
    }
    same_device("classes", classes, "embeddings", embeddings)
}
