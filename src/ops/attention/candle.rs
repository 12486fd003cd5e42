//! Attention in Candle's operations, for devices that this crate has nothing of its own for: a block of queries at a time,
//! whose scores the backward computes again.

use super::sizes::{Settings, Sizes, NAME};
use crate::node::{attach, Node};
use crate::ops::wide;
use candle_core::{Result, Tensor, D};
use std::ops::Range;

/// Numbers of a block's scores, at most, unless one query has more. Tests have several blocks.
const SCORES: usize = if cfg!(test) { 100 } else { 1 << 24 };

pub(super) fn attention(qkv: [&Tensor; 3], settings: Settings, sizes: Sizes) -> Result<Tensor> {
    let blocks = Blocks::new(qkv, settings, sizes)?;
    let mut parts = Vec::new();
    for queries in blocks.ranges() {
        let block = blocks.block(queries)?;
        let value = block.probabilities.matmul(&block.v)?;
        parts.push(blocks.ungrouped(&value)?);
    }
    let value = Tensor::cat(&parts, 1)?.contiguous()?;
    let value = value.to_dtype(qkv[0].dtype())?;
    match qkv.iter().any(|x| x.track_op()) {
        true => attach(value, &qkv, Attention { settings, sizes }),
        false => Ok(value),
    }
}

struct Attention {
    settings: Settings,
    sizes: Sizes,
}

impl Node for Attention {
    const NAME: &'static str = NAME;

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let qkv = [arguments[0], arguments[1], arguments[2]];
        let blocks = Blocks::new(qkv, self.settings, self.sizes)?;
        let upstream = upstream.detach().to_dtype(wide(upstream.dtype()))?;
        let (mut of_q, mut of_k, mut of_v) =
            (Vec::new(), blocks.k.zeros_like()?, blocks.v.zeros_like()?);
        for queries in blocks.ranges() {
            let block = blocks.block(queries.clone())?;
            let upstream = upstream.narrow(1, queries.start, queries.len())?;
            let upstream = blocks.grouped(&upstream)?;
            let of_probabilities = upstream.matmul(&block.v.t()?)?;
            let delta = (&block.probabilities * &of_probabilities)?.sum_keepdim(D::Minus1)?;
            let of_scores = (of_probabilities.broadcast_sub(&delta)? * &block.probabilities)?;
            let of_scores = match &block.slope {
                Some(slope) => (of_scores * slope)?,
                None => of_scores,
            };
            let of_scores = (of_scores * self.settings.scale)?;
            of_q.push(blocks.ungrouped(&of_scores.matmul(&block.k)?)?);
            let add = |sum: &Tensor, left: &Tensor, right: &Tensor| -> Result<Tensor> {
                let here = left.t()?.matmul(right)?;
                let (start, end) = (block.keys.start, sum.dim(2)? - block.keys.end);
                sum + here
                    .pad_with_zeros(2, start, 0)?
                    .pad_with_zeros(2, 0, end)?
            };
            of_k = add(&of_k, &of_scores, &block.q)?;
            of_v = add(&of_v, &block.probabilities, &upstream)?;
        }
        let of_q = Tensor::cat(&of_q, 1)?.contiguous()?;
        let of_k = of_k.transpose(1, 2)?.contiguous()?;
        let of_v = of_v.transpose(1, 2)?.contiguous()?;
        let gradients = [of_q, of_k, of_v].into_iter().zip(arguments);
        gradients
            .map(|(gradient, argument)| match argument.track_op() {
                true => gradient.to_dtype(argument.dtype()).map(Some),
                false => Ok(None),
            })
            .collect()
    }
}

/// The operands, `(batch, heads, time, head_dim)`.
struct Blocks {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: Settings,
    sizes: Sizes,
}

/// Some queries and the keys they see. The queries of all heads that share keys are rows of one matrix:
/// `(batch, key_heads, group * queries, ..)`.
struct Block {
    keys: Range<usize>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probabilities: Tensor,
    /// The softcap's.
    slope: Option<Tensor>,
}

impl Blocks {
    fn new(qkv: [&Tensor; 3], settings: Settings, sizes: Sizes) -> Result<Self> {
        let wide = wide(qkv[0].dtype());
        let [q, k, v] = qkv.map(|x| x.detach().to_dtype(wide));
        let by_head = |x: Tensor| x.transpose(1, 2)?.contiguous();
        Ok(Self {
            q: q?,
            k: by_head(k?)?,
            v: by_head(v?)?,
            settings,
            sizes,
        })
    }

    fn ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let Sizes {
            batch,
            queries,
            keys,
            heads,
            ..
        } = self.sizes;
        let rows = (SCORES / (batch * heads * keys)).clamp(1, queries);
        (0..queries)
            .step_by(rows)
            .map(move |start| start..(start + rows).min(queries))
    }

    /// `(batch, queries, heads, head_dim)` to `(batch, key_heads, group * queries, head_dim)`.
    fn grouped(&self, x: &Tensor) -> Result<Tensor> {
        let shape = (
            self.sizes.batch,
            self.sizes.key_heads,
            (),
            self.sizes.head_dim,
        );
        x.transpose(1, 2)?.contiguous()?.reshape(shape)
    }

    fn ungrouped(&self, x: &Tensor) -> Result<Tensor> {
        let shape = (self.sizes.batch, self.sizes.heads, (), self.sizes.head_dim);
        x.reshape(shape)?.transpose(1, 2)?.contiguous()
    }

    fn block(&self, queries: Range<usize>) -> Result<Block> {
        let keys = self.sizes.keys_of(queries.clone(), &self.settings);
        let of_keys = |x: &Tensor| x.narrow(2, keys.start, keys.len())?.contiguous();
        let (k, v) = (of_keys(&self.k)?, of_keys(&self.v)?);
        let q = self.grouped(&self.q.narrow(1, queries.start, queries.len())?)?;
        let scores = (q.matmul(&k.t()?)? * self.settings.scale)?;
        let (scores, slope) = match self.settings.softcap {
            None => (scores, None),
            Some(softcap) => {
                let tanh = (scores / softcap)?.tanh()?;
                let slope = (1. - tanh.sqr()?)?;
                ((tanh * softcap)?, Some(slope))
            }
        };
        let shape = scores.shape().clone();
        let by_query = (
            self.sizes.batch,
            self.sizes.heads,
            queries.len(),
            keys.len(),
        );
        let scores = scores.reshape(by_query)?;
        let scores = scores.broadcast_add(&self.mask(queries, keys.clone(), &scores)?)?;
        let probabilities = candle_nn::ops::softmax(&scores, D::Minus1)?.reshape(shape)?;
        Ok(Block {
            keys,
            q,
            k,
            v,
            probabilities,
            slope,
        })
    }

    /// 0 where a query sees a key, -inf elsewhere, `(queries, keys)`.
    fn mask(&self, queries: Range<usize>, keys: Range<usize>, like: &Tensor) -> Result<Tensor> {
        let mut mask = Vec::with_capacity(queries.len() * keys.len());
        for query in queries.clone() {
            let seen = self.sizes.keys_of(query..query + 1, &self.settings);
            let number = |key| match seen.contains(&key) {
                true => 0f32,
                false => f32::NEG_INFINITY,
            };
            mask.extend(keys.clone().map(number));
        }
        let shape = (queries.len(), keys.len());
        Tensor::from_vec(mask, shape, like.device())?.to_dtype(like.dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same, random};
    use crate::ops::AttentionOptions;

    #[test]
    fn candles_operations_give_the_same() -> Result<()> {
        let (q, k, v) = (
            random(&[2, 7, 4, 5])?,
            random(&[2, 9, 2, 5])?,
            random(&[2, 9, 2, 5])?,
        );
        for (causal, window, softcap) in [
            (false, None, None),
            (true, None, Some(2.)),
            (true, Some(3), None),
        ] {
            let options = AttentionOptions {
                causal,
                window,
                softcap,
                scale: None,
            };
            let sizes = Sizes::new(&q, &k, &v)?;
            let settings = Settings::new(&options, &sizes)?;
            let here = super::attention([&q, &k, &v], settings, sizes)?;
            let there = crate::ops::attention(&q, &k, &v, &options)?;
            assert_same(&here, &there, &[&q, &k, &v])?;
        }
        Ok(())
    }
}
