//! The gradients that a block of the logits contributes.

use super::average::Averages;
use super::blocks::{blocks, Inputs, Scale, Softmax, GROUP, TILE};
use super::element::Element;
use super::kept::{Kept, CLASSIFIER, EMBEDDINGS};
use super::passes;
use super::product::{multiply, Matrix};
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

/// The sums of classifier and bias for the classes of a tile, where wanted.
type OfClasses<'a, R> = (Option<&'a mut [R]>, Option<&'a mut [R]>);

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
            scale: known.scales[row].softmax,
            one_hot_scale: known.scales[row].one_hot,
            target: classes.contains(&target).then(|| target - classes.start),
        }
    }

    /// The target of a row and its gradient, if it is among the classes of a tile.
    fn target(
        &self,
        known: &Known<'_, T::Real>,
        row: usize,
        classes: &Range<usize>,
    ) -> Option<(usize, T::Real)> {
        let of_row = self.row(known, row, classes);
        let gradient = || of_row.of_target(known.softmax[row].target, self.softcap);
        of_row.target.map(|target| (target, gradient()))
    }

    /// Adds the gradients of a block to `sums`. The block's logits are computed first if `recompute`,
    /// else they are there.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        embeddings: &[T::Real],
        rows: &Range<usize>,
        tiles: &Range<usize>,
        logits: &mut [T::Real],
        recompute: bool,
        known: Known<'_, T::Real>,
        sums: &mut Sums<'_, T::Real>,
    ) {
        let hidden = self.hidden;
        let count = rows.len();
        let kept = known.kept;
        let of_classifier = gradients(false, sums.classifier.is_some() || sums.bias.is_some());
        let wanted = of_classifier | gradients(sums.embeddings.is_some(), false);
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
                || (Vec::new(), Vec::new()),
                |(wide, averaged), (tile, logits, mut classifier_sum, mut bias_sum)| {
                    let classes = self.classes(&(tile..tile + 1));
                    for run in kept.runs(tile, rows.clone(), wanted) {
                        let at = local(&run);
                        let logits = &mut logits[at.start * TILE..at.end * TILE];
                        if recompute {
                            let classifier = self.tile_classifier(tile, wide);
                            let embeddings = &embeddings[at.start * hidden..at.end * hidden];
                            self.logits(embeddings, classifier, tile, logits);
                        }
                        let of_rows = run.map(|row| self.row(&known, row, &classes));
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
                    if let Some(averages) = known.averages {
                        let runs = kept.averaged(tile, rows.clone(), of_classifier);
                        self.average_classes(
                            averages,
                            embeddings,
                            rows.start,
                            runs,
                            tile,
                            known,
                            averaged,
                            (classifier_sum, bias_sum),
                        );
                    }
                },
            );
        if let Some(sum) = &mut sums.embeddings {
            let part = count.div_ceil(self.lanes).next_multiple_of(GROUP);
            sum.par_chunks_mut(part * hidden)
                .zip(blocks(count, part).collect::<Vec<_>>())
                .for_each_init(Vec::new, |wide, (sum, part)| {
                    let part_rows = rows.start + part.start..rows.start + part.end;
                    for (tile, logits) in tiles.clone().zip(logits.chunks(count * TILE)) {
                        let classes = self.classes(&(tile..tile + 1)).len();
                        for run in kept.runs(tile, part_rows.clone(), EMBEDDINGS) {
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
                    if let Some(averages) = known.averages {
                        self.average_rows(averages, &part_rows, tiles, known, sum, wide);
                    }
                });
        }
    }

    /// Adds what averaged runs of rows of a tile give its classes to the sums of classifier and bias. `embeddings`
    /// begin with the row `start`; `sum` is scratch.
    #[allow(clippy::too_many_arguments)]
    fn average_classes(
        &self,
        averages: &Averages<T::Real>,
        embeddings: &[T::Real],
        start: usize,
        runs: impl Iterator<Item = Range<usize>>,
        tile: usize,
        known: Known<'_, T::Real>,
        sum: &mut Vec<T::Real>,
        (mut classifier, mut bias): OfClasses<'_, T::Real>,
    ) {
        let hidden = self.hidden;
        let classes = self.classes(&(tile..tile + 1));
        sum.clear();
        sum.resize(hidden, T::Real::default());
        let mut masses = T::Real::default();
        let mut any = false;
        for row in runs.flatten() {
            any = true;
            let embedding = &embeddings[(row - start) * hidden..][..hidden];
            let mass = known.scales[row].softmax * known.kept.mass(tile, row);
            masses += mass;
            if classifier.is_some() {
                passes::add_scaled(sum, embedding, mass);
            }
            if let Some((target, gradient)) = self.target(&known, row, &classes) {
                if let Some(classifier) = &mut classifier {
                    let of_target = &mut classifier[target * hidden..][..hidden];
                    passes::add_scaled(of_target, embedding, gradient);
                }
                if let Some(bias) = &mut bias {
                    bias[target] += gradient;
                }
            }
        }
        if !any {
            return;
        }
        let shares = averages.shares(tile);
        if let Some(classifier) = classifier {
            for (class, share) in classifier.chunks_mut(hidden).zip(shares) {
                passes::add_scaled(class, sum, *share);
            }
        }
        if let Some(bias) = bias {
            passes::add_scaled(bias, shares, masses);
        }
    }

    /// Adds what averaged tiles give some rows to their sum; `wide` is scratch.
    fn average_rows(
        &self,
        averages: &Averages<T::Real>,
        rows: &Range<usize>,
        tiles: &Range<usize>,
        known: Known<'_, T::Real>,
        sum: &mut [T::Real],
        wide: &mut Vec<T::Real>,
    ) {
        let hidden = self.hidden;
        let mut masses = vec![T::Real::default(); tiles.len() * rows.len()];
        for (tile, masses) in tiles.clone().zip(masses.chunks_mut(rows.len())) {
            let classes = self.classes(&(tile..tile + 1));
            for row in known
                .kept
                .averaged(tile, rows.clone(), EMBEDDINGS)
                .flatten()
            {
                let at = row - rows.start;
                masses[at] = known.scales[row].softmax * known.kept.mass(tile, row);
                if let Some((target, gradient)) = self.target(&known, row, &classes) {
                    let class = (classes.start + target) * hidden;
                    wide.resize(hidden, T::Real::default());
                    T::widen(&self.classifier[class..class + hidden], wide);
                    passes::add_scaled(&mut sum[at * hidden..][..hidden], wide, gradient);
                }
            }
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
