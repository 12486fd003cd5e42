//! What stands in the gradient for tiles that are averaged: each row's mass of a tile, shared out among the tile's
//! classes in proportions that all rows have in common. [`Filter`](crate::Filter) has the formula.

use super::blocks::{Inputs, TILE};
use super::element::{Element, Real};
use super::kept::Kept;
use super::passes;
use rayon::prelude::*;
use std::ops::Range;

/// What a set of rows has in common in each tile that one of the gradients averages.
pub(super) struct Averages<R> {
    /// Bits of [`Kept`]: the gradients that are wanted.
    gradients: u8,
    /// `(V)`: the classes' shares of what is in their tile.
    shares: Vec<R>,
    /// `(tiles, D)`: the classes' mean by their shares. Before that, the sum of the rows by their masses.
    means: Vec<R>,
    /// `(tiles)`: the sum of the masses.
    masses: Vec<R>,
}

impl<R: Real> Averages<R> {
    /// `None` where none of the gradients averages anything of these rows.
    pub fn begin<T: Element<Real = R>>(
        inputs: &Inputs<'_, T>,
        kept: &Kept<R>,
        rows: &Range<usize>,
        gradients: u8,
    ) -> Option<Self> {
        kept.averages(rows, gradients).then(|| Self {
            gradients,
            shares: vec![R::default(); inputs.vocab],
            means: vec![R::default(); inputs.tiles() * inputs.hidden],
            masses: vec![R::default(); inputs.tiles()],
        })
    }

    /// Adds a block of rows to those the tiles are seen by.
    pub fn add<T: Element<Real = R>>(
        &mut self,
        inputs: &Inputs<'_, T>,
        kept: &Kept<R>,
        embeddings: &[R],
        rows: &Range<usize>,
    ) {
        let hidden = inputs.hidden;
        let gradients = self.gradients;
        self.means
            .par_chunks_mut(hidden)
            .zip(&mut self.masses)
            .with_min_len(inputs.tasks_at_least(inputs.tiles()))
            .enumerate()
            .for_each(|(tile, (sum, total))| {
                for row in kept.averaged(tile, rows.clone(), gradients).flatten() {
                    let mass = kept.mass(tile, row);
                    let embedding = &embeddings[(row - rows.start) * hidden..][..hidden];
                    passes::add_scaled(sum, embedding, mass);
                    *total += mass;
                }
            });
    }

    /// From the sums of the rows to shares and means.
    pub fn finish<T: Element<Real = R>>(mut self, inputs: &Inputs<'_, T>) -> Self {
        let hidden = inputs.hidden;
        self.means
            .par_chunks_mut(hidden)
            .zip(self.shares.par_chunks_mut(TILE))
            .zip(&self.masses)
            .with_min_len(inputs.tasks_at_least(inputs.tiles()))
            .enumerate()
            .filter(|(_, (_, total))| **total > R::default())
            .for_each_init(Vec::new, |wide, (tile, ((mean, shares), total))| {
                let classifier = inputs.tile_classifier(tile, wide);
                for e in mean.iter_mut() {
                    *e = *e / *total;
                }
                // A row of infinities has a capped loss, and would spoil the others: shares by the bias alone.
                if mean.iter().any(|e| !e.to_f64().is_finite()) {
                    mean.fill(R::default());
                }
                passes::dots(classifier, mean, shares);
                let start = tile * TILE;
                let bias = inputs
                    .bias
                    .as_ref()
                    .map(|bias| &bias[start..][..shares.len()]);
                passes::finish(shares, shares.len(), shares.len(), bias, inputs.softcap);
                passes::softmax(shares);
                mean.fill(R::default());
                for (class, share) in classifier.chunks(hidden).zip(shares) {
                    passes::add_scaled(mean, class, *share);
                }
            });
        self
    }

    /// The shares of the classes of a tile.
    pub fn shares(&self, tile: usize) -> &[R] {
        let start = tile * TILE;
        &self.shares[start..(start + TILE).min(self.shares.len())]
    }

    /// The means of a range of tiles, `(tiles, hidden)`.
    pub fn means(&self, tiles: &Range<usize>, hidden: usize) -> &[R] {
        &self.means[tiles.start * hidden..tiles.end * hidden]
    }
}
