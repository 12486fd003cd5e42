//! The example `gguf`, on files that are written here as llama.cpp writes them.

#[path = "../../examples/gguf/convert.rs"]
mod convert;
#[path = "../../examples/gguf/tokenizer.rs"]
mod tokenizer;

use crate::common::{assert_close, expected, load, load_as, values};
use candle_core::quantized::gguf_file::{write, Content, Value as Entry};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder};
use serde_json::{json, Value};
use std::collections::HashMap;
use std::io::Cursor;
use tokenizers::Tokenizer;

/// The names of Hugging Face in those of GGUF.
const NAMES: [(&str, &str); 16] = [
    ("model.layers.", "blk."),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The order of rows that llama.cpp gives queries and keys: the halves of each head interleaved.
fn interleaved(rows: usize, head_dim: usize) -> Vec<u32> {
    let old = |row: usize| {
        let (head, k) = (row / head_dim, row % head_dim);
        head * head_dim + k % 2 * (head_dim / 2) + k / 2
    };
    (0..rows).map(|row| old(row) as u32).collect()
}

fn metadata(architecture: &str, config: &Config) -> HashMap<String, Entry> {
    let file: Value = serde_json::from_str(config.json()).unwrap();
    let size = |value: usize| Entry::U32(value as u32);
    let mut entries = HashMap::from([
        (
            "general.architecture".to_owned(),
            Entry::String(architecture.to_owned()),
        ),
        ("tokenizer.ggml.eos_token_id".to_owned(), Entry::U32(2)),
    ]);
    for (name, value) in [
        ("embedding_length", size(config.hidden_size)),
        ("block_count", size(config.layers.len())),
        ("feed_forward_length", size(config.intermediate_size)),
        ("context_length", size(64)),
        ("attention.head_count", size(config.num_attention_heads)),
        ("attention.head_count_kv", size(config.num_key_value_heads)),
        ("attention.key_length", size(config.head_dim)),
        (
            "attention.layer_norm_rms_epsilon",
            Entry::F32(config.rms_norm_eps as f32),
        ),
        ("attention.sliding_window", size(5)),
        (
            "rope.freq_base",
            Entry::F32(
                file["rope_parameters"]["rope_theta"]
                    .as_f64()
                    .unwrap_or(1e4) as f32,
            ),
        ),
    ] {
        entries.insert(format!("{architecture}.{name}"), value);
    }
    entries
}

/// A golden checkpoint as a GGUF.
fn file(case: &str) -> Result<Vec<u8>> {
    let (decoder, _) = load(case)?;
    let config = decoder.config();
    let mut tensors = Vec::new();
    for (name, weight) in decoder.tensors() {
        let mut weight = weight.clone();
        if case == "llama" && (name.contains("q_proj") || name.contains("k_proj")) {
            let order = interleaved(weight.dim(0)?, config.head_dim);
            weight = weight.index_select(&Tensor::new(order, &Device::Cpu)?, 0)?;
        }
        if case.starts_with("gemma") && name.ends_with("norm.weight") {
            weight = (weight + 1.)?;
        }
        let norms_outputs = case == "gemma2" || case == "gemma3";
        let after = if norms_outputs {
            "post_attention_norm"
        } else {
            "ffn_norm"
        };
        let mut name = name.replace("post_attention_layernorm", after);
        for (theirs, ours) in NAMES {
            name = name.replace(theirs, ours);
        }
        tensors.push((name, QTensor::quantize(&weight, GgmlDType::F32)?));
    }
    let metadata = metadata(case, config);
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut bytes = Cursor::new(Vec::new());
    write(&mut bytes, &metadata, &tensors)?;
    Ok(bytes.into_inner())
}

fn read(case: &str, dtype: DType) -> anyhow::Result<Decoder> {
    let mut reader = Cursor::new(file(case)?);
    let content = Content::read(&mut reader)?;
    convert::decoder(&content, &mut reader, dtype)
}

#[test]
fn a_gguf_has_the_weights_of_its_checkpoint() -> anyhow::Result<()> {
    for case in ["llama", "qwen2", "gemma", "gemma2", "gemma3"] {
        let (got, (want, _)) = (read(case, DType::BF16)?, load_as(case, DType::BF16)?);
        assert_eq!(got.tensors().len(), want.tensors().len(), "{case}");
        for (name, want) in want.tensors() {
            assert_eq!(
                values(&got.tensors()[name])?,
                values(want)?,
                "{case}: {name}"
            );
        }
        assert_eq!(got.config().eos_token_ids, [2], "{case}");
        assert_eq!(got.config().family, want.config().family);
    }
    Ok(())
}

#[test]
fn a_gguf_has_the_logits_of_its_checkpoint() -> anyhow::Result<()> {
    for case in ["llama", "gemma"] {
        let (decoder, expected) = (read(case, DType::F32)?, expected(case)?);
        let logits = decoder.logits(&decoder.hidden_states(&expected["ids"])?)?;
        assert_close(case, &logits, &expected["logits"], 1e-5);
    }
    Ok(())
}

#[test]
fn a_gguf_of_another_architecture_is_refused() -> anyhow::Result<()> {
    let mut bytes = file("llama")?;
    let at = bytes
        .windows(5)
        .position(|bytes| bytes == b"llama")
        .unwrap();
    // The first may be that of a key.
    let at = match bytes[at + 5] {
        b'.' => {
            at + 5
                + bytes[at + 5..]
                    .windows(9)
                    .position(|b| b == b"\x05\0\0\0\0\0\0\0l")
                    .unwrap()
                + 8
        }
        _ => at,
    };
    bytes[at..at + 5].copy_from_slice(b"mamba");
    let mut reader = Cursor::new(bytes);
    let content = Content::read(&mut reader)?;
    let error = convert::decoder(&content, &mut reader, DType::F32)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "architecture \"mamba\" is not supported, expected one of llama, qwen2, qwen3, gemma, gemma2, gemma3"
    );
    Ok(())
}

#[test]
fn the_scaling_of_llama_3_is_known_by_its_factors() {
    // llama.cpp's, in wavelengths.
    let factor = |i: i32| {
        let wavelength = 2. * std::f64::consts::PI * 500_000f64.powf(f64::from(i) / 32.);
        if wavelength < 8192. / 4. {
            1.
        } else if wavelength > 8192. {
            32.
        } else {
            let smooth = (8192. / wavelength - 1.) / 3.;
            1. / ((1. - smooth) / 32. + smooth)
        }
    };
    let mut factors: Vec<f32> = (0..32).map(|i| factor(i) as f32).collect();
    let scaling = convert::llama3_scaling(&factors, 5e5).unwrap();
    let expected = json!({
        "rope_type": "llama3", "factor": 32., "low_freq_factor": 1., "high_freq_factor": 4.,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(scaling, expected);
    factors[16] *= 1.1;
    let error = convert::llama3_scaling(&factors, 5e5)
        .unwrap_err()
        .to_string();
    assert!(error.contains("factor 16 is"), "{error}");
}

/// The tokens of a text, special ones included.
fn encode(entries: &[(&str, Entry)], text: &str) -> anyhow::Result<Vec<String>> {
    let entries: HashMap<String, Entry> = (entries.iter())
        .map(|(name, entry)| (format!("tokenizer.ggml.{name}"), entry.clone()))
        .collect();
    let (json, config) = tokenizer::files(&convert::Metadata(&entries))?;
    assert_eq!(config["bos_token"], "<s>");
    let tokenizer = Tokenizer::from_bytes(json.to_string()).map_err(anyhow::Error::from_boxed)?;
    let encoding = tokenizer
        .encode(text, true)
        .map_err(anyhow::Error::from_boxed)?;
    let decoded = tokenizer
        .decode(encoding.get_ids(), true)
        .map_err(anyhow::Error::from_boxed)?;
    assert_eq!(decoded, text.replace("<s>", ""));
    Ok(encoding.get_tokens().to_vec())
}

fn texts(list: &[&str]) -> Entry {
    Entry::Array(
        list.iter()
            .map(|text| Entry::String((*text).to_owned()))
            .collect(),
    )
}

fn kinds(list: &[i32]) -> Entry {
    Entry::Array(list.iter().map(|kind| Entry::I32(*kind)).collect())
}

#[test]
fn byte_level_tokens_are_split_as_the_file_says() -> anyhow::Result<()> {
    let entries = |pre: &str| {
        [
            ("model", Entry::String("gpt2".into())),
            ("pre", Entry::String(pre.into())),
            ("tokens", texts(&["<s>", "a", "1", "Ġ", "Ġa", "11"])),
            ("token_type", kinds(&[3, 1, 1, 1, 1, 1])),
            ("merges", texts(&["Ġ a", "1 1"])),
            ("bos_token_id", Entry::U32(0)),
        ]
    };
    assert_eq!(
        encode(&entries("gpt-2"), "a<s> a11")?,
        ["a", "<s>", "Ġa", "11"]
    );
    assert_eq!(
        encode(&entries("smollm"), "a<s> a11")?,
        ["a", "<s>", "Ġa", "1", "1"]
    );
    // Llama 3's begins texts, even where the file does not say so.
    assert_eq!(encode(&entries("llama-bpe"), "a11")?, ["<s>", "a", "11"]);
    let error = encode(&entries("tekken"), "a").unwrap_err().to_string();
    assert!(
        error.starts_with("texts split as \"tekken\" are not supported"),
        "{error}"
    );
    Ok(())
}

#[test]
fn tokens_of_sentence_piece_merge_in_the_order_of_their_numbers() -> anyhow::Result<()> {
    let entries = |prefix: bool| {
        [
            ("model", Entry::String("llama".into())),
            (
                "tokens",
                texts(&["<unk>", "<s>", "▁", "a", "b", "ab", "  ", "▁a", "<0x21>"]),
            ),
            ("token_type", kinds(&[2, 3, 1, 1, 1, 1, 4, 1, 6])),
            ("unknown_token_id", Entry::U32(0)),
            ("bos_token_id", Entry::U32(1)),
            ("add_space_prefix", Entry::Bool(prefix)),
        ]
    };
    // "ab" before "▁a"; bytes stand in for what has no token; two spaces are one token.
    assert_eq!(
        encode(&entries(true), "ab a!")?,
        ["<s>", "▁", "ab", "▁a", "<0x21>"]
    );
    assert_eq!(encode(&entries(false), "ab  a")?, ["<s>", "ab", "▁▁", "a"]);
    Ok(())
}
