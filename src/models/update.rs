//! A step of AdamW on one variable, in place.

use crate::ops::cpu::Number;
use candle_core::{bail, CpuStorage, InplaceOp1, Layout, Result, Tensor, WithDType};
use rayon::prelude::*;
use std::cell::RefCell;

/// The numbers of a step: `m <- beta1 m + (1 - beta1) g`, `v <- beta2 v + (1 - beta2) g^2`,
/// `w <- keep w - rate m / (sqrt(second_scale v) + eps)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub beta1: f64,
    pub beta2: f64,
    pub keep: f64,
    pub rate: f64,
    pub second_scale: f64,
    pub eps: f64,
}

/// f32 or f64.
pub(super) trait Weight: Number {
    fn root(self) -> Self;
    /// # Errors
    /// A storage of another dtype.
    fn values_mut(storage: &mut CpuStorage) -> Result<&mut [Self]>;
}

macro_rules! weight {
    ($t:ty, $variant:ident) => {
        impl Weight for $t {
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }

            fn values_mut(storage: &mut CpuStorage) -> Result<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(values) => Ok(values),
                    _ => bail!("expected {:?}", <$t as WithDType>::DTYPE),
                }
            }
        }
    };
}

weight!(f32, F32);
weight!(f64, F64);

/// The step on the CPU, in one pass on all threads: weights, moments and gradient are contiguous, of one shape and of
/// this type.
pub(super) fn on_cpu<R: Weight>(
    gradient: &Tensor,
    [weights, first_moment, second_moment]: [&Tensor; 3],
    step: Step,
) -> Result<()> {
    crate::ops::cpu::opened([gradient], |[(gradient, layout)]| {
        let gradient = crate::ops::cpu::values::<R>(gradient, layout)?;
        write::<R>(weights, &mut |w| {
            write::<R>(first_moment, &mut |m| {
                write::<R>(second_moment, &mut |v| {
                    update([&mut *w, &mut *m, v], gradient, step);
                    Ok(())
                })
            })
        })
    })
}

fn update<R: Weight>([w, m, v]: [&mut [R]; 3], gradient: &[R], step: Step) {
    const TASK: usize = 1 << 14;
    let real = crate::ops::cpu::real::<R>;
    let (beta1, rest1) = (real(step.beta1), real(1. - step.beta1));
    let (beta2, rest2) = (real(step.beta2), real(1. - step.beta2));
    let (keep, rate) = (real(step.keep), real(step.rate));
    let (second_scale, eps) = (real(step.second_scale), real(step.eps));
    let state = w.par_chunks_mut(TASK).zip(m.par_chunks_mut(TASK));
    let state = state.zip(v.par_chunks_mut(TASK));
    let all = state.zip(gradient.par_chunks(TASK));
    all.for_each(|(((w, m), v), gradient)| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let state = w.iter_mut().zip(m.iter_mut()).zip(v.iter_mut());
                for (((w, m), v), g) in state.zip(gradient) {
                    *m = beta1 * *m + rest1 * *g;
                    *v = beta2 * *v + rest2 * *g * *g;
                    *w = keep * *w - rate * *m / ((second_scale * *v).root() + eps);
                }
            },
        )
    })
}

type WithNumbers<'a, R> = dyn FnMut(&mut [R]) -> Result<()> + 'a;

/// Runs `with` on the numbers of a contiguous tensor on the CPU.
fn write<R: Weight>(tensor: &Tensor, with: &mut WithNumbers<R>) -> Result<()> {
    tensor.inplace_op1(&Write(RefCell::new(with)))
}

struct Write<'a, 'b, R>(RefCell<&'a mut WithNumbers<'b, R>>);

impl<R: Weight> InplaceOp1 for Write<'_, '_, R> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("expected a contiguous tensor, got {layout:?}")
        };
        (self.0.borrow_mut())(&mut R::values_mut(storage)?[start..end])
    }
}
