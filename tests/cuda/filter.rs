//! What an averaging filter does on a GPU where about half of the tiles are averaged, and at its corners.

use crate::common::reference::{Reduced, Reference, CUDA_TILE};
use crate::common::{check, exact, halving, numbers, Case};
use crate::vocab_parallel::shards_agree;
use crate::{device, Computed, DTYPES, KERNELS};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::{linear_cross_entropy, Filter, Options, Strategy};

const STRATEGIES: [Strategy; 2] = [Strategy::Recompute, Strategy::Fused];

/// Several tiles of rows and classes, and a threshold at which about half are averaged.
fn case(seed: u64, dtype: DType) -> (Case, f64) {
    let mut case = Case::random(seed, dtype, &[2, 300], 72, 1500).with_bias(seed);
    case.inputs.reduction = Reduced::Mean;
    let eps = halving(&Reference::new(case.inputs.clone()), CUDA_TILE).expect("a threshold");
    (case, eps)
}

#[test]
fn half_of_the_tiles_are_averaged_and_bits_repeat() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let (case, eps) = case(300, dtype);
        for implementation in KERNELS {
            for strategy in STRATEGIES {
                let what = format!("{implementation:?} {strategy:?} {dtype:?}");
                let options = Options::default()
                    .filter(Filter::Threshold(eps))
                    .implementation(implementation)
                    .strategy(strategy);
                let first = Computed::new(&case, options.clone(), &device)?;
                assert!(
                    first.kept_tiles > 0.2 && first.kept_tiles < 0.8,
                    "{what}: kept {}",
                    first.kept_tiles
                );
                first.assert_same(&Computed::new(&case, options, &device)?, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn shards_average_as_the_whole_does() -> Result<()> {
    if device().is_none() {
        return Ok(());
    }
    let devices = (0..3)
        .map(|_| Device::new_cuda(0))
        .collect::<Result<Vec<_>>>()?;
    for dtype in DTYPES {
        let (case, eps) = case(310, dtype);
        // Whole tiles, so that shards have the same ones.
        let bounds = [0, 512, 1152, 1500];
        let upstream = case.upstream(311, true, true);
        for implementation in KERNELS {
            let options = Options::default()
                .filter(Filter::Threshold(eps))
                .implementation(implementation)
                .strategy(Strategy::Recompute);
            let what = format!("{implementation:?} {dtype:?}");
            shards_agree(&case, &options, &upstream, &devices, &bounds, &what)?;
        }
    }
    Ok(())
}

#[test]
fn a_row_of_nan_spoils_no_other_rows() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let bad_row = 137;
    for dtype in DTYPES {
        let (mut case, eps) = case(320, dtype);
        let hidden = case.inputs.hidden;
        case.inputs.embeddings[bad_row * hidden + 2] = f64::NAN;
        for implementation in KERNELS {
            for strategy in STRATEGIES {
                let options = Options::default()
                    .filter(Filter::Threshold(eps))
                    .implementation(implementation)
                    .strategy(strategy);
                let computed = Computed::new(&case, options, &device)?;
                // Gradients formed in the forward are formed again where a number is not finite, and then exactly.
                assert!(
                    computed.kept_tiles < 1. || strategy == Strategy::Fused,
                    "nothing is averaged"
                );
                for (row, grad) in computed.of("dE").chunks(hidden).enumerate() {
                    let fine = match row == bad_row {
                        true => grad.iter().all(|g| g.is_nan()),
                        false => grad.iter().all(|g| g.is_finite()),
                    };
                    assert!(
                        fine,
                        "{implementation:?} {strategy:?} {dtype:?} row {row}: {grad:?}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Sums over rows that are far beyond f16's range, though their means are not.
#[test]
fn sums_beyond_the_range_of_f16_are_right() {
    let Some(device) = device() else { return };
    let (rows, hidden) = (1200, 72);
    let mut case = Case::random(330, DType::F16, &[rows], hidden, 1500);
    for row in case.inputs.embeddings.chunks_mut(hidden) {
        row[0] = 1000.;
    }
    for class in case.inputs.classifier.chunks_mut(hidden) {
        class[0] *= 1e-3;
    }
    case.round();
    for target in &mut case.inputs.targets[..rows / 2] {
        *target = 700;
    }
    case.inputs.reduction = Reduced::Mean;
    let eps = halving(&Reference::new(case.inputs.clone()), CUDA_TILE).expect("a threshold");
    let upstream = case.upstream(331, true, false);
    for eps in [eps, 0.9] {
        for implementation in KERNELS {
            let options = Options::default()
                .filter(Filter::Threshold(eps))
                .implementation(implementation);
            check(&case, options, &device, &upstream, (eps, eps))
                .unwrap_or_else(|e| panic!("{implementation:?} threshold {eps}: {e}"));
        }
    }
}

/// Unchecked, it makes NaN of its own row and leaves the others as they are.
#[test]
fn a_bad_target_spoils_no_other_rows() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let bad_row = 5;
    let (mut case, eps) = case(340, DType::BF16);
    case.inputs.reduction = Reduced::Sum;
    let hidden = case.inputs.hidden;
    let averaged = Options::default().filter(Filter::Threshold(eps));
    for (options, off) in [(exact(), 2e-2), (averaged, f64::INFINITY)] {
        for implementation in KERNELS {
            for strategy in STRATEGIES {
                let what = format!("{implementation:?} {strategy:?} {options:?}");
                let options = options.clone().implementation(implementation);
                let options = options.strategy(strategy);
                let of_rows = |target: i64| -> Result<Vec<f64>> {
                    let mut case = case.clone();
                    case.inputs.targets[bad_row] = target;
                    let tensors = case.tensors(&device)?;
                    let options = case.options(options.clone(), &tensors);
                    let (e, c) = (&tensors.embeddings, &tensors.classifier);
                    let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
                    let grads = output.loss.backward()?;
                    numbers(grads.get(e).expect("a gradient"))
                };
                let (good, bad) = (of_rows(3)?, of_rows(1500)?);
                for (row, (good, bad)) in good.chunks(hidden).zip(bad.chunks(hidden)).enumerate() {
                    // A filter keeps other tiles with it.
                    let fine = match row == bad_row {
                        true => bad.iter().all(|g| g.is_nan()),
                        false => {
                            let differs = good.iter().zip(bad).map(|(a, b)| (a - b).abs());
                            bad.iter().all(|g| g.is_finite()) && differs.fold(0., f64::max) < off
                        }
                    };
                    assert!(fine, "{what}: row {row}: {bad:?}, without it {good:?}");
                }
            }
        }
    }
    Ok(())
}
