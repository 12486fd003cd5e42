//! Adapters on disk, as Hugging Face peft keeps them.

use super::adapter::{last_name, saved_name, Adapter};
use super::causal_lm::CausalLm;
use super::decoder::Decoder;
use super::staging::Staging;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{bail, DType, Error, Result, Tensor, Var};
use candle_nn::VarMap;
use serde::Deserialize;
use serde_json::{json, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// What of `adapter_config.json` says how the adapters are read.
#[derive(Deserialize)]
struct PeftConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    use_rslora: bool,
    target_modules: Value,
    /// The others: each is refused unless it is null, false or empty.
    #[serde(flatten)]
    others: serde_json::Map<String, Value>,
}

/// Entries that change what an adapter computes, or where it is.
const UNSUPPORTED: [&str; 14] = [
    "alpha_pattern",
    "alora_invocation_tokens",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
];

impl PeftConfig {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| Error::from(e).with_path(path))?;
        let config: Self =
            serde_json::from_str(&text).map_err(|e| Error::wrap(e).with_path(path))?;
        let refuse = |what: String| bail!("{}: {what}", path.display());
        if config.peft_type != "LORA" {
            return refuse(format!("peft_type {:?}, expected LORA", config.peft_type));
        }
        if config.r == 0 {
            return refuse("r must be at least 1, got 0".into());
        }
        if !config.lora_alpha.is_finite() {
            return refuse(format!(
                "lora_alpha must be finite, got {}",
                config.lora_alpha
            ));
        }
        if !(0. ..1.).contains(&config.lora_dropout) {
            return refuse(format!(
                "lora_dropout must be at least 0 and less than 1, got {}",
                config.lora_dropout
            ));
        }
        for (key, value) in &config.others {
            let nothing = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(values) => values.is_empty(),
                Value::Object(values) => values.is_empty(),
                _ => false,
            };
            if !nothing && UNSUPPORTED.contains(&key.as_str()) {
                return refuse(format!(
                    "{key} {value} is not supported: adapters have one rank and alpha, and nothing beside A and B"
                ));
            }
            if key == "bias" && value != "none" {
                return refuse(format!("bias {value} is not supported, expected \"none\""));
            }
        }
        Ok(config)
    }

    fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Whether a module is to have an adapter; `None` where the file alone tells.
    fn targets(&self, module: &str) -> Option<bool> {
        let names = self.target_modules.as_array()?;
        Some(names.iter().filter_map(Value::as_str).any(|target| {
            module
                .strip_suffix(target)
                .is_some_and(|before| before.is_empty() || before.ends_with('.'))
        }))
    }
}

impl Decoder {
    /// This decoder with its weights frozen and the adapters of a folder beside them, in peft's files:
    /// `adapter_config.json`, whose rank, alpha, dropout and `use_rslora` count, and
    /// `adapter_model.safetensors`. They are put into `vars` under their names, to go on training.
    ///
    /// An adapter of another dtype than the weights is f32 (f64 beside f64), and its product is rounded to
    /// the weights' dtype at the end; of the head's, what [`LowRank`](crate::LowRank) says is rounded.
    ///
    /// ```no_run
    /// # use candle_core::{DType, Device};
    /// # use candle_cut_cross_entropy::models::Decoder;
    /// # use candle_nn::VarMap;
    /// # fn main() -> candle_core::Result<()> {
    /// let base = Decoder::load("Qwen2.5-0.5B", &VarMap::new(), DType::BF16, &Device::Cpu)?;
    /// let vars = VarMap::new(); // the adapters
    /// let decoder = base.load_adapters("adapter", &vars)?;
    /// # let _ = decoder;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Files that cannot be read; settings of peft that are not supported; an adapter that is missing,
    /// belongs to no module of this model, or has another shape; a decoder that has adapters already.
    pub fn load_adapters(&self, folder: impl AsRef<Path>, vars: &VarMap) -> Result<Self> {
        if !self.adapters().is_empty() {
            bail!("the decoder has adapters already: save or merge it first")
        }
        let folder = folder.as_ref();
        let config = PeftConfig::read(&folder.join(CONFIG))?;
        let path = folder.join(WEIGHTS);
        // SAFETY: as in `Decoder::load`, the file is not changed meanwhile.
        let file = unsafe { MmapedSafetensors::new(&path) }.map_err(|e| e.with_path(&path))?;
        let names: BTreeSet<String> = file.tensors().into_iter().map(|(name, _)| name).collect();
        let read = RefCell::new(Vec::new());
        let load = |name: String, shape: (usize, usize)| -> Result<Tensor> {
            if !names.contains(&name) {
                bail!("{}: no tensor {name}", path.display())
            }
            let tensor = file.load(&name, self.device())?;
            if tensor.dims() != [shape.0, shape.1] {
                bail!(
                    "{}: {name} has shape {:?}, the model and {CONFIG} ask for {shape:?}",
                    path.display(),
                    tensor.dims()
                )
            }
            let dtype = match (self.dtype(), tensor.dtype()) {
                (ours, theirs) if ours == theirs => ours,
                (DType::F64, _) => DType::F64,
                _ => DType::F32,
            };
            let var = Var::from_tensor(&tensor.to_dtype(dtype)?)?;
            let tensor = var.as_tensor().clone();
            read.borrow_mut().push((name, var));
            Ok(tensor)
        };
        let decoder = self.rebuilt(
            self.config().clone(),
            self.detached(),
            &|module, inputs, outputs| {
                let name = |part: &str| format!("{}.{part}.weight", saved_name(module));
                let stored = names.contains(&name("lora_A")) || names.contains(&name("lora_B"));
                match (config.targets(module), stored) {
                    (Some(false), true) => bail!(
                        "{}: an adapter of {module}, which is not among target_modules",
                        path.display()
                    ),
                    (None | Some(false), false) => return Ok(None),
                    _ => (),
                }
                Ok(Some(Adapter {
                    a: load(name("lora_A"), (config.r, inputs))?,
                    b: load(name("lora_B"), (outputs, config.r))?,
                    scale: config.scale(),
                    dropout: config.lora_dropout,
                    number: 0,
                }))
            },
        )?;
        let read = read.into_inner();
        let used: BTreeSet<&String> = read.iter().map(|(name, _)| name).collect();
        if let Some(name) = names.iter().find(|name| !used.contains(name)) {
            bail!(
                "{}: {name} is an adapter of no module of this model",
                path.display()
            )
        }
        if read.is_empty() {
            bail!("{}: no adapters", path.display())
        }
        match vars.data().lock() {
            Ok(mut vars) => vars.extend(read),
            Err(_) => bail!("the VarMap's lock is poisoned"),
        }
        Ok(decoder)
    }

    /// Saves the adapters alone, as peft does: `adapter_config.json` and `adapter_model.safetensors`, which
    /// [`Decoder::load_adapters`] and peft read. They take the places of those before them as
    /// [`Decoder::save`]'s do.
    ///
    /// The config's `base_model_name_or_path` is [`Decoder::name_or_path`].
    ///
    /// # Errors
    /// A decoder without adapters; a folder or file that cannot be written.
    pub fn save_adapters(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let Some(first) = self.adapters().values().next() else {
            bail!("the decoder has no adapters to save")
        };
        let rank = first.a.dim(0)?;
        let modules = self.adapters().keys();
        let names: BTreeSet<_> = modules.map(|module| last_name(module)).collect();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.name_or_path(),
            "r": rank,
            "lora_alpha": first.scale * rank as f64,
            "target_modules": names,
            "lora_dropout": first.dropout,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
        });
        let staging = Staging::new(folder)?;
        let text = serde_json::to_string_pretty(&config).map_err(Error::wrap)?;
        staging.write(CONFIG, &text)?;
        let tensors =
            self.adapters().iter().flat_map(|(module, adapter)| {
                ["lora_A", "lora_B"].into_iter().zip(adapter.tensors()).map(
                    move |(part, tensor)| (format!("{}.{part}.weight", saved_name(module)), tensor),
                )
            });
        staging.write_tensors(WEIGHTS, tensors, None)?;
        staging.commit(&[WEIGHTS, CONFIG])
    }
}
