//! A low-rank adapter: two small matrices beside a frozen one.

use super::linear::linear;
use crate::node::{attach, Node};
use crate::LowRank;
use candle_core::{Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The module that is the head.
pub(super) const HEAD: &str = "lm_head";

/// `scale B A` beside a matrix `(outputs, inputs)`.
#[derive(Debug, Clone)]
pub(super) struct Adapter {
    /// `(rank, inputs)`.
    pub a: Tensor,
    /// `(outputs, rank)`.
    pub b: Tensor,
    pub scale: f64,
    /// The share of an input's numbers that are dropped in training.
    pub dropout: f64,
    /// Which of a decoder's adapters it is: each drops other numbers.
    pub number: usize,
}

/// Gives the adapter of a module, by its name and its numbers of inputs and outputs.
pub(super) type Adapters<'a> = dyn Fn(&str, usize, usize) -> Result<Option<Adapter>> + 'a;

impl Adapter {
    /// What it adds to `x W^T`, in the dtype of `x`. With a seed, numbers of `x` are dropped.
    pub fn forward(&self, x: &Tensor, seed: Option<u64>) -> Result<Tensor> {
        let input = x.to_dtype(self.a.dtype())?;
        let input = match seed.filter(|_| self.dropout > 0.) {
            Some(seed) => self.dropped(&input, seed)?,
            None => input,
        };
        let inner = (input.matmul(&self.a.t()?)? * self.scale)?;
        inner.matmul(&self.b.t()?)?.to_dtype(x.dtype())
    }

    /// `x W^T` and what it adds to it. With a seed, numbers of `x` are dropped.
    pub fn beside(&self, weight: &Tensor, x: &Tensor, seed: Option<u64>) -> Result<Tensor> {
        let drops = seed.is_some() && self.dropout > 0.;
        if drops || weight.track_op() || self.a.dtype() != x.dtype() {
            return linear(x, weight)? + self.forward(x, seed)?;
        }
        // One node: as Candle's operations, each part of the sum and of its gradient would take passes of its own.
        let detached = self.detached();
        let input = x.detach();
        let y = (input.matmul(&weight.t()?)? + detached.forward(&input, None)?)?;
        let arguments = [x, &self.a, &self.b];
        match arguments.iter().any(|argument| argument.track_op()) {
            true => attach(y, &arguments, Beside(weight.clone(), self.scale)),
            false => Ok(y),
        }
    }

    /// What the loss is told of an adapter of the head. With a seed, numbers of the embeddings are dropped.
    pub fn low_rank(&self, seed: Option<u64>) -> LowRank {
        let low_rank = LowRank::new(&self.a, &self.b, self.scale);
        match seed.filter(|_| self.dropout > 0.) {
            None => low_rank,
            Some(seed) => {
                let adapter = self.clone();
                low_rank.input(move |x| adapter.dropped(x, seed))
            }
        }
    }

    /// The matrix with the adapter in it.
    pub fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let product = self.b.detach().matmul(&self.a.detach())?;
        let wide = weight.detach().to_dtype(product.dtype())?;
        let merged = (wide + (product * self.scale)?)?.to_dtype(weight.dtype())?;
        attach(merged, &[&self.a, &self.b], Merge(self.scale))
    }

    pub fn tensors(&self) -> [&Tensor; 2] {
        [&self.a, &self.b]
    }

    pub fn detached(&self) -> Self {
        Self {
            a: self.a.detach(),
            b: self.b.detach(),
            ..self.clone()
        }
    }

    /// Each number of `x` is 0 with the probability of the dropout, else divided by that of the contrary. Which ones
    /// follows from the seed, so that a layer that is computed again drops the same.
    fn dropped(&self, x: &Tensor, seed: u64) -> Result<Tensor> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&(self.number as u64).to_le_bytes());
        let mut rng = StdRng::from_seed(key);
        let kept = (1. / (1. - self.dropout)) as f32;
        let factors: Vec<f32> = (0..x.elem_count())
            .map(|_| match f64::from(rng.random::<f32>()) < self.dropout {
                true => 0.,
                false => kept,
            })
            .collect();
        let factors = Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(x.dtype())?;
        let dropped = (x.detach() * &factors)?;
        match x.track_op() {
            true => attach(dropped, &[x], Dropout(factors)),
            false => Ok(dropped),
        }
    }
}

/// The name of a module in peft's files.
pub(super) fn saved_name(module: &str) -> String {
    format!("base_model.model.{module}")
}

pub(super) fn last_name(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// `W + scale B A` of `A` and `B`. Candle's sum would form a gradient of `W` too.
struct Merge(f64);

impl Node for Merge {
    const NAME: &'static str = "merged-adapter";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let (a, b) = (arguments[0].detach(), arguments[1].detach());
        let upstream = upstream.detach().to_dtype(a.dtype())?;
        let of_a = (b.t()?.matmul(&upstream)? * self.0)?;
        let of_b = (upstream.matmul(&a.t()?)? * self.0)?;
        Ok(vec![Some(of_a), Some(of_b)])
    }
}

/// `x W^T + scale x A^T B^T` of `x`, `A` and `B`.
struct Beside(Tensor, f64);

impl Node for Beside {
    const NAME: &'static str = "adapted-linear";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let Self(weight, scale) = self;
        let [x, a, b] = [0, 1, 2].map(|i| arguments[i].detach());
        let wanted = |i: usize| arguments[i].track_op();
        let of_inner = (upstream.matmul(&b)? * *scale)?;
        Ok(vec![
            match wanted(0) {
                true => Some((upstream.matmul(weight)? + of_inner.matmul(&a)?)?),
                false => None,
            },
            match wanted(1) {
                true => Some(of_inner.t()?.matmul(&x)?),
                false => None,
            },
            match wanted(2) {
                true => {
                    let inner = (x.matmul(&a.t()?)? * *scale)?;
                    Some(upstream.t()?.matmul(&inner)?)
                }
                false => None,
            },
        ])
    }
}

/// A product with factors that do not change. Candle's product would form their gradient too.
struct Dropout(Tensor);

impl Node for Dropout {
    const NAME: &'static str = "adapter-dropout";

    fn backward(&self, _: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some((upstream * &self.0)?)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn dropout_takes_its_share_and_keeps_the_mean() -> Result<()> {
        let x = Tensor::ones((100, 1000), DType::F32, &Device::Cpu)?;
        let adapter = |number| Adapter {
            a: x.clone(),
            b: x.clone(),
            scale: 1.,
            dropout: 0.2,
            number,
        };
        let dropped = |number, seed| {
            adapter(number)
                .dropped(&x, seed)?
                .flatten_all()?
                .to_vec1::<f32>()
        };
        let values = dropped(0, 1)?;
        let zeros = values.iter().filter(|&&value| value == 0.).count();
        // 20,000 are due, give or take six times 126.
        assert!((19_240..20_760).contains(&zeros), "{zeros} zeros");
        assert!(values.iter().all(|&value| value == 0. || value == 1.25));
        assert_eq!(values, dropped(0, 1)?);
        assert_ne!(values, dropped(1, 1)?);
        assert_ne!(values, dropped(0, 2)?);
        Ok(())
    }
}
