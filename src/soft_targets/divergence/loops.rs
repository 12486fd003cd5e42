//! A block of logits in main memory: every row while it is in a core's cache, on all threads, in the vector instructions
//! of the machine at hand.

use super::block::{Logits, Pair, Passed};
use super::kind::Divergence;
use crate::native::Real;
use candle_core::{bail, DType, Device, Result, Storage, Tensor, WithDType};
use rayon::prelude::*;

/// f32 or f64.
trait Number: Real + WithDType {
    /// The logarithm of a normal number above 0, written so that a loop over it becomes vector instructions.
    fn ln(self) -> Self;
}

impl Number for f32 {
    /// Within 2 ulp (Cephes' logf).
    #[inline(always)]
    fn ln(self) -> Self {
        // ln 2 in two parts, so that the sum loses no bits.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // self = mantissa * 2^exponent, the mantissa from sqrt(1/2) to sqrt(2).
        let above = self
            .to_bits()
            .wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits());
        let exponent = (above as i32 >> 23) as f32;
        let mantissa = (above & 0x007f_ffff) + std::f32::consts::FRAC_1_SQRT_2.to_bits();
        let x = f32::from_bits(mantissa) - 1.;
        let p = 7.037_683_6e-2;
        let p = p * x - 1.151_461e-1;
        let p = p * x + 1.167_699_9e-1;
        let p = p * x - 1.242_014_1e-1;
        let p = p * x + 1.424_932_3e-1;
        let p = p * x - 1.666_805_7e-1;
        let p = p * x + 2.000_071_5e-1;
        let p = p * x - 2.499_999_4e-1;
        let p = p * x + 3.333_333e-1;
        let square = x * x;
        let small = p * x * square + exponent * LN2_LOW - 0.5 * square;
        small + x + exponent * LN2_HIGH
    }
}

impl Number for f64 {
    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }
}

fn real<R: Number>(x: f64) -> R {
    <R as Real>::from_f64(x)
}

pub(super) fn pass(
    kind: Divergence,
    logits: &Pair<Logits<'_>>,
    weights: Option<&Tensor>,
) -> Result<Passed> {
    match logits.student.products.dtype() {
        DType::F64 => pass_of::<f64>(kind, logits, weights),
        _ => pass_of::<f32>(kind, logits, weights),
    }
}

fn pass_of<R: Number>(
    kind: Divergence,
    logits: &Pair<Logits<'_>>,
    weights: Option<&Tensor>,
) -> Result<Passed> {
    let (rows, vocab) = logits.student.products.dims2()?;
    let weights = match weights {
        Some(weights) => weights.to_vec1::<R>()?,
        None => vec![R::ONE; rows],
    };
    let room = |logits: &Logits<'_>| match logits.wanted {
        true => vec![R::default(); rows * vocab],
        false => Vec::new(),
    };
    let mut losses = vec![R::default(); rows];
    let (mut of_student, mut of_teacher) = (room(&logits.student), room(&logits.teacher));
    with_side(&logits.student, |student| {
        with_side(&logits.teacher, |teacher| {
            // Where no gradient is asked for there are no chunks.
            let mut of_student = of_student.chunks_mut(vocab);
            let mut of_teacher = of_teacher.chunks_mut(vocab);
            let outputs: Vec<_> = losses
                .iter_mut()
                .map(|loss| (loss, of_student.next(), of_teacher.next()))
                .collect();
            outputs.into_par_iter().enumerate().for_each_init(
                || (vec![R::default(); vocab], vec![R::default(); vocab]),
                |(s, t), (row, (loss, of_student, of_teacher))| {
                    pulp::Arch::new().dispatch(
                        #[inline(always)]
                        || {
                            let lse_s = student.log_probs(row, s);
                            let lse_t = teacher.log_probs(row, t);
                            let sums = Sums::new(kind, s, t);
                            *loss = sums.divergence(kind);
                            if let Some(out) = of_student {
                                sums.of_student(kind, s, t, out);
                                student.of_products(out, s, lse_s, weights[row]);
                            }
                            if let Some(out) = of_teacher {
                                sums.of_teacher(kind, s, t, out);
                                teacher.of_products(out, t, lse_t, weights[row]);
                            }
                        },
                    )
                },
            );
            Ok(())
        })
    })?;
    let tensor = |values: Vec<R>, wanted: bool| {
        wanted
            .then(|| Tensor::from_vec(values, (rows, vocab), &Device::Cpu))
            .transpose()
    };
    Ok(Passed {
        losses: Tensor::from_vec(losses, rows, &Device::Cpu)?,
        gradients: Pair {
            student: tensor(of_student, logits.student.wanted)?,
            teacher: tensor(of_teacher, logits.teacher.wanted)?,
        },
    })
}

/// The numbers of one head's logits.
struct Side<'a, R> {
    products: &'a [R],
    bias: Option<Vec<R>>,
    softcap: Option<R>,
    scale: R,
}

fn with_side<R: Number, O>(
    logits: &Logits<'_>,
    with: impl FnOnce(Side<'_, R>) -> Result<O>,
) -> Result<O> {
    let (storage, layout) = logits.products.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        bail!("expected logits on the CPU")
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("expected contiguous logits, got {layout:?}")
    };
    with(Side {
        products: &R::cpu_storage_as_slice(storage)?[start..end],
        bias: match logits.bias {
            Some(bias) => Some(bias.to_vec1()?),
            None => None,
        },
        softcap: logits.softcap.map(real),
        scale: real(logits.scale),
    })
}

impl<R: Number> Side<'_, R> {
    /// The logarithms of a row's softmax, and the lse that was subtracted.
    #[inline(always)]
    fn log_probs(&self, row: usize, out: &mut [R]) -> R {
        out.copy_from_slice(&self.products[row * out.len()..][..out.len()]);
        if let Some(bias) = &self.bias {
            for (z, b) in out.iter_mut().zip(bias) {
                *z += *b;
            }
        }
        if let Some(softcap) = self.softcap {
            let (inverse, scale) = (R::ONE / softcap, softcap * self.scale);
            for z in out.iter_mut() {
                *z = scale * Real::tanh(*z * inverse);
            }
        } else if self.scale != R::ONE {
            for z in out.iter_mut() {
                *z *= self.scale;
            }
        }
        let max = fold(out, R::LOWEST, |max, z| if z > max { z } else { max });
        let (sum, _) = sums(out, out, |z, _| (Real::exp(z - max), R::default()));
        let lse = max + real(Real::to_f64(sum).ln());
        for z in out.iter_mut() {
            *z -= lse;
        }
        lse
    }

    /// Turns the gradient of the log-probabilities' logits into that of the products, times the weight of the row.
    #[inline(always)]
    fn of_products(&self, gradient: &mut [R], log_probs: &[R], lse: R, weight: R) {
        let factor = weight * self.scale;
        match self.softcap {
            None => {
                for g in gradient {
                    *g *= factor;
                }
            }
            Some(softcap) => {
                let inverse = R::ONE / (softcap * self.scale);
                for (g, log_prob) in gradient.iter_mut().zip(log_probs) {
                    let tanh = (*log_prob + lse) * inverse;
                    *g *= factor * (R::ONE - tanh * tanh);
                }
            }
        }
    }
}

/// What the gradients of a row need: divergences of the teacher and of the student from the other, or from the mixture.
struct Sums<R> {
    teacher: R,
    student: R,
}

impl<R: Number> Sums<R> {
    /// `s` and `t` are the log-probabilities of the student and the teacher.
    #[inline(always)]
    fn new(kind: Divergence, s: &[R], t: &[R]) -> Self {
        let none = R::default();
        let (teacher, student) = match kind {
            Divergence::ForwardKl => sums(s, t, |s, t| (times(Real::exp(t), t - s), none)),
            Divergence::ReverseKl => sums(s, t, |s, t| (none, times(Real::exp(s), s - t))),
            Divergence::JensenShannon(beta) => {
                let beta = real(beta);
                sums(
                    s,
                    t,
                    #[inline(always)]
                    |s, t| {
                        let (of_s, of_t) = from_mixture(s, t, beta);
                        (times(Real::exp(t), of_t), times(Real::exp(s), of_s))
                    },
                )
            }
        };
        Self { teacher, student }
    }

    fn divergence(&self, kind: Divergence) -> R {
        match kind {
            Divergence::ForwardKl => self.teacher,
            Divergence::ReverseKl => self.student,
            Divergence::JensenShannon(beta) => {
                real::<R>(beta) * self.teacher + real::<R>(1. - beta) * self.student
            }
        }
    }

    /// The gradient of the divergence with respect to the student's logits.
    #[inline(always)]
    fn of_student(&self, kind: Divergence, s: &[R], t: &[R], out: &mut [R]) {
        match kind {
            Divergence::ForwardKl => fill(out, s, t, |s, t| Real::exp(s) - Real::exp(t)),
            Divergence::ReverseKl => {
                fill(out, s, t, |s, t| times(Real::exp(s), s - t - self.student))
            }
            Divergence::JensenShannon(beta) => {
                let (share, beta): (R, R) = (real(1. - beta), real(beta));
                fill(
                    out,
                    s,
                    t,
                    #[inline(always)]
                    |s, t| {
                        let from = from_mixture(s, t, beta).0;
                        times(share * Real::exp(s), from - self.student)
                    },
                )
            }
        }
    }

    /// The gradient of the divergence with respect to the teacher's logits.
    #[inline(always)]
    fn of_teacher(&self, kind: Divergence, s: &[R], t: &[R], out: &mut [R]) {
        match kind {
            Divergence::ForwardKl => {
                fill(out, s, t, |s, t| times(Real::exp(t), t - s - self.teacher))
            }
            Divergence::ReverseKl => fill(out, s, t, |s, t| Real::exp(t) - Real::exp(s)),
            Divergence::JensenShannon(beta) => {
                let beta = real(beta);
                fill(
                    out,
                    s,
                    t,
                    #[inline(always)]
                    |s, t| {
                        let from = from_mixture(s, t, beta).1;
                        times(beta * Real::exp(t), from - self.teacher)
                    },
                )
            }
        }
    }
}

/// `p x`, and 0 where `p` is, whatever `x`.
#[inline(always)]
fn times<R: Number>(p: R, x: R) -> R {
    if p == R::default() {
        p
    } else {
        p * x
    }
}

/// `log p - log m` and `log q - log m` of a class, where `m = beta q + (1 - beta) p`; `s = log p` is the student's.
/// Exactly 0 where both are the same.
#[inline(always)]
fn from_mixture<R: Number>(s: R, t: R, beta: R) -> (R, R) {
    let none = R::default();
    let above = s - t;
    // A NaN is in both.
    let above_s = if above >= none { none } else { -above };
    let above_t = if above <= none { none } else { above };
    let of_larger = if above > none { beta } else { R::ONE - beta };
    let larger = R::ONE + of_larger * (Real::exp(-(above_s + above_t)) - R::ONE);
    let base = -larger.ln();
    (base - above_s, base - above_t)
}

#[inline(always)]
fn fill<R: Number>(out: &mut [R], s: &[R], t: &[R], f: impl Fn(R, R) -> R) {
    for ((out, s), t) in out.iter_mut().zip(s).zip(t) {
        *out = f(*s, *t);
    }
}

const LANES: usize = 32;

/// The sums of what `f` gives, in a fixed number of lanes.
#[inline(always)]
fn sums<R: Number>(s: &[R], t: &[R], f: impl Fn(R, R) -> (R, R)) -> (R, R) {
    let mut first = [R::default(); LANES];
    let mut second = [R::default(); LANES];
    let (s, t) = (s.chunks_exact(LANES), t.chunks_exact(LANES));
    let rest = s.remainder().iter().zip(t.remainder());
    for (s, t) in s.zip(t) {
        for i in 0..LANES {
            let (a, b) = f(s[i], t[i]);
            first[i] += a;
            second[i] += b;
        }
    }
    for (i, (s, t)) in rest.enumerate() {
        let (a, b) = f(*s, *t);
        first[i] += a;
        second[i] += b;
    }
    let total = |lanes: [R; LANES]| lanes.iter().fold(R::default(), |sum, lane| sum + *lane);
    (total(first), total(second))
}

#[inline(always)]
fn fold<R: Number>(row: &[R], start: R, f: impl Fn(R, R) -> R) -> R {
    let mut lanes = [start; LANES];
    for chunk in row.chunks(LANES) {
        for (lane, z) in lanes.iter_mut().zip(chunk) {
            *lane = f(*lane, *z);
        }
    }
    lanes.iter().fold(start, |a, b| f(a, *b))
}

#[cfg(test)]
mod tests {
    use super::Number;

    #[test]
    fn logarithms_are_within_two_ulp() {
        let mut x = 1e-9f32;
        while x < 3. {
            let exact = (x as f64).ln();
            let ulp = f32::from_bits((exact as f32).abs().to_bits() + 1) - (exact as f32).abs();
            let off = (Number::ln(x) as f64 - exact).abs() / ulp as f64;
            assert!(off <= 2., "ln({x}) is off by {off} ulp");
            x *= 1.000_37;
        }
        assert_eq!(Number::ln(1f32), 0.);
    }
}
