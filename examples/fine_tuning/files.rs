//! The files of a run beside its checkpoints: what it begins with and what it leaves.

use super::arguments::Run;
use crate::common::files::{
    check_checkpoint, check_description, check_file, check_kept, check_writable, replace,
};
use crate::common::{corpus, training};
use anyhow::{anyhow, Context, Result};
use candle_cut_cross_entropy::models::Config;
use serde_json::{json, Value};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use tokenizers::AddedToken;

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

/// Where everything goes.
pub struct Output {
    pub folder: PathBuf,
    /// The checkpoint that a run without one begins with.
    pub initial: PathBuf,
    pub model: PathBuf,
    pub adapter: PathBuf,
    pub picture: PathBuf,
    metrics: PathBuf,
}

impl Output {
    /// Makes the folders, once it is sure that they can be written and that no input is in them.
    pub fn prepare(folder: &Path, run: &Run, steps: &[PathBuf]) -> Result<Self> {
        let output = Self {
            folder: folder.to_owned(),
            initial: folder.join("initial"),
            model: folder.join("model"),
            adapter: folder.join("adapter"),
            picture: folder.join("loss.svg"),
            metrics: folder.join("metrics.jsonl"),
        };
        let mut written = vec![
            &output.initial,
            &output.model,
            &output.adapter,
            &output.picture,
            &output.metrics,
        ];
        written.extend(steps);
        for (option, input) in [
            ("--checkpoint", &run.checkpoint),
            ("--data", &run.data),
            ("--chat-template", &run.chat_template),
            ("--validation-data", &run.validation_data),
        ] {
            if let Some(input) = input {
                check_kept(option, input, &written)?;
            }
        }
        check_writable(folder)?;
        check_writable(&output.model)?;
        if run.lora().is_some() {
            check_writable(&output.adapter)?;
        }
        check_file(&output.picture)?;
        check_file(&output.metrics)?;
        Ok(output)
    }

    /// The numbers of every step, after those of the steps that are done.
    pub fn metrics(&self, done: usize) -> Result<Metrics> {
        let mut kept = String::new();
        if done > 0 && self.metrics.is_file() {
            let text = fs::read_to_string(&self.metrics)
                .with_context(|| format!("reading {}", self.metrics.display()))?;
            for line in text.lines() {
                // An interruption may have cut the last.
                let step = serde_json::from_str::<Value>(line).ok();
                let step = step.and_then(|line| line["step"].as_u64());
                if step.is_some_and(|step| step <= done as u64) {
                    kept.push_str(line);
                    kept.push('\n');
                }
            }
        }
        replace(&self.metrics, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&self.metrics);
        let name = self.metrics.display().to_string();
        let file = file.with_context(|| format!("writing {name}"))?;
        Ok(Metrics { file, name })
    }
}

/// A file with a JSON object a line.
pub struct Metrics {
    file: File,
    name: String,
}

impl Metrics {
    pub fn add(&mut self, line: &Value) -> Result<()> {
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("writing {}", self.name))
    }
}

/// The folder of the weights to begin with, which are made where they are to be random.
pub fn base(run: &Run, output: &Output, texts: &[&str], resumed: bool) -> Result<PathBuf> {
    match &run.checkpoint {
        Some(folder) if !run.random_weights => {
            check_checkpoint(folder).map_err(|e| {
                anyhow!("{e:#} (--random-weights trains from the start, without weights)")
            })?;
            return Ok(folder.clone());
        }
        Some(folder) => check_description(folder)?,
        None => {}
    }
    let initial = &output.initial;
    if resumed {
        check_checkpoint(initial)?;
    } else {
        check_writable(initial)?;
        match &run.checkpoint {
            Some(folder) => {
                println!("random weights in the form of {}", folder.display());
                random_checkpoint(initial, folder, run.seed)?;
            }
            None => {
                println!("no --checkpoint: a small model with random weights");
                new_checkpoint(initial, texts, run)?;
            }
        }
    }
    Ok(initial.clone())
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
        "max_position_embeddings": run.length.max(2048),
        "tie_word_embeddings": true,
        "eos_token_id": tokenizer.token_to_id(END),
    });
    let (decoder, _) = training::new_decoder(&config.to_string(), run.seed)?;
    decoder.save(folder)?;
    let text = tokenizer
        .to_string(false)
        .map_err(anyhow::Error::from_boxed)?;
    replace(&folder.join("tokenizer.json"), text.as_bytes())
}

/// Makes a checkpoint of another's config and tokenizer with random weights.
fn random_checkpoint(folder: &Path, other: &Path, seed: u64) -> Result<()> {
    let config = Config::from_file(other.join("config.json"))?;
    let (decoder, _) = training::new_decoder(config.json(), seed)?;
    decoder.save(folder)?;
    copy_tokenizer(other, folder)
}

/// Copies the tokenizer's files that there are, and leaves none of another.
pub fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    for name in TOKENIZER_FILES {
        let (source, copy) = (from.join(name), to.join(name));
        if source.is_file() {
            let bytes =
                fs::read(&source).with_context(|| format!("reading {}", source.display()))?;
            replace(&copy, &bytes)?;
        } else if copy.is_file() {
            fs::remove_file(&copy).with_context(|| format!("removing {}", copy.display()))?;
        }
    }
    Ok(())
}
