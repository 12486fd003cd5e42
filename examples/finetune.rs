//! Fine-tunes a Hugging Face checkpoint.
//!
//! `cargo run --release --example finetune [-- --checkpoint FOLDER --data FILE ..]` trains the decoder in a
//! folder (`config.json`, safetensors, `tokenizer.json`) on conversations, on instructions or on plain text.
//! Without a checkpoint it makes a small one with random weights, without data it takes the sources and
//! documents of this crate, so that it runs as it is. Killed at any point, it goes on with `--resume`: on a
//! CPU to the same bits as without the interruption.

mod common;
mod fine_tuning;

use clap::Parser;
use fine_tuning::{run, Args};

fn main() -> anyhow::Result<()> {
    common::memory::keep_freed();
    run(&Args::parse())
}
