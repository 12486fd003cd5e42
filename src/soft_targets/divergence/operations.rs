//! A block of logits in Candle tensor operations.

use super::block::{Logits, Pair, Passed};
use super::kind::Divergence;
use candle_core::{Result, Tensor};

/// Not above any logit but -inf, and finite: in f32, as Metal has no f64.
const LOWEST: f32 = f32::MIN;

pub(super) fn pass(
    kind: Divergence,
    logits: &Pair<Logits<'_>>,
    weights: Option<&Tensor>,
) -> Result<Passed> {
    let Capped {
        log_probs: s,
        slope,
    } = capped(&logits.student)?;
    let of_student = slope;
    let Capped {
        log_probs: t,
        slope,
    } = capped(&logits.teacher)?;
    let of_teacher = slope;
    let (p, q) = (s.exp()?, t.exp()?);
    let wanted = [logits.student.wanted, logits.teacher.wanted];
    // The divergences of the rows `(rows, 1)`, and the gradients of the logits at the softmax.
    let (losses, student, teacher) = match kind {
        Divergence::ForwardKl => {
            let (divergence, teacher) = one_way(&q, &(&t - &s)?, wanted[1])?;
            (divergence, difference(&p, &q, wanted[0])?, teacher)
        }
        Divergence::ReverseKl => {
            let (divergence, student) = one_way(&p, &(&s - &t)?, wanted[0])?;
            (divergence, student, difference(&q, &p, wanted[1])?)
        }
        Divergence::JensenShannon(beta) => {
            let (above_s, above_t) = from_mixture(&s, &t, beta)?;
            let (of_s, student) = one_way(&p, &above_s, wanted[0])?;
            let (of_t, teacher) = one_way(&q, &above_t, wanted[1])?;
            let weighted = |gradient: Option<Tensor>, weight: f64| {
                gradient.map(|gradient| gradient * weight).transpose()
            };
            (
                ((of_t * beta)? + (of_s * (1. - beta))?)?,
                weighted(student, 1. - beta)?,
                weighted(teacher, beta)?,
            )
        }
    };
    let of_products = |gradient: Option<Tensor>, slope: Option<Tensor>, scale: f64| {
        let (Some(gradient), Some(weights)) = (gradient, weights) else {
            return Ok(None);
        };
        let gradient = gradient.broadcast_mul(&(weights.unsqueeze(1)? * scale)?)?;
        match slope {
            Some(slope) => (gradient * slope).map(Some),
            None => Ok(Some(gradient)),
        }
    };
    Ok(Passed {
        losses: losses.squeeze(1)?,
        gradients: Pair {
            student: of_products(student, of_student, logits.student.scale)?,
            teacher: of_products(teacher, of_teacher, logits.teacher.scale)?,
        },
    })
}

struct Capped {
    /// The logarithms of the softmax.
    log_probs: Tensor,
    /// The derivative of the softcap, where there is one and a gradient is asked for.
    slope: Option<Tensor>,
}

fn capped(logits: &Logits<'_>) -> Result<Capped> {
    let z = match logits.bias {
        Some(bias) => logits.products.broadcast_add(bias)?,
        None => logits.products.clone(),
    };
    let (z, slope) = match logits.softcap {
        None => (z, None),
        Some(softcap) => {
            let tanh = (z / softcap)?.tanh()?;
            let slope = match logits.wanted {
                true => Some(tanh.sqr()?.affine(-1., 1.)?),
                false => None,
            };
            ((tanh * softcap)?, slope)
        }
    };
    let z = match logits.scale {
        1. => z,
        scale => (z * scale)?,
    };
    let z = z.broadcast_sub(&z.max_keepdim(1)?.maximum(LOWEST)?)?;
    let lse = z.exp()?.sum_keepdim(1)?.log()?;
    Ok(Capped {
        log_probs: z.broadcast_sub(&lse)?,
        slope,
    })
}

/// `p x`, and 0 where `p` is, whatever `x`.
fn times(p: &Tensor, x: &Tensor) -> Result<Tensor> {
    p.ne(0f64)?.where_cond(&(p * x)?, &p.zeros_like()?)
}

/// `sum_j p_j x_j`, and `p_j (x_j - sum)`.
fn one_way(p: &Tensor, x: &Tensor, wanted: bool) -> Result<(Tensor, Option<Tensor>)> {
    let sum = times(p, x)?.sum_keepdim(1)?;
    let gradient = match wanted {
        true => Some(times(p, &x.broadcast_sub(&sum)?)?),
        false => None,
    };
    Ok((sum, gradient))
}

fn difference(a: &Tensor, b: &Tensor, wanted: bool) -> Result<Option<Tensor>> {
    wanted.then(|| a - b).transpose()
}

/// `log p - log m` and `log q - log m`, where `m = beta q + (1 - beta) p`; `s = log p` is the student's. Exactly 0 where
/// both are the same.
fn from_mixture(s: &Tensor, t: &Tensor, beta: f64) -> Result<(Tensor, Tensor)> {
    let above = (s - t)?;
    let of_larger = above.gt(0f64)?.to_dtype(above.dtype())?;
    let of_larger = of_larger.affine(2. * beta - 1., 1. - beta)?;
    let larger = ((above.abs()?.neg()?.exp()? - 1.)? * of_larger)?;
    let base = (larger + 1.)?.log()?.neg()?;
    Ok(((&base - above.neg()?.relu()?)?, (base - above.relu()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soft_targets::divergence::loops;
    use candle_core::{DType, Device};

    fn values(tensor: &Tensor) -> Result<Vec<f64>> {
        tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
    }

    #[test]
    fn they_agree_with_the_loops() -> Result<()> {
        let (rows, vocab) = (6, 77);
        let kinds = [
            Divergence::ForwardKl,
            Divergence::ReverseKl,
            Divergence::JensenShannon(0.7),
        ];
        for dtype in [DType::F64, DType::F32] {
            let normal =
                |shape: &[usize]| Tensor::randn(0f64, 3., shape, &Device::Cpu)?.to_dtype(dtype);
            let mut bias = vec![0.5f64; vocab];
            bias[10] = f64::NEG_INFINITY;
            let bias = Tensor::new(bias, &Device::Cpu)?.to_dtype(dtype)?;
            let weights = normal(&[rows])?;
            for (kind, softcap) in kinds.into_iter().flat_map(|k| [(k, None), (k, Some(5.))]) {
                let logits = || -> Result<Logits<'_>> {
                    Ok(Logits {
                        products: normal(&[rows, vocab])?,
                        bias: Some(&bias),
                        softcap,
                        scale: 0.5,
                        wanted: true,
                    })
                };
                let logits = Pair {
                    student: logits()?,
                    teacher: logits()?,
                };
                let a = loops::pass(kind, &logits, Some(&weights))?;
                let b = pass(kind, &logits, Some(&weights))?;
                let results = [
                    (Some(a.losses), Some(b.losses)),
                    (a.gradients.student, b.gradients.student),
                    (a.gradients.teacher, b.gradients.teacher),
                ];
                for (a, b) in results {
                    let (a, b) = (values(&a.unwrap())?, values(&b.unwrap())?);
                    let off = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
                    let off = off.fold(0., f64::max);
                    assert!(off < 3e-6, "{kind:?} {softcap:?} {dtype:?}: {off}");
                    assert!(a.iter().all(|x| x.is_finite()));
                }
            }
        }
        Ok(())
    }
}
