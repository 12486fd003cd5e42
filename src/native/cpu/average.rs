//! What stands in the gradient for tiles that are averaged: each row's mass of a tile, shared out among the tile's
//! classes in proportions that all rows have in common. [`Filter`](crate::Filter) has the formula.

use super::element::{Element, Real};
use super::inputs::Inputs;
use super::kept::{Kept, CLASSIFIER};
use super::passes;
use super::product::{multiply, Matrix};
use super::statistics::{Scale, TILE};
use rayon::prelude::*;
use std::ops::Range;

/// Tiles whose masses a thread multiplies with the rows at once, at most.
const TILES_AT_ONCE: usize = 32;

/// The sums, for each tile, of the rows by their masses there, and of the masses.
pub(super) struct SumsByMass<R> {
    tiles: Range<usize>,
    /// `(tiles, D)`
    rows: Vec<R>,
    /// `(tiles)`
    masses: Vec<R>,
}

impl<R: Real> SumsByMass<R> {
    fn new(tiles: Range<usize>, hidden: usize) -> Self {
        Self {
            rows: vec![R::default(); tiles.len() * hidden],
            masses: vec![R::default(); tiles.len()],
            tiles,
        }
    }

    /// The sums of a block of rows, each times the scale of its softmax, where the gradient of the classifier averages
    /// them.
    pub fn scaled<T: Element<Real = R>>(
        inputs: &Inputs<'_, T>,
        kept: &Kept<R>,
        embeddings: &[R],
        rows: &Range<usize>,
        tiles: &Range<usize>,
        scales: &[Scale<R>],
    ) -> Self {
        let mut sums = Self::new(tiles.clone(), inputs.hidden);
        sums.add(inputs, embeddings, rows, |tile, masses| {
            kept.scaled_masses(tile, rows.clone(), CLASSIFIER, scales, masses)
        });
        sums
    }

    /// Adds a block of rows; `masses_of` a tile writes those of its rows.
    fn add<T: Element<Real = R>>(
        &mut self,
        inputs: &Inputs<'_, T>,
        embeddings: &[R],
        rows: &Range<usize>,
        masses_of: impl Fn(usize, &mut [R]) + Sync,
    ) {
        let (hidden, count) = (inputs.hidden, rows.len());
        let first = self.tiles.start;
        let part = self.tiles.len().div_ceil(inputs.lanes).min(TILES_AT_ONCE);
        let parts = self.tiles.len().div_ceil(part);
        self.rows
            .par_chunks_mut(part * hidden)
            .zip(self.masses.par_chunks_mut(part))
            .with_min_len(inputs.tasks_at_least(parts))
            .enumerate()
            .for_each_init(Vec::new, |masses, (i, (sums, totals))| {
                masses.resize(totals.len() * count, R::default());
                let tiles = first + i * part..;
                for ((tile, masses), total) in
                    tiles.zip(masses.chunks_mut(count)).zip(totals.iter_mut())
                {
                    masses_of(tile, masses);
                    *total = masses.iter().fold(*total, |sum, mass| sum + *mass);
                }
                multiply(
                    sums,
                    hidden,
                    true,
                    Matrix::new(masses, totals.len(), count, count),
                    Matrix::new(embeddings, count, hidden, hidden),
                );
            });
    }

    /// Of one tile: the sum of the rows, and of the masses.
    pub fn of_tile(&self, tile: usize, hidden: usize) -> (&[R], R) {
        let at = tile - self.tiles.start;
        (&self.rows[at * hidden..][..hidden], self.masses[at])
    }
}

/// What a set of rows has in common in each tile that one of the gradients averages.
pub(super) struct Averages<R> {
    /// Bits of [`Kept`]: the gradients that are wanted.
    gradients: u8,
    /// `(V)`: the classes' shares of what is in their tile.
    shares: Vec<R>,
    /// What the tiles see of the rows. In the end, in the place of the rows' sum, the classes' mean by their shares.
    sums: SumsByMass<R>,
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
            sums: SumsByMass::new(0..inputs.tiles(), inputs.hidden),
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
        let gradients = self.gradients;
        self.sums.add(inputs, embeddings, rows, |tile, masses| {
            kept.masses(tile, rows.clone(), gradients, masses)
        });
    }

    /// From the sums of the rows to shares and means.
    pub fn finish<T: Element<Real = R>>(mut self, inputs: &Inputs<'_, T>) -> Self {
        let hidden = inputs.hidden;
        self.sums
            .rows
            .par_chunks_mut(hidden)
            .zip(self.shares.par_chunks_mut(TILE))
            .zip(&self.sums.masses)
            .with_min_len(inputs.tasks_at_least(inputs.tiles()))
            .enumerate()
            .for_each_init(Vec::new, |wide, (tile, ((mean, shares), total))| {
                // Zero masses of a row of NaN make NaN of the sums all the same.
                if *total <= R::default() {
                    mean.fill(R::default());
                    return;
                }
                let classifier = inputs.tile_classifier(tile, wide);
                for e in mean.iter_mut() {
                    *e = *e / *total;
                }
                // A row of infinities has a capped loss, and would spoil the others: shares by the bias alone.
                if mean.iter().any(|e| !e.to_f64().is_finite()) {
                    mean.fill(R::default());
                }
                passes::dots(classifier, mean, shares);
                let classes = inputs.classes(&(tile..tile + 1));
                inputs.finish_logits(shares, classes.len(), &classes);
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
        &self.sums.rows[tiles.start * hidden..tiles.end * hidden]
    }
}
