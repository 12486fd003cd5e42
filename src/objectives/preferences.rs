//! Objectives over pairs of answers of which one is preferred.

use super::{at_least_zero, positive, same_shape, softplus, wide};
use candle_core::{bail, Result, Tensor};

/// The log-probabilities, `(B)` each, that one model gives to pairs of answers.
///
/// Which log-probabilities, the objective says: sums over the tokens ([`sequence_log_probs`](super::sequence_log_probs))
/// or means ([`mean_log_probs`](super::mean_log_probs)).
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
    positive("beta", beta)?;
    logistic(&(margin_over(policy, reference)? * beta)?)
}

/// The loss of identity preference optimisation, a scalar: the mean over the pairs of `(h - 1 / (2 beta))^2` with
/// `h = (chosen - rejected) - (reference chosen - reference rejected)`.
///
/// It draws the margin `h` to a value where DPO draws it to infinity. `beta` (`tau` in the paper, often 0.1) is how much
/// staying close to the reference weighs. The paper has sums of log-probabilities
/// ([`sequence_log_probs`](super::sequence_log_probs)); TRL takes means ([`mean_log_probs`](super::mean_log_probs)), so that
/// the margin does not depend on the length. Those of the reference model should be detached.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::{ipo_loss, Preferences};
/// # fn main() -> candle_core::Result<()> {
/// let tensor = |x: f32| Tensor::new(&[x], &Device::Cpu);
/// let (chosen, rejected) = (tensor(-1.)?, tensor(-2.)?);
/// let policy = Preferences { chosen: &chosen, rejected: &rejected };
/// let reference = Preferences { chosen: &rejected, rejected: &rejected };
/// // The margin is 1, which beta = 0.5 asks for.
/// assert_eq!(ipo_loss(policy, reference, 0.5)?.to_scalar::<f32>()?, 0.);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`dpo_loss`].
///
/// Source: Azar et al., *A General Theoretical Paradigm to Understand Learning from Human Preferences*,
/// [arXiv 2310.12036](https://arxiv.org/abs/2310.12036), equation 17.
pub fn ipo_loss(policy: Preferences<'_>, reference: Preferences<'_>, beta: f64) -> Result<Tensor> {
    positive("beta", beta)?;
    (margin_over(policy, reference)? - 1. / (2. * beta))?
        .sqr()?
        .mean_all()
}

/// The loss of contrastive preference optimisation, a scalar: the mean over the pairs of
/// `-log sigmoid(beta (chosen - rejected)) - alpha chosen`.
///
/// It is DPO without a reference model, and the negative log-likelihood of the chosen answers instead. The
/// log-probabilities come from [`sequence_log_probs`](super::sequence_log_probs). The paper has `beta` 0.1 and `alpha` 1. With
/// `alpha` 0 the likelihood is left out: to be added with another average, such as that of
/// [`Output::loss`](crate::Output::loss).
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::{cpo_loss, Preferences};
/// # fn main() -> candle_core::Result<()> {
/// let answers = Tensor::new(&[-10f32, -12.], &Device::Cpu)?;
/// let policy = Preferences { chosen: &answers, rejected: &answers };
/// let loss = cpo_loss(policy, 0.1, 1.)?.to_scalar::<f32>()?;
/// assert!((loss - (2f32.ln() + 11.)).abs() < 1e-5);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Shapes that differ, no pairs, a `beta` that is not positive and finite, an `alpha` that is negative or not finite.
///
/// Source: Xu et al., *Contrastive Preference Optimization*,
/// [arXiv 2401.08417](https://arxiv.org/abs/2401.08417).
pub fn cpo_loss(policy: Preferences<'_>, beta: f64, alpha: f64) -> Result<Tensor> {
    positive("beta", beta)?;
    at_least_zero("alpha", alpha)?;
    let (chosen, rejected) = pairs(policy)?;
    let preference = logistic(&((&chosen - rejected)? * beta)?)?;
    preference - (chosen.mean_all()? * alpha)?
}

/// The loss of simple preference optimisation, a scalar: the mean over the pairs of
/// `-log sigmoid(beta (chosen - rejected) - gamma)`.
///
/// The log-probabilities are means, from [`mean_log_probs`](super::mean_log_probs); there is no reference model. The authors'
/// settings have `beta` from 2 to 10 and `gamma`, the margin that is asked for, from 0.3 to 5.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::{simpo_loss, Preferences};
/// # fn main() -> candle_core::Result<()> {
/// let tensor = |x: f32| Tensor::new(&[x], &Device::Cpu);
/// let (chosen, rejected) = (tensor(-1.)?, tensor(-2.)?);
/// let policy = Preferences { chosen: &chosen, rejected: &rejected };
/// let loss = simpo_loss(policy, 2., 2.)?.to_scalar::<f32>()?;
/// assert!((loss - 2f32.ln()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Shapes that differ, no pairs, a `beta` that is not positive and finite, a `gamma` that is negative or not finite.
///
/// Source: Meng et al., *SimPO*, [arXiv 2405.14734](https://arxiv.org/abs/2405.14734). TRL's `simpo_gamma`
/// is this `gamma`.
pub fn simpo_loss(policy: Preferences<'_>, beta: f64, gamma: f64) -> Result<Tensor> {
    positive("beta", beta)?;
    at_least_zero("gamma", gamma)?;
    let (chosen, rejected) = pairs(policy)?;
    logistic(&(((chosen - rejected)? * beta)? - gamma)?)
}

/// The loss of odds ratio preference optimisation, a scalar: the mean over the pairs of
/// `-chosen - lambda log sigmoid(log_odds(chosen) - log_odds(rejected))` with `log_odds(x) = x - log(1 - e^x)`.
///
/// The first part is the negative log-likelihood of the chosen answers: tuning and preferences are learnt at once, without a
/// reference model. The log-probabilities are means, from [`mean_log_probs`](super::mean_log_probs). `lambda` is often 0.1;
/// TRL calls it `beta`, and takes the likelihood over the tokens of the batch, the prompts' included.
///
/// The gradient grows as `1 / (1 - e^rejected)` where a rejected answer is nearly certain. A log-probability above `-2^-100`
/// has the log-odds of that bound, 69.3, and gets no gradient through them, so that loss and gradient are finite for a
/// probability of 1 too.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::objectives::{orpo_loss, Preferences};
/// # fn main() -> candle_core::Result<()> {
/// let answers = Tensor::new(&[-1f32, -2.], &Device::Cpu)?;
/// let policy = Preferences { chosen: &answers, rejected: &answers };
/// let loss = orpo_loss(policy, 0.1)?.to_scalar::<f32>()?;
/// assert!((loss - (1.5 + 0.1 * 2f32.ln())).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Shapes that differ, no pairs, a `lambda` that is negative or not finite.
///
/// Source: Hong et al., *ORPO*, [arXiv 2403.07691](https://arxiv.org/abs/2403.07691), equations 4 and 7.
pub fn orpo_loss(policy: Preferences<'_>, lambda: f64) -> Result<Tensor> {
    at_least_zero("lambda", lambda)?;
    let (chosen, rejected) = pairs(policy)?;
    let ratio = logistic(&(log_odds(&chosen)? - log_odds(&rejected)?)?)?;
    (ratio * lambda)? - chosen.mean_all()?
}

/// The policy's log-probabilities, chosen and rejected.
fn pairs(policy: Preferences<'_>) -> Result<(Tensor, Tensor)> {
    let shape = policy.chosen.dims();
    if policy.chosen.elem_count() == 0 {
        bail!("empty input: policy.chosen {shape:?}")
    }
    same_shape("policy.rejected", policy.rejected, "policy.chosen", shape)?;
    Ok((wide(policy.chosen)?, wide(policy.rejected)?))
}

/// How much more the policy prefers the chosen answers than the reference does.
fn margin_over(policy: Preferences<'_>, reference: Preferences<'_>) -> Result<Tensor> {
    let (chosen, rejected) = pairs(policy)?;
    for (name, tensor) in [
        ("reference.chosen", reference.chosen),
        ("reference.rejected", reference.rejected),
    ] {
        same_shape(name, tensor, "policy.chosen", chosen.dims())?;
    }
    (chosen - rejected)? - (wide(reference.chosen)? - wide(reference.rejected)?)?
}

/// The mean of `-log sigmoid(margin)`.
fn logistic(margin: &Tensor) -> Result<Tensor> {
    softplus(&margin.neg()?)?.mean_all()
}

/// `log(p / (1 - p))` of `x = log p`, where `x` is at most `-2^-100`.
fn log_odds(x: &Tensor) -> Result<Tensor> {
    let bound = -(2f64.powi(-100));
    let x = &x
        .ge(bound)?
        .where_cond(&x.zeros_like()?.affine(1., bound)?, x)?;
    // 1 - e^x = -tanh(x / 2) (1 + e^x), where nothing cancels.
    let tanh = (x * -0.5)?.tanh()?;
    x - (tanh.log()? + (x.exp()? + 1.)?.log()?)?
}
