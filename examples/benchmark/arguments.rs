//! What the command line says.

use super::data;
use candle_core::DType;
use candle_cut_cross_entropy::soft_targets::{Divergence, Rest};
use candle_cut_cross_entropy::{Entropy, Filter, Implementation, Preset, Strategy};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::str::FromStr;

/// Measure time and memory of the loss.
///
/// runtime_ms is a median; op_mem_mb the measured peak over the inputs, in MiB; over_grads_mb the
/// same without the gradients that are returned. x_mm is the runtime in units of one product
/// E C^T by Candle, measured alternately with it where the methods begin with mm: the median of the
/// ratios. kept is the share of gradient tiles that the filter kept.
#[derive(Parser, Debug)]
pub struct Args {
    /// cce, cce_kahan, cce_kahan_full_c, cce_kahan_full_e, cce_exact, native, baseline (Candle's
    /// logits and candle_nn::loss::cross_entropy), top_k and top_k_left_out (top_k_divergence, exact, from a teacher of
    /// random classes: the others as one class, or left out), forward_kl, reverse_kl and jensen_shannon (divergence, from
    /// a teacher with a head of the same size), mm (the product E C^T alone)
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "mm,cce,cce_kahan,cce_kahan_full_c,cce_kahan_full_e,cce_exact,native,baseline"
    )]
    pub methods: Vec<Method>,
    #[arg(long, value_delimiter = ',', value_enum,
          default_values_t = [Kind::Fw, Kind::Bw, Kind::FwBw])]
    pub kinds: Vec<Kind>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    pub device: DeviceName,
    /// f32, bf16 or f16 [default: f32, or that of --inputs]
    #[arg(long)]
    pub dtype: Option<DType>,
    /// N,D,V or one of gemma2-2b, gemma2-9b, llama3-8b, mistral-nemo, phi3.5-mini, qwen2.5-7b,
    /// qwen2.5-0.5b (N = 8192)
    #[arg(long, default_value = "1024,512,32000")]
    pub shape: data::Shape,
    /// A head made of random numbers. None shows what a head of a real model does: see --inputs
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [data::Data::Flat])]
    pub data: Vec<data::Data>,
    /// A safetensors file with embeddings, classifier and targets, in place of --shape and --data: a real
    /// head, as the example heads writes it, or your own
    #[arg(long)]
    pub inputs: Option<PathBuf>,
    /// Writes loss, de, dc (and db) of the first method other than mm to this safetensors file
    #[arg(long)]
    pub grads: Option<PathBuf>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
    #[arg(long, default_value_t = 5)]
    pub iters: usize,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// auto, recompute or fused
    #[arg(long, default_value = "auto", value_parser = parse_strategy)]
    pub strategy: Strategy,
    /// That of the presets but native: auto, native, cuda or cuda-portable
    #[arg(long, default_value = "auto", value_parser = parse_implementation)]
    pub implementation: Implementation,
    /// Workspaces in MiB, one after the other [default: the implementation's]
    #[arg(long, value_delimiter = ',')]
    pub workspace: Vec<usize>,
    /// In place of the filters of presets that have one: off, auto, a threshold such as 0.001, or drop:0.000244 as the reference
    #[arg(long)]
    pub filter: Option<Filter>,
    #[arg(long)]
    pub softcap: Option<f64>,
    /// With a bias
    #[arg(long)]
    pub bias: bool,
    /// The classifier is not differentiated
    #[arg(long)]
    pub frozen: bool,
    /// The rank of a low-rank adapter of the classifier, which is frozen then, in the inputs' dtype; 0 for none
    #[arg(long, default_value_t = 0)]
    pub rank: usize,
    /// What logits are multiplied by
    #[arg(long, default_value_t = 1.)]
    pub logit_scale: f64,
    #[arg(long, default_value_t = 0.)]
    pub label_smoothing: f64,
    /// Subtracts this times the entropy of each position from its loss.
    #[arg(long, default_value_t = 0.)]
    pub entropy_bonus: f64,
    /// The entropy of each position: off, value, or differentiable, which adds a hundredth of its mean to the loss
    #[arg(long, default_value = "off", value_parser = parse_entropy)]
    pub entropy: Entropy,
    /// The likeliest class of each position
    #[arg(long)]
    pub predicted: bool,
    /// Classes that the teacher of top_k names a position
    #[arg(long, default_value_t = 64)]
    pub k: usize,
    /// loss.backward() in place of this crate's backward(&loss)
    #[arg(long)]
    pub plain_backward: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    Preset(Preset),
    Baseline,
    TopK(Rest),
    Product,
    Divergence(Divergence),
}

impl FromStr for Method {
    type Err = candle_core::Error;

    fn from_str(name: &str) -> candle_core::Result<Self> {
        Ok(match name {
            "baseline" => Method::Baseline,
            "top_k" => Method::TopK(Rest::OneClass),
            "top_k_left_out" => Method::TopK(Rest::LeftOut),
            "mm" => Method::Product,
            "forward_kl" => Method::Divergence(Divergence::ForwardKl),
            "reverse_kl" => Method::Divergence(Divergence::ReverseKl),
            "jensen_shannon" => Method::Divergence(Divergence::JensenShannon(0.5)),
            preset => Method::Preset(preset.parse()?),
        })
    }
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Method::Preset(preset) => preset.name(),
            Method::Baseline => "baseline",
            Method::TopK(Rest::OneClass) => "top_k",
            Method::TopK(_) => "top_k_left_out",
            Method::Product => "mm",
            Method::Divergence(Divergence::ForwardKl) => "forward_kl",
            Method::Divergence(Divergence::ReverseKl) => "reverse_kl",
            Method::Divergence(Divergence::JensenShannon(_)) => "jensen_shannon",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The forward of inputs that are not differentiated.
    #[value(name = "loss-eval")]
    Eval,
    /// The forward of a training step.
    #[value(name = "loss-fw")]
    Fw,
    #[value(name = "loss-bw")]
    Bw,
    #[value(name = "loss-fw-bw")]
    FwBw,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Eval => "loss-eval",
            Kind::Fw => "loss-fw",
            Kind::Bw => "loss-bw",
            Kind::FwBw => "loss-fw-bw",
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub enum DeviceName {
    Cpu,
    Cuda(usize),
}

fn parse_device(name: &str) -> Result<DeviceName, String> {
    match name.split_once(':') {
        None if name == "cpu" => Ok(DeviceName::Cpu),
        None if name == "cuda" => Ok(DeviceName::Cuda(0)),
        Some(("cuda", n)) => match n.parse() {
            Ok(n) => Ok(DeviceName::Cuda(n)),
            Err(_) => Err(format!("expected cuda:N, got {name}")),
        },
        _ => Err(format!("expected cpu, cuda or cuda:N, got {name}")),
    }
}

fn parse_entropy(name: &str) -> Result<Entropy, String> {
    match name {
        "off" => Ok(Entropy::Off),
        "value" => Ok(Entropy::Value),
        "differentiable" => Ok(Entropy::Differentiable),
        _ => Err(format!("expected off, value or differentiable, got {name}")),
    }
}

fn parse_strategy(name: &str) -> Result<Strategy, String> {
    match name {
        "auto" => Ok(Strategy::Auto),
        "recompute" => Ok(Strategy::Recompute),
        "fused" => Ok(Strategy::Fused),
        _ => Err(format!("expected auto, recompute or fused, got {name}")),
    }
}

fn parse_implementation(name: &str) -> Result<Implementation, String> {
    match name {
        "auto" => Ok(Implementation::Auto),
        "native" => Ok(Implementation::Native),
        "cuda" => Ok(Implementation::Cuda),
        "cuda-portable" => Ok(Implementation::CudaPortable),
        _ => Err(format!(
            "expected auto, native, cuda or cuda-portable, got {name}"
        )),
    }
}
