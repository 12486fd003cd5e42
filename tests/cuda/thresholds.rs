//! Which tiles a threshold keeps, and of which gradient.

use crate::common::reference::Reduced;
use crate::common::{auto_threshold, check, exact, numbers, Case};
use crate::{assert_nothing, device, wrong, DTYPES, KERNELS};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::{linear_cross_entropy, Filter, Options, Strategy};

/// A loss and its backward, without any gradient of the lse.
fn of_loss(case: &Case, options: Options, device: &Device) -> Result<(f64, Vec<f64>)> {
    let tensors = case.tensors(device)?;
    let options = case.options(options, &tensors);
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
    assert_eq!(output.kept_tiles()?, None, "before a backward");
    let grads = output.loss.sum_all()?.backward()?;
    let dc = numbers(grads.get(c).expect("a gradient"))?;
    Ok((output.kept_tiles()?.expect("a share"), dc))
}

#[test]
fn a_filter_that_drops_keeps_the_tiles_of_targets_at_the_highest_threshold() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let (hidden, vocab, tiles) = (64, 1500, 12.);
        let mut case = Case::random(108, dtype, &[300], hidden, vocab);
        // Recomputed: gradients formed in the forward have the targets apart.
        case.inputs.reduction = Reduced::None;
        for target in &mut case.inputs.targets {
            *target = 256 + *target % 128;
        }
        for implementation in KERNELS {
            let what = format!("{implementation:?} {dtype:?}");
            let options = Options::default()
                .implementation(implementation)
                .filter(Filter::Drop(0.999));
            let (kept, dc) = of_loss(&case, options, &device)?;
            assert!((kept - 1. / tiles).abs() < 1e-12, "{what}: kept {kept}");
            for (class, grad) in dc.chunks(hidden).enumerate() {
                assert_eq!(
                    (256..384).contains(&class),
                    grad.iter().any(|g| *g != 0.),
                    "{what}: class {class}, gradient {:?}",
                    &grad[..4]
                );
            }
        }
    }
    Ok(())
}

/// Rows that point at their target's class, and few classes for the rows of a tile. Recomputed: gradients formed in
/// the forward have the targets apart.
fn peaked(dtype: DType) -> Case {
    let (rows, hidden, vocab) = (300, 64, 3000);
    let mut case = Case::random(109, dtype, &[rows], hidden, vocab);
    case.inputs.reduction = Reduced::None;
    for row in 0..rows {
        let target = row / 128 * 1000 + row % 5;
        case.inputs.targets[row] = target as i64;
        for d in 0..hidden {
            case.inputs.embeddings[row * hidden + d] =
                12. * case.inputs.classifier[target * hidden + d];
        }
    }
    case.round();
    case
}

#[test]
fn a_filter_keeps_few_tiles_of_peaked_rows_and_exact_keeps_all() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in [DType::BF16, DType::F16] {
        let case = peaked(dtype);
        let upstream = case.upstream(1, true, false);
        assert_nothing(wrong(&case, &upstream, Strategy::Auto, &device));
        for implementation in KERNELS {
            let what = format!("{implementation:?} {dtype:?}");
            let filtered = Options::default().filter(Filter::Threshold(auto_threshold(dtype)));
            let filtered = filtered.implementation(implementation);
            let (kept, _) = of_loss(&case, filtered, &device)?;
            // Targets lie in no kept tile: theirs are computed apart.
            assert!(kept < 1., "{what}: kept {kept}");
            let exact = exact().implementation(implementation);
            let (kept, _) = of_loss(&case, exact, &device)?;
            assert_eq!(kept, 1., "{what} exact");
        }
    }
    Ok(())
}

/// Fewer than 65,536 classes: exact gradients, where the forward can form them.
#[test]
fn an_automatic_filter_is_exact_where_that_is_faster() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let mut case = peaked(DType::BF16);
    case.inputs.reduction = Reduced::Mean;
    let auto = Options::default();
    let given = Options::default().filter(Filter::Threshold(auto_threshold(DType::BF16)));
    for implementation in KERNELS {
        for strategy in [Strategy::Auto, Strategy::Recompute, Strategy::Fused] {
            for (filter, options) in [("automatic", &auto), ("given", &given)] {
                let options = options.clone().implementation(implementation);
                let tensors = case.tensors(&device)?;
                let options = case.options(options.strategy(strategy), &tensors);
                let (e, c) = (&tensors.embeddings, &tensors.classifier);
                let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
                output.loss.backward()?;
                let exact = filter == "automatic" && output.strategy == Strategy::Fused;
                let kept = output.kept_tiles()?.expect("a backward");
                let what = format!("{implementation:?} {strategy:?} {filter}: kept {kept}");
                assert_eq!(kept == 1., exact, "{what} by {:?}", output.strategy);
            }
        }
    }
    Ok(())
}

#[test]
fn a_filter_of_one_gradient_leaves_the_other_exact() {
    let Some(device) = device() else { return };
    for dtype in [DType::BF16, DType::F16] {
        let case = peaked(dtype);
        let (eps, upstream) = (auto_threshold(dtype), case.upstream(1, true, false));
        for implementation in KERNELS {
            let options = exact().implementation(implementation);
            for (options, eps) in [
                (
                    options.clone().filter_embeddings(Filter::Threshold(eps)),
                    (eps, 0.),
                ),
                (options.filter_classifier(Filter::Threshold(eps)), (0., eps)),
            ] {
                check(&case, options, &device, &upstream, eps)
                    .unwrap_or_else(|e| panic!("{implementation:?} {dtype:?} {eps:?}: {e}"));
            }
        }
    }
}
