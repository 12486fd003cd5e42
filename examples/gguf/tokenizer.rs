//! The tokenizer of a GGUF as the `tokenizer.json` and `tokenizer_config.json` of Hugging Face.

use super::convert::{number, Metadata};
use anyhow::{bail, Context, Result};
use serde_json::{json, Map, Value};
use std::collections::HashMap;

/// SentencePiece's sign for a space.
const SPACE: &str = "▁";

/// GGUF's kinds of tokens that a text is searched for as a whole: control tokens and those of the user.
const CONTROL: f64 = 3.;
const USER_DEFINED: f64 = 4.;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The two files.
///
/// # Errors
/// A kind of tokenizer, or a way of splitting texts, that is not known.
pub fn files(metadata: &Metadata) -> Result<(Value, Value)> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let model = metadata.text(&key("model")).unwrap_or("none");
    let of_spaces = |token: &str| model == "llama" && token.bytes().all(|byte| byte == b' ');
    let tokens = metadata.texts(&key("tokens"))?;
    // llama.cpp writes SentencePiece's sign for a space as a space in the tokens of users.
    let marked: Vec<String> = (tokens.iter())
        .map(|token| match of_spaces(token) {
            true => token.replace(' ', SPACE),
            false => (*token).to_owned(),
        })
        .collect();
    let tokens: Vec<&str> = marked.iter().map(String::as_str).collect();
    let kinds = metadata.list(&key("token_type"))?;
    let added: Vec<Value> = (tokens.iter().zip(kinds).enumerate())
        .filter_map(|(id, (token, kind))| {
            let kind = number(kind)?;
            (kind == CONTROL || kind == USER_DEFINED).then(|| {
                json!({"id": id, "content": token, "special": kind == CONTROL, "normalized": false,
                       "single_word": false, "lstrip": false, "rstrip": false})
            })
        })
        .collect();
    let token = |name: &str| {
        let id = metadata.size(&key(&format!("{name}_token_id")))?;
        Some((id, *tokens.get(id)?))
    };
    let pre = metadata.text(&key("pre")).unwrap_or("default");
    let (mut json, begins) = match model {
        "gpt2" => (byte_level(metadata, &tokens, pre)?, pre == "llama-bpe"),
        "llama" => {
            let unknown = token("unknown").map(|(_, token)| token);
            (sentence_piece(metadata, &tokens, unknown), true)
        }
        _ => bail!("tokenizer {model:?} is not supported, expected gpt2 or llama"),
    };
    json["version"] = "1.0".into();
    json["truncation"] = Value::Null;
    json["padding"] = Value::Null;
    json["added_tokens"] = added.into();

    let ends = metadata.flag(&key("add_eos_token")).unwrap_or(false);
    let begins = metadata.flag(&key("add_bos_token")).unwrap_or(begins);
    let of_text = |id: &str, kind: u8| json!({"SpecialToken": {"id": id, "type_id": kind}});
    let (mut single, mut pair, mut special) = (Vec::new(), Vec::new(), Map::new());
    let around = |name: &str, wanted: bool| token(name).filter(|_| wanted);
    for (text, kind) in [("A", 0), ("B", 1)] {
        let mut parts = Vec::new();
        if let Some((_, bos)) = around("bos", begins) {
            parts.push(of_text(bos, kind));
        }
        parts.push(json!({"Sequence": {"id": text, "type_id": kind}}));
        if let Some((_, eos)) = around("eos", ends) {
            parts.push(of_text(eos, kind));
        }
        if kind == 0 {
            single.clone_from(&parts);
        }
        pair.extend(parts);
    }
    for (id, token) in [around("bos", begins), around("eos", ends)]
        .into_iter()
        .flatten()
    {
        let entry = json!({"id": token, "ids": [id], "tokens": [token]});
        special.insert(token.to_owned(), entry);
    }
    json["post_processor"] = match special.is_empty() {
        true => Value::Null,
        false => json!({
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special
        }),
    };

    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    for (ours, theirs) in [
        ("bos", "bos"),
        ("eos", "eos"),
        ("unknown", "unk"),
        ("padding", "pad"),
    ] {
        if let Some((_, token)) = token(ours) {
            config[format!("{theirs}_token")] = token.into();
        }
    }
    if let Some(template) = metadata.text("tokenizer.chat_template") {
        config["chat_template"] = template.into();
    }
    Ok((json, config))
}

fn vocabulary<'a>(tokens: &[&'a str]) -> HashMap<&'a str, usize> {
    let numbered = tokens.iter().enumerate();
    numbered.map(|(id, token)| (*token, id)).collect()
}

/// The BPE over bytes of GPT-2 and what came after it.
fn byte_level(metadata: &Metadata, tokens: &[&str], pre: &str) -> Result<Value> {
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let splitters = match pre {
        "gpt-2" => vec![bytes(true)],
        "smollm" => vec![json!({"type": "Digits", "individual_digits": true}), bytes(true)],
        "llama-bpe" => vec![split(LLAMA3), bytes(false)],
        "qwen2" => vec![split(QWEN2), bytes(false)],
        _ => bail!(
            "texts split as {pre:?} are not supported, expected gpt-2, smollm, llama-bpe or qwen2: give --tokenizer"
        ),
    };
    let merges = metadata.texts("tokenizer.ggml.merges")?;
    let merges = merges.iter().map(|merge| {
        merge
            .split_once(' ')
            .with_context(|| format!("merge {merge:?} is not two tokens"))
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    Ok(json!({
        "normalizer": if pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters},
        "decoder": bytes(true),
        "model": {
            "type": "BPE", "vocab": vocabulary(tokens), "merges": merges, "ignore_merges": pre == "llama-bpe",
            "byte_fallback": false, "fuse_unk": false, "unk_token": null, "dropout": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
        },
    }))
}

/// SentencePiece's BPE, which numbers its tokens in the order of their merges.
fn sentence_piece(metadata: &Metadata, tokens: &[&str], unknown: Option<&str>) -> Value {
    let ids = vocabulary(tokens);
    let mut merges = Vec::new();
    for token in tokens {
        for (at, _) in token.char_indices().rev().filter(|(at, _)| *at > 0) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((left, right));
            }
        }
    }

    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let prefix = metadata
        .flag("tokenizer.ggml.add_space_prefix")
        .unwrap_or(true);
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let mut normalizers = vec![spaces];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "vocab": vocabulary(tokens), "merges": merges, "ignore_merges": false,
            "byte_fallback": true, "fuse_unk": true, "unk_token": unknown, "dropout": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
        },
    })
}
