//! What rows and tiles come to, and the sizes that all of this implementation shares.
//!
//! A block is a range of rows by a range of tiles, a tile being [`TILE`] classes. It is stored tile by
//! tile, `(rows, TILE)` each, so that the threads, which take a tile each, write to slices of their own
//! and find what they wrote in their cache.

use super::element::Real;
use std::ops::Range;

/// Classes that one task multiplies. The filter keeps or averages those of a row together.
pub(super) const TILE: usize = 256;
/// Rows of the smallest block, and of the smallest part that a thread has of one: products of fewer are slow.
pub(super) const LEAST_ROWS: usize = 32;

/// Rows that do not lie together and are multiplied together, at most: a MiB of f32, within 64 and 256 rows.
pub(super) fn gathered_rows(hidden: usize) -> usize {
    ((1 << 18) / hidden.max(1)).clamp(64, 256)
}

pub(super) fn blocks(len: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(block)
        .map(move |start| start..(start + block).min(len))
}

/// A row's softmax is `exp(z - max) * inverse_sum`: no rounded lse comes between the two.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax<R> {
    pub max: R,
    pub inverse_sum: R,
    /// The target's logit.
    pub target: R,
}

/// What a row's softmax and its one-hot are multiplied by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale<R> {
    pub softmax: R,
    pub one_hot: R,
}

/// A row's share in the result.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowLoss {
    pub lse: f64,
    pub nll: f64,
}

/// What a row is over some classes.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowSum<R> {
    pub max: R,
    /// `sum_j exp(z_j - max)`
    pub sum: f64,
    /// The target's logit, 0 where it is not among them.
    pub target: R,
}

impl<R: Real> RowSum<R> {
    pub fn softmax(&self) -> Softmax<R> {
        Softmax {
            max: self.max,
            inverse_sum: R::from_f64(1. / self.sum),
            target: self.target,
        }
    }

    pub fn loss(&self) -> RowLoss {
        let (max, log_sum) = (self.max.to_f64(), self.sum.ln());
        RowLoss {
            lse: max + log_sum,
            nll: (max - self.target.to_f64()) + log_sum,
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

/// What a block of rows is over all classes here.
pub(super) struct BlockSums<R> {
    /// `(tiles, rows)`
    pub tiles: Vec<TileSum<R>>,
    pub rows: Vec<RowSum<R>>,
}
