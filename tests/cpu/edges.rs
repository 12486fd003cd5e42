//! The corners: nothing counts, one of everything, extreme logits, NaN and infinity, tiny workspaces.

use crate::common::reference::{Reduced, Reference, Upstream, CPU_TILE};
use crate::common::{
    auto_threshold, check, close, exact, gradient_close, halving, numbers, weighted, Case, Tensors,
};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::{
    linear_cross_entropy, Filter, Implementation, Options, Output, Strategy,
};

const DTYPES: [DType; 4] = [DType::BF16, DType::F16, DType::F32, DType::F64];
const STRATEGIES: [Strategy; 3] = [Strategy::Auto, Strategy::Recompute, Strategy::Fused];

/// Every way to compute a loss exactly on the CPU.
fn ways() -> impl Iterator<Item = Options> {
    [Implementation::Auto, Implementation::Native]
        .into_iter()
        .flat_map(|i| STRATEGIES.map(|s| exact().implementation(i).strategy(s)))
}

fn run(tensors: &Tensors, options: &Options) -> Result<Output> {
    linear_cross_entropy(
        &tensors.embeddings,
        &tensors.classifier,
        &tensors.targets,
        options,
    )
}

/// An upstream gradient of 1 for everything.
fn ones(case: &Case) -> Upstream {
    let mut upstream = case.upstream(0, true, true);
    upstream.loss.iter_mut().flatten().for_each(|g| *g = 1.);
    upstream.lse.iter_mut().flatten().for_each(|g| *g = 1.);
    upstream
}

fn assert_right(case: &Case, options: Options, eps: (f64, f64), what: &str) {
    for (of_loss, of_lse) in [(true, false), (true, true)] {
        let upstream = case.upstream(1, of_loss, of_lse);
        if let Err(error) = check(case, options.clone(), &Device::Cpu, &upstream, eps) {
            panic!("{what}: {error}");
        }
    }
}

#[test]
fn a_batch_that_is_ignored_has_loss_zero_and_zero_gradients() -> Result<()> {
    for reduction in [Reduced::Mean, Reduced::Sum, Reduced::None] {
        for options in ways() {
            let mut case = Case::random(1, DType::F32, &[2, 4], 6, 9).with_bias(1);
            case.inputs.reduction = reduction;
            case.inputs.shift = 1;
            case.inputs.targets.fill(case.inputs.ignore_index);
            let tensors = case.tensors(&Device::Cpu)?;
            let output = run(&tensors, &case.options(options, &tensors))?;
            let grads = weighted(&output, &ones(&case))?.backward()?;
            for (what, tensor) in [
                ("loss", &output.loss),
                ("lse", &output.lse),
                ("dE", grads.get(&tensors.embeddings).unwrap()),
                ("dC", grads.get(&tensors.classifier).unwrap()),
                ("db", grads.get(tensors.bias.as_ref().unwrap()).unwrap()),
            ] {
                let numbers = numbers(tensor)?;
                assert!(
                    numbers.iter().all(|x| *x == 0.),
                    "{reduction:?} {what}: {numbers:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn ignored_rows_get_no_gradient_whatever_they_hold() -> Result<()> {
    for options in ways() {
        let mut case = Case::random(2, DType::F32, &[6], 4, 9);
        let clean = case.inputs.clone();
        for row in [1, 4] {
            case.inputs.targets[row] = case.inputs.ignore_index;
            case.inputs.embeddings[row * 4..row * 4 + 4].fill(f64::NAN);
        }
        let mut want = case.clone();
        want.inputs.embeddings = clean.embeddings;
        let reference = Reference::new(want.inputs.clone());
        let upstream = Upstream {
            loss: Some(vec![1.]),
            ..Upstream::default()
        };
        let gradients = reference.gradients(&upstream, 0.);
        let tensors = case.tensors(&Device::Cpu)?;
        let output = run(&tensors, &case.options(options, &tensors))?;
        close("loss", &numbers(&output.loss)?, &reference.loss, 2e-6, 10.).unwrap();
        let grads = output.loss.backward()?;
        let de = numbers(grads.get(&tensors.embeddings).unwrap())?;
        assert!(
            de[4..8].iter().chain(&de[16..20]).all(|g| *g == 0.),
            "{de:?}"
        );
        let dc = numbers(grads.get(&tensors.classifier).unwrap())?;
        gradient_close("dE", &de, &gradients.embeddings, DType::F32, 1.).unwrap();
        gradient_close("dC", &dc, &gradients.classifier, DType::F32, 1.).unwrap();
    }
    Ok(())
}

#[test]
fn steps_that_predict_nothing_get_no_gradient() -> Result<()> {
    for options in ways() {
        let mut case = Case::random(3, DType::F32, &[2, 5], 4, 9);
        case.inputs.shift = 2;
        let tensors = case.tensors(&Device::Cpu)?;
        let grads = run(&tensors, &case.options(options, &tensors))?
            .loss
            .backward()?;
        let de = grads.get(&tensors.embeddings).unwrap();
        let last = numbers(&de.narrow(1, 3, 2)?)?;
        assert!(last.iter().all(|g| *g == 0.), "{last:?}");
        assert!(numbers(&de.narrow(1, 0, 3)?)?.iter().all(|g| *g != 0.));
    }
    Ok(())
}

#[test]
fn one_of_anything_is_right() {
    for dtype in DTYPES {
        for (lead, hidden, vocab) in [
            (&[1usize][..], 1, 1),
            (&[1], 5, 7),
            (&[5], 1, 7),
            (&[5], 3, 1),
            (&[1, 1], 1, 3),
            (&[1, 3, 1], 2, 2),
            (&[], 3, 4),
        ] {
            let case = Case::random(4, dtype, lead, hidden, vocab).with_bias(5);
            for options in ways() {
                let what = format!("{dtype:?} {lead:?} D {hidden} V {vocab}");
                assert_right(&case, options, (0., 0.), &what);
            }
        }
    }
}

#[test]
fn one_class_has_loss_zero() -> Result<()> {
    for options in ways() {
        let case = Case::random(6, DType::F32, &[5], 8, 1);
        let tensors = case.tensors(&Device::Cpu)?;
        let output = run(&tensors, &options)?;
        assert_eq!(output.loss.to_scalar::<f32>()?, 0.);
        let grads = output.loss.backward()?;
        for var in [&tensors.embeddings, &tensors.classifier] {
            let grad = numbers(grads.get(var).unwrap())?;
            assert!(grad.iter().all(|g| g.abs() < 1e-6), "{grad:?}");
        }
    }
    Ok(())
}

/// A case whose every target has a logit about `margin` above the others.
fn confident(seed: u64, dtype: DType, rows: usize, vocab: usize, margin: f64) -> Case {
    let mut case = Case::random(seed, dtype, &[rows], vocab, vocab);
    for row in 0..rows {
        let target = case.inputs.targets[row] as usize;
        for d in 0..vocab {
            let noise = case.inputs.embeddings[row * vocab + d] * 0.5;
            case.inputs.embeddings[row * vocab + d] = noise + if d == target { margin } else { 0. };
        }
    }
    for class in 0..vocab {
        for d in 0..vocab {
            case.inputs.classifier[class * vocab + d] = if class == d { 1. } else { 0. };
        }
    }
    case.round();
    case
}

#[test]
fn confident_targets_keep_their_gradient() {
    // 1 - p is about 3e-3, so a softmax rounded to bf16 would be 1 and the gradient gone.
    for dtype in DTYPES {
        let case = confident(7, dtype, 6, 12, 8.);
        for options in ways() {
            assert_right(&case, options, (0., 0.), &format!("{dtype:?}"));
        }
    }
}

#[test]
fn confident_targets_keep_the_gradient_of_their_lse_under_a_filter() {
    // |softmax - onehot| is below the threshold everywhere, but the lse's gradient is the softmax.
    for dtype in DTYPES {
        let case = confident(8, dtype, 6, 12, 24.);
        let eps = auto_threshold(dtype);
        for strategy in STRATEGIES {
            let options = Options::default().strategy(strategy);
            for (of_loss, of_lse) in [(false, true), (true, true)] {
                let upstream = case.upstream(2, of_loss, of_lse);
                let result = check(&case, options.clone(), &Device::Cpu, &upstream, (eps, eps));
                result.unwrap_or_else(|e| panic!("{dtype:?} {strategy:?} loss {of_loss}: {e}"));
            }
        }
    }
}

#[test]
fn what_a_filter_does_not_keep_is_averaged() {
    // Peaked rows over many classes: most tiles have nothing to say, and every target has.
    for dtype in [DType::BF16, DType::F32] {
        let mut case = Case::random(9, dtype, &[200], 16, 3000).with_bias(3);
        for (row, target) in case.inputs.targets.clone().into_iter().enumerate() {
            for d in 0..16 {
                let toward = case.inputs.classifier[target as usize * 16 + d];
                case.inputs.embeddings[row * 16 + d] += 4. * toward;
            }
        }
        case.round();
        let reference = Reference::new(case.inputs.clone());
        let half = halving(&reference, CPU_TILE).unwrap();
        // Few rows of a tile are averaged.
        let mut largest = reference.largest(CPU_TILE);
        largest.sort_by(f64::total_cmp);
        let few = (largest[largest.len() / 20] + largest[largest.len() / 20 + 1]) / 2.;
        for eps in [0., few, 1e-3, half, 0.3, 0.99] {
            for strategy in STRATEGIES {
                let what = format!("{dtype:?} {strategy:?} eps {eps}");
                let options = Options::default().strategy(strategy);
                let both = options.clone().filter(Filter::Threshold(eps));
                assert_right(&case, both, (eps, eps), &what);
                let off = options.filter_classifier(Filter::Off);
                let one = off.filter_embeddings(Filter::Threshold(eps));
                assert_right(&case, one, (eps, 0.), &what);
            }
        }
    }
}

#[test]
fn the_share_of_kept_tiles_is_known_after_a_backward() -> Result<()> {
    for strategy in STRATEGIES {
        let case = confident(10, DType::F32, 40, 64, 40.);
        let tensors = case.tensors(&Device::Cpu)?;
        let options = case.options(Options::default().strategy(strategy), &tensors);
        let output = run(&tensors, &options.clone().filter(Filter::Off))?;
        assert_eq!(output.kept_tiles()?, None);
        output.loss.backward()?;
        assert_eq!(output.kept_tiles()?, Some(1.));
        // No class but the targets is likely. A filter that drops keeps their tiles all the same.
        for (filter, want) in [(Filter::Threshold(0.5), 0.), (Filter::Drop(0.5), 1.)] {
            let output = run(&tensors, &options.clone().filter(filter))?;
            output.loss.backward()?;
            assert_eq!(output.kept_tiles()?, Some(want), "{filter:?}");
        }
    }
    Ok(())
}

#[test]
fn logits_of_ten_thousand_are_finite_and_right() -> Result<()> {
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        for softcap in [None, Some(30.)] {
            for options in ways() {
                let mut case = Case::random(11, dtype, &[6], 8, 20);
                for e in &mut case.inputs.embeddings {
                    *e *= 4096.;
                }
                case.inputs.reduction = Reduced::None;
                let raw_scale = Reference::new(case.inputs.clone()).largest_logit;
                assert!(raw_scale > 1e4);
                case.inputs.softcap = softcap;
                let reference = Reference::new(case.inputs.clone());
                let tensors = case.tensors(&Device::Cpu)?;
                let output = run(&tensors, &case.options(options, &tensors))?;
                let scale = reference.largest_logit;
                close(
                    "loss",
                    &numbers(&output.loss)?,
                    &reference.loss,
                    2e-6,
                    scale,
                )
                .unwrap();
                close("lse", &numbers(&output.lse)?, &reference.lse, 2e-6, scale).unwrap();
                let upstream = case.upstream(1, true, true);
                let want = reference.gradients(&upstream, 0.);
                let grads = weighted(&output, &upstream)?.backward()?;
                // Logits this far apart leave softmaxes of 0 and 1, except where they are close.
                let de = numbers(grads.get(&tensors.embeddings).unwrap())?;
                let dc = numbers(grads.get(&tensors.classifier).unwrap())?;
                gradient_close("dE", &de, &want.embeddings, dtype, raw_scale).unwrap();
                gradient_close("dC", &dc, &want.classifier, dtype, raw_scale).unwrap();
            }
        }
    }
    Ok(())
}

#[test]
fn rows_with_nan_or_infinity_come_out_as_nan_and_others_do_not() -> Result<()> {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for dtype in DTYPES {
            for options in ways().chain([Options::default()]) {
                let mut case = Case::random(12, dtype, &[70], 8, 300);
                case.inputs.reduction = Reduced::None;
                let clean = Reference::new(case.inputs.clone());
                let (row, hidden) = (37, case.inputs.hidden);
                case.inputs.embeddings[row * hidden + 2] = bad;
                let tensors = case.tensors(&Device::Cpu)?;
                let output = run(&tensors, &case.options(options, &tensors))?;
                let grads = output.loss.sum_all()?.backward()?;
                let de = grads.get(&tensors.embeddings).unwrap();
                let (loss, lse, de) = (numbers(&output.loss)?, numbers(&output.lse)?, numbers(de)?);
                for position in 0..70 {
                    let what = format!("{bad} {dtype:?} position {position}");
                    let of_row = &de[position * hidden..][..hidden];
                    if position == row {
                        assert!(loss[position].is_nan(), "{what}: loss {}", loss[position]);
                        assert!(of_row.iter().all(|g| g.is_nan()), "{what}: {of_row:?}");
                    } else {
                        let difference = (loss[position] - clean.nll[position]).abs();
                        assert!(difference < 1e-4, "{what}: loss {}", loss[position]);
                        assert!(lse[position].is_finite(), "{what}");
                        assert!(of_row.iter().all(|g| g.is_finite()), "{what}: {of_row:?}");
                    }
                }
                // Every class has a share of that row.
                let dc = numbers(grads.get(&tensors.classifier).unwrap())?;
                assert!(dc.iter().any(|g| g.is_nan()));
            }
        }
    }
    Ok(())
}

#[test]
fn a_class_with_nan_makes_every_row_nan() -> Result<()> {
    for options in ways().chain([Options::default()]) {
        let mut case = Case::random(13, DType::F32, &[9], 4, 150);
        case.inputs.classifier[120 * 4 + 1] = f64::NAN;
        let tensors = case.tensors(&Device::Cpu)?;
        let output = run(&tensors, &options)?;
        assert!(output.loss.to_scalar::<f32>()?.is_nan());
        let de = numbers(output.loss.backward()?.get(&tensors.embeddings).unwrap())?;
        assert!(de.iter().all(|g| g.is_nan()), "{de:?}");
    }
    Ok(())
}

#[test]
fn classes_masked_by_a_bias_of_minus_infinity_have_no_share() -> Result<()> {
    for dtype in DTYPES {
        for options in ways().chain([Options::default()]) {
            let mut case = Case::random(14, dtype, &[12], 5, 40).with_bias(4);
            case.inputs.targets.iter_mut().for_each(|t| *t %= 20);
            // The first classes of all, and a whole half: a block with nothing but -inf.
            for class in (20..40).chain([0]) {
                case.inputs.bias.as_mut().unwrap()[class] = f64::NEG_INFINITY;
            }
            for target in &mut case.inputs.targets {
                *target = (*target).max(1);
            }
            let eps = auto_threshold(dtype);
            for workspace in [1, 4096, 64 << 20] {
                let options = options.clone().workspace(workspace);
                assert_right(
                    &case,
                    options,
                    (eps, eps),
                    &format!("{dtype:?} {workspace}"),
                );
            }
            let tensors = case.tensors(&Device::Cpu)?;
            let grads = run(&tensors, &case.options(options, &tensors))?
                .loss
                .backward()?;
            let dc = numbers(&grads.get(&tensors.classifier).unwrap().narrow(0, 20, 20)?)?;
            assert!(dc.iter().all(|g| *g == 0.), "{dc:?}");
        }
    }
    Ok(())
}

#[test]
fn any_workspace_gives_the_right_result() {
    for dtype in DTYPES {
        let mut case = Case::random(15, dtype, &[2, 8], 10, 40)
            .with_bias(2)
            .with_ignored(3);
        case.inputs.softcap = Some(4.);
        case.inputs.shift = 1;
        for workspace in [0, 1, 3000, 20_000, usize::MAX] {
            for options in ways() {
                let what = format!("{dtype:?} workspace {workspace}");
                assert_right(&case, options.workspace(workspace), (0., 0.), &what);
            }
        }
    }
}

#[test]
fn untracked_inputs_make_an_untracked_loss() -> Result<()> {
    let case = Case::random(16, DType::F32, &[9], 4, 15);
    let tensors = case.tensors(&Device::Cpu)?;
    let reference = Reference::new(case.inputs.clone());
    for options in ways() {
        let output = linear_cross_entropy(
            &tensors.embeddings.detach(),
            &tensors.classifier.detach(),
            &tensors.targets,
            &options,
        )?;
        assert!(!output.loss.track_op() && !output.lse.track_op());
        close("loss", &numbers(&output.loss)?, &reference.loss, 2e-6, 5.).unwrap();
    }
    Ok(())
}
