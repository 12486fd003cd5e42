//! Objectives over pairs of answers of which one is preferred.

use super::{same_shape, wide};
use candle_core::{bail, Result, Tensor};

/// The log-probabilities, `(B)` each, that one model gives to pairs of answers.
#[derive(Debug, Clone, Copy)]
pub struct Preferences<'a> {
    /// Of the answers that were preferred.
    pub chosen: &'a Tensor,
    /// Of the others.
    pub rejected: &'a Tensor,
}

/// The loss of direct preference optimisation, a scalar: the mean over the pairs of
/// `-log sigmoid(beta ((chosen - rejected) - (reference chosen - reference rejected)))`.
///
/// The log-probabilities come from [`sequence_log_probs`](super::sequence_log_probs); those of the reference model should be
/// detached. `beta` (often 0.1) weighs staying close to it.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::{dpo_loss, Preferences};
/// # fn main() -> candle_core::Result<()> {
/// // Log-probabilities of the chosen and rejected half of a batch.
/// let policy = Tensor::new(&[-10f32, -12., -11., -12.], &Device::Cpu)?;
/// let (chosen, rejected) = (policy.narrow(0, 0, 2)?, policy.narrow(0, 2, 2)?);
/// let policy = Preferences { chosen: &chosen, rejected: &rejected };
/// // A policy that is its reference has loss ln 2.
/// let loss = dpo_loss(policy, policy, 0.1)?.to_scalar::<f32>()?;
/// assert!((loss - 2f32.ln()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Shapes that differ, no pairs, a `beta` that is not positive and finite.
///
/// Source: Rafailov et al., *Direct Preference Optimization*,
/// [arXiv 2305.18290](https://arxiv.org/abs/2305.18290), equation 7.
pub fn dpo_loss(policy: Preferences<'_>, reference: Preferences<'_>, beta: f64) -> Result<Tensor> {
    if !(beta > 0. && beta.is_finite()) {
        bail!("beta must be positive and finite, got {beta}")
    }
    let shape = policy.chosen.dims();
    if policy.chosen.elem_count() == 0 {
        bail!("empty input: policy.chosen {shape:?}")
    }
    for (name, tensor) in [
        ("policy.rejected", policy.rejected),
        ("reference.chosen", reference.chosen),
        ("reference.rejected", reference.rejected),
    ] {
        same_shape(name, tensor, "policy.chosen", shape)?;
    }
    let margin = |of: Preferences<'_>| wide(of.chosen)? - wide(of.rejected)?;
    let (policy, reference) = (margin(policy)?, margin(reference)?);
    softplus(&((policy - reference)? * -beta)?)?.mean_all()
}

/// `log(1 + e^x)`, whose gradient is the sigmoid for every `x`.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let larger = x.detach().relu()?;
    let one = larger.neg()?.exp()?;
    (one + (x - &larger)?.exp()?)?.log()? + larger
}
