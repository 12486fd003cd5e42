//! What a block gives its rows.

use super::block::{Block, Known, Scratch, Taken};
use super::gathered::{contiguous, gather, parts};
use crate::native::cpu::average::Averages;
use crate::native::cpu::element::{Element, Real};
use crate::native::cpu::inputs::Inputs;
use crate::native::cpu::kept::EMBEDDINGS;
use crate::native::cpu::passes;
use crate::native::cpu::product::{multiply, Matrix};
use crate::native::cpu::statistics::{gathered_rows, TILE};
use std::ops::Range;

impl<T: Element> Inputs<'_, T> {
    /// Adds what a tile gives a part of a block's rows to their sum, where it is taken.
    pub(super) fn add_to_rows(
        &self,
        block: &Block<'_, T::Real>,
        taken: Taken,
        (part, tile): (&Range<usize>, usize),
        gradients: &[T::Real],
        sum: &mut [T::Real],
        scratch: &mut Scratch<T::Real>,
    ) {
        let hidden = self.hidden;
        let classes = self.classes(&(tile..tile + 1)).len();
        let wanted = taken.any();
        let kept = block.known.kept;
        kept.rows(
            tile,
            block.rows,
            taken.of_embeddings,
            wanted,
            &mut scratch.rows,
        );
        let place = |row: usize| scratch.rows.partition_point(|r| *r < row);
        let rows = &scratch.rows[place(part.start)..place(part.end)];
        for rows in parts(rows, gathered_rows(hidden)) {
            let gradient = gather(gradients, block.rows.start, TILE, rows, &mut scratch.logits);
            let classifier = self.tile_classifier(tile, &mut scratch.wide);
            let together = contiguous(rows);
            let out = if together {
                &mut sum[(rows[0] - part.start) * hidden..]
            } else {
                scratch
                    .embeddings
                    .resize(rows.len() * hidden, T::Real::default());
                &mut scratch.embeddings[..]
            };
            multiply(
                out,
                hidden,
                together,
                Matrix::new(gradient, rows.len(), classes, TILE),
                Matrix::new(classifier, classes, hidden, hidden),
            );
            if !together {
                for (row, values) in rows.iter().zip(scratch.embeddings.chunks(hidden)) {
                    let sum = &mut sum[(row - part.start) * hidden..][..hidden];
                    passes::add_scaled(sum, values, T::Real::ONE);
                }
            }
        }
    }

    /// Adds what averaged tiles give some rows to their sum.
    pub(super) fn add_average_to_rows(
        &self,
        averages: &Averages<T::Real>,
        rows: &Range<usize>,
        tiles: &Range<usize>,
        known: Known<'_, T::Real>,
        sum: &mut [T::Real],
        scratch: &mut Scratch<T::Real>,
    ) {
        let hidden = self.hidden;
        let kept = known.kept;
        for row in rows.clone() {
            let tile = self.rows.target[row] as usize / TILE;
            if !tiles.contains(&tile) || kept.takes(tile, row, EMBEDDINGS) {
                continue;
            }
            let (target, gradient) = self.target(&known, row);
            let class = &self.classifier[target * hidden..(target + 1) * hidden];
            scratch.wide.resize(hidden, T::Real::default());
            T::widen(class, &mut scratch.wide);
            let sum = &mut sum[(row - rows.start) * hidden..][..hidden];
            passes::add_scaled(sum, &scratch.wide, gradient);
        }
        let mut masses = vec![T::Real::default(); tiles.len() * rows.len()];
        for (tile, masses) in tiles.clone().zip(masses.chunks_mut(rows.len())) {
            kept.scaled_masses(tile, rows.clone(), EMBEDDINGS, known.scales, masses);
        }
        multiply(
            sum,
            hidden,
            true,
            Matrix::new(&masses, tiles.len(), rows.len(), rows.len()).t(),
            Matrix::new(averages.means(tiles, hidden), tiles.len(), hidden, hidden),
        );
    }
}
