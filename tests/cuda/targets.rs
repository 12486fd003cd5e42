//! Targets of every dtype on a GPU, where Candle has no kernels that cast, copy or compare i32.

use crate::common::{numbers, Case};
use crate::{device, KERNELS};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::objectives::{counted, perplexity, squared_lse};
use candle_cut_cross_entropy::{linear_cross_entropy, Implementation, Options, Reduction};

const TARGETS: [[i64; 3]; 2] = [[1, -100, 4], [0, 3, 2]];

/// `TARGETS` as i32, and the same numbers transposed in memory.
fn targets(device: &Device) -> Result<[Tensor; 2]> {
    let plain = Tensor::new(&TARGETS.map(|row| row.map(|y| y as i32)), &Device::Cpu)?;
    let turned = plain.t()?.contiguous()?.to_device(device)?.t()?;
    Ok([plain.to_device(device)?, turned])
}

#[test]
fn i32_targets_are_as_good_as_i64() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let tensors = Case::random(1, DType::BF16, &[2, 3], 8, 5).tensors(&device)?;
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let wide = Tensor::new(&TARGETS, &device)?;
    for implementation in KERNELS.into_iter().chain([Implementation::Native]) {
        for shift in [0, 1] {
            for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None] {
                let options = Options::default()
                    .implementation(implementation)
                    .shift(shift)
                    .reduction(reduction)
                    .check_targets(true);
                let of = |targets: &Tensor| -> Result<Vec<Vec<f64>>> {
                    let plain = linear_cross_entropy(e, c, targets, &options)?;
                    let with_z = options.clone().z_loss_weight(0.5);
                    let with_z = linear_cross_entropy(e, c, targets, &with_z)?;
                    [
                        &plain.loss,
                        &with_z.loss,
                        with_z.z_loss.as_ref().expect("a z-loss"),
                        &squared_lse(&plain.lse, targets, &options)?,
                        &perplexity(&plain.loss, targets, &options)?,
                        &counted(targets, &options)?,
                    ]
                    .map(numbers)
                    .into_iter()
                    .collect()
                };
                let want = of(&wide)?;
                for targets in targets(&device)? {
                    let what = format!("{implementation:?} {shift} {reduction:?}");
                    assert_eq!(of(&targets)?, want, "{what} {:?}", targets.stride());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_bad_i32_target_is_named() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    // Of four classes, target 4 is bad.
    let tensors = Case::random(1, DType::BF16, &[2, 3], 8, 4).tensors(&device)?;
    for implementation in KERNELS.into_iter().chain([Implementation::Native]) {
        let options = Options::default()
            .implementation(implementation)
            .check_targets(true);
        for targets in targets(&device)? {
            let (e, c) = (&tensors.embeddings, &tensors.classifier);
            let error = match linear_cross_entropy(e, c, &targets, &options) {
                Ok(output) => panic!("{implementation:?}: no error, but loss {}", output.loss),
                Err(error) => error.to_string(),
            };
            for piece in ["target 4", "[0, 2]", "[0, 4)"] {
                assert!(error.contains(piece), "{piece:?} is not in {error:?}");
            }
        }
    }
    Ok(())
}
