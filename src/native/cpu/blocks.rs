//! Blocks of the logits, and the gradients they contribute.
//!
//! A block is a range of rows by a range of tiles, a tile being [`TILE`] classes. It is stored tile by
//! tile, `(rows, TILE)` each, so that the threads, which take a tile each, write to slices of their own
//! and find what they wrote in their cache.

use super::element::{Element, Real};
use super::passes;
use super::product::{multiply, Matrix};
use crate::native::rows::Rows;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Classes that one task multiplies, and that the filter keeps or skips together.
pub(super) const TILE: usize = 256;
/// Rows that the filter keeps or skips together.
pub(super) const GROUP: usize = 32;

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
    fn softmax(&self) -> Softmax<R> {
        Softmax {
            max: self.max,
            inverse_sum: R::from_f64(1. / self.sum),
        }
    }

    fn loss(&self) -> RowLoss {
        let (max, log_sum) = (self.max.to_f64(), self.sum.ln());
        RowLoss {
            lse: max + log_sum,
            nll: (max - self.target.to_f64()) + log_sum,
        }
    }
}

/// What a block of rows is over all classes here.
pub(super) struct BlockSums<R> {
    /// `(tiles, rows)`: the largest logit of a tile and its sum of exponentials.
    pub tiles: Vec<(R, R)>,
    pub rows: Vec<RowSum<R>>,
}

/// Whether `x` is to be kept: a NaN is.
fn at_least(x: f64, threshold: f64) -> bool {
    x >= threshold || x.is_nan()
}

/// The tiles of a gradient: bits of [`Kept`].
pub(super) const EMBEDDINGS: u8 = 1;
pub(super) const CLASSIFIER: u8 = 2;

/// Which gradients take which groups of rows of which tiles.
#[derive(Debug)]
pub(super) struct Kept {
    /// `(tiles, groups)`, or nothing where every tile is kept.
    flags: Vec<u8>,
    groups: usize,
    /// Thresholds of the two gradients; 0 keeps everything.
    eps: [(u8, f64); 2],
}

impl Kept {
    pub fn new(
        rows: usize,
        tiles: usize,
        embeddings: Option<f64>,
        classifier: Option<f64>,
    ) -> Self {
        let groups = rows.div_ceil(GROUP);
        let filtered = embeddings.is_some() || classifier.is_some();
        Self {
            flags: vec![0; if filtered { groups * tiles } else { 0 }],
            groups,
            eps: [
                (EMBEDDINGS, embeddings.unwrap_or(0.)),
                (CLASSIFIER, classifier.unwrap_or(0.)),
            ],
        }
    }

    /// Decides for a block of rows. A tile's row is negligible if its largest softmax is and its
    /// target lies elsewhere: a target's gradient is `p - 1` from the loss and `p` from the lse, and
    /// one of them is never small. A NaN is not negligible.
    fn decide<R: Real>(
        &mut self,
        rows: &Range<usize>,
        statistics: &[(R, R)],
        targets: &[u32],
        losses: &[RowLoss],
    ) {
        if !self.filters() {
            return;
        }
        let count = rows.len();
        let groups = self.groups;
        let first = rows.start / GROUP;
        for (bit, eps) in self.eps {
            let log_eps = eps.ln();
            let tiles = statistics.chunks(count).zip(self.flags.chunks_mut(groups));
            for (tile, (statistics, flags)) in tiles.enumerate() {
                for (group, flag) in blocks(count, GROUP).zip(&mut flags[first..]) {
                    let keeps = |row: usize| {
                        targets[rows.start + row] as usize / TILE == tile
                            || at_least(statistics[row].0.to_f64() - losses[row].lse, log_eps)
                    };
                    if group.into_iter().any(keeps) {
                        *flag |= bit;
                    }
                }
            }
        }
    }

    /// The runs of rows, within these, that one of the gradients takes of a tile.
    fn runs(
        &self,
        tile: usize,
        rows: Range<usize>,
        gradients: u8,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut next = rows.start;
        let kept = move |row: usize| match self.flags.get(tile * self.groups + row / GROUP) {
            Some(flag) => flag & gradients != 0,
            None => gradients != 0,
        };
        let after = move |row: usize| {
            if self.flags.is_empty() {
                rows.end
            } else {
                ((row / GROUP + 1) * GROUP).min(rows.end)
            }
        };
        std::iter::from_fn(move || {
            while next < rows.end && !kept(next) {
                next = after(next);
            }
            let start = next;
            while next < rows.end && kept(next) {
                next = after(next);
            }
            (start < next).then_some(start..next)
        })
    }

    /// Whether a tile may be skipped.
    pub fn filters(&self) -> bool {
        !self.flags.is_empty()
    }

    /// Of one gradient: tiles kept, tiles there are.
    pub fn count(&self, gradient: u8) -> (usize, usize) {
        if self.flags.is_empty() {
            return (1, 1);
        }
        let kept = self.flags.iter().filter(|f| *f & gradient != 0).count();
        (kept, self.flags.len())
    }
}

/// Where a block adds its gradients, `None` for one that is not wanted.
pub(super) struct Sums<'a, R> {
    /// The block's rows.
    pub embeddings: Option<&'a mut [R]>,
    /// The block's classes.
    pub classifier: Option<&'a mut [R]>,
    pub bias: Option<&'a mut [R]>,
    /// Nothing but zeros is in `classifier` yet.
    pub first: bool,
}

/// The operands of a call.
pub(super) struct Inputs<'a, T: Element> {
    pub embeddings: &'a [T],
    pub classifier: &'a [T],
    pub bias: Option<Vec<T::Real>>,
    pub hidden: usize,
    pub vocab: usize,
    pub rows: &'a Rows,
    pub softcap: Option<T::Real>,
    /// Threads that may work at once.
    pub lanes: usize,
}

impl<T: Element> Inputs<'_, T> {
    pub fn tiles(&self) -> usize {
        self.vocab.div_ceil(TILE)
    }

    pub fn classes(&self, tiles: &Range<usize>) -> Range<usize> {
        tiles.start * TILE..(tiles.end * TILE).min(self.vocab)
    }

    /// The rows of a block in the type that is computed in.
    pub fn block_embeddings(&self, rows: &Range<usize>) -> Cow<'_, [T::Real]> {
        let hidden = self.hidden;
        if self.rows.all {
            if let Some(embeddings) = T::as_real(self.embeddings) {
                return Cow::Borrowed(&embeddings[rows.start * hidden..rows.end * hidden]);
            }
        }
        let mut block = vec![T::Real::default(); rows.len() * hidden];
        block
            .par_chunks_mut(hidden)
            .with_min_len(16)
            .zip(&self.rows.embedding[rows.clone()])
            .for_each(|(to, row)| {
                T::widen(&self.embeddings[*row as usize * hidden..][..hidden], to)
            });
        Cow::Owned(block)
    }

    /// The classes of a tile in the type that is computed in.
    fn tile_classifier<'b>(&'b self, tile: usize, scratch: &'b mut Vec<T::Real>) -> &'b [T::Real] {
        let classes = self.classes(&(tile..tile + 1));
        let values = &self.classifier[classes.start * self.hidden..classes.end * self.hidden];
        match T::as_real(values) {
            Some(values) => values,
            None => {
                scratch.resize(values.len(), T::Real::default());
                T::widen(values, scratch);
                scratch
            }
        }
    }

    /// Logits `(rows, TILE)` of some rows.
    fn logits(
        &self,
        embeddings: &[T::Real],
        classifier: &[T::Real],
        tile: usize,
        logits: &mut [T::Real],
    ) {
        let hidden = self.hidden;
        let classes = self.classes(&(tile..tile + 1));
        let rows = embeddings.len() / hidden;
        multiply(
            logits,
            TILE,
            false,
            Matrix::new(embeddings, rows, hidden, hidden),
            Matrix::new(classifier, classes.len(), hidden, hidden).t(),
        );
        let bias = self.bias.as_ref().map(|bias| &bias[classes.clone()]);
        passes::finish(logits, TILE, classes.len(), bias, self.softcap);
    }

    /// Tasks that one thread takes in a row, so that no more than `lanes` threads work.
    fn tasks_at_least(&self, tasks: usize) -> usize {
        if self.lanes < rayon::current_num_threads() {
            tasks.div_ceil(self.lanes)
        } else {
            1
        }
    }

    /// The softmax and the loss of a block of rows over all classes, appended to `softmax`; leaves
    /// the logits in `logits` where that is given.
    pub fn forward(
        &self,
        embeddings: &[T::Real],
        rows: &Range<usize>,
        logits: Option<&mut [T::Real]>,
        kept: &mut Kept,
        softmax: &mut Vec<Softmax<T::Real>>,
    ) -> Vec<RowLoss> {
        let sums = self.sums(embeddings, rows, logits);
        self.finish(rows, &sums.tiles, &sums.rows, kept, softmax)
    }

    /// What a block of rows comes to once its sums are known; decides which of its tiles are kept.
    pub fn finish(
        &self,
        rows: &Range<usize>,
        tiles: &[(T::Real, T::Real)],
        sums: &[RowSum<T::Real>],
        kept: &mut Kept,
        softmax: &mut Vec<Softmax<T::Real>>,
    ) -> Vec<RowLoss> {
        softmax.extend(sums.iter().map(RowSum::softmax));
        let losses: Vec<RowLoss> = sums.iter().map(RowSum::loss).collect();
        kept.decide(rows, tiles, &self.rows.target, &losses);
        losses
    }

    /// The sums of a block of rows; leaves the logits in `logits` where that is given.
    pub fn sums(
        &self,
        embeddings: &[T::Real],
        rows: &Range<usize>,
        logits: Option<&mut [T::Real]>,
    ) -> BlockSums<T::Real> {
        let count = rows.len();
        let tiles = self.tiles();
        let targets = &self.rows.target[rows.clone()];
        let mut statistics = vec![(T::Real::default(), T::Real::default()); tiles * count];
        let mut stored = logits.map(|logits| logits.chunks_mut(count * TILE));
        let tasks: Vec<_> = statistics
            .chunks_mut(count)
            .map(|statistics| (statistics, stored.as_mut().and_then(Iterator::next)))
            .collect();
        let found: Vec<Vec<(usize, T::Real)>> = tasks
            .into_par_iter()
            .with_min_len(self.tasks_at_least(tiles))
            .enumerate()
            .map_init(
                || (Vec::new(), Vec::new()),
                |(wide, scratch), (tile, (statistics, stored))| {
                    let logits = match stored {
                        Some(stored) => stored,
                        None => {
                            scratch.resize(count * TILE, T::Real::default());
                            scratch.as_mut_slice()
                        }
                    };
                    let classifier = self.tile_classifier(tile, wide);
                    self.logits(embeddings, classifier, tile, logits);
                    let classes = self.classes(&(tile..tile + 1));
                    passes::statistics(logits, TILE, classes.len(), statistics);
                    let here = |target: &u32| classes.contains(&(*target as usize));
                    targets
                        .iter()
                        .enumerate()
                        .filter(|(_, target)| here(target))
                        .map(|(row, target)| {
                            (row, logits[row * TILE + *target as usize - classes.start])
                        })
                        .collect()
                },
            )
            .collect();
        let mut target_logits = vec![T::Real::default(); count];
        for (row, logit) in found.into_iter().flatten() {
            target_logits[row] = logit;
        }
        let sum_up = |(row, target): (usize, T::Real)| {
            let of_row = || statistics[row..].iter().step_by(count);
            let max = of_row().fold(
                T::Real::LOWEST,
                |max, (m, _)| if *m > max { *m } else { max },
            );
            let sum: f64 = of_row()
                .map(|(m, sum)| sum.to_f64() * (m.to_f64() - max.to_f64()).exp())
                .sum();
            RowSum { max, sum, target }
        };
        let rows = target_logits.into_iter().enumerate().map(sum_up).collect();
        BlockSums {
            tiles: statistics,
            rows,
        }
    }

    /// Adds the gradients of a block to `sums`. The block's logits are computed first if `recompute`,
    /// else they are there. `softmax` and `scales` are those of all rows.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        embeddings: &[T::Real],
        rows: &Range<usize>,
        tiles: &Range<usize>,
        logits: &mut [T::Real],
        recompute: bool,
        kept: &Kept,
        softmax: &[Softmax<T::Real>],
        scales: &[Scale<T::Real>],
        sums: &mut Sums<'_, T::Real>,
    ) {
        let hidden = self.hidden;
        let count = rows.len();
        let of_embeddings = if sums.embeddings.is_some() {
            EMBEDDINGS
        } else {
            0
        };
        let of_classifier = if sums.classifier.is_some() || sums.bias.is_some() {
            CLASSIFIER
        } else {
            0
        };
        let local = |run: &Range<usize>| run.start - rows.start..run.end - rows.start;
        let mut classifier_sums = sums
            .classifier
            .as_mut()
            .map(|s| s.chunks_mut(TILE * hidden));
        let mut bias_sums = sums.bias.as_mut().map(|s| s.chunks_mut(TILE));
        let tasks: Vec<_> = logits
            .chunks_mut(count * TILE)
            .zip(tiles.clone())
            .map(|(logits, tile)| {
                let classifier = classifier_sums.as_mut().and_then(Iterator::next);
                let bias = bias_sums.as_mut().and_then(Iterator::next);
                (tile, logits, classifier, bias)
            })
            .collect();
        let first = sums.first;
        tasks
            .into_par_iter()
            .with_min_len(self.tasks_at_least(tiles.len()))
            .for_each_init(
                Vec::new,
                |wide, (tile, logits, mut classifier_sum, mut bias_sum)| {
                    let classes = self.classes(&(tile..tile + 1));
                    for run in kept.runs(tile, rows.clone(), of_embeddings | of_classifier) {
                        let at = local(&run);
                        let logits = &mut logits[at.start * TILE..at.end * TILE];
                        if recompute {
                            let classifier = self.tile_classifier(tile, wide);
                            let embeddings = &embeddings[at.start * hidden..at.end * hidden];
                            self.logits(embeddings, classifier, tile, logits);
                        }
                        let of_rows = run.map(|row| {
                            let target = self.rows.target[row] as usize;
                            passes::Row {
                                max: softmax[row].max,
                                inverse_sum: softmax[row].inverse_sum,
                                scale: scales[row].softmax,
                                one_hot_scale: scales[row].one_hot,
                                target: classes.contains(&target).then(|| target - classes.start),
                            }
                        });
                        passes::gradient(logits, TILE, classes.len(), self.softcap, of_rows);
                    }
                    let mut accumulate = !first;
                    for run in kept.runs(tile, rows.clone(), of_classifier) {
                        let at = local(&run);
                        let gradient = &logits[at.start * TILE..at.end * TILE];
                        if let Some(sum) = &mut classifier_sum {
                            let embeddings = &embeddings[at.start * hidden..at.end * hidden];
                            multiply(
                                sum,
                                hidden,
                                accumulate,
                                Matrix::new(gradient, at.len(), classes.len(), TILE).t(),
                                Matrix::new(embeddings, at.len(), hidden, hidden),
                            );
                            accumulate = true;
                        }
                        if let Some(sum) = &mut bias_sum {
                            passes::add_rows(gradient, TILE, sum);
                        }
                    }
                },
            );
        if let Some(sum) = &mut sums.embeddings {
            let part = count.div_ceil(self.lanes).next_multiple_of(GROUP);
            sum.par_chunks_mut(part * hidden)
                .zip(blocks(count, part).collect::<Vec<_>>())
                .for_each_init(Vec::new, |wide, (sum, part)| {
                    for (tile, logits) in tiles.clone().zip(logits.chunks(count * TILE)) {
                        let classes = self.classes(&(tile..tile + 1)).len();
                        let part_rows = rows.start + part.start..rows.start + part.end;
                        for run in kept.runs(tile, part_rows, EMBEDDINGS) {
                            let at = local(&run);
                            let gradient = &logits[at.start * TILE..at.end * TILE];
                            let classifier = self.tile_classifier(tile, wide);
                            multiply(
                                &mut sum[(at.start - part.start) * hidden..],
                                hidden,
                                true,
                                Matrix::new(gradient, at.len(), classes, TILE),
                                Matrix::new(classifier, classes, hidden, hidden),
                            );
                        }
                    }
                });
        }
    }
}
