//! Time and memory of the loss, in the columns of the reference's benchmark.
//!
//! `cargo run --release --example bench -- --data flat,peaked` measures on the CPU,
//! `--features cuda --example bench -- --device cuda --dtype bf16 --shape gemma2-2b` on a GPU.

mod benchmark;
mod common;

use anyhow::{bail, ensure, Context, Result};
use benchmark::arguments::{Args, DeviceName, Kind, Method};
use benchmark::data;
use benchmark::table::{Sample, Table};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_cut_cross_entropy::soft_targets::{divergence, top_k_divergence, Teacher, TopK};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Entropy, LowRank, Options, Output, Preset,
};
use clap::Parser;
use common::meter::Meter;
use std::collections::HashMap;
use std::path::PathBuf;

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
    let datas: Vec<Option<data::Data>> = match args.inputs {
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
                data::load(path, args.dtype, &device)?,
            ),
            (None, Some(data)) => {
                let dtype = args.dtype.unwrap_or(DType::F32);
                let inputs = data::make(data, args.shape, dtype, args.seed, &device)?;
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
    /// A and B.
    adapter: Option<[Var; 2]>,
    targets: Tensor,
    /// Where a method needs it.
    teacher: Option<TopK>,
    /// Another position's distribution, by a classifier of its own, where a method needs it.
    whole_teacher: Option<Teacher>,
}

/// A loss and, from this crate's, what else came with it.
struct Loss {
    loss: Tensor,
    output: Option<Output>,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args, meter: &'a Meter, inputs: data::Inputs) -> Result<Self> {
        let bias = match args.bias {
            true => Some(Var::from_tensor(&data::bias(
                inputs.classifier.dim(0)?,
                inputs.classifier.dtype(),
                args.seed,
                inputs.classifier.device(),
            )?)?),
            false => None,
        };
        let wants_whole = |method: &Method| matches!(method, Method::Divergence(_));
        let whole_teacher = match args.methods.iter().any(wants_whole) {
            true => Some(Teacher::new(
                &inputs.embeddings.roll(1, 0)?,
                &inputs.classifier.copy()?,
            )),
            false => None,
        };
        let distils = args.methods.iter().any(|m| matches!(m, Method::TopK(_)));
        let teacher = match distils {
            true => Some(data::teacher(
                inputs.embeddings.dim(0)?,
                inputs.classifier.dim(0)?,
                args.k,
                args.seed,
                inputs.classifier.device(),
            )?),
            false => None,
        };
        let (vocab, hidden) = inputs.classifier.dims2()?;
        let normal = |rows, columns, std: f64| -> Result<Var> {
            let tensor = Tensor::randn(
                0f32,
                std as f32,
                (rows, columns),
                inputs.classifier.device(),
            )?;
            Ok(Var::from_tensor(
                &tensor.to_dtype(inputs.classifier.dtype())?,
            )?)
        };
        let adapter = match args.rank {
            0 => None,
            rank => Some([
                normal(rank, hidden, 1. / (hidden as f64).sqrt())?,
                normal(vocab, rank, 0.02)?,
            ]),
        };
        Ok(Self {
            args,
            meter,
            teacher,
            whole_teacher,
            adapter,
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
            Method::Preset(_) | Method::TopK(_) | Method::Divergence(_) => return Ok(()),
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
        let embeddings = pick(&self.embeddings);
        let classifier = match self.frozen() {
            true => self.classifier.as_detached_tensor(),
            false => pick(&self.classifier),
        };
        let bias = self.bias.as_ref().map(pick);
        let preset = match method {
            Method::Preset(preset) => preset,
            Method::TopK(_) | Method::Divergence(_) => Preset::CceExact,
            Method::Baseline if self.adapter.is_some() => {
                candle_core::bail!("the baseline has no adapter")
            }
            Method::Baseline => {
                let loss = self.baseline(&embeddings, &classifier, bias.as_ref())?;
                return Ok(Loss { loss, output: None });
            }
            Method::Product => candle_core::bail!("mm is not a loss"),
        };
        let mut options = Options::preset(preset)
            .softcap(self.args.softcap)
            .logit_scale(self.args.logit_scale)
            .label_smoothing(self.args.label_smoothing)
            .entropy_bonus(self.args.entropy_bonus)
            .entropy(self.args.entropy)
            .predicted(self.args.predicted)
            .strategy(self.args.strategy);
        options = options.bias(bias.as_ref());
        if let Some([a, b]) = &self.adapter {
            options = options.adapter(LowRank::new(&pick(a), &pick(b), 1.));
        }
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
        if let (Method::TopK(rest), Some(teacher)) = (method, &self.teacher) {
            let teacher = teacher.clone().rest(rest);
            let (e, c) = (&embeddings, &classifier);
            let loss = top_k_divergence(e, c, &self.targets, &teacher, &options)?;
            return Ok(Loss { loss, output: None });
        }
        if let (Method::Divergence(kind), Some(teacher)) = (method, &self.whole_teacher) {
            let teacher = teacher.clone().softcap(self.args.softcap);
            let (e, c) = (&embeddings, &classifier);
            let loss = divergence(e, c, &self.targets, &teacher, kind, &options)?;
            return Ok(Loss { loss, output: None });
        }
        let output = linear_cross_entropy(&embeddings, &classifier, &self.targets, &options)?;
        let loss = match (self.args.entropy, &output.entropy) {
            (Entropy::Differentiable, Some(entropy)) => {
                (&output.loss + (entropy.mean_all()? * 0.01)?)?
            }
            _ => output.loss.clone(),
        };
        Ok(Loss {
            loss,
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
        if self.args.logit_scale != 1. {
            logits = (logits * self.args.logit_scale)?;
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
        let mut inputs = vec![("de", &self.embeddings)];
        match &self.adapter {
            Some([a, b]) => inputs.extend([("da", a), ("db_adapter", b)]),
            None if self.frozen() => {}
            None => inputs.push(("dc", &self.classifier)),
        }
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

    fn frozen(&self) -> bool {
        self.args.frozen || self.adapter.is_some()
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

/// Bytes of host memory that are free, where the system tells.
fn available() -> Option<usize> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}
