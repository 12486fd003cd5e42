//! Rotary position embeddings and the ways their frequencies are scaled.

use super::entries::invalid;
use candle_core::{DType, Device, Result, Tensor};
use serde::Deserialize;
use std::borrow::Cow;
use std::f64::consts::PI;

/// The rotary position embedding of a layer: pair `i` of a head's dimensions at position `t` is turned
/// by the angle `t * frequencies[i]`.
///
/// A head's first `2 * frequencies.len()` dimensions are turned, its others stay as they are. With the
/// rope type `dynamic`, a sequence beyond `max_position_embeddings` has frequencies of its own: those of
/// its length, whatever came before it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Rope {
    /// The angle a position turns each pair of dimensions by.
    pub frequencies: Vec<f32>,
    /// What takes the place of `frequencies` where a sequence has more positions than this (Phi-3's
    /// `longrope`).
    pub long: Option<(usize, Vec<f32>)>,
    /// What the cosines and sines are multiplied by: 1 but for `yarn` and `longrope`.
    pub scale: f64,
    dynamic: Option<Dynamic>,
}

/// Frequencies that fall with the length of a sequence that is longer than most (NTK).
#[derive(Debug, Clone, Copy, PartialEq)]
struct Dynamic {
    theta: f64,
    factor: f64,
    most: usize,
}

/// The entries of `rope_parameters`, or `rope_scaling`, of a `config.json`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(super) struct Parameters {
    pub rope_type: Option<String>,
    /// The older name of `rope_type`.
    #[serde(rename = "type")]
    pub old_type: Option<String>,
    pub rope_theta: Option<f64>,
    pub partial_rotary_factor: Option<f64>,
    pub original_max_position_embeddings: Option<usize>,
    factor: Option<f64>,
    attention_factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
}

impl Parameters {
    /// The type of the embedding.
    pub fn name(&self) -> &str {
        let name = self.rope_type.as_deref().or(self.old_type.as_deref());
        name.unwrap_or("default")
    }
}

impl Rope {
    /// The embedding for heads of `head_dim` dimensions.
    ///
    /// Source: `modeling_rope_utils.py` of Hugging Face transformers.
    pub(super) fn new(
        parameters: &Parameters,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Self> {
        let theta = parameters.rope_theta.unwrap_or(1e4);
        if !(theta > 0. && theta.is_finite()) {
            return invalid(format!(
                "rope_theta must be positive and finite, got {theta}"
            ));
        }
        let share = parameters.partial_rotary_factor.unwrap_or(1.);
        let dim = (head_dim as f64 * share) as usize;
        if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
            return invalid(format!(
                "rotary embedding of {dim} dimensions (head_dim {head_dim}, partial_rotary_factor {share})"
            ));
        }
        let name = parameters.name();
        let number = |key: &str, value: Option<f64>| match value {
            Some(value) if value > 0. && value.is_finite() => Ok(value),
            Some(value) => invalid(format!(
                "{key} of rope type {name:?} must be positive and finite, got {value}"
            )),
            None => invalid(format!("rope type {name:?} needs {key}")),
        };
        let original = parameters
            .original_max_position_embeddings
            .unwrap_or(max_positions) as f64;
        let plain = plain(theta, dim);

        let (mut long, mut dynamic) = (None, None);
        let mut scale = 1.;
        let frequencies = match name {
            "default" => plain,
            "linear" => {
                let factor = number("factor", parameters.factor)?;
                plain.iter().map(|f| f / factor).collect()
            }
            "dynamic" if dim == 2 => {
                return invalid("rope type \"dynamic\" needs heads of more than 2 dimensions".into())
            }
            "dynamic" => {
                dynamic = Some(Dynamic {
                    theta,
                    factor: number("factor", parameters.factor)?,
                    most: max_positions,
                });
                plain
            }
            "llama3" => {
                let factor = number("factor", parameters.factor)?;
                let low = number("low_freq_factor", parameters.low_freq_factor)?;
                let high = number("high_freq_factor", parameters.high_freq_factor)?;
                let scaled = |f: &f64| {
                    let turns = original * f / (2. * PI);
                    let keep = ((turns - low) / (high - low)).clamp(0., 1.);
                    (1. - keep) * f / factor + keep * f
                };
                plain.iter().map(scaled).collect()
            }
            "yarn" => {
                let given = parameters.factor.unwrap_or(max_positions as f64 / original);
                let factor = number("factor", Some(given))?;
                let grown = |m: f64| match factor <= 1. {
                    true => 1.,
                    false => 0.1 * m * factor.ln() + 1.,
                };
                scale = match (parameters.attention_factor, parameters.mscale, parameters.mscale_all_dim) {
                    (Some(scale), ..) => scale,
                    (_, Some(m), Some(all)) if m != 0. && all != 0. => grown(m) / grown(all),
                    _ => grown(1.),
                };
                // 0 is as good as nothing.
                let or = |given: Option<f64>, default| given.filter(|x| *x != 0.).unwrap_or(default);
                let truncate = parameters.truncate.unwrap_or(true);
                let boundary = |turns: f64| {
                    dim as f64 * (original / (turns * 2. * PI)).ln() / (2. * theta.ln())
                };
                let low = boundary(or(parameters.beta_fast, 32.));
                let high = boundary(or(parameters.beta_slow, 1.));
                let low = if truncate { low.floor() } else { low }.max(0.);
                let high = if truncate { high.ceil() } else { high }.min(dim as f64 - 1.);
                let high = if low == high { high + 0.001 } else { high };
                let scaled = |(i, f): (usize, &f64)| {
                    let interpolate = ((i as f64 - low) / (high - low)).clamp(0., 1.);
                    f / factor * interpolate + f * (1. - interpolate)
                };
                plain.iter().enumerate().map(scaled).collect()
            }
            // The names in the first configs of Phi-3.
            "longrope" | "su" => {
                let given = parameters.factor.unwrap_or(max_positions as f64 / original);
                let factor = number("factor", Some(given))?;
                scale = match parameters.attention_factor {
                    Some(scale) => scale,
                    None if factor <= 1. => 1.,
                    None => (1. + factor.ln() / original.ln()).sqrt(),
                };
                let divided = |key: &str, by: &Option<Vec<f64>>| match by {
                    Some(by) if by.len() == plain.len() => {
                        Ok(plain.iter().zip(by).map(|(f, by)| f / by).collect())
                    }
                    Some(by) => invalid(format!(
                        "{key} must have {} entries, one a pair of rotated dimensions, got {}",
                        plain.len(),
                        by.len()
                    )),
                    None => invalid(format!("rope type {name:?} needs {key}")),
                };
                let beyond: Vec<f64> = divided("long_factor", &parameters.long_factor)?;
                long = Some((original as usize, rounded(beyond)));
                divided("short_factor", &parameters.short_factor)?
            }
            _ => {
                return invalid(format!(
                    "unsupported rope type {name:?}, expected one of default, linear, dynamic, llama3, yarn, longrope"
                ))
            }
        };
        Ok(Self {
            frequencies: rounded(frequencies),
            long,
            scale,
            dynamic,
        })
    }

    /// The frequencies for a sequence of this length.
    pub fn frequencies_at(&self, time: usize) -> Cow<'_, [f32]> {
        match (&self.long, self.dynamic) {
            (Some((most, long)), _) if time > *most => long.into(),
            (
                _,
                Some(Dynamic {
                    theta,
                    factor,
                    most,
                }),
            ) if time > most => {
                let dim = 2 * self.frequencies.len();
                let beyond = factor * time as f64 / most as f64 - (factor - 1.);
                let theta = theta * beyond.powf(dim as f64 / (dim as f64 - 2.));
                rounded(plain(theta, dim)).into()
            }
            _ => (&self.frequencies).into(),
        }
    }

    /// The cosines and sines of the first `time` positions, `(time, frequencies)`, for heads of this dtype.
    pub(super) fn angles(&self, time: usize, dtype: DType, device: &Device) -> Result<Angles> {
        let frequencies = self.frequencies_at(time);
        let frequencies = Tensor::from_slice(&frequencies, (1, frequencies.len()), device)?;
        let positions = Tensor::arange(0u32, time as u32, device)?
            .to_dtype(DType::F32)?
            .reshape((time, 1))?;
        let angles = positions.broadcast_mul(&frequencies)?;
        let rounded = |x: Tensor| match dtype {
            DType::F64 => (x * self.scale)?.to_dtype(DType::F64),
            _ => x * self.scale,
        };
        Ok(Angles {
            cos: rounded(angles.cos()?)?,
            sin: rounded(angles.sin()?)?,
        })
    }
}

fn plain(theta: f64, dim: usize) -> Vec<f64> {
    let frequency = |i: usize| theta.powf(-2. * i as f64 / dim as f64);
    (0..dim / 2).map(frequency).collect()
}

fn rounded(frequencies: Vec<f64>) -> Vec<f32> {
    frequencies.into_iter().map(|f| f as f32).collect()
}

/// The cosines and sines of the positions of a sequence.
pub(super) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Angles {
    /// Those of the positions from `start` on.
    pub(super) fn from(&self, start: usize) -> Result<Self> {
        let of = |x: &Tensor| x.narrow(0, start, x.dim(0)? - start)?.contiguous();
        Ok(Self {
            cos: of(&self.cos)?,
            sin: of(&self.sin)?,
        })
    }

    /// Turns queries or keys `(batch, time, heads, head_dim)`.
    pub(super) fn turn(&self, x: &Tensor) -> Result<Tensor> {
        crate::ops::rope(x, &self.cos, &self.sin)
    }
}
