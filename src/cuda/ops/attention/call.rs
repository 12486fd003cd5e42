//! What the kernels of a call have in common.

use crate::cuda::launch::Gpu;
use crate::cuda::operands::Kind;
use crate::cuda::ops::Operand;
use crate::cuda::params::attention_problem::{AttentionParams, StrideParams};
use crate::ops::attention::sizes::Settings;
use candle_core::{Layout, Result};

/// What the kernels are named for, and their parameters but for the addresses.
pub(super) struct Call {
    pub gpu: Gpu,
    pub kind: Kind,
    pub params: AttentionParams,
}

impl Call {
    pub fn new([q, k, v]: [Operand<'_>; 3], settings: Settings) -> Result<Self> {
        let (batch, queries, heads, head_dim) = q.layout.shape().dims4()?;
        let (_, keys, key_heads, _) = k.layout.shape().dims4()?;
        let kind = q.kind()?;
        Ok(Self {
            gpu: q.gpu(),
            kind,
            params: AttentionParams {
                q_strides: strides(q.layout),
                k_strides: strides(k.layout),
                v_strides: strides(v.layout),
                batch: batch as u32,
                queries: queries as u32,
                keys: keys as u32,
                heads: heads as u32,
                group: (heads / key_heads) as u32,
                head_dim: head_dim as u32,
                causal: settings.causal.into(),
                window: settings
                    .window
                    .map_or(i32::MAX as usize, |w| w.min(i32::MAX as usize))
                    as u32,
                scale: settings.scale as f32,
                softcap: settings.softcap.unwrap_or(0.) as f32,
                ..AttentionParams::default()
            },
        })
    }
}

/// A kernel that goes through tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    Keys,
    Queries,
}

impl Pass {
    pub fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Keys => "keys",
            Pass::Queries => "queries",
        }
    }

    /// Tiles of `rows` positions, of all heads.
    pub fn tiles(self, params: &AttentionParams, rows: usize) -> usize {
        let heads = params.batch as usize * params.heads as usize;
        let (positions, heads) = match self {
            Pass::Keys => (params.keys, heads / params.group as usize),
            _ => (params.queries, heads),
        };
        (positions as usize).div_ceil(rows) * heads
    }
}

fn strides(layout: &Layout) -> StrideParams {
    let strides = layout.stride();
    StrideParams {
        batch: strides[0] as i64,
        time: strides[1] as i64,
        head: strides[2] as i64,
    }
}
