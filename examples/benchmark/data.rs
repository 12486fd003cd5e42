//! The inputs of the benchmark: random ones, or a file's, such as those of a real head.
//!
//! The random ones have the losses of fresh and trained heads, not their shape: a row has a few likely tokens above noise,
//! where a real model's has a long tail, in other tiles.

use anyhow::{bail, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_cut_cross_entropy::soft_targets::TopK;
use clap::ValueEnum;
use rand::{rngs::StdRng, Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::path::Path;
use std::str::FromStr;

pub struct Inputs {
    /// `(N, D)`
    pub embeddings: Tensor,
    /// `(V, D)`
    pub classifier: Tensor,
    /// `(N)`, i64
    pub targets: Tensor,
}

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    n: usize,
    d: usize,
    v: usize,
}

/// The heads of models: name, hidden size, vocabulary.
const MODELS: [(&str, usize, usize); 7] = [
    ("gemma2-2b", 2304, 256_000),
    ("gemma2-9b", 3584, 256_000),
    ("llama3-8b", 4096, 128_256),
    ("mistral-nemo", 5120, 131_072),
    ("phi3.5-mini", 3072, 32_064),
    ("qwen2.5-7b", 3584, 152_064),
    ("qwen2.5-0.5b", 896, 151_936),
];
const MODEL_ROWS: usize = 8192;

impl FromStr for Shape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(&(_, d, v)) = MODELS.iter().find(|(name, ..)| *name == text) {
            return Ok(Self {
                n: MODEL_ROWS,
                d,
                v,
            });
        }
        let sizes: Vec<usize> = text.split(',').filter_map(|s| s.parse().ok()).collect();
        match sizes[..] {
            [n, d, v] if n > 0 && d > 0 && v > 0 && text.split(',').count() == 3 => {
                Ok(Self { n, d, v })
            }
            _ => bail!(
                "expected N,D,V or one of {}, got {text}",
                MODELS.map(|(name, ..)| name).join(", ")
            ),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Data {
    /// A head as initialised: logits of standard deviation 0.02 sqrt(D)
    Flat,
    /// Made up, with the loss of a fine-tuned head: about 1.1
    Peaked,
    /// Made up, with the loss of a head in mid-pretraining: about 2.3
    Broad,
}

/// A made-up trained head: each row has a few likely tokens, drawn by a Zipf law; their logits fall with the
/// logarithm of their rank in the row.
struct Head {
    likely: usize,
    zipf: f64,
    slope: f64,
}

/// The logit of a row's likeliest token.
const TOP: f64 = 17.;

impl Data {
    pub fn name(self) -> &'static str {
        match self {
            Data::Flat => "flat",
            Data::Peaked => "peaked",
            Data::Broad => "broad",
        }
    }

    fn head(self) -> Option<Head> {
        let (likely, zipf, slope) = match self {
            Data::Flat => return None,
            Data::Peaked => (24, 1.2, 2.5),
            Data::Broad => (48, 1.0, 1.8),
        };
        Some(Head {
            likely,
            zipf,
            slope,
        })
    }
}

/// What random numbers are for: each purpose has its own, whatever the order they are asked in.
#[derive(Clone, Copy)]
enum Purpose {
    Embeddings,
    Classifier,
    Bias,
    Targets,
    Ids,
    Likely,
    Teacher,
}

fn rng(seed: u64, purpose: Purpose, block: usize) -> StdRng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&(purpose as u64).to_le_bytes());
    bytes[16..24].copy_from_slice(&(block as u64).to_le_bytes());
    StdRng::from_seed(bytes)
}

/// Normally distributed numbers, the same on every device and with any number of threads.
fn normal(
    shape: &[usize],
    std: f32,
    dtype: DType,
    (seed, purpose): (u64, Purpose),
    device: &Device,
) -> Result<Tensor> {
    let mut values = vec![0f32; shape.iter().product()];
    values
        .par_chunks_mut(1 << 16)
        .enumerate()
        .for_each(|(block, values)| {
            let mut rng = rng(seed, purpose, block);
            for value in values {
                let sample: f32 = StandardNormal.sample(&mut rng);
                *value = sample * std;
            }
        });
    let values = Tensor::from_vec(values, shape, &Device::Cpu)?;
    Ok(values.to_dtype(dtype)?.to_device(device)?)
}

/// A bias `(V)` of small random numbers.
pub fn bias(v: usize, dtype: DType, seed: u64, device: &Device) -> Result<Tensor> {
    normal(&[v], 0.1, dtype, (seed, Purpose::Bias), device)
}

/// A teacher that names `k` classes of `v` at each of `n` positions, no matter which: of all there are, that no row of the
/// classifier is in a cache. The `i`-th has a share of `1 / i`, all together 0.9.
pub fn teacher(n: usize, v: usize, k: usize, seed: u64, device: &Device) -> Result<TopK> {
    let mut rng = rng(seed, Purpose::Teacher, 0);
    let classes = (0..n).flat_map(|_| rand::seq::index::sample(&mut rng, v, k).into_vec());
    let classes: Vec<u32> = classes.map(|class| class as u32).collect();
    let sum: f32 = (1..=k).map(|i| 1. / i as f32).sum();
    let shares: Vec<f32> = (1..=k).map(|i| 0.9 / sum / i as f32).collect();
    let classes = Tensor::from_vec(classes, (n, k), device)?;
    let shares = Tensor::from_vec(shares, k, device)?.broadcast_as((n, k))?;
    Ok(TopK::new(&classes, &shares.contiguous()?))
}

/// Random inputs of this kind.
pub fn make(data: Data, shape: Shape, dtype: DType, seed: u64, device: &Device) -> Result<Inputs> {
    let Shape { n, d, v } = shape;
    let std = if data == Data::Flat { 0.02 } else { 1. };
    let classifier = normal(&[v, d], std, dtype, (seed, Purpose::Classifier), device)?;
    let (embeddings, targets) = match data.head() {
        None => {
            let mut rng = rng(seed, Purpose::Targets, 0);
            let targets = (0..n).map(|_| rng.random_range(0..v as i64)).collect();
            let embeddings = normal(&[n, d], 1., dtype, (seed, Purpose::Embeddings), device)?;
            (embeddings, targets)
        }
        Some(head) => trained(&head, n, &classifier, seed)?,
    };
    Ok(Inputs {
        embeddings,
        classifier,
        targets: Tensor::from_vec(targets, n, device)?,
    })
}

/// Rows whose likely tokens have the logits of `head`: a row is the sum of its likely tokens' classes
/// (nearly orthogonal, of length sqrt(D)), weighted with logit / D. The targets are drawn among them.
fn trained(head: &Head, n: usize, classifier: &Tensor, seed: u64) -> Result<(Tensor, Vec<i64>)> {
    let (v, d) = classifier.dims2()?;
    let ids = ids_by_frequency(v, seed);
    let mut total = 0.;
    let cumulated: Vec<f64> = (1..=v)
        .map(|rank| {
            total += (rank as f64).powf(-head.zipf);
            total
        })
        .collect();
    let levels: Vec<f64> = (1..=head.likely)
        .map(|rank| TOP - head.slope * (rank as f64).ln())
        .collect();

    let mut rng = rng(seed, Purpose::Likely, 0);
    // One list for each of the likely tokens, an entry a row: what to add to the rows at once.
    let mut tokens = vec![vec![0u32; n]; head.likely];
    let mut weights = vec![vec![0f32; n]; head.likely];
    let mut targets = Vec::with_capacity(n);
    for row in 0..n {
        let mut seen = Vec::with_capacity(head.likely);
        let mut mass = Vec::with_capacity(head.likely);
        for (j, level) in levels.iter().enumerate() {
            let drawn = rng.random_range(0. ..total);
            let rank = cumulated.partition_point(|&c| c < drawn).min(v - 1);
            let token = ids[rank];
            tokens[j][row] = token;
            if !seen.contains(&token) {
                seen.push(token);
                mass.push((level - levels[0]).exp());
                weights[j][row] = (level / d as f64) as f32;
            }
        }
        let mut left = rng.random_range(0. ..mass.iter().sum());
        let pick = mass.iter().position(|m| {
            left -= m;
            left < 0.
        });
        targets.push(seen[pick.unwrap_or(0)] as i64);
    }

    let device = classifier.device();
    let mut embeddings = Tensor::zeros((n, d), DType::F32, device)?;
    for (tokens, weights) in tokens.into_iter().zip(weights) {
        let rows = classifier.index_select(&Tensor::from_vec(tokens, n, device)?, 0)?;
        let weights = Tensor::from_vec(weights, (n, 1), device)?;
        embeddings = (embeddings + rows.to_dtype(DType::F32)?.broadcast_mul(&weights)?)?;
    }
    Ok((embeddings.to_dtype(classifier.dtype())?, targets))
}

/// The token of each frequency rank. Ids are only roughly in order of frequency, as those of BPE are.
fn ids_by_frequency(v: usize, seed: u64) -> Vec<u32> {
    let mut rng = rng(seed, Purpose::Ids, 0);
    let noisy: Vec<f64> = (1..=v)
        .map(|rank| {
            let noise: f64 = StandardNormal.sample(&mut rng);
            (rank as f64).ln() + noise
        })
        .collect();
    let mut order: Vec<usize> = (0..v).collect();
    order.sort_by(|&a, &b| noisy[a].total_cmp(&noisy[b]));
    let mut ids = vec![0; v];
    for (id, rank) in order.into_iter().enumerate() {
        ids[rank] = id as u32;
    }
    ids
}

/// The tensors of a file, converted where another dtype is asked for.
pub fn load(path: &Path, dtype: Option<DType>, device: &Device) -> Result<Inputs> {
    let mut tensors = candle_core::safetensors::load(path, device)
        .with_context(|| format!("reading {}", path.display()))?;
    let mut take = |name: &str| {
        tensors
            .remove(name)
            .with_context(|| format!("{} has no tensor {name:?}", path.display()))
    };
    let (embeddings, classifier) = (take("embeddings")?, take("classifier")?);
    let dtype = dtype.unwrap_or(embeddings.dtype());
    let hidden = embeddings.dim(candle_core::D::Minus1)?;
    Ok(Inputs {
        embeddings: embeddings.reshape(((), hidden))?.to_dtype(dtype)?,
        classifier: classifier.to_dtype(dtype)?,
        targets: take("targets")?.flatten_all()?,
    })
}
