//! The checkpoints of a run, `step-N`, from which it goes on after an interruption as if none had been.

use anyhow::{bail, ensure, Context, Result};
use candle_cut_cross_entropy::models::{AdamW, Decoder};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const STATE: &str = "state.json";
const ADAPTERS: &str = "adapter_model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "step-";

/// All of a run but its weights. The order of the data follows from the seed and the step.
#[derive(Serialize, Deserialize)]
pub struct State {
    pub step: usize,
    /// The steps of the whole run.
    pub steps: usize,
    /// The fingerprint of the weights that it began with.
    pub base: u64,
    /// The arguments that determine the run.
    pub run: Map<String, Value>,
    /// The fingerprint of the data.
    pub data: u64,
    /// (step, loss).
    pub train: Vec<(usize, f64)>,
    pub validation: Vec<(usize, f64)>,
}

pub struct Checkpoint {
    pub folder: PathBuf,
    pub state: State,
}

impl Checkpoint {
    /// The newest in a folder that may not exist yet.
    pub fn newest(output: &Path) -> Result<Option<Self>> {
        let Some(step) = steps(output)?.into_iter().max() else {
            return Ok(None);
        };
        let folder = output.join(format!("{PREFIX}{step}"));
        let path = folder.join(STATE);
        let state = fs::read_to_string(&path)
            .map_err(anyhow::Error::from)
            .and_then(|text| Ok(serde_json::from_str(&text)?))
            .with_context(|| format!("reading {}", path.display()))?;
        Ok(Some(Self { folder, state }))
    }

    /// An error that names what differs from the run that this is of.
    pub fn check_run(&self, run: &Map<String, Value>) -> Result<()> {
        for (name, now) in run {
            let before = self.state.run.get(name).unwrap_or(&Value::Null);
            let say = |value: &Value| match value {
                Value::Null => "not given".to_owned(),
                value => value.to_string(),
            };
            ensure!(
                before == now,
                "--{name} is {}, but {} in {}: --resume needs the same arguments",
                say(now),
                say(before),
                self.folder.display()
            );
        }
        Ok(())
    }

    /// The file of the adapters, where only those were trained.
    pub fn adapters(&self) -> PathBuf {
        self.folder.join(ADAPTERS)
    }

    /// Takes the optimizer's state, once the weights are loaded.
    pub fn load_optimizer(&self, optimizer: &mut AdamW) -> Result<()> {
        Ok(optimizer.load(self.folder.join(OPTIMIZER))?)
    }
}

/// Writes a checkpoint, then removes those before it. It has its name once it is complete and on the
/// disk, so that an interruption at any point leaves a complete one.
///
/// Where adapters are trained, they are all of the model that is written.
pub fn save(
    output: &Path,
    state: &State,
    model: &Decoder,
    adapters: bool,
    optimizer: &AdamW,
) -> Result<()> {
    let name = format!("{PREFIX}{}", state.step);
    let temporary = output.join(format!(".{name}"));
    remove(&temporary)?;
    // These two flush what they write.
    match adapters {
        true => model.save_adapters(&temporary)?,
        false => model.save(&temporary)?,
    }
    optimizer.save(temporary.join(OPTIMIZER))?;
    let path = temporary.join(STATE);
    let write = || -> std::io::Result<()> {
        fs::write(&path, serde_json::to_vec(state)?)?;
        File::open(&path)?.sync_all()?;
        sync_folder(&temporary)?;
        fs::rename(&temporary, output.join(&name))?;
        sync_folder(output)
    };
    write().with_context(|| format!("writing {}", path.display()))?;
    clear(output, Some(state.step))
}

/// The folders of all checkpoints.
pub fn folders(output: &Path) -> Result<Vec<PathBuf>> {
    let steps = steps(output)?.into_iter();
    Ok(steps
        .map(|step| output.join(format!("{PREFIX}{step}")))
        .collect())
}

/// Removes all checkpoints but one, and what an interruption left of others.
pub fn clear(output: &Path, keep: Option<usize>) -> Result<()> {
    for name in names(output)? {
        if name.starts_with(&format!(".{PREFIX}")) {
            remove(&output.join(name))?;
        }
    }
    for step in steps(output)?.into_iter().filter(|&s| Some(s) != keep) {
        let name = format!("{PREFIX}{step}");
        let hidden = output.join(format!(".{name}"));
        // What is removed in part must not look complete.
        fs::rename(output.join(&name), &hidden).with_context(|| format!("removing {name}"))?;
        remove(&hidden)?;
    }
    Ok(())
}

fn steps(output: &Path) -> Result<Vec<usize>> {
    let step = |name: String| name.strip_prefix(PREFIX)?.parse().ok();
    Ok(names(output)?.into_iter().filter_map(step).collect())
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => bail!("reading {}: {e}", folder.display()),
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            bail!("removing {}: {e}", folder.display())
        }
        _ => Ok(()),
    }
}

/// Puts the names in a folder on the disk; Windows cannot open one.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    match cfg!(unix) {
        true => File::open(folder)?.sync_all(),
        false => Ok(()),
    }
}
