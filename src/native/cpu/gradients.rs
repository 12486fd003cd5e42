//! Gradients while they are summed up in the type that is computed in.

use super::element::Element;
use super::inputs::Inputs;
use rayon::prelude::*;
use std::ops::Range;

/// Gradients in the type of the inputs, `None` for one that is not wanted.
pub(super) struct FormedGradients<T> {
    pub embeddings: Option<Vec<T>>,
    pub classifier: Option<Vec<T>>,
    pub bias: Option<Vec<T>>,
}

/// The gradient of the embeddings while it is summed up.
pub(super) struct EmbeddingsGradient<T: Element> {
    hidden: usize,
    /// Sums of the rows that count, from row `start` on.
    sums: Vec<T::Real>,
    start: usize,
    /// Where they go when complete; `None` where the sums are themselves the gradient.
    out: Option<Vec<T>>,
}

impl<T: Element> EmbeddingsGradient<T> {
    pub fn new(inputs: &Inputs<'_, T>) -> Self {
        let len = inputs.embeddings.len();
        let direct = T::REAL && inputs.rows.all;
        Self {
            hidden: inputs.hidden,
            sums: vec![T::Real::default(); if direct { len } else { 0 }],
            start: 0,
            out: (!direct).then(|| vec![T::from_f64(0.); len]),
        }
    }

    pub fn begin(&mut self, rows: &Range<usize>) {
        if self.out.is_some() {
            self.start = rows.start;
            self.sums.clear();
            self.sums
                .resize(rows.len() * self.hidden, T::Real::default());
        }
    }

    pub fn block(&mut self, rows: &Range<usize>) -> &mut [T::Real] {
        let start = (rows.start - self.start) * self.hidden;
        &mut self.sums[start..start + rows.len() * self.hidden]
    }

    pub fn end(&mut self, inputs: &Inputs<'_, T>) {
        if let Some(out) = &mut self.out {
            let rows = &inputs.rows.embedding[self.start..];
            for (sum, row) in self.sums.chunks(self.hidden).zip(rows) {
                T::narrow(sum, &mut out[*row as usize * self.hidden..][..self.hidden]);
            }
        }
    }

    pub fn finish(self) -> Vec<T> {
        self.out.unwrap_or_else(|| T::from_real(self.sums))
    }
}

/// The gradient of the classifier or the bias while it is summed up, range of classes by range.
pub(super) struct ClassesGradient<T: Element> {
    wanted: bool,
    /// All of the gradient, or of the range at hand what is then rounded into `out`.
    sums: Vec<T::Real>,
    out: Vec<T>,
}

impl<T: Element> ClassesGradient<T> {
    pub fn new(wanted: bool, len: usize) -> Self {
        let len = if wanted { len } else { 0 };
        Self {
            wanted,
            sums: vec![T::Real::default(); if T::REAL { len } else { 0 }],
            out: vec![T::from_f64(0.); if T::REAL { 0 } else { len }],
        }
    }

    pub fn begin(&mut self, len: usize) {
        if self.wanted && !T::REAL {
            self.sums.clear();
            self.sums.resize(len, T::Real::default());
        }
    }

    pub fn range(&mut self, range: &Range<usize>) -> Option<&mut [T::Real]> {
        let sums = if T::REAL {
            self.sums.get_mut(range.clone())
        } else {
            Some(self.sums.as_mut_slice())
        };
        sums.filter(|_| self.wanted)
    }

    pub fn end(&mut self, range: &Range<usize>) {
        if self.wanted && !T::REAL {
            self.out[range.clone()]
                .par_chunks_mut(1 << 14)
                .zip(self.sums.par_chunks(1 << 14))
                .for_each(|(out, sums)| T::narrow(sums, out));
        }
    }

    pub fn finish(self) -> Option<Vec<T>> {
        self.wanted.then(|| {
            if T::REAL {
                T::from_real(self.sums)
            } else {
                self.out
            }
        })
    }
}
