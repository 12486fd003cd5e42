//! The uniform part of label smoothing: `-f_i sum_j w_j z_ij` in the loss of position `i`, where `w` are the class weights
//! or ones.
//!
//! Without a softcap it is linear: with `u = sum_j w_j C_j` it is `-f_i E_i . u`, its gradient of the embeddings is
//! `-f_i u` and that of the classifier `-w_j sum_i f_i E_i`, two outer products. So implementations need not know of it:
//! the op adds it to what they return. What smoothing does beside this is in [`Terms`](crate::terms::Terms).

use super::contract::{accumulator, Gradients};
use super::packed::Packed;
use super::passes::Passes;
use crate::matrices::Matrices;
use crate::objectives::counted;
use crate::positions::PositionMap;
use crate::problem::Problem;
use crate::Reduction;
use candle_core::{DType, Result, Tensor};

pub(super) struct Smoothing {
    /// `(positions)`: `-f_i` times the scale of the logits, 0 where the position does not count.
    factors: Tensor,
    /// `(rows of E)` and `(positions)`, u8: whether the row or the position counts.
    counts: Tensor,
    counted: Tensor,
    /// What the reduced loss multiplies the sum of the losses by: one number.
    share: Tensor,
    /// `(V)`: the class weights here, or ones.
    weights: Tensor,
    /// `(D)`, or as wide as the embeddings: the sum of the classes by their weights.
    sum: Tensor,
    passes: Passes,
    /// What is added to the losses, `(positions)`, and to the reduced loss, `(1)`: f32.
    pub losses: Tensor,
    pub loss: Tensor,
    positions: PositionMap,
}

impl Smoothing {
    /// `None` where there is none. On a shard of the classes this calls the other ranks.
    pub fn new(problem: &Problem, matrices: Matrices<&Tensor>) -> Result<Option<Self>> {
        let smoothing = problem.settings.label_smoothing;
        if smoothing == 0. {
            return Ok(None);
        }
        let Matrices {
            embeddings,
            classifier,
            adapter,
            bias,
        } = matrices;
        let device = embeddings.device();
        let acc = accumulator(problem.dtype);
        let positions = problem.positions;
        let shard = problem.settings.vocab_parallel.as_ref();
        let here = classifier.dim(0)?;
        let of_classes = problem.weights.as_ref().and_then(|w| w.classes.as_ref());
        let (weights, classes) = match (of_classes, shard) {
            (Some(all), None) => (all.clone(), here as f64),
            (Some(all), Some(shard)) => (all.narrow(0, shard.start, here)?, all.dim(0)? as f64),
            (None, None) => (Tensor::ones(here, acc, device)?, here as f64),
            (None, Some(shard)) => {
                let all = shard.sum(Tensor::full(here as f32, 1, device)?.to_dtype(acc)?)?;
                let all = all.to_dtype(DType::F64)?.get(0)?.to_scalar::<f64>()?;
                (Tensor::ones(here, acc, device)?, all)
            }
        };
        let counts = counted(&problem.shaped_targets()?, &problem.counting())?.flatten_all()?;
        let ones = counts.to_dtype(acc)?;
        let tokens = match &problem.weights {
            None => ones,
            Some(weights) => weights.tokens.clone(),
        };
        let factor = -smoothing / classes * problem.settings.logit_scale;
        let factors = (&tokens * factor)?;
        let share = match (problem.settings.reduction, &problem.weights) {
            (Reduction::Mean, None) => inverse(&counts.to_dtype(acc)?.sum_all()?)?,
            (Reduction::Mean, Some(weights)) => inverse(&weights.total)?,
            _ => Tensor::ones(1, acc, device)?,
        };
        let passes = Passes::new(problem);
        let mut sum = passes.weighted_sum(classifier, &weights, None)?;
        if let Some(adapter) = adapter {
            let columns = matrices.trained_columns()?;
            let sum_of_adapter = passes.weighted_sum(adapter, &weights, None)?;
            let between = columns.start - sum.dim(0)?;
            sum = Tensor::cat(&[sum.pad_with_zeros(0, 0, between)?, sum_of_adapter], 0)?;
        }
        let mut products = positions.of_rows(&passes.dots(embeddings, &sum)?)?;
        if let Some(bias) = bias {
            let of_bias = (bias.to_dtype(acc)? * &weights)?.sum_all()?;
            products = products.broadcast_add(&of_bias)?;
        }
        if let Some(shard) = shard {
            products = shard.sum(products)?;
        }
        let losses = counts.where_cond(&(products * &factors)?, &factors.zeros_like()?)?;
        Ok(Some(Self {
            loss: (losses.sum_all()?.reshape(1)? * &share)?.to_dtype(DType::F32)?,
            losses: losses.to_dtype(DType::F32)?,
            counts: positions.to_rows(&counts)?,
            counted: counts,
            factors,
            share,
            weights,
            sum,
            positions,
            passes,
        }))
    }

    /// Adds its part to the gradients. `upstream` is the gradient of the packed vector, or of the reduced loss.
    pub fn add_to(
        &self,
        gradients: &Gradients,
        embeddings: &Tensor,
        upstream: &Tensor,
        packed: Packed,
    ) -> Result<()> {
        let upstream = upstream.flatten_all()?.to_dtype(self.factors.dtype())?;
        let of_loss = |upstream: Tensor| upstream * &self.share;
        let of_losses = if upstream.elem_count() == 1 {
            self.factors.broadcast_mul(&of_loss(upstream)?)?
        } else {
            let losses = packed.losses();
            let of_loss = of_loss(upstream.narrow(0, packed.loss(), 1)?)?;
            let of_losses = upstream.narrow(0, losses.start, losses.len())?;
            (of_losses.broadcast_add(&of_loss)? * &self.factors)?
        };
        // Whatever the upstream gradient of a position that does not count.
        let of_losses = self
            .counted
            .where_cond(&of_losses, &of_losses.zeros_like()?)?;
        let of_rows = self.positions.to_rows(&of_losses)?;
        if let Some(gradient) = &gradients.embeddings {
            let counts = Some(&self.counts);
            self.passes
                .add_outer(gradient, &of_rows, &self.sum, counts)?;
        }
        if let Some(gradient) = &gradients.classifier {
            let counts = Some(&self.counts);
            let sum = self.passes.weighted_sum(embeddings, &of_rows, counts)?;
            // The columns of an adapter are the last.
            let trained = gradient.dim(1)?;
            let sum = sum.narrow(0, sum.dim(0)? - trained, trained)?;
            self.passes.add_outer(gradient, &self.weights, &sum, None)?;
        }
        if let Some(gradient) = &gradients.bias {
            let added = self.weights.broadcast_mul(&of_losses.sum_all()?)?;
            let sum = (gradient.to_dtype(added.dtype())? + added)?;
            gradient.slice_set(&sum.to_dtype(gradient.dtype())?, 0, 0)?;
        }
        Ok(())
    }
}

/// `1 / x` of one number, 1 for 0.
fn inverse(x: &Tensor) -> Result<Tensor> {
    let x = x.reshape(1)?;
    x.ne(&x.zeros_like()?)?
        .where_cond(&x.recip()?, &x.ones_like()?)
}
