//! Text to train on without downloading any, and a tokenizer made of it.

use super::files;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::models::TrainerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::Tokenizer;

/// The files that are named, or the sources and documents of this crate where none is.
pub fn sources(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = named.to_vec();
    if named.is_empty() {
        collect_own_files(Path::new(env!("CARGO_MANIFEST_DIR")), &mut found)?;
        found.sort();
    }
    Ok(found)
}

/// Their texts.
pub fn read_texts(named: &[PathBuf]) -> Result<Vec<String>> {
    let read = |path: &PathBuf| files::read_text(path);
    sources(named)?.iter().map(read).collect()
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

/// A byte-level BPE of tokens that occur at least twice.
pub fn train_tokenizer<T: AsRef<str> + Sync>(texts: &[T], vocab: usize) -> Result<Tokenizer> {
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
        .train(&mut trainer, texts.iter().map(AsRef::as_ref))
        .map_err(anyhow::Error::from_boxed)?;
    Ok(tokenizer)
}
