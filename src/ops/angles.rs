//! The angles of rotary embedding.

use super::wide;
use candle_core::{bail, Result, Tensor};

pub(crate) const NAME: &str = "rope";

/// Cosines and sines `(time, pairs)`, contiguous, f32 or for f64 f64, and the direction of the turn.
#[derive(Debug, Clone)]
pub(crate) struct Angles {
    pub cos: Tensor,
    pub sin: Tensor,
    pub back: bool,
}

impl Angles {
    pub fn new(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Self> {
        match (x.dims(), cos.dims()) {
            (&[_, time, _, head_dim], &[positions, pairs])
                if time == positions
                    && pairs > 0
                    && 2 * pairs <= head_dim
                    && sin.dims() == cos.dims() => {}
            _ => bail!(
                "{NAME}: expected x (batch, time, heads, head_dim), cos and sin (time, P) with 2 P <= head_dim, got {:?}, {:?} and {:?}",
                x.dims(),
                cos.dims(),
                sin.dims()
            ),
        }
        let fit = |what: &str, angles: &Tensor| {
            if !angles.dtype().is_float() {
                bail!(
                    "{NAME}: expected {what} in bf16, f16, f32 or f64, got {:?}",
                    angles.dtype()
                )
            }
            if !angles.device().same_device(x.device()) {
                bail!(
                    "{NAME}: {what} is on {:?}, x on {:?}",
                    angles.device().location(),
                    x.device().location()
                )
            }
            angles.detach().to_dtype(wide(x.dtype()))?.contiguous()
        };
        Ok(Self {
            cos: fit("cos", cos)?,
            sin: fit("sin", sin)?,
            back: false,
        })
    }
}
