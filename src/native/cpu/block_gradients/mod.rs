//! The gradients that a block of the logits contributes.

mod block;
mod classes;
mod gathered;
mod rows;

use super::average::SumsByMass;
use super::element::Element;
use super::inputs::Inputs;
use super::statistics::{LEAST_ROWS, TILE};
use crate::blocks::blocks;
use block::{OfClasses, Scratch, Taken};
use rayon::prelude::*;

pub(super) use block::{gradients, Block, Known, Sums};

impl<T: Element> Inputs<'_, T> {
    /// Adds the gradients of a block to `sums`. The logits are computed first where they are not there.
    pub fn backward(
        &self,
        block: Block<'_, T::Real>,
        logits: &mut [T::Real],
        sums: &mut Sums<'_, T::Real>,
    ) {
        let Block {
            rows,
            tiles,
            embeddings,
            known,
            ..
        } = block;
        let hidden = self.hidden;
        let count = rows.len();
        let taken = Taken {
            of_embeddings: gradients(sums.embeddings.is_some(), false),
            of_classifier: gradients(false, sums.classifier.is_some() || sums.bias.is_some()),
        };
        let by_mass = known
            .averages
            .filter(|_| taken.of_classifier != 0)
            .map(|_| SumsByMass::scaled(self, known.kept, embeddings, rows, tiles, known.scales));
        let mut classifier_sums = sums
            .classifier
            .as_mut()
            .map(|s| s.chunks_mut(TILE * self.trained().len()));
        let mut bias_sums = sums.bias.as_mut().map(|s| s.chunks_mut(TILE));
        let accumulate = !sums.first;
        let tasks: Vec<_> = logits
            .chunks_mut(count * TILE)
            .zip(tiles.clone())
            .map(|(logits, tile)| {
                let sums = OfClasses {
                    classifier: classifier_sums.as_mut().and_then(Iterator::next),
                    bias: bias_sums.as_mut().and_then(Iterator::next),
                    accumulate,
                };
                (tile, logits, sums)
            })
            .collect();
        tasks
            .into_par_iter()
            .with_min_len(self.tasks_at_least(tiles.len()))
            .for_each_init(Scratch::default, |scratch, (tile, logits, mut sums)| {
                self.add_to_classes(&block, taken, tile, logits, &mut sums, scratch);
                if let (Some(averages), Some(by_mass)) = (known.averages, &by_mass) {
                    self.add_average_to_classes(&block, tile, averages, by_mass, sums);
                }
            });
        if let Some(sum) = &mut sums.embeddings {
            let part = count.div_ceil(self.lanes).next_multiple_of(LEAST_ROWS);
            sum.par_chunks_mut(part * hidden)
                .zip(blocks(count, part).collect::<Vec<_>>())
                .for_each_init(Scratch::default, |scratch, (sum, part)| {
                    let part = rows.start + part.start..rows.start + part.end;
                    for (tile, logits) in tiles.clone().zip(logits.chunks(count * TILE)) {
                        self.add_to_rows(&block, taken, (&part, tile), logits, sum, scratch);
                    }
                    if let Some(averages) = known.averages {
                        self.add_average_to_rows(averages, &part, tiles, known, sum, scratch);
                    }
                });
        }
    }
}
