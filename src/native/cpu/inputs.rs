//! The operands of a call, and what blocks of their logits sum up to.

use super::element::{Element, Real};
use super::kept::Kept;
use super::passes;
use super::product::{multiply, Matrix};
use super::statistics::{Asked, BlockSums, RowLoss, RowSum, Softmax, TileAsked, TileSum, TILE};
use crate::native::rows::HostRows;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// The operands of a call, and the logits that are made of them.
pub(super) struct Inputs<'a, T: Element> {
    pub embeddings: &'a [T],
    pub classifier: &'a [T],
    pub adapter: Option<&'a [T]>,
    pub bias: Option<Vec<T::Real>>,
    /// Columns of the embeddings.
    pub hidden: usize,
    pub vocab: usize,
    pub rows: &'a HostRows,
    /// What logits are multiplied by after the bias and before the softcap.
    pub scale: Option<T::Real>,
    pub softcap: Option<T::Real>,
    pub asked: Asked,
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

    /// The columns of the embeddings that the gradient of what is trained of the classifier has.
    pub fn trained(&self) -> Range<usize> {
        let rank = self.adapter.map_or(self.hidden, |b| b.len() / self.vocab);
        self.hidden - rank..self.hidden
    }

    /// The classes of a tile, an adapter's columns after their own, in the type that is computed in.
    pub fn tile_classifier<'b>(
        &'b self,
        tile: usize,
        scratch: &'b mut Vec<T::Real>,
    ) -> &'b [T::Real] {
        let classes = self.classes(&(tile..tile + 1));
        if let Some(adapter) = self.adapter {
            let (own, rank) = (self.classifier.len() / self.vocab, self.trained().len());
            scratch.clear();
            scratch.resize(classes.len() * self.hidden, T::Real::default());
            for (class, row) in classes.zip(scratch.chunks_mut(self.hidden)) {
                T::widen(&self.classifier[class * own..][..own], &mut row[..own]);
                let of_adapter = &mut row[self.hidden - rank..];
                T::widen(&adapter[class * rank..][..rank], of_adapter);
            }
            return scratch;
        }
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
    pub fn logits(
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
        self.finish_logits(logits, TILE, &classes);
    }

    /// Makes logits `(rows, stride)` of the products of some classes.
    pub fn finish_logits(&self, products: &mut [T::Real], stride: usize, classes: &Range<usize>) {
        let after = passes::After {
            bias: self.bias.as_ref().map(|bias| &bias[classes.clone()]),
            scale: self.scale,
            softcap: self.softcap,
        };
        passes::finish(products, stride, classes.len(), after);
    }

    /// Tasks that one thread takes in a row, so that no more than `lanes` threads work.
    pub fn tasks_at_least(&self, tasks: usize) -> usize {
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
        kept: &mut Kept<T::Real>,
        softmax: &mut Vec<Softmax<T::Real>>,
    ) -> Vec<RowLoss> {
        let sums = self.sums(embeddings, rows, logits, kept.averaging());
        self.finish(rows, &sums.tiles, &sums.rows, kept, softmax)
    }

    /// What a block of rows comes to once its sums are known; decides which of its tiles are kept.
    pub fn finish(
        &self,
        rows: &Range<usize>,
        tiles: &[TileSum<T::Real>],
        sums: &[RowSum<T::Real>],
        kept: &mut Kept<T::Real>,
        softmax: &mut Vec<Softmax<T::Real>>,
    ) -> Vec<RowLoss> {
        softmax.extend(sums.iter().map(RowSum::softmax));
        let losses: Vec<RowLoss> = sums.iter().map(RowSum::loss).collect();
        kept.decide(rows, tiles, &self.rows.target, softmax, &losses);
        losses
    }

    /// The sums of a block of rows, with masses of tiles if `masses`; leaves the logits in `logits` where that is
    /// given.
    pub fn sums(
        &self,
        embeddings: &[T::Real],
        rows: &Range<usize>,
        logits: Option<&mut [T::Real]>,
        masses: bool,
    ) -> BlockSums<T::Real> {
        let count = rows.len();
        let tiles = self.tiles();
        let targets = &self.rows.target[rows.clone()];
        let softcap = self.softcap.filter(|_| masses);
        let mut statistics = vec![TileSum::default(); tiles * count];
        let of_asked = if self.asked.any() { tiles * count } else { 0 };
        let mut asked = vec![TileAsked::default(); of_asked];
        let mut stored = logits.map(|logits| logits.chunks_mut(count * TILE));
        let mut asked_of_tiles = asked.chunks_mut(count);
        let tasks: Vec<_> = statistics
            .chunks_mut(count)
            .map(|statistics| {
                let stored = stored.as_mut().and_then(Iterator::next);
                (statistics, asked_of_tiles.next(), stored)
            })
            .collect();
        let found: Vec<Vec<(usize, T::Real)>> = tasks
            .into_par_iter()
            .with_min_len(self.tasks_at_least(tiles))
            .enumerate()
            .map_init(
                || (Vec::new(), Vec::new()),
                |(wide, scratch), (tile, (statistics, asked, stored))| {
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
                    // A target is no part of its tile here: the filter asks for the others.
                    let found: Vec<(usize, usize, T::Real)> = targets
                        .iter()
                        .enumerate()
                        .filter(|(_, target)| classes.contains(&(**target as usize)))
                        .map(|(row, target)| {
                            let at = row * TILE + *target as usize - classes.start;
                            let left_out = T::Real::from_f64(f64::NEG_INFINITY);
                            (row, at, std::mem::replace(&mut logits[at], left_out))
                        })
                        .collect();
                    let asked = asked.map(|of_rows| (self.asked, of_rows));
                    passes::statistics(logits, TILE, classes.len(), softcap, statistics, asked);
                    let put_back = |(row, at, logit)| {
                        logits[at] = logit;
                        (row, logit)
                    };
                    found.into_iter().map(put_back).collect()
                },
            )
            .collect();
        let mut target_logits = vec![None; count];
        for (row, logit) in found.into_iter().flatten() {
            target_logits[row] = Some((targets[row], logit));
        }
        let sum_up = |(row, target)| {
            let of_row = statistics[row..].iter().step_by(count);
            let mut sum = RowSum::of_tiles(of_row.clone(), target);
            if self.asked.any() {
                let asked = asked[row..].iter().step_by(count);
                sum.add_asked(of_row.zip(asked), target);
            }
            sum
        };
        let rows = target_logits.into_iter().enumerate().map(sum_up).collect();
        BlockSums {
            tiles: statistics,
            rows,
        }
    }
}
