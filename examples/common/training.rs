//! New weights, the order of the data, and the learning rate.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_cut_cross_entropy::models::{Config, Decoder};
use candle_nn::{VarBuilder, VarMap};
use clap::ValueEnum;
use rand::{rngs::StdRng, seq::SliceRandom, SeedableRng};
use rand_distr::{Distribution, Normal};
use serde::Serialize;

/// A decoder with new weights in f32 on the CPU, and its variables. The seed determines them; those
/// that Candle draws on the CPU cannot be seeded.
pub fn new_decoder(config: &str, seed: u64) -> Result<(Decoder, VarMap)> {
    let config = Config::from_json(config)?;
    let deviation = config.initializer_range as f32;
    // What a layer adds to the hidden state is smaller the more layers add to it, as in GPT-2.
    let deep = deviation / (2. * config.layers.len() as f32).sqrt();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let decoder = Decoder::new(config, vb)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let named = vars.data().lock().expect("no panic before");
    for (name, tensor) in decoder.tensors().iter().filter(|(_, t)| t.rank() == 2) {
        let adds = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let normal = Normal::new(0., if adds { deep } else { deviation })?;
        let values: Vec<f32> = (0..tensor.elem_count())
            .map(|_| normal.sample(&mut rng))
            .collect();
        named[name].set(&Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?)?;
    }
    drop(named);
    Ok((decoder, vars))
}

/// Which `size` of `count` sequences a step takes. Every epoch has all of them in an order of its own,
/// which follows from the seed alone: a run can go on from any step.
pub fn batch_indices(step: usize, size: usize, count: usize, seed: u64) -> Vec<usize> {
    let first = step * size;
    let order = |epoch: usize| {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&(epoch as u64).to_le_bytes());
        let mut order: Vec<usize> = (0..count).collect();
        order.shuffle(&mut StdRng::from_seed(key));
        order
    };
    (first / count..)
        .flat_map(order)
        .skip(first % count)
        .take(size)
        .collect()
}

/// How the learning rate goes on after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// A cosine down to a tenth
    Cosine,
    /// A line down to a tenth
    Linear,
    Constant,
}

impl Schedule {
    /// What the learning rate is multiplied by: a linear warm-up, then this.
    pub fn factor(self, step: usize, steps: usize, warm_up: usize) -> f64 {
        if step < warm_up {
            return (step + 1) as f64 / warm_up as f64;
        }
        let done = (step - warm_up) as f64 / steps.saturating_sub(warm_up).max(1) as f64;
        match self {
            Self::Cosine => 0.1 + 0.45 * (1. + (std::f64::consts::PI * done).cos()),
            Self::Linear => 1. - 0.9 * done,
            Self::Constant => 1.,
        }
    }
}
