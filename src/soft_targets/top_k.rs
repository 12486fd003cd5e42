//! A teacher that names the likeliest classes of each position.

use super::checks;
use super::class_logits::Chosen;
use super::loss_and_logits::LossAndLogits;
use crate::devices::same_device;
use crate::objectives::counted;
use crate::op::contract::accumulator;
use crate::positions::to_i64;
use crate::problem::Problem;
use crate::terms::{Weights, LEAST_REST};
use crate::{Entropy, Options, Reduction};
use candle_core::{bail, DType, Result, Tensor, D};

/// What becomes of the probability that a [`TopK`] teacher gives to the classes it does not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rest {
    /// The other classes are one more class, of probability `1 - sum_k q_k`, and so they are to the student. The
    /// divergence of two distributions over `k + 1` classes: at least 0, and 0 only where the student agrees.
    #[default]
    OneClass,
    /// The named probabilities are divided by their sum. The student learns to give the other classes none.
    Renormalized,
    /// The probabilities are used as they are, and the others' is left out: the terms of the divergence over all classes
    /// that are known.
    LeftOut,
}

/// The `k` classes that a teacher finds likeliest at each position, and their probabilities.
///
/// `classes`, of shape `(.., k)` in u32, i64 or i32, are distinct at a position. `probabilities` have the same shape, in
/// any floating-point dtype. They belong to the positions of the embeddings: position `t` is what the teacher says where
/// the student's embedding is that of `t`, whatever the shift; the last `shift` are not read, nor are those of positions
/// that are ignored.
///
/// ```
/// # use candle_core::{Device, Tensor, D};
/// use candle_cut_cross_entropy::soft_targets::{Rest, TopK};
/// # fn main() -> candle_core::Result<()> {
/// # let logits = Tensor::randn(0f32, 1., (2, 16, 1000), &Device::Cpu)?;
/// // From logits (.., V) of the teacher, at a temperature of 2.
/// let probabilities = candle_nn::ops::softmax(&(logits / 2.)?, D::Minus1)?;
/// let order = probabilities.arg_sort_last_dim(false)?;
/// let classes = order.narrow(D::Minus1, 0, 8)?.contiguous()?;
/// let probabilities = probabilities.gather(&classes, D::Minus1)?;
/// let teacher = TopK::new(&classes, &probabilities).rest(Rest::OneClass).temperature(2.);
/// # let _ = teacher;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct TopK {
    classes: Tensor,
    probabilities: Tensor,
    rest: Rest,
    temperature: f64,
}

impl TopK {
    /// These classes and probabilities, the rest as one class, at a temperature of 1. No gradient reaches the
    /// probabilities.
    pub fn new(classes: &Tensor, probabilities: &Tensor) -> Self {
        Self {
            classes: classes.clone(),
            probabilities: probabilities.detach(),
            rest: Rest::default(),
            temperature: 1.,
        }
    }

    /// What becomes of the other classes' probability. Default: [`Rest::OneClass`].
    pub fn rest(mut self, rest: Rest) -> Self {
        self.rest = rest;
        self
    }

    /// The temperature that the probabilities were made at: the student's logits are divided by it. Default: 1.
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    fn check(&self, embeddings: &Tensor, targets: &Tensor) -> Result<()> {
        let (classes, probabilities) = (&self.classes, &self.probabilities);
        match classes.dims() {
            [positions @ .., _] if positions == targets.dims() => {}
            dims => bail!(
                "classes of the teacher must have shape (.., k) to match targets {:?}, got {dims:?}",
                targets.dims()
            ),
        }
        if probabilities.dims() != classes.dims() {
            bail!(
                "probabilities of the teacher must have the shape of its classes, {:?}, got {:?}",
                classes.dims(),
                probabilities.dims()
            )
        }
        if !probabilities.dtype().is_float() {
            bail!(
                "probabilities of the teacher must be of a floating-point dtype, got {:?}",
                probabilities.dtype()
            )
        }
        checks::classes(classes, embeddings)?;
        same_device("probabilities", probabilities, "embeddings", embeddings)?;
        checks::temperature(self.temperature)
    }

    /// What it says of the positions that count.
    fn said(&self, problem: &Problem, targets: &Tensor, options: &Options) -> Result<Said> {
        let shift = options.shift;
        let counted = counted(targets, options)?;
        let each = counted.unsqueeze(D::Minus1)?;
        let each = each.broadcast_as(predicting(&self.classes, shift)?.shape())?;
        let at = Positions::new(problem, each, counted)?;
        let classes = at.values(&to_i64(&self.classes)?)?;
        let mut said = Said {
            classes: match shift {
                0 => classes,
                _ => classes.pad_with_zeros(classes.rank() - 2, 0, shift)?,
            },
            probabilities: at.values(&self.probabilities.to_dtype(DType::F32)?)?,
            at,
        };
        if self.rest == Rest::Renormalized {
            let mass = said.probabilities.sum_keepdim(D::Minus1)?;
            let mass = mass.maximum(f32::MIN_POSITIVE as f64)?;
            said.probabilities = said.probabilities.broadcast_div(&mass)?;
        }
        Ok(said)
    }
}

/// The Kullback-Leibler divergence of a student from a teacher that names `k` classes a position, without logits of all
/// classes: `sum_k q_k (log q_k - log p_k)` with the teacher's probabilities `q` and the student's,
/// `p = softmax(z / T)`, and what [`Rest`] makes of the other classes.
///
/// It is `(sum_k q_k) lse - sum_k q_k z_k / T + sum_k q_k log q_k`, with the lse of the logits over `T`: a pass of
/// [`linear_cross_entropy`](crate::linear_cross_entropy), and [`class_logits`](super::class_logits).
///
/// - `embeddings` of shape `(.., D)`, `classifier` of shape `(V, D)`, `targets` of shape `(..)` and the options are those
///   of `linear_cross_entropy`, and so is the result: f32, a scalar or one number a position, differentiable in the
///   embeddings, the classifier and the bias. Of the targets only the `ignore_index` counts: which positions are learnt
///   from. With [`Rest::OneClass`] the filter is off, for the gradient of the others' probability lies in classes that
///   it would not keep. Gradients of the reductions mean and sum are formed in the forward where those of a loss are.
/// - The gradients of classifier and bias have two parts, of the lse and of the named classes. On CUDA, in bf16, f16 and f32, the
///   second is added to the first in place: beside what [`class_logits`](super::class_logits()) takes there is one tensor of the
///   classifier's size. Elsewhere there are three for a moment, one of them in f32 if not on the CPU.
/// - The temperature is that of [`TopK::temperature`]. The loss is not multiplied by its square, as in TRL; who wants
///   gradients of the same size at every temperature, as Hinton et al. do, multiplies it: `(loss * (t * t))?`.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// use candle_cut_cross_entropy::soft_targets::{top_k_divergence, TopK};
/// use candle_cut_cross_entropy::{backward, Options};
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?;
/// # let head = Var::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// # let tokens = Tensor::zeros((2, 16), DType::I64, &Device::Cpu)?;
/// # let classes = Tensor::new(&[1u32, 2], &Device::Cpu)?.broadcast_as((2, 16, 2))?;
/// # let probabilities = Tensor::new(&[0.5f32, 0.3], &Device::Cpu)?.broadcast_as((2, 16, 2))?;
/// let teacher = TopK::new(&classes, &probabilities);
/// let options = Options::default().shift(1);
/// let loss = top_k_divergence(&hidden, &head, &tokens, &teacher, &options)?;
/// assert!(backward(&loss)?.get(&head).is_some());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of `linear_cross_entropy` and `class_logits`; shapes, dtypes and devices of the teacher that do not match; a
/// temperature that is not positive and finite; [`Options::z_loss_weight`], [`Options::label_smoothing`],
/// [`Options::class_weights`], [`Options::adapter`] and [`Options::vocab_parallel`].
///
/// Source: Hinton et al., *Distilling the Knowledge in a Neural Network*,
/// [arXiv 1503.02531](https://arxiv.org/abs/1503.02531).
pub fn top_k_divergence(
    embeddings: &Tensor,
    classifier: &Tensor,
    targets: &Tensor,
    teacher: &TopK,
    options: &Options,
) -> Result<Tensor> {
    checks::ruled_out(options)?;
    teacher.check(embeddings, targets)?;
    let options = &Options {
        logit_scale: options.logit_scale / teacher.temperature,
        entropy: Entropy::Off,
        predicted: false,
        ..options.clone()
    };
    let (mut problem, matrices) = Problem::new(embeddings, classifier, targets, options)?;
    let said = teacher.said(&problem, targets, options)?;
    let chosen = Chosen::new(&said.classes, &problem)?;
    let of_steps = said.classes.shape();
    let mass = said.probabilities.sum(D::Minus1)?;
    let logits = chosen.logits(matrices.as_ref().detach().as_ref())?;
    let others = match teacher.rest {
        Rest::OneClass => Some(said.others(&mass)?),
        Rest::Renormalized | Rest::LeftOut => None,
    };
    // All that depends on the lse is the loss's business, so that its gradients can be formed in the forward.
    let named = match &others {
        Some(others) => {
            let logits = said.at.values(&logits.reshape(of_steps)?)?;
            let logits = logits.to_dtype(accumulator(problem.dtype))?;
            Some((others, logits.log_sum_exp(D::Minus1)?))
        }
        None => None,
    };
    problem.weights = Some(said.at.of_lse(&mass, named, problem.dtype)?);
    if others.is_some() {
        problem.settings.filter_embeddings = None;
        problem.settings.filter_classifier = None;
    }
    let both = LossAndLogits::new(&problem, matrices.as_ref(), chosen, logits)?;
    let of_lse = match options.reduction {
        Reduction::None => both.losses.reshape(mass.shape())?,
        Reduction::Mean | Reduction::Sum => both.loss.reshape(())?,
    };
    let logits = said.at.values(&both.logits.reshape(of_steps)?)?;
    let mut apart_from_lse = said.apart_from_lse(&logits)?;
    if let Some(others) = others {
        let lse = both.lse.reshape(mass.shape())?.unsqueeze(D::Minus1)?;
        let named = logits.broadcast_sub(&lse)?.exp()?.sum(D::Minus1)?;
        apart_from_lse = (apart_from_lse + of_rest(&others, &named)?)?;
    }
    of_lse + said.at.reduced(&apart_from_lse, options.reduction)?
}

/// The positions of a result.
struct Positions {
    /// Which of them count, u8.
    counted: Tensor,
    /// The same for each of their classes, `(.., k)`.
    each: Tensor,
    shift: usize,
    /// f32, 0 where a position does not count, else its weight.
    tokens: Tensor,
    /// What the mean divides by: the sum of the weights, one number, f32.
    total: Tensor,
}

impl Positions {
    fn new(problem: &Problem, each: Tensor, counted: Tensor) -> Result<Self> {
        let (tokens, total) = match &problem.weights {
            Some(weights) => (weights.tokens.clone(), weights.total.clone()),
            None => {
                let tokens = counted.to_dtype(DType::F32)?;
                let total = tokens.sum_all()?;
                (tokens, total)
            }
        };
        Ok(Self {
            tokens: tokens.to_dtype(DType::F32)?.reshape(counted.shape())?,
            total: total.to_dtype(DType::F32)?.reshape(())?,
            shift: problem.positions.shift,
            each,
            counted,
        })
    }

    /// Their part of the values of all steps, `(.., T, k)`: 0, whatever stands there, where a position does not count.
    fn values(&self, of_steps: &Tensor) -> Result<Tensor> {
        let values = predicting(of_steps, self.shift)?;
        self.each.where_cond(&values, &values.zeros_like()?)
    }

    /// Losses, 0 where a position does not count, as the loss reduces its own.
    fn reduced(&self, losses: &Tensor, reduction: Reduction) -> Result<Tensor> {
        let losses = (losses * &self.tokens)?;
        match reduction {
            Reduction::None => Ok(losses),
            Reduction::Sum => losses.sum_all(),
            Reduction::Mean => {
                let zero = self.total.zeros_like()?;
                let ones = self.total.ones_like()?;
                losses.sum_all()? / self.total.ne(&zero)?.where_cond(&self.total, &ones)?
            }
        }
    }

    /// The weights of a loss that is the lse times the mass of a position, with the probability of the other classes and the
    /// log-sum-exp of the named ones where they matter.
    fn of_lse(
        &self,
        mass: &Tensor,
        named: Option<(&Tensor, Tensor)>,
        dtype: DType,
    ) -> Result<Weights> {
        let acc = accumulator(dtype);
        let flat = |values: Tensor| values.flatten_all()?.to_dtype(acc);
        let factors = flat((mass * &self.tokens)?)?;
        let none = factors.zeros_like()?;
        let (rest, named) = match named {
            Some((others, named)) => (flat((others * &self.tokens)?)?, flat(named)?),
            None => (none.clone(), none.clone()),
        };
        Ok(Weights {
            terms: Tensor::stack(&[&none, &factors, &none, &rest, &named, &none], 0)?,
            total: self.total.reshape(1)?.to_dtype(acc)?,
            tokens: self.tokens.flatten_all()?.to_dtype(acc)?,
            classes: None,
        })
    }
}

/// All but the last `shift` steps of `(.., T, k)`.
fn predicting(values: &Tensor, shift: usize) -> Result<Tensor> {
    if shift == 0 {
        return Ok(values.clone());
    }
    let time = values.rank() - 2;
    values
        .narrow(time, 0, values.dim(time)? - shift)?
        .contiguous()
}

/// What a teacher says.
struct Said {
    at: Positions,
    /// Of all steps, i64; 0 where a position does not count.
    classes: Tensor,
    /// Of the positions, f32; 0 where one does not count.
    probabilities: Tensor,
}

impl Said {
    /// `sum_k q_k (log q_k - z_k)`
    fn apart_from_lse(&self, logits: &Tensor) -> Result<Tensor> {
        let q = &self.probabilities;
        // A class of no probability adds nothing, whatever its logit.
        let logits = q.gt(0f64)?.where_cond(logits, &logits.zeros_like()?)?;
        (p_log_p(q)? - (q * logits)?)?.sum(D::Minus1)
    }

    /// The probabilities of the unnamed classes.
    fn others(&self, mass: &Tensor) -> Result<Tensor> {
        let q = mass.affine(-1., 1.)?.relu()?;
        self.at.counted.where_cond(&q, &q.zeros_like()?)
    }
}

/// The term of the unnamed classes, `q (log q - log p)`, the named ones having this probability to the student in all. Where
/// `p` is too small to be told from 0 its logarithm stands still, but has a gradient yet.
fn of_rest(q: &Tensor, named: &Tensor) -> Result<Tensor> {
    let p = named.affine(-1., 1.)?;
    let raised = p.affine(-1., LEAST_REST)?.relu()?.detach();
    p_log_p(q)? - (q * (p + raised)?.log()?)?
}

/// `p log p`, 0 for 0.
fn p_log_p(p: &Tensor) -> Result<Tensor> {
    p * p.maximum(f32::MIN_POSITIVE as f64)?.log()?
}
