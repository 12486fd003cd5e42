//! CLIP's loss: which text goes with which image, and the other way round.
//!
//! `cargo run --release --example contrastive`
//!
//! Both are made from the same hidden factors, by maps that nobody tells the two encoders. A batch of `B` pairs is a
//! classifier of `B` classes whose rows are the other side's embeddings: its `B x B` logits are never stored, so the
//! batch can be as large as the encoders allow.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_cut_cross_entropy::{linear_cross_entropy, Options};
use candle_nn::{linear, AdamW, Linear, Module, Optimizer, VarBuilder, VarMap};
use clap::Parser;

/// Learn which of two kinds of vectors belong together.
#[derive(Parser, Debug)]
struct Args {
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Pairs of a batch
    #[arg(long, default_value_t = 512)]
    batch: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
}

/// Sizes of the factors, of what is seen of them, and of the embeddings.
const FACTORS: usize = 16;
const IMAGE: usize = 96;
const TEXT: usize = 48;
const EMBEDDING: usize = 32;

/// The world: how factors look, and how they are told of.
struct World {
    image: Tensor,
    text: Tensor,
}

impl World {
    fn new(device: &Device) -> Result<Self> {
        let map = |to| Tensor::randn(0f32, 1., (FACTORS, to), device);
        Ok(Self {
            image: map(IMAGE)?,
            text: map(TEXT)?,
        })
    }

    fn pairs(&self, count: usize) -> Result<(Tensor, Tensor)> {
        let factors = Tensor::randn(0f32, 1., (count, FACTORS), self.image.device())?;
        let noisy = |seen: Tensor| -> Result<Tensor> {
            Ok((seen.tanh()? + (seen.randn_like(0., 1.)? * 0.1)?)?)
        };
        Ok((
            noisy(factors.matmul(&self.image)?)?,
            noisy(factors.matmul(&self.text)?)?,
        ))
    }
}

/// A perceptron with one hidden layer, its result of length 1.
struct Encoder {
    first: Linear,
    second: Linear,
}

impl Encoder {
    fn new(from: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            first: linear(from, 128, vb.pp("first"))?,
            second: linear(128, EMBEDDING, vb.pp("second"))?,
        })
    }

    fn embed(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.second.forward(&self.first.forward(x)?.gelu()?)?;
        let length = (y.sqr()?.sum_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
        Ok(y.broadcast_div(&length)?)
    }
}

/// The share of rows whose nearest row on the other side is their own.
fn accuracy(images: &Tensor, texts: &Tensor) -> Result<f32> {
    let nearest = images.matmul(&texts.t()?)?.argmax(D::Minus1)?;
    let own = Tensor::arange(0, images.dim(0)? as u32, images.device())?;
    let hits = nearest.eq(&own)?.to_dtype(DType::F32)?;
    Ok(hits.mean_all()?.to_scalar()?)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Device::Cpu;
    let world = World::new(&device)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let images = Encoder::new(IMAGE, vb.pp("image"))?;
    let texts = Encoder::new(TEXT, vb.pp("text"))?;
    // CLIP learns the inverse temperature too, from 1 / 0.07 on.
    let log_scale = Var::new((1f32 / 0.07).ln(), &device)?;
    let mut all = vars.all_vars();
    all.push(log_scale.clone());
    let mut optimizer = AdamW::new_lr(all, args.lr)?;

    let (seen, told) = world.pairs(1000)?;
    let held_out = || accuracy(&images.embed(&seen)?, &texts.embed(&told)?);
    let before = held_out()?;
    println!(
        "before: of 1000 new images, {:.1}% find their text",
        before * 100.
    );
    let own = Tensor::arange(0, args.batch as i64, &device)?;
    let options = Options::default();
    for step in 1..=args.steps {
        let (image, text) = world.pairs(args.batch)?;
        let scale = log_scale.exp()?;
        let image = images.embed(&image)?.broadcast_mul(&scale)?;
        let text = texts.embed(&text)?;
        let to_text = linear_cross_entropy(&image, &text, &own, &options)?.loss;
        let to_image = linear_cross_entropy(&text, &image, &own, &options)?.loss;
        let loss = ((to_text + to_image)? / 2.)?;
        optimizer.step(&loss.backward()?)?;
        if step % 40 == 0 || step == 1 {
            println!("step {step}: loss {:.3}", loss.to_scalar::<f32>()?);
        }
    }
    let after = held_out()?;
    println!("after: {:.1}%", after * 100.);
    anyhow::ensure!(
        after > before + 0.1,
        "nothing was learnt: {before} before, {after} after"
    );
    Ok(())
}
