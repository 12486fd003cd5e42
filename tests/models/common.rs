//! What the tests of the models share.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::Decoder;
use candle_cut_cross_entropy::{Options, Preset};
use candle_nn::VarMap;
use serde_json::{json, Value};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

pub const CASES: [&str; 12] = [
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

pub fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/models")
        .join(case)
}

pub fn load(case: &str) -> Result<(Decoder, VarMap)> {
    load_as(case, DType::F32)
}

pub fn load_as(case: &str, dtype: DType) -> Result<(Decoder, VarMap)> {
    let vars = VarMap::new();
    let decoder = Decoder::load(folder(case), &vars, dtype, &Device::Cpu)?;
    Ok((decoder, vars))
}

pub fn expected(case: &str) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load(folder(case).join("expected.safetensors"), &Device::Cpu)
}

pub fn exact() -> Options {
    Options::preset(Preset::CceExact)
}

pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// The largest difference, relative to numbers above 1, and fails where it is above the tolerance.
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
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
pub fn error<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.to_string(),
    }
}

#[track_caller]
pub fn assert_gradients(case: &str, decoder: &Decoder, gradients: &GradStore) {
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

pub fn norm(tensor: &Tensor) -> Result<f64> {
    Ok(values(tensor)?.iter().map(|x| x * x).sum::<f64>().sqrt())
}

/// A folder that goes with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cce-models-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn copy(&self, case: &str) -> &Self {
        for entry in fs::read_dir(folder(case)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, self.0.join(path.file_name().unwrap())).unwrap();
        }
        self
    }

    pub fn names(&self) -> Vec<String> {
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

/// A small config in the form of transformers 4, with these entries put in.
pub fn small(model_type: &str, entries: Value) -> Value {
    let config = json!({
        "model_type": model_type, "vocab_size": 32, "hidden_size": 32, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "rope_theta": 100.0, "eos_token_id": [2, 7],
    });
    with(config, entries)
}

pub fn with(mut config: Value, entries: Value) -> Value {
    for (key, value) in entries.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}
