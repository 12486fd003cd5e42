//! The loss as the kernels know it: what that of a row is made of, and where the results go.

use super::launch::Gpu;
use super::params::terms::TermsParams;
use crate::problem::Problem;
use crate::terms::Weights;
use candle_core::Result;

pub(super) struct Terms {
    pub params: TermsParams,
    /// In memory as long as the addresses are in use.
    _weights: Option<Weights>,
}

impl Terms {
    pub fn of(gpu: &Gpu, problem: &Problem) -> Result<Self> {
        let all = problem.settings.terms;
        let (of_positions, total) = match &problem.weights {
            None => (0, 0),
            Some(weights) => (gpu.read(&weights.terms, Ok)?, gpu.read(&weights.total, Ok)?),
        };
        Ok(Self {
            params: TermsParams {
                of_positions,
                total,
                nll: all.nll as f32,
                lse: all.lse as f32,
                square: all.square as f32,
                entropy: all.entropy as f32,
            },
            _weights: problem.weights.clone(),
        })
    }
}

impl TermsParams {
    /// Whether the loss of every position is its nll.
    pub fn nll_only(&self) -> bool {
        let Self {
            nll,
            lse,
            square,
            entropy,
            ..
        } = *self;
        self.of_positions == 0 && (nll, lse, square, entropy) == (1., 0., 0., 0.)
    }

    /// Whether the gradient of a position's loss by its logits has no number above 1, but for rounding.
    pub fn at_most_one(&self) -> bool {
        let others = self.of_positions != 0 || self.square != 0. || self.entropy != 0.;
        !others && self.nll.abs() + self.lse.abs() <= 1.001
    }
}

/// The loss, where it goes and what is in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loss {
    /// The address of `[losses, lse, loss]`.
    pub packed: u64,
    /// Of the entropies and the likeliest classes of the positions, 0 where not asked for.
    pub entropy: u64,
    pub predicted: u64,
    pub terms: TermsParams,
}

impl Loss {
    /// Whether the entropy is in the loss.
    pub fn has_entropy(&self) -> bool {
        self.terms.entropy != 0.
    }

    /// Whether more is asked for than losses and lse.
    pub fn more(&self) -> bool {
        self.entropy != 0 || self.predicted != 0
    }
}
