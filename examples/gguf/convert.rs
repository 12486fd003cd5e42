//! The architecture and the weights of a GGUF in the names and the layout of Hugging Face.

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Tensor};
use candle_cut_cross_entropy::models::{Config, Decoder};
use candle_nn::VarBuilder;
use serde_json::{json, Map};
use std::collections::HashMap;
use std::f64::consts::PI;
use std::io::{Read, Seek};

/// GGUF's name of an architecture, transformers' `model_type`, and the stem of its class.
const ARCHITECTURES: [(&str, &str, &str); 6] = [
    ("llama", "llama", "Llama"),
    ("qwen2", "qwen2", "Qwen2"),
    ("qwen3", "qwen3", "Qwen3"),
    ("gemma", "gemma", "Gemma"),
    ("gemma2", "gemma2", "Gemma2"),
    ("gemma3", "gemma3_text", "Gemma3"),
];

/// The factors that llama.cpp divides rotary frequencies by, Llama 3's scaling.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The metadata of a file.
pub struct Metadata<'a>(pub &'a HashMap<String, Value>);

impl Metadata<'_> {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            &Value::Bool(flag) => Some(flag),
            _ => None,
        }
    }

    pub fn number(&self, key: &str) -> Option<f64> {
        number(self.get(key)?)
    }

    pub fn size(&self, key: &str) -> Option<usize> {
        Some(self.get(key)?.to_u64().ok()? as usize)
    }

    pub fn list(&self, key: &str) -> Result<&[Value]> {
        match self.get(key) {
            Some(Value::Array(values)) => Ok(values),
            _ => bail!("the GGUF has no list {key}"),
        }
    }

    pub fn texts(&self, key: &str) -> Result<Vec<&str>> {
        fn text<'a>(key: &str, value: &'a Value) -> Result<&'a str> {
            match value {
                Value::String(text) => Ok(text),
                _ => bail!("{key} has an entry that is no text: {value:?}"),
            }
        }
        self.list(key)?
            .iter()
            .map(|value| text(key, value))
            .collect()
    }

    fn architecture(&self) -> Result<(&'static str, &'static str, &'static str)> {
        let name = self
            .text("general.architecture")
            .context("the GGUF does not name its general.architecture")?;
        ARCHITECTURES
            .into_iter()
            .find(|(known, ..)| *known == name)
            .with_context(|| {
                let known = ARCHITECTURES.map(|(known, ..)| known).join(", ");
                format!("architecture {name:?} is not supported, expected one of {known}")
            })
    }
}

pub fn number(value: &Value) -> Option<f64> {
    match *value {
        Value::F32(x) => Some(shortest(x)),
        Value::F64(x) => Some(x),
        Value::I8(x) => Some(x.into()),
        Value::I16(x) => Some(x.into()),
        Value::I32(x) => Some(x.into()),
        Value::I64(x) => Some(x as f64),
        _ => value.to_u64().ok().map(|x| x as f64),
    }
}

/// The number that a file meant by its rounding to f32: 1e-5, not 9.999999747378752e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x.into())
}

/// The `config.json` that describes the file to transformers.
fn config<R: Read + Seek>(content: &Content, reader: &mut R, dtype: DType) -> Result<String> {
    let metadata = Metadata(&content.metadata);
    let (architecture, model_type, class) = metadata.architecture()?;
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| {
        let key = key(name);
        let missing = || format!("the GGUF has no number {key}");
        metadata.size(&key).with_context(missing)
    };
    let number = |name: &str| metadata.number(&key(name));

    let (hidden, layers) = (size("embedding_length")?, size("block_count")?);
    let heads = size("attention.head_count")?;
    ensure!(heads > 0, "{} is 0", key("attention.head_count"));
    let head_dim = match metadata.size(&key("attention.key_length")) {
        Some(head_dim) => head_dim,
        None => hidden / heads,
    };
    if let Some(turned) = metadata.size(&key("rope.dimension_count")) {
        ensure!(
            turned == head_dim,
            "{turned} of {head_dim} dimensions of a head are rotated: only all of them are supported"
        );
    }
    let vocab = content
        .tensor_infos
        .get("token_embd.weight")
        .context("the GGUF has no tensor token_embd.weight")?
        .shape
        .dims2()?
        .0;
    let epsilon = "attention.layer_norm_rms_epsilon";
    let mut config = Map::new();
    let mut set = |name: &str, value: serde_json::Value| config.insert(name.to_owned(), value);
    set("architectures", json!([format!("{class}ForCausalLM")]));
    set("model_type", model_type.into());
    set(
        "dtype",
        if dtype == DType::F32 {
            "float32"
        } else {
            "bfloat16"
        }
        .into(),
    );
    set("vocab_size", vocab.into());
    set("hidden_size", hidden.into());
    set("intermediate_size", size("feed_forward_length")?.into());
    set("num_hidden_layers", layers.into());
    set("num_attention_heads", heads.into());
    let key_value_heads = metadata.size(&key("attention.head_count_kv"));
    set(
        "num_key_value_heads",
        key_value_heads.unwrap_or(heads).into(),
    );
    set("head_dim", head_dim.into());
    set("max_position_embeddings", size("context_length")?.into());
    let missing = || format!("the GGUF has no number {}", key(epsilon));
    set(
        "rms_norm_eps",
        number(epsilon).with_context(missing)?.into(),
    );
    set("rope_theta", number("rope.freq_base").unwrap_or(1e4).into());
    let tied = !content.tensor_infos.contains_key("output.weight");
    set("tie_word_embeddings", tied.into());
    set(
        "attention_bias",
        content
            .tensor_infos
            .contains_key("blk.0.attn_q.bias")
            .into(),
    );
    if architecture == "llama" {
        set(
            "mlp_bias",
            content
                .tensor_infos
                .contains_key("blk.0.ffn_up.bias")
                .into(),
        );
    }
    if let Some(scaling) = rope_scaling(content, reader, architecture)? {
        set("rope_scaling", scaling);
    }
    if architecture == "gemma2" || architecture == "gemma3" {
        set("sliding_window", size("attention.sliding_window")?.into());
        // The file does not say it: the models of 27 billion parameters, known by their layers, have
        // another scale than that of their heads.
        let of_27b =
            (architecture, layers) == ("gemma2", 46) || (architecture, layers) == ("gemma3", 62);
        let scale = if of_27b { hidden / heads } else { head_dim };
        set("query_pre_attn_scalar", scale.into());
        let softcap = |name| number(name).map_or(serde_json::Value::Null, Into::into);
        set("attn_logit_softcapping", softcap("attn_logit_softcapping"));
        set(
            "final_logit_softcapping",
            softcap("final_logit_softcapping"),
        );
    }
    if architecture == "gemma3" {
        set("rope_local_base_freq", 1e4.into());
        set("sliding_window_pattern", 6.into());
    }
    let id = |name: &str| metadata.size(&format!("tokenizer.ggml.{name}_token_id"));
    if let Some(bos) = id("bos") {
        set("bos_token_id", bos.into());
    }
    match (id("eos"), id("eot").filter(|eot| Some(*eot) != id("eos"))) {
        (Some(eos), Some(eot)) => set("eos_token_id", json!([eos, eot])),
        (Some(eos), None) => set("eos_token_id", eos.into()),
        (None, _) => None,
    };
    Ok(serde_json::to_string_pretty(&config)?)
}

/// How the rotary frequencies are scaled, in the words of `config.json`.
fn rope_scaling<R: Read + Seek>(
    content: &Content,
    reader: &mut R,
    architecture: &str,
) -> Result<Option<serde_json::Value>> {
    let metadata = Metadata(&content.metadata);
    let key = |name: &str| format!("{architecture}.rope.{name}");
    if content.tensor_infos.contains_key(ROPE_FACTORS) {
        let factors = content.tensor(reader, ROPE_FACTORS, &Device::Cpu)?;
        let factors: Vec<f32> = factors.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        let theta = metadata.number(&key("freq_base")).unwrap_or(1e4);
        return Ok(Some(llama3_scaling(&factors, theta)?));
    }
    match metadata.text(&key("scaling.type")) {
        None | Some("none") => Ok(None),
        Some("linear") => {
            let factor = metadata.number(&key("scaling.factor"));
            let factor =
                factor.with_context(|| format!("the GGUF has no {}", key("scaling.factor")))?;
            Ok(Some(json!({"rope_type": "linear", "factor": factor})))
        }
        Some(other) => bail!("rope scaling {other:?} is not supported, expected none or linear"),
    }
}

/// The parameters of the `llama3` scaling that has these factors. The file does not have them: all of Llama 3.1 to 3.3
/// have those below and differ in the largest factor.
pub fn llama3_scaling(factors: &[f32], theta: f64) -> Result<serde_json::Value> {
    const LOW: f64 = 1.;
    const HIGH: f64 = 4.;
    const ORIGINAL: f64 = 8192.;
    let largest = factors.iter().copied().fold(1f32, f32::max) as f64;
    for (i, &factor) in factors.iter().enumerate() {
        let turns = ORIGINAL * theta.powf(-(i as f64) / factors.len() as f64) / (2. * PI);
        let keep = ((turns - LOW) / (HIGH - LOW)).clamp(0., 1.);
        let expected = 1. / ((1. - keep) / largest + keep);
        ensure!(
            (f64::from(factor) / expected - 1.).abs() < 1e-3,
            "{ROPE_FACTORS} is not the scaling of Llama 3: factor {i} is {factor}, expected {expected}"
        );
    }
    Ok(json!({
        "rope_type": "llama3", "factor": largest, "low_freq_factor": LOW, "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL as usize,
    }))
}

/// The name of a tensor in a checkpoint of Hugging Face.
fn name(architecture: &str, name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    let stem = match stem {
        "token_embd" => "model.embed_tokens".to_owned(),
        "output_norm" => "model.norm".to_owned(),
        "output" => "lm_head".to_owned(),
        _ => {
            let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
            let norms_outputs = architecture == "gemma2" || architecture == "gemma3";
            let part = match part {
                "attn_norm" => "input_layernorm",
                "attn_q" => "self_attn.q_proj",
                "attn_k" => "self_attn.k_proj",
                "attn_v" => "self_attn.v_proj",
                "attn_output" => "self_attn.o_proj",
                "attn_q_norm" => "self_attn.q_norm",
                "attn_k_norm" => "self_attn.k_norm",
                "ffn_norm" if norms_outputs => "pre_feedforward_layernorm",
                "ffn_norm" | "post_attention_norm" => "post_attention_layernorm",
                "post_ffw_norm" => "post_feedforward_layernorm",
                "ffn_gate" => "mlp.gate_proj",
                "ffn_up" => "mlp.up_proj",
                "ffn_down" => "mlp.down_proj",
                _ => return None,
            };
            format!("model.layers.{layer}.{part}")
        }
    };
    Some(format!("{stem}.{kind}"))
}

/// llama.cpp rotates neighbours, transformers the two halves of a head: within each head, row `2i` goes back to `i` and
/// row `2i + 1` to `i + half`.
fn halves(rows: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let shape = rows.shape();
    let (all, columns) = (rows.dim(0)?, rows.elem_count() / rows.dim(0)?.max(1));
    rows.reshape((heads, all / heads / 2, 2, columns))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape(shape)
}

/// The decoder that a file describes, with its weights dequantised.
pub fn decoder<R: Read + Seek>(content: &Content, reader: &mut R, dtype: DType) -> Result<Decoder> {
    let (architecture, ..) = Metadata(&content.metadata).architecture()?;
    let config = Config::from_json(&config(content, reader, dtype)?)?;
    let mut tensors = HashMap::new();
    for given in content
        .tensor_infos
        .keys()
        .filter(|name| *name != ROPE_FACTORS)
    {
        let name = name(architecture, given)
            .with_context(|| format!("tensor {given} is not of a known {architecture} model"))?;
        let tensor = content
            .tensor(reader, given, &Device::Cpu)
            .and_then(|quantised| quantised.dequantize(&Device::Cpu))
            .with_context(|| format!("reading tensor {given}"))?;
        let tensor = match architecture {
            "llama" if given.contains(".attn_q.") => halves(&tensor, config.num_attention_heads)?,
            "llama" if given.contains(".attn_k.") => halves(&tensor, config.num_key_value_heads)?,
            // Where a norm multiplies by 1 + weight, the file has the sum.
            _ if config.norm_adds_one && given.ends_with("norm.weight") => (tensor - 1.)?,
            _ => tensor,
        };
        tensors.insert(name, tensor.to_dtype(dtype)?);
    }
    let mut unread: Vec<String> = tensors.keys().cloned().collect();
    let decoder = Decoder::new(
        config,
        VarBuilder::from_tensors(tensors, dtype, &Device::Cpu),
    )?;
    unread.retain(|name| !decoder.tensors().contains_key(name));
    ensure!(
        unread.is_empty(),
        "the model has no use for {}",
        unread.join(", ")
    );
    Ok(decoder)
}
