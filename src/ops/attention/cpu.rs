//! Attention on the CPU: blocks of queries by all the keys they see, then blocks of keys by all the queries that see
//! them. A task has what all heads have at some positions: a contiguous part of the results.

use super::sizes::{Settings, Sizes};
use crate::ops::cpu::{opened, real, storage, tensor, values, Number};
use candle_core::{CpuStorage, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Positions of a task.
const BLOCK: usize = 64;

/// A tensor `(batch, time, heads, head_dim)`.
struct View<'a, R> {
    values: &'a [R],
    strides: [usize; 4],
}

impl<'a, R: Number> View<'a, R> {
    fn new((storage, layout): (&'a CpuStorage, &Layout)) -> Result<Self> {
        let strides = layout.stride();
        Ok(Self {
            values: values(storage, layout)?,
            strides: [strides[0], strides[1], strides[2], strides[3]],
        })
    }

    /// A head from some position on: rows of positions, columns of dimensions.
    fn head(&self, batch: usize, time: usize, head: usize) -> Matrix<'a, R> {
        let [of_batch, of_time, of_head, of_dim] = self.strides;
        Matrix {
            values: &self.values[batch * of_batch + time * of_time + head * of_head..],
            row: of_time,
            column: of_dim,
        }
    }
}

/// An operand of a product and how far apart its rows and columns are.
#[derive(Clone, Copy)]
struct Matrix<'a, R> {
    values: &'a [R],
    row: usize,
    column: usize,
}

impl<'a, R: Number> Matrix<'a, R> {
    fn rows(values: &'a [R], row: usize) -> Self {
        Self {
            values,
            row,
            column: 1,
        }
    }

    fn transposed(self) -> Self {
        Self {
            row: self.column,
            column: self.row,
            ..self
        }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows * columns == 0
            || (rows - 1) * self.row + (columns - 1) * self.column < self.values.len()
    }
}

/// `out = scale left right`, or that added to `out`, whose rows are `stride` apart. `[rows, inner, columns]` are the sizes.
fn multiply<R: Number>(
    (out, stride, add): (&mut [R], usize, bool),
    scale: R,
    [rows, inner, columns]: [usize; 3],
    left: Matrix<'_, R>,
    right: Matrix<'_, R>,
) {
    assert!(left.holds(rows, inner) && right.holds(inner, columns));
    assert!(columns <= stride && (rows == 0 || (rows - 1) * stride + columns <= out.len()));
    // SAFETY: every matrix lies within its slice, and `out` is borrowed mutably and so overlaps neither operand.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            out.as_mut_ptr(),
            1,
            stride as isize,
            add,
            left.values.as_ptr(),
            left.column as isize,
            left.row as isize,
            right.values.as_ptr(),
            right.column as isize,
            right.row as isize,
            R::ONE,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        )
    }
}

/// From a score to what the softmax sees, and the derivative of that step.
#[derive(Clone, Copy)]
struct Cap<R>(Option<(R, R)>);

impl<R: Number> Cap<R> {
    fn new(softcap: Option<f64>) -> Self {
        Self(softcap.map(|softcap| (real(softcap), real(1. / softcap))))
    }

    #[inline(always)]
    fn at(self, z: R) -> (R, R) {
        match self.0 {
            None => (z, R::ONE),
            Some((softcap, inverse)) => {
                let tanh = (z * inverse).tanh();
                (softcap * tanh, R::ONE - tanh * tanh)
            }
        }
    }
}

type Stored<'a> = (&'a CpuStorage, &'a Layout);

/// Runs `f` on each block of positions: the batch entry, the positions, and their part of each output, whose batch entries
/// have `time` positions of this many numbers.
fn blocks<R: Number>(
    outputs: [(&mut [R], usize); 2],
    time: usize,
    f: impl Fn(usize, Range<usize>, &mut [R], &mut [R]) + Send + Sync,
) {
    let [(first, first_size), (second, second_size)] = outputs;
    let batches = first.par_chunks_mut(time * first_size);
    let batches = batches.zip(second.par_chunks_mut(time * second_size));
    batches.enumerate().for_each(|(batch, (first, second))| {
        let blocks = first.par_chunks_mut(BLOCK * first_size);
        let blocks = blocks.zip(second.par_chunks_mut(BLOCK * second_size));
        blocks.enumerate().for_each(|(i, (first, second))| {
            let start = i * BLOCK;
            f(
                batch,
                start..start + first.len() / first_size,
                first,
                second,
            )
        })
    })
}

/// The result and the log-sum-exp of its rows, `(batch, queries, heads)`.
pub(super) fn forward<R: Number>(
    [q, k, v]: [Stored<'_>; 3],
    settings: &Settings,
    sizes: &Sizes,
) -> Result<(CpuStorage, Tensor)> {
    let &Sizes {
        batch,
        queries,
        heads,
        head_dim,
        ..
    } = sizes;
    let (q, k, v) = (View::<R>::new(q)?, View::<R>::new(k)?, View::<R>::new(v)?);
    let (scale, cap) = (real::<R>(settings.scale), Cap::<R>::new(settings.softcap));
    let stride = heads * head_dim;
    let mut out = vec![R::default(); batch * queries * stride];
    let mut lse = vec![R::default(); batch * queries * heads];
    let outputs = [(&mut out[..], stride), (&mut lse[..], heads)];
    blocks(outputs, queries, |batch, positions, out, lse| {
        let (rows, keys) = (positions.len(), sizes.keys_of(positions.clone(), settings));
        let mut scores = vec![R::default(); rows * keys.len()];
        for head in 0..heads {
            let key_head = head / sizes.group();
            multiply(
                (&mut scores, keys.len(), false),
                scale,
                [rows, head_dim, keys.len()],
                q.head(batch, positions.start, head),
                k.head(batch, keys.start, key_head).transposed(),
            );
            pulp::Arch::new().dispatch(
                #[inline(always)]
                || {
                    for (i, row) in scores.chunks_mut(keys.len()).enumerate() {
                        let query = positions.start + i;
                        let seen = sizes.keys_of(query..query + 1, settings);
                        let seen = seen.start - keys.start..seen.end - keys.start;
                        row[..seen.start].fill(R::default());
                        row[seen.end..].fill(R::default());
                        lse[i * heads + head] = softmax(&mut row[seen], cap);
                    }
                },
            );
            multiply(
                (&mut out[head * head_dim..], stride, false),
                R::ONE,
                [rows, keys.len(), head_dim],
                Matrix::rows(&scores, keys.len()),
                v.head(batch, keys.start, key_head),
            );
        }
    });
    let shape = Shape::from((batch, queries, heads));
    Ok((storage(out), tensor(lse, &shape)))
}

/// Turns scores into probabilities and returns their log-sum-exp.
#[inline(always)]
fn softmax<R: Number>(row: &mut [R], cap: Cap<R>) -> R {
    let mut max = R::LOWEST;
    for z in row.iter_mut() {
        *z = cap.at(*z).0;
        if *z > max {
            max = *z;
        }
    }
    for z in row.iter_mut() {
        *z = (*z - max).exp();
    }
    let sum = super::super::cpu::sum(row.len(), |i| row[i]);
    let inverse = R::ONE / sum;
    for p in row.iter_mut() {
        *p *= inverse;
    }
    max + real(candle_core::WithDType::to_f64(sum).ln())
}

/// What a backward knows of every row.
struct Known<'a, R> {
    q: View<'a, R>,
    k: View<'a, R>,
    v: View<'a, R>,
    upstream: View<'a, R>,
    /// `(batch, queries, heads)` both: the log-sum-exp, and the sum of `out * upstream`.
    lse: &'a [R],
    delta: Vec<R>,
    settings: &'a Settings,
    sizes: &'a Sizes,
}

impl<R: Number> Known<'_, R> {
    /// Scores of some queries and keys of a head, and the gradients of their probabilities, become the probabilities and
    /// the gradients of the scores. Both are `(queries, keys)`.
    fn softmax_gradient(
        &self,
        [batch, head]: [usize; 2],
        queries: Range<usize>,
        keys: Range<usize>,
        scores: &mut [R],
        gradients: &mut [R],
    ) {
        let cap = Cap::<R>::new(self.settings.softcap);
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let rows = scores.chunks_mut(keys.len());
                let rows = rows.zip(gradients.chunks_mut(keys.len()));
                for (query, (scores, gradients)) in queries.zip(rows) {
                    let seen = self.sizes.keys_of(query..query + 1, self.settings);
                    let end = seen.end.clamp(keys.start, keys.end) - keys.start;
                    let start = (seen.start.clamp(keys.start, keys.end) - keys.start).min(end);
                    for row in [&mut *scores, &mut *gradients] {
                        row[..start].fill(R::default());
                        row[end..].fill(R::default());
                    }
                    let at = (batch * self.sizes.queries + query) * self.sizes.heads + head;
                    let (lse, delta) = (self.lse[at], self.delta[at]);
                    let both = scores[start..end]
                        .iter_mut()
                        .zip(&mut gradients[start..end]);
                    for (score, gradient) in both {
                        let (z, slope) = cap.at(*score);
                        *score = (z - lse).exp();
                        *gradient = *score * (*gradient - delta) * slope;
                    }
                }
            },
        )
    }

    /// Probabilities and gradients of the scores of some queries and keys of a head.
    fn scores(
        &self,
        [batch, head]: [usize; 2],
        queries: Range<usize>,
        keys: Range<usize>,
    ) -> [Vec<R>; 2] {
        let (rows, columns, head_dim) = (queries.len(), keys.len(), self.sizes.head_dim);
        let key_head = head / self.sizes.group();
        let product = |scale, left: &View<'_, R>, right: &View<'_, R>| {
            let mut out = vec![R::default(); rows * columns];
            multiply(
                (&mut out, columns, false),
                scale,
                [rows, head_dim, columns],
                left.head(batch, queries.start, head),
                right.head(batch, keys.start, key_head).transposed(),
            );
            out
        };
        let mut scores = product(real(self.settings.scale), &self.q, &self.k);
        let mut gradients = product(R::ONE, &self.upstream, &self.v);
        self.softmax_gradient([batch, head], queries, keys, &mut scores, &mut gradients);
        [scores, gradients]
    }

    fn queries_gradient(&self) -> Vec<R> {
        let &Sizes {
            batch,
            queries,
            heads,
            head_dim,
            ..
        } = self.sizes;
        let stride = heads * head_dim;
        let mut of_q = vec![R::default(); batch * queries * stride];
        // The other output is nothing: a number a position.
        let mut nothing = vec![R::default(); batch * queries];
        let outputs = [(&mut of_q[..], stride), (&mut nothing[..], 1)];
        blocks(outputs, queries, |batch, positions, of_q, _| {
            let keys = self.sizes.keys_of(positions.clone(), self.settings);
            for head in 0..heads {
                let [_, gradients] = self.scores([batch, head], positions.clone(), keys.clone());
                multiply(
                    (&mut of_q[head * head_dim..], stride, false),
                    real(self.settings.scale),
                    [positions.len(), keys.len(), head_dim],
                    Matrix::rows(&gradients, keys.len()),
                    self.k.head(batch, keys.start, head / self.sizes.group()),
                );
            }
        });
        of_q
    }

    fn keys_gradients(&self) -> [Vec<R>; 2] {
        let &Sizes {
            batch,
            keys,
            heads,
            key_heads,
            head_dim,
            ..
        } = self.sizes;
        let stride = key_heads * head_dim;
        let mut of_k = vec![R::default(); batch * keys * stride];
        let mut of_v = of_k.clone();
        let outputs = [(&mut of_k[..], stride), (&mut of_v[..], stride)];
        blocks(outputs, keys, |batch, positions, of_k, of_v| {
            let queries = self.sizes.queries_of(positions.clone(), self.settings);
            if queries.is_empty() {
                return;
            }
            let columns = positions.len();
            let shape = [columns, queries.len(), head_dim];
            for head in 0..heads {
                let at = head / self.sizes.group() * head_dim;
                let [scores, gradients] =
                    self.scores([batch, head], queries.clone(), positions.clone());
                multiply(
                    (&mut of_v[at..], stride, true),
                    R::ONE,
                    shape,
                    Matrix::rows(&scores, columns).transposed(),
                    self.upstream.head(batch, queries.start, head),
                );
                multiply(
                    (&mut of_k[at..], stride, true),
                    real(self.settings.scale),
                    shape,
                    Matrix::rows(&gradients, columns).transposed(),
                    self.q.head(batch, queries.start, head),
                );
            }
        });
        [of_k, of_v]
    }
}

/// The gradients of queries, keys and values. `out` and its gradient are contiguous.
pub(super) fn backward<R: Number>(
    qkv: [&Tensor; 3],
    [out, upstream, lse]: [&Tensor; 3],
    settings: &Settings,
    sizes: &Sizes,
) -> Result<[Tensor; 3]> {
    let [q, k, v] = qkv;
    opened([q, k, v, upstream, out, lse], |all| {
        let [q_stored, k_stored, v_stored, upstream, out, lse] = all;
        let known = Known {
            q: View::<R>::new(q_stored)?,
            k: View::new(k_stored)?,
            v: View::new(v_stored)?,
            upstream: View::new(upstream)?,
            lse: values(lse.0, lse.1)?,
            delta: deltas(
                &values::<R>(out.0, out.1)?[..q.elem_count()],
                values(upstream.0, upstream.1)?,
                sizes.head_dim,
            ),
            settings,
            sizes,
        };
        let of_q = known.queries_gradient();
        let [of_k, of_v] = known.keys_gradients();
        Ok([
            tensor(of_q, q.shape()),
            tensor(of_k, k.shape()),
            tensor(of_v, v.shape()),
        ])
    })
}

fn deltas<R: Number>(out: &[R], upstream: &[R], head_dim: usize) -> Vec<R> {
    let rows = out.par_chunks(head_dim).zip(upstream.par_chunks(head_dim));
    rows.with_min_len(256)
        .map(|(out, upstream)| super::super::cpu::sum(head_dim, |i| out[i] * upstream[i]))
        .collect()
}
