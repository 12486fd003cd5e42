//! Adapters in the files of peft.

use crate::common::{error, exact, folder, load, load_as, values, Scratch};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::backward;
use candle_cut_cross_entropy::models::{CausalLm, Decoder, Lora};
use candle_nn::VarMap;
use serde_json::{json, Value};
use std::collections::HashMap;
use std::fs;

const RANK: usize = 4;
const MODULE: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// Adapters of `q_proj` in both layers as peft keeps them, in f32.
fn written(scratch: &Scratch, base: &Decoder, entries: Value) -> Result<HashMap<String, Tensor>> {
    let mut config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 6,
        "target_modules": ["q_proj"], "lora_dropout": 0.1, "bias": "none", "use_rslora": false,
        "fan_in_fan_out": false, "modules_to_save": null, "rank_pattern": {}, "use_dora": false,
        "base_model_name_or_path": "somewhere", "inference_mode": true,
    });
    for (key, value) in entries.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(scratch.0.join("adapter_config.json"), config.to_string())?;
    let mut tensors = HashMap::new();
    for layer in 0..2 {
        let weight = &base.tensors()[&format!("model.layers.{layer}.self_attn.q_proj.weight")];
        let (outputs, inputs) = weight.dims2()?;
        for (part, shape) in [("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))] {
            let name =
                format!("base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight");
            tensors.insert(name, Tensor::randn(0f32, 0.3, shape, &Device::Cpu)?);
        }
    }
    save(scratch, &tensors)?;
    Ok(tensors)
}

fn save(scratch: &Scratch, tensors: &HashMap<String, Tensor>) -> Result<()> {
    candle_core::safetensors::save(tensors, scratch.0.join("adapter_model.safetensors"))
}

/// `W + scale B A` of the first layer's `q_proj`, in f64.
fn by_hand(base: &Decoder, tensors: &HashMap<String, Tensor>, scale: f64) -> Result<Tensor> {
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F64);
    let weight = &base.tensors()["model.layers.0.self_attn.q_proj.weight"];
    let product = wide(&tensors[&format!("{MODULE}.lora_B.weight")])?
        .matmul(&wide(&tensors[&format!("{MODULE}.lora_A.weight")])?)?;
    wide(weight)? + (product * scale)?
}

#[test]
fn rank_alpha_and_rslora_are_those_of_the_file() -> Result<()> {
    let (base, _weights) = load("llama")?;
    // 6 / 4, and 6 / sqrt(4).
    for (entries, scale) in [
        (json!({}), 1.5),
        (json!({"use_rslora": true}), 3.),
        (json!({"target_modules": ["self_attn.q_proj"]}), 1.5),
        (json!({"target_modules": ".*q_proj"}), 1.5),
    ] {
        let scratch = Scratch::new("peft");
        let tensors = written(&scratch, &base, entries)?;
        let vars = VarMap::new();
        let decoder = base.load_adapters(&scratch.0, &vars)?;
        assert_eq!(vars.all_vars().len(), 4);
        let merged = decoder.merged()?;
        let got = values(&merged.tensors()["model.layers.0.self_attn.q_proj.weight"])?;
        for (got, want) in got.iter().zip(values(&by_hand(&base, &tensors, scale)?)?) {
            assert!((got - want).abs() < 1e-5, "got {got}, want {want}");
        }
        // The forward is that of the merged weights, and saved adapters mean the same.
        let ids = Tensor::new(&[[1u32, 5, 9, 2]], &Device::Cpu)?;
        let states = values(&decoder.hidden_states(&ids)?)?;
        for (got, want) in states.iter().zip(values(&merged.hidden_states(&ids)?)?) {
            assert!((got - want).abs() < 1e-4, "got {got}, want {want}");
        }
        let again = Scratch::new("peft-again");
        decoder.save_adapters(&again.0)?;
        let again = base.load_adapters(&again.0, &VarMap::new())?;
        assert_eq!(values(&again.hidden_states(&ids)?)?, states);
    }
    Ok(())
}

#[test]
fn f32_adapters_on_a_bf16_base_stay_f32() -> Result<()> {
    let (base, _weights) = load_as("llama", DType::BF16)?;
    let scratch = Scratch::new("peft-f32");
    let tensors = written(&scratch, &base, json!({}))?;
    let vars = VarMap::new();
    let mut decoder = base.load_adapters(&scratch.0, &vars)?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        assert_eq!(values(var)?, values(&tensors[name])?, "{name}");
    }
    let ids = Tensor::new(&[[1u32, 5, 9, 2]], &Device::Cpu)?;
    assert_eq!(decoder.hidden_states(&ids)?.dtype(), DType::BF16);
    for checkpointing in [false, true] {
        decoder.set_gradient_checkpointing(checkpointing);
        let gradients = backward(&decoder.loss(&ids, &ids, &exact())?.loss)?;
        for (name, var) in vars.data().lock().unwrap().iter() {
            let gradient = gradients.get(var).expect(name);
            assert_eq!(gradient.dtype(), DType::F32);
            assert!(values(gradient)?.iter().any(|g| *g != 0.), "{name}");
        }
    }
    // One rounding to bf16, of the sum.
    let got = decoder.merged()?.tensors()["model.layers.0.self_attn.q_proj.weight"].clone();
    assert_eq!(got.dtype(), DType::BF16);
    for (got, want) in values(&got)?
        .iter()
        .zip(values(&by_hand(&base, &tensors, 1.5)?)?)
    {
        assert!(
            (got - want).abs() <= want.abs() / 256. + 1e-6,
            "got {got}, want {want}"
        );
    }
    Ok(())
}

#[test]
fn an_adapter_of_the_head_in_f32_trains_beside_a_bf16_base() -> Result<()> {
    let (base, _weights) = load_as("gemma", DType::BF16)?;
    let (rows, columns) = base.head_weight()?.dims2()?;
    let scratch = Scratch::new("peft-head");
    written(&scratch, &base, json!({"target_modules": ["lm_head"]}))?;
    let tensors = HashMap::from([("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))])
        .into_iter()
        .map(|(part, shape)| {
            let tensor = Tensor::randn(0f32, 0.3, shape, &Device::Cpu)?;
            Ok((format!("base_model.model.lm_head.{part}.weight"), tensor))
        })
        .collect::<Result<HashMap<_, _>>>()?;
    save(&scratch, &tensors)?;
    let vars = VarMap::new();
    let decoder = base.load_adapters(&scratch.0, &vars)?;
    let ids = Tensor::new(&[[1u32, 5, 9, 2]], &Device::Cpu)?;
    let gradients = backward(&decoder.loss(&ids, &ids, &exact())?.loss)?;
    for var in vars.all_vars() {
        let gradient = gradients.get(&var).expect("a gradient");
        assert_eq!(gradient.dtype(), DType::F32);
        assert!(values(gradient)?.iter().any(|g| *g != 0.));
    }
    Ok(())
}

#[test]
fn adapters_that_do_not_fit_are_named() -> Result<()> {
    let (base, _weights) = load("llama")?;
    for (entries, named) in [
        (json!({"peft_type": "IA3"}), "\"IA3\", expected LORA"),
        (json!({"use_dora": true}), "use_dora true"),
        (json!({"rank_pattern": {"q_proj": 8}}), "rank_pattern"),
        (json!({"modules_to_save": ["lm_head"]}), "modules_to_save"),
        (json!({"bias": "all"}), "bias \"all\""),
        (json!({"fan_in_fan_out": true}), "fan_in_fan_out"),
        (json!({"r": 5}), "has shape [4, 16]"),
        (json!({"r": 0}), "r must be at least 1"),
        (json!({"r": "many"}), "many"),
        (
            json!({"target_modules": ["k_proj"]}),
            "not among target_modules",
        ),
        (
            json!({"target_modules": ["q_proj", "k_proj"]}),
            "k_proj.lora_A.weight",
        ),
    ] {
        let scratch = Scratch::new("peft-misfit");
        written(&scratch, &base, entries)?;
        let vars = VarMap::new();
        let message = error(base.load_adapters(&scratch.0, &vars));
        assert!(message.contains(named), "{named}: {message}");
        assert!(vars.all_vars().is_empty(), "{named}");
    }
    // Adapters of modules that this model does not have.
    let scratch = Scratch::new("peft-others");
    let tensors = written(&scratch, &base, json!({}))?;
    for name in [
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
        "base_model.model.transformer.h.0.attn.q_proj.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ] {
        let mut tensors = tensors.clone();
        tensors.insert(
            name.into(),
            Tensor::zeros((RANK, 16), DType::F32, &Device::Cpu)?,
        );
        save(&scratch, &tensors)?;
        let message = error(base.load_adapters(&scratch.0, &VarMap::new()));
        assert!(message.contains(name), "{name}: {message}");
    }
    let mut part = tensors;
    part.remove(&format!("{MODULE}.lora_B.weight"));
    save(&scratch, &part)?;
    let message = error(base.load_adapters(&scratch.0, &VarMap::new()));
    assert!(
        message.contains(&format!("no tensor {MODULE}.lora_B.weight")),
        "{message}"
    );
    let message = error(base.load_adapters("nowhere", &VarMap::new()));
    assert!(message.contains("nowhere"), "{message}");
    let nan = Lora {
        alpha: f64::NAN,
        ..Lora::default()
    };
    let message = error(base.with_lora(&nan, &VarMap::new()));
    assert!(message.contains("finite, got NaN"), "{message}");
    Ok(())
}

#[test]
fn saved_adapters_name_their_base() -> Result<()> {
    let (base, _weights) = load("llama")?;
    let saved = |decoder: &Decoder| -> Result<Value> {
        let scratch = Scratch::new("peft-base");
        decoder
            .with_lora(&Lora::default(), &VarMap::new())?
            .save_adapters(&scratch.0)?;
        let text = fs::read(scratch.0.join("adapter_config.json"))?;
        Ok(serde_json::from_slice::<Value>(&text).unwrap()["base_model_name_or_path"].clone())
    };
    assert_eq!(saved(&base)?, json!(folder("llama")));
    let mut renamed = base.clone();
    renamed.set_name_or_path(Some("owner/name"));
    assert_eq!(saved(&renamed)?, "owner/name");
    renamed.set_name_or_path(None);
    assert_eq!(saved(&renamed)?, Value::Null);
    Ok(())
}
