//! What a block gives its classes.

use super::block::{Block, OfClasses, Scratch, Taken};
use super::gathered::{contiguous, gather, parts};
use crate::native::cpu::average::{Averages, SumsByMass};
use crate::native::cpu::element::Element;
use crate::native::cpu::inputs::Inputs;
use crate::native::cpu::kept::CLASSIFIER;
use crate::native::cpu::passes;
use crate::native::cpu::product::{multiply, Matrix};
use crate::native::cpu::statistics::{gathered_rows, TILE};

impl<T: Element> Inputs<'_, T> {
    /// Replaces a tile's logits by their gradients, of the rows that are taken, and adds what these give its classes.
    pub(super) fn add_to_classes(
        &self,
        block: &Block<'_, T::Real>,
        taken: Taken,
        tile: usize,
        logits: &mut [T::Real],
        sums: &mut OfClasses<'_, T::Real>,
        scratch: &mut Scratch<T::Real>,
    ) {
        let hidden = self.hidden;
        let kept = block.known.kept;
        let start = block.rows.start;
        let classes = self.classes(&(tile..tile + 1));
        let wanted = taken.any();
        let most = gathered_rows(hidden);
        kept.rows(tile, block.rows, wanted, wanted, &mut scratch.rows);
        if block.recompute {
            self.recompute(block, tile, logits, scratch);
        }
        for rows in scratch.rows.chunk_by(|a, b| a + 1 == *b) {
            let logits = &mut logits[(rows[0] - start) * TILE..][..rows.len() * TILE];
            let of_rows = rows
                .iter()
                .map(|row| self.row(&block.known, *row, &classes));
            passes::gradient(logits, TILE, classes.len(), self.softcap, of_rows);
            for (values, row) in logits.chunks_mut(TILE).zip(rows) {
                if !kept.takes(tile, *row, wanted) {
                    values.fill(T::Real::default());
                }
            }
        }
        if taken.of_classifier == 0 {
            return;
        }
        kept.rows(
            tile,
            block.rows,
            taken.of_classifier,
            wanted,
            &mut scratch.rows,
        );
        for rows in parts(&scratch.rows, most) {
            let gradient = gather(logits, start, TILE, rows, &mut scratch.logits);
            if let Some(sum) = &mut sums.classifier {
                let embeddings = block.embeddings;
                let embeddings = gather(embeddings, start, hidden, rows, &mut scratch.embeddings);
                let trained = self.trained();
                multiply(
                    sum,
                    trained.len(),
                    sums.accumulate,
                    Matrix::new(gradient, rows.len(), classes.len(), TILE).t(),
                    Matrix::new(
                        &embeddings[trained.start..],
                        rows.len(),
                        trained.len(),
                        hidden,
                    ),
                );
                sums.accumulate = true;
            }
            if let Some(sum) = &mut sums.bias {
                passes::add_rows(gradient, TILE, sum);
            }
        }
    }

    /// Computes a tile's logits of the rows in `scratch`.
    fn recompute(
        &self,
        block: &Block<'_, T::Real>,
        tile: usize,
        logits: &mut [T::Real],
        scratch: &mut Scratch<T::Real>,
    ) {
        let start = block.rows.start;
        for rows in parts(&scratch.rows, gathered_rows(self.hidden)) {
            let copies = &mut scratch.embeddings;
            let embeddings = gather(block.embeddings, start, self.hidden, rows, copies);
            let classifier = self.tile_classifier(tile, &mut scratch.wide);
            if contiguous(rows) {
                let logits = &mut logits[(rows[0] - start) * TILE..][..rows.len() * TILE];
                self.logits(embeddings, classifier, tile, logits);
                continue;
            }
            scratch.logits.resize(rows.len() * TILE, T::Real::default());
            self.logits(embeddings, classifier, tile, &mut scratch.logits);
            for (values, row) in scratch.logits.chunks(TILE).zip(rows) {
                logits[(row - start) * TILE..][..TILE].copy_from_slice(values);
            }
        }
    }

    /// Adds what the rows of which a tile is averaged give its classes.
    pub(super) fn add_average_to_classes(
        &self,
        block: &Block<'_, T::Real>,
        tile: usize,
        averages: &Averages<T::Real>,
        by_mass: &SumsByMass<T::Real>,
        mut sums: OfClasses<'_, T::Real>,
    ) {
        let hidden = self.hidden;
        let classes = self.classes(&(tile..tile + 1));
        let kept = block.known.kept;
        let mut any = false;
        for row in block.rows.clone() {
            if kept.takes(tile, row, CLASSIFIER) {
                continue;
            }
            any = true;
            if !classes.contains(&(self.rows.target[row] as usize)) {
                continue;
            }
            let (target, gradient) = self.target(&block.known, row);
            let target = target - classes.start;
            if let Some(classifier) = &mut sums.classifier {
                let embedding = &block.embeddings[(row - block.rows.start) * hidden..][..hidden];
                let of_target = &mut classifier[target * hidden..][..hidden];
                passes::add_scaled(of_target, embedding, gradient);
            }
            if let Some(bias) = &mut sums.bias {
                bias[target] += gradient;
            }
        }
        if !any {
            return;
        }
        let shares = averages.shares(tile);
        let (sum, mass) = by_mass.of_tile(tile, hidden);
        if let Some(classifier) = &mut sums.classifier {
            for (class, share) in classifier.chunks_mut(hidden).zip(shares) {
                passes::add_scaled(class, sum, *share);
            }
        }
        if let Some(bias) = &mut sums.bias {
            passes::add_scaled(bias, shares, mass);
        }
    }
}
