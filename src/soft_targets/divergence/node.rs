//! The divergence as nodes of Candle's graph.
//!
//! It has up to six arguments, and an op at most three. So student and teacher have a node each: the value is the
//! student's, and a zero, the teacher's, is added to it where the teacher learns too. Tensor operations compute both, so
//! they join the graph ready-made.

use super::block::Pair;
use super::sweep::{Call, Swept};
use crate::blocks::blocks;
use crate::matrices::Matrices;
use crate::node::{attach, Node};
use crate::op::contract::{accumulator, Gradients, Wanted};
use crate::op::graph::wanted;
use crate::{Reduction, Strategy};
use candle_core::{DType, Result, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// Numbers of a gradient that are multiplied at a time.
const NUMBERS_AT_ONCE: usize = 1 << 22;

/// The reduced divergence; `shape` is that of the positions.
pub(super) fn apply(
    call: Call,
    tracked: Pair<Matrices<&Tensor>>,
    strategy: Strategy,
    shape: &[usize],
) -> Result<Tensor> {
    let asked = Pair {
        student: wanted(tracked.student),
        teacher: wanted(tracked.teacher),
    };
    let of_one_number = call.reduction != Reduction::None;
    let f16 = |matrices: Matrices<&Tensor>, wanted: Wanted| {
        wanted.any() && matrices.embeddings.dtype() == DType::F16
    };
    let forms = match strategy {
        Strategy::Recompute => false,
        Strategy::Fused => of_one_number,
        // The exponents of f16 reach down to 2^-24 only: the user's loss scale has to be in the gradient first.
        Strategy::Auto => {
            let f16 = f16(tracked.student, asked.student) || f16(tracked.teacher, asked.teacher);
            of_one_number && !f16
        }
    };
    let Swept { losses, gradients } = match forms && (asked.student.any() || asked.teacher.any()) {
        true => call.sweep(Some(&call.weights(None)?), asked)?,
        false => call.sweep(None, Pair::default())?,
    };
    let value = match call.reduction {
        Reduction::None => call.spread(&losses)?.reshape(shape)?,
        Reduction::Mean | Reduction::Sum => {
            (losses.sum_all()? * call.rows.scale(call.reduction))?.reshape(())?
        }
    };
    let value = value.to_dtype(DType::F32)?;
    let call = Arc::new(call);
    let Pair { student, teacher } = gradients;
    let node = |value: Tensor, of: Matrices<&Tensor>, of_teacher: bool, formed: Gradients| {
        let mut arguments = vec![of.embeddings, of.classifier];
        arguments.extend(of.bias);
        let node = Side {
            call: call.clone(),
            of_teacher,
            formed: Mutex::new(forms.then_some(formed)),
        };
        attach(value, &arguments, node)
    };
    match (asked.student.any(), asked.teacher.any()) {
        (false, false) => Ok(value),
        (true, false) => node(value, tracked.student, false, student),
        (false, true) => node(value, tracked.teacher, true, teacher),
        (true, true) => {
            let zero = value.zeros_like()?;
            node(value, tracked.student, false, student)?
                + node(zero, tracked.teacher, true, teacher)?
        }
    }
}

/// The divergence as a function of the student's matrices, or of the teacher's.
struct Side {
    call: Arc<Call>,
    of_teacher: bool,
    /// The gradients of the reduced divergence where they are formed, until they are handed out.
    formed: Mutex<Option<Gradients>>,
}

impl Node for Side {
    const NAME: &'static str = "soft-targets-divergence";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let upstream = upstream.detach();
        let formed = self
            .formed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let gradients = match formed {
            Some(formed) => scaled(formed, &upstream)?,
            None => {
                let asked = wanted(Matrices::of(arguments));
                let weights = self.call.weights(Some(&upstream))?;
                let none = Wanted::default();
                let (student, teacher) = match self.of_teacher {
                    false => (asked, none),
                    true => (none, asked),
                };
                let swept = self.call.sweep(Some(&weights), Pair { student, teacher })?;
                match self.of_teacher {
                    false => swept.gradients.student,
                    true => swept.gradients.teacher,
                }
            }
        };
        Ok(vec![
            gradients.embeddings,
            gradients.classifier,
            gradients.bias,
        ])
    }
}

/// Gradients for an upstream gradient of 1, times this one.
fn scaled(gradients: Gradients, upstream: &Tensor) -> Result<Gradients> {
    // On a GPU a look at the number would wait for the device.
    if upstream.device().is_cpu() && upstream.to_scalar::<f32>()? == 1. {
        return Ok(gradients);
    }
    let all = [
        &gradients.embeddings,
        &gradients.classifier,
        &gradients.bias,
    ];
    for gradient in all.into_iter().flatten() {
        multiply(gradient, upstream)?;
    }
    Ok(gradients)
}

/// Multiplies a gradient in place by one number, in the type of sums: half precision would round the number.
fn multiply(gradient: &Tensor, upstream: &Tensor) -> Result<()> {
    #[cfg(feature = "cuda")]
    if crate::cuda::scale::in_place(gradient, upstream)? {
        return Ok(());
    }
    let acc = accumulator(gradient.dtype());
    let upstream = upstream.to_dtype(acc)?;
    let rows = gradient.dim(0)?;
    let of_row = gradient.elem_count() / rows;
    for rows in blocks(rows, (NUMBERS_AT_ONCE / of_row).max(1)) {
        let part = gradient.narrow(0, rows.start, rows.len())?.to_dtype(acc)?;
        let part = part.broadcast_mul(&upstream)?.to_dtype(gradient.dtype())?;
        gradient.slice_set(&part, 0, rows.start)?;
    }
    Ok(())
}
