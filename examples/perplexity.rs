//! Perplexity of a text under a Hugging Face checkpoint.
//!
//! `cargo run --release --example perplexity [-- --checkpoint FOLDER --data FILE ..]` reads the text in
//! windows that overlap, so that every token but the first is predicted once, from at least
//! `--length` less `--stride` tokens before it where the text has them.

mod common;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device};
use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder};
use candle_cut_cross_entropy::{Options, Reduction};
use candle_nn::VarMap;
use clap::{Parser, ValueEnum};
use common::tokens::{self, Encoder, Sequence};
use common::{files, memory};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::time::Instant;

/// Perplexity of a text under a Hugging Face checkpoint.
#[derive(Parser)]
struct Args {
    /// The folder with config.json, safetensors and tokenizer.json [default: the model of the example
    /// finetune, out/finetune/model]
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// A text file [default: the README of this crate]
    #[arg(long)]
    data: Option<PathBuf>,
    /// Tokens of a window
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Tokens from the start of a window to that of the next, less than --length [default: half of it]
    #[arg(long)]
    stride: Option<usize>,
    /// Windows at once
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[arg(long, value_enum, default_value_t = Type::F32)]
    dtype: Type,
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum On {
    Cpu,
    Cuda,
}

const FINE_TUNED: &str = "out/finetune/model";

fn main() -> Result<()> {
    memory::keep_freed();
    let line = run(Args::parse())?;
    println!("{line}");
    Ok(())
}

/// Says what the perplexity is.
fn run(args: Args) -> Result<String> {
    let (length, stride) = (args.length, args.stride.unwrap_or(args.length / 2));
    ensure!(length > 1, "--length must be at least 2, got {length}");
    ensure!(
        stride > 0 && stride < length,
        "--stride must be at least 1 and less than --length {length}, got {stride}"
    );
    ensure!(args.batch > 0, "--batch must be at least 1, got 0");
    let checkpoint = match args.checkpoint {
        Some(folder) => folder,
        None if PathBuf::from(FINE_TUNED).is_dir() => FINE_TUNED.into(),
        None => bail!(
            "no --checkpoint and no {FINE_TUNED}, which `cargo run --release --example finetune` makes"
        ),
    };
    let path = args
        .data
        .unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/README.md").into());
    let name = path.display();
    let text = files::read_text(&path)?;
    files::check_checkpoint(&checkpoint)?;
    let config = Config::from_file(checkpoint.join("config.json"))?;
    tokens::check_length(length, &config)?;
    let encoder = Encoder::load(&checkpoint, &config)?;
    let tokens = encoder
        .encode_from_begin(&text)
        .with_context(|| name.to_string())?;
    ensure!(
        tokens.len() > 1,
        "{name} is a single token, which nothing predicts"
    );
    let dtype = match args.dtype {
        Type::F32 => DType::F32,
        Type::Bf16 => DType::BF16,
    };
    let device = match args.device {
        On::Cpu => Device::Cpu,
        On::Cuda => Device::new_cuda(0).context("--device cuda")?,
    };

    let model = Decoder::load(&checkpoint, &VarMap::new(), dtype, &device)?;
    let model = model.frozen()?;
    let windows = windows(&tokens, length, stride);

    let bar = ProgressBar::new(windows.len() as u64).with_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} windows, {elapsed} of about {duration}",
    )?);
    let options = Options::default().reduction(Reduction::Sum);
    let started = Instant::now();
    let (mut sum, mut positions) = (0., 0);
    for batch in windows.chunks(args.batch) {
        let batch: Vec<&Sequence> = batch.iter().collect();
        let (ids, labels) = tokens::batch(&batch, &device)?;
        let loss = model.loss(&ids, &labels, &options)?.loss;
        sum += f64::from(loss.to_scalar::<f32>()?);
        positions += batch.iter().map(|window| window.positions()).sum::<usize>();
        bar.inc(batch.len() as u64);
    }
    bar.finish_and_clear();
    let mean = sum / positions as f64;
    ensure!(
        mean.is_finite(),
        "the mean loss of {name} under {} is {mean}",
        checkpoint.display()
    );
    Ok(format!(
        "{name} under {}: {positions} tokens predicted, mean loss {mean:.4}, perplexity {:.3}, {:.4} bits per byte, {:.0} tokens/s",
        checkpoint.display(),
        mean.exp(),
        sum / std::f64::consts::LN_2 / text.len() as f64,
        positions as f64 / started.elapsed().as_secs_f64(),
    ))
}

/// Windows of which only the tokens that are new in each count.
fn windows(tokens: &[u32], length: usize, stride: usize) -> Vec<Sequence> {
    let (mut windows, mut start, mut read) = (Vec::new(), 0, 0);
    while read < tokens.len() {
        let stop = tokens.len().min(start + length);
        windows.push(Sequence::from(tokens[start..stop].to_vec(), read - start));
        (start, read) = (start + stride, stop);
    }
    windows
}
