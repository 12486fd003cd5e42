//! The decoder against Hugging Face transformers (golden files by tests/golden/models.py) and
//! candle-transformers, its gradients, configs and checkpoints.

mod adamw;
mod adapter_files;
mod checkpoints;
mod configs;
mod fine_tuning;
mod gguf;
mod gradients;
mod heads;
mod packing;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::models::{
    clip_gradients, generate, Accumulator, CausalLm, Config, Decoder, Family, Sampling,
};
use candle_cut_cross_entropy::{backward, Options, Preset};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use serde_json::{json, Value};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

const CASES: [&str; 12] = [
    "llama",
    "llama3",
    "mistral",
    "phi3",
    "phi3_long",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "smollm3",
    "granite",
];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/models")
        .join(case)
}

fn load(case: &str) -> Result<(Decoder, VarMap)> {
    load_as(case, DType::F32)
}

fn load_as(case: &str, dtype: DType) -> Result<(Decoder, VarMap)> {
    let vars = VarMap::new();
    let decoder = Decoder::load(folder(case), &vars, dtype, &Device::Cpu)?;
    Ok((decoder, vars))
}

fn expected(case: &str) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load(folder(case).join("expected.safetensors"), &Device::Cpu)
}

fn exact() -> Options {
    Options::preset(Preset::CceExact)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// The largest difference, relative to numbers above 1, and fails where it is above the tolerance.
#[track_caller]
fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let read = || -> Result<(Vec<f64>, Vec<f64>)> { Ok((values(got)?, values(want)?)) };
    let (got, want) = read().unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(got.len(), want.len(), "{what}: sizes");
    let mut worst = 0f64;
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        let difference = (g - w).abs() / w.abs().max(1.);
        assert!(difference <= tolerance, "{what}[{i}]: got {g}, want {w}");
        worst = worst.max(difference);
    }
    println!("{what}: {worst:.1e}");
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

/// A folder that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cce-models-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn copy(&self, case: &str) -> &Self {
        for entry in fs::read_dir(folder(case)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, self.0.join(path.file_name().unwrap())).unwrap();
        }
        self
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

// Against Hugging Face transformers

#[test]
fn logits_are_those_of_transformers() -> Result<()> {
    for case in CASES {
        let (decoder, _) = load(case)?;
        let expected = expected(case)?;
        let ids = &expected["ids"];
        let logits = decoder.logits(&decoder.hidden_states(ids)?)?;
        assert_close(
            &format!("{case} logits"),
            &logits,
            &expected["logits"],
            1e-4,
        );
        let short = ids.narrow(1, 0, expected["short_logits"].dim(1)?)?;
        let logits = decoder.logits(&decoder.hidden_states(&short)?)?;
        assert_close(
            &format!("{case} short logits"),
            &logits,
            &expected["short_logits"],
            1e-4,
        );
        let last = logits.narrow(1, short.dim(1)? - 1, 1)?;
        assert_close(case, &decoder.next_token_logits(&short)?, &last, 1e-5);
    }
    Ok(())
}

#[test]
fn bf16_and_f16_come_close() -> Result<()> {
    for (dtype, tolerance) in [(DType::BF16, 1e-2), (DType::F16, 1e-3)] {
        for case in CASES {
            let vars = VarMap::new();
            let decoder = Decoder::load(folder(case), &vars, dtype, &Device::Cpu)?;
            let expected = expected(case)?;
            let (ids, labels) = (&expected["ids"], &expected["labels"]);
            let hidden = decoder.hidden_states(ids)?;
            assert_eq!(hidden.dtype(), dtype);
            let loss = decoder.loss(ids, labels, &exact())?.loss;
            let what = format!("{case} {dtype:?} loss");
            assert_close(&what, &loss, &expected["loss"], tolerance);
            assert_gradients(case, &decoder, &backward(&loss)?);
        }
    }
    Ok(())
}

#[test]
fn losses_and_gradients_are_those_of_transformers() -> Result<()> {
    for case in CASES {
        let (decoder, _) = load(case)?;
        let expected = expected(case)?;
        // The shift is 1 and the softcap that of the model, unless the options have their own.
        let other = exact().softcap(0.1);
        let capped = decoder.loss(&expected["ids"], &expected["labels"], &other)?;
        assert!(norm(&(capped.loss - &expected["loss"])?)? > 1e-4, "{case}");
        let options = exact();
        let loss = decoder
            .loss(&expected["ids"], &expected["labels"], &options)?
            .loss;
        assert_close(&format!("{case} loss"), &loss, &expected["loss"], 1e-5);
        let gradients = backward(&loss)?;
        assert_gradients(case, &decoder, &gradients);
        let norms = decoder
            .tensors()
            .values()
            .filter_map(|tensor| gradients.get(tensor))
            .map(norm)
            .collect::<Result<Vec<f64>>>()?;
        let norms = Tensor::new(norms, &Device::Cpu)?;
        assert_close(
            &format!("{case} gradient norms"),
            &norms,
            &expected["gradient_norms"],
            1e-4,
        );
    }
    Ok(())
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
fn a_gradient_is_the_slope_of_the_loss() -> Result<()> {
    for case in ["phi3_long", "gemma2", "gemma3"] {
        let vars = VarMap::new();
        let decoder = Decoder::load(folder(case), &vars, DType::F64, &Device::Cpu)?;
        let expected = expected(case)?;
        let loss = || decoder.loss(&expected["ids"], &expected["labels"], &exact());
        let gradients = loss()?.loss.backward()?;
        let named = vars.data().lock().unwrap().clone();
        for (name, var) in &named {
            let direction = var.randn_like(0., 1.)?;
            let gradient = gradients.get(var).expect("a gradient");
            let slope = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
            let (at, step) = (var.copy()?, 1e-5);
            let at_step = |step: f64| -> Result<f64> {
                var.set(&(&at + (&direction * step)?)?)?;
                // The loss is f32: summed over what it is the mean of, in f64, it would be finer.
                let hidden = decoder.hidden_states(&expected["ids"])?;
                f64_loss(&decoder, &hidden, &expected["labels"])
            };
            let measured = (at_step(step)? - at_step(-step)?) / (2. * step);
            var.set(&at)?;
            let difference = (slope - measured).abs() / measured.abs().max(1e-2);
            assert!(
                difference < 1e-4,
                "{case} {name}: slope {slope}, measured {measured}"
            );
        }
    }
    Ok(())
}

/// The loss from stored logits, in f64.
fn f64_loss(decoder: &Decoder, hidden: &Tensor, labels: &Tensor) -> Result<f64> {
    let logits = decoder.logits(hidden)?.to_vec3::<f64>()?;
    let labels = labels.to_vec2::<i64>()?;
    let (mut sum, mut count) = (0., 0.);
    for (logits, labels) in logits.iter().zip(&labels) {
        for (row, &label) in logits.iter().zip(&labels[1..]) {
            if label >= 0 {
                let lse = row.iter().map(|z| z.exp()).sum::<f64>().ln();
                sum += lse - row[label as usize];
                count += 1.;
            }
        }
    }
    Ok(sum / count)
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

#[test]
fn training_on_a_text_learns_it() -> Result<()> {
    let (decoder, vars) = load("qwen3")?;
    let ids = expected("qwen3")?["ids"].clone();
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-2)?;
    let mut losses = Vec::new();
    for _ in 0..40 {
        let loss = decoder.loss(&ids, &ids, &Options::default())?.loss;
        losses.push(loss.to_scalar::<f32>()?);
        let mut gradients = backward(&loss)?;
        clip_gradients(&mut gradients, &vars.all_vars(), 1.)?;
        optimizer.step(&gradients)?;
    }
    assert!(losses[39] < 0.1 * losses[0], "{losses:?}");
    let text: Vec<u32> = ids.get(0)?.to_dtype(DType::U32)?.to_vec1()?;
    let sampling = Sampling {
        max_new_tokens: 10,
        ..Sampling::default()
    };
    assert_eq!(generate(&decoder, &text[..10], &sampling)?, text[10..]);
    Ok(())
}

#[test]
fn accumulated_gradients_are_those_of_the_whole_batch() -> Result<()> {
    let (decoder, vars) = load("llama")?;
    let expected = expected("llama")?;
    let (ids, labels) = (&expected["ids"], &expected["labels"]);
    let options = exact().reduction(candle_cut_cross_entropy::Reduction::Sum);
    let whole = backward(&decoder.loss(ids, labels, &options)?.loss)?;
    let mut parts = Accumulator::new(vars.all_vars());
    for row in 0..2 {
        let (ids, labels) = (ids.narrow(0, row, 1)?, labels.narrow(0, row, 1)?);
        parts.add(backward(&decoder.loss(&ids, &labels, &options)?.loss)?)?;
    }
    let parts = parts.take(1.)?.expect("gradients");
    for (name, tensor) in decoder.tensors() {
        let (got, want) = (parts.get(tensor).unwrap(), whole.get(tensor).unwrap());
        assert_close(name, got, want, 1e-5);
    }
    Ok(())
}

#[test]
fn clipped_gradients_have_the_norm_asked_for() -> Result<()> {
    let a = Var::new(&[1f32, 2.], &Device::Cpu)?;
    let b = Var::new(&[3f64], &Device::Cpu)?;
    let loss = ((a.as_tensor() * 3.)?.sum_all()?.to_dtype(DType::F64)?
        + (b.as_tensor() * 4.)?.sum_all()?)?;
    let vars = [a.clone(), b.clone()];
    let norm = 34f64.sqrt();
    for (most, factor) in [(100., 1.), (1., 1. / norm)] {
        let mut gradients = loss.backward()?;
        assert!((clip_gradients(&mut gradients, &vars, most)? - norm).abs() < 1e-6);
        let a = gradients.get(&a).unwrap().to_vec1::<f32>()?;
        assert!((a[0] as f64 - 3. * factor).abs() < 1e-6, "{a:?}");
        let b = gradients.get(&b).unwrap().to_vec1::<f64>()?;
        assert!((b[0] - 4. * factor).abs() < 1e-6, "{b:?}");
    }
    let message = error(clip_gradients(&mut loss.backward()?, &vars, 0.));
    assert!(message.contains("max_norm"), "{message}");
    Ok(())
}

// Generation

#[test]
fn generation_takes_the_likeliest_token_or_draws_by_the_seed() -> Result<()> {
    let (decoder, _) = load("gemma2")?;
    let prompt = [1u32, 5, 9];
    let greedy = |n, stop: Vec<u32>| {
        let sampling = Sampling {
            max_new_tokens: n,
            stop,
            ..Sampling::default()
        };
        generate(&decoder, &prompt, &sampling)
    };
    let tokens = greedy(4, vec![])?;
    let ids = Tensor::new(&prompt, &Device::Cpu)?.unsqueeze(0)?;
    let likeliest = decoder
        .next_token_logits(&ids)?
        .argmax(1)?
        .to_vec1::<u32>()?;
    assert_eq!((tokens.len(), tokens[0]), (4, likeliest[0]));
    let until = tokens.iter().position(|t| *t == tokens[2]).unwrap() + 1;
    assert_eq!(greedy(4, vec![tokens[2]])?, tokens[..until]);

    let drawn = |seed| {
        let sampling = Sampling {
            max_new_tokens: 12,
            temperature: 2.,
            seed,
            stop: vec![],
        };
        generate(&decoder, &prompt, &sampling)
    };
    assert_eq!(drawn(1)?, drawn(1)?);
    assert_ne!(drawn(1)?, drawn(2)?);
    let message = error(generate(&decoder, &[], &Sampling::default()));
    assert!(message.contains("prompt is empty"), "{message}");
    let none = Tensor::zeros((1, 0), DType::U32, &Device::Cpu)?;
    let message = error(decoder.hidden_states(&none));
    assert!(message.contains("no tokens"), "{message}");
    Ok(())
}

#[test]
fn tokens_outside_the_vocabulary_are_named() -> Result<()> {
    let (decoder, _) = load("gemma2")?;
    let cpu = &Device::Cpu;
    for (ids, named) in [
        (
            Tensor::new(&[[1u32, 32]], cpu)?,
            "token 32 is outside the vocabulary of 32",
        ),
        (Tensor::new(&[[1, u32::MAX]], cpu)?, "token 4294967295"),
        (
            Tensor::new(&[[1, i64::MAX]], cpu)?,
            "token 9223372036854775807",
        ),
        (Tensor::new(&[[1i64, -1]], cpu)?, "token -1"),
        (Tensor::new(&[[1i64, 1 << 32]], cpu)?, "token 4294967296"),
        (Tensor::new(&[[1u8, 255]], cpu)?, "token 255"),
        (
            Tensor::new(&[[1f32, 2.]], cpu)?,
            "must be integers, got F32",
        ),
    ] {
        let message = error(decoder.hidden_states(&ids));
        assert!(message.contains(named), "{named}: {message}");
    }
    // The last of the vocabulary is one, in every dtype: 255 of 256 in u8 too.
    let config = json!({"vocab_size": 256, "num_hidden_layers": 1});
    let config = Config::from_json(&small("llama", config).to_string())?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, cpu);
    let decoder = Decoder::new(config, vb)?;
    let want = decoder.hidden_states(&Tensor::new(&[[7i64, 255]], cpu)?)?;
    assert!(norm(&want.narrow(1, 1, 1)?)? > 0.);
    for ids in [
        Tensor::new(&[[7u8, 255]], cpu)?,
        Tensor::new(&[[7u32, 255]], cpu)?,
    ] {
        assert_eq!(values(&decoder.hidden_states(&ids)?)?, values(&want)?);
    }
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

#[cfg(feature = "candle-transformers")]
mod against_candle_transformers {
    use super::*;
    use candle_cut_cross_entropy::models::WithHead;
    use candle_transformers::models::smol::smollm3;
    use candle_transformers::models::{
        gemma, gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3, qwen3_moe,
    };

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
}
