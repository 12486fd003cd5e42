//! The gradients that a block of the logits contributes.

use super::average::{Averages, SumsByMass};
use super::element::{Element, Real};
use super::inputs::Inputs;
use super::kept::{Kept, CLASSIFIER, EMBEDDINGS};
use super::passes;
use super::product::{multiply, Matrix};
use super::statistics::{gathered_rows, Scale, Softmax, LEAST_ROWS, TILE};
use crate::blocks::blocks;
use rayon::prelude::*;
use std::ops::Range;

/// What is known of all rows.
#[derive(Clone, Copy)]
pub(super) struct Known<'a, R> {
    pub kept: &'a Kept<R>,
    pub softmax: &'a [Softmax<R>],
    pub scales: &'a [Scale<R>],
    /// What stands for the tiles that are averaged, where one is.
    pub averages: Option<&'a Averages<R>>,
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

/// Bits of [`Kept`] for the gradients that are wanted.
pub(super) fn gradients(embeddings: bool, classifier_or_bias: bool) -> u8 {
    let of_embeddings = if embeddings { EMBEDDINGS } else { 0 };
    let of_classifier = if classifier_or_bias { CLASSIFIER } else { 0 };
    of_embeddings | of_classifier
}

/// A block of rows and tiles whose gradients are wanted.
#[derive(Clone, Copy)]
pub(super) struct Block<'a, R> {
    pub rows: &'a Range<usize>,
    pub tiles: &'a Range<usize>,
    /// `(rows, D)`
    pub embeddings: &'a [R],
    pub known: Known<'a, R>,
    /// The logits are not there yet.
    pub recompute: bool,
}

/// The gradients that a block is taken for: bits of [`Kept`].
#[derive(Clone, Copy)]
struct Taken {
    of_embeddings: u8,
    of_classifier: u8,
}

impl Taken {
    fn any(self) -> u8 {
        self.of_embeddings | self.of_classifier
    }
}

/// The sums of classifier and bias for the classes of a tile, where wanted.
struct OfClasses<'a, R> {
    classifier: Option<&'a mut [R]>,
    bias: Option<&'a mut [R]>,
    /// The classifier's is not nothing but zeros.
    accumulate: bool,
}

/// Memory of a thread.
#[derive(Default)]
struct Scratch<R> {
    /// Classes in the type that is computed in.
    wide: Vec<R>,
    /// Rows of the embeddings or their gradient that are multiplied together and do not lie together.
    embeddings: Vec<R>,
    /// The same rows of a tile of logits.
    logits: Vec<R>,
    /// The rows that a product is taken over.
    rows: Vec<usize>,
}

/// Whether these rows are one run.
fn contiguous(rows: &[usize]) -> bool {
    match rows {
        [] => true,
        [first, ..] => rows[rows.len() - 1] - first + 1 == rows.len(),
    }
}

/// The parts of a list of rows that are multiplied together: all of it where the rows lie together, else about equal
/// ones of at most `most` rows.
fn parts(rows: &[usize], most: usize) -> std::slice::Chunks<'_, usize> {
    let count = if contiguous(rows) {
        1
    } else {
        rows.len().div_ceil(most)
    };
    rows.chunks(rows.len().div_ceil(count).max(1))
}

/// Some rows, ascending, of those that begin with `start` and are `width` wide: themselves where they lie together, else
/// copies.
fn gather<'a, R: Real>(
    values: &'a [R],
    start: usize,
    width: usize,
    rows: &[usize],
    copies: &'a mut Vec<R>,
) -> &'a [R] {
    let at = |row: usize| (row - start) * width;
    if contiguous(rows) {
        return &values[at(rows[0])..][..rows.len() * width];
    }
    copies.clear();
    for row in rows {
        copies.extend_from_slice(&values[at(*row)..][..width]);
    }
    copies
}

impl<T: Element> Inputs<'_, T> {
    /// A row, as one of the rows of a tile's classes.
    fn row(
        &self,
        known: &Known<'_, T::Real>,
        row: usize,
        classes: &Range<usize>,
    ) -> passes::Row<T::Real> {
        let target = self.rows.target[row] as usize;
        passes::Row {
            max: known.softmax[row].max,
            inverse_sum: known.softmax[row].inverse_sum,
            scale: known.scales[row],
            target: classes.contains(&target).then(|| target - classes.start),
        }
    }

    /// The gradient of a row's target, and the class.
    fn target(&self, known: &Known<'_, T::Real>, row: usize) -> (usize, T::Real) {
        let target = self.rows.target[row] as usize;
        let of_row = self.row(known, row, &(target..target + 1));
        (
            target,
            of_row.of_target(known.softmax[row].target, self.softcap),
        )
    }

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

    /// Replaces a tile's logits by their gradients, of the rows that are taken, and adds what these give its classes.
    fn add_to_classes(
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
    fn add_average_to_classes(
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

    /// Adds what a tile gives a part of a block's rows to their sum, where it is taken.
    fn add_to_rows(
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
    fn add_average_to_rows(
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
