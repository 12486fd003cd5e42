//! The corners: bad targets, nothing that counts, tiny workspaces, extreme logits.

use crate::common::reference::{Reduced, Reference};
use crate::common::{check, close, exact, gradient_close, numbers, weighted, Case};
use crate::{assert_nothing, device, filters, wrong, Computed, DTYPES, KERNELS};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::{
    linear_cross_entropy, Implementation, Options, Output, Reduction, Strategy,
};

/// Of three rows and five classes.
fn losses(
    implementation: Implementation,
    device: &Device,
    targets: &[i64],
    options: Options,
) -> Result<Output> {
    let case = Case::random(1, DType::BF16, &[3], 8, 5);
    let tensors = case.tensors(device)?;
    let targets = Tensor::new(targets, device)?;
    let options = options
        .implementation(implementation)
        .reduction(Reduction::None);
    linear_cross_entropy(&tensors.embeddings, &tensors.classifier, &targets, &options)
}

#[test]
fn a_bad_target_has_loss_nan_and_the_others_are_right() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for implementation in KERNELS {
        let loss = |targets: &[i64]| -> Result<Vec<f64>> {
            let output = losses(implementation, &device, targets, Options::default())?;
            // What a bad target does in the backward must not reach out of bounds either.
            output.loss.backward()?;
            numbers(&output.loss)
        };
        let good = loss(&[1, 2, 4])?;
        for bad in [5, -1, i64::MAX, i64::MIN, 1 << 32, (1 << 32) + 1] {
            let got = loss(&[1, bad, 4])?;
            let what = format!("{implementation:?} target {bad}");
            assert!(got[1].is_nan(), "{what}: loss {}", got[1]);
            assert_eq!([got[0], got[2]], [good[0], good[2]], "{what}");
        }
    }
    Ok(())
}

#[test]
fn a_bad_target_is_an_error_where_asked_for() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for implementation in KERNELS {
        let options = Options::default().check_targets(true);
        let good = losses(implementation, &device, &[1, -100, 4], options.clone());
        assert!(good.is_ok(), "{implementation:?}: {good:?}");
        let error = match losses(implementation, &device, &[1, 5, 4], options) {
            Ok(output) => panic!("{implementation:?}: no error, but losses {}", output.loss),
            Err(error) => error.to_string(),
        };
        for piece in ["target 5", "[1]", "[0, 5)", "-100"] {
            assert!(
                error.contains(piece),
                "{implementation:?}: {piece:?} is not in {error:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn any_workspace_gives_the_same_gradients() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let mut case = Case::random(100, dtype, &[1200], 136, 1500)
            .with_bias(101)
            .with_ignored(102);
        case.inputs.reduction = Reduced::None;
        for (filter, options, _) in filters(dtype) {
            for implementation in KERNELS {
                let options = options.clone().implementation(implementation);
                let usual = Computed::new(&case, options.clone(), &device)?;
                // Chunks of rows; ranges of classes; everything at once.
                for workspace in [1 << 10, 1 << 20, 3 << 20, 32 << 20] {
                    let options = options.clone().workspace(workspace);
                    let what = format!("{implementation:?} {dtype:?} {filter} {workspace} bytes");
                    let got = Computed::new(&case, options, &device)?;
                    got.assert_close(&usual, dtype, &what);
                    assert_eq!(got.kept_tiles, usual.kept_tiles, "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn small_workspaces_are_right() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        let mut case = Case::random(103, dtype, &[300], 40, 700).with_bias(104);
        case.inputs.reduction = Reduced::None;
        let upstream = case.upstream(1, true, true);
        for workspace in [1, 256 << 10, 1 << 20] {
            for implementation in KERNELS {
                let options = exact().implementation(implementation).workspace(workspace);
                check(&case, options, &device, &upstream, (0., 0.)).unwrap_or_else(|e| {
                    panic!("{implementation:?} {dtype:?} {workspace} bytes: {e}")
                });
            }
        }
    }
}

#[test]
fn a_batch_that_is_ignored_has_loss_zero_and_zero_gradients() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        for reduction in [Reduced::Mean, Reduced::Sum, Reduced::None] {
            let mut case = Case::random(105, dtype, &[2, 150], 64, 300).with_bias(1);
            case.inputs.reduction = reduction;
            case.inputs.targets.fill(case.inputs.ignore_index);
            for (filter, options, _) in filters(dtype) {
                for implementation in KERNELS {
                    let options = options.clone().implementation(implementation);
                    let got = Computed::new(&case, options, &device)?;
                    for (name, numbers) in &got.numbers {
                        let other = numbers.iter().position(|x| *x != 0.);
                        assert!(
                            other.is_none(),
                            "{implementation:?} {dtype:?} {filter} {reduction:?}: {name}{other:?} is {}",
                            numbers[other.unwrap_or(0)]
                        );
                    }
                    assert_eq!(got.kept_tiles, 1., "{implementation:?} {filter}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_that_do_not_count_are_left_out() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let (batch, time, hidden, shift) = (4, 130, 64, 2);
    for dtype in DTYPES {
        let mut case = Case::random(106, dtype, &[batch, time], hidden, 300).with_ignored(107);
        case.inputs.shift = shift;
        case.inputs.reduction = Reduced::None;
        let upstream = case.upstream(1, true, true);
        assert_nothing(wrong(&case, &upstream, Strategy::Auto, &device));
        // What such a row holds is never read.
        let counts = |row: usize| {
            let step = row % time;
            step + shift < time && case.inputs.targets[row + shift] != case.inputs.ignore_index
        };
        let mut spoilt = case.clone();
        for row in (0..batch * time).filter(|&row| !counts(row)) {
            spoilt.inputs.embeddings[row * hidden..][..hidden].fill(f64::NAN);
        }
        for (filter, options, _) in filters(dtype) {
            for implementation in KERNELS {
                let what = format!("{implementation:?} {dtype:?} {filter}");
                let options = options.clone().implementation(implementation);
                let clean = Computed::new(&case, options.clone(), &device)?;
                let spoilt = Computed::new(&spoilt, options, &device)?;
                spoilt.assert_same(&clean, &format!("{what}, NaN in rows that do not count"));
                for (row, grad) in clean.of("dE").chunks(hidden).enumerate() {
                    assert_eq!(
                        counts(row),
                        grad.iter().any(|g| *g != 0.),
                        "{what}: row {row}, gradient {:?}",
                        &grad[..4]
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_with_nan_or_infinity_come_out_as_nan_and_others_do_not() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let (rows, hidden, bad_row) = (200, 64, 137);
    for dtype in DTYPES {
        let mut case = Case::random(110, dtype, &[rows], hidden, 300);
        case.inputs.reduction = Reduced::None;
        let clean = Reference::new(case.inputs.clone());
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            case.inputs.embeddings[bad_row * hidden + 2] = bad;
            for (filter, options, _) in filters(dtype) {
                for implementation in KERNELS {
                    let tensors = case.tensors(&device)?;
                    let options = options.clone().implementation(implementation);
                    let options = case.options(options, &tensors);
                    let (e, c) = (&tensors.embeddings, &tensors.classifier);
                    let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
                    let grads = output.loss.sum_all()?.backward()?;
                    let (loss, lse) = (numbers(&output.loss)?, numbers(&output.lse)?);
                    let de = numbers(grads.get(e).expect("a gradient"))?;
                    for row in 0..rows {
                        let what = format!("{implementation:?} {dtype:?} {filter} {bad} row {row}");
                        let of_row = &de[row * hidden..][..hidden];
                        if row == bad_row {
                            assert!(loss[row].is_nan(), "{what}: loss {}", loss[row]);
                            assert!(of_row.iter().all(|g| g.is_nan()), "{what}: {of_row:?}");
                        } else {
                            let difference = (loss[row] - clean.nll[row]).abs();
                            let want = clean.nll[row];
                            assert!(difference < 1e-4, "{what}: loss {}, want {want}", loss[row]);
                            assert!(lse[row].is_finite(), "{what}: lse {}", lse[row]);
                            assert!(of_row.iter().all(|g| g.is_finite()), "{what}: {of_row:?}");
                        }
                    }
                    // Every class has a share of that row.
                    let dc = numbers(grads.get(c).expect("a gradient"))?;
                    let what = format!("{implementation:?} {dtype:?} {filter} {bad}");
                    assert!(dc.iter().any(|g| g.is_nan()), "{what}: no NaN in dC");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_class_with_nan_makes_every_row_nan() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let mut case = Case::random(111, dtype, &[150], 64, 400);
        case.inputs.reduction = Reduced::None;
        case.inputs.classifier[270 * 64 + 1] = f64::NAN;
        for (filter, options, _) in filters(dtype) {
            for implementation in KERNELS {
                let options = options.clone().implementation(implementation);
                let got = Computed::new(&case, options, &device)?;
                for name in ["loss", "lse", "dE"] {
                    let finite = got.of(name).iter().position(|x| !x.is_nan());
                    assert!(
                        finite.is_none(),
                        "{implementation:?} {dtype:?} {filter}: {name}{finite:?} is not NaN"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn classes_masked_by_a_bias_of_minus_infinity_have_no_share() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let (hidden, vocab) = (64, 600);
    // A third of all, and whole tiles: the first one, and one in the middle.
    let masked =
        |class: usize| class.is_multiple_of(3) || class < 128 || (256..448).contains(&class);
    for dtype in DTYPES {
        let mut case = Case::random(112, dtype, &[140], hidden, vocab).with_bias(113);
        case.inputs.reduction = Reduced::None;
        for class in (0..vocab).filter(|&class| masked(class)) {
            case.inputs.bias.as_mut().unwrap()[class] = f64::NEG_INFINITY;
        }
        for target in &mut case.inputs.targets {
            while masked(*target as usize) {
                *target = (*target + 1) % vocab as i64;
            }
        }
        let upstream = case.upstream(1, true, true);
        assert_nothing(wrong(&case, &upstream, Strategy::Auto, &device));
        for (filter, options, _) in filters(dtype) {
            for implementation in KERNELS {
                let options = options.clone().implementation(implementation);
                let got = Computed::new(&case, options, &device)?;
                for (class, grad) in got.of("dC").chunks(hidden).enumerate() {
                    assert!(
                        !masked(class) || grad.iter().all(|g| *g == 0.),
                        "{implementation:?} {dtype:?} {filter}: class {class} has gradient {:?}",
                        &grad[..4]
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn logits_of_ten_thousand_are_finite_and_right() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in [DType::BF16, DType::F32] {
        for softcap in [None, Some(30.)] {
            let mut case = Case::random(114, dtype, &[150], 64, 300);
            for e in &mut case.inputs.embeddings {
                *e *= 4096.;
            }
            case.inputs.reduction = Reduced::None;
            let raw_scale = Reference::new(case.inputs.clone()).largest_logit;
            assert!(raw_scale > 1e4, "{raw_scale}");
            case.inputs.softcap = softcap;
            let reference = Reference::new(case.inputs.clone());
            let (upstream, scale) = (case.upstream(1, true, true), reference.largest_logit);
            let want = reference.gradients(&upstream, 0.);
            for implementation in KERNELS {
                let what = format!("{implementation:?} {dtype:?} softcap {softcap:?}");
                let fail = |e: String| panic!("{what}: {e}");
                let tensors = case.tensors(&device)?;
                let options = case.options(exact().implementation(implementation), &tensors);
                let (e, c) = (&tensors.embeddings, &tensors.classifier);
                let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
                let (loss, lse) = (numbers(&output.loss)?, numbers(&output.lse)?);
                // The cap of a logit that cancels does not make its rounding smaller; an lse has few of these.
                close("loss", &loss, &reference.loss, 2e-6, raw_scale).unwrap_or_else(fail);
                close("lse", &lse, &reference.lse, 2e-6, scale).unwrap_or_else(fail);
                let grads = weighted(&output, &upstream)?.backward()?;
                // Logits this far apart leave softmaxes of 0 and 1, except where they are close.
                let de = numbers(grads.get(e).expect("a gradient"))?;
                let dc = numbers(grads.get(c).expect("a gradient"))?;
                gradient_close("dE", &de, &want.embeddings, dtype, raw_scale).unwrap_or_else(fail);
                gradient_close("dC", &dc, &want.classifier, dtype, raw_scale).unwrap_or_else(fail);
            }
        }
    }
    Ok(())
}

/// What a cap far above the logits takes from them is less than their rounding.
#[test]
fn small_logits_under_a_large_cap_keep_their_digits() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in [DType::BF16, DType::F32] {
        for softcap in [100., 1e3, 1e4, 1e6] {
            let mut case = Case::random(115, dtype, &[150], 64, 300);
            case.inputs.reduction = Reduced::None;
            case.inputs.softcap = Some(softcap);
            let reference = Reference::new(case.inputs.clone());
            assert!(reference.largest_logit < 20.);
            for implementation in KERNELS {
                let tensors = case.tensors(&device)?;
                let options = case.options(exact().implementation(implementation), &tensors);
                let (e, c) = (&tensors.embeddings, &tensors.classifier);
                let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
                let loss = numbers(&output.loss)?;
                close(
                    "loss",
                    &loss,
                    &reference.loss,
                    2e-6,
                    reference.largest_logit,
                )
                .unwrap_or_else(|e| panic!("{implementation:?} {dtype:?} softcap {softcap}: {e}"));
            }
        }
    }
    Ok(())
}

/// A case whose every target has a logit about `margin` above the others.
fn confident(seed: u64, dtype: DType, margin: f64) -> Case {
    let (rows, vocab) = (150, 264);
    let mut case = Case::random(seed, dtype, &[rows], vocab, vocab);
    for row in 0..rows {
        let target = case.inputs.targets[row] as usize;
        for d in 0..vocab {
            let e = &mut case.inputs.embeddings[row * vocab + d];
            *e = 0.5 * *e + if d == target { margin } else { 0. };
        }
    }
    for class in 0..vocab {
        for d in 0..vocab {
            case.inputs.classifier[class * vocab + d] = if class == d { 1. } else { 0. };
        }
    }
    case.inputs.reduction = Reduced::None;
    case.round();
    case
}

#[test]
fn confident_targets_keep_their_gradient() {
    // 1 - p is about 2e-3, so a softmax rounded to bf16 would be 1 and the gradient gone.
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        let case = confident(115, dtype, 12.);
        assert_nothing(wrong(
            &case,
            &case.upstream(1, true, false),
            Strategy::Auto,
            &device,
        ));
    }
}

#[test]
fn confident_targets_keep_the_gradient_of_their_lse() {
    // |softmax - onehot| is below the threshold everywhere, but the lse's gradient is the softmax.
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        let case = confident(116, dtype, 24.);
        for of_loss in [false, true] {
            let upstream = case.upstream(2, of_loss, true);
            assert_nothing(wrong(&case, &upstream, Strategy::Auto, &device));
        }
    }
}

#[test]
fn a_gradient_of_the_lse_alone_is_right() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        let mut case = Case::random(117, dtype, &[2, 150], 72, 500)
            .with_bias(118)
            .with_ignored(119);
        case.inputs.shift = 1;
        assert_nothing(wrong(
            &case,
            &case.upstream(3, false, true),
            Strategy::Auto,
            &device,
        ));
    }
}
