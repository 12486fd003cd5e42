//! Perplexity of a text under a Hugging Face checkpoint.
//!
//! `cargo run --release --example perplexity [-- --checkpoint FOLDER --data FILE ..]` reads the text in
//! windows that overlap, so that every token but the first is predicted once, from at least
//! `--length` less `--stride` tokens before it where the text has them.

mod common;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device};
use candle_cut_cross_entropy::models::{Config, Decoder};
use candle_cut_cross_entropy::Options;
use candle_nn::VarMap;
use clap::{Parser, ValueEnum};
use common::tokens::{self, Batch, Encoder, Sequence};
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
    /// A folder with adapters of the checkpoint, as finetune and peft write them [default of --checkpoint then: the
    /// model that they name]
    #[arg(long)]
    adapter: Option<PathBuf>,
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
    let checkpoint = match (args.checkpoint, &args.adapter) {
        (Some(folder), _) => folder,
        (None, Some(adapter)) => files::base_of_adapter(adapter)?,
        (None, None) if PathBuf::from(FINE_TUNED).is_dir() => FINE_TUNED.into(),
        (None, None) => bail!(
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
    let model = match &args.adapter {
        Some(adapter) => model.load_adapters(adapter, &VarMap::new())?.frozen()?,
        None => model.frozen()?,
    };
    let whose = match &args.adapter {
        Some(adapter) => format!("{} with {}", checkpoint.display(), adapter.display()),
        None => checkpoint.display().to_string(),
    };
    let windows = windows(&tokens, length, stride);

    let bar = ProgressBar::new(windows.len() as u64).with_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} windows, {elapsed} of about {duration}",
    )?);
    let started = Instant::now();
    let (mut sum, mut positions) = (0., 0);
    for batch in windows.chunks(args.batch) {
        let batch: Vec<&Sequence> = batch.iter().collect();
        let loss = Batch::padded(&batch, &device)?.summed_loss(&model, &Options::default())?;
        sum += f64::from(loss.to_scalar::<f32>()?);
        positions += batch.iter().map(|window| window.positions()).sum::<usize>();
        bar.inc(batch.len() as u64);
    }
    bar.finish_and_clear();
    let mean = sum / positions as f64;
    ensure!(
        mean.is_finite(),
        "the mean loss of {name} under {whose} is {mean}"
    );
    Ok(format!(
        "{name} under {whose}: {positions} tokens predicted, mean loss {mean:.4}, perplexity {:.4}, {:.4} bits per byte, {:.0} tokens/s",
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

#[cfg(test)]
mod tests {
    use super::*;
    use common::fixture::{checkpoint, Folder, TEXT};
    use std::fs;

    /// Of a text under a tiny checkpoint, with these arguments after the usual ones.
    fn perplexity(folder: &Folder, arguments: &[&str]) -> Result<String> {
        let name = |name: &str| folder.0.join(name).to_string_lossy().into_owned();
        let usual = ["--checkpoint", &name("base"), "--data", &name("text.txt")];
        let all = ["perplexity"].iter().chain(&usual).chain(arguments);
        run(Args::try_parse_from(all)?)
    }

    fn place(name: &str) -> Folder {
        let folder = Folder::new(name);
        checkpoint(&folder.0.join("base"));
        folder.write("text.txt", TEXT.repeat(8));
        folder
    }

    #[test]
    fn each_token_is_predicted_once_after_one_that_begins_the_text() {
        let folder = place("perplexity");
        let first = |line: String| line.split(", mean").next().unwrap().to_owned();
        let whole = ["--length", "64", "--stride", "32"];
        let line = perplexity(&folder, &whole).unwrap();
        let count = first(line.clone());
        // `<s>` is there once, whoever wrote it, and a mark of the encoding is no text.
        folder.write("text.txt", format!("\u{feff}<s>{}", TEXT.repeat(8)));
        let marked = perplexity(&folder, &whole).unwrap();
        assert_eq!(count, first(marked.clone()));
        let loss = |line: &str| line.split("mean loss ").nth(1).unwrap()[..6].to_owned();
        assert_eq!(loss(&line), loss(&marked));
        let short = first(perplexity(&folder, &["--length", "8"]).unwrap());
        assert_eq!(count, short);
    }

    #[test]
    fn what_cannot_be_right_is_an_error() {
        let folder = place("perplexity-errors");
        let error =
            |arguments: &[&str]| format!("{:#}", perplexity(&folder, arguments).unwrap_err());
        for (arguments, said) in [
            (["--length", "65"], "max_position_embeddings, 64"),
            (["--length", "1"], "--length must be at least 2"),
            (["--stride", "0"], "--stride"),
            (["--batch", "0"], "--batch"),
        ] {
            assert!(error(&arguments).contains(said), "{}", error(&arguments));
        }
        let length = ["--length", "32"];
        folder.write(
            "base/model.safetensors",
            "version https://git-lfs.github.com/spec/v1\n",
        );
        assert!(error(&length).contains("git-lfs pointer"));
        let weights = folder.0.join("base/model.safetensors");
        fs::rename(&weights, folder.0.join("base/pytorch_model.bin")).unwrap();
        assert!(error(&length).contains("it has pytorch_model.bin"));
    }

    #[test]
    fn weights_that_are_not_numbers_are_an_error() {
        let folder = place("perplexity-nan");
        let weights = folder.0.join("base/model.safetensors");
        let tensors = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap();
        let tensors = tensors
            .into_iter()
            .map(|(name, t)| (name, (t * f64::NAN).unwrap()));
        candle_core::safetensors::save(&tensors.collect(), &weights).unwrap();
        let error = perplexity(&folder, &["--length", "32"]).unwrap_err();
        assert!(error.to_string().contains("is NaN"), "{error}");
    }

    #[test]
    fn adapters_count_and_name_their_base() {
        use candle_cut_cross_entropy::models::Lora;
        let folder = place("perplexity-adapter");
        let name = |name: &str| folder.0.join(name).to_string_lossy().into_owned();
        let (base, vars) = (name("base"), VarMap::new());
        let model = Decoder::load(&base, &VarMap::new(), DType::F32, &Device::Cpu).unwrap();
        let model = model.with_lora(&Lora::default(), &vars).unwrap();
        for var in vars.all_vars() {
            var.set(&(var.ones_like().unwrap() * 0.02).unwrap())
                .unwrap();
        }
        model.save_adapters(name("adapter")).unwrap();
        model.save(name("merged")).unwrap();
        fs::copy(name("base/tokenizer.json"), name("merged/tokenizer.json")).unwrap();
        let perplexity = |arguments: &[&str]| {
            let usual = ["perplexity", "--data", &name("text.txt"), "--length", "32"];
            let args = Args::try_parse_from(usual.iter().chain(arguments)).unwrap();
            run(args).map(|line| {
                line.split("perplexity ")
                    .nth(1)
                    .unwrap()
                    .split(',')
                    .next()
                    .unwrap()
                    .to_owned()
            })
        };
        let adapter = name("adapter");
        let with = perplexity(&["--adapter", &adapter]).unwrap();
        assert_eq!(
            with,
            perplexity(&["--checkpoint", &name("merged")]).unwrap()
        );
        assert_eq!(
            with,
            perplexity(&["--checkpoint", &base, "--adapter", &adapter]).unwrap()
        );
        assert_ne!(with, perplexity(&["--checkpoint", &base]).unwrap());
        let config = folder.0.join("adapter/adapter_config.json");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace(&base, "hub/name")).unwrap();
        let error = perplexity(&["--adapter", &adapter])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("hub/name, which is no folder here"),
            "{error}"
        );
    }
}
