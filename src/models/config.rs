//! A decoder's architecture, read from the `config.json` of a Hugging Face checkpoint.

use super::rope::{Parameters, Rope};
use candle_core::{Error, Result};
use candle_nn::Activation;
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;
use std::str::FromStr;

/// The families of decoders, known by the `model_type` of their `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// `llama`: Llama 1 to 3.
    Llama,
    /// `mistral`: Llama with a sliding window.
    Mistral,
    /// `phi3`: Phi-3 and Phi-4, whose projections are stored fused.
    Phi3,
    /// `qwen2`: Qwen 1.5 to 2.5, with biases on queries, keys and values.
    Qwen2,
    /// `qwen3`: Qwen 3 (dense), with normalised queries and keys.
    Qwen3,
    /// `gemma`: Gemma 1.
    Gemma,
    /// `gemma2`: Gemma 2, with soft caps, alternating windows, and norms on both sides.
    Gemma2,
    /// `gemma3_text`: the text model of Gemma 3, with a rotary embedding for local layers and one for
    /// global ones.
    Gemma3,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 8] = [
        Family::Llama,
        Family::Mistral,
        Family::Phi3,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma,
        Family::Gemma2,
        Family::Gemma3,
    ];

    /// The `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Phi3 => "phi3",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma => "gemma",
            Family::Gemma2 => "gemma2",
            Family::Gemma3 => "gemma3_text",
        }
    }

    fn is_gemma(self) -> bool {
        matches!(self, Family::Gemma | Family::Gemma2 | Family::Gemma3)
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.model_type())
    }
}

impl FromStr for Family {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match Family::ALL.into_iter().find(|f| f.model_type() == name) {
            Some(family) => Ok(family),
            None => invalid(format!(
                "unknown model_type {name:?}, expected one of {}",
                Family::ALL.map(Family::model_type).join(", ")
            )),
        }
    }
}

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
    /// Which of [`Config::ropes`] turns queries and keys.
    pub rope: usize,
}

/// `config.json` as it is written.
#[derive(Debug, Deserialize)]
struct File {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    initializer_range: Option<f64>,
    sliding_window: Option<usize>,
    sliding_window_pattern: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    query_pre_attn_scalar: Option<f64>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    use_bidirectional_attention: Option<bool>,
    quantization_config: Option<Value>,
    rope_theta: Option<f64>,
    rope_local_base_freq: Option<f64>,
    partial_rotary_factor: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    eos_token_id: Option<Value>,
}

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// No JSON, a missing entry or one of the wrong type, an unknown `model_type`, an unsupported
    /// activation, rope type or quantisation, sizes that do not fit together: each is named.
    pub fn from_json(json: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(json).or_else(|e| invalid(e.to_string()))?;
        if let Some(name) = value.get("model_type").and_then(Value::as_str) {
            Family::from_str(name)?;
        }
        let file: File =
            serde_json::from_value(value.clone()).or_else(|e| invalid(e.to_string()))?;
        // An entry that is not there has its family's default; one that is null has none.
        let absent = |key: &str| value.get(key).is_none();
        let family = Family::from_str(&file.model_type)?;

        let heads = file.num_attention_heads;
        let key_value_heads = file.num_key_value_heads.unwrap_or(heads);
        if heads == 0 || key_value_heads == 0 || !heads.is_multiple_of(key_value_heads) {
            return invalid(format!(
                "num_key_value_heads {key_value_heads} does not divide num_attention_heads {heads}"
            ));
        }
        let head_dim = file.head_dim.unwrap_or(match family {
            Family::Gemma | Family::Gemma2 | Family::Gemma3 => 256,
            Family::Qwen3 => 128,
            _ => file.hidden_size / heads,
        });
        if file.use_bidirectional_attention == Some(true) {
            return invalid("use_bidirectional_attention: the decoder is causal".into());
        }
        if file.quantization_config.is_some() {
            return invalid("quantization_config: quantised weights are not read".into());
        }
        let soft = matches!(family, Family::Gemma2 | Family::Gemma3);
        let query_scale = match soft {
            true => file.query_pre_attn_scalar.unwrap_or(256.),
            false => head_dim as f64,
        };
        let softcap = |value: Option<f64>, key: &str, default: f64| match family {
            Family::Gemma2 if absent(key) => Some(default),
            Family::Gemma2 | Family::Gemma3 => value,
            _ => None,
        };
        let attention_bias = file.attention_bias.unwrap_or(false);
        let default_window = match family {
            Family::Mistral | Family::Gemma2 | Family::Gemma3 if absent("sliding_window") => {
                Some(4096)
            }
            _ => file.sliding_window,
        };
        if default_window == Some(0) {
            return invalid("sliding_window must be positive".into());
        }
        let ropes = ropes(family, &file, head_dim)?;
        let last_rope = ropes.len() - 1;
        let layers = sliding_layers(family, &file)?
            .into_iter()
            .map(|sliding| LayerConfig {
                window: default_window.filter(|_| sliding),
                rope: if sliding { last_rope } else { 0 },
            })
            .collect();
        Ok(Self {
            family,
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            num_attention_heads: heads,
            num_key_value_heads: key_value_heads,
            head_dim,
            activation: activation(family, &file)?,
            rms_norm_eps: file.rms_norm_eps.unwrap_or(match family {
                Family::Phi3 => 1e-5,
                _ => 1e-6,
            }),
            norm_adds_one: family.is_gemma(),
            norm_outputs: soft,
            norm_queries_and_keys: matches!(family, Family::Qwen3 | Family::Gemma3),
            embedding_scale: family
                .is_gemma()
                .then_some((file.hidden_size as f64).sqrt()),
            attention_scale: 1. / query_scale.sqrt(),
            attention_softcap: match family {
                Family::Gemma2 => {
                    softcap(file.attn_logit_softcapping, "attn_logit_softcapping", 50.)
                }
                _ => None,
            },
            softcap: softcap(file.final_logit_softcapping, "final_logit_softcapping", 30.),
            query_key_value_bias: match family {
                Family::Qwen2 => true,
                Family::Mistral | Family::Phi3 => false,
                _ => attention_bias,
            },
            attention_output_bias: match family {
                Family::Qwen2 | Family::Mistral | Family::Phi3 => false,
                _ => attention_bias,
            },
            mlp_bias: family == Family::Llama && file.mlp_bias.unwrap_or(false),
            fused_projections: family == Family::Phi3,
            tie_word_embeddings: file.tie_word_embeddings.unwrap_or(family.is_gemma()),
            ropes,
            layers,
            initializer_range: file.initializer_range.unwrap_or(0.02),
            eos_token_ids: token_ids(file.eos_token_id.as_ref()),
            json: json.to_owned(),
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

    /// The text it was read from.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// The same with a head of its own.
    pub(super) fn untied(&self) -> Result<Self> {
        let mut value: Value = serde_json::from_str(&self.json).map_err(Error::wrap)?;
        value["tie_word_embeddings"] = false.into();
        let json = serde_json::to_string_pretty(&value).map_err(Error::wrap)?;
        Self::from_json(&json)
    }
}

/// Which layers see a window only.
fn sliding_layers(family: Family, file: &File) -> Result<Vec<bool>> {
    let n = file.num_hidden_layers;
    let alternating = |pattern: usize| (0..n).map(|i| (i + 1) % pattern.max(1) != 0).collect();
    let own = match family {
        Family::Llama | Family::Gemma => return Ok(vec![false; n]),
        Family::Mistral | Family::Phi3 => return Ok(vec![true; n]),
        Family::Qwen2 | Family::Qwen3 => {
            if file.use_sliding_window != Some(true) {
                return Ok(vec![false; n]);
            }
            let first = file.max_window_layers.unwrap_or(28);
            (0..n).map(|i| i >= first).collect()
        }
        Family::Gemma2 => alternating(2),
        Family::Gemma3 => alternating(file.sliding_window_pattern.unwrap_or(6)),
    };
    let Some(types) = &file.layer_types else {
        return Ok(own);
    };
    if types.len() != n {
        return invalid(format!(
            "layer_types has {} entries for num_hidden_layers {n}",
            types.len()
        ));
    }
    types
        .iter()
        .map(|layer| match layer.as_str() {
            SLIDING => Ok(true),
            FULL => Ok(false),
            _ => invalid(format!(
                "unsupported layer type {layer:?}, expected {FULL} or {SLIDING}"
            )),
        })
        .collect()
}

/// The rotary embedding of the layers that see everything and, in Gemma 3, that of the others.
fn ropes(family: Family, file: &File, head_dim: usize) -> Result<Vec<Rope>> {
    let max_positions = file.max_position_embeddings.unwrap_or(match family {
        Family::Phi3 => 4096,
        Family::Gemma | Family::Gemma2 => 8192,
        Family::Gemma3 | Family::Mistral => 131_072,
        Family::Qwen2 | Family::Qwen3 => 32_768,
        Family::Llama => 2048,
    });
    let read = |value: Option<&Value>| match value {
        None | Some(Value::Null) => Ok(Parameters::default()),
        Some(value) => Parameters::deserialize(value)
            .or_else(|e| invalid(format!("rope parameters {value}: {e}"))),
    };
    let given = file.rope_parameters.as_ref().or(file.rope_scaling.as_ref());
    let of = |layers: &str| {
        let nested = given.is_some_and(|v| v.get(FULL).is_some() || v.get(SLIDING).is_some());
        match nested {
            true => given.and_then(|v| v.get(layers)),
            // Gemma 3's flat parameters are those of its global layers.
            false => given.filter(|_| layers == FULL),
        }
    };
    let rope = |layers: &str, theta: f64| {
        let mut parameters = read(of(layers))?;
        if parameters.partial_rotary_factor.is_none() {
            parameters.partial_rotary_factor = file.partial_rotary_factor;
        }
        if family == Family::Phi3 {
            // Phi-3 keeps it outside, and called its scaling "yarn" at first.
            parameters.original_max_position_embeddings =
                Some(file.original_max_position_embeddings.unwrap_or(4096));
            for name in [&mut parameters.rope_type, &mut parameters.old_type] {
                if name.as_deref() == Some("yarn") {
                    *name = Some("longrope".into());
                }
            }
        }
        Rope::new(&parameters, theta, head_dim, max_positions)
    };
    Ok(match family {
        Family::Gemma3 => vec![
            rope(FULL, file.rope_theta.unwrap_or(1e6))?,
            rope(SLIDING, file.rope_local_base_freq.unwrap_or(1e4))?,
        ],
        _ => vec![rope(FULL, file.rope_theta.unwrap_or(1e4))?],
    })
}

fn activation(family: Family, file: &File) -> Result<Activation> {
    let name = match family.is_gemma() {
        true => file.hidden_activation.as_ref().or(file.hidden_act.as_ref()),
        false => file.hidden_act.as_ref(),
    };
    let name = name.map_or(
        match family.is_gemma() {
            true => "gelu_pytorch_tanh",
            false => "silu",
        },
        String::as_str,
    );
    Ok(match name {
        "silu" | "swish" => Activation::Silu,
        // Gemma's first configs say gelu and mean its approximation.
        "gelu" if family == Family::Gemma => Activation::GeluPytorchTanh,
        "gelu" => Activation::Gelu,
        "gelu_pytorch_tanh" | "gelu_new" => Activation::GeluPytorchTanh,
        "relu" => Activation::Relu,
        _ => {
            return invalid(format!(
            "unsupported activation {name:?}, expected one of silu, gelu, gelu_pytorch_tanh, relu"
        ))
        }
    })
}

/// One token or a list of them.
fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(one).collect(),
        Some(id) => one(id).into_iter().collect(),
        None => Vec::new(),
    }
}

pub(super) fn invalid<T>(message: String) -> Result<T> {
    Err(Error::Msg(format!("model config: {message}")))
}
