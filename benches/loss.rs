//! Criterion benchmarks of small shapes: the loss, and the loss with its gradients.

use candle_core::{Device, Result, Tensor, Var};
use candle_cut_cross_entropy::{backward, linear_cross_entropy, Options, Preset};
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use rand::{rngs::StdRng, Rng, SeedableRng};

/// N, D, V
const SHAPES: [(usize, usize, usize); 2] = [(256, 256, 8192), (128, 128, 32000)];

/// Presets, and Candle's logits with its own loss.
const METHODS: [Option<Preset>; 4] = [
    Some(Preset::Cce),
    Some(Preset::CceExact),
    Some(Preset::Native),
    None,
];

fn loss(
    embeddings: &Tensor,
    classifier: &Tensor,
    targets: &Tensor,
    method: Option<Preset>,
) -> Result<Tensor> {
    match method {
        Some(preset) => {
            let options = Options::preset(preset);
            Ok(linear_cross_entropy(embeddings, classifier, targets, &options)?.loss)
        }
        None => candle_nn::loss::cross_entropy(&embeddings.matmul(&classifier.t()?)?, targets),
    }
}

fn run(c: &mut Criterion, device: &Device) -> Result<()> {
    let place = if device.is_cuda() { "cuda" } else { "cpu" };
    let mut rng = StdRng::seed_from_u64(0);
    for (n, d, v) in SHAPES {
        let mut uniform = |rows: usize, scale: f32| {
            let values: Vec<f32> = (0..rows * d)
                .map(|_| rng.random_range(-scale..scale))
                .collect();
            Var::from_tensor(&Tensor::from_vec(values, (rows, d), device)?)
        };
        let (embeddings, classifier) = (uniform(n, 1.)?, uniform(v, 0.1)?);
        let targets: Vec<i64> = (0..n).map(|_| rng.random_range(0..v as i64)).collect();
        let targets = Tensor::from_vec(targets, n, device)?;

        let mut group = c.benchmark_group(format!("{place}/{n}x{d}x{v}"));
        group
            .sample_size(10)
            .throughput(Throughput::Elements(n as u64));
        for method in METHODS {
            let name = method.map_or("baseline", Preset::name);
            let (e, c) = (embeddings.detach(), classifier.detach());
            let forward = || -> Result<()> {
                loss(&e, &c, &targets, method)?;
                device.synchronize()
            };
            let both = || -> Result<()> {
                backward(&loss(&embeddings, &classifier, &targets, method)?)?;
                device.synchronize()
            };
            forward()?;
            both()?;
            group.bench_function(BenchmarkId::new(name, "loss"), |b| b.iter(forward));
            group.bench_function(BenchmarkId::new(name, "loss and gradients"), |b| {
                b.iter(both)
            });
        }
        group.finish();
    }
    Ok(())
}

fn benches(c: &mut Criterion) {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        devices.push(Device::new_cuda(0).expect("a CUDA device"));
    }
    for device in devices {
        run(c, &device).expect("the loss of valid inputs");
    }
}

criterion_group!(all, benches);
criterion_main!(all);
