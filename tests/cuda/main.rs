//! The loss on a GPU, against the f64 reference on the host, and what only a GPU does. Without one the tests are
//! skipped, and say so.

#[path = "../common/mod.rs"]
mod common;

mod chunks;
mod class_logits;
mod columns;
mod decoder;
mod edges;
mod filter;
mod fused;
mod fused_f16;
mod low_rank;
mod memory;
#[cfg(feature = "nccl")]
mod nccl;
mod one_pass;
mod ops;
mod optimizer;
mod repeat;
mod sizes;
mod soft_targets;
mod targets;
mod thresholds;
mod vocab_parallel;

use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::{linear_cross_entropy, Filter, Implementation, Options, Strategy};
use common::grid::{self, Grid};
use common::reference::{Reduced, Reference, Upstream, CUDA_TILE};
use common::{
    auto_threshold, check_against, close, exact, gradient_tolerance, norm, numbers, weighted, Case,
};
use std::io::Write;
use std::sync::OnceLock;

const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// On compute capability 9.0 these differ, elsewhere they are the same.
const KERNELS: [Implementation; 2] = [Implementation::Cuda, Implementation::CudaPortable];

/// The first GPU, or a line that says the test is skipped. One for all tests: a device of its own has to load
/// every kernel again.
fn device() -> Option<Device> {
    static DEVICE: OnceLock<std::result::Result<Device, String>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| Device::new_cuda(0).map_err(|e| e.to_string()));
    match device {
        Ok(device) => Some(device.clone()),
        Err(error) => {
            // Not by `eprintln!`, which the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "skipped: no CUDA device ({error})");
            None
        }
    }
}

/// Exact and filtered, with the threshold of each.
fn filters(dtype: DType) -> [(&'static str, Options, f64); 2] {
    let eps = auto_threshold(dtype);
    [
        ("exact", exact(), 0.),
        (
            "filtered",
            Options::default().filter(Filter::Threshold(eps)),
            eps,
        ),
    ]
}

/// What is wrong with a case, computed by every kernel, exactly and filtered.
fn wrong(case: &Case, upstream: &Upstream, strategy: Strategy, device: &Device) -> Vec<String> {
    let reference = Reference::new(case.inputs.clone());
    let mut wrong = Vec::new();
    for (filter, options, eps) in filters(case.dtype) {
        let want = reference.averaged(upstream, (eps, eps), CUDA_TILE);
        for implementation in KERNELS {
            let options = options.clone().strategy(strategy);
            let options = options.implementation(implementation);
            let result = check_against(case, options, device, upstream, &reference, &want);
            if let Err(error) = result {
                wrong.push(format!(
                    "{}, {implementation:?} {strategy:?} {filter}, upstream loss {} lse {}: {error}",
                    grid::describe(case),
                    upstream.loss.is_some(),
                    upstream.lse.is_some()
                ));
            }
        }
    }
    wrong
}

/// Fails with the first of what is wrong.
fn assert_nothing(mut wrong: Vec<String>) {
    let count = wrong.len();
    wrong.truncate(12);
    assert!(
        count == 0,
        "{count} are wrong, the first are:\n{}",
        wrong.join("\n")
    );
}

/// The numbers that a loss and its backward leave.
struct Computed {
    /// Loss, lse, dE, dC, db: the last is empty without a bias.
    numbers: [(&'static str, Vec<f64>); 5],
    kept_tiles: f64,
}

impl Computed {
    fn new(case: &Case, options: Options, device: &Device) -> Result<Self> {
        let tensors = case.tensors(device)?;
        let output = linear_cross_entropy(
            &tensors.embeddings,
            &tensors.classifier,
            &tensors.targets,
            &case.options(options, &tensors),
        )?;
        let grads = weighted(&output, &case.upstream(5, true, true))?.backward()?;
        let grad = |tensor: &candle_core::Tensor| match grads.get(tensor) {
            Some(grad) => numbers(grad),
            None => candle_core::bail!("a gradient is missing"),
        };
        Ok(Self {
            numbers: [
                ("loss", numbers(&output.loss)?),
                ("lse", numbers(&output.lse)?),
                ("dE", grad(&tensors.embeddings)?),
                ("dC", grad(&tensors.classifier)?),
                (
                    "db",
                    match &tensors.bias {
                        Some(bias) => grad(bias)?,
                        None => Vec::new(),
                    },
                ),
            ],
            kept_tiles: output.kept_tiles()?.unwrap_or(f64::NAN),
        })
    }

    fn of(&self, what: &str) -> &[f64] {
        &self
            .numbers
            .iter()
            .find(|(name, _)| *name == what)
            .unwrap()
            .1
    }

    /// Fails where a bit differs.
    fn assert_same(&self, other: &Self, what: &str) {
        for ((name, a), (_, b)) in self.numbers.iter().zip(&other.numbers) {
            assert_eq!(a.len(), b.len(), "{what}: {name}");
            let differing: Vec<_> = (0..a.len())
                .filter(|&i| a[i].to_bits() != b[i].to_bits())
                .collect();
            let shown = differing.iter().take(6);
            let shown: Vec<_> = shown.map(|&i| (i, a[i], b[i])).collect();
            assert!(
                differing.is_empty(),
                "{what}: {} of {} numbers of {name} differ, the first (index, one, other): {shown:?}",
                differing.len(),
                a.len()
            );
        }
    }

    /// Fails where more than rounding differs.
    fn assert_close(&self, other: &Self, dtype: DType, what: &str) {
        for ((name, a), (_, b)) in self.numbers.iter().zip(&other.numbers) {
            assert_eq!(a.len(), b.len(), "{what}: {name}");
            if matches!(*name, "loss" | "lse") {
                let largest = b.iter().fold(1f64, |m, x| m.max(x.abs()));
                close(name, a, b, 4e-6, largest).unwrap_or_else(|e| panic!("{what}: {e}"));
                continue;
            }
            let difference = norm(a.iter().zip(b).map(|(a, b)| a - b));
            let (size, tolerance) = (norm(b.iter().copied()), 2. * gradient_tolerance(dtype));
            assert!(
                difference <= tolerance * size,
                "{what}: {name} differs by {difference:e} of {size:e}, allowed is {tolerance:e} of it; first numbers {:?} and {:?}",
                &a[..a.len().min(4)],
                &b[..b.len().min(4)]
            );
        }
    }
}

fn run(implementation: Implementation, step: usize) {
    let Some(device) = device() else { return };
    let computed = grid::run(&Grid {
        device,
        implementation,
        dtypes: DTYPES.to_vec(),
        step,
    });
    println!("{computed} cases");
}

#[test]
fn kernels_match_the_reference_on_every_combination_of_options() {
    run(Implementation::Cuda, 10);
}

#[test]
fn portable_kernels_match_the_reference_on_every_combination_of_options() {
    run(Implementation::CudaPortable, 11);
}

#[test]
fn automatic_choice_matches_the_reference() {
    run(Implementation::Auto, 97);
}

#[test]
fn native_matches_the_reference_on_the_gpu() {
    run(Implementation::Native, 97);
}

#[test]
fn kernels_agree_with_the_native_implementation() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        // Of the second no row begins on 16 bytes.
        for hidden in [128, 130] {
            let mut case = Case::random(40, dtype, &[2, 300], hidden, 1000)
                .with_bias(41)
                .with_ignored(42);
            case.inputs.shift = 1;
            case.inputs.softcap = Some(6.);
            case.inputs.reduction = Reduced::None;
            let native = exact().implementation(Implementation::Native);
            let native = Computed::new(&case, native, &device)?;
            for implementation in KERNELS {
                let options = exact().implementation(implementation);
                let what = format!("{implementation:?} {dtype:?} D {hidden}");
                Computed::new(&case, options, &device)?.assert_close(&native, dtype, &what);
            }
        }
    }
    Ok(())
}
