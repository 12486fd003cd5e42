//! A block of logits and what is known of its rows.

use crate::native::cpu::average::Averages;
use crate::native::cpu::element::Element;
use crate::native::cpu::inputs::Inputs;
use crate::native::cpu::kept::{Kept, CLASSIFIER, EMBEDDINGS};
use crate::native::cpu::passes;
use crate::native::cpu::statistics::{Scale, Softmax};
use std::ops::Range;

/// What is known of all rows.
#[derive(Clone, Copy)]
pub(in crate::native::cpu) struct Known<'a, R> {
    pub kept: &'a Kept<R>,
    pub softmax: &'a [Softmax<R>],
    pub scales: &'a [Scale<R>],
    /// What stands for the tiles that are averaged, where one is.
    pub averages: Option<&'a Averages<R>>,
}

/// Where a block adds its gradients, `None` for one that is not wanted.
pub(in crate::native::cpu) struct Sums<'a, R> {
    /// The block's rows.
    pub embeddings: Option<&'a mut [R]>,
    /// The block's classes.
    pub classifier: Option<&'a mut [R]>,
    pub bias: Option<&'a mut [R]>,
    /// Nothing but zeros is in `classifier` yet.
    pub first: bool,
}

/// Bits of [`Kept`] for the gradients that are wanted.
pub(in crate::native::cpu) fn gradients(embeddings: bool, classifier_or_bias: bool) -> u8 {
    let of_embeddings = if embeddings { EMBEDDINGS } else { 0 };
    let of_classifier = if classifier_or_bias { CLASSIFIER } else { 0 };
    of_embeddings | of_classifier
}

/// A block of rows and tiles whose gradients are wanted.
#[derive(Clone, Copy)]
pub(in crate::native::cpu) struct Block<'a, R> {
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
pub(super) struct Taken {
    pub of_embeddings: u8,
    pub of_classifier: u8,
}

impl Taken {
    pub fn any(self) -> u8 {
        self.of_embeddings | self.of_classifier
    }
}

/// Memory of a thread.
#[derive(Default)]
pub(super) struct Scratch<R> {
    /// Classes in the type that is computed in.
    pub wide: Vec<R>,
    /// Rows of the embeddings or their gradient that are multiplied together and do not lie together.
    pub embeddings: Vec<R>,
    /// The same rows of a tile of logits.
    pub logits: Vec<R>,
    /// The rows that a product is taken over.
    pub rows: Vec<usize>,
}

/// The sums of classifier and bias for the classes of a tile, where wanted.
pub(super) struct OfClasses<'a, R> {
    pub classifier: Option<&'a mut [R]>,
    pub bias: Option<&'a mut [R]>,
    /// The classifier's is not nothing but zeros.
    pub accumulate: bool,
}

impl<T: Element> Inputs<'_, T> {
    /// A row, as one of the rows of a tile's classes.
    pub(super) fn row(
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
    pub(super) fn target(&self, known: &Known<'_, T::Real>, row: usize) -> (usize, T::Real) {
        let target = self.rows.target[row] as usize;
        let of_row = self.row(known, row, &(target..target + 1));
        (
            target,
            of_row.of_target(known.softmax[row].target, self.softcap),
        )
    }
}
