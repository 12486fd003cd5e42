//! The decoder: its gradients and configs.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder, Family};
use candle_cut_cross_entropy::{Options, Preset};
use candle_nn::{VarBuilder, VarMap};
use serde_json::{json, Value};

fn exact() -> Options {
    Options::preset(Preset::CceExact)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

#[track_caller]
fn error<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.to_string(),
    }
}

#[track_caller]
fn assert_gradients(case: &str, decoder: &Decoder, gradients: &GradStore) {
    for (name, tensor) in decoder.tensors() {
        let gradient = gradients
            .get(tensor)
            .unwrap_or_else(|| panic!("{case}: {name} has no gradient"));
        let norm = norm(gradient).unwrap_or_else(|e| panic!("{case}: {name}: {e}"));
        assert!(
            norm.is_finite() && norm > 0.,
            "{case}: the gradient of {name} has norm {norm}"
        );
    }
}

fn norm(tensor: &Tensor) -> Result<f64> {
    Ok(values(tensor)?.iter().map(|x| x * x).sum::<f64>().sqrt())
}

// Gradients

#[test]
fn every_new_weight_of_every_family_gets_a_gradient() -> Result<()> {
    for family in Family::ALL {
        let config = Config::from_json(&small(family.model_type(), json!({})).to_string())?;
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let decoder = Decoder::new(config, vb)?;
        assert_eq!(vars.all_vars().len(), decoder.tensors().len());
        let ids = Tensor::new(&[[3u32, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], &Device::Cpu)?;
        let loss = decoder.loss(&ids, &ids, &exact())?.loss;
        assert_gradients(family.model_type(), &decoder, &loss.backward()?);
    }
    Ok(())
}

#[test]
fn a_position_sees_its_window_and_nothing_after_it() -> Result<()> {
    // One layer, so that a window is not carried on by the next.
    let window = json!({"sliding_window": 3, "num_hidden_layers": 1});
    let config = Config::from_json(&small("mistral", window).to_string())?;
    let vars = VarMap::new();
    let decoder = Decoder::new(
        config,
        VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu),
    )?;
    let states = |ids: [u32; 8]| -> Result<Vec<Vec<f32>>> {
        let ids = Tensor::new(&[ids], &Device::Cpu)?;
        decoder.hidden_states(&ids)?.squeeze(0)?.to_vec2()
    };
    let before = states([1, 2, 3, 4, 5, 6, 7, 8])?;
    let after = states([1, 2, 9, 4, 5, 6, 7, 8])?;
    let changed: Vec<usize> = (0..8).filter(|&t| before[t] != after[t]).collect();
    assert_eq!(changed, [2, 3, 4]);
    Ok(())
}

// Configs

/// A small config in the form of transformers 4, with these entries put in.
fn small(model_type: &str, entries: Value) -> Value {
    let config = json!({
        "model_type": model_type, "vocab_size": 32, "hidden_size": 32, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "rope_theta": 100.0, "eos_token_id": [2, 7],
    });
    with(config, entries)
}

fn with(mut config: Value, entries: Value) -> Value {
    for (key, value) in entries.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
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
fn an_absent_entry_has_its_familys_default_and_a_null_has_none() -> Result<()> {
    let read = |model_type, entries| Config::from_json(&small(model_type, entries).to_string());
    let gemma2 = read("gemma2", json!({}))?;
    assert_eq!(gemma2.softcap, Some(30.));
    assert_eq!(gemma2.attention_softcap, Some(50.));
    assert!(gemma2.tie_word_embeddings);
    let null = json!({"final_logit_softcapping": null, "attn_logit_softcapping": null});
    let gemma2 = read("gemma2", null)?;
    assert_eq!((gemma2.softcap, gemma2.attention_softcap), (None, None));
    let windows = |config: Config| config.layers.iter().map(|l| l.window).collect::<Vec<_>>();
    assert_eq!(windows(read("mistral", json!({}))?), [Some(4096); 2]);
    assert_eq!(
        windows(read("mistral", json!({"sliding_window": null}))?),
        [None; 2]
    );
    // Qwen's configs have a window that they do not use.
    assert_eq!(
        windows(read("qwen2", json!({"sliding_window": 4}))?),
        [None; 2]
    );
    Ok(())
}

#[test]
fn a_config_that_cannot_be_is_named() {
    for (model_type, entries, named) in [
        (
            "bert",
            json!({}),
            "unknown model_type \"bert\", expected one of llama, mistral",
        ),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
            "\"dynamic\"",
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
        ("mistral", json!({"sliding_window": 0}), "sliding_window"),
    ] {
        let message = error(Config::from_json(&small(model_type, entries).to_string()));
        assert!(message.contains(named), "{named}: {message}");
    }
    let message = error(Config::from_json(r#"{"model_type": "llama"}"#));
    assert!(message.contains("vocab_size"), "{message}");
    let message = error(Config::from_file("nowhere/config.json"));
    assert!(message.contains("nowhere"), "{message}");
}
