//! Time and memory of the loss, in the columns of the reference's benchmark.
//!
//! `cargo run --release --example bench -- --data flat,peaked` measures on the CPU,
//! `--features cuda --example bench -- --device cuda --dtype bf16 --shape gemma2-2b` on a GPU.

mod bench_data;
mod common;

use anyhow::{bail, ensure, Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Filter, Implementation, Options, Output, Preset, Strategy,
};
use clap::{Parser, ValueEnum};
use common::meter::Meter;
use std::collections::HashMap;
use std::path::PathBuf;
use std::str::FromStr;

/// Measure time and memory of the loss.
///
/// runtime_ms is a median; op_mem_mb the measured peak over the inputs, in MiB; over_grads_mb the
/// same without the gradients that are returned. x_mm is the runtime in units of one product
/// E C^T by Candle, measured alternately with it where the methods begin with mm: the median of the
/// ratios. kept is the share of gradient tiles that the filter kept.
#[derive(Parser, Debug)]
struct Args {
    /// cce, cce_kahan, cce_kahan_full_c, cce_kahan_full_e, cce_exact, native, baseline (Candle's
    /// logits and candle_nn::loss::cross_entropy), mm (the product E C^T alone)
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "mm,cce,cce_kahan,cce_kahan_full_c,cce_kahan_full_e,cce_exact,native,baseline"
    )]
    methods: Vec<Method>,
    #[arg(long, value_delimiter = ',', value_enum,
          default_values_t = [Kind::Fw, Kind::Bw, Kind::FwBw])]
    kinds: Vec<Kind>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: DeviceName,
    /// f32, bf16 or f16 [default: f32, or that of --inputs]
    #[arg(long)]
    dtype: Option<DType>,
    /// N,D,V or one of gemma2-2b, gemma2-9b, llama3-8b, mistral-nemo, phi3.5-mini, qwen2.5-7b,
    /// qwen2.5-0.5b (N = 8192)
    #[arg(long, default_value = "1024,512,32000")]
    shape: bench_data::Shape,
    /// A head made of random numbers. None shows what a head of a real model does: see --inputs
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [bench_data::Data::Flat])]
    data: Vec<bench_data::Data>,
    /// A safetensors file with embeddings, classifier and targets, in place of --shape and --data: a real
    /// head, as the example heads writes it, or your own
    #[arg(long)]
    inputs: Option<PathBuf>,
    /// Writes loss, de, dc (and db) of the first method other than mm to this safetensors file
    #[arg(long)]
    grads: Option<PathBuf>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    #[arg(long, default_value_t = 5)]
    iters: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// auto, recompute or fused
    #[arg(long, default_value = "auto", value_parser = parse_strategy)]
    strategy: Strategy,
    /// That of the presets but native: auto, native, cuda or cuda-portable
    #[arg(long, default_value = "auto", value_parser = parse_implementation)]
    implementation: Implementation,
    /// Workspaces in MiB, one after the other [default: the implementation's]
    #[arg(long, value_delimiter = ',')]
    workspace: Vec<usize>,
    /// In place of the filters of presets that have one: off, auto, a threshold such as 0.001, or drop:0.000244 as the reference
    #[arg(long)]
    filter: Option<Filter>,
    #[arg(long)]
    softcap: Option<f64>,
    /// With a bias
    #[arg(long)]
    bias: bool,
    /// loss.backward() in place of this crate's backward(&loss)
    #[arg(long)]
    plain_backward: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Preset(Preset),
    Baseline,
    Product,
}

impl FromStr for Method {
    type Err = candle_core::Error;

    fn from_str(name: &str) -> candle_core::Result<Self> {
        Ok(match name {
            "baseline" => Method::Baseline,
            "mm" => Method::Product,
            preset => Method::Preset(preset.parse()?),
        })
    }
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Method::Preset(preset) => preset.name(),
            Method::Baseline => "baseline",
            Method::Product => "mm",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
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
    fn name(self) -> &'static str {
        match self {
            Kind::Eval => "loss-eval",
            Kind::Fw => "loss-fw",
            Kind::Bw => "loss-bw",
            Kind::FwBw => "loss-fw-bw",
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum DeviceName {
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

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.iters > 0, "--iters must be at least 1");
    let device = match args.device {
        DeviceName::Cpu => Device::Cpu,
        DeviceName::Cuda(n) => Device::new_cuda(n).with_context(|| {
            format!("opening CUDA device {n} (is the example built with --features cuda?)")
        })?,
    };
    let meter = Meter::new(&device)?;
    let mut table = Table::new(args.json);
    let mut grads = args.grads.clone();
    let datas: Vec<Option<bench_data::Data>> = match args.inputs {
        Some(_) => vec![None],
        None => args.data.iter().copied().map(Some).collect(),
    };
    ensure!(
        args.grads.is_none() || datas.len() == 1,
        "--grads takes the gradients of one --data, got {}",
        datas.len()
    );
    for kind_of_data in datas {
        let (name, inputs) = match (&args.inputs, kind_of_data) {
            (Some(path), _) => (
                path.file_stem()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                bench_data::load(path, args.dtype, &device)?,
            ),
            (None, Some(data)) => {
                let dtype = args.dtype.unwrap_or(DType::F32);
                let inputs = bench_data::make(data, args.shape, dtype, args.seed, &device)?;
                (data.name().to_string(), inputs)
            }
            (None, None) => bail!("no data"),
        };
        let bench = Bench::new(&args, &meter, inputs)?;
        table.start(&bench.describe(&device))?;
        for &method in &args.methods {
            if let Err(error) = bench.rows(method, &name, &mut table) {
                table.error(method.name(), &name, &error);
                continue;
            }
            if method != Method::Product {
                if let Some(path) = grads.take() {
                    bench.write_gradients(method, &path)?;
                }
            }
        }
    }
    ensure!(
        grads.is_none(),
        "no method ran whose gradients --grads could write"
    );
    Ok(())
}

/// The inputs of one run and how they are used.
struct Bench<'a> {
    args: &'a Args,
    meter: &'a Meter,
    embeddings: Var,
    classifier: Var,
    bias: Option<Var>,
    targets: Tensor,
}

/// One run of a method.
struct Sample {
    ms: f64,
    /// The time in units of the product's.
    x_mm: Option<f64>,
    peak: usize,
    gradients: usize,
    kept: Option<f64>,
    loss: Option<f32>,
}

/// A loss and, from this crate's, what else came with it.
struct Loss {
    loss: Tensor,
    output: Option<Output>,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args, meter: &'a Meter, inputs: bench_data::Inputs) -> Result<Self> {
        let bias = match args.bias {
            true => Some(Var::from_tensor(&bench_data::bias(
                inputs.classifier.dim(0)?,
                inputs.classifier.dtype(),
                args.seed,
                inputs.classifier.device(),
            )?)?),
            false => None,
        };
        Ok(Self {
            args,
            meter,
            embeddings: Var::from_tensor(&inputs.embeddings)?,
            classifier: Var::from_tensor(&inputs.classifier)?,
            bias,
            targets: inputs.targets,
        })
    }

    fn describe(&self, device: &Device) -> String {
        let (n, d) = (self.embeddings.dims()[0], self.embeddings.dims()[1]);
        format!(
            "N = {n}, D = {d}, V = {}, {:?}, {}",
            self.classifier.dims()[0],
            self.embeddings.dtype(),
            match device {
                Device::Cpu => format!("CPU, {} threads", rayon::current_num_threads()),
                _ => self.meter.device_name(),
            }
        )
    }

    /// Measures the rows of one method.
    fn rows(&self, method: Method, data: &str, table: &mut Table) -> Result<()> {
        self.check_memory(method)?;
        if method == Method::Product {
            let sample = self.median(|| self.product())?;
            table.row(method.name(), "mm", data, None, &sample);
            return Ok(());
        }
        let workspaces = match self.args.workspace[..] {
            [] => vec![None],
            ref given => given.iter().copied().map(Some).collect(),
        };
        for workspace in workspaces {
            for &kind in &self.args.kinds {
                let sample = self.median(|| self.loss_sample(method, kind, workspace))?;
                table.row(method.name(), kind.name(), data, workspace, &sample);
            }
        }
        Ok(())
    }

    /// On the CPU, running out of memory ends the program: better not begin.
    fn check_memory(&self, method: Method) -> Result<()> {
        let logits = self.embeddings.dims()[0] * self.classifier.dims()[0];
        let needed = match method {
            Method::Preset(_) => return Ok(()),
            Method::Product => logits * self.embeddings.dtype().size_in_bytes(),
            // Logits, what log_softmax makes of them, and their gradients.
            Method::Baseline => logits * 8 * DType::F32.size_in_bytes(),
        };
        if let (Meter::Host, Some(available)) = (self.meter, available()) {
            ensure!(
                needed <= available,
                "skipped: needs about {} MiB, {} MiB are free",
                needed >> 20,
                available >> 20
            );
        }
        Ok(())
    }

    /// The sample of the median time, with the largest peak and the median ratio, after a warm-up.
    fn median(&self, sample: impl Fn() -> Result<Sample>) -> Result<Sample> {
        sample()?;
        let with_product = self.args.methods.first() == Some(&Method::Product)
            && self.check_memory(Method::Product).is_ok();
        let mut samples = Vec::with_capacity(self.args.iters);
        let mut ratios = Vec::new();
        for _ in 0..self.args.iters {
            // A GPU's clock follows its load: only neighbours in time can be compared.
            let product_ms = match with_product {
                true => Some(self.product()?.ms),
                false => None,
            };
            let sample = sample()?;
            ratios.extend(product_ms.map(|product| sample.ms / product));
            samples.push(sample);
        }
        ratios.sort_by(f64::total_cmp);
        let peak = samples.iter().map(|s| s.peak).max().unwrap_or(0);
        samples.sort_by(|a, b| a.ms.total_cmp(&b.ms));
        let middle = samples.len() / 2;
        Ok(Sample {
            peak,
            x_mm: ratios.get(middle).copied(),
            ..samples.swap_remove(middle)
        })
    }

    fn product(&self) -> Result<Sample> {
        let (embeddings, classifier) = (self.embeddings.detach(), self.classifier.detach());
        let before = self.meter.start()?;
        let (logits, ms) = self.meter.time(|| embeddings.matmul(&classifier.t()?))?;
        let peak = self.meter.peak()? - before;
        drop(logits);
        Ok(Sample {
            ms,
            x_mm: None,
            peak,
            gradients: 0,
            kept: None,
            loss: None,
        })
    }

    fn loss_sample(&self, method: Method, kind: Kind, workspace: Option<usize>) -> Result<Sample> {
        let meter = self.meter;
        let before = meter.start()?;
        let (loss, gradients, ms) = match kind {
            Kind::Eval | Kind::Fw => {
                let (loss, ms) = meter.time(|| self.loss(method, kind == Kind::Fw, workspace))?;
                (loss, None, ms)
            }
            Kind::Bw => {
                let loss = self.loss(method, true, workspace)?;
                meter.start()?;
                let (gradients, ms) = meter.time(|| self.backward(&loss.loss))?;
                (loss, Some(gradients), ms)
            }
            Kind::FwBw => {
                let ((loss, gradients), ms) = meter.time(|| {
                    let loss = self.loss(method, true, workspace)?;
                    let gradients = self.backward(&loss.loss)?;
                    Ok((loss, gradients))
                })?;
                (loss, Some(gradients), ms)
            }
        };
        let peak = meter.peak()? - before;
        let mut returned = 0;
        if let Some(gradients) = gradients {
            for (_, gradient) in self.gradients(&gradients)? {
                returned += gradient.elem_count() * gradient.dtype().size_in_bytes();
            }
        }
        Ok(Sample {
            ms,
            x_mm: None,
            peak,
            gradients: returned,
            kept: match &loss.output {
                Some(output) => output.kept_tiles()?,
                None => None,
            },
            loss: Some(loss.loss.to_scalar()?),
        })
    }

    fn loss(
        &self,
        method: Method,
        tracked: bool,
        workspace: Option<usize>,
    ) -> candle_core::Result<Loss> {
        let pick = |var: &Var| match tracked {
            true => var.as_tensor().clone(),
            false => var.as_detached_tensor(),
        };
        let (embeddings, classifier) = (pick(&self.embeddings), pick(&self.classifier));
        let bias = self.bias.as_ref().map(pick);
        let preset = match method {
            Method::Preset(preset) => preset,
            Method::Baseline => {
                let loss = self.baseline(&embeddings, &classifier, bias.as_ref())?;
                return Ok(Loss { loss, output: None });
            }
            Method::Product => candle_core::bail!("mm is not a loss"),
        };
        let mut options = Options::preset(preset)
            .softcap(self.args.softcap)
            .strategy(self.args.strategy);
        options = options.bias(bias.as_ref());
        if let Some(workspace) = workspace {
            options = options.workspace(workspace << 20);
        }
        let filters = !matches!(preset, Preset::CceExact | Preset::Native);
        if let (Some(filter), true) = (self.args.filter, filters) {
            options = options.filter(filter);
        }
        if preset != Preset::Native {
            options = options.implementation(self.args.implementation);
        }
        let output = linear_cross_entropy(&embeddings, &classifier, &self.targets, &options)?;
        Ok(Loss {
            loss: output.loss.clone(),
            output: Some(output),
        })
    }

    fn baseline(
        &self,
        embeddings: &Tensor,
        classifier: &Tensor,
        bias: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let mut logits = embeddings.matmul(&classifier.t()?)?;
        if let Some(bias) = bias {
            logits = logits.broadcast_add(bias)?;
        }
        if let Some(softcap) = self.args.softcap {
            logits = ((logits / softcap)?.tanh()? * softcap)?;
        }
        candle_nn::loss::cross_entropy(&logits.to_dtype(DType::F32)?, &self.targets)
    }

    fn backward(&self, loss: &Tensor) -> candle_core::Result<GradStore> {
        match self.args.plain_backward {
            true => loss.backward(),
            false => backward(loss),
        }
    }

    fn gradients(&self, store: &GradStore) -> Result<Vec<(&'static str, Tensor)>> {
        let mut inputs = vec![("de", &self.embeddings), ("dc", &self.classifier)];
        inputs.extend(self.bias.as_ref().map(|bias| ("db", bias)));
        inputs
            .into_iter()
            .map(|(name, var)| {
                let gradient = store
                    .get(var)
                    .with_context(|| format!("{name} is missing"))?;
                Ok((name, gradient.clone()))
            })
            .collect()
    }

    fn write_gradients(&self, method: Method, path: &PathBuf) -> Result<()> {
        let workspace = self.args.workspace.first().copied();
        let loss = self.loss(method, true, workspace)?.loss;
        let mut tensors = HashMap::from([("loss", loss.detach())]);
        tensors.extend(self.gradients(&self.backward(&loss)?)?);
        candle_core::safetensors::save(&tensors, path)
            .with_context(|| format!("writing {}", path.display()))
    }
}

/// Prints the rows.
struct Table {
    json: bool,
}

impl Table {
    fn new(json: bool) -> Self {
        Self { json }
    }

    fn start(&mut self, description: &str) -> Result<()> {
        if self.json {
            eprintln!("{description}");
            return Ok(());
        }
        println!("{description}");
        println!(
            "{:18}{:12}{:>11}{:>11}{:>15}{:>8}{:>8}{:>10}{:>8}  test_data",
            "method",
            "kind",
            "runtime_ms",
            "op_mem_mb",
            "over_grads_mb",
            "x_mm",
            "kept",
            "loss",
            "budget"
        );
        Ok(())
    }

    fn row(
        &mut self,
        method: &str,
        kind: &str,
        data: &str,
        workspace: Option<usize>,
        sample: &Sample,
    ) {
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        let peak = mib(sample.peak);
        let over_gradients = mib(sample.peak.saturating_sub(sample.gradients));
        if self.json {
            println!(
                "{}",
                serde_json::json!({
                    "method": method, "kind": kind, "runtime_ms": sample.ms, "op_mem_mb": peak,
                    "over_grads_mb": over_gradients, "x_mm": sample.x_mm, "kept": sample.kept,
                    "loss": sample.loss, "test_data": data, "workspace_mb": workspace,
                })
            );
            return;
        }
        let or_dash = |value: Option<f64>, digits: usize| match value {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_string(),
        };
        println!(
            "{method:18}{kind:12}{:>11.2}{peak:>11.1}{over_gradients:>15.1}{:>8}{:>8}{:>10}{:>8}  {data}",
            sample.ms,
            or_dash(sample.x_mm, 3),
            or_dash(sample.kept, 3),
            or_dash(sample.loss.map(f64::from), 4),
            or_dash(workspace.map(|mib| mib as f64), 0),
        );
    }

    fn error(&mut self, method: &str, data: &str, error: &anyhow::Error) {
        match self.json {
            true => println!(
                "{}",
                serde_json::json!({"method": method, "test_data": data, "error": format!("{error:#}")})
            ),
            false => println!("{method:18}{error:#}"),
        }
    }
}

/// Bytes of host memory that are free, where the system tells.
fn available() -> Option<usize> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}
