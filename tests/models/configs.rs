//! Configs as Hugging Face transformers reads them (configs.json by tests/golden/configs.py).

use crate::common::{assert_close, error, small, with};
use candle_core::{Device, Result, Tensor};
use candle_cut_cross_entropy::models::{Config, Family};
use candle_nn::Module;
use serde_json::{json, Value};
use std::fs;

fn cases() -> Vec<Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/configs.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn entries_mean_what_they_mean_to_transformers() -> Result<()> {
    let cases = cases();
    assert!(cases.len() > 50, "{}", cases.len());
    let texts = |case| ["config", "saved"].map(|text| (case, text));
    for (case, text) in cases.iter().flat_map(texts) {
        let text = case[text].to_string();
        let read = &case["read"];
        let config = Config::from_json(&text)?;
        let softcaps = [config.softcap, config.attention_softcap];
        let windows: Vec<_> = config.layers.iter().map(|layer| layer.window).collect();
        let of_layers: Vec<_> = config.layers.iter().map(|layer| layer.rope).collect();
        let got = json!({
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "softcap": softcaps[0],
            "attention_softcap": softcaps[1],
            "query_key_value_bias": config.query_key_value_bias,
            "attention_output_bias": config.attention_output_bias,
            "mlp_bias": config.mlp_bias,
            "norm_queries_and_keys": config.norm_queries_and_keys,
            "norm_outputs": config.norm_outputs,
            "fused_projections": config.fused_projections,
            "tie_word_embeddings": config.tie_word_embeddings,
            "initializer_range": config.initializer_range,
            "eos_token_ids": config.eos_token_ids,
            "windows": windows,
        });
        for (key, got) in got.as_object().unwrap() {
            assert_eq!(got, &read[key], "{key} of {text}");
        }
        let points = Tensor::new(&[-1.5f64, -0.25, 0.75], &Device::Cpu)?;
        let got = config.activation.forward(&points)?;
        let want = Tensor::new(numbers(&read["activation"]), &Device::Cpu)?;
        assert_close(&format!("activation of {text}"), &got, &want, 1e-6);
        let scale = read["attention_scale"].as_f64().unwrap();
        assert!((config.attention_scale - scale).abs() < 1e-12, "{text}");

        let embedding_scale = config
            .embedding_scale
            .filter(|_| config.family == Family::Granite);
        for (what, got, want) in [
            ("embedding_scale", embedding_scale, &read["embedding_scale"]),
            (
                "residual_scale",
                config.residual_scale,
                &read["residual_scale"],
            ),
            (
                "logit_divisor",
                config.logit_scale.map(|scale| 1. / scale),
                &read["logit_divisor"],
            ),
        ] {
            let (got, want) = (got.unwrap_or(1.), want.as_f64().unwrap_or(1.));
            assert!(
                (got - want).abs() < 1e-12,
                "{what} {got}, want {want}: {text}"
            );
        }

        // Theirs are in another order, and those that no layer uses are left out.
        for (layer, (got, want)) in of_layers
            .iter()
            .zip(read["rope_of_layer"].as_array().unwrap())
            .enumerate()
        {
            assert_eq!(got.is_none(), want.is_null(), "layer {layer} of {text}");
            let (Some(got), Some(want)) = (*got, want.as_u64()) else {
                continue;
            };
            let rope = &config.ropes[got];
            let want = &read["ropes"][want as usize];
            let scale = want["scale"].as_f64().unwrap();
            assert!((rope.scale - scale).abs() < 1e-6, "layer {layer} of {text}");
            for at in want["at"].as_array().unwrap() {
                let time = at[0].as_u64().unwrap() as usize;
                let got = rope.frequencies_at(time);
                assert_eq!(at[1], got.len(), "layer {layer} of {text}");
                for some in at[2].as_array().unwrap() {
                    let got = got[some[0].as_u64().unwrap() as usize];
                    let want = some[1].as_f64().unwrap();
                    let difference = (f64::from(got) - want).abs() / want;
                    assert!(
                        difference < 1e-5,
                        "layer {layer} at {time}: got {got}, want {want}: {text}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_family_has_a_case_without_entries() {
    for family in Family::ALL {
        let alone = json!({"model_type": family.model_type()});
        assert!(cases().iter().any(|case| case["config"] == alone));
    }
}

#[test]
fn what_transformers_would_pass_over_or_fail_at_is_named() {
    let linear = json!({"rope_type": "linear", "factor": 8.0});
    for (model_type, entries, named) in [
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "proportional"}}),
            "\"proportional\", expected one of default, linear, dynamic",
        ),
        (
            "phi3",
            json!({"rope_scaling": {"rope_type": "llama3"}}),
            "\"llama3\" of phi3, expected default or longrope",
        ),
        (
            "llama",
            json!({"rope_scaling": linear, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor 0.5",
        ),
        (
            "qwen3",
            json!({"rope_parameters": {"full_attention": linear}}),
            "by the type of layer",
        ),
        (
            "gemma3_text",
            json!({"rope_parameters": linear}),
            "full_attention and sliding_attention",
        ),
        (
            "mistral",
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "layer_types of mistral",
        ),
        (
            "qwen2",
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            "use_sliding_window",
        ),
        ("gemma2", json!({"sliding_window": null}), "sliding_window"),
        ("llama", json!({"vocab_size": 0}), "vocab_size must be"),
        ("llama", json!({"hidden_size": null}), "hidden_size is null"),
        ("llama", json!({"head_dim": 0}), "head_dim must be"),
        ("llama", json!({"num_key_value_heads": 0}), "num_key_value"),
        ("llama", json!({"rope_theta": -1.0}), "rope_theta"),
        ("llama", json!({"eos_token_id": -1}), "eos_token_id -1"),
        (
            "gemma2",
            json!({"final_logit_softcapping": 0.0}),
            "final_logit_softcapping must be positive",
        ),
        ("gemma2", json!({"hidden_activation": "tanh"}), "\"tanh\""),
        ("llama", json!({"per_layer_config": {}}), "per_layer_config"),
        ("gemma3", json!({}), "needs a text_config"),
        (
            "smollm3",
            json!({"no_rope_layers": [1]}),
            "no_rope_layers has 1 entries",
        ),
        (
            "granite",
            json!({"logits_scaling": 0.0}),
            "logits_scaling must be positive",
        ),
    ] {
        let message = error(Config::from_json(&small(model_type, entries).to_string()));
        assert!(message.contains(named), "{named}: {message}");
    }
    let message = error(Config::from_json("[]"));
    assert!(message.contains("JSON object"), "{message}");
    let message = error(Config::from_json("{}"));
    assert!(
        message.contains("no model_type, expected one of llama"),
        "{message}"
    );
}

#[test]
fn a_config_of_gemma3_becomes_that_of_its_text_model() -> Result<()> {
    let text = json!({"model_type": "gemma3_text", "hidden_size": 64, "sliding_window": 8});
    let whole = json!({
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text, "eos_token_id": [1, 106], "vision_config": {},
    });
    let config = Config::from_json(&whole.to_string())?;
    assert_eq!(config.family, Family::Gemma3);
    assert_eq!(config.eos_token_ids, [1, 106]);
    let saved: Value = serde_json::from_str(config.json()).unwrap();
    let want = with(
        text,
        json!({"architectures": ["Gemma3ForCausalLM"], "eos_token_id": [1, 106], "tie_word_embeddings": true}),
    );
    assert_eq!(saved, want);
    assert_eq!(Config::from_json(config.json())?, config);
    Ok(())
}

/// NTK: theta grows to `theta (factor t / most - (factor - 1))^(d / (d - 2))` at `t` positions.
#[test]
fn dynamic_frequencies_follow_the_length() -> Result<()> {
    let entries = json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 4});
    let config = Config::from_json(&small("llama", entries).to_string())?;
    let rope = &config.ropes[0];
    // theta 100, most 64, d 4: at 128 positions theta is 100 (2 * 2 - 1)^2 = 900.
    for (time, second) in [(64, 0.1), (128, 1. / 30.), (8, 0.1)] {
        let got = rope.frequencies_at(time);
        assert_eq!(got[0], 1.);
        assert!((got[1] - second).abs() < 1e-7, "{time}: {got:?}");
    }
    Ok(())
}

#[test]
fn configs_of_transformers_4_and_5_mean_the_same() -> Result<()> {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    });
    let pairs = [
        (
            "llama",
            json!({"rope_scaling": llama3}),
            json!({"rope_parameters": with(llama3.clone(), json!({"rope_theta": 100.0}))}),
        ),
        (
            "phi3",
            json!({
                "rope_scaling": {"type": "su", "short_factor": [1, 2, 3], "long_factor": [4, 5, 6]},
                "original_max_position_embeddings": 8, "partial_rotary_factor": 0.75,
            }),
            json!({
                "rope_parameters": {
                    "rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75,
                    "short_factor": [1, 2, 3], "long_factor": [4, 5, 6],
                },
                "original_max_position_embeddings": 8,
            }),
        ),
        (
            "gemma3_text",
            json!({
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 50.0,
                "sliding_window_pattern": 2, "sliding_window": 5,
            }),
            json!({
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                },
                "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5,
            }),
        ),
    ];
    for (model_type, old, new) in pairs {
        let old = Config::from_json(&small(model_type, old).to_string())?;
        let new = Config::from_json(&small(model_type, new).to_string())?;
        assert_eq!(old.ropes, new.ropes);
        assert_eq!(old.layers, new.layers);
        assert_eq!(old.eos_token_ids, [2, 7]);
    }
    Ok(())
}

#[test]
fn a_config_that_cannot_be_is_named() {
    for (model_type, entries, named) in [
        (
            "bert",
            json!({}),
            "unsupported model_type \"bert\", expected one of llama, mistral",
        ),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "dynamic"}}),
            "\"dynamic\" needs factor",
        ),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "llama3"}}),
            "\"llama3\" needs factor",
        ),
        (
            "phi3",
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}),
            "long_factor must have 4 entries",
        ),
        (
            "llama",
            json!({"hidden_act": "tanhshrink"}),
            "\"tanhshrink\"",
        ),
        (
            "llama",
            json!({"num_key_value_heads": 3}),
            "num_key_value_heads 3",
        ),
        ("llama", json!({"head_dim": 7}), "head_dim 7"),
        ("llama", json!({"hidden_size": "many"}), "many"),
        (
            "gemma2",
            json!({"layer_types": ["full_attention"]}),
            "layer_types has 1 entries",
        ),
        (
            "gemma2",
            json!({"layer_types": ["full_attention", "linear"]}),
            "\"linear\"",
        ),
        (
            "gemma3_text",
            json!({"use_bidirectional_attention": true}),
            "use_bidirectional_attention",
        ),
        (
            "llama",
            json!({"quantization_config": {"quant_method": "fp8"}}),
            "quantization_config",
        ),
        ("mistral", json!({"sliding_window": 0}), "sliding_window"),
    ] {
        let message = error(Config::from_json(&small(model_type, entries).to_string()));
        assert!(message.contains(named), "{named}: {message}");
    }
    let message = error(Config::from_file("nowhere/config.json"));
    assert!(message.contains("nowhere"), "{message}");
}
