//! Time of the differentiable operations, forward and backward, at the shapes of a layer.
//!
//! `cargo run --release --example ops` takes a small layer on the CPU;
//! `cargo run --release --features cuda --example ops -- --device cuda --dtype bf16 --batch 8 --length 1024 --heads 32
//! --key-value-heads 8 --head-dim 64 --inner 8192` one of Llama-3.2-1B's on a GPU.

mod common;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_cut_cross_entropy::ops::{
    add_rms_norm, attention, geglu, rms_norm, rope, swiglu, AttentionOptions,
};
use clap::Parser;
use common::meter::Meter;

/// A line an operation: the median milliseconds of its forward, and of the backward of a weighted sum of its result, and
/// the most MiB in use beyond its inputs. The backward's time has that of the weighted sum in it: the first line shows it
/// alone.
#[derive(Parser, Debug)]
struct Args {
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
    /// f32, f64, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: String,
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Tokens a sequence
    #[arg(long, default_value_t = 256)]
    length: usize,
    #[arg(long, default_value_t = 8)]
    heads: usize,
    #[arg(long, default_value_t = 2)]
    key_value_heads: usize,
    #[arg(long, default_value_t = 64)]
    head_dim: usize,
    /// Dimensions inside the MLP
    #[arg(long, default_value_t = 2048)]
    inner: usize,
    /// Keys that a query sees at most
    #[arg(long)]
    window: Option<usize>,
    #[arg(long)]
    softcap: Option<f64>,
    /// Whether every query sees every key
    #[arg(long)]
    full: bool,
    /// Runs that are timed, after two that are not
    #[arg(long, default_value_t = 10)]
    runs: usize,
}

/// An operation on some variables.
type Operation<'a> = dyn Fn(&[Var]) -> candle_core::Result<Tensor> + 'a;

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.runs > 0, "--runs must be at least 1");
    let device = match args.device.as_str() {
        "cpu" => Device::Cpu,
        "cuda" => Device::new_cuda(0)?,
        other => anyhow::bail!("--device is cpu or cuda, got {other:?}"),
    };
    let dtype: DType = args.dtype.parse().context("--dtype")?;
    let &Args {
        batch,
        length,
        heads,
        key_value_heads,
        head_dim,
        inner,
        ..
    } = &args;
    let bench = Bench {
        meter: Meter::new(&device)?,
        runs: args.runs,
    };
    println!("{}: {args:?}", bench.meter.device_name());
    println!("operation          forward ms   backward ms   peak MiB");
    let random = |shape: &[usize]| -> Result<Var> {
        let normal = Tensor::randn(0f32, 1., shape, &device)?;
        Ok(Var::from_tensor(&normal.to_dtype(dtype)?)?)
    };
    let rows = batch * length;
    let hidden = [rows, heads * head_dim];
    let weight = random(&[heads * head_dim])?;
    let one = [random(&hidden)?, weight.clone()];
    let two = [random(&hidden)?, random(&hidden)?, weight];
    bench.run("the sum alone", &one[..1], &|x| x[0].affine(1., 0.))?;
    bench.run("rms_norm", &one, &|x| rms_norm(&x[0], &x[1], 1e-5, 0.))?;
    bench.run("add_rms_norm", &two, &|x| {
        let (sum, normed) = add_rms_norm(&x[0], &x[1], &x[2], 1e-5, 0.)?;
        sum + normed
    })?;
    let gated = [random(&[rows, inner])?, random(&[rows, inner])?];
    bench.run("swiglu", &gated, &|x| swiglu(&x[0], &x[1]))?;
    bench.run("geglu", &gated, &|x| geglu(&x[0], &x[1]))?;
    drop(gated);

    let of_keys = [batch, length, key_value_heads, head_dim];
    let qkv = [
        random(&[batch, length, heads, head_dim])?,
        random(&of_keys)?,
        random(&of_keys)?,
    ];
    let angles = Tensor::randn(0f32, 3., (length, head_dim / 2), &device)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    bench.run("rope", &qkv[..1], &|x| rope(&x[0], &cos, &sin))?;
    let options = AttentionOptions {
        causal: !args.full,
        softcap: args.softcap,
        window: args.window,
        scale: None,
    };
    let [forward, backward] = bench.run("attention", &qkv, &|x| {
        attention(&x[0], &x[1], &x[2], &options)
    })?;
    let seen: usize = (0..length)
        .map(|query| match options.causal {
            true => (query + 1).min(options.window.unwrap_or(length)),
            false => length,
        })
        .sum();
    // Two products forward, five of the same size backward.
    let products = 2e-9 * (batch * heads * head_dim * seen) as f64;
    println!(
        "attention: {:.1} TFLOP/s forward, {:.1} backward, counting what is seen",
        2. * products / forward,
        5. * products / backward
    );
    Ok(())
}

struct Bench {
    meter: Meter,
    runs: usize,
}

impl Bench {
    /// Prints a line and returns the milliseconds of forward and backward.
    fn run(&self, name: &str, vars: &[Var], operation: &Operation) -> Result<[f64; 2]> {
        let weights = operation(vars)?.detach();
        let (mut forward, mut backward) = (Vec::new(), Vec::new());
        let (mut peak, mut before) = (0, 0);
        for run in 0..self.runs + 2 {
            before = self.meter.start()?;
            let (result, ms) = self.meter.time(|| operation(vars))?;
            let loss = (&result * &weights)?.sum_all()?;
            let (gradients, backward_ms) = self.meter.time(|| loss.backward())?;
            peak = peak.max(self.meter.peak()?);
            drop(gradients);
            if run >= 2 {
                forward.push(ms);
                backward.push(backward_ms);
            }
        }
        let [forward, backward] = [forward, backward].map(|mut all| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        });
        let mib = peak.saturating_sub(before) as f64 / (1 << 20) as f64;
        println!("{name:17} {forward:11.3}   {backward:11.3}   {mib:8.1}");
        Ok([forward, backward])
    }
}
