//! The two implementations against each other. Neither shares code with the other beyond the list
//! of rows.

mod agreement;
mod promises;

use super::{in_tensors, on_cpu};
use crate::matrices::Matrices;
use crate::op::contract::{Forward, KeptTiles, Wanted};
use crate::op::packed::Packed;
use crate::problem::Problem;
use crate::{Entropy, Filter, LowRank, Options};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// Numbers in `[-1, 1)` that a seed decides.
fn noise(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.
        })
        .collect()
}

struct Case {
    batch: usize,
    time: usize,
    hidden: usize,
    vocab: usize,
    dtype: DType,
    bias: bool,
    /// Every so many-th target is ignored.
    ignore: Option<usize>,
    scale: f64,
    /// The first so many classes are likely, and the targets.
    likely: usize,
    /// Of an adapter of the classifier; 0 for none.
    rank: usize,
}

impl Case {
    fn small() -> Self {
        Self {
            batch: 3,
            time: 15,
            hidden: 19,
            vocab: 301,
            dtype: DType::F32,
            bias: true,
            ignore: Some(3),
            scale: 1.,
            likely: 301,
            rank: 0,
        }
    }

    fn call(&self, options: &Options) -> Call {
        let tensor = |shape: &[usize], seed, scale: f64| {
            let len = shape.iter().product();
            let values: Vec<f64> = noise(len, seed).iter().map(|x| x * scale).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
                .unwrap()
                .to_dtype(self.dtype)
                .unwrap()
        };
        let e = tensor(&[self.batch, self.time, self.hidden], 1, self.scale);
        let c = tensor(&[self.vocab, self.hidden], 2, 1.);
        let targets: Vec<i64> = noise(self.batch * self.time, 3)
            .iter()
            .enumerate()
            .map(|(i, x)| match self.ignore {
                Some(every) if i % every == 0 => -100,
                _ => ((x + 1.) / 2. * self.likely.min(self.vocab) as f64) as i64,
            })
            .collect();
        let targets = Tensor::from_vec(targets, (self.batch, self.time), &Device::Cpu).unwrap();
        let mut options = options.clone();
        if self.bias {
            let mut bias = noise(self.vocab, 4);
            for unlikely in bias.iter_mut().skip(self.likely) {
                *unlikely -= 20.;
            }
            let bias = Tensor::new(bias, &Device::Cpu).unwrap();
            options = options.bias(&bias.to_dtype(self.dtype).unwrap());
        }
        if self.rank > 0 {
            let (a, b) = (
                tensor(&[self.rank, self.hidden], 5, 0.5),
                tensor(&[self.vocab, self.rank], 6, 0.5),
            );
            options = options.adapter(LowRank::new(&a, &b, 0.5));
        }
        Call::new(&e, &c, &targets, &options)
    }
}

/// A call and its matrices.
struct Call {
    problem: Problem,
    matrices: Matrices<Tensor>,
}

impl Call {
    fn new(embeddings: &Tensor, classifier: &Tensor, targets: &Tensor, options: &Options) -> Self {
        let (problem, matrices) = Problem::new(embeddings, classifier, targets, options).unwrap();
        Self { problem, matrices }
    }
}

const ALL: Wanted = Wanted {
    embeddings: true,
    classifier: true,
    bias: true,
};

fn wanted(call: &Call) -> Wanted {
    Wanted {
        bias: call.matrices.bias.is_some(),
        ..ALL
    }
}

fn backward(
    call: &Call,
    forward: &Forward<Tensor>,
    upstream: &Tensor,
    wanted: Wanted,
) -> Vec<Option<Vec<f64>>> {
    let gradients = forward
        .left
        .backward
        .backward(call.matrices.as_ref(), upstream, wanted)
        .unwrap();
    [
        (gradients.embeddings, Some(&call.matrices.embeddings)),
        (gradients.classifier, Some(call.matrices.trained())),
        (gradients.bias, call.matrices.bias.as_ref()),
    ]
    .into_iter()
    .map(|(gradient, of)| {
        let gradient = gradient?;
        assert_eq!(gradient.dims(), of.unwrap().dims());
        assert_eq!(gradient.dtype(), of.unwrap().dtype());
        Some(values(&gradient))
    })
    .collect()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor
        .flatten_all()
        .unwrap()
        .to_dtype(DType::F64)
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// The distance relative to the second one's length.
fn error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    difference / norm(&mut b.iter().copied()).max(1e-30)
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 8e-3,
        DType::F16 => 1e-3,
        DType::F32 => 2e-6,
        _ => 1e-12,
    }
}

fn run_cpu(call: &Call) -> Forward<Tensor> {
    run_cpu_for(call, wanted(call), &Arc::default())
}

fn run_cpu_for(call: &Call, wanted: Wanted, kept: &Arc<KeptTiles>) -> Forward<Tensor> {
    let matrices = call.matrices.as_ref();
    let forward = matrices.read(|matrices| on_cpu(&call.problem, matrices, wanted, kept));
    let Forward { packed, left } = forward.unwrap();
    let packed = Tensor::new(packed, &Device::Cpu).unwrap();
    Forward { packed, left }
}

fn run_tensor(call: &Call) -> Forward<Tensor> {
    let mut problem = call.problem.clone();
    problem.settings.workspace = None;
    in_tensors(&problem, call.matrices.as_ref(), &Arc::default()).unwrap()
}

/// Upstream gradients of the packed vector: of the loss alone, of another size, of everything.
fn upstreams(call: &Call) -> Vec<Tensor> {
    let layout = Packed::of(&call.problem);
    let loss = |u: f32| {
        let mut values = vec![0f32; layout.len()];
        values[layout.loss()] = u;
        values
    };
    let mut all: Vec<f32> = noise(layout.len(), 5).iter().map(|x| *x as f32).collect();
    if let (Entropy::Value, Some(entropy)) = (call.problem.settings.entropy, layout.entropy()) {
        // It is not differentiated.
        all[entropy].fill(0.);
    }
    [loss(1.), loss(-0.75), all]
        .into_iter()
        .map(|values: Vec<f32>| Tensor::from_vec(values, layout.len(), &Device::Cpu).unwrap())
        .collect()
}

fn compare(name: &str, case: &Case, options: &Options) {
    let call = case.call(options);
    let tolerance = tolerance(case.dtype);
    let second = run_tensor(&call);
    for upstream in upstreams(&call) {
        let first = run_cpu(&call);
        let off = error(&values(&first.packed), &values(&second.packed));
        assert!(off < 2e-6, "{name}: loss off by {off}");
        let predicted =
            [&first, &second].map(|forward| forward.left.predicted.as_ref().map(values));
        assert_eq!(predicted[0], predicted[1], "{name}: predicted");
        assert_eq!(predicted[0].is_some(), call.problem.settings.predicted);
        let b = backward(&call, &second, &upstream, wanted(&call));
        // Twice: the second time there are no gradients left from the forward.
        for time in 0..2 {
            let a = backward(&call, &first, &upstream, wanted(&call));
            for ((a, b), of) in a.iter().zip(&b).zip(["de", "dc", "db"]) {
                assert_eq!(a.is_some(), b.is_some());
                if let (Some(a), Some(b)) = (a, b) {
                    let off = error(a, b);
                    assert!(
                        off < tolerance,
                        "{name}: {of} off by {off}, backward {time}"
                    );
                }
            }
        }
    }
}

fn exact() -> Options {
    Options::default().filter(Filter::Off)
}
