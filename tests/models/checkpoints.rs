//! Checkpoints that are saved and loaded.

use crate::common::{error, expected, folder, load, load_as, norm, values, with, Scratch, CASES};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder};
use candle_nn::VarMap;
use serde_json::{json, Value};
use std::collections::HashMap;
use std::fs;

#[test]
fn a_saved_checkpoint_loads_as_it_was() -> Result<()> {
    for case in CASES {
        let scratch = Scratch::new(case);
        let (decoder, _) = load(case)?;
        decoder.save(&scratch.0)?;
        assert_eq!(scratch.names(), ["config.json", "model.safetensors"]);
        let again = Decoder::load(&scratch.0, &VarMap::new(), DType::F32, &Device::Cpu)?;
        let plain = |config: &Config| {
            let text = serde_json::from_str(config.json()).unwrap();
            let dtypes = json!({"dtype": null, "torch_dtype": null});
            Config::from_json(&with(text, dtypes).to_string())
        };
        assert_eq!(plain(decoder.config())?, plain(again.config())?);
        assert_eq!(decoder.tensors().len(), again.tensors().len());
        for (name, tensor) in decoder.tensors() {
            assert_eq!(values(tensor)?, values(&again.tensors()[name])?, "{name}");
        }
        assert_eq!(
            again.tensors().contains_key("lm_head.weight"),
            !decoder.config().tie_word_embeddings
        );
    }
    Ok(())
}

#[test]
fn a_save_that_fails_leaves_the_checkpoint_before_it() -> Result<()> {
    let (decoder, _vars) = load("gemma")?;
    let (untied, _others) = load("llama")?;
    let scratch = Scratch::new("failing");
    decoder.save(&scratch.0)?;
    let config = scratch.0.join("config.json");
    let before = fs::read(&config)?;
    // The weights are to come where a folder stands; the config is another.
    let weights = scratch.0.join("model.safetensors");
    fs::remove_file(&weights)?;
    fs::create_dir_all(weights.join("inside"))?;
    let message = error(untied.save(&scratch.0));
    assert!(message.contains("failing"), "{message}");
    assert_eq!(fs::read(&config)?, before);
    assert_eq!(scratch.names(), ["config.json", "model.safetensors"]);
    Ok(())
}

#[test]
fn threads_that_save_into_one_folder_do_not_disturb_each_other() -> Result<()> {
    let (decoder, _vars) = load("gemma")?;
    let scratch = Scratch::new("threads");
    std::thread::scope(|scope| {
        let save = || (0..5).try_for_each(|_| decoder.save(&scratch.0));
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(save)).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap())
    })?;
    assert_eq!(scratch.names(), ["config.json", "model.safetensors"]);
    let again = Decoder::load(&scratch.0, &VarMap::new(), DType::F32, &Device::Cpu)?;
    for (name, tensor) in decoder.tensors() {
        assert_eq!(values(tensor)?, values(&again.tensors()[name])?, "{name}");
    }
    Ok(())
}

#[test]
fn what_a_killed_save_has_left_is_removed_by_the_next() -> Result<()> {
    let (decoder, _vars) = load("gemma")?;
    let scratch = Scratch::new("orphans");
    for (name, file) in [
        (".saving-1-0", "lock"),
        (".saving-2-0", ".tmpAbCdEf"),
        (".saving-3-0", "before"),
    ] {
        fs::create_dir(scratch.0.join(name))?;
        fs::write(scratch.0.join(name).join(file), "half")?;
    }
    // One that is being written is not.
    fs::create_dir(scratch.0.join(".saving-4-0"))?;
    let held = fs::File::create(scratch.0.join(".saving-4-0/lock"))?;
    held.lock()?;
    decoder.save(&scratch.0)?;
    assert_eq!(
        scratch.names(),
        [".saving-4-0", "config.json", "model.safetensors"]
    );
    drop(held);
    decoder.save(&scratch.0)?;
    assert_eq!(scratch.names(), ["config.json", "model.safetensors"]);
    Ok(())
}

#[test]
fn a_saved_config_says_the_dtype_of_the_weights() -> Result<()> {
    for (dtype, name) in [
        (DType::F32, "float32"),
        (DType::BF16, "bfloat16"),
        (DType::F16, "float16"),
        (DType::F64, "float64"),
    ] {
        let (decoder, _vars) = load_as("qwen3", dtype)?;
        let scratch = Scratch::new(name);
        decoder.save(&scratch.0)?;
        let config = fs::read_to_string(scratch.0.join("config.json"))?;
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(
            (&config["torch_dtype"], &config["dtype"]),
            (&json!(name), &json!(name))
        );
        let weights =
            candle_core::safetensors::load(scratch.0.join("model.safetensors"), &Device::Cpu)?;
        assert!(weights.values().all(|tensor| tensor.dtype() == dtype));
    }
    Ok(())
}

/// A case's tensors under other names, in a folder with its config.
fn renamed(
    case: &str,
    scratch: &Scratch,
    name: impl Fn(&str) -> String,
) -> Result<HashMap<String, Tensor>> {
    let (decoder, _vars) = load(case)?;
    let tensors: HashMap<String, Tensor> = decoder
        .tensors()
        .iter()
        .map(|(n, tensor)| (name(n), tensor.clone()))
        .collect();
    fs::copy(
        folder(case).join("config.json"),
        scratch.0.join("config.json"),
    )?;
    candle_core::safetensors::save(&tensors, scratch.0.join("model.safetensors"))?;
    Ok(tensors)
}

fn loaded(scratch: &Scratch) -> Result<Decoder> {
    Decoder::load(&scratch.0, &VarMap::new(), DType::F32, &Device::Cpu)
}

#[test]
fn names_with_other_beginnings_are_read() -> Result<()> {
    for (case, prefix) in [
        ("gemma2", ""),
        ("gemma3", "language_model.model."),
        ("gemma3", "model.language_model."),
    ] {
        let scratch = Scratch::new("beginnings");
        let mut tensors = renamed(case, &scratch, |n| n.replacen("model.", prefix, 1))?;
        tensors.insert(
            "rotary_emb.inv_freq".into(),
            Tensor::zeros(4, DType::F32, &Device::Cpu)?,
        );
        let decoder = load(case)?.0;
        if prefix.contains("language") {
            let image = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
            let part = if prefix.starts_with("model.") {
                "model.vision_tower.w"
            } else {
                "vision_tower.w"
            };
            tensors.insert(part.into(), image.clone());
            tensors.insert("multi_modal_projector.w".into(), image);
            let text: Value = serde_json::from_str(decoder.config().json()).unwrap();
            let whole = json!({"model_type": "gemma3", "text_config": text});
            fs::write(scratch.0.join("config.json"), whole.to_string())?;
        }
        candle_core::safetensors::save(&tensors, scratch.0.join("model.safetensors"))?;
        let again = loaded(&scratch)?;
        let ids = &expected(case)?["ids"];
        assert_eq!(
            values(&again.hidden_states(ids)?)?,
            values(&decoder.hidden_states(ids)?)?
        );
        // Saved, it is the text model under its own names.
        again.save(&scratch.0)?;
        let saved = loaded(&scratch)?;
        assert_eq!(
            values(&saved.hidden_states(ids)?)?,
            values(&decoder.hidden_states(ids)?)?
        );
        assert!(fs::read_to_string(scratch.0.join("config.json"))?
            .contains(decoder.config().family.model_type()));
    }
    Ok(())
}

#[test]
fn tensors_that_are_not_used_are_named() -> Result<()> {
    for (case, name) in [
        ("qwen3", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", "model.layers.2.mlp.up_proj.weight"),
        ("mistral", "model.layers.0.mlp.up_proj.weight_scale"),
        ("gemma", "vision_tower.w"),
    ] {
        let scratch = Scratch::new("unused");
        let mut tensors = renamed(case, &scratch, str::to_owned)?;
        tensors.insert(name.into(), Tensor::zeros(4, DType::F32, &Device::Cpu)?);
        candle_core::safetensors::save(&tensors, scratch.0.join("model.safetensors"))?;
        let message = error(loaded(&scratch));
        assert!(
            message.contains(name) && message.contains("not used"),
            "{message}"
        );
    }
    Ok(())
}

#[test]
fn a_tied_head_may_be_stored_and_no_other() -> Result<()> {
    let scratch = Scratch::new("tied");
    let mut tensors = renamed("gemma", &scratch, str::to_owned)?;
    let embedding = tensors["model.embed_tokens.weight"].clone();
    let mut put = |head: Tensor| {
        tensors.insert("lm_head.weight".into(), head);
        candle_core::safetensors::save(&tensors, scratch.0.join("model.safetensors"))
    };
    put(embedding.copy()?)?;
    assert!(!loaded(&scratch)?.tensors().contains_key("lm_head.weight"));
    put((embedding * 1.5)?)?;
    let message = error(loaded(&scratch));
    assert!(
        message.contains("tie_word_embeddings") && message.contains("lm_head.weight"),
        "{message}"
    );
    Ok(())
}

#[test]
fn weights_that_are_not_there_are_not_made_up() -> Result<()> {
    let scratch = Scratch::new("pointer");
    scratch.copy("gemma");
    let weights = scratch.0.join("model.safetensors");
    fs::write(
        &weights,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    )?;
    let message = error(loaded(&scratch));
    assert!(message.contains("git-lfs pointer"), "{message}");
    fs::remove_file(&weights)?;
    for name in ["pytorch_model.bin", "model-00001-of-00002.safetensors"] {
        fs::write(scratch.0.join(name), "")?;
        let message = error(loaded(&scratch));
        assert!(message.contains(name), "{message}");
    }
    Ok(())
}

#[test]
fn a_save_beside_shards_is_what_loads() -> Result<()> {
    let scratch = Scratch::new("beside");
    let vars = VarMap::new();
    let again =
        |vars: &VarMap| Decoder::load(&scratch.copy("llama").0, vars, DType::F32, &Device::Cpu);
    let decoder = again(&vars)?;
    for var in vars.all_vars() {
        var.set(&var.zeros_like()?)?;
    }
    decoder.save(&scratch.0)?;
    let again = again(&VarMap::new())?;
    let sizes = again.tensors().values().map(norm);
    assert!(sizes.collect::<Result<Vec<_>>>()?.iter().all(|n| *n == 0.));
    Ok(())
}

#[test]
fn a_checkpoint_that_does_not_fit_is_named() -> Result<()> {
    let load = |scratch: &Scratch| {
        error(Decoder::load(
            &scratch.0,
            &VarMap::new(),
            DType::F32,
            &Device::Cpu,
        ))
    };
    let edit = |scratch: &Scratch, entries: Value| {
        let path = scratch.0.join("config.json");
        let config = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        fs::write(path, with(config, entries).to_string()).unwrap();
    };
    let scratch = Scratch::new("misfit");
    assert!(load(&scratch).contains("config.json"));
    scratch.copy("qwen3");
    edit(
        &scratch,
        json!({"num_hidden_layers": 3, "layer_types": null}),
    );
    let message = load(&scratch);
    assert!(message.contains("no tensor model.layers.2."), "{message}");
    edit(&scratch, json!({"num_hidden_layers": 2, "vocab_size": 33}));
    let message = load(&scratch);
    assert!(
        message.contains("model.embed_tokens.weight has shape [32, 16]"),
        "{message}"
    );
    fs::write(scratch.0.join("model.safetensors"), "no safetensors")?;
    let message = load(&scratch);
    assert!(message.contains("model.safetensors"), "{message}");
    fs::remove_file(scratch.0.join("model.safetensors"))?;
    let message = load(&scratch);
    assert!(message.contains("neither model.safetensors"), "{message}");

    let scratch = Scratch::new("shards");
    let shard = "model-00002-of-00004.safetensors";
    fs::remove_file(scratch.copy("llama").0.join(shard))?;
    let message = load(&scratch);
    assert!(message.contains(shard), "{message}");
    let index = scratch.0.join("model.safetensors.index.json");
    fs::write(&index, r#"{"weight_map": {"a": "../a.safetensors"}}"#)?;
    let message = load(&scratch);
    assert!(message.contains("../a.safetensors"), "{message}");
    fs::write(&index, r#"{"weight_map": {}}"#)?;
    let message = load(&scratch);
    assert!(message.contains("names no files"), "{message}");
    Ok(())
}
