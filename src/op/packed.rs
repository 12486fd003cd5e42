//! Where the results of a forward lie in the vector that it returns.

use crate::problem::Problem;
use crate::Entropy;
use std::ops::Range;

/// `[losses (n), lse (n), loss (1)]` over the `n` positions of the result, and after them, where it is asked for,
/// `[entropy (n)]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed {
    positions: usize,
    has_entropy: bool,
}

impl Packed {
    pub fn of(problem: &Problem) -> Self {
        Self {
            positions: problem.positions.len(),
            has_entropy: problem.settings.entropy != Entropy::Off,
        }
    }

    pub fn losses(self) -> Range<usize> {
        0..self.positions
    }

    pub fn lse(self) -> Range<usize> {
        self.positions..2 * self.positions
    }

    /// The reduced loss.
    pub fn loss(self) -> usize {
        2 * self.positions
    }

    pub fn entropy(self) -> Option<Range<usize>> {
        let start = self.loss() + 1;
        self.has_entropy.then(|| start..start + self.positions)
    }

    pub fn len(self) -> usize {
        self.entropy().map_or(self.loss() + 1, |range| range.end)
    }
}
