//! Checkpoints as Hugging Face writes them: `config.json` and safetensors, in one file or several.

use super::config::{Config, CONFIG};
use super::decoder::Decoder;
use super::staging::Staging;
use super::stored::Stored;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{bail, DType, Device, Error, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files that are weights in a form or under a name that is not read.
const WEIGHT_ENDINGS: [&str; 5] = [".safetensors", ".bin", ".pth", ".pt", ".gguf"];

impl Decoder {
    /// Loads the checkpoint in a folder, `config.json` and `model.safetensors` or the files of
    /// `model.safetensors.index.json`, and puts its weights as variables into `vars`, under their
    /// names.
    ///
    /// The names may lack the leading `model.`, as a model without its head is saved. Of a `gemma3`
    /// checkpoint the text model is loaded; the parts that see images are left out.
    ///
    /// The weights get this dtype, whatever the checkpoint's, and this device. Each is copied out of
    /// a memory map, so that a checkpoint needs no memory beside its weights; the files must not be
    /// changed in place meanwhile.
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use candle_cut_cross_entropy::models::Decoder;
    /// use candle_nn::{AdamW, Optimizer, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = VarMap::new();
    /// let decoder = Decoder::load("Qwen2.5-0.5B", &vars, DType::F32, &Device::Cpu)?;
    /// let optimizer = AdamW::new_lr(vars.all_vars(), 1e-5)?;
    /// // .. training ..
    /// decoder.save("fine-tuned")?;
    /// # let _ = optimizer;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`Config::from_file`]; files that are missing or not safetensors; a tensor that is
    /// missing or has another shape; one that this architecture does not use; a head beside the
    /// embedding that the config ties it to, unless both are the same. Each is named.
    pub fn load(
        folder: impl AsRef<Path>,
        vars: &VarMap,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        let config = Config::from_file(folder.join(CONFIG))?;
        let files = weight_files(folder)?;
        for file in &files {
            refuse_pointer(file)?;
        }
        // SAFETY: a map is undefined behaviour where its file changes under it; the documentation
        // rules that out, and `save` replaces files rather than writing into them.
        let tensors = unsafe { MmapedSafetensors::multi(&files)? };
        let stored = Arc::new(Stored::new(tensors));
        let variables = Variables {
            stored: stored.clone(),
            vars: vars.clone(),
        };
        let vb = VarBuilder::from_backend(Box::new(variables), dtype, device.clone());
        let load = || {
            stored.check_head(&config)?;
            let mut decoder = Self::new(config, vb)?;
            stored.check_all_used(&decoder)?;
            decoder.set_name_or_path(folder.to_str());
            Ok(decoder)
        };
        load().map_err(|e: Error| e.with_path(folder))
    }

    /// Saves `config.json` and `model.safetensors` into a folder, which is made if need be, so that
    /// [`Decoder::load`] and Hugging Face transformers can open it.
    ///
    /// The config says the weights' dtype. Adapters are merged into the weights. The tokenizer's files
    /// are the caller's to copy. A sharded checkpoint in the same folder is left alone; both loaders
    /// prefer `model.safetensors`.
    ///
    /// The files are written in a folder `.saving-*` inside, flushed to the disk, and then take the
    /// places of those before, the config last. A process that is killed leaves the old checkpoint or
    /// the new one, but for one moment: where the config changes, the old one is put aside first, so
    /// that no config ever stands beside weights that it does not describe. A kill in that moment
    /// leaves a folder without `config.json`, which nothing loads; the old config (`before`) and the new
    /// one are then in `.saving-*`. The next save removes what a killed one has left.
    ///
    /// # Errors
    /// A folder or file that cannot be written: the checkpoint before is as it was.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        if !self.adapters().is_empty() {
            return self.merged()?.save(folder);
        }
        let staging = Staging::new(folder.as_ref())?;
        staging.write(CONFIG, &self.config().json_for(self.dtype())?)?;
        // transformers asks for it.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = self.tensors().iter();
        let tensors = tensors.map(|(name, tensor)| (name.clone(), tensor));
        staging.write_tensors(WEIGHTS, tensors, Some(metadata))?;
        staging.commit(&[WEIGHTS, CONFIG])
    }
}

/// The files that hold a checkpoint's weights.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    /// The index of a sharded checkpoint: which file holds which tensor.
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let single = folder.join(WEIGHTS);
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = folder.join(INDEX);
    if !index.is_file() {
        let entries = fs::read_dir(folder).map_err(|e| Error::from(e).with_path(folder))?;
        let others: BTreeSet<String> = entries
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .filter(|name| WEIGHT_ENDINGS.iter().any(|ending| name.ends_with(ending)))
            .collect();
        let others: Vec<String> = others.into_iter().take(3).collect();
        let there = match others.is_empty() {
            true => String::new(),
            false => format!(", but {}", others.join(", ")),
        };
        bail!(
            "no weights in {}: neither {WEIGHTS} nor {INDEX}{there}",
            folder.display()
        )
    }
    let text = fs::read_to_string(&index).map_err(|e| Error::from(e).with_path(&index))?;
    let parsed: Index =
        serde_json::from_str(&text).map_err(|e| Error::wrap(e).with_path(&index))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if names.is_empty() {
        bail!("{}: weight_map names no files", index.display())
    }
    names
        .into_iter()
        .map(|name| {
            let path = folder.join(&name);
            match Path::new(&name).file_name() == Some(name.as_ref()) && path.is_file() {
                true => Ok(path),
                false => bail!("{} names a missing file, {name:?}", index.display()),
            }
        })
        .collect()
}

/// Fails at a file that git-lfs has not fetched yet.
fn refuse_pointer(path: &Path) -> Result<()> {
    const POINTER: &[u8] = b"version https://git-lfs";
    let mut start = Vec::new();
    let most = POINTER.len() as u64;
    File::open(path)
        .and_then(|file| file.take(most).read_to_end(&mut start))
        .map_err(|e| Error::from(e).with_path(path))?;
    if start == POINTER {
        bail!(
            "{} is a git-lfs pointer, not the weights: fetch them with `git lfs pull`",
            path.display()
        )
    }
    Ok(())
}

/// Makes a variable of every tensor that is asked for.
struct Variables {
    stored: Arc<Stored>,
    vars: VarMap,
}

impl SimpleBackend for Variables {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            bail!(
                "tensor {name} has shape {:?}, the config asks for {shape:?}",
                tensor.shape()
            )
        }
        let var = Var::from_tensor(&tensor)?;
        let tensor = var.as_tensor().clone();
        match self.vars.data().lock() {
            Ok(mut vars) => vars.insert(name.to_owned(), var),
            Err(_) => bail!("the VarMap's lock is poisoned"),
        };
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        match self.stored.load(name, device)? {
            Some(tensor) => tensor.to_dtype(dtype),
            None => bail!("the checkpoint has no tensor {name}"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.stored.contains(name)
    }
}
