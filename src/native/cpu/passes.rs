//! What is done to a tile of logits between the products, in vector instructions of the machine at hand.
//!
//! Sums run in a fixed number of lanes whatever the width of the machine's vectors.

use super::element::Real;
use super::statistics::{Asked, Scale, TileAsked, TileSum};

const LANES: usize = 32;

/// What makes logits of products, in this order.
#[derive(Clone, Copy)]
pub(super) struct After<'a, R> {
    pub bias: Option<&'a [R]>,
    pub scale: Option<R>,
    pub softcap: Option<R>,
}

/// Makes logits of rows of products `stride` apart.
pub(super) fn finish<R: Real>(
    logits: &mut [R],
    stride: usize,
    classes: usize,
    after: After<'_, R>,
) {
    let After {
        bias,
        scale,
        softcap,
    } = after;
    if bias.is_none() && scale.is_none() && softcap.is_none() {
        return;
    }
    let inverse = softcap.map(|softcap| R::ONE / softcap);
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for row in logits.chunks_mut(stride) {
                let row = &mut row[..classes];
                if let Some(bias) = bias {
                    for (z, b) in row.iter_mut().zip(bias) {
                        *z += *b;
                    }
                }
                if let Some(scale) = scale {
                    for z in row.iter_mut() {
                        *z *= scale;
                    }
                }
                if let (Some(softcap), Some(inverse)) = (softcap, inverse) {
                    for z in row {
                        *z = softcap * (*z * inverse).tanh();
                    }
                }
            }
        },
    )
}

/// The maximum of each row and the sum of `exp(z - maximum)`. A NaN is in the sum. With a softcap the terms of the
/// mass have its derivative; without, the mass is the sum. What else is asked for goes where it says.
pub(super) fn statistics<R: Real>(
    logits: &[R],
    stride: usize,
    classes: usize,
    softcap: Option<R>,
    statistics: &mut [TileSum<R>],
    mut asked: Option<(Asked, &mut [TileAsked<R>])>,
) {
    let inverse = softcap.map(|softcap| R::ONE / softcap);
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (i, (row, out)) in logits.chunks(stride).zip(statistics).enumerate() {
                let row = &row[..classes];
                let add = |a, b| a + b;
                let max = reduce(row, R::LOWEST, |max, z| if z > max { z } else { max });
                let term = |sum, z: R| sum + (z - max).exp();
                let (sum, weighted) = match &asked {
                    Some((asked, _)) if asked.entropy => sums_with_logarithm(row, max),
                    _ => (reduce_by(row, R::default(), term, add), R::default()),
                };
                if let Some((asked, of_rows)) = &mut asked {
                    of_rows[i].weighted = weighted;
                    if asked.predicted {
                        of_rows[i].largest = first(row, max) as u32;
                    }
                }
                let mass = match inverse {
                    None => sum,
                    Some(inverse) => {
                        // A class that is left out has no finite logit, and no share.
                        let term = |z: R| {
                            let p = (z - max).exp();
                            if p > R::default() {
                                p * slope(z, inverse)
                            } else {
                                p
                            }
                        };
                        reduce_by(row, R::default(), |mass, z| mass + term(z), add)
                    }
                };
                *out = TileSum { max, sum, mass };
            }
        },
    )
}

/// The sums over a row of `exp(z - max)`, in the order of [`reduce_by`], and of that times `z - max`.
#[inline(always)]
fn sums_with_logarithm<R: Real>(row: &[R], max: R) -> (R, R) {
    let mut sums = [R::default(); LANES];
    let mut weighted = [R::default(); LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            let (p, of_log) = terms(chunk[i], max);
            sums[i] += p;
            weighted[i] += of_log;
        }
    }
    for (i, z) in rest.iter().enumerate() {
        let (p, of_log) = terms(*z, max);
        sums[i] += p;
        weighted[i] += of_log;
    }
    (
        combined(sums, |a, b| a + b),
        combined(weighted, |a, b| a + b),
    )
}

/// `exp(z - max)`, and that times `z - max`. A class without probability has no such term; a NaN has one.
#[inline(always)]
fn terms<R: Real>(z: R, max: R) -> (R, R) {
    let down = z - max;
    let p = down.exp();
    (p, if p > R::default() { p * down } else { p })
}

/// The first place of a number in a row, 0 where it is not there.
#[inline(always)]
fn first<R: Real>(row: &[R], number: R) -> usize {
    let has = |part: &[R]| part.iter().fold(false, |any, z| any | (*z == number));
    let part = row.chunks(LANES).position(has).unwrap_or(0) * LANES;
    let place = row[part..].iter().position(|z| *z == number);
    part + place.unwrap_or(0)
}

#[inline(always)]
fn reduce<R: Real>(row: &[R], start: R, combine: impl Fn(R, R) -> R + Copy) -> R {
    reduce_by(row, start, combine, combine)
}

#[inline(always)]
fn reduce_by<R: Real>(
    row: &[R],
    start: R,
    step: impl Fn(R, R) -> R,
    combine: impl Fn(R, R) -> R,
) -> R {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, z) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, *z);
        }
    }
    for (lane, z) in lanes.iter_mut().zip(rest) {
        *lane = step(*lane, *z);
    }
    combined(lanes, combine)
}

#[inline(always)]
fn combined<R: Real>(mut lanes: [R; LANES], combine: impl Fn(R, R) -> R) -> R {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = combine(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// What turns the logits of a row into their gradient.
#[derive(Clone, Copy)]
pub(super) struct Row<R> {
    pub max: R,
    /// `1 / sum exp(z - max)`
    pub inverse_sum: R,
    pub scale: Scale<R>,
    /// Where the target lies in the tile, if it does.
    pub target: Option<usize>,
}

impl<R: Real> Row<R> {
    /// The gradient of the target's logit, which is `z` after the softcap.
    #[inline(always)]
    pub fn of_target(&self, z: R, softcap: Option<R>) -> R {
        let p = (z - self.max).exp() * self.inverse_sum;
        let slope = softcap.map_or(R::ONE, |softcap| slope(z, R::ONE / softcap));
        (self.of_softmax(p, z) - self.scale.one_hot) * slope
    }

    /// What a probability is multiplied by, times it.
    #[inline(always)]
    fn of_softmax(&self, p: R, z: R) -> R {
        // Without probability there is no gradient, and 0 times an infinite logarithm is none either.
        if p > R::default() {
            p * (self.scale.softmax + self.scale.log * (z - self.max))
        } else {
            p * self.scale.softmax
        }
    }
}

/// Replaces the logits of each row by their gradient.
pub(super) fn gradient<R: Real>(
    logits: &mut [R],
    stride: usize,
    classes: usize,
    softcap: Option<R>,
    rows: impl Iterator<Item = Row<R>>,
) {
    let inverse = softcap.map(|softcap| R::ONE / softcap);
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (values, row) in logits.chunks_mut(stride).zip(rows) {
                let values = &mut values[..classes];
                let factor = row.inverse_sum * row.scale.softmax;
                let at_target = row.target.map(|t| (t, row.of_target(values[t], softcap)));
                let of_entropy = row.scale.log != R::default();
                match inverse {
                    _ if of_entropy => {
                        for z in values.iter_mut() {
                            let p = (*z - row.max).exp() * row.inverse_sum;
                            let slope = inverse.map_or(R::ONE, |inverse| slope(*z, inverse));
                            *z = row.of_softmax(p, *z) * slope;
                        }
                    }
                    None => {
                        for z in values.iter_mut() {
                            *z = (*z - row.max).exp() * factor;
                        }
                    }
                    Some(inverse) => {
                        for z in values.iter_mut() {
                            *z = (*z - row.max).exp() * factor * slope(*z, inverse);
                        }
                    }
                }
                if let Some((t, g)) = at_target {
                    values[t] = g;
                }
            }
        },
    )
}

/// The derivative of the softcap where it gave `z`.
#[inline(always)]
fn slope<R: Real>(z: R, inverse_softcap: R) -> R {
    let t = z * inverse_softcap;
    R::ONE - t * t
}

/// Adds the sum over the rows to `sums`.
pub(super) fn add_rows<R: Real>(values: &[R], stride: usize, sums: &mut [R]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for row in values.chunks(stride) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += *value;
                }
            }
        },
    )
}

/// Multiplies everything by one number.
pub(super) fn scale<R: Real>(values: &mut [R], factor: R) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for value in values {
                *value *= factor;
            }
        },
    )
}

/// `sums += factor * values`
pub(super) fn add_scaled<R: Real>(sums: &mut [R], values: &[R], factor: R) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += factor * *value;
            }
        },
    )
}

/// The products of the rows of a matrix with a vector of their length.
pub(super) fn dots<R: Real>(rows: &[R], vector: &[R], out: &mut [R]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (row, out) in rows.chunks(vector.len()).zip(out) {
                let mut lanes = [R::default(); LANES];
                let (a, b) = (row.chunks_exact(LANES), vector.chunks_exact(LANES));
                let (rest_a, rest_b) = (a.remainder(), b.remainder());
                for (a, b) in a.zip(b) {
                    for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                        *lane += *a * *b;
                    }
                }
                for ((lane, a), b) in lanes.iter_mut().zip(rest_a).zip(rest_b) {
                    *lane += *a * *b;
                }
                *out = lanes.iter().fold(R::default(), |sum, lane| sum + *lane);
            }
        },
    )
}

/// Replaces logits by their softmax, or by zeros where all are -inf.
pub(super) fn softmax<R: Real>(logits: &mut [R]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let max = reduce(logits, R::LOWEST, |max, z| if z > max { z } else { max });
            for z in logits.iter_mut() {
                *z = (*z - max).exp();
            }
            let sum = reduce(logits, R::default(), |a, b| a + b);
            if sum > R::default() {
                let inverse = R::ONE / sum;
                for z in logits.iter_mut() {
                    *z *= inverse;
                }
            }
        },
    )
}
