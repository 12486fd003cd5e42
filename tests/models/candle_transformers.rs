//! The decoder and the loss against candle-transformers.

use crate::common::{assert_close, exact, expected, folder, load, small, with};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::WithHead;
use candle_cut_cross_entropy::models::{generate, CausalLm, Config, Decoder, Sampling};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::smol::smollm3;
use candle_transformers::models::{
    gemma, gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3, qwen3_moe,
};
use serde_json::{json, Value};
use std::fs;

/// A case's config with entries that candle-transformers has as well.
fn config(case: &str, entries: Value) -> Result<Value> {
    let text = fs::read_to_string(folder(case).join("config.json"))?;
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config.as_object_mut().unwrap().remove("rope_parameters");
    Ok(with(config, entries))
}

fn read<T: serde::de::DeserializeOwned>(config: &Value, entries: Value) -> T {
    serde_json::from_value(with(config.clone(), entries)).unwrap()
}

fn weights(tensors: &std::collections::BTreeMap<String, Tensor>) -> VarBuilder<'static> {
    let tensors = tensors.iter().map(|(n, t)| (n.clone(), t.clone()));
    VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu)
}

/// The logits of every position of `forward`, which gives those of the last.
fn assert_same(
    case: &str,
    config: &Value,
    mut forward: impl FnMut(&VarBuilder, &Tensor) -> Result<Tensor>,
) -> Result<()> {
    let (decoder, _) = load(case)?;
    let vb = weights(decoder.tensors());
    let decoder = Decoder::new(Config::from_json(&config.to_string())?, vb.clone())?;
    let ids = expected(case)?["ids"].clone();
    let logits = decoder.logits(&decoder.hidden_states(&ids)?)?;
    for time in 1..=ids.dim(1)? {
        let theirs = forward(&vb, &ids.narrow(1, 0, time)?)?;
        let ours = logits.narrow(1, time - 1, 1)?;
        assert_close(&format!("{case} at {time}"), &ours, &theirs, 1e-4);
    }
    Ok(())
}

#[test]
fn logits_are_those_of_candle_transformers() -> Result<()> {
    let device = Device::Cpu;

    // It has no head_dim of its own in Llama, so that no case fits.
    let plain = small(
        "llama",
        json!({"rms_norm_eps": 1e-6, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }}),
    );
    let theirs: llama::LlamaConfig = read(&plain, json!({}));
    let theirs = theirs.into_config(false);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let decoder = Decoder::new(Config::from_json(&plain.to_string())?, vb.clone())?;
    for var in vars.all_vars() {
        var.set(&var.randn_like(0., 0.3)?)?;
    }
    let ids = expected("llama")?["ids"].clone();
    let logits = decoder.logits(&decoder.hidden_states(&ids)?)?;
    let model = llama::Llama::load(vb, &theirs)?;
    for time in 1..=ids.dim(1)? {
        let mut cache = llama::Cache::new(false, DType::F32, &theirs, &device)?;
        let theirs = model.forward(&ids.narrow(1, 0, time)?, 0, &mut cache)?;
        let ours = logits.narrow(1, time - 1, 1)?;
        assert_close(&format!("llama at {time}"), &ours, &theirs, 1e-4);
    }

    // A window of candle-transformers' is one wider than transformers'.
    let mistral = config("mistral", json!({"rope_theta": 10000.0}))?;
    let theirs: mistral::Config = read(
        &mistral,
        json!({"sliding_window": 4, "use_flash_attn": false}),
    );
    assert_same("mistral", &mistral, |vb, ids| {
        mistral::Model::new(&theirs, vb.clone())?.forward(ids, 0)
    })?;

    // It has no window in Phi-3 and Qwen 3, one for all layers in Qwen 2 and Gemma 2, a longrope of
    // its own, no yarn, and scales queries by head_dim in Gemma 2 and 3.
    let phi3 = config("phi3", json!({"rope_theta": 100.0, "sliding_window": null}))?;
    let theirs: phi3::Config = read(&phi3, json!({}));
    assert_same("phi3", &phi3, |vb, ids| {
        phi3::Model::new(&theirs, vb.clone())?.forward(ids, 0)
    })?;

    let qwen2 = config(
        "qwen2",
        json!({"rope_theta": 10000.0, "use_sliding_window": false, "sliding_window": 64,
            "layer_types": null}),
    )?;
    let theirs: qwen2::Config = read(&qwen2, json!({}));
    assert_same("qwen2", &qwen2, |vb, ids| {
        qwen2::ModelForCausalLM::new(&theirs, vb.clone())?.forward(ids, 0)
    })?;

    let qwen3 = config("qwen3", json!({"rope_theta": 1000.0}))?;
    let theirs: qwen3::Config = read(&qwen3, json!({}));
    assert_same("qwen3", &qwen3, |vb, ids| {
        qwen3::ModelForCausalLM::new(&theirs, vb.clone())?.forward(ids, 0)
    })?;

    let gemma = config("gemma", json!({"rope_theta": 10000.0}))?;
    let theirs: gemma::Config = read(&gemma, json!({}));
    assert_same("gemma", &gemma, |vb, ids| {
        gemma::Model::new(false, &theirs, vb.clone())?.forward(ids, 0)
    })?;

    let gemma2 = config(
        "gemma2",
        json!({"rope_theta": 10000.0, "sliding_window": 64, "query_pre_attn_scalar": 8}),
    )?;
    let theirs: gemma2::Config = read(&gemma2, json!({}));
    assert_same("gemma2", &gemma2, |vb, ids| {
        gemma2::Model::new(false, &theirs, vb.clone())?.forward(ids, 0)
    })?;

    let gemma3 = config(
        "gemma3",
        json!({"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "sliding_window": 64,
            "query_pre_attn_scalar": 8}),
    )?;
    let theirs: gemma3::Config = read(&gemma3, json!({"sliding_window_pattern": 2}));
    assert_same("gemma3", &gemma3, |vb, ids| {
        // Its cache takes several heads only a token at a time.
        let mut model = gemma3::Model::new(false, &theirs, vb.clone())?;
        let last = ids.dim(1)? - 1;
        for t in 0..last {
            model.forward(&ids.narrow(1, t, 1)?, t)?;
        }
        model.forward(&ids.narrow(1, last, 1)?, last)
    })
}

#[test]
fn models_that_show_their_hidden_states_give_a_loss() -> Result<()> {
    let expected = expected("qwen3")?;
    let (ids, labels) = (&expected["ids"], &expected["labels"]);
    let (decoder, _) = load("qwen3")?;
    let vb = weights(decoder.tensors());
    let config = config("qwen3", json!({"rope_theta": 1000.0}))?;
    let decoder = Decoder::new(Config::from_json(&config.to_string())?, vb.clone())?;
    let head = decoder.head_weight()?;
    let model = qwen3::Model::new(&read(&config, json!({})), vb.clone())?;
    let model = WithHead::new(model, head);
    // Twice, so that a cache of the first would show.
    for _ in 0..2 {
        let theirs = model.loss(ids, labels, &exact())?.loss;
        let ours = decoder.loss(ids, labels, &exact())?.loss;
        assert_close("qwen3 loss", &theirs, &ours, 1e-5);
    }
    let sampling = Sampling {
        max_new_tokens: 5,
        ..Sampling::default()
    };
    assert_eq!(
        generate(&model, &[5, 6], &sampling)?,
        generate(&decoder, &[5, 6], &sampling)?
    );

    let base = small(
        "any",
        json!({
            "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": false,
            "attention_bias": false, "sliding_window": 64, "max_window_layers": 2,
            "use_sliding_window": false, "decoder_sparse_step": 1, "moe_intermediate_size": 16,
            "num_experts_per_tok": 2, "num_experts": 4, "norm_topk_prob": true, "eos_token_id": 2,
        }),
    );
    let last = |logits: Tensor| logits.squeeze(1);

    let vars = VarMap::new();
    let random = || VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config: qwen2::Config = read(&base, json!({}));
    let whole = qwen2::ModelForCausalLM::new(&config, random())?.forward(ids, 0)?;
    // Its ModelForCausalLM takes a head only where one is stored: here the embedding.
    let tied = random().get((32, 32), "model.embed_tokens.weight")?;
    let model = WithHead::new(qwen2::Model::new(&config, random())?, tied);
    assert_close("qwen2", &model.next_token_logits(ids)?, &last(whole)?, 1e-5);

    let vars = VarMap::new();
    let random = || VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config: qwen3_moe::Config = read(&base, json!({}));
    let whole = qwen3_moe::ModelForCausalLM::new(&config, random())?.forward(ids, 0)?;
    let own_head = random().get((32, 32), "lm_head.weight")?;
    let model = WithHead::new(qwen3_moe::Model::new(&config, random())?, own_head);
    assert_close(
        "qwen3_moe",
        &model.next_token_logits(ids)?,
        &last(whole)?,
        1e-5,
    );

    let vars = VarMap::new();
    let random = || VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config: smollm3::Config = read(&base, json!({}));
    let whole = smollm3::ModelForCausalLM::new(&config, random())?.forward(ids, 0)?;
    let own_head = random().get((32, 32), "lm_head.weight")?;
    let model = WithHead::new(smollm3::Model::new(&config, random())?, own_head);
    assert_close(
        "smollm3",
        &model.next_token_logits(ids)?,
        &last(whole)?,
        1e-5,
    );
    Ok(())
}
