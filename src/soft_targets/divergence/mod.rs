//! A teacher whose distribution over all classes is computed beside the student's.

mod add_product;
mod block;
mod gradients;
mod kind;
mod loops;
mod node;
mod operations;
mod sweep;

use super::checks;
use crate::native::HostRows;
use crate::op::contract::accumulator;
use crate::problem::Problem;
use crate::{Implementation, Options};
use block::Pair;
use candle_core::{bail, DType, Result, Tensor};
use sweep::{Call, Head};

pub use kind::Divergence;

/// What `beta` and `1 - beta` are at least: less is lost in the rounding of f32.
const LEAST_BETA: f64 = 1e-6;

/// A teacher: what its last layer is given and its head.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// use candle_cut_cross_entropy::soft_targets::Teacher;
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (2, 16, 96), &Device::Cpu)?;
/// # let head = Tensor::randn(0f32, 0.02, (1000, 96), &Device::Cpu)?;
/// let teacher = Teacher::new(&hidden.detach(), &head).softcap(30.).temperature(2.);
/// # let _ = teacher;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Teacher {
    embeddings: Tensor,
    classifier: Tensor,
    bias: Option<Tensor>,
    softcap: Option<f64>,
    logit_scale: f64,
    temperature: f64,
}

impl Teacher {
    /// Embeddings of shape `(.., D')` and a classifier of shape `(V, D')`, at a temperature of 1. Gradients reach them
    /// where they are tracked: detach the embeddings of a teacher that is not to learn.
    pub fn new(embeddings: &Tensor, classifier: &Tensor) -> Self {
        Self {
            embeddings: embeddings.clone(),
            classifier: classifier.clone(),
            bias: None,
            softcap: None,
            logit_scale: 1.,
            temperature: 1.,
        }
    }

    /// A bias of shape `(V)`, added to the teacher's logits before the softcap. Takes a tensor or an `Option`. Default:
    /// none.
    pub fn bias<'a>(mut self, bias: impl Into<Option<&'a Tensor>>) -> Self {
        self.bias = bias.into().cloned();
        self
    }

    /// Caps the teacher's logits. Takes a number or an `Option`. Default: none.
    pub fn softcap(mut self, softcap: impl Into<Option<f64>>) -> Self {
        self.softcap = softcap.into();
        self
    }

    /// Multiplies the teacher's logits, after the bias and the softcap. Default: 1.
    pub fn logit_scale(mut self, scale: f64) -> Self {
        self.logit_scale = scale;
        self
    }

    /// What the logits of both are divided by, after the softcap. Default: 1.
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }
}

/// The divergence of a student from a teacher over all classes, without stored logits: [`Divergence`] of
/// `p = softmax(z / T)` and `q = softmax(z' / T)`, with the student's logits `z` and the teacher's `z'`.
///
/// - `embeddings` of shape `(.., D)`, `classifier` of shape `(V, D)`, `targets` of shape `(..)` and the options are those
///   of [`linear_cross_entropy`](crate::linear_cross_entropy), and so is the result: f32, a scalar or one number a
///   position, differentiable in the student's embeddings, classifier and bias, and in the teacher's. Of the targets only
///   the `ignore_index` counts: which positions are learnt from.
/// - The teacher has embeddings of the same positions, and as many classes; its hidden size and its dtype may be others.
///   Bias, softcap and `logit_scale` of the options are the student's.
/// - The temperature is that of [`Teacher::temperature`]. The loss is not multiplied by its square, as in TRL; who wants
///   gradients of the same size at every temperature, as Hinton et al. do, multiplies it: `(loss * (t * t))?`.
///
/// It goes through blocks of positions. Under the reductions mean and sum the gradients are formed there, so that a
/// training step costs four products for the student alone, six for both; under [`Reduction::None`](crate::Reduction),
/// for f16, and with [`Strategy::Recompute`](crate::Strategy) a backward computes the logits again. The logits of a block,
/// and what else it needs, take the workspace of the options: by default 64 MiB on the CPU, 512 MiB elsewhere. Gradients
/// are exact: filters, `entropy` and `predicted` are not read. On a GPU the targets are waited for once a call.
///
/// On CUDA, compute capability 9.0, heads in bf16 whose hidden sizes are multiples of 8 have kernels, by default within 2.5
/// GiB, for at most 262,144 positions that count and unless the implementation is `Native`. They hold 8 bytes of every class for 128 to 512 positions and 2, of each head that learns, for some chunk of them; so
/// with 256,000 classes a workspace of less than 330 MiB is too small for them. There, and everywhere else but on the CPU,
/// these are Candle operations, which sum up the gradient of a classifier in f32, beyond the workspace, and take many times as
/// long.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// use candle_cut_cross_entropy::soft_targets::{divergence, Divergence, Teacher};
/// use candle_cut_cross_entropy::{backward, Options};
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?;
/// # let head = Var::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// # let tokens = Tensor::zeros((2, 16), DType::I64, &Device::Cpu)?;
/// # let teachers_hidden = Tensor::randn(0f32, 1., (2, 16, 96), &Device::Cpu)?;
/// # let teachers_head = Tensor::randn(0f32, 0.02, (1000, 96), &Device::Cpu)?;
/// let teacher = Teacher::new(&teachers_hidden, &teachers_head);
/// let options = Options::default().shift(1);
/// let kind = Divergence::JensenShannon(0.5);
/// let loss = divergence(&hidden, &head, &tokens, &teacher, kind, &options)?;
/// assert!(backward(&loss)?.get(&head).is_some());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of `linear_cross_entropy`, of the student or the teacher; numbers of classes that differ; a temperature that is
/// not positive and finite; a `beta` that is not between 1e-6 and 1 - 1e-6; a target that is no class;
/// [`Options::z_loss_weight`], [`Options::entropy_bonus`], [`Options::label_smoothing`], [`Options::class_weights`],
/// [`Options::adapter`] and [`Options::vocab_parallel`].
///
/// Source: Agarwal et al., *On-Policy Distillation of Language Models* (GKD),
/// [arXiv 2306.13649](https://arxiv.org/abs/2306.13649); `generalized_jsd_loss` of
/// [TRL](https://github.com/huggingface/trl).
pub fn divergence(
    embeddings: &Tensor,
    classifier: &Tensor,
    targets: &Tensor,
    teacher: &Teacher,
    kind: Divergence,
    options: &Options,
) -> Result<Tensor> {
    checks::ruled_out(options)?;
    checks::temperature(teacher.temperature)?;
    if let Divergence::JensenShannon(beta) = kind {
        if !(LEAST_BETA..=1. - LEAST_BETA).contains(&beta) {
            bail!(
                "beta must be between {LEAST_BETA} and 1 - {LEAST_BETA}, got {beta}: at the ends are ForwardKl and ReverseKl"
            )
        }
    }
    // Scales are checked as what they are after the temperature.
    let of_student = options
        .clone()
        .logit_scale(options.logit_scale / teacher.temperature);
    let (problem, student) = Problem::new(embeddings, classifier, targets, &of_student)?;
    let of_teacher = Options::default()
        .bias(teacher.bias.as_ref())
        .softcap(teacher.softcap)
        .logit_scale(teacher.logit_scale / teacher.temperature)
        .shift(options.shift);
    let checked = Problem::new(
        &teacher.embeddings,
        &teacher.classifier,
        targets,
        &of_teacher,
    );
    let (teachers, matrices) = checked.map_err(|e| e.context("the teacher"))?;
    if teachers.vocab() != problem.vocab() {
        bail!(
            "teacher and student must have the same number of classes, got classifiers {:?} and {:?}",
            teacher.classifier.dims(),
            classifier.dims()
        )
    }
    let dtype = match [problem.dtype, teachers.dtype].contains(&DType::F64) {
        true => DType::F64,
        false => accumulator(problem.dtype),
    };
    let call = Call {
        kind,
        heads: Pair {
            student: Head {
                matrices: student.as_ref().detach(),
                softcap: options.softcap,
                scale: problem.settings.logit_scale,
            },
            teacher: Head {
                matrices: matrices.as_ref().detach(),
                softcap: teacher.softcap,
                scale: teachers.settings.logit_scale,
            },
        },
        rows: HostRows::new(&problem)?,
        dtype,
        reduction: options.reduction,
        workspace: options.workspace,
        kernels: options.implementation != Implementation::Native,
    };
    let tracked = Pair {
        student: student.as_ref(),
        teacher: matrices.as_ref(),
    };
    node::apply(call, tracked, options.strategy, &problem.shape)
}
