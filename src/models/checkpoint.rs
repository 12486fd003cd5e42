//! Checkpoints as Hugging Face writes them: `config.json` and safetensors, in one file or several.

use super::{Config, Decoder};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{bail, DType, Device, Error, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

impl Decoder {
    /// Loads the checkpoint in a folder, `config.json` and `model.safetensors` or the files of
    /// `model.safetensors.index.json`, and puts its weights as variables into `vars`, under their
    /// names.
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
    /// missing or has another shape. Each is named.
    pub fn load(
        folder: impl AsRef<Path>,
        vars: &VarMap,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        let config = Config::from_file(folder.join(CONFIG))?;
        let files = weight_files(folder)?;
        // SAFETY: a map is undefined behaviour where its file changes under it; the documentation
        // rules that out, and `save` replaces files rather than writing into them.
        let tensors = unsafe { MmapedSafetensors::multi(&files)? };
        let variables = Variables {
            tensors,
            vars: vars.clone(),
        };
        let vb = VarBuilder::from_backend(Box::new(variables), dtype, device.clone());
        Self::new(config, vb).map_err(|e| e.with_path(folder))
    }

    /// Saves `config.json` and `model.safetensors` into a folder, which is made if need be, so that
    /// [`Decoder::load`] and Hugging Face transformers can open it.
    ///
    /// Each file is written under another name, flushed to the disk, and then takes the place of the
    /// one before: an interruption at any point leaves every file as it was or as it is to be. A
    /// sharded checkpoint in the same folder is left alone; both loaders prefer `model.safetensors`.
    /// The tokenizer's files are the caller's to copy. Adapters are merged into the weights.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        if !self.adapters().is_empty() {
            return self.merged()?.save(folder);
        }
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|e| Error::from(e).with_path(folder))?;
        let config = Pending::new(folder, CONFIG);
        fs::write(&config.temporary, self.config().json())
            .map_err(|e| Error::from(e).with_path(&config.temporary))?;
        let weights = Pending::new(folder, WEIGHTS);
        // transformers asks for it.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        // Writing reads a tensor's values without a way to fail, so they are fetched before.
        let tensors = self
            .tensors()
            .iter()
            .map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.contiguous()?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        safetensors::serialize_to_file(&tensors, Some(metadata), &weights.temporary)
            .map_err(|e| Error::wrap(e).with_path(&weights.temporary))?;
        // safetensors keeps a file to its owner; this one is as readable as any other.
        fs::metadata(&config.temporary)
            .and_then(|m| fs::set_permissions(&weights.temporary, m.permissions()))
            .map_err(|e| Error::from(e).with_path(&weights.temporary))?;
        config.commit()?;
        weights.commit()
    }
}

/// A file under a temporary name beside its own; dropped before it is committed, it is removed.
pub(super) struct Pending {
    pub temporary: PathBuf,
    path: PathBuf,
}

impl Pending {
    pub fn new(folder: &Path, name: &str) -> Self {
        Self {
            temporary: folder.join(format!(".{name}.{}.tmp", std::process::id())),
            path: folder.join(name),
        }
    }

    pub fn commit(self) -> Result<()> {
        let replace = || -> std::io::Result<()> {
            File::open(&self.temporary)?.sync_all()?;
            fs::rename(&self.temporary, &self.path)?;
            // The new name is on the disk once its folder is; Windows cannot open one.
            #[cfg(unix)]
            if let Some(folder) = self.path.parent() {
                let folder = if folder.as_os_str().is_empty() {
                    Path::new(".")
                } else {
                    folder
                };
                File::open(folder)?.sync_all()?;
            }
            Ok(())
        };
        replace().map_err(|e| Error::from(e).with_path(&self.path))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // After a commit there is nothing left to remove.
        let _ = fs::remove_file(&self.temporary);
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
        bail!(
            "no weights in {}: neither {WEIGHTS} nor {INDEX}",
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

/// Makes a variable of every tensor that is asked for.
struct Variables {
    tensors: MmapedSafetensors,
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
        if !self.contains_tensor(name) {
            bail!("the checkpoint has no tensor {name}")
        }
        self.tensors.load(name, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.get(name).is_ok()
    }
}
