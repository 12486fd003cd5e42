//! What the command line says.

use crate::common::files::absolute;
use crate::common::training::Schedule;
use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device};
use candle_cut_cross_entropy::models::Lora;
use candle_cut_cross_entropy::Filter;
use clap::{Parser, ValueEnum};
use serde::Serialize;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Fine-tune a Hugging Face checkpoint.
#[derive(Parser)]
pub struct Args {
    #[command(flatten)]
    pub run: Run,
    /// [default: 120]
    #[arg(long)]
    pub steps: Option<usize>,
    /// How often all sequences are seen, in place of --steps
    #[arg(long, conflicts_with = "steps")]
    pub epochs: Option<f64>,
    /// Where the fine-tuned checkpoint (model), the checkpoints of the run (step-N), the numbers of every step
    /// (metrics.jsonl) and the loss curve (loss.svg) go
    #[arg(long, default_value = "out/finetune")]
    pub output: PathBuf,
    /// Steps from one checkpoint of the run to the next; the newest is kept
    #[arg(long, default_value_t = 50)]
    pub save_every: usize,
    /// Go on from the newest checkpoint in the output folder, from the start where there is none; --steps may be more
    #[arg(long)]
    pub resume: bool,
    /// Steps from one line of progress to the next [default: 10 where no terminal shows a bar]
    #[arg(long)]
    pub log_every: Option<usize>,
    /// Steps from one validation to the next [default: a fifth of --steps]
    #[arg(long)]
    pub validate_every: Option<usize>,
    /// A prompt in the form of the data (a user's message, an instruction, a text), to be answered at every
    /// validation and at the end; several may be given
    #[arg(long)]
    pub prompt: Vec<String>,
    /// A record that cannot be used is an error; otherwise it is skipped and named
    #[arg(long)]
    pub strict: bool,
}

/// The arguments that determine a run.
#[derive(clap::Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// The folder with config.json, safetensors and tokenizer.json [default: a small one with random weights,
    /// made in the output folder]
    #[arg(long)]
    pub checkpoint: Option<PathBuf>,
    /// Train from the start, with random weights in place of those of --checkpoint, which need not be there
    #[arg(long, requires = "checkpoint")]
    pub random_weights: bool,
    /// What to learn from [default: the sources and documents of this crate]
    ///
    /// Records are JSON, one object a line or an array of them, or the rows of a Parquet file. A record has one of
    ///
    ///     messages                      a conversation, written by the tokenizer's chat template, which reads
    ///                                   `tools` and `chat_template_kwargs` too
    ///     instruction, input, output    `input` may be absent
    ///     prompt, completion
    ///     text
    ///
    /// Of conversations the answers are learnt, of instructions the output, of prompts the completion. A record
    /// and an answer may have a `weight`, 1 where there is none, which multiplies the loss of its tokens; the
    /// loss is the mean by weight. What weighs 0 is not learnt. Instructions become the prompt
    ///
    ///     ### Instruction:
    ///     {instruction}
    ///
    ///     ### Input:
    ///     {input}
    ///
    ///     ### Response:
    ///
    /// without the input's part where it is empty. The checkpoint's first end token ends every record that
    /// does not end yet, but conversations, which the template ends. Longer records are cut. Any other file
    /// is plain text, cut into sequences side by side.
    #[arg(long, verbatim_doc_comment)]
    pub data: Option<PathBuf>,
    /// The chat template of `messages` [default: that of the tokenizer]
    #[arg(long)]
    pub chat_template: Option<PathBuf>,
    /// Of records
    #[arg(long, value_enum, default_value_t = Learn::Answers)]
    pub learn: Learn,
    /// The share of the data that is held out for validation; 0 does without
    #[arg(long, default_value_t = 0.05)]
    pub validation: f64,
    /// A file to validate on, in place of a share of the data
    #[arg(long, conflicts_with = "validation")]
    pub validation_data: Option<PathBuf>,
    /// This crate's presets, or Candle's own loss on stored logits (baseline)
    #[arg(long, value_enum, default_value_t = Loss::Cce)]
    pub loss: Loss,
    /// In place of the loss's own filter: off, auto, a threshold such as 0.001, or drop:0.000244 as the reference
    #[arg(long, value_parser = filter)]
    pub filter: Option<String>,
    /// Of the model; the optimizer's weights are f32
    #[arg(long, value_enum, default_value_t = Type::F32)]
    dtype: Type,
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,
    /// Lay the sequences of a batch end to end rather than fill them up to the longest: the same loss, and
    /// less work where lengths differ
    #[arg(long)]
    pub packing: bool,
    /// Sequences that are in memory at once
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Batches whose gradients are added up for a step
    #[arg(long, default_value_t = 1)]
    pub accumulate: usize,
    /// The most tokens of a sequence
    #[arg(long, default_value_t = 128)]
    pub length: usize,
    /// The highest [default: 1e-5; 2e-4 with --lora; 4e-3 without --checkpoint]
    #[arg(long)]
    learning_rate: Option<f64>,
    /// How the learning rate goes on after the warm-up
    #[arg(long, value_enum, default_value_t = Schedule::Cosine)]
    pub schedule: Schedule,
    /// Steps in which the learning rate rises [default: a fifteenth of --steps]
    #[arg(long)]
    pub warm_up: Option<usize>,
    /// Of AdamW; norms and biases have none
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// NAME=FACTOR or NAME=FACTOR,DECAY: tensors with NAME in their names have the learning rate times FACTOR, and
    /// DECAY as weight decay; several may be given, of which the first counts
    #[arg(long, value_parser = group)]
    group: Vec<String>,
    /// Of AdamW
    #[arg(long, default_value_t = 0.9)]
    pub beta1: f64,
    /// Of AdamW
    #[arg(long, default_value_t = 0.999)]
    pub beta2: f64,
    /// Train adapters of this rank and nothing else; they go into the output folder (adapter), and merged
    /// into the model
    #[arg(long)]
    lora: Option<usize>,
    /// The scale of the adapters, times their rank [default: 16]
    #[arg(long, requires = "lora")]
    lora_alpha: Option<f64>,
    /// The share of an adapter's inputs that are dropped in training [default: 0]
    #[arg(long, requires = "lora")]
    lora_dropout: Option<f64>,
    /// The modules with an adapter, such as q_proj,v_proj [default: all projections]
    #[arg(long, requires = "lora", value_delimiter = ',')]
    lora_targets: Option<Vec<String>>,
    /// Compute the layers again in the backward: less memory, about a quarter more time
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// The largest norm of all gradients together
    #[arg(long, default_value_t = 1.)]
    pub clip: f64,
    /// Same seed, same numbers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

#[derive(Clone, Copy, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Learn {
    /// What the model is to say
    Answers,
    /// Every token
    All,
}

#[derive(Clone, Copy, PartialEq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
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

const STEPS: usize = 120;

/// The text of a filter, once it is known to be one.
fn filter(text: &str) -> Result<String, String> {
    match text.parse::<Filter>() {
        Ok(_) => Ok(text.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// The text of a group, once it is known to be one.
fn group(text: &str) -> Result<String, String> {
    parse_group(text).map(|_| text.to_owned())
}

/// A part of a name, the factor of the learning rate, and the weight decay.
type NamedGroup = (String, (f64, Option<f64>));

fn parse_group(text: &str) -> Result<NamedGroup, String> {
    let wrong = || {
        format!("{text:?} is not NAME=FACTOR or NAME=FACTOR,DECAY with numbers that are at least 0")
    };
    let number = |text: &str| match text.parse::<f64>() {
        Ok(number) if number >= 0. && number.is_finite() => Ok(number),
        _ => Err(wrong()),
    };
    let (name, numbers) = text.split_once('=').ok_or_else(wrong)?;
    let (factor, decay) = match numbers.split_once(',') {
        Some((factor, decay)) => (number(factor)?, Some(number(decay)?)),
        None => (number(numbers)?, None),
    };
    match name.is_empty() {
        true => Err(wrong()),
        false => Ok((name.to_owned(), (factor, decay))),
    }
}

impl Args {
    /// An error for numbers that no run can have.
    pub fn check(&self) -> Result<()> {
        let run = &self.run;
        for (name, value, least) in [
            ("steps", self.steps, 1),
            ("save-every", Some(self.save_every), 1),
            ("log-every", self.log_every, 1),
            ("validate-every", self.validate_every, 1),
            ("batch", Some(run.batch), 1),
            ("accumulate", Some(run.accumulate), 1),
            ("length", Some(run.length), 2),
            ("lora", run.lora, 1),
        ] {
            if let Some(value) = value.filter(|&value| value < least) {
                bail!("--{name} must be at least {least}, got {value}")
            }
        }
        ensure!(
            run.batch.checked_mul(run.accumulate).is_some(),
            "--batch {} times --accumulate {} is too large a number",
            run.batch,
            run.accumulate
        );
        for (name, value) in [
            ("learning-rate", Some(run.learning_rate())),
            ("clip", Some(run.clip)),
            ("epochs", self.epochs),
            ("lora-alpha", run.lora_alpha),
        ] {
            if let Some(value) = value.filter(|value| !(*value > 0. && value.is_finite())) {
                bail!("--{name} must be positive and finite, got {value}")
            }
        }
        ensure!(
            run.weight_decay >= 0. && run.weight_decay.is_finite(),
            "--weight-decay must be at least 0 and finite, got {}",
            run.weight_decay
        );
        for (name, value) in [
            ("validation", run.validation),
            ("beta1", run.beta1),
            ("beta2", run.beta2),
            ("lora-dropout", run.lora_dropout.unwrap_or(0.)),
        ] {
            ensure!(
                (0. ..1.).contains(&value),
                "--{name} must be at least 0 and less than 1, got {value}"
            );
        }
        ensure!(
            self.prompt.iter().all(|prompt| !prompt.is_empty()),
            "a --prompt is empty"
        );
        Ok(())
    }

    /// The steps of the whole run on so many sequences.
    pub fn total_steps(&self, sequences: usize) -> Result<usize> {
        let steps = match self.epochs {
            None => self.steps.unwrap_or(STEPS),
            Some(epochs) => {
                let size = (self.run.batch * self.run.accumulate) as f64;
                (epochs * sequences as f64 / size).ceil() as usize
            }
        };
        if let Some(warm_up) = self.run.warm_up.filter(|&warm_up| warm_up >= steps) {
            bail!("--warm-up must be less than the steps, {steps}, got {warm_up}")
        }
        Ok(steps)
    }
}

impl Run {
    pub fn learning_rate(&self) -> f64 {
        let default = match (&self.checkpoint, self.lora) {
            (None, _) => 4e-3,
            (Some(_), Some(_)) => 2e-4,
            (Some(_), None) => 1e-5,
        };
        self.learning_rate.unwrap_or(default)
    }

    /// What `--group` says.
    pub fn groups(&self) -> Result<Vec<NamedGroup>> {
        let groups = self.group.iter().map(|text| parse_group(text));
        groups
            .map(|group| group.map_err(anyhow::Error::msg))
            .collect()
    }

    /// The adapters, where only those are trained.
    pub fn lora(&self) -> Option<Lora> {
        let default = Lora::default();
        Some(Lora {
            rank: self.lora?,
            alpha: self.lora_alpha.unwrap_or(default.alpha),
            dropout: self.lora_dropout.unwrap_or(default.dropout),
            targets: self.lora_targets.clone().unwrap_or(default.targets),
        })
    }

    pub fn dtype(&self) -> DType {
        match self.dtype {
            Type::F32 => DType::F32,
            Type::Bf16 => DType::BF16,
        }
    }

    pub fn device(&self) -> Result<Device> {
        Ok(match self.device {
            On::Cpu => Device::Cpu,
            On::Cuda => Device::new_cuda(0).context("--device cuda")?,
        })
    }

    /// By their names, to compare with those of another run. A file has one name, however it is spelled.
    pub fn as_map(&self) -> Result<Map<String, Value>> {
        let Value::Object(mut map) = serde_json::to_value(self)? else {
            bail!("arguments serialize as something else than a map")
        };
        for (name, path) in [
            ("checkpoint", &self.checkpoint),
            ("data", &self.data),
            ("chat-template", &self.chat_template),
            ("validation-data", &self.validation_data),
        ] {
            if let Some(path) = path {
                map.insert(name.into(), absolute(path)?.to_string_lossy().into());
            }
        }
        Ok(map)
    }
}
