//! Fine-tunes a Hugging Face checkpoint.
//!
//! `cargo run --release --example finetune [-- --checkpoint FOLDER --data FILE ..]` trains the decoder in a
//! folder (`config.json`, safetensors, `tokenizer.json`) on instructions or on plain text. Without a
//! checkpoint it makes a small one with random weights, without data it takes the sources and documents of
//! this crate, so that it runs as it is. Killed at any point, it goes on with `--resume`: on a CPU to the
//! same bits as without the interruption.

mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/corpus.rs"]
mod corpus;
mod data;
#[allow(dead_code)] // all of it is used by `bench`
#[path = "../common/meter.rs"]
mod meter;
#[path = "../common/plot.rs"]
mod plot;
#[path = "../common/tokens.rs"]
mod tokens;
#[path = "../common/training.rs"]
mod training;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_cut_cross_entropy::models::{
    clip_gradients, generate, Accumulator, AdamW, CausalLm, Decoder, Lora, Sampling,
};
use candle_cut_cross_entropy::{backward, Options, Preset, Reduction};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use checkpoints::{Checkpoint, State};
use clap::{Parser, ValueEnum};
use data::Data;
use indicatif::{ProgressBar, ProgressStyle};
use rand::{rngs::StdRng, Rng, SeedableRng};
use serde::Serialize;
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokenizers::AddedToken;
use tokens::{Encoder, Sequence, IGNORED};

/// Fine-tune a Hugging Face checkpoint.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    run: Run,
    /// Where the fine-tuned checkpoint (model), the checkpoints of the run (step-N) and the loss curve go
    #[arg(long, default_value = "out/finetune")]
    output: PathBuf,
    /// Steps from one checkpoint of the run to the next; the newest is kept
    #[arg(long, default_value_t = 50)]
    save_every: usize,
    /// Go on from the newest checkpoint in the output folder, from the start where there is none
    #[arg(long)]
    resume: bool,
}

/// The arguments that determine a run.
#[derive(clap::Args, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Run {
    /// The folder with config.json, safetensors and tokenizer.json; without safetensors random weights are
    /// trained from the start [default: a small one with random weights, made in the output folder]
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// What to learn from [default: the sources and documents of this crate]
    ///
    /// A .jsonl file has one JSON object a line: `instruction`, `output` and, where there is one, `input`;
    /// or `text`. Of instructions only the output is learnt, after the prompt
    ///
    ///     ### Instruction:
    ///     {instruction}
    ///
    ///     ### Input:
    ///     {input}
    ///
    ///     ### Response:
    ///
    /// without the input's part where it is empty. The checkpoint's first end token ends every record;
    /// longer records are cut. Any other file is plain text, cut into sequences side by side.
    #[arg(long, verbatim_doc_comment)]
    data: Option<PathBuf>,
    /// The share of the data that is held out for validation
    #[arg(long, default_value_t = 0.05)]
    validation: f64,
    /// This crate's presets, or Candle's own loss on stored logits (baseline)
    #[arg(long, value_enum, default_value_t = Loss::Cce)]
    loss: Loss,
    /// In place of the loss's own filter: off, auto, a threshold such as 0.001, or drop:0.000244 as the reference
    #[arg(long)]
    filter: Option<String>,
    /// Of the model; the optimizer's weights are f32
    #[arg(long, value_enum, default_value_t = Type::F32)]
    dtype: Type,
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
    #[arg(long, default_value_t = 120)]
    steps: usize,
    /// Sequences that are in memory at once
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Batches whose gradients are added up for a step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// The most tokens of a sequence
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// The highest, after a warm-up and before a cosine down to a tenth [default: 1e-5; 2e-4 with --lora;
    /// 4e-3 without --checkpoint]
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Train adapters of this rank on all projections and nothing else; they go into the output folder
    /// (adapter), and merged into the model
    #[arg(long)]
    lora: Option<usize>,
    /// Compute the layers again in the backward: less memory, about a quarter more time
    #[arg(long)]
    gradient_checkpointing: bool,
    /// The largest norm of all gradients together
    #[arg(long, default_value_t = 1.)]
    clip: f64,
    /// Steps from one validation to the next [default: a fifth of --steps]
    #[arg(long)]
    validate_every: Option<usize>,
    /// Same seed, same numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Loss {
    Cce,
    CceKahanFullC,
    Exact,
    Native,
    Baseline,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Type {
    F32,
    Bf16,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum On {
    Cpu,
    Cuda,
}

/// Sizes of the checkpoint that is made where none is given.
const VOCAB: usize = 4096;
const HIDDEN: usize = 128;
/// What ends a text there.
const END: &str = "<|endoftext|>";
/// Files beside the weights that a fine-tuned checkpoint takes along.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];
const NEW_TOKENS: usize = 48;
const MIB: f64 = (1 << 20) as f64;

impl Run {
    fn check(&self) -> Result<()> {
        for (name, value, least) in [
            ("steps", self.steps, 1),
            ("batch", self.batch, 1),
            ("accumulate", self.accumulate, 1),
            ("length", self.length, 2),
            ("validate-every", self.validate_every(), 1),
        ] {
            ensure!(
                value >= least,
                "--{name} must be at least {least}, got {value}"
            );
        }
        for (name, value) in [
            ("learning-rate", self.learning_rate()),
            ("clip", self.clip),
            ("validation", self.validation),
        ] {
            ensure!(value > 0., "--{name} must be positive, got {value}");
        }
        ensure!(
            self.validation < 1.,
            "--validation must be less than 1, got {}",
            self.validation
        );
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        let default = match (&self.checkpoint, self.lora) {
            (None, _) => 4e-3,
            (Some(_), Some(_)) => 2e-4,
            (Some(_), None) => 1e-5,
        };
        self.learning_rate.unwrap_or(default)
    }

    fn validate_every(&self) -> usize {
        self.validate_every.unwrap_or(self.steps.div_ceil(5))
    }

    fn dtype(&self) -> DType {
        match self.dtype {
            Type::F32 => DType::F32,
            Type::Bf16 => DType::BF16,
        }
    }

    fn device(&self) -> Result<Device> {
        Ok(match self.device {
            On::Cpu => Device::Cpu,
            On::Cuda => Device::new_cuda(0).context("--device cuda")?,
        })
    }

    fn as_map(&self) -> Result<Map<String, Value>> {
        match serde_json::to_value(self)? {
            Value::Object(map) => Ok(map),
            other => bail!("arguments serialize as {other}"),
        }
    }
}

fn main() -> Result<()> {
    let Args {
        run,
        output,
        save_every,
        resume,
    } = Args::parse();
    run.check()?;
    ensure!(save_every > 0, "--save-every must be at least 1, got 0");
    let device = run.device()?;
    let arguments = run.as_map()?;

    let saved = match Checkpoint::newest(&output)? {
        Some(saved) if resume => {
            saved.check_run(&arguments)?;
            Some(saved)
        }
        Some(saved) if saved.state.run.get("steps") != Some(&json!(saved.state.step)) => bail!(
            "{} is of a run that was interrupted: go on with --resume, remove it, or choose another --output",
            saved.folder.display()
        ),
        _ => None,
    };
    let data = Data::read(run.data.as_deref())?;
    if saved.is_none() {
        checkpoints::clear(&output, None)?;
    }
    let initial = output.join("initial");
    let base = match &run.checkpoint {
        Some(folder) if has_weights(folder) => folder.clone(),
        _ => initial,
    };
    if saved.is_none() {
        match &run.checkpoint {
            None => new_checkpoint(&base, &data.texts(), &run)?,
            Some(folder) if base != *folder => random_checkpoint(&base, folder, run.seed)?,
            Some(_) => {}
        }
    }

    let meter = meter::Meter::new(&device)?;
    meter.start()?;
    let (model, vars) = load(&run, &base, saved.as_ref(), &device)?;
    let frozen = model.frozen()?;
    let config = model.config();
    let encoder = Encoder::load(&base, config)?;
    let end = config.eos_token_ids.first().copied();
    if let Some(end) = end.filter(|&end| end as usize >= config.vocab_size) {
        bail!(
            "{}: eos_token_id {end} is beyond the vocab_size {}",
            base.join("config.json").display(),
            config.vocab_size
        )
    }
    let (sequences, cut) = data.sequences(&encoder, end, run.length)?;
    let fingerprint = data::fingerprint(&sequences);
    let (train, validation) = data.hold_out(sequences, run.validation, run.seed)?;
    let total = |sequences: &[Sequence]| sequences.iter().map(Sequence::positions).sum::<usize>();
    println!(
        "{} sequences with {} tokens to learn, {} with {} to validate on, {cut} cut to {} tokens",
        train.len(),
        total(&train),
        validation.len(),
        total(&validation),
        run.length
    );

    let mut optimizer = AdamW::from_varmap(&vars, ParamsAdamW::default())?;
    let mut state = match saved {
        Some(saved) => {
            ensure!(
                saved.state.data == fingerprint,
                "the data of --data, or its tokens, are others than in {}",
                saved.folder.display()
            );
            saved.load_optimizer(&mut optimizer)?;
            println!("going on from {}", saved.folder.display());
            saved.state
        }
        None => State {
            step: 0,
            run: arguments,
            data: fingerprint,
            train: Vec::new(),
            validation: vec![(0, evaluate(&frozen, &run, &validation)?)],
        },
    };
    let before = state.validation[0].1.exp();
    let count: usize = model.tensors().values().map(Tensor::elem_count).sum();
    let trained: usize = vars.all_vars().iter().map(|var| var.elem_count()).sum();
    println!(
        "{:.1} million parameters, {:.1} million of them trained, validation perplexity before {before:.2}",
        count as f64 / 1e6,
        trained as f64 / 1e6
    );

    // Their order decides the rounding of the norm.
    let variables: Vec<_> = by_name(&vars).into_values().collect();
    let mut accumulator = Accumulator::new(variables.clone());
    let bar = ProgressBar::new(run.steps as u64).with_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} steps, {elapsed} of about {duration}, {msg}",
    )?);
    bar.set_position(state.step as u64);
    let (mut tokens, mut time) = (0, Duration::ZERO);
    while state.step < run.steps {
        let started = Instant::now();
        let size = run.batch * run.accumulate;
        let indices = training::batch_indices(state.step, size, train.len(), run.seed);
        let sequences: Vec<&Sequence> = indices.into_iter().map(|i| &train[i]).collect();
        let positions = sequences.iter().map(|s| s.positions()).sum::<usize>() as f64;
        let mut sum = 0.;
        for batch in sequences.chunks(run.batch) {
            let loss = summed_loss(&model, &run, batch)?;
            accumulator.add(backward(&loss)?)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
        }
        let mut gradients = accumulator.take(1. / positions)?.context("no gradients")?;
        let norm = clip_gradients(&mut gradients, &variables, run.clip)?;
        let loss = sum / positions;
        let factor = training::schedule(state.step, run.steps);
        state.step += 1;
        ensure!(
            loss.is_finite() && norm.is_finite(),
            "step {}: loss {loss}, norm of the gradients {norm}; try a lower --learning-rate",
            state.step
        );
        optimizer.set_learning_rate(run.learning_rate() * factor);
        optimizer.step(&gradients)?;
        state.train.push((state.step, loss));
        tokens += sequences.iter().map(|s| s.ids.len()).sum::<usize>();
        time += started.elapsed();
        bar.inc(1);
        bar.set_message(format!(
            "loss {loss:.3}, {:.0} tokens/s",
            tokens as f64 / time.as_secs_f64()
        ));

        let last = state.step == run.steps;
        if state.step % run.validate_every() == 0 || last {
            let validation_loss = evaluate(&frozen, &run, &validation)?;
            state.validation.push((state.step, validation_loss));
            bar.suspend(|| {
                println!(
                    "step {:4}  loss {loss:.4}  validation perplexity {:.2}  {:.0} tokens/s",
                    state.step,
                    validation_loss.exp(),
                    tokens as f64 / time.as_secs_f64()
                )
            });
        }
        if state.step % save_every == 0 || last {
            checkpoints::save(&output, &state, &model, run.lora.is_some(), &optimizer)?;
        }
    }
    bar.finish_and_clear();

    let peak = meter.peak()?;
    let folder = output.join("model");
    model.save(&folder)?;
    if run.lora.is_some() {
        model.save_adapters(output.join("adapter"))?;
    }
    copy_tokenizer(&base, &folder)?;
    let picture = output.join("loss.svg");
    plot::draw(&picture, &state.train, &state.validation)
        .with_context(|| format!("drawing {}", picture.display()))?;
    show(&frozen, &encoder, &validation[0])?;
    println!(
        "fine-tuned model in {}, loss curve in {}",
        folder.display(),
        picture.display()
    );
    println!(
        "peak memory {:.0} MiB, {:.0} tokens/s",
        peak as f64 / MIB,
        tokens as f64 / time.as_secs_f64()
    );
    println!(
        "train loss {:.6} -> {:.6}, validation perplexity {before:.2} -> {:.2}",
        state.train[0].1,
        state.train[run.steps - 1].1,
        state.validation[state.validation.len() - 1].1.exp()
    );
    Ok(())
}

/// The decoder, at the start of the run or where it was saved, and what of it is trained.
fn load(
    run: &Run,
    base: &Path,
    saved: Option<&Checkpoint>,
    device: &Device,
) -> Result<(Decoder, VarMap)> {
    let mut vars = VarMap::new();
    let weights = match (saved, run.lora) {
        (Some(saved), None) => &saved.folder,
        _ => base,
    };
    let mut model = Decoder::load(weights, &vars, run.dtype(), device)?;
    if let Some(rank) = run.lora {
        vars = VarMap::new();
        let lora = Lora {
            rank,
            ..Lora::default()
        };
        model = model.with_lora(&lora, &vars)?;
        match saved {
            Some(saved) => vars.load(saved.adapters())?,
            None => seed_adapters(&vars, run.seed)?,
        }
    }
    model.set_gradient_checkpointing(run.gradient_checkpointing);
    Ok((model, vars))
}

/// Gives new adapters values that follow from the seed: those that Candle draws on the CPU do not.
fn seed_adapters(vars: &VarMap, seed: u64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    for (name, var) in by_name(vars) {
        if name.ends_with("lora_A.weight") {
            let bound = 1. / (var.dim(1)? as f32).sqrt();
            let values = (0..var.elem_count()).map(|_| rng.random_range(-bound..bound));
            let values = Tensor::from_iter(values, &Device::Cpu)?.reshape(var.shape())?;
            var.set(&values.to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
    }
    Ok(())
}

/// The variables in the order of their names: that of the map differs from run to run.
fn by_name(vars: &VarMap) -> BTreeMap<String, Var> {
    let vars = vars.data().lock().expect("no panic before");
    vars.clone().into_iter().collect()
}

/// The sum of the losses of all positions that count.
fn summed_loss(model: &Decoder, run: &Run, sequences: &[&Sequence]) -> Result<Tensor> {
    let loss = run.loss;
    let (ids, labels) = tokens::batch(sequences, model.device())?;
    let preset = match loss {
        Loss::Cce => Preset::Cce,
        Loss::CceKahanFullC => Preset::CceKahanFullC,
        Loss::Exact => Preset::CceExact,
        Loss::Native => Preset::Native,
        Loss::Baseline => return stored_logits_loss(model, &ids, &labels),
    };
    let mut options = Options::preset(preset).reduction(Reduction::Sum);
    if let Some(filter) = &run.filter {
        options = options.filter(filter.parse()?);
    }
    Ok(model.loss(&ids, &labels, &options)?.loss)
}

/// The same by Candle's own loss, which has no label to ignore: the positions that count are chosen.
fn stored_logits_loss(model: &Decoder, ids: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let steps = ids.dim(1)? - 1;
    let hidden = model
        .hidden_states(ids)?
        .narrow(1, 0, steps)?
        .flatten_to(1)?;
    let labels = labels.narrow(1, 1, steps)?.flatten_all()?;
    let (rows, targets): (Vec<u32>, Vec<i64>) = (0..)
        .zip(labels.to_vec1::<i64>()?)
        .filter(|&(_, label)| label != IGNORED)
        .unzip();
    let count = rows.len() as f64;
    let rows = Tensor::new(rows, ids.device())?;
    let targets = Tensor::new(targets, ids.device())?;
    let logits = model.logits(&hidden.index_select(&rows, 0)?)?;
    let mean = candle_nn::loss::cross_entropy(&logits.to_dtype(DType::F32)?, &targets)?;
    Ok((mean * count)?)
}

/// The mean loss of all positions that count.
fn evaluate(model: &Decoder, run: &Run, sequences: &[Sequence]) -> Result<f64> {
    let (mut sum, mut positions) = (0., 0);
    let all: Vec<&Sequence> = sequences.iter().collect();
    for batch in all.chunks(run.batch) {
        sum += f64::from(summed_loss(model, run, batch)?.to_scalar::<f32>()?);
        positions += batch.iter().map(|s| s.positions()).sum::<usize>();
    }
    Ok(sum / positions as f64)
}

/// Prints how the model goes on after a sequence's prompt, or after its first half.
fn show(model: &Decoder, encoder: &Encoder, sequence: &Sequence) -> Result<()> {
    let prompt = match sequence.ignored {
        0 => sequence.ids.len() / 2,
        ignored => ignored,
    };
    let (prompt, text) = sequence.ids.split_at(prompt);
    let sampling = Sampling {
        max_new_tokens: NEW_TOKENS,
        // An instruction has a likeliest answer; the likeliest text of a small model goes in circles.
        temperature: if sequence.ignored > 0 { 0. } else { 0.7 },
        stop: model.config().eos_token_ids.clone(),
        ..Sampling::default()
    };
    let generated = generate(model, prompt, &sampling)?;
    for (name, ids) in [
        ("after", prompt),
        ("the data says", text),
        ("the model says", &generated),
    ] {
        let text = encoder
            .tokenizer
            .decode(ids, true)
            .map_err(anyhow::Error::from_boxed)?;
        println!("--- {name}\n{}", text.trim_end());
    }
    println!("---");
    Ok(())
}

/// Makes a small checkpoint with a tokenizer of these texts and random weights.
fn new_checkpoint(folder: &Path, texts: &[&str], run: &Run) -> Result<()> {
    let mut tokenizer = corpus::train_tokenizer(texts, VOCAB)?;
    tokenizer
        .add_special_tokens([AddedToken::from(END, true)])
        .map_err(anyhow::Error::from_boxed)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(true),
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": true,
        "eos_token_id": tokenizer.token_to_id(END),
    });
    let (decoder, _) = training::new_decoder(&config.to_string(), run.seed)?;
    decoder.save(folder)?;
    let path = folder.join("tokenizer.json");
    tokenizer
        .save(&path, false)
        .map_err(anyhow::Error::from_boxed)
        .with_context(|| format!("writing {}", path.display()))
}

fn has_weights(folder: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"]
        .iter()
        .any(|name| folder.join(name).is_file())
}

/// Makes a checkpoint of another's config and tokenizer with random weights.
fn random_checkpoint(folder: &Path, other: &Path, seed: u64) -> Result<()> {
    let path = other.join("config.json");
    let config =
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let (decoder, _) = training::new_decoder(&config, seed)?;
    decoder.save(folder)?;
    copy_tokenizer(other, folder)
}

/// Copies the tokenizer's files that there are.
fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    for name in TOKENIZER_FILES {
        if from.join(name).is_file() {
            std::fs::copy(from.join(name), to.join(name))
                .with_context(|| format!("copying {name} to {}", to.display()))?;
        }
    }
    Ok(())
}
