//! The decoder: what it computes, against Hugging Face transformers and candle-transformers; what it is read from and
//! saved as; and what trains it.

mod adamw;
mod adapter_files;
#[cfg(feature = "candle-transformers")]
mod candle_transformers;
mod checkpoints;
mod common;
mod configs;
mod decoder;
mod fine_tuning;
mod gguf;
mod golden;
mod gradients;
mod heads;
mod packing;
