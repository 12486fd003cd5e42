//! Files that are read and written: no input is written over, no missing one is replaced by a default.

use anyhow::{bail, ensure, Context, Result};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const LFS: &[u8] = b"version https://git-lfs";

/// The path from the root without links, of a file that need not exist yet.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    let whole = std::path::absolute(path).with_context(|| format!("{}", path.display()))?;
    let mut existing = whole.as_path();
    loop {
        match (existing.canonicalize(), existing.parent()) {
            (Ok(real), _) => {
                let rest = whole.strip_prefix(existing)?;
                // An empty rest would add a slash.
                return Ok(match rest.as_os_str().is_empty() {
                    true => real,
                    false => real.join(rest),
                });
            }
            (Err(e), Some(parent)) if e.kind() == ErrorKind::NotFound => existing = parent,
            (Err(e), _) => bail!("{}: {e}", path.display()),
        }
    }
}

/// An error where an input, by whatever name, is what is going to be written or lies in it.
pub fn check_kept<P: AsRef<Path>>(option: &str, input: &Path, outputs: &[P]) -> Result<()> {
    let real = absolute(input)?;
    for output in outputs {
        let output = output.as_ref();
        ensure!(
            !real.starts_with(absolute(output)?),
            "{option} {} would be written over by {}: choose another place for the output",
            input.display(),
            output.display()
        );
    }
    Ok(())
}

/// Makes a folder and tries whether files can be written there.
pub fn check_writable(folder: &Path) -> Result<()> {
    let probe = folder.join(format!(".writable.{}.tmp", std::process::id()));
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&probe, ""))
        .and_then(|()| fs::remove_file(&probe))
        .with_context(|| format!("cannot write into the folder {}", folder.display()))
}

/// Tries whether a file can be written, which leaves one that exists as it is.
pub fn check_file(path: &Path) -> Result<()> {
    ensure!(
        !path.is_dir(),
        "{} is a folder, a file is to be written there",
        path.display()
    );
    ensure!(
        path.file_name().is_some(),
        "{} names no file",
        path.display()
    );
    check_writable(folder_of(path))
}

/// Writes a file that takes its place once it is complete. A link there is replaced, not followed, and
/// the permissions are those of a new file.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // One name, so that what an interruption leaves is written over by the next.
    let temporary = folder_of(path).join(format!(".{name}.tmp"));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    let written = write();
    if written.is_err() {
        // There may be nothing to remove.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("writing {}", path.display()))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A text without the mark that some editors put before it.
pub fn read_text(path: &Path) -> Result<String> {
    let name = path.display();
    let bytes = fs::read(path).with_context(|| format!("reading {name}"))?;
    check_lfs(path)?;
    let Ok(text) = String::from_utf8(bytes) else {
        bail!("{name} is not a text in UTF-8; compressed files are not read")
    };
    let text = match text.strip_prefix('\u{feff}') {
        Some(text) => text.to_owned(),
        None => text,
    };
    ensure!(!text.trim().is_empty(), "{name} is empty");
    Ok(text)
}

/// An error for what git leaves in place of a large file that it did not fetch.
fn check_lfs(path: &Path) -> Result<()> {
    let mut begin = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LFS.len() as u64).read_to_end(&mut begin))
        .with_context(|| format!("reading {}", path.display()))?;
    ensure!(
        begin != LFS,
        "{} is a git-lfs pointer, not the file itself: `git lfs pull` fetches it",
        path.display()
    );
    Ok(())
}

/// What of a checkpoint holds weights.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .and_then(|entries| entries.map(|e| Ok(e?.path())).collect())
        .with_context(|| format!("reading the folder {}", folder.display()))?;
    let extensions = [
        "safetensors",
        "bin",
        "pt",
        "pth",
        "ckpt",
        "gguf",
        "h5",
        "msgpack",
    ];
    found.retain(|path| {
        path.extension()
            .is_some_and(|e| extensions.iter().any(|x| e == *x))
    });
    found.sort();
    Ok(found)
}

/// An error where a checkpoint lacks a file, or weights in a form that is read.
pub fn check_checkpoint(folder: &Path) -> Result<()> {
    check_description(folder)?;
    let found = weight_files(folder)?;
    if !folder.join(WEIGHTS).is_file() && !folder.join(INDEX).is_file() {
        let names: Vec<_> = found
            .iter()
            .filter_map(|path| Some(path.file_name()?.to_string_lossy()))
            .collect();
        let there = match names.len() {
            0 => "no weights at all".into(),
            _ => names.join(", "),
        };
        bail!(
            "{} has neither {WEIGHTS} nor {INDEX}; it has {there}",
            folder.display()
        )
    }
    let index = Some(folder.join(INDEX)).filter(|index| index.is_file());
    for path in found.iter().chain(&index) {
        check_lfs(path)?;
    }
    Ok(())
}

/// The checkpoint that adapters are of, as their config names it.
pub fn base_of_adapter(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("adapter_config.json");
    let config: Value = serde_json::from_str(&read_text(&path)?)
        .with_context(|| format!("reading {}", path.display()))?;
    match config["base_model_name_or_path"]
        .as_str()
        .map(PathBuf::from)
    {
        Some(base) if base.is_dir() => Ok(base),
        Some(base) => bail!(
            "{} names the base model {}, which is no folder here: --checkpoint says where it is",
            path.display(),
            base.display()
        ),
        None => bail!(
            "{} names no base model: --checkpoint says where it is",
            path.display()
        ),
    }
}

/// The same for all but the weights.
pub fn check_description(folder: &Path) -> Result<()> {
    let name = folder.display();
    ensure!(folder.is_dir(), "the checkpoint {name} is not a folder");
    if !folder.join("config.json").is_file() && folder.join("adapter_config.json").is_file() {
        bail!("{name} holds adapters only, without the model that they are of")
    }
    for file in ["config.json", "tokenizer.json"] {
        let path = folder.join(file);
        ensure!(path.is_file(), "the checkpoint {name} has no {file}");
        check_lfs(&path)?;
    }
    Ok(())
}

/// A number that tells whether weights are the same: of their sizes and of samples from everywhere in them.
pub fn fingerprint(folder: &Path) -> Result<u64> {
    use std::io::{Seek, SeekFrom};
    let (samples, size) = (256, 4096);
    let mut hash = Fnv::default();
    for path in weight_files(folder)? {
        let mut read = || -> std::io::Result<()> {
            let mut file = File::open(&path)?;
            let length = file.metadata()?.len();
            hash.add(&length.to_le_bytes());
            let step = (length / samples).max(size);
            for start in (0..length).step_by(step as usize) {
                file.seek(SeekFrom::Start(start))?;
                let mut part = Vec::new();
                (&mut file).take(size).read_to_end(&mut part)?;
                hash.add(&part);
            }
            Ok(())
        };
        read().with_context(|| format!("reading {}", path.display()))?;
    }
    Ok(hash.0)
}

/// The hash FNV-1a.
pub struct Fnv(pub u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    pub fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
