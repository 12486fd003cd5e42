//! The parts of a decoder, in operations that have a backward: those of [`crate::ops`] and Candle's products.

use super::adapter::Adapter;
use super::config::Config;
use super::linear::linear;
use super::loader::Loader;
use super::rope::Angles;
use crate::ops::{add_rms_norm, attention, geglu, rms_norm, swiglu, AttentionOptions};
use candle_core::{Result, Tensor};
use candle_nn::{Activation, Module};
use std::sync::Arc;

/// `x / rms(x) * weight` over the last dimension, in f32 for the narrower dtypes.
#[derive(Debug, Clone)]
pub(super) struct Norm {
    weight: Tensor,
    eps: f64,
    adds_one: bool,
}

impl Norm {
    pub(super) fn new(size: usize, config: &Config, loader: Loader) -> Result<Self> {
        let adds_one = config.norm_adds_one;
        Ok(Self {
            weight: loader.vector(size, "weight", if adds_one { 0. } else { 1. })?,
            eps: config.rms_norm_eps,
            adds_one,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.weight, self.eps, self.offset())
    }

    /// `x + residual` and its norm.
    fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        add_rms_norm(x, residual, &self.weight, self.eps, self.offset())
    }

    fn offset(&self) -> f64 {
        match self.adds_one {
            true => 1.,
            false => 0.,
        }
    }
}

/// `x W^T + b` for rows `x`, plus what an adapter adds.
#[derive(Debug, Clone)]
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
}

impl Linear {
    fn new(inputs: usize, outputs: usize, bias: bool, loader: Loader) -> Result<Self> {
        Ok(Self {
            weight: loader.matrix((outputs, inputs), "weight")?,
            bias: match bias {
                true => Some(loader.vector(outputs, "bias", 0.)?),
                false => None,
            },
            adapter: loader.adapter(inputs, outputs)?,
        })
    }

    fn forward(&self, x: &Tensor, dropout_seed: Option<u64>) -> Result<Tensor> {
        let y = match &self.adapter {
            None => linear(x, &self.weight)?,
            Some(adapter) => adapter.beside(&self.weight, x, dropout_seed)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// Several linear maps of one input, stored one by one or as one.
#[derive(Debug, Clone)]
enum Projections {
    Apart(Vec<Linear>),
    Fused(Linear, Vec<usize>),
}

impl Projections {
    /// `parts` are names and numbers of outputs, `fused` the name where they are stored as one.
    fn new(
        inputs: usize,
        parts: &[(&str, usize)],
        fused: Option<&str>,
        bias: bool,
        loader: &Loader,
    ) -> Result<Self> {
        if let Some(name) = fused {
            let sizes: Vec<usize> = parts.iter().map(|part| part.1).collect();
            let outputs = sizes.iter().sum();
            let linear = Linear::new(inputs, outputs, bias, loader.pp(name))?;
            return Ok(Projections::Fused(linear, sizes));
        }
        let linears = parts
            .iter()
            .map(|&(name, outputs)| Linear::new(inputs, outputs, bias, loader.pp(name)))
            .collect::<Result<_>>()?;
        Ok(Projections::Apart(linears))
    }

    fn forward(&self, x: &Tensor, dropout_seed: Option<u64>) -> Result<Vec<Tensor>> {
        match self {
            Projections::Apart(linears) => {
                let outputs = linears.iter().map(|l| l.forward(x, dropout_seed));
                outputs.collect()
            }
            Projections::Fused(linear, sizes) => {
                let y = linear.forward(x, dropout_seed)?;
                let mut start = 0;
                let mut parts = Vec::with_capacity(sizes.len());
                for &size in sizes {
                    parts.push(y.narrow(1, start, size)?);
                    start += size;
                }
                Ok(parts)
            }
        }
    }
}

/// Rows that are sequences of one length: the angles of their positions, `None` where nothing is turned, and how many
/// positions up to itself one sees, `None` for all.
pub(super) struct Positions {
    pub batch: usize,
    pub time: usize,
    pub angles: Option<Angles>,
    pub window: Option<usize>,
}

/// The keys and values of the positions before, `(batch, time, heads, head_dim)`; `None` before the first.
pub(super) type Past = Option<(Tensor, Tensor)>;

/// Those of all positions, which are remembered.
fn extended(past: &mut Past, key: Tensor, value: Tensor) -> Result<(Tensor, Tensor)> {
    let (key, value) = match past.take() {
        None => (key, value),
        Some((keys, values)) => (
            Tensor::cat(&[&keys, &key], 1)?,
            Tensor::cat(&[&values, &value], 1)?,
        ),
    };
    *past = Some((key.detach(), value.detach()));
    Ok((key, value))
}

/// What the layers of one kind share in a forward.
pub(super) struct Shared {
    /// What the rows are, one part after the other.
    pub parts: Vec<Arc<Positions>>,
    /// From which the numbers follow that adapters drop.
    pub dropout_seed: Option<u64>,
}

#[derive(Debug, Clone)]
struct Attention {
    query_key_value: Projections,
    output: Linear,
    query_and_key_norms: Option<(Norm, Norm)>,
    heads: usize,
    head_dim: usize,
    scale: f64,
    softcap: Option<f64>,
}

impl Attention {
    fn new(config: &Config, loader: Loader) -> Result<Self> {
        let (heads, key_value_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let head_dim = config.head_dim;
        let norm = |name| Norm::new(head_dim, config, loader.pp(name));
        Ok(Self {
            query_key_value: Projections::new(
                config.hidden_size,
                &[
                    ("q_proj", heads * head_dim),
                    ("k_proj", key_value_heads * head_dim),
                    ("v_proj", key_value_heads * head_dim),
                ],
                config.fused_projections.then_some("qkv_proj"),
                config.query_key_value_bias,
                &loader,
            )?,
            output: Linear::new(
                heads * head_dim,
                config.hidden_size,
                config.attention_output_bias,
                loader.pp("o_proj"),
            )?,
            query_and_key_norms: match config.norm_queries_and_keys {
                true => Some((norm("q_norm")?, norm("k_norm")?)),
                false => None,
            },
            heads,
            head_dim,
            scale: config.attention_scale,
            softcap: config.attention_softcap,
        })
    }

    /// Rows `(rows, hidden)` to the same. With a past they are one part, what comes after it.
    fn forward(&self, x: &Tensor, shared: &Shared, past: Option<&mut Past>) -> Result<Tensor> {
        let qkv = self.query_key_value.forward(x, shared.dropout_seed)?;
        let attended = match shared.parts.as_slice() {
            [positions] => self.attend(&qkv, positions, past)?,
            parts => {
                let (mut start, mut attended) = (0, Vec::with_capacity(parts.len()));
                for positions in parts {
                    let rows = positions.batch * positions.time;
                    let part = qkv.iter().map(|x| x.narrow(0, start, rows));
                    let part = part.collect::<Result<Vec<_>>>()?;
                    attended.push(self.attend(&part, positions, None)?);
                    start += rows;
                }
                Tensor::cat(&attended, 0)?
            }
        };
        self.output.forward(&attended, shared.dropout_seed)
    }

    /// Rows `(batch * time, ..)` of queries, keys and values to what each position makes of the values.
    fn attend(
        &self,
        qkv: &[Tensor],
        positions: &Positions,
        past: Option<&mut Past>,
    ) -> Result<Tensor> {
        let &Positions {
            batch,
            time,
            window,
            ..
        } = positions;
        let (mut query, mut key) = (self.split(&qkv[0], batch)?, self.split(&qkv[1], batch)?);
        let value = self.split(&qkv[2], batch)?;
        if let Some((query_norm, key_norm)) = &self.query_and_key_norms {
            query = query_norm.forward(&query)?;
            key = key_norm.forward(&key)?;
        }
        if let Some(angles) = &positions.angles {
            (query, key) = (angles.turn(&query)?, angles.turn(&key)?);
        }
        let (key, value) = match past {
            Some(past) => extended(past, key, value)?,
            None => (key, value),
        };
        let options = AttentionOptions {
            causal: true,
            scale: Some(self.scale),
            softcap: self.softcap,
            window,
        };
        attention(&query, &key, &value, &options)?
            .reshape((batch * time, self.heads * self.head_dim))
    }

    /// Rows to `(batch, time, heads, head_dim)`.
    fn split(&self, x: &Tensor, batch: usize) -> Result<Tensor> {
        let (rows, columns) = x.dims2()?;
        let heads = columns / self.head_dim;
        x.reshape((batch, rows / batch, heads, self.head_dim))
    }
}

/// `down(activation(gate(x)) * up(x))`.
#[derive(Debug, Clone)]
struct Mlp {
    gate_up: Projections,
    down: Linear,
    activation: Activation,
}

impl Mlp {
    fn new(config: &Config, loader: Loader) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_up: Projections::new(
                hidden,
                &[("gate_proj", inner), ("up_proj", inner)],
                config.fused_projections.then_some("gate_up_proj"),
                config.mlp_bias,
                &loader,
            )?,
            down: Linear::new(inner, hidden, config.mlp_bias, loader.pp("down_proj"))?,
            activation: config.activation,
        })
    }

    fn forward(&self, x: &Tensor, dropout_seed: Option<u64>) -> Result<Tensor> {
        let gate_up = self.gate_up.forward(x, dropout_seed)?;
        let (gate, up) = (&gate_up[0], &gate_up[1]);
        let inner = match self.activation {
            Activation::Silu | Activation::Swish => swiglu(gate, up)?,
            Activation::NewGelu | Activation::GeluPytorchTanh => geglu(gate, up)?,
            other => (other.forward(gate)? * up)?,
        };
        self.down.forward(&inner, dropout_seed)
    }
}

/// A layer: attention and MLP, each normalised before, in Gemma 2 and 3 also after, in Granite scaled.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    attention_norm: Norm,
    attention: Attention,
    attended_norm: Option<Norm>,
    mlp_norm: Norm,
    mlp: Mlp,
    output_norm: Option<Norm>,
    scale: Option<f64>,
}

impl Layer {
    pub(super) fn new(config: &Config, loader: Loader) -> Result<Self> {
        let norm = |name| Norm::new(config.hidden_size, config, loader.pp(name));
        // The name post_attention_layernorm stands for two things.
        let (attended_norm, mlp_norm, output_norm) = match config.norm_outputs {
            true => (
                Some(norm("post_attention_layernorm")?),
                norm("pre_feedforward_layernorm")?,
                Some(norm("post_feedforward_layernorm")?),
            ),
            false => (None, norm("post_attention_layernorm")?, None),
        };
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            attention: Attention::new(config, loader.pp("self_attn"))?,
            attended_norm,
            mlp_norm,
            mlp: Mlp::new(config, loader.pp("mlp"))?,
            output_norm,
            scale: config.residual_scale,
        })
    }

    /// Rows `(rows, hidden)` to the same, after a past where there is one.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        shared: &Shared,
        past: Option<&mut Past>,
    ) -> Result<Tensor> {
        let added = |norm: &Option<Norm>, y: Tensor| -> Result<Tensor> {
            let y = match norm {
                Some(norm) => norm.forward(&y)?,
                None => y,
            };
            match self.scale {
                Some(scale) => y * scale,
                None => Ok(y),
            }
        };
        let normed = self.attention_norm.forward(x)?;
        let attended = self.attention.forward(&normed, shared, past)?;
        let attended = added(&self.attended_norm, attended)?;
        let (x, normed) = self.mlp_norm.forward_sum(&attended, x)?;
        let y = self.mlp.forward(&normed, shared.dropout_seed)?;
        &x + added(&self.output_norm, y)?
    }
}
