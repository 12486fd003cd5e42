//! What the test binaries share: random cases and their tensors.
#![allow(dead_code, unused_imports)] // No binary uses all of it.

pub mod comparison;
pub mod differences;
pub mod grid;
pub mod low_rank;
pub mod ops;
pub mod reference;
pub mod shards;
pub mod soft_cases;
pub mod soft_reference;

pub use comparison::{
    check, check_against, close, gradient_close, gradient_tolerance, gradients_close, output_close,
};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::{Entropy, Filter, Options, Output, Reduction};
use half::{bf16, f16};
use reference::{Gradients, Inputs, Reduced, Reference, Tile, Upstream, CPU_TILE, CUDA_TILE};

/// SplitMix64: the same numbers on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// A sum of uniforms with mean 0 and variance 1, near enough to a normal number.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.
    }

    pub fn normals(&mut self, n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|_| self.normal() * scale).collect()
    }
}

/// The number that a tensor of this dtype holds for `x`.
pub fn round_to(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::BF16 => bf16::from_f64(x).to_f64(),
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::F32 => x as f32 as f64,
        _ => x,
    }
}

/// The threshold [`Filter::Auto`] is documented to have.
pub fn auto_threshold(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 | DType::F16 => 2f64.powi(-11),
        DType::F32 => 2f64.powi(-28),
        _ => 2f64.powi(-57),
    }
}

/// The tiles of the kernels for a device.
pub fn tile(device: &Device) -> Tile {
    match device.is_cpu() {
        true => CPU_TILE,
        false => CUDA_TILE,
    }
}

/// Inputs of a loss, the dtypes and shape their tensors have, and what is asked for beside it.
#[derive(Debug, Clone)]
pub struct Case {
    pub inputs: Inputs,
    pub dtype: DType,
    pub target_dtype: DType,
    /// The leading dimensions: the shape of the targets.
    pub lead: Vec<usize>,
    pub entropy: Entropy,
    pub predicted: bool,
}

/// The tensors of a [`Case`].
pub struct Tensors {
    pub embeddings: Var,
    pub classifier: Var,
    pub bias: Option<Var>,
    pub targets: Tensor,
    pub class_weights: Option<Tensor>,
    pub token_weights: Option<Tensor>,
}

impl Case {
    /// Random inputs with logits of about normal size, no bias, nothing ignored, reduction mean.
    pub fn random(seed: u64, dtype: DType, lead: &[usize], hidden: usize, vocab: usize) -> Self {
        let mut random = Random::new(seed);
        let rows: usize = lead.iter().product();
        let time = lead.last().copied().unwrap_or(1);
        let inputs = Inputs {
            batch: rows / time,
            time,
            hidden,
            vocab,
            embeddings: random.normals(rows * hidden, 1.),
            classifier: random.normals(vocab * hidden, 1.5 / (hidden as f64).sqrt()),
            bias: None,
            targets: (0..rows).map(|_| random.below(vocab) as i64).collect(),
            ignore_index: -100,
            softcap: None,
            logit_scale: 1.,
            label_smoothing: 0.,
            class_weights: None,
            token_weights: None,
            z_loss: 0.,
            entropy_bonus: 0.,
            shift: 0,
            reduction: Reduced::Mean,
        };
        let mut case = Self {
            inputs,
            dtype,
            target_dtype: DType::I64,
            lead: lead.to_vec(),
            entropy: Entropy::Off,
            predicted: false,
        };
        case.round();
        case
    }

    /// Rounds the inputs to the dtype. For those who changed them.
    pub fn round(&mut self) {
        let round = |values: &mut Vec<f64>| {
            for value in values {
                *value = round_to(self.dtype, *value);
            }
        };
        round(&mut self.inputs.embeddings);
        round(&mut self.inputs.classifier);
        if let Some(bias) = &mut self.inputs.bias {
            round(bias);
        }
    }

    pub fn with_bias(mut self, seed: u64) -> Self {
        self.inputs.bias = Some(Random::new(seed).normals(self.inputs.vocab, 1.));
        self.round();
        self
    }

    /// Ignores about a third of the positions.
    pub fn with_ignored(mut self, seed: u64) -> Self {
        let mut random = Random::new(seed);
        for target in &mut self.inputs.targets {
            if random.below(3) == 0 {
                *target = self.inputs.ignore_index;
            }
        }
        self
    }

    /// Whether gradients go through the entropy, so that no filter is applied.
    pub fn differentiates_entropy(&self) -> bool {
        self.entropy == Entropy::Differentiable || self.inputs.entropy_bonus != 0.
    }

    /// Some of the options that come together with all others: which ones, a seed decides.
    pub fn with_some_options(mut self, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut in_turn = || random.below(3) == 0;
        if in_turn() {
            self.inputs.logit_scale = 0.6 + (seed % 3) as f64 / 2.;
        }
        if in_turn() && self.inputs.softcap.is_none() {
            self.inputs.label_smoothing = 0.15;
        }
        let (of_classes, of_tokens) = (in_turn(), in_turn());
        if in_turn() {
            self.inputs.z_loss = 0.02;
        }
        self.entropy = match (in_turn(), in_turn()) {
            (true, _) => Entropy::Differentiable,
            (_, true) => Entropy::Value,
            _ => Entropy::Off,
        };
        self.predicted = in_turn();
        if in_turn() {
            self.inputs.entropy_bonus = [0.3, -0.2][seed as usize % 2];
        }
        if of_classes {
            self = self.with_class_weights(seed + 1);
        }
        if of_tokens {
            self = self.with_token_weights(seed + 2);
        }
        self
    }

    pub fn with_class_weights(mut self, seed: u64) -> Self {
        self.inputs.class_weights = Some(weights(seed, self.inputs.vocab));
        self
    }

    pub fn with_token_weights(mut self, seed: u64) -> Self {
        self.inputs.token_weights = Some(weights(seed, self.inputs.targets.len()));
        self
    }

    pub fn tensor(&self, values: &[f64], shape: &[usize], device: &Device) -> Result<Tensor> {
        Tensor::from_slice(values, shape, &Device::Cpu)?
            .to_dtype(self.dtype)?
            .to_device(device)
    }

    pub fn tensors(&self, device: &Device) -> Result<Tensors> {
        let Inputs { hidden, vocab, .. } = self.inputs;
        let mut shape = self.lead.clone();
        shape.push(hidden);
        let var = |values: &[f64], shape: &[usize]| {
            Var::from_tensor(&self.tensor(values, shape, device)?)
        };
        Ok(Tensors {
            embeddings: var(&self.inputs.embeddings, &shape)?,
            classifier: var(&self.inputs.classifier, &[vocab, hidden])?,
            bias: match &self.inputs.bias {
                Some(bias) => Some(var(bias, &[vocab])?),
                None => None,
            },
            targets: self.targets(device)?,
            class_weights: as_f32(&self.inputs.class_weights, &[vocab], device)?,
            token_weights: as_f32(&self.inputs.token_weights, &self.lead, device)?,
        })
    }

    fn targets(&self, device: &Device) -> Result<Tensor> {
        let targets = &self.inputs.targets;
        let shape = self.lead.as_slice();
        match self.target_dtype {
            DType::U32 => {
                let targets: Vec<u32> = targets.iter().map(|&t| t as u32).collect();
                Tensor::from_vec(targets, shape, device)
            }
            DType::I32 => {
                let targets: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
                Tensor::from_vec(targets, shape, device)
            }
            _ => Tensor::from_slice(targets, shape, device),
        }
    }

    /// These options, with what the case says of the loss itself. A z-loss that they have stays where the case has none.
    pub fn options(&self, options: Options, tensors: &Tensors) -> Options {
        let options = options
            .ignore_index(self.inputs.ignore_index)
            .softcap(self.inputs.softcap)
            .logit_scale(self.inputs.logit_scale)
            .label_smoothing(self.inputs.label_smoothing)
            .class_weights(&tensors.class_weights)
            .token_weights(&tensors.token_weights)
            .entropy(self.entropy)
            .predicted(self.predicted)
            .entropy_bonus(self.inputs.entropy_bonus)
            .shift(self.inputs.shift)
            .reduction(match self.inputs.reduction {
                Reduced::Mean => Reduction::Mean,
                Reduced::Sum => Reduction::Sum,
                Reduced::None => Reduction::None,
            });
        let options = options.bias(tensors.bias.as_deref());
        match self.inputs.z_loss {
            0. => options,
            weight => options.z_loss_weight(weight),
        }
    }

    /// The shape of the result under reduction none.
    pub fn positions(&self) -> Vec<usize> {
        let mut shape = self.lead.clone();
        if let Some(time) = shape.last_mut() {
            *time -= self.inputs.shift;
        }
        shape
    }

    /// Upstream gradients that differ from position to position, exact in f32; of the entropy, where it takes one.
    pub fn upstream(&self, seed: u64, of_loss: bool, of_lse: bool) -> Upstream {
        let mut random = Random::new(seed);
        let positions = self.positions().iter().product();
        let mut numbers = |n: usize| -> Vec<f64> {
            let numbers = (0..n).map(|_| (random.uniform() * 3. - 1.) as f32 as f64);
            numbers.collect()
        };
        let losses = match self.inputs.reduction {
            Reduced::None => positions,
            _ => 1,
        };
        Upstream {
            loss: of_loss.then(|| numbers(losses)),
            lse: of_lse.then(|| numbers(positions)),
            entropy: (self.entropy == Entropy::Differentiable).then(|| numbers(positions)),
        }
    }
}

/// Numbers that f32 holds, most of them positive and some 0.
fn weights(seed: u64, n: usize) -> Vec<f64> {
    let mut random = Random::new(seed);
    let mut weight = || match random.below(6) {
        0 => 0.,
        _ => (random.uniform() * 2. - 0.2) as f32 as f64,
    };
    (0..n).map(|_| weight()).collect()
}

fn as_f32(values: &Option<Vec<f64>>, shape: &[usize], device: &Device) -> Result<Option<Tensor>> {
    let Some(values) = values else {
        return Ok(None);
    };
    let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
    Tensor::from_vec(values, shape, device).map(Some)
}

/// The scalar whose gradients with respect to loss, lse and entropy are `upstream`.
pub fn weighted(output: &Output, upstream: &Upstream) -> Result<Tensor> {
    let times = |tensor: &Tensor, weights: &[f64]| -> Result<Tensor> {
        let weights: Vec<f32> = weights.iter().map(|&w| w as f32).collect();
        let weights = Tensor::from_vec(weights, tensor.shape(), tensor.device())?;
        (tensor * weights)?.sum_all()
    };
    let pairs = [
        (Some(&output.loss), &upstream.loss),
        (Some(&output.lse), &upstream.lse),
        (output.entropy.as_ref(), &upstream.entropy),
    ];
    let mut sum: Option<Tensor> = None;
    for (tensor, weights) in pairs {
        if let (Some(tensor), Some(weights)) = (tensor, weights) {
            let term = times(tensor, weights)?;
            sum = Some(match sum {
                Some(sum) => (sum + term)?,
                None => term,
            });
        }
    }
    match sum {
        Some(sum) => Ok(sum),
        None => candle_core::bail!("no upstream gradient"),
    }
}

/// All numbers of a tensor.
pub fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

pub fn norm(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// The reference's gradients, with what a filter that drops below `eps` may drop.
pub fn dropped(reference: &Reference, upstream: &Upstream, eps: f64) -> Gradients {
    // Rounding decides for an entry that is at the threshold.
    reference.gradients(upstream, if eps > 0. { eps * 1.02 + 2e-7 } else { 0. })
}

/// A threshold at which about half of the tiles are kept, far from the largest probability of any; where there is one
/// tile, one at which it is not. `None` where that is no threshold.
pub fn halving(reference: &Reference, tile: Tile) -> Option<f64> {
    let mut largest = reference.largest(tile);
    largest.sort_by(f64::total_cmp);
    let eps = match largest.len() {
        0 => return None,
        1 => largest[0] * 1.1 + 1e-5,
        len => {
            // The widest of the gaps in the middle half.
            let ratio = |i: &usize| largest[*i] / largest[i - 1];
            let middle = len / 4 + 1..(len * 3 / 4).max(len / 4 + 1) + 1;
            let middle = middle.filter(|i| *i < len);
            let i = middle.max_by(|a, b| ratio(a).total_cmp(&ratio(b)))?;
            (largest[i] * largest[i - 1]).sqrt()
        }
    };
    (eps < 1.).then_some(eps)
}

/// Options with nothing filtered.
pub fn exact() -> Options {
    Options::default().filter(Filter::Off)
}
