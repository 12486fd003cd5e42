//! Time and memory of a training step of a decoder with random weights: the loss without logits beside Candle's own on
//! stored ones.
//!
//! `cargo run --release --example step` takes a small model on the CPU;
//! `cargo run --release --features cuda --example step -- --device cuda --dtype bf16 --model llama3.2-1b --batch 8
//! --length 1024 --gradient-checkpointing` one of a billion parameters on a GPU.

mod common;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_cut_cross_entropy::models::{AdamW, CausalLm, Config, Decoder, Lora};
use candle_cut_cross_entropy::{backward, Options, Preset};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder, VarMap};
use clap::{Parser, ValueEnum};
use common::meter::Meter;

/// Time and memory of a training step: forward, backward and AdamW.
///
/// A line a batch size and loss: the loss, the median milliseconds of a step, tokens a second, the most MiB in use in a
/// step, weights and optimizer included, and the median milliseconds of each part of a step. The host waits for the device
/// between the parts.
#[derive(Parser, Debug)]
struct Args {
    /// Shape of the model: small, llama3.2-1b, or a config.json
    #[arg(long, default_value = "small")]
    model: String,
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Loss::Cce, Loss::Baseline])]
    loss: Vec<Loss>,
    /// Sequences a step; several, to see which fit
    #[arg(long, value_delimiter = ',', default_values_t = [2])]
    batch: Vec<usize>,
    /// Tokens a sequence
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
    /// f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Compute the layers again in the backward
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Train adapters of this rank on the projections, and nothing else
    #[arg(long)]
    lora: Option<usize>,
    /// And an adapter of the head
    #[arg(long, requires = "lora")]
    head_adapter: bool,
    /// Steps that are timed, after one that is not
    #[arg(long, default_value_t = 3)]
    steps: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Loss {
    Cce,
    CceKahanFullC,
    CceExact,
    Baseline,
}

const SMALL: &str = r#"{
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": true
}"#;
const LLAMA_3_2_1B: &str = r#"{
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": true,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    }
}"#;
const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<()> {
    common::memory::keep_freed();
    let args = Args::parse();
    ensure!(args.steps > 0, "--steps must be at least 1");
    ensure!(args.length > 1, "--length must be at least 2");
    let device = match args.device.as_str() {
        "cpu" => Device::Cpu,
        "cuda" => Device::new_cuda(0)?,
        other => anyhow::bail!("--device is cpu or cuda, got {other:?}"),
    };
    let dtype: DType = args.dtype.parse().context("--dtype")?;
    let config = match args.model.as_str() {
        "small" => Config::from_json(SMALL)?,
        "llama3.2-1b" => Config::from_json(LLAMA_3_2_1B)?,
        file => Config::from_file(file)?,
    };
    let meter = Meter::new(&device)?;
    let vars = VarMap::new();
    let mut decoder = Decoder::new(config, VarBuilder::from_varmap(&vars, dtype, &device))?;
    let adapters = VarMap::new();
    let mut trained = &vars;
    if let Some(rank) = args.lora {
        let lora = Lora {
            rank,
            ..Lora::default()
        };
        let lora = match args.head_adapter {
            true => lora.with_head(),
            false => lora,
        };
        decoder = decoder.with_lora(&lora, &adapters)?;
        trained = &adapters;
    }
    decoder.set_gradient_checkpointing(args.gradient_checkpointing);
    let count = |vars: &VarMap| {
        vars.all_vars()
            .iter()
            .map(|v| v.elem_count())
            .sum::<usize>()
    };
    println!(
        "{}: {:.1} million weights, {:.1} million trained, {args:?}",
        meter.device_name(),
        count(&vars) as f64 / 1e6,
        count(trained) as f64 / 1e6
    );
    println!("loss              batch    loss value   ms a step   tokens/s   peak MiB   forward   backward   AdamW");
    let mut optimizer = AdamW::from_varmap(trained, ParamsAdamW::default())?;
    for &batch in &args.batch {
        for &loss in &args.loss {
            let name = loss.to_possible_value().context("a loss has a name")?;
            let name = name.get_name();
            match measure(&args, &decoder, &mut optimizer, &meter, loss, batch) {
                Ok(Measured { loss, ms, parts, peak }) => println!(
                    "{name:17} {batch:5}  {loss:12.4}  {ms:10.1}  {:9.0}  {:9.0}  {:8.1}  {:9.1}  {:6.1}",
                    (batch * args.length) as f64 / ms * 1e3,
                    peak as f64 / MIB,
                    parts[0],
                    parts[1],
                    parts[2]
                ),
                Err(e) if e.to_string().to_lowercase().contains("out of memory") => {
                    println!("{name:17} {batch:5}  out of memory")
                }
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

struct Measured {
    /// Of the first step.
    loss: f32,
    /// Medians of a step, and of its forward, backward and update.
    ms: f64,
    parts: [f64; 3],
    /// The most bytes in use in a step.
    peak: usize,
}

fn measure(
    args: &Args,
    decoder: &Decoder,
    optimizer: &mut AdamW,
    meter: &Meter,
    loss: Loss,
    batch: usize,
) -> Result<Measured> {
    let vocab = decoder.config().vocab_size;
    let ids = (0..batch * args.length).map(|i| (i.wrapping_mul(2654435761) >> 7) % vocab);
    let ids = Tensor::from_iter(ids.map(|id| id as u32), decoder.device())?;
    let ids = ids.reshape((batch, args.length))?;
    let mut first = None;
    let mut times: [Vec<f64>; 4] = Default::default();
    let mut peak = 0;
    for step in 0..=args.steps {
        meter.start()?;
        let (value, forward) = meter.time(|| forward(decoder, &ids, loss))?;
        let (gradients, backward) = meter.time(|| backward(&value))?;
        let (_, update) = meter.time(|| optimizer.step(&gradients))?;
        peak = peak.max(meter.peak()?);
        first.get_or_insert(value.detach());
        if step > 0 {
            let all = [forward + backward + update, forward, backward, update];
            for (times, ms) in times.iter_mut().zip(all) {
                times.push(ms);
            }
        }
    }
    let [ms, parts @ ..] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    let first = first.context("a step was made")?;
    Ok(Measured {
        loss: first.to_dtype(DType::F32)?.to_scalar()?,
        ms,
        parts,
        peak,
    })
}

fn forward(decoder: &Decoder, ids: &Tensor, loss: Loss) -> candle_core::Result<Tensor> {
    let preset = match loss {
        Loss::Cce => Preset::Cce,
        Loss::CceKahanFullC => Preset::CceKahanFullC,
        Loss::CceExact => Preset::CceExact,
        Loss::Baseline => {
            let steps = ids.dim(1)? - 1;
            let hidden = decoder.hidden_states(ids)?.narrow(1, 0, steps)?;
            let targets = ids.narrow(1, 1, steps)?.flatten_all()?;
            let logits = decoder.logits(&hidden.flatten_to(1)?)?;
            return candle_nn::loss::cross_entropy(&logits.to_dtype(DType::F32)?, &targets);
        }
    };
    Ok(decoder.loss(ids, ids, &Options::preset(preset))?.loss)
}
