//! A decoder's architecture, read from the `config.json` of a Hugging Face checkpoint.

mod family;
mod layers;

pub use family::Family;

use super::entries::{invalid, Entries};
use super::rope::Rope;
use candle_core::{DType, Error, Result};
use candle_nn::Activation;
use serde_json::{json, Map, Value};
use std::path::Path;
use std::str::FromStr;

/// The name of the file.
pub(super) const CONFIG: &str = "config.json";

/// The architecture of a decoder: what its family and its `config.json` say, in one form for all.
///
/// ```
/// use candle_cut_cross_entropy::models::{Config, Family};
///
/// # fn main() -> candle_core::Result<()> {
/// let config = Config::from_json(
///     r#"{
///         "model_type": "gemma2", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256,
///         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16
///     }"#,
/// )?;
/// assert_eq!(config.family, Family::Gemma2);
/// assert_eq!(config.softcap, Some(30.));
/// assert_eq!(config.layers[0].window, Some(4096));
/// assert_eq!(config.layers[1].window, None);
/// # Ok(())
/// # }
/// ```
///
/// Source: the configuration classes of Hugging Face transformers, for their files of version 4
/// (`rope_theta`, `rope_scaling`) and of version 5 (`rope_parameters`).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// The family.
    pub family: Family,
    /// Classes of the head, rows of the embedding.
    pub vocab_size: usize,
    /// The size of a hidden state.
    pub hidden_size: usize,
    /// The size of the gated MLP's inner vector.
    pub intermediate_size: usize,
    /// The heads of queries.
    pub num_attention_heads: usize,
    /// The heads of keys and values, which divide those of queries.
    pub num_key_value_heads: usize,
    /// The size of a head.
    pub head_dim: usize,
    /// The positions that it was made for; more are no error.
    pub max_position_embeddings: usize,
    /// The activation of the MLP's gate.
    pub activation: Activation,
    /// What is added to the mean square in a norm.
    pub rms_norm_eps: f64,
    /// Norms multiply by `1 + weight` rather than `weight`.
    pub norm_adds_one: bool,
    /// What attention and MLP give is normalised too, before it is added.
    pub norm_outputs: bool,
    /// Each head's query and key are normalised.
    pub norm_queries_and_keys: bool,
    /// What embeddings are multiplied by.
    pub embedding_scale: Option<f64>,
    /// What attention and MLP give is multiplied by, before it is added.
    pub residual_scale: Option<f64>,
    /// What the logits are multiplied by.
    pub logit_scale: Option<f64>,
    /// What the products of queries and keys are multiplied by.
    pub attention_scale: f64,
    /// The soft cap of those products.
    pub attention_softcap: Option<f64>,
    /// The soft cap of the logits.
    pub softcap: Option<f64>,
    /// Queries, keys and values have biases.
    pub query_key_value_bias: bool,
    /// The attention's output has a bias.
    pub attention_output_bias: bool,
    /// The MLP's projections have biases.
    pub mlp_bias: bool,
    /// The projections of one input are stored as one tensor: `qkv_proj`, `gate_up_proj`.
    pub fused_projections: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// The rotary embeddings that the layers choose from.
    pub ropes: Vec<Rope>,
    /// What differs from layer to layer.
    pub layers: Vec<LayerConfig>,
    /// The standard deviation of new weights.
    pub initializer_range: f64,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The file, which a saved checkpoint takes along.
    json: String,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerConfig {
    /// How many positions a position sees, itself the last of them; `None`: all before it.
    pub window: Option<usize>,
    /// Which of [`Config::ropes`] turns queries and keys; `None`: they are not turned.
    pub rope: Option<usize>,
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// An absent entry has its family's default, as in transformers; so have sizes. A null means none,
    /// where there can be none.
    ///
    /// # Errors
    /// No JSON, an entry of the wrong type, an unknown `model_type`, an unsupported activation, rope
    /// type or quantisation, sizes that do not fit together: each is named.
    pub fn from_json(json: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(json).or_else(|e| invalid(e.to_string()))?;
        let Value::Object(object) = value else {
            return invalid("expected a JSON object".into());
        };
        match object.get("model_type").and_then(Value::as_str) {
            Some("gemma3") => {
                let text = text_of_gemma3(&object)?;
                let json = serde_json::to_string_pretty(&text).map_err(Error::wrap)?;
                Self::from_entries(Entries(&text), json)
            }
            _ => Self::from_entries(Entries(&object), json.to_owned()),
        }
    }

    fn from_entries(entries: Entries, json: String) -> Result<Self> {
        let Some(name) = entries.value("model_type").and_then(Value::as_str) else {
            return invalid(format!(
                "no model_type, expected one of {}",
                Family::ALL.map(Family::model_type).join(", ")
            ));
        };
        let family = Family::from_str(name)?;
        let defaults = family.defaults();
        if entries.value("use_bidirectional_attention") == Some(&Value::Bool(true)) {
            return invalid("use_bidirectional_attention: the decoder is causal".into());
        }
        if entries.value("quantization_config").is_some() {
            return invalid(
                "quantization_config: weights are read as f32, bf16, f16 or f64, not quantised"
                    .into(),
            );
        }
        if entries.value("per_layer_config").is_some() {
            return invalid("per_layer_config: the layers have one shape".into());
        }
        let hidden_size = entries.size("hidden_size", defaults.hidden_size)?;
        let heads = entries.size("num_attention_heads", defaults.num_attention_heads)?;
        let key_value_heads = entries
            .optional_size("num_key_value_heads", defaults.num_key_value_heads)?
            .unwrap_or(heads);
        if !heads.is_multiple_of(key_value_heads) {
            return invalid(format!(
                "num_key_value_heads {key_value_heads} does not divide num_attention_heads {heads}"
            ));
        }
        let head_dim = match entries.optional_size("head_dim", defaults.head_dim)? {
            Some(head_dim) => head_dim,
            None => hidden_size / heads,
        };
        let soft = matches!(family, Family::Gemma2 | Family::Gemma3);
        let attention_scale = match family {
            Family::Gemma2 | Family::Gemma3 => {
                1. / entries.number("query_pre_attn_scalar", 256.)?.sqrt()
            }
            Family::Granite => entries.number("attention_multiplier", 1.)?,
            _ => 1. / (head_dim as f64).sqrt(),
        };
        let of_granite = |key: &str| match family {
            Family::Granite => {
                let scale = entries.number(key, 1.)?;
                Ok::<_, Error>(Some(scale).filter(|&scale| scale != 1.))
            }
            _ => Ok(None),
        };
        let softcap = |key: &str, default: f64| {
            let default = (family == Family::Gemma2).then_some(default);
            entries.optional_number(key, default)
        };
        let attention_bias = match family {
            Family::Qwen2 | Family::Mistral | Family::Phi3 => false,
            _ => entries.or("attention_bias", false)?,
        };
        let max_position_embeddings =
            entries.size("max_position_embeddings", defaults.max_position_embeddings)?;
        let ropes = layers::ropes(family, &entries, head_dim, max_position_embeddings)?;
        let last_rope = ropes.len() - 1;
        let count = entries.size("num_hidden_layers", defaults.num_hidden_layers)?;
        let layers = layers::windows(family, &entries, count)?
            .into_iter()
            .zip(layers::turned(family, &entries, count)?)
            .map(|(window, turned)| LayerConfig {
                window,
                rope: turned.then_some(if window.is_some() { last_rope } else { 0 }),
            })
            .collect();
        Ok(Self {
            family,
            vocab_size: entries.size("vocab_size", defaults.vocab_size)?,
            hidden_size,
            intermediate_size: entries.size("intermediate_size", defaults.intermediate_size)?,
            num_attention_heads: heads,
            num_key_value_heads: key_value_heads,
            head_dim,
            max_position_embeddings,
            activation: activation(family, &entries)?,
            rms_norm_eps: entries.number("rms_norm_eps", defaults.rms_norm_eps)?,
            norm_adds_one: family.is_gemma(),
            norm_outputs: soft,
            norm_queries_and_keys: matches!(family, Family::Qwen3 | Family::Gemma3),
            embedding_scale: match family.is_gemma() {
                true => Some((hidden_size as f64).sqrt()),
                false => of_granite("embedding_multiplier")?,
            },
            residual_scale: of_granite("residual_multiplier")?,
            logit_scale: of_granite("logits_scaling")?.map(|divisor| 1. / divisor),
            attention_scale,
            attention_softcap: match family {
                Family::Gemma2 => softcap("attn_logit_softcapping", 50.)?,
                _ => None,
            },
            softcap: match soft {
                true => softcap("final_logit_softcapping", 30.)?,
                false => None,
            },
            query_key_value_bias: attention_bias || family == Family::Qwen2,
            attention_output_bias: attention_bias,
            mlp_bias: match family {
                Family::Llama | Family::SmolLm3 | Family::Granite => {
                    entries.or("mlp_bias", false)?
                }
                _ => false,
            },
            fused_projections: family == Family::Phi3,
            tie_word_embeddings: entries.or("tie_word_embeddings", defaults.tie_word_embeddings)?,
            ropes,
            layers,
            initializer_range: entries.or("initializer_range", 0.02)?,
            eos_token_ids: token_ids(&entries, defaults.eos_token_id)?,
            json,
        })
    }

    /// Reads a `config.json`.
    ///
    /// # Errors
    /// A file that cannot be read; those of [`Config::from_json`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let json = std::fs::read_to_string(path).map_err(|e| Error::from(e).with_path(path))?;
        Self::from_json(&json).map_err(|e| e.with_path(path))
    }

    /// The text it was read from; of a `gemma3` checkpoint, that of its text model alone.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// The text for weights of this dtype: transformers loads them as it says.
    pub(super) fn json_for(&self, dtype: DType) -> Result<String> {
        let name = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::F32 => "float32",
            DType::F64 => "float64",
            other => return invalid(format!("weights of dtype {other:?}")),
        };
        // transformers 4 reads the first, transformers 5 the second before the first.
        self.with_entries(json!({"torch_dtype": name, "dtype": name}))
    }

    /// The same with a head of its own.
    pub(super) fn untied(&self) -> Result<Self> {
        Self::from_json(&self.with_entries(json!({"tie_word_embeddings": false}))?)
    }

    fn with_entries(&self, entries: Value) -> Result<String> {
        let mut value: Value = serde_json::from_str(&self.json).map_err(Error::wrap)?;
        for (key, entry) in entries.as_object().into_iter().flatten() {
            value[key] = entry.clone();
        }
        serde_json::to_string_pretty(&value).map_err(Error::wrap)
    }
}

/// The config of the text model in a `gemma3` checkpoint. What stands beside `text_config` counts for
/// the whole model.
fn text_of_gemma3(object: &Map<String, Value>) -> Result<Map<String, Value>> {
    let mut text = match object.get("text_config") {
        Some(Value::Object(text)) => text.clone(),
        _ => {
            return invalid(
                "model_type gemma3 needs a text_config; the text model alone is gemma3_text".into(),
            )
        }
    };
    // The whole model's own default, whatever the text_config says.
    text.insert("tie_word_embeddings".into(), true.into());
    for key in [
        "tie_word_embeddings",
        "quantization_config",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "torch_dtype",
        "dtype",
    ] {
        if let Some(value) = object.get(key) {
            text.insert(key.into(), value.clone());
        }
    }
    text.insert("model_type".into(), "gemma3_text".into());
    text.insert("architectures".into(), json!(["Gemma3ForCausalLM"]));
    Ok(text)
}

fn activation(family: Family, entries: &Entries) -> Result<Activation> {
    let (key, default) = match family {
        Family::Gemma => ("hidden_act", "gelu_pytorch_tanh"),
        Family::Gemma2 | Family::Gemma3 => ("hidden_activation", "gelu_pytorch_tanh"),
        _ => ("hidden_act", "silu"),
    };
    let name: String = entries.or(key, default.to_owned())?;
    Ok(match name.as_str() {
        "silu" | "swish" => Activation::Silu,
        // Gemma's first configs say gelu and mean its approximation.
        "gelu" if family == Family::Gemma => Activation::GeluPytorchTanh,
        "gelu" | "gelu_python" => Activation::Gelu,
        // One formula, by five names.
        "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_new" | "gelu_fast" | "gelu_accurate" => {
            Activation::GeluPytorchTanh
        }
        "relu" => Activation::Relu,
        _ => {
            return invalid(format!(
                "unsupported {key} {name:?}, expected one of silu, gelu, gelu_pytorch_tanh, relu"
            ))
        }
    })
}

/// One token or a list of them.
fn token_ids(entries: &Entries, default: Option<u32>) -> Result<Vec<u32>> {
    let one = |value: &Value| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(id),
        None => invalid(format!("eos_token_id {value} is no token")),
    };
    match entries.0.get("eos_token_id") {
        None => Ok(default.into_iter().collect()),
        Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(id) => Ok(vec![one(id)?]),
    }
}
