//! Trains a small language model with a large vocabulary on the CPU.
//!
//! `cargo run --release --example train [-- FILE..]` reads text files (by default the sources and
//! documents of this crate), trains a BPE tokenizer and a decoder on nine tenths of them, and leaves
//! a picture of the loss. The head is tied to the token embedding, and its logits are never stored.

mod common;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{Device, Tensor, Var};
use candle_cut_cross_entropy::models::{AdamW, CausalLm, Decoder};
use candle_cut_cross_entropy::{backward, LinearCrossEntropy, Options, Preset};
use candle_nn::{Optimizer, ParamsAdamW};
use clap::{Parser, ValueEnum};
use common::{corpus, files, memory, plot, training};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::time::Instant;
use tokenizers::Tokenizer;

/// Train a small language model with a large vocabulary on the CPU.
#[derive(Parser, Debug)]
struct Args {
    /// Text files to train on [default: the sources and documents of this crate]
    files: Vec<PathBuf>,
    /// The loss: this crate's presets, or Candle's own on stored logits
    #[arg(long, value_enum, default_value_t = Loss::Cce)]
    loss: Loss,
    /// Classes of the head; the tokenizer makes as many of them as the text gives
    #[arg(long, default_value_t = 16384)]
    vocab: usize,
    #[arg(long, default_value_t = 150)]
    steps: usize,
    /// Sequences a step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens a sequence
    #[arg(long, default_value_t = 128)]
    length: usize,
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    #[arg(long, default_value_t = 2)]
    layers: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f64,
    /// Workspace of the loss in MiB
    #[arg(long, default_value_t = 8)]
    workspace: usize,
    /// Same seed, same numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where the loss curve goes
    #[arg(long, default_value = "out/loss.svg")]
    plot: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Loss {
    Cce,
    CceExact,
    Native,
    Baseline,
}

/// One section of the text in this many is held out for validation.
const HELD_OUT: usize = 10;
/// Characters a section has at least; it ends at a line's end.
const SECTION: usize = 2000;
const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<()> {
    memory::keep_freed();
    run(Args::parse())
}

fn run(args: Args) -> Result<()> {
    if args.length < 2 || args.batch == 0 || args.steps == 0 {
        bail!("--length must be at least 2, --batch and --steps at least 1");
    }
    if !args.hidden.is_multiple_of((2 * args.heads).max(1)) {
        bail!(
            "--hidden must be a multiple of twice --heads, got {} and {}",
            args.hidden,
            args.heads
        );
    }
    for (name, value) in [
        ("heads", args.heads),
        ("hidden", args.hidden),
        ("layers", args.layers),
        ("vocab", args.vocab),
        ("workspace", args.workspace),
    ] {
        ensure!(value > 0, "--{name} must be at least 1, got 0");
    }
    ensure!(
        args.learning_rate > 0. && args.learning_rate.is_finite(),
        "--learning-rate must be positive and finite, got {}",
        args.learning_rate
    );
    for file in corpus::sources(&args.files)? {
        files::check_kept("the text", &file, &[&args.plot])?;
    }
    files::check_file(&args.plot)?;
    let started = Instant::now();

    let (train_text, validation_text) = split(&corpus::read_texts(&args.files)?);
    let tokenizer = corpus::train_tokenizer(&train_text, args.vocab)?;
    let train = encode(&tokenizer, &train_text)?;
    let validation = encode(&tokenizer, &validation_text)?;
    let train: Vec<&[u32]> = train.chunks_exact(args.length).collect();
    let validation: Vec<&[u32]> = validation.chunks_exact(args.length).collect();
    let vocab = args.vocab.max(tokenizer.get_vocab_size(true));
    if train.is_empty() || validation.is_empty() {
        bail!(
            "too little text: {} sequences to train on, {} to validate on, of {} tokens",
            train.len(),
            validation.len(),
            args.length
        );
    }
    println!(
        "{} tokens to train on, {} to validate on, {} kinds of token, {vocab} classes",
        train.len() * args.length,
        validation.len() * args.length,
        tokenizer.get_vocab_size(true),
    );

    let config = serde_json::json!({
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "tie_word_embeddings": true,
    });
    let (model, vars) = training::new_decoder(&config.to_string(), args.seed)?;
    let count: usize = model.tensors().values().map(Tensor::elem_count).sum();
    println!("{:.1} million parameters, {args:?}", count as f64 / 1e6);
    let head = Head::new(&args, &model)?;
    let frozen = model.frozen()?;
    let frozen_head = Head::new(&args, &frozen)?;
    let mut optimizer = AdamW::from_varmap(
        &vars,
        ParamsAdamW {
            lr: args.learning_rate,
            weight_decay: 0.1,
            beta2: 0.98,
            ..ParamsAdamW::default()
        },
    )?;

    let evaluate = |sequences: &[&[u32]]| -> Result<f64> {
        let mut sum = 0.;
        for batch in sequences.chunks(args.batch) {
            let tokens = tensor(batch)?;
            let loss = frozen_head.loss(&frozen.hidden_states(&tokens)?, &tokens)?;
            sum += loss.to_scalar::<f32>()? as f64 * batch.len() as f64;
        }
        ensure!(
            sum.is_finite(),
            "the validation loss is {sum}; try a lower --learning-rate"
        );
        Ok(sum / sequences.len() as f64)
    };
    let some_validation = &validation[..validation.len().min(8 * args.batch)];
    let eval_every = args.steps.div_ceil(10);

    let bar = ProgressBar::new(args.steps as u64).with_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} steps, {elapsed} of about {duration}, {msg}",
    )?);
    let mut train_curve = Vec::with_capacity(args.steps);
    let mut validation_curve = vec![(0, evaluate(some_validation)?)];
    let batch = |step: usize| {
        let indices = training::batch_indices(step, args.batch, train.len(), args.seed);
        tensor(&indices.iter().map(|&i| train[i]).collect::<Vec<_>>())
    };
    let (schedule, warm_up) = (training::Schedule::Cosine, args.steps.div_ceil(15));
    for step in 0..args.steps {
        optimizer
            .set_learning_rate(args.learning_rate * schedule.factor(step, args.steps, warm_up));
        let tokens = batch(step)?;
        let loss = head.loss(&model.hidden_states(&tokens)?, &tokens)?;
        optimizer.step(&backward(&loss)?)?;
        let loss = loss.to_scalar::<f32>()? as f64;
        ensure!(
            loss.is_finite(),
            "step {}: the loss is {loss}; try a lower --learning-rate",
            step + 1
        );
        train_curve.push((step + 1, loss));
        bar.inc(1);
        bar.set_message(format!("train loss {loss:.3}"));
        if (step + 1) % eval_every == 0 && step + 1 < args.steps {
            let validation_loss = evaluate(some_validation)?;
            validation_curve.push((step + 1, validation_loss));
            bar.suspend(|| {
                println!(
                    "step {:4}  train loss {loss:.4}  validation loss {validation_loss:.4}",
                    step + 1
                )
            });
        }
    }
    bar.finish_and_clear();
    let validation_loss = evaluate(&validation)?;
    validation_curve.push((args.steps, validation_loss));
    println!(
        "step {:4}  validation loss {validation_loss:.4} on all of the held-out text",
        args.steps
    );

    plot::draw(&args.plot, &train_curve, &validation_curve)
        .with_context(|| format!("drawing {}", args.plot.display()))?;
    println!(
        "{:.0} s, loss curve in {}",
        started.elapsed().as_secs_f64(),
        args.plot.display()
    );
    let tokens = batch(args.steps - 1)?;
    let hidden = model.hidden_states(&tokens)?;
    // How far the threads' buffers overlap differs from run to run.
    let mut loss_memory = 0;
    for _ in 0..5 {
        loss_memory = loss_memory.max(head.memory(&hidden, &tokens)?);
    }
    let loss_memory = loss_memory as f64 / MIB;
    let logits = (args.batch * (args.length - 1) * vocab * size_of::<f32>()) as f64 / MIB;
    let last = &train_curve[args.steps - args.steps.div_ceil(10)..];
    println!(
        "train loss {:.3} -> {:.3}, validation perplexity {:.1}, peak memory of the loss {loss_memory:.0} MiB (logits would be {logits:.0} MiB)",
        train_curve[0].1,
        last.iter().map(|(_, loss)| loss).sum::<f64>() / last.len() as f64,
        validation_loss.exp(),
    );
    Ok(())
}

/// The head and the loss on it.
struct Head {
    layer: LinearCrossEntropy,
    stored_logits: bool,
}

impl Head {
    fn new(args: &Args, model: &Decoder) -> Result<Self> {
        let preset = match args.loss {
            Loss::Cce | Loss::Baseline => Preset::Cce,
            Loss::CceExact => Preset::CceExact,
            Loss::Native => Preset::Native,
        };
        let options = Options::preset(preset).workspace(args.workspace.saturating_mul(1 << 20));
        Ok(Self {
            layer: model.head(&options)?,
            stored_logits: args.loss == Loss::Baseline,
        })
    }

    /// The mean loss of predicting each token from those before it.
    fn loss(&self, hidden: &Tensor, tokens: &Tensor) -> candle_core::Result<Tensor> {
        if !self.stored_logits {
            return Ok(self.layer.forward(hidden, tokens)?.loss);
        }
        let steps = tokens.dim(1)? - 1;
        let hidden = hidden.narrow(1, 0, steps)?.flatten_to(1)?;
        let targets = tokens.narrow(1, 1, steps)?.flatten_all()?;
        candle_nn::loss::cross_entropy(&self.layer.logits(&hidden)?, &targets)
    }

    /// The most bytes that this loss and its backward have in use, over what they are given and the
    /// gradients that they return.
    fn memory(&self, hidden: &Tensor, tokens: &Tensor) -> Result<usize> {
        let hidden = Var::from_tensor(&hidden.detach().contiguous()?)?;
        let before = memory::in_use();
        memory::reset_peak();
        let loss = self.loss(&hidden, tokens)?;
        let gradients = backward(&loss)?;
        let peak = memory::peak();
        let mut returned = 0;
        for tensor in [hidden.as_tensor(), self.layer.weight()] {
            let gradient = gradients.get(tensor).context("a gradient is missing")?;
            returned += gradient.elem_count() * gradient.dtype().size_in_bytes();
        }
        Ok((peak - before).saturating_sub(returned))
    }
}

fn tensor(sequences: &[&[u32]]) -> candle_core::Result<Tensor> {
    let shape = (sequences.len(), sequences[0].len());
    Tensor::from_vec(sequences.concat(), shape, &Device::Cpu)
}

/// The sections to train on and those to validate on.
fn split(texts: &[String]) -> (Vec<String>, Vec<String>) {
    let mut sections = Vec::new();
    for text in texts {
        let mut section = String::new();
        for line in text.split_inclusive('\n') {
            section.push_str(line);
            if section.len() >= SECTION {
                sections.push(std::mem::take(&mut section));
            }
        }
        sections.push(section);
    }
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (i, section) in sections.into_iter().enumerate() {
        match i % HELD_OUT == HELD_OUT / 2 {
            true => validation.push(section),
            false => train.push(section),
        }
    }
    (train, validation)
}

fn encode(tokenizer: &Tokenizer, texts: &[String]) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    for text in texts {
        let encoding = tokenizer
            .encode(text.as_str(), false)
            .map_err(anyhow::Error::from_boxed)?;
        tokens.extend_from_slice(encoding.get_ids());
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::fixture::{Folder, TEXT};

    const TINY: &str =
        "--vocab=300 --steps=2 --batch=2 --length=16 --hidden=16 --layers=1 --heads=2";

    fn train(file: &std::path::Path, plot: &std::path::Path, more: &str) -> Result<()> {
        let given = more.split('=').next().filter(|name| !name.is_empty());
        let usual = TINY
            .split(' ')
            .filter(|word| !given.is_some_and(|name| word.starts_with(name)));
        let words = ["train"]
            .into_iter()
            .chain(usual)
            .chain(more.split_whitespace());
        let (file, plot) = (file.to_str().unwrap(), plot.to_str().unwrap());
        run(Args::try_parse_from(words.chain([file, "--plot", plot]))?)
    }

    #[test]
    fn the_text_is_not_drawn_over() {
        let folder = Folder::new("train");
        let text = format!("{TEXT}\n").repeat(800);
        let file = folder.write("text.txt", &text);
        let error = train(
            &file,
            &folder.0.join("../").join(&folder.0).join("text.txt"),
            "",
        );
        let error = error.unwrap_err().to_string();
        assert!(error.contains("would be written over"), "{error}");
        let link = folder.0.join("loss.svg");
        std::fs::hard_link(&file, &link).unwrap();
        train(&file, &link, "").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
        assert!(std::fs::read_to_string(&link).unwrap().starts_with("<svg"));
    }

    #[test]
    fn what_cannot_be_right_is_an_error() {
        let folder = Folder::new("train-errors");
        let file = folder.write("text.txt", format!("{TEXT}\n").repeat(800));
        for (arguments, said) in [
            (
                "--learning-rate=nan",
                "--learning-rate must be positive and finite, got NaN",
            ),
            ("--learning-rate=1e30", "lower --learning-rate"),
            ("--hidden=0", "--hidden must be at least 1"),
            (
                "--hidden=18",
                "--hidden must be a multiple of twice --heads",
            ),
            ("--layers=0", "--layers must be at least 1"),
        ] {
            let error = train(&file, &folder.0.join("loss.svg"), arguments).unwrap_err();
            assert!(error.to_string().contains(said), "{arguments}: {error}");
        }
        let error = train(&file, &file.join("loss.svg"), "").unwrap_err();
        assert!(
            error.to_string().contains("cannot write")
                || format!("{error:#}").contains("Not a directory"),
            "{error:#}"
        );
    }
}
