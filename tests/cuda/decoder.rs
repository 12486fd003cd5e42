//! The decoder on a GPU, whose every operation has a kernel there, beside the same on the CPU.

use crate::common::{norm, numbers};
use crate::device;
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder};
use candle_cut_cross_entropy::{backward, Options, Preset};
use candle_nn::{VarBuilder, VarMap};
use std::collections::BTreeMap;

/// Grouped heads; fused projections and heads of which a part is turned; norms of queries and keys; softcaps, windows and
/// norms after.
const CONFIGS: [(&str, &str); 4] = [
    ("llama", r#""num_key_value_heads": 2"#),
    (
        "phi3",
        r#""num_key_value_heads": 4, "partial_rotary_factor": 0.5, "sliding_window": 20"#,
    ),
    ("qwen3", r#""num_key_value_heads": 1, "head_dim": 24"#),
    (
        "gemma2",
        r#""num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32,
           "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0"#,
    ),
];

fn config(family: &str, more: &str) -> Result<Config> {
    Config::from_json(&format!(
        r#"{{
            "model_type": "{family}", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
            "initializer_range": 0.2, {more}
        }}"#
    ))
}

fn copied(vars: &VarMap, dtype: DType, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let vars = vars.data().lock().expect("no thread has panicked");
    let copies = vars.iter().map(|(name, var)| {
        let copy = var.detach().to_dtype(dtype)?.to_device(device)?;
        Ok((name.clone(), copy))
    });
    copies.collect()
}

/// The loss, and the gradients by name.
fn computed(
    (family, more): (&str, &str),
    weights: &BTreeMap<String, Tensor>,
    dtype: DType,
    device: &Device,
    checkpointing: bool,
) -> Result<BTreeMap<String, Vec<f64>>> {
    let vars = VarMap::new();
    let builder = VarBuilder::from_varmap(&vars, dtype, device);
    let mut decoder = Decoder::new(config(family, more)?, builder)?;
    for (name, var) in vars.data().lock().expect("no thread has panicked").iter() {
        var.set(&weights[name].to_dtype(dtype)?.to_device(device)?)?;
    }
    decoder.set_gradient_checkpointing(checkpointing);
    let ids: Vec<u32> = (0..2 * 77u32).map(|i| i * 37 % 300).collect();
    let ids = Tensor::from_vec(ids, (2, 77), device)?;
    let loss = decoder
        .loss(&ids, &ids, &Options::preset(Preset::CceExact))?
        .loss;
    let gradients = backward(&loss)?;
    let mut all = BTreeMap::from([("loss".to_owned(), numbers(&loss)?)]);
    for (name, var) in vars.data().lock().expect("no thread has panicked").iter() {
        match gradients.get(var) {
            Some(gradient) => all.insert(name.clone(), numbers(gradient)?),
            None => candle_core::bail!("{family}: no gradient of {name}"),
        };
    }
    Ok(all)
}

#[test]
fn losses_and_gradients_of_families_are_those_on_the_cpu() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for case in CONFIGS {
        let vars = VarMap::new();
        let builder = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        Decoder::new(config(case.0, case.1)?, builder)?;
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 0.1)] {
            // Both begin with the same numbers.
            let weights = copied(&vars, dtype, &Device::Cpu)?;
            let want = computed(case, &weights, DType::F32, &Device::Cpu, false)?;
            for checkpointing in [false, true] {
                let got = computed(case, &weights, dtype, &device, checkpointing)?;
                for (name, want) in &want {
                    let differences = got[name].iter().zip(want).map(|(a, b)| a - b);
                    let (error, size) = (norm(differences), norm(want.iter().copied()));
                    assert!(
                        error <= tolerance * size,
                        "{} {dtype:?}, checkpointing {checkpointing}: {name} is off by {error:e} of {size:e}",
                        case.0
                    );
                }
            }
        }
    }
    Ok(())
}
