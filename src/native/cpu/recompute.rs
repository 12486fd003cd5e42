//! Gradients from logits that are computed again.

use super::average::Averages;
use super::block_gradients::{gradients, Block, Known, Sums};
use super::element::{Element, Real};
use super::gradients::{ClassesGradient, EmbeddingsGradient, FormedGradients};
use super::inputs::Inputs;
use super::kept::Kept;
use super::plan::Plan;
use super::statistics::{Scale, Softmax, TILE};
use crate::blocks::blocks;
use crate::native::rows::HostRows;
use crate::op::contract::Wanted;
use crate::op::packed::Packed;
use crate::problem::Settings;

/// What the forward leaves for every backward.
pub(super) struct Remembered<T: Element> {
    pub rows: HostRows,
    pub softmax: Vec<Softmax<T::Real>>,
    pub kept: Kept<T::Real>,
    pub settings: Settings,
    pub plan: Plan,
    pub layout: Packed,
}

impl<T: Element> Remembered<T> {
    pub fn recompute(
        &self,
        inputs: &Inputs<'_, T>,
        upstream: &[f32],
        wanted: Wanted,
    ) -> FormedGradients<T> {
        let scales = self.scales(upstream);
        let classes_too = wanted.classifier || wanted.bias;
        let averages = self.averages(inputs, gradients(wanted.embeddings, classes_too));
        let known = Known {
            kept: &self.kept,
            softmax: &self.softmax,
            scales: &scales,
            averages: averages.as_ref(),
        };
        if !classes_too || (wanted.embeddings && !self.plan.one_sweep) {
            return FormedGradients {
                embeddings: wanted.embeddings.then(|| self.sweep_rows(inputs, known)),
                ..self.sweep_classes(
                    inputs,
                    known,
                    Wanted {
                        embeddings: false,
                        ..wanted
                    },
                )
            };
        }
        self.sweep_classes(inputs, known, wanted)
    }

    /// What all rows have in common in the tiles that are averaged.
    fn averages(&self, inputs: &Inputs<'_, T>, gradients: u8) -> Option<Averages<T::Real>> {
        let rows = 0..self.rows.len();
        let mut averages = Averages::begin(inputs, &self.kept, &rows, gradients)?;
        for block in blocks(rows.len(), self.plan.rows) {
            let values = inputs.block_embeddings(&block);
            averages.add(inputs, &self.kept, &values, &block);
        }
        Some(averages.finish(inputs))
    }

    /// The gradient of the embeddings alone, block of rows by block of rows.
    fn sweep_rows(&self, inputs: &Inputs<'_, T>, known: Known<'_, T::Real>) -> Vec<T> {
        let mut gradient = EmbeddingsGradient::new(inputs);
        let mut logits = Vec::new();
        for block in blocks(self.rows.len(), self.plan.rows) {
            let values = inputs.block_embeddings(&block);
            gradient.begin(&block);
            for tiles in blocks(inputs.tiles(), self.plan.tiles) {
                logits.resize(block.len() * tiles.len() * TILE, T::Real::default());
                let mut sums = Sums {
                    embeddings: Some(gradient.block(&block)),
                    classifier: None,
                    bias: None,
                    first: false,
                };
                let block = Block {
                    rows: &block,
                    tiles: &tiles,
                    embeddings: &values,
                    known,
                    recompute: true,
                };
                inputs.backward(block, &mut logits, &mut sums);
            }
            gradient.end(inputs);
        }
        gradient.finish()
    }

    /// The gradients wanted, range of classes by range of classes.
    fn sweep_classes(
        &self,
        inputs: &Inputs<'_, T>,
        known: Known<'_, T::Real>,
        wanted: Wanted,
    ) -> FormedGradients<T> {
        let n = self.rows.len();
        let trained = inputs.trained().len();
        let mut embeddings = wanted.embeddings.then(|| {
            let mut gradient = EmbeddingsGradient::new(inputs);
            gradient.begin(&(0..n));
            gradient
        });
        let mut classifier = ClassesGradient::<T>::new(wanted.classifier, inputs.vocab * trained);
        let mut bias = ClassesGradient::<T>::new(wanted.bias, inputs.vocab);
        let mut logits = Vec::new();
        let ranges = if wanted.classifier || wanted.bias {
            inputs.tiles()
        } else {
            0
        };
        for tiles in blocks(ranges, self.plan.tiles) {
            let classes = inputs.classes(&tiles);
            let of_classes = classes.start * trained..classes.end * trained;
            classifier.begin(of_classes.len());
            bias.begin(classes.len());
            for block in blocks(n, self.plan.rows) {
                let values = inputs.block_embeddings(&block);
                logits.resize(block.len() * tiles.len() * TILE, T::Real::default());
                let mut sums = Sums {
                    embeddings: embeddings.as_mut().map(|e| e.block(&block)),
                    classifier: classifier.range(&of_classes),
                    bias: bias.range(&classes),
                    first: block.start == 0,
                };
                let block = Block {
                    rows: &block,
                    tiles: &tiles,
                    embeddings: &values,
                    known,
                    recompute: true,
                };
                inputs.backward(block, &mut logits, &mut sums);
            }
            classifier.end(&of_classes);
            bias.end(&classes);
        }
        if let Some(embeddings) = &mut embeddings {
            embeddings.end(inputs);
        }
        FormedGradients {
            embeddings: embeddings.map(EmbeddingsGradient::finish),
            classifier: classifier.finish(),
            bias: bias.finish(),
        }
    }

    /// With the upstream gradients `g` of a row's loss (through the reduced loss or not), `h` of its lse and `k` of its
    /// entropy `H` (its own or through the loss), the gradient of its logits is `(g s + h) p - g t onehot(y) - k p (log p + H)`, where `p` is the
    /// softmax, and `s` and `t` are what the row's [terms](crate::terms::Terms) have of the two. With `mean` that of
    /// `z - max`, `log p + H` is `z - max - mean`.
    fn scales(&self, upstream: &[f32]) -> Vec<Scale<T::Real>> {
        let layout = self.layout;
        let loss = upstream[layout.loss()] as f64 * self.rows.scale(self.settings.reduction);
        let [losses, lse] = [layout.losses(), layout.lse()].map(|range| &upstream[range]);
        let entropy = layout.entropy().map(|range| &upstream[range]);
        let on_all = self.settings.logit_scale;
        let scale = |(row, (position, softmax)): (usize, (&u32, &Softmax<T::Real>))| {
            let terms = self.rows.terms(row);
            let position = *position as usize;
            let of_loss = losses[position] as f64 + loss;
            let of_lse = lse[position] as f64;
            let of_entropy =
                entropy.map_or(0., |entropy| entropy[position] as f64) + of_loss * terms.entropy;
            let lse = softmax.max.to_f64() - softmax.inverse_sum.to_f64().ln();
            let mut in_softmax = of_loss * terms.softmax(lse) + of_lse;
            if of_entropy != 0. {
                in_softmax += of_entropy * softmax.mean.to_f64();
            }
            Scale {
                softmax: T::Real::from_f64(on_all * in_softmax),
                one_hot: T::Real::from_f64(on_all * of_loss * terms.nll),
                log: T::Real::from_f64(-on_all * of_entropy),
            }
        };
        self.rows
            .position
            .iter()
            .zip(&self.softmax)
            .enumerate()
            .map(scale)
            .collect()
    }
}
