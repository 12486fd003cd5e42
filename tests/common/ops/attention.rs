//! Attention.

use super::{differentiated, random, var, Numbers, Operation, Random, Want};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::ops::{attention, AttentionOptions};

/// Queries, keys and values of their own, or as views of one projection.
#[derive(Debug, Clone)]
pub struct Attention {
    pub dtype: DType,
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
    pub options: AttentionOptions,
    pub views: bool,
}

struct Inputs {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    upstream: Vec<f64>,
}

impl Attention {
    fn shapes(&self) -> [[usize; 4]; 2] {
        [
            [self.batch, self.queries, self.heads, self.head_dim],
            [self.batch, self.keys, self.key_heads, self.head_dim],
        ]
    }

    fn inputs(&self) -> Inputs {
        let mut source = Random::new((self.queries * 131 + self.head_dim) as u64);
        let [of_q, of_k] = self.shapes().map(|shape| shape.iter().product::<usize>());
        let mut next = |count| random(&mut source, self.dtype, count, 1.);
        Inputs {
            q: next(of_q),
            k: next(of_k),
            v: next(of_k),
            upstream: next(of_q),
        }
    }

    fn sees(&self, query: usize, key: usize) -> bool {
        let position = query + self.keys - self.queries;
        let window = self.options.window.unwrap_or(usize::MAX);
        !self.options.causal || (key <= position && position - key < window)
    }

    /// The heads of queries, keys and values at each position, one after the other.
    fn beside(&self, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let (wide, narrow) = (self.heads * self.head_dim, self.key_heads * self.head_dim);
        let rows = q.chunks(wide).zip(k.chunks(narrow)).zip(v.chunks(narrow));
        rows.flat_map(|((q, k), v)| q.iter().chain(k).chain(v).copied())
            .collect()
    }
}

impl Operation for Attention {
    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn computed(&self, device: &Device) -> Result<Vec<Numbers>> {
        let Inputs { q, k, v, upstream } = self.inputs();
        let [of_q, of_k] = self.shapes();
        if self.views {
            let [batch, time, heads, head_dim] = of_q;
            let shape = [batch, time, heads + 2 * self.key_heads, head_dim];
            let all = var(&self.beside(&q, &k, &v), &shape, self.dtype, device)?;
            let part = |start, len| all.narrow(2, start, len);
            let out = attention(
                &part(0, heads)?,
                &part(heads, self.key_heads)?,
                &part(heads + self.key_heads, self.key_heads)?,
                &self.options,
            )?;
            return differentiated(&[("out", out)], &[&upstream], &[("dqkv", &all)]);
        }
        let q = var(&q, &of_q, self.dtype, device)?;
        let k = var(&k, &of_k, self.dtype, device)?;
        let v = var(&v, &of_k, self.dtype, device)?;
        let out = attention(&q, &k, &v, &self.options)?;
        let vars = [("dq", &q), ("dk", &k), ("dv", &v)];
        differentiated(&[("out", out)], &[&upstream], &vars)
    }

    fn wanted(&self) -> Vec<Want> {
        let Inputs { q, k, v, upstream } = self.inputs();
        let dim = self.head_dim;
        let scale = self.options.scale.unwrap_or(1. / (dim as f64).sqrt());
        let mut out = vec![0.; q.len()];
        let [mut of_q, mut q_terms] = [vec![0.; q.len()], vec![0.; q.len()]];
        let [mut of_k, mut k_terms] = [vec![0.; k.len()], vec![0.; k.len()]];
        let mut of_v = vec![0.; v.len()];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for row in 0..self.batch * self.queries * self.heads {
            let (position, head) = (row / self.heads, row % self.heads);
            let (batch, query) = (position / self.queries, position % self.queries);
            let key_head = head / (self.heads / self.key_heads);
            let at = row * dim..(row + 1) * dim;
            let of_key = |key: usize| {
                let start = ((batch * self.keys + key) * self.key_heads + key_head) * dim;
                start..start + dim
            };
            let seen: Vec<usize> = (0..self.keys)
                .filter(|key| self.sees(query, *key))
                .collect();
            let (mut weights, mut slopes) = (Vec::new(), Vec::new());
            for &key in &seen {
                let z = scale * dot(&q[at.clone()], &k[of_key(key)]);
                let (z, slope) = match self.options.softcap {
                    Some(cap) => (cap * (z / cap).tanh(), 1. - (z / cap).tanh().powi(2)),
                    None => (z, 1.),
                };
                weights.push(z);
                slopes.push(slope);
            }
            let max = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            weights.iter_mut().for_each(|z| *z = (*z - max).exp());
            let sum: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|z| *z /= sum);
            let of_weights: Vec<f64> = seen
                .iter()
                .map(|key| dot(&upstream[at.clone()], &v[of_key(*key)]))
                .collect();
            let delta = dot(&weights, &of_weights);
            for (i, &key) in seen.iter().enumerate() {
                let of_score = weights[i] * (of_weights[i] - delta) * slopes[i] * scale;
                let terms = weights[i] * (of_weights[i].abs() + delta.abs()) * slopes[i] * scale;
                for (d, at) in at.clone().enumerate() {
                    let of_key = of_key(key).start + d;
                    out[at] += weights[i] * v[of_key];
                    of_v[of_key] += weights[i] * upstream[at];
                    of_q[at] += of_score * k[of_key];
                    of_k[of_key] += of_score * q[at];
                    q_terms[at] += terms * k[of_key].abs();
                    k_terms[of_key] += terms * q[at].abs();
                }
            }
        }
        let out = Want::new("out", out);
        if self.views {
            let of_all = self.beside(&of_q, &of_k, &of_v);
            let terms = self.beside(&q_terms, &k_terms, &vec![0.; of_v.len()]);
            return vec![out, Want::of_terms("dqkv", of_all, &terms)];
        }
        vec![
            out,
            Want::of_terms("dq", of_q, &q_terms),
            Want::of_terms("dk", of_k, &k_terms),
            Want::new("dv", of_v),
        ]
    }
}

/// Every combination of options that a model has.
fn options() -> Vec<AttentionOptions> {
    let plain = AttentionOptions::default();
    let causal = AttentionOptions {
        causal: true,
        ..plain
    };
    vec![
        causal,
        plain,
        AttentionOptions {
            window: Some(9),
            ..causal
        },
        AttentionOptions {
            softcap: Some(2.),
            scale: Some(0.3),
            ..causal
        },
        AttentionOptions {
            window: Some(64),
            softcap: Some(1.),
            ..causal
        },
        AttentionOptions {
            softcap: Some(3.),
            ..plain
        },
    ]
}

/// Ragged lengths, head sizes, groups, options.
pub fn attentions(dtype: DType) -> Vec<Box<dyn Operation>> {
    let options = options();
    let mut cases: Vec<Box<dyn Operation>> = Vec::new();
    let mut push = |case: Attention| cases.push(Box::new(case));
    let mut turn = 0;
    for time in [1, 7, 65, 130] {
        for head_dim in [20, 64, 80, 96, 128, 256] {
            for which in [turn, turn + 2, turn + 3] {
                let (heads, key_heads) = [(4, 2), (3, 1), (2, 2)][turn % 3];
                let options = options[which % options.len()];
                push(Attention {
                    dtype,
                    batch: 1 + turn % 2,
                    queries: time,
                    keys: time,
                    heads,
                    key_heads,
                    head_dim,
                    options,
                    views: which % 2 == 0,
                });
                turn += 1;
            }
        }
    }
    // More keys than queries, and many tiles.
    for (i, (queries, keys)) in [(1, 130), (7, 65), (65, 67), (130, 300), (300, 300)]
        .into_iter()
        .enumerate()
    {
        for options in &options {
            push(Attention {
                dtype,
                batch: 1,
                queries,
                keys,
                heads: 2,
                key_heads: 1,
                head_dim: [64, 128, 96, 64, 256][i],
                options: *options,
                views: false,
            });
        }
    }
    cases
}
