//! The gradient filter.

use candle_core::{bail, DType, Error, Result};
use std::str::FromStr;

/// Which tiles of the gradient of the logits are computed entry by entry. The others are averaged.
///
/// A tile is a block of rows (positions that count) by a block of classes: 1 row by 256 classes in this crate's CPU
/// implementation, 128 by 128 in its CUDA kernels. Let `p = softmax(z)`. A tile in which some `p_ij`, targets
/// apart, reaches the threshold is computed entry by entry. In any other the gradient has `M_it w_tj` in the place
/// of `p_ij`, where
///
/// - `M_it = sum_j p_ij` is the row's own probability in the tile, without its target's, and
/// - `w_tj = softmax_j(C_j . e_t + b_j)` over the tile's classes (logits capped where there is a softcap), with
///   `e_t = sum_i M_it E_i / sum_i M_it`, the mean row that sees the tile.
///
/// The entry of a row's target is computed exactly and added to its class's share. So every row of the gradient
/// still sums to zero, as `softmax - onehot` does. An implementation that goes through the rows in chunks may take
/// each chunk's own mean row. Dropping such tiles instead, as
/// the reference implementation does, loses a push that always has the same direction: see [`Filter::Drop`].
///
/// ```
/// use candle_cut_cross_entropy::{Filter, Options};
///
/// // Exact gradients of the head; those of the embeddings averaged where every probability is below 1e-3.
/// let options = Options::default()
///     .filter_classifier(Filter::Off)
///     .filter_embeddings(Filter::Threshold(1e-3));
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Filter {
    /// Every tile is computed entry by entry: the exact gradient.
    Off,
    /// [`Filter::Threshold`] with a threshold for the inputs' dtype: 2^-11 for bf16 and f16, 2^-28 for f32 and
    /// 2^-57 for f64, where it is as good as exact. On CUDA, gradients that the forward forms
    /// ([`Strategy::Fused`](crate::Strategy::Fused)) are exact where there are fewer than 65,536 classes: nearly every tile
    /// of such a head matters, and exact is faster.
    #[default]
    Auto,
    /// A threshold of your own, in `[0, 1)`. 0 is the exact gradient.
    Threshold(f64),
    /// Tiles whose every `|softmax(z) - onehot(y)|` is below the threshold, in `[0, 1)`, are left out, as in the
    /// reference implementation, whose threshold is the machine epsilon of the dtype divided by 32 (2^-12 for
    /// bf16). For comparison only: what is left out always pushes classes down, and a model that trains without
    /// it ends 20% above the perplexity of exact gradients, or diverges.
    Drop(f64),
}

impl Filter {
    /// The threshold for inputs of this dtype; `None` where every tile is computed.
    pub(crate) fn threshold(self, dtype: DType) -> Result<Option<f64>> {
        Ok(match self {
            Filter::Off => None,
            Filter::Auto => Some(match dtype {
                DType::BF16 | DType::F16 => 2f64.powi(-11),
                DType::F32 => 2f64.powi(-28),
                _ => 2f64.powi(-57),
            }),
            Filter::Threshold(eps) | Filter::Drop(eps) if (0. ..1.).contains(&eps) => Some(eps),
            Filter::Threshold(eps) | Filter::Drop(eps) => {
                bail!("filter threshold must be in [0, 1), got {eps}")
            }
        })
    }
}

impl std::fmt::Display for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Filter::Off => f.write_str("off"),
            Filter::Auto => f.write_str("auto"),
            Filter::Threshold(eps) => write!(f, "{eps}"),
            Filter::Drop(eps) => write!(f, "drop:{eps}"),
        }
    }
}

impl FromStr for Filter {
    type Err = Error;

    /// `off`, `auto`, a threshold such as `0.001`, or `drop:0.001`.
    fn from_str(text: &str) -> Result<Self> {
        let number = |number: &str| number.parse::<f64>().map_err(Error::wrap);
        let filter = match (text, text.strip_prefix("drop:")) {
            ("off", _) => Ok(Filter::Off),
            ("auto", _) => Ok(Filter::Auto),
            (_, Some(eps)) => number(eps).map(Filter::Drop),
            (eps, None) => number(eps).map(Filter::Threshold),
        };
        match filter {
            Ok(filter) => filter.threshold(DType::F32).map(|_| filter),
            Err(_) => bail!(
                "expected the filter off, auto, a threshold such as 0.001 or drop:0.001, got {text:?}"
            ),
        }
    }
}
