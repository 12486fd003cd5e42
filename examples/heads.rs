//! The head of a real model on a real text, for `bench --inputs`: what the made-up heads of `bench --data` imitate.
//!
//! `cargo run --release --example heads -- --checkpoint FOLDER --data TEXT --output HEAD.safetensors` runs a Hugging Face
//! checkpoint (the example `gguf` makes one of a GGUF) over the beginning of the text, in sequences of `--length` tokens,
//! and writes `embeddings` `(N, D)`, the states after the last norm that the head multiplies, `classifier` `(V, D)`, and
//! `targets` `(N)` i64, the tokens that come next.
//!
//! `--cut ROWS,BLOCKS,DIMS` writes a small head for tests instead, see [`cut`].

mod common;
mod cut;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_cut_cross_entropy::models::{CausalLm, Decoder};
use candle_cut_cross_entropy::{linear_cross_entropy, Options};
use candle_nn::VarMap;
use clap::{Parser, ValueEnum};
use common::tokens::Encoder;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashMap;
use std::path::PathBuf;
use std::str::FromStr;

/// Write the head of a real model on a real text, for bench --inputs.
#[derive(Parser)]
struct Args {
    /// The folder with config.json, safetensors and tokenizer.json
    #[arg(long)]
    checkpoint: PathBuf,
    /// A text file
    #[arg(long)]
    data: PathBuf,
    /// The safetensors file to write
    #[arg(long)]
    output: PathBuf,
    /// Positions
    #[arg(long, default_value_t = 8192)]
    rows: usize,
    /// Tokens of a sequence; the last may be shorter
    #[arg(long, default_value_t = 1024)]
    length: usize,
    /// ROWS,BLOCKS,DIMS: a small head like the whole one, of so many blocks of 128 classes, for tests
    #[arg(long)]
    cut: Option<cut::Sizes>,
    /// What is written; the model runs in f32
    #[arg(long, value_enum, default_value_t = Type::Bf16)]
    dtype: Type,
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    Bf16,
    F32,
}

#[derive(Clone, Copy, ValueEnum)]
enum On {
    Cpu,
    Cuda,
}

/// Embeddings `(N, D)` and a classifier `(V, D)` in f32, and the targets.
struct Head {
    embeddings: Tensor,
    classifier: Tensor,
    targets: Vec<i64>,
    softcap: Option<f64>,
}

impl Head {
    /// The mean loss.
    fn loss(&self) -> Result<f32> {
        let targets = Tensor::new(self.targets.as_slice(), self.embeddings.device())?;
        let options = match self.softcap {
            Some(softcap) => Options::default().softcap(softcap),
            None => Options::default(),
        };
        let output = linear_cross_entropy(&self.embeddings, &self.classifier, &targets, &options)?;
        Ok(output.loss.to_scalar()?)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (rows, length) = (args.rows, args.length);
    ensure!(
        length > 0 && rows > 0,
        "--rows and --length must be at least 1, got {rows} and {length}"
    );
    let device = match args.device {
        On::Cpu => Device::Cpu,
        On::Cuda => Device::new_cuda(0).context("--device cuda")?,
    };
    let name = args.data.display();
    let text = std::fs::read_to_string(&args.data).with_context(|| format!("reading {name}"))?;

    let model = Decoder::load(&args.checkpoint, &VarMap::new(), DType::F32, &device)?.frozen()?;
    let encoder = Encoder::load(&args.checkpoint, model.config())?;
    let tokens = encoder
        .encode_from_begin(&text)
        .with_context(|| name.to_string())?;
    ensure!(
        tokens.len() > rows,
        "{name} has {} tokens, --rows {rows} needs {}",
        tokens.len(),
        rows + 1
    );
    let bar =
        ProgressBar::new(rows.div_ceil(length) as u64).with_style(ProgressStyle::with_template(
            "{bar:40} {pos}/{len} sequences, {elapsed} of about {duration}",
        )?);
    let mut embeddings = Vec::new();
    for sequence in tokens[..rows].chunks(length) {
        let ids = Tensor::new(sequence, &device)?.unsqueeze(0)?;
        embeddings.push(model.hidden_states(&ids)?.squeeze(0)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let whole = Head {
        embeddings: Tensor::cat(&embeddings, 0)?,
        classifier: model.head_weight()?,
        targets: tokens[1..=rows].iter().map(|&id| id.into()).collect(),
        softcap: model.softcap(),
    };
    if let Some(softcap) = whole.softcap {
        ensure!(
            args.cut.is_none(),
            "--cut is of heads without a softcap, the model has {softcap}"
        );
        println!("the model has a softcap: bench needs --softcap {softcap}");
    }
    describe("the head", &whole)?;
    let head = match args.cut {
        None => whole,
        Some(sizes) => {
            let (head, lost) = cut::cut(&whole, sizes)?;
            println!(
                "the cut's logits differ by {:.1}% from the head's",
                100. * lost
            );
            describe("the cut", &head)?;
            head
        }
    };
    let dtype = match args.dtype {
        Type::Bf16 => DType::BF16,
        Type::F32 => DType::F32,
    };
    let write = |tensor: &Tensor| tensor.to_dtype(dtype)?.to_device(&Device::Cpu);
    let tensors = HashMap::from([
        ("embeddings", write(&head.embeddings)?),
        ("classifier", write(&head.classifier)?),
        ("targets", Tensor::new(head.targets, &Device::Cpu)?),
    ]);
    candle_core::safetensors::save(&tensors, &args.output)
        .with_context(|| format!("writing {}", args.output.display()))?;
    println!("{} in {dtype:?}", args.output.display());
    Ok(())
}

fn describe(what: &str, head: &Head) -> Result<()> {
    let ((n, d), v) = (head.embeddings.dims2()?, head.classifier.dim(0)?);
    println!(
        "{what}: N = {n}, D = {d}, V = {v}, mean loss {:.4}",
        head.loss()?
    );
    Ok(())
}

impl FromStr for cut::Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sizes: Result<Vec<usize>, _> = text.split(',').map(str::parse).collect();
        match sizes.as_deref() {
            Ok(&[rows, blocks, dims]) if rows > 0 && blocks > 0 && dims > 0 => {
                Ok(Self { rows, blocks, dims })
            }
            _ => Err(format!("expected ROWS,BLOCKS,DIMS, got {text}")),
        }
    }
}
