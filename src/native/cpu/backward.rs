//! The backward: hands out what the forward formed, or computes the gradients anew.

use super::element::{Element, Real};
use super::gradients::FormedGradients;
use super::kept::{CLASSIFIER, EMBEDDINGS};
use super::operands::inputs;
use super::passes;
use super::recompute::Remembered;
use crate::matrices::Matrices;
use crate::op::contract::{Backward, Gradients, KeptTiles, Wanted};
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) struct CpuBackward<T: Element> {
    known: Remembered<T>,
    /// Gradients for an upstream gradient of 1 of the reduced loss, until they are handed out.
    formed: Mutex<Option<FormedGradients<T>>>,
    report: Arc<KeptTiles>,
}

impl<T: Element> Backward for CpuBackward<T> {
    fn backward(
        &self,
        matrices: Matrices<&Tensor>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        self.report_kept(wanted)?;
        let upstream = upstream.to_vec1::<f32>()?;
        let gradients = match self.take_formed(&upstream, wanted) {
            Some(formed) => formed,
            None => matrices.read(|matrices| {
                let known = &self.known;
                let inputs = inputs::<T>(matrices, &known.rows, &known.settings, known.plan.lanes)?;
                Ok(known.recompute(&inputs, &upstream, wanted))
            })?,
        };
        let tensor = |values: Option<Vec<T>>, of: Option<&Tensor>| match (values, of) {
            (Some(values), Some(of)) => {
                Tensor::from_vec(values, of.shape(), &Device::Cpu).map(Some)
            }
            _ => Ok(None),
        };
        Ok(Gradients {
            embeddings: tensor(gradients.embeddings, Some(matrices.embeddings))?,
            classifier: tensor(gradients.classifier, Some(matrices.trained()))?,
            bias: tensor(gradients.bias, matrices.bias)?,
        })
    }
}

impl<T: Element> CpuBackward<T> {
    pub fn new(
        known: Remembered<T>,
        formed: Option<FormedGradients<T>>,
        report: Arc<KeptTiles>,
    ) -> Self {
        Self {
            known,
            formed: Mutex::new(formed),
            report,
        }
    }

    fn report_kept(&self, wanted: Wanted) -> Result<()> {
        let count = |wanted: bool, gradient: u8| wanted.then(|| self.known.kept.count(gradient));
        let embeddings = count(wanted.embeddings, EMBEDDINGS);
        let classifier = count(wanted.classifier || wanted.bias, CLASSIFIER);
        if let Some((kept, all)) = embeddings.max(classifier) {
            self.report
                .set(Tensor::new(&[kept as f64, all as f64], &Device::Cpu)?);
        }
        Ok(())
    }

    /// The gradients that the forward formed, scaled, if this is the first backward and they fit it. They
    /// are given up where they do not: what is computed instead is not to lie in memory beside them.
    fn take_formed(&self, upstream: &[f32], wanted: Wanted) -> Option<FormedGradients<T>> {
        let mut formed = self
            .formed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        let at_loss = self.known.layout.loss();
        let of_loss = upstream[at_loss];
        let others = upstream[..at_loss].iter().chain(&upstream[at_loss + 1..]);
        if others.into_iter().any(|u| *u != 0.)
            || (of_loss != 1. && !T::SCALES_EXACTLY)
            || (wanted.embeddings && formed.embeddings.is_none())
            || (wanted.classifier && formed.classifier.is_none())
            || (wanted.bias && formed.bias.is_none())
        {
            return None;
        }
        if of_loss != 1. {
            let factor = T::Real::from_f64(of_loss as f64);
            let values = [
                &mut formed.embeddings,
                &mut formed.classifier,
                &mut formed.bias,
            ];
            for values in values.into_iter().flatten() {
                values.par_chunks_mut(1 << 14).for_each_init(
                    Vec::new,
                    |wide: &mut Vec<T::Real>, values| {
                        wide.resize(values.len(), T::Real::default());
                        T::widen(values, wide);
                        passes::scale(wide, factor);
                        T::narrow(wide, values);
                    },
                );
            }
        }
        Some(formed)
    }
}
