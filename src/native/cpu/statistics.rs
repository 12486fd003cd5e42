//! What rows and tiles come to, and the sizes that all of this implementation shares.
//!
//! A block is a range of rows by a range of tiles, a tile being [`TILE`] classes. It is stored tile by
//! tile, `(rows, TILE)` each, so that the threads, which take a tile each, write to slices of their own
//! and find what they wrote in their cache.

use super::element::Real;

/// Classes that one task multiplies. The filter keeps or averages those of a row together.
pub(super) const TILE: usize = 256;
/// Rows of the smallest block, and of the smallest part that a thread has of one: products of fewer are slow.
pub(super) const LEAST_ROWS: usize = 32;

/// Rows that do not lie together and are multiplied together, at most: a MiB of f32, within 64 and 256 rows.
pub(super) fn gathered_rows(hidden: usize) -> usize {
    ((1 << 18) / hidden.max(1)).clamp(64, 256)
}

/// A row's softmax is `exp(z - max) * inverse_sum`: no rounded lse comes between the two.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax<R> {
    pub max: R,
    pub inverse_sum: R,
    /// The target's logit.
    pub target: R,
    /// The mean of `z - max` by the softmax, where the entropy is asked for: it is `ln sum - mean`.
    pub mean: R,
}

/// What a row's softmax and its one-hot are multiplied by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale<R> {
    pub softmax: R,
    pub one_hot: R,
    /// What the softmax times `z - max` is multiplied by: the gradient of the entropy.
    pub log: R,
}

/// A row's share in the result.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowLoss {
    pub lse: f64,
    pub nll: f64,
    /// Right where it is asked for, as is the predicted class.
    pub entropy: f64,
    pub predicted: u32,
}

/// What a row is over some classes.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowSum<R> {
    pub max: R,
    /// `sum_j exp(z_j - max)`
    pub sum: f64,
    /// The target's logit, 0 where it is not among them.
    pub target: R,
    /// `sum_j exp(z_j - max) (z_j - max)`, where the entropy is asked for.
    pub weighted: f64,
    /// The lowest class with the maximum, where it is asked for.
    pub predicted: u32,
}

impl<R: Real> RowSum<R> {
    /// Of the tiles of a row, and its target, which is left out of them, with its logit.
    pub fn of_tiles<'a>(
        tiles: impl Iterator<Item = &'a TileSum<R>> + Clone,
        target: Option<(u32, R)>,
    ) -> Self {
        let larger = |max, z| if z > max { z } else { max };
        let max = tiles.clone().fold(R::LOWEST, |max, t| larger(max, t.max));
        let max = target.map_or(max, |(_, logit)| larger(max, logit));
        let share = |z: R| (z.to_f64() - max.to_f64()).exp();
        let others: f64 = tiles.map(|t| t.sum.to_f64() * share(t.max)).sum();
        Self {
            max,
            sum: others + target.map_or(0., |(_, logit)| share(logit)),
            target: target.map(|(_, logit)| logit).unwrap_or_default(),
            weighted: 0.,
            predicted: 0,
        }
    }

    /// Adds what else is asked for.
    pub fn add_asked<'a>(
        &mut self,
        tiles: impl Iterator<Item = (&'a TileSum<R>, &'a TileAsked<R>)>,
        target: Option<(u32, R)>,
    ) {
        // Of z = max this is a term of p times 0, and of no probability none: not 0 times an infinity.
        let moved = |max: R, sum: f64, weighted: f64| {
            let down = max.to_f64() - self.max.to_f64();
            match down.exp() {
                0. => 0.,
                share => (weighted + down * sum) * share,
            }
        };
        let (mut weighted, mut predicted, mut largest) = (0., 0, R::LOWEST);
        for (tile, (sum, asked)) in tiles.enumerate() {
            weighted += moved(sum.max, sum.sum.to_f64(), asked.weighted.to_f64());
            if sum.max > largest {
                largest = sum.max;
                predicted = (tile * TILE) as u32 + asked.largest;
            }
        }
        if let Some((class, logit)) = target {
            weighted += moved(logit, 1., 0.);
            if logit > largest || (logit == largest && class < predicted) {
                predicted = class;
            }
        }
        self.weighted = weighted;
        self.predicted = predicted;
    }

    pub fn softmax(&self) -> Softmax<R> {
        Softmax {
            max: self.max,
            inverse_sum: R::from_f64(1. / self.sum),
            target: self.target,
            mean: R::from_f64(self.weighted / self.sum),
        }
    }

    pub fn loss(&self) -> RowLoss {
        let (max, log_sum) = (self.max.to_f64(), self.sum.ln());
        RowLoss {
            lse: max + log_sum,
            nll: (max - self.target.to_f64()) + log_sum,
            entropy: log_sum - self.weighted / self.sum,
            predicted: self.predicted,
        }
    }
}

/// What a row is over the classes of a tile, its target left out.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TileSum<R> {
    pub max: R,
    /// `sum_j exp(z_j - max)`
    pub sum: R,
    /// The same with the derivative of the softcap in each term, for the filter.
    pub mass: R,
}

/// What else is asked for of a row over the classes of a tile, its target left out.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TileAsked<R> {
    /// `sum_j exp(z_j - max) (z_j - max)`
    pub weighted: R,
    /// The lowest class with the maximum, counted from the tile's first.
    pub largest: u32,
}

/// Which of them are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub entropy: bool,
    pub predicted: bool,
}

impl Asked {
    pub fn any(self) -> bool {
        self.entropy || self.predicted
    }
}

/// What a block of rows is over all classes here.
pub(super) struct BlockSums<R> {
    /// `(tiles, rows)`
    pub tiles: Vec<TileSum<R>>,
    pub rows: Vec<RowSum<R>>,
}
