//! Gradient checkpointing and low-rank adapters.

use crate::common::{error, exact, load, load_as, values, Scratch, CASES};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::backward;
use candle_cut_cross_entropy::models::{AdamW, CausalLm, Config, Decoder, Lora};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder, VarMap};
use serde_json::Value;
use std::collections::HashMap;

const RANK: usize = 3;

fn tokens() -> Result<Tensor> {
    Tensor::new(
        &[[1u32, 9, 4, 17, 3, 3, 21, 8], [5, 2, 30, 11, 6, 0, 12, 25]],
        &Device::Cpu,
    )
}

fn loss(decoder: &Decoder) -> Result<Tensor> {
    let ids = tokens()?;
    Ok(decoder.loss(&ids, &ids, &exact())?.loss)
}

#[track_caller]
fn assert_same(what: &str, got: &Tensor, want: &Tensor) {
    let read = || -> Result<(Vec<f64>, Vec<f64>)> { Ok((values(got)?, values(want)?)) };
    let (got, want) = read().unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert_eq!(got, want, "{what}[{i}]");
    }
}

/// The relative distance of two tensors.
#[track_caller]
fn assert_near(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let read = || -> Result<(Vec<f64>, Vec<f64>)> { Ok((values(got)?, values(want)?)) };
    let (got, want) = read().unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut got.iter().zip(&want).map(|(g, w)| g - w));
    let size = norm(&mut want.iter().copied());
    assert!(size > 0., "{what} is zero");
    assert!(
        distance <= tolerance * size,
        "{what}: off by {:e}",
        distance / size
    );
}

fn gradient(gradients: &GradStore, tensor: &Tensor, what: &str) -> Tensor {
    gradients
        .get(tensor)
        .unwrap_or_else(|| panic!("{what} has no gradient"))
        .clone()
}

/// Adapters of everything, with random numbers in the matrices that begin as zeros.
fn adapted(base: &Decoder) -> Result<(Decoder, VarMap)> {
    let vars = VarMap::new();
    let lora = Lora {
        rank: RANK,
        ..Lora::default()
    };
    let decoder = base.with_lora(&lora.with_head(), &vars)?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        if name.ends_with("lora_B.weight") {
            var.set(&Tensor::randn(0f32, 0.1, var.shape(), &Device::Cpu)?.to_dtype(var.dtype())?)?;
        }
    }
    Ok((decoder, vars))
}

// Gradient checkpointing

#[test]
fn checkpointing_changes_no_bit() -> Result<()> {
    for case in CASES {
        for dtype in [DType::F32, DType::BF16] {
            let (mut decoder, _vars) = load_as(case, dtype)?;
            let want_loss = loss(&decoder)?;
            let (want, candles) = (backward(&want_loss)?, want_loss.backward()?);
            decoder.set_gradient_checkpointing(true);
            let got_loss = loss(&decoder)?;
            assert_same(case, &got_loss, &want_loss);
            // Candle's own backward, and a second one of the same graph, give them too.
            for (got, want) in [
                (backward(&got_loss)?, &want),
                (got_loss.backward()?, &candles),
                (backward(&got_loss)?, &want),
            ] {
                for (name, tensor) in decoder.tensors() {
                    let what = format!("{case} {dtype:?} {name}");
                    let want = gradient(want, tensor, &what);
                    assert_same(&what, &gradient(&got, tensor, &what), &want);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn checkpointing_with_frozen_weights_gives_the_others_gradients() -> Result<()> {
    let (base, _vars) = load("llama")?;
    // Everything below the second layer is frozen, or nothing but the first layer's output projection is trained.
    for trained in ["model.layers.1.", "model.layers.0.self_attn.o_proj", "none"] {
        let tensors: HashMap<String, Tensor> = base
            .tensors()
            .iter()
            .map(|(name, tensor)| match name.starts_with(trained) {
                true => (name.clone(), tensor.clone()),
                false => (name.clone(), tensor.detach()),
            })
            .collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let mut decoder = Decoder::new(base.config().clone(), vb)?;
        let want = loss(&decoder)?;
        decoder.set_gradient_checkpointing(true);
        let got = loss(&decoder)?;
        assert_same(trained, &got, &want);
        if trained == "none" {
            assert!(!got.track_op());
            continue;
        }
        let (want, got) = (backward(&want)?, backward(&got)?);
        let mut count = 0;
        for (name, tensor) in decoder.tensors() {
            if name.starts_with(trained) {
                let want = gradient(&want, tensor, name);
                assert_same(name, &gradient(&got, tensor, name), &want);
                count += 1;
            } else {
                assert!(got.get(tensor).is_none(), "{name} is frozen");
            }
        }
        assert!(count > 0, "{trained}");
    }
    Ok(())
}

#[test]
fn checkpointing_needs_variables() -> Result<()> {
    let (base, _vars) = load("qwen3")?;
    let tensors = base
        .tensors()
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), (tensor * 1.5)?)))
        .collect::<Result<HashMap<_, _>>>()?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut decoder = Decoder::new(base.config().clone(), vb)?;
    decoder.set_gradient_checkpointing(true);
    let error = error(loss(&decoder));
    assert!(error.contains("not a variable"), "{error}");
    Ok(())
}

// Low-rank adapters

#[test]
fn a_new_adapter_changes_nothing() -> Result<()> {
    for case in CASES {
        let (base, _weights) = load(case)?;
        let vars = VarMap::new();
        let decoder = base.with_lora(&Lora::default().with_head(), &vars)?;
        assert_same(case, &loss(&decoder)?, &loss(&base)?);
        let gradients = backward(&loss(&decoder)?)?;
        for (name, tensor) in decoder.tensors() {
            assert!(gradients.get(tensor).is_none(), "{case}: {name} is frozen");
        }
        // B begins as 0: A's gradient is zeros, B's is not.
        for (name, var) in vars.data().lock().unwrap().iter() {
            let size = values(&gradient(&gradients, var, name))?
                .iter()
                .map(|x| x * x)
                .sum::<f64>();
            assert_eq!(size > 0., name.ends_with("lora_B.weight"), "{case}: {name}");
        }
    }
    Ok(())
}

/// Against the same decoder whose weights are `W + alpha / rank B A` in Candle's operations.
#[test]
fn adapters_are_what_their_formula_says() -> Result<()> {
    for case in CASES {
        let (base, _weights) = load(case)?;
        let (mut decoder, vars) = adapted(&base)?;
        let named = vars.data().lock().unwrap().clone();
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        for (name, tensor) in base.tensors() {
            tensors.insert(name.clone(), tensor.detach());
        }
        if base.config().tie_word_embeddings {
            let head = tensors["model.embed_tokens.weight"].clone();
            tensors.insert("lm_head.weight".to_owned(), head);
        }
        for name in named.keys().filter(|name| name.ends_with("lora_A.weight")) {
            let module = name
                .trim_start_matches("base_model.model.")
                .trim_end_matches(".lora_A.weight");
            let (a, b) = (
                &named[name],
                &named[&name.replace("lora_A.weight", "lora_B.weight")],
            );
            assert_eq!(a.dim(0)?, RANK);
            let product = (b.matmul(a)? * (16. / RANK as f64))?;
            let weight = tensors.get_mut(&format!("{module}.weight")).unwrap();
            *weight = (&*weight + product)?;
        }
        let mut config = base.config().clone();
        config.tie_word_embeddings = false;
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let want = loss(&Decoder::new(config, vb)?)?;
        let of_want = want.backward()?;
        for checkpointing in [false, true] {
            decoder.set_gradient_checkpointing(checkpointing);
            let got = loss(&decoder)?;
            assert_near(case, &got, &want, 1e-5);
            let of_got = backward(&got)?;
            for (name, var) in &named {
                let want = gradient(&of_want, var, name);
                assert_near(
                    &format!("{case} {name}"),
                    &gradient(&of_got, var, name),
                    &want,
                    1e-3,
                );
            }
        }
        // Merged, and saved.
        assert_near(case, &loss(&decoder.merged()?)?, &want, 1e-5);
        let folder = Scratch::new(case);
        decoder.save(&folder.0)?;
        let saved = Decoder::load(&folder.0, &VarMap::new(), DType::F32, &Device::Cpu)?;
        assert!(!saved.config().tie_word_embeddings);
        assert_same(case, &loss(&saved)?, &loss(&decoder.merged()?)?);
    }
    Ok(())
}

#[test]
fn training_adapters_learns_and_leaves_the_weights() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let (base, _weights) = load_as("gemma2", dtype)?;
        let before = base.tensors()["model.layers.0.mlp.up_proj.weight"].copy()?;
        let vars = VarMap::new();
        let mut decoder = base.with_lora(&Lora::default(), &vars)?;
        decoder.set_gradient_checkpointing(true);
        let params = ParamsAdamW {
            lr: 1e-2,
            ..ParamsAdamW::default()
        };
        let mut optimizer = AdamW::from_varmap(&vars, params)?;
        let first = values(&loss(&decoder)?)?[0];
        for _ in 0..30 {
            optimizer.step(&backward(&loss(&decoder)?)?)?;
        }
        let last = values(&loss(&decoder)?)?[0];
        assert!(last < 0.7 * first, "{dtype:?}: from {first} to {last}");
        assert_same(
            "a weight",
            &base.tensors()["model.layers.0.mlp.up_proj.weight"],
            &before,
        );
    }
    Ok(())
}

#[test]
fn a_frozen_decoder_is_the_same_outside_the_graph() -> Result<()> {
    let (base, weights) = load("gemma2")?;
    let (decoder, vars) = adapted(&base)?;
    for (decoder, vars) in [(&base, weights), (&decoder, vars)] {
        let frozen = decoder.frozen()?;
        for _ in 0..2 {
            let of_frozen = loss(&frozen)?;
            assert!(!of_frozen.track_op());
            assert_same("loss", &of_frozen, &loss(decoder)?);
            // Another step changes both.
            for var in vars.all_vars() {
                var.set(&(var.as_tensor() * 1.01)?)?;
            }
        }
    }
    Ok(())
}

#[test]
fn saved_adapters_are_taken_up() -> Result<()> {
    let (base, _weights) = load("phi3")?;
    let (decoder, _vars) = adapted(&base)?;
    let folder = Scratch::new("adapters");
    decoder.save_adapters(&folder.0)?;
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.0.join("adapter_config.json")).unwrap())
            .unwrap();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let [config, weights] = ["adapter_config.json", "adapter_model.safetensors"].map(|name| {
            std::fs::metadata(folder.0.join(name))
                .unwrap()
                .permissions()
                .mode()
        });
        assert_eq!(weights, config, "one file is less readable than the other");
    }
    assert_eq!(config["r"], RANK);
    assert_eq!(config["lora_alpha"], 16.);
    assert_eq!(
        config["target_modules"],
        serde_json::json!(["down_proj", "gate_up_proj", "lm_head", "o_proj", "qkv_proj"])
    );
    let mut vars = VarMap::new();
    let lora = Lora {
        rank: RANK,
        ..Lora::default()
    };
    let again = base.with_lora(&lora.with_head(), &vars)?;
    vars.load(folder.0.join("adapter_model.safetensors"))?;
    assert_same("loss", &loss(&again)?, &loss(&decoder)?);
    Ok(())
}

#[test]
fn adapters_that_cannot_be_are_named() -> Result<()> {
    let (base, _weights) = load("llama")?;
    let vars = VarMap::new();
    let with = |lora: Lora| error(base.with_lora(&lora, &vars));
    let of_rank_zero = with(Lora {
        rank: 0,
        ..Lora::default()
    });
    assert!(of_rank_zero.contains("rank"), "{of_rank_zero}");
    let unknown = with(Lora {
        targets: vec!["q_proj".to_owned(), "query".to_owned()],
        ..Lora::default()
    });
    assert!(unknown.contains("\"query\""), "{unknown}");
    let none = with(Lora {
        targets: vec![],
        ..Lora::default()
    });
    assert!(none.contains("no module"), "{none}");
    let twice = base.with_lora(&Lora::default(), &vars)?;
    let twice = error(twice.with_lora(&Lora::default(), &VarMap::new()));
    assert!(twice.contains("already"), "{twice}");
    let without = error(base.save_adapters(Scratch::new("none").0.clone()));
    assert!(without.contains("no adapters"), "{without}");
    Ok(())
}

/// The variables of one decoder can be those of another with other settings.
#[test]
fn a_copy_checkpoints_on_its_own() -> Result<()> {
    let config = Config::from_json(
        r#"{"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 2}"#,
    )?;
    let vars = VarMap::new();
    let decoder = Decoder::new(
        config,
        VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu),
    )?;
    let mut copy = decoder.clone();
    copy.set_gradient_checkpointing(true);
    assert!(copy.gradient_checkpointing() && !decoder.gradient_checkpointing());
    let both = (loss(&decoder)? + loss(&copy)?)?;
    let (both, one) = (backward(&both)?, backward(&loss(&decoder)?)?);
    let var: &Var = &vars.all_vars()[0];
    let twice = (gradient(&one, var, "one") * 2.)?;
    assert_near("sum", &gradient(&both, var, "both"), &twice, 1e-6);
    Ok(())
}
