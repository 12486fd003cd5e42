//! Turns a GGUF into a Hugging Face checkpoint: `config.json`, `model.safetensors`, and the tokenizer's files.
//!
//! `cargo run --release --example gguf -- MODEL.gguf FOLDER` dequantises the weights of a llama (SmolLM2, Mistral),
//! qwen2, qwen3, gemma, gemma2 or gemma3 file, to bf16 unless told otherwise. What quantisation took is gone: the checkpoint
//! computes what the GGUF does. The examples `finetune`, `perplexity` and `heads` take the folder, and so do
//! transformers and peft.

mod convert;
mod tokenizer;

use anyhow::{ensure, Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::DType;
use clap::{Parser, ValueEnum};
use convert::Metadata;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::PathBuf;
use tokenizers::Tokenizer;

/// Turn a GGUF into a Hugging Face checkpoint.
#[derive(Parser)]
struct Args {
    /// The GGUF
    gguf: PathBuf,
    /// The folder to write
    output: PathBuf,
    #[arg(long, value_enum, default_value_t = Type::Bf16)]
    dtype: Type,
    /// A tokenizer.json to take in place of the GGUF's tokenizer
    #[arg(long)]
    tokenizer: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    Bf16,
    F32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let name = args.gguf.display();
    let file = File::open(&args.gguf).with_context(|| format!("opening {name}"))?;
    let mut reader = BufReader::new(file);
    let content = Content::read(&mut reader).with_context(|| format!("reading {name}"))?;
    let metadata = Metadata(&content.metadata);
    let dtype = match args.dtype {
        Type::Bf16 => DType::BF16,
        Type::F32 => DType::F32,
    };
    let decoder =
        convert::decoder(&content, &mut reader, dtype).with_context(|| name.to_string())?;
    let (tokenizer, config) = match &args.tokenizer {
        Some(path) => {
            let text =
                fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            (text, None)
        }
        None => {
            let (json, config) = tokenizer::files(&metadata).with_context(|| name.to_string())?;
            (
                serde_json::to_string(&json)?,
                Some(serde_json::to_string_pretty(&config)?),
            )
        }
    };
    let read = Tokenizer::from_bytes(&tokenizer)
        .map_err(anyhow::Error::from_boxed)
        .context("the tokenizer")?;
    let (tokens, classes) = (read.get_vocab_size(true), decoder.config().vocab_size);
    ensure!(
        tokens <= classes,
        "the tokenizer has {tokens} tokens, the model {classes}"
    );

    decoder.save(&args.output)?;
    let write = |file: &str, text: &str| {
        let path = args.output.join(file);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    write("tokenizer.json", &tokenizer)?;
    if let Some(config) = config {
        write("tokenizer_config.json", &config)?;
    }
    let parameters: usize = decoder.tensors().values().map(|t| t.elem_count()).sum();
    println!(
        "{}: {}, {:.1} million parameters in {dtype:?}, {tokens} tokens",
        args.output.display(),
        decoder.config().family,
        parameters as f64 / 1e6,
    );
    Ok(())
}
