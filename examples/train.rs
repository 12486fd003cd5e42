//! Trains a small language model with a large vocabulary on the CPU.
//!
//! `cargo run --release --example train [-- FILE..]` reads text files (by default the sources and
//! documents of this crate), trains a BPE tokenizer and a decoder on nine tenths of them, and leaves
//! a picture of the loss. The head is tied to the token embedding, and its logits are never stored.

mod common;

use anyhow::{bail, Context, Result};
use candle_core::{Device, Tensor, Var, D};
use candle_cut_cross_entropy::{backward, LinearCrossEntropy, Options, Preset};
use candle_nn::{ops, rotary_emb, AdamW, Optimizer, ParamsAdamW};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use rand::{rngs::StdRng, seq::SliceRandom, Rng, SeedableRng};
use rand_distr::{Distribution, Normal};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::models::TrainerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
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
const ROPE_BASE: f32 = 10_000.;
const NORM_EPS: f32 = 1e-6;
const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<()> {
    let args = Args::parse();
    if args.length < 2 || args.batch == 0 || args.steps == 0 {
        bail!("--length must be at least 2, --batch and --steps at least 1");
    }
    if args.heads == 0 || args.hidden % (2 * args.heads) != 0 {
        bail!(
            "--hidden must be a multiple of twice --heads, got {} and {}",
            args.hidden,
            args.heads
        );
    }
    let started = Instant::now();
    let mut rng = StdRng::seed_from_u64(args.seed);

    let (train_text, validation_text) = split(&read_texts(&args.files)?);
    let tokenizer = train_tokenizer(&train_text, args.vocab)?;
    let train_tokens = encode(&tokenizer, &train_text)?;
    let validation = windows(&encode(&tokenizer, &validation_text)?, args.length);
    let vocab = args.vocab.max(tokenizer.get_vocab_size(true));
    if train_tokens.len() <= args.length || validation.is_empty() {
        bail!(
            "too little text: {} tokens to train on, {} sequences of {} to validate on",
            train_tokens.len(),
            validation.len(),
            args.length
        );
    }
    println!(
        "{} tokens to train on, {} to validate on, {} kinds of token, {vocab} classes",
        train_tokens.len(),
        validation.len() * args.length,
        tokenizer.get_vocab_size(true),
    );

    let mut vars = Vars::new(&mut rng);
    let model = Model::new(&args, vocab, &mut vars)?;
    let parameters = vars.all;
    let count: usize = parameters.iter().map(|v| v.elem_count()).sum();
    println!("{:.1} million parameters, {args:?}", count as f64 / 1e6);
    let head = Head::new(&args, model.embedding.as_tensor().clone());
    // Detached, so that evaluating forms no gradients.
    let frozen_head = Head::new(&args, model.embedding.detach());
    let mut optimizer = AdamW::new(
        parameters,
        ParamsAdamW {
            lr: args.learning_rate,
            weight_decay: 0.1,
            beta2: 0.98,
            ..ParamsAdamW::default()
        },
    )?;

    let evaluate = |sequences: &[Vec<u32>]| -> Result<f64> {
        let mut sum = 0.;
        for batch in sequences.chunks(args.batch) {
            let tokens = tensor(batch)?;
            let hidden = model.forward(&tokens)?.detach();
            sum +=
                frozen_head.loss(&hidden, &tokens)?.to_scalar::<f32>()? as f64 * batch.len() as f64;
        }
        Ok(sum / sequences.len() as f64)
    };
    let some_validation = &validation[..validation.len().min(8 * args.batch)];
    let eval_every = args.steps.div_ceil(10);

    let bar = ProgressBar::new(args.steps as u64).with_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} steps, {elapsed} of about {duration}, {msg}",
    )?);
    let mut train_curve = Vec::with_capacity(args.steps);
    let mut validation_curve = vec![(0, evaluate(some_validation)?)];
    let mut starts = Vec::new();
    let mut batch = Vec::new();
    for step in 0..args.steps {
        batch.clear();
        while batch.len() < args.batch {
            if starts.is_empty() {
                starts = epoch(train_tokens.len(), args.length, &mut rng);
            }
            if let Some(start) = starts.pop() {
                batch.push(train_tokens[start..start + args.length].to_vec());
            }
        }
        optimizer.set_learning_rate(args.learning_rate * schedule(step, args.steps));
        let tokens = tensor(&batch)?;
        let loss = head.loss(&model.forward(&tokens)?, &tokens)?;
        optimizer.step(&backward(&loss)?)?;
        let loss = loss.to_scalar::<f32>()? as f64;
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

    draw(&args.plot, &train_curve, &validation_curve)
        .with_context(|| format!("drawing {}", args.plot.display()))?;
    println!(
        "{:.0} s, loss curve in {}",
        started.elapsed().as_secs_f64(),
        args.plot.display()
    );
    let tokens = tensor(&batch)?;
    let hidden = model.forward(&tokens)?;
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
    fn new(args: &Args, weight: Tensor) -> Self {
        let preset = match args.loss {
            Loss::Cce | Loss::Baseline => Preset::Cce,
            Loss::CceExact => Preset::CceExact,
            Loss::Native => Preset::Native,
        };
        let options = Options::preset(preset)
            .shift(1)
            .workspace(args.workspace << 20);
        Self {
            layer: LinearCrossEntropy::new(weight, None, options),
            stored_logits: args.loss == Loss::Baseline,
        }
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
        let before = common::in_use();
        common::reset_peak();
        let loss = self.loss(&hidden, tokens)?;
        let gradients = backward(&loss)?;
        let peak = common::peak();
        let mut returned = 0;
        for tensor in [hidden.as_tensor(), self.layer.weight()] {
            let gradient = gradients.get(tensor).context("a gradient is missing")?;
            returned += gradient.elem_count() * gradient.dtype().size_in_bytes();
        }
        Ok((peak - before).saturating_sub(returned))
    }
}

/// A decoder: rotary attention and gated MLP, pre-normalised. Candle's fused forms of these layers
/// have no backward, so it is written in those that have one.
struct Model {
    embedding: Var,
    blocks: Vec<Block>,
    norm: Var,
    heads: usize,
    rope: (Tensor, Tensor),
    /// 0 where a position may look, -inf where it may not, `(length, length)`.
    mask: Tensor,
}

struct Block {
    attention_norm: Var,
    query_key_value: Var,
    attention_out: Var,
    mlp_norm: Var,
    gate_up: Var,
    down: Var,
}

impl Model {
    fn new(args: &Args, vocab: usize, vars: &mut Vars) -> Result<Self> {
        let (hidden, length) = (args.hidden, args.length);
        let deep = 0.02 / (2. * args.layers as f32).sqrt();
        let mut blocks = Vec::with_capacity(args.layers);
        for _ in 0..args.layers {
            blocks.push(Block {
                attention_norm: vars.ones(hidden)?,
                query_key_value: vars.normal(hidden, 3 * hidden, 0.02)?,
                attention_out: vars.normal(hidden, hidden, deep)?,
                mlp_norm: vars.ones(hidden)?,
                gate_up: vars.normal(hidden, 6 * hidden, 0.02)?,
                down: vars.normal(3 * hidden, hidden, deep)?,
            });
        }
        let half = hidden / args.heads / 2;
        let angles: Vec<f32> = (0..length)
            .flat_map(|t| (0..half).map(move |i| (t, i)))
            .map(|(t, i)| t as f32 * ROPE_BASE.powf(-(i as f32) / half as f32))
            .collect();
        let angles = Tensor::from_vec(angles, (length, half), &Device::Cpu)?;
        let mask: Vec<f32> = (0..length * length)
            .map(|i| match i % length <= i / length {
                true => 0.,
                false => f32::NEG_INFINITY,
            })
            .collect();
        Ok(Self {
            embedding: vars.normal(vocab, hidden, 0.02)?,
            blocks,
            norm: vars.ones(hidden)?,
            heads: args.heads,
            rope: (angles.cos()?, angles.sin()?),
            mask: Tensor::from_vec(mask, (length, length), &Device::Cpu)?,
        })
    }

    /// Tokens `(batch, time)` to hidden states `(batch, time, hidden)`.
    fn forward(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, time) = tokens.dims2()?;
        let mut x = self.embedding.index_select(&tokens.flatten_all()?, 0)?;
        for block in &self.blocks {
            let normed = ops::rms_norm_slow(&x, &block.attention_norm, NORM_EPS)?;
            let attended = self.attention(&normed.matmul(&block.query_key_value)?, batch, time)?;
            x = (x + attended.matmul(&block.attention_out)?)?;
            let normed = ops::rms_norm_slow(&x, &block.mlp_norm, NORM_EPS)?;
            let gate_up = normed.matmul(&block.gate_up)?.chunk(2, D::Minus1)?;
            x = (x + (gate_up[0].silu()? * &gate_up[1])?.matmul(&block.down)?)?;
        }
        ops::rms_norm_slow(&x, &self.norm, NORM_EPS)?.reshape((batch, time, ()))
    }

    fn attention(&self, qkv: &Tensor, batch: usize, time: usize) -> candle_core::Result<Tensor> {
        let size = qkv.dim(1)? / 3 / self.heads;
        let part = |i: usize| {
            qkv.reshape((batch, time, 3, self.heads, size))?
                .narrow(2, i, 1)?
                .squeeze(2)?
                .transpose(1, 2)?
                .contiguous()
        };
        let rotated = |i: usize| rotary_emb::rope_slow(&part(i)?, &self.rope.0, &self.rope.1);
        let scores = (rotated(0)?.matmul(&rotated(1)?.t()?)? / (size as f64).sqrt())?;
        let mask = self.mask.narrow(0, 0, time)?.narrow(1, 0, time)?;
        let weights = ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        weights
            .matmul(&part(2)?)?
            .transpose(1, 2)?
            .reshape((batch * time, ()))
    }
}

/// Makes the variables, from the seed: Candle's own random numbers on the CPU cannot be seeded.
struct Vars<'a> {
    rng: &'a mut StdRng,
    all: Vec<Var>,
}

impl<'a> Vars<'a> {
    fn new(rng: &'a mut StdRng) -> Self {
        let all = Vec::new();
        Self { rng, all }
    }

    fn normal(&mut self, rows: usize, columns: usize, std: f32) -> Result<Var> {
        let normal = Normal::new(0., std)?;
        let values: Vec<f32> = (0..rows * columns)
            .map(|_| normal.sample(self.rng))
            .collect();
        self.add(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
    }

    fn ones(&mut self, len: usize) -> Result<Var> {
        self.add(Tensor::from_vec(vec![1f32; len], len, &Device::Cpu)?)
    }

    fn add(&mut self, tensor: Tensor) -> Result<Var> {
        let var = Var::from_tensor(&tensor)?;
        self.all.push(var.clone());
        Ok(var)
    }
}

/// What the learning rate is multiplied by: a linear warm-up, then a cosine down to a tenth.
fn schedule(step: usize, steps: usize) -> f64 {
    let warm_up = steps.div_ceil(15);
    if step < warm_up {
        return (step + 1) as f64 / warm_up as f64;
    }
    let done = (step - warm_up) as f64 / (steps - warm_up) as f64;
    0.1 + 0.45 * (1. + (std::f64::consts::PI * done).cos())
}

/// Where an epoch's sequences start, shuffled: side by side from a random offset.
fn epoch(tokens: usize, length: usize, rng: &mut StdRng) -> Vec<usize> {
    let offset = rng.random_range(0..length.min(tokens - length + 1));
    let mut starts: Vec<usize> = (offset..=tokens - length).step_by(length).collect();
    starts.shuffle(rng);
    starts
}

fn windows(tokens: &[u32], length: usize) -> Vec<Vec<u32>> {
    tokens.chunks_exact(length).map(<[u32]>::to_vec).collect()
}

fn tensor(sequences: &[Vec<u32>]) -> candle_core::Result<Tensor> {
    let shape = (sequences.len(), sequences[0].len());
    Tensor::from_vec(sequences.concat(), shape, &Device::Cpu)
}

/// The texts of the files, or of this crate.
fn read_texts(files: &[PathBuf]) -> Result<Vec<String>> {
    let mut own = Vec::new();
    if files.is_empty() {
        collect_own_files(Path::new(env!("CARGO_MANIFEST_DIR")), &mut own)?;
        own.sort();
    }
    own.iter()
        .chain(files)
        .map(|path| {
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
        })
        .collect()
}

/// The sources and documents below a folder of this crate.
fn collect_own_files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" && name != "out" {
                collect_own_files(&path, found)?;
            }
        } else if matches!(&*extension, "rs" | "cu" | "cuh" | "md" | "py" | "sh")
            || name.starts_with("LICENSE")
        {
            found.push(path);
        }
    }
    Ok(())
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

/// A byte-level BPE of tokens that occur at least twice.
fn train_tokenizer(texts: &[String], vocab: usize) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    let bytes = ByteLevel::new(false, false, true);
    tokenizer
        .with_pre_tokenizer(Some(bytes))
        .with_decoder(Some(bytes));
    let mut trainer = TrainerWrapper::BpeTrainer(
        BpeTrainer::builder()
            .vocab_size(vocab)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .show_progress(false)
            .build(),
    );
    tokenizer
        .train(&mut trainer, texts.iter())
        .map_err(anyhow::Error::from_boxed)?;
    Ok(tokenizer)
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

/// The curves of (step, loss) as an SVG.
fn draw(path: &Path, train: &[(usize, f64)], validation: &[(usize, f64)]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let all = || train.iter().chain(validation).map(|&(_, loss)| loss);
    let (low, high) = (
        all().fold(f64::INFINITY, f64::min).floor(),
        all().fold(0., f64::max).ceil(),
    );
    let root = SVGBackend::new(path, (720, 400)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(52)
        .build_cartesian_2d(0..train.len(), low..high)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss")
        .light_line_style(TRANSPARENT)
        .y_label_formatter(&|loss| format!("{loss:.1}"))
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 16))
        .draw()?;
    for (name, curve, colour) in [
        ("train", train, RGBColor(31, 119, 180)),
        ("validation", validation, RGBColor(255, 127, 14)),
    ] {
        chart
            .draw_series(LineSeries::new(
                curve.iter().copied(),
                colour.stroke_width(2),
            ))?
            .label(name)
            .legend(move |(x, y)| {
                PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(2))
            });
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(16)
        .border_style(WHITE)
        .label_font(("sans-serif", 16))
        .draw()?;
    root.present()?;
    Ok(())
}
