//! Which tiles of the gradient are computed entry by entry, and what stands for the others.

use super::element::Real;
use super::statistics::{RowLoss, Scale, Softmax, TileSum, TILE};
use crate::problem::Settings;
use std::ops::Range;

/// The tiles of a gradient: bits of [`Kept`].
pub(super) const EMBEDDINGS: u8 = 1;
pub(super) const CLASSIFIER: u8 = 2;

/// The thresholds of the gradients of the embeddings and the classifier, 0 for one that is exact; `None` where both
/// are.
pub(super) fn thresholds(settings: &Settings) -> Option<(f64, f64)> {
    let of_embeddings = settings.filter_embeddings.unwrap_or(0.);
    let of_classifier = settings.filter_classifier.unwrap_or(0.);
    (of_embeddings > 0. || of_classifier > 0.).then_some((of_embeddings, of_classifier))
}

/// Whether `x` is to be kept: a NaN is.
fn at_least(x: f64, threshold: f64) -> bool {
    x >= threshold || x.is_nan()
}

/// Which gradients take which rows of which tiles entry by entry. The others are averaged or, without masses, dropped.
#[derive(Debug)]
pub(super) struct Kept<R> {
    /// `(tiles, rows)`, or nothing where everything is kept.
    flags: Vec<u8>,
    /// `(tiles, rows)`: a row's probability in a tile without its target's, each times the derivative of the softcap.
    masses: Vec<R>,
    rows: usize,
    /// Thresholds of the two gradients; 0 keeps everything.
    eps: [(u8, f64); 2],
}

impl<R: Real> Kept<R> {
    /// No thresholds keep everything. What is below them is averaged or dropped.
    pub fn new(rows: usize, tiles: usize, thresholds: Option<(f64, f64)>, averages: bool) -> Self {
        let filters = thresholds.is_some();
        let (embeddings, classifier) = thresholds.unwrap_or((0., 0.));
        let masses = if filters && averages { rows * tiles } else { 0 };
        Self {
            flags: vec![0; if filters { rows * tiles } else { 0 }],
            masses: vec![R::default(); masses],
            rows,
            eps: [(EMBEDDINGS, embeddings), (CLASSIFIER, classifier)],
        }
    }

    /// Decides for a block of rows, of which `sums` has what they are in each tile without their targets. A NaN is
    /// kept. Where nothing is averaged, so is a tile with a target: its gradient is `p - 1` from the loss and `p` from
    /// the lse, and one of them is never small.
    pub fn decide(
        &mut self,
        rows: &Range<usize>,
        sums: &[TileSum<R>],
        targets: &[u32],
        softmax: &[Softmax<R>],
        losses: &[RowLoss],
    ) {
        if !self.filters() {
            return;
        }
        let count = rows.len();
        let drops = self.masses.is_empty();
        for (bit, eps) in self.eps {
            let log_eps = eps.ln();
            let tiles = sums.chunks(count).zip(self.flags.chunks_mut(self.rows));
            for (tile, (sums, flags)) in tiles.enumerate() {
                for (row, flag) in flags[rows.clone()].iter_mut().enumerate() {
                    if (drops && targets[rows.start + row] as usize / TILE == tile)
                        || at_least(sums[row].max.to_f64() - losses[row].lse, log_eps)
                    {
                        *flag |= bit;
                    }
                }
            }
        }
        if drops {
            return;
        }
        for (masses, sums) in self.masses.chunks_mut(self.rows).zip(sums.chunks(count)) {
            let of_rows = sums.iter().zip(&softmax[rows.clone()]);
            for (mass, (sum, row)) in masses[rows.clone()].iter_mut().zip(of_rows) {
                *mass = sum.mass * (sum.max - row.max).exp() * row.inverse_sum;
            }
        }
    }

    /// Whether at least one of the gradients takes a row of a tile.
    pub fn takes(&self, tile: usize, row: usize, gradients: u8) -> bool {
        let flag = self.flags.get(tile * self.rows + row);
        flag.is_none_or(|flag| flag & gradients != 0)
    }

    /// The rows of a block that a product with a tile is taken over, for the gradients `of` among those wanted: those
    /// that one of them takes. Where nearly all rows are taken, also those that none of the gradients wanted takes: their
    /// entries are zeros.
    pub fn rows(
        &self,
        tile: usize,
        block: &Range<usize>,
        of: u8,
        wanted: u8,
        rows: &mut Vec<usize>,
    ) {
        let left_out = |row: &usize| !self.takes(tile, *row, wanted);
        let nearly_all = block.clone().filter(left_out).count() <= block.len() / 8;
        rows.clear();
        rows.extend(
            block
                .clone()
                .filter(|row| self.takes(tile, *row, of) || (nearly_all && left_out(row))),
        );
    }

    /// The masses of a tile of these rows, 0 where none of the gradients averages it.
    pub fn masses(&self, tile: usize, rows: Range<usize>, gradients: u8, out: &mut [R]) {
        let masses = &self.masses[tile * self.rows..][rows.clone()];
        let flags = &self.flags[tile * self.rows..][rows];
        for ((out, mass), flag) in out.iter_mut().zip(masses).zip(flags) {
            let averaged = flag & gradients != gradients;
            *out = if averaged { *mass } else { R::default() };
        }
    }

    /// The same, each times the scale of its row's softmax.
    pub fn scaled_masses(
        &self,
        tile: usize,
        rows: Range<usize>,
        gradients: u8,
        scales: &[Scale<R>],
        out: &mut [R],
    ) {
        self.masses(tile, rows.clone(), gradients, out);
        for (mass, scale) in out.iter_mut().zip(&scales[rows]) {
            *mass *= scale.softmax;
        }
    }

    /// Whether at least one of the gradients averages something of these rows.
    pub fn averages(&self, rows: &Range<usize>, gradients: u8) -> bool {
        !self.masses.is_empty()
            && self.flags.chunks(self.rows).any(|flags| {
                let mut flags = flags[rows.clone()].iter();
                flags.any(|flag| flag & gradients != gradients)
            })
    }

    /// Whether what is not kept is averaged.
    pub fn averaging(&self) -> bool {
        !self.masses.is_empty()
    }

    /// Whether something may be other than exact.
    pub fn filters(&self) -> bool {
        !self.flags.is_empty()
    }

    /// Of one gradient: how many rows of tiles are kept, and how many there are.
    pub fn count(&self, gradient: u8) -> (usize, usize) {
        if self.flags.is_empty() {
            return (1, 1);
        }
        let kept = self.flags.iter().filter(|f| *f & gradient != 0).count();
        (kept, self.flags.len())
    }
}
