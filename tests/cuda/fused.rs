//! Gradients formed in the forward.

use crate::common::reference::{Reduced, Reference};
use crate::common::{
    check, close, exact, gradient_close, gradient_tolerance, norm, numbers, weighted, Case,
};
use crate::{assert_nothing, device, filters, sizes, wrong, Computed, DTYPES, KERNELS};
use candle_core::{DType, Result, Tensor, Var};
use candle_cut_cross_entropy::{
    linear_cross_entropy, objectives::squared_lse, Filter, Options, Strategy,
};

#[test]
fn gradients_of_ragged_sizes_are_right() {
    let Some(device) = device() else { return };
    let mut all = Vec::new();
    for dtype in [DType::BF16, DType::F16] {
        for (turn, mut case) in sizes::ragged(dtype).enumerate() {
            case.inputs.reduction = [Reduced::Mean, Reduced::Sum][turn % 2];
            let upstream = case.upstream(turn as u64, true, turn % 3 == 2);
            all.extend(wrong(&case, &upstream, Strategy::Fused, &device));
        }
    }
    assert_nothing(all);
}

#[test]
fn several_chunks_of_rows_are_right() {
    let Some(device) = device() else { return };
    for (turn, reduction) in [Reduced::Mean, Reduced::Sum].into_iter().enumerate() {
        let seed = 900 + 10 * turn as u64;
        let mut case = Case::random(seed, DType::BF16, &[1200], 136, 1500)
            .with_bias(seed + 1)
            .with_ignored(seed + 2);
        case.inputs.reduction = reduction;
        case.inputs.softcap = (turn == 1).then_some(5.);
        let upstream = case.upstream(seed, true, false);
        let reference = Reference::new(case.inputs.clone());
        assert!(reference.loss.iter().all(|x| x.is_finite()));
        for (filter, options, eps) in filters(DType::BF16) {
            // About 4 KiB a row and 15 MiB: all rows; 640 at a time; 384 at a time.
            for workspace in [
                1 << 30,
                (15 << 20) + (2700 << 10),
                (15 << 20) + (1700 << 10),
            ] {
                let options = options
                    .clone()
                    .strategy(Strategy::Fused)
                    .workspace(workspace);
                check(&case, options, &device, &upstream, (eps, eps))
                    .unwrap_or_else(|e| panic!("{reduction:?} {filter} {workspace} bytes: {e}"));
            }
        }
    }
}

/// The entropy goes into the gradients that the forward forms, but with a softcap, under which it is not known there.
#[test]
fn an_entropy_bonus_is_formed_in_the_forward() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for (turn, weights) in [false, true, false, true].into_iter().enumerate() {
        let seed = 910 + 10 * turn as u64;
        let (hidden, vocab) = [(136, 1500), (64, 70)][turn / 2];
        let mut case = Case::random(seed, DType::BF16, &[1200], hidden, vocab)
            .with_bias(seed + 1)
            .with_ignored(seed + 2);
        case.inputs.reduction = [Reduced::Mean, Reduced::Sum][turn % 2];
        case.inputs.entropy_bonus = [0.4, -0.2, 3., 0.01][turn];
        if weights {
            case = case
                .with_token_weights(seed + 3)
                .with_class_weights(seed + 4);
            case.inputs.z_loss = 0.02;
            case.inputs.logit_scale = 1.5;
        }
        let upstream = case.upstream(seed, true, false);
        for softcap in [None, Some(5.)] {
            case.inputs.softcap = softcap;
            // All rows; 640 at a time; 384 at a time.
            for workspace in [
                1 << 30,
                (15 << 20) + (2700 << 10),
                (15 << 20) + (1700 << 10),
            ] {
                let options = exact().strategy(Strategy::Fused).workspace(workspace);
                check(&case, options.clone(), &device, &upstream, (0., 0.))
                    .unwrap_or_else(|e| panic!("{turn} {softcap:?} {workspace} bytes: {e}"));
                let tensors = case.tensors(&device)?;
                let (e, c) = (&tensors.embeddings, &tensors.classifier);
                let options = case.options(options, &tensors);
                let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
                let as_asked = output.strategy == Strategy::Fused;
                assert_eq!(as_asked, softcap.is_none());
            }
        }
    }
    Ok(())
}

/// Targets so unlikely that nothing measured from their logits fits bf16: every row, or one of them.
#[test]
fn losses_of_thousands_are_right() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for unlikely in [150, 1] {
        for (softcap, bonus) in [(None, 0.), (Some(3000.), 0.), (None, 0.5)] {
            let mut case = Case::random(920, DType::BF16, &[150], 64, 300);
            case.inputs.entropy_bonus = bonus;
            let hidden = case.inputs.hidden;
            for e in &mut case.inputs.embeddings[..unlikely * hidden] {
                *e *= 4096.;
            }
            case.inputs.reduction = Reduced::Mean;
            let raw_scale = Reference::new(case.inputs.clone()).largest_logit;
            case.inputs.softcap = softcap;
            let reference = Reference::new(case.inputs.clone());
            assert!(reference.loss[0] > 20., "{:?}", reference.loss);
            let upstream = case.upstream(1, true, false);
            let want = reference.gradients(&upstream, 0.);
            let fail =
                |e: String| panic!("{unlikely} rows, softcap {softcap:?}, bonus {bonus}: {e}");
            let tensors = case.tensors(&device)?;
            let options = case.options(exact().strategy(Strategy::Fused), &tensors);
            let (e, c) = (&tensors.embeddings, &tensors.classifier);
            let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
            let loss = numbers(&output.loss)?;
            close("loss", &loss, &reference.loss, 2e-6, raw_scale).unwrap_or_else(fail);
            let grads = weighted(&output, &upstream)?.backward()?;
            let de = numbers(grads.get(e).expect("a gradient"))?;
            let dc = numbers(grads.get(c).expect("a gradient"))?;
            let bf16 = DType::BF16;
            gradient_close("dE", &de, &want.embeddings, bf16, raw_scale).unwrap_or_else(fail);
            gradient_close("dC", &dc, &want.classifier, bf16, raw_scale).unwrap_or_else(fail);
        }
    }
    Ok(())
}

fn case() -> Case {
    let mut case = Case::random(930, DType::BF16, &[2, 150], 64, 700).with_bias(931);
    case.inputs.reduction = Reduced::Mean;
    case.inputs.shift = 1;
    case
}

#[test]
fn fused_and_recomputed_gradients_agree() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for (filter, options, _) in filters(DType::BF16) {
        let computed = |strategy| {
            let options = options.clone().strategy(strategy);
            Computed::new(&case(), options, &device)
        };
        let fused = computed(Strategy::Fused)?;
        let recomputed = computed(Strategy::Recompute)?;
        fused.assert_close(&recomputed, DType::BF16, filter);
        fused.assert_same(&computed(Strategy::Fused)?, filter);
    }
    Ok(())
}

#[test]
fn a_graph_may_be_differentiated_twice() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let mut case = case();
    case.inputs.entropy_bonus = 0.3;
    let tensors = case.tensors(&device)?;
    let options = case.options(exact().strategy(Strategy::Fused), &tensors);
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let loss = linear_cross_entropy(e, c, &tensors.targets, &options)?.loss;
    let reference = Reference::new(case.inputs.clone());
    for factor in [-3., 0.5, 1.] {
        let upstream = crate::Upstream {
            loss: Some(vec![factor]),
            ..Default::default()
        };
        let want = reference.gradients(&upstream, 0.);
        let grads = (&loss * factor)?.backward()?;
        let of = |tensor| numbers(grads.get(tensor).expect("a gradient"));
        let fail = |e: String| panic!("factor {factor}: {e}");
        let scale = reference.largest_logit;
        gradient_close("dE", &of(e)?, &want.embeddings, DType::BF16, scale).unwrap_or_else(fail);
        gradient_close("dC", &of(c)?, &want.classifier, DType::BF16, scale).unwrap_or_else(fail);
    }
    Ok(())
}

#[test]
fn a_bad_target_makes_the_gradients_nan() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for options in [exact(), Options::default()] {
        let mut case = Case::random(940, DType::BF16, &[200], 64, 700);
        case.inputs.reduction = Reduced::Sum;
        let tensors = case.tensors(&device)?;
        let mut targets = case.inputs.targets.clone();
        targets[150] = 700;
        let targets = candle_core::Tensor::new(targets, &device)?;
        let (e, c) = (&tensors.embeddings, &tensors.classifier);
        let options = case.options(options.strategy(Strategy::Fused), &tensors);
        let loss = linear_cross_entropy(e, c, &targets, &options)?.loss;
        assert!(numbers(&loss)?[0].is_nan());
        let grads = loss.backward()?;
        let de = numbers(grads.get(e).expect("a gradient"))?;
        for (row, grad) in de.chunks(64).enumerate() {
            let nan = grad.iter().all(|g| g.is_nan());
            assert_eq!(nan, row == 150, "row {row}: {:?}", &grad[..4]);
        }
        let dc = numbers(grads.get(c).expect("a gradient"))?;
        assert!(dc.iter().all(|g| g.is_nan()), "{:?}", &dc[..4]);
    }
    Ok(())
}

/// A z-loss within the loss against one made of the outputs, whose gradients the grid has compared.
#[test]
fn a_z_loss_within_the_loss_is_that_of_the_outputs() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    const WEIGHT: f64 = 0.03;
    for (turn, dtype) in DTYPES.into_iter().enumerate() {
        for reduction in [Reduced::Mean, Reduced::Sum, Reduced::None] {
            // Of the second, losses leave the range of bf16.
            for scale in [1., if dtype == DType::F16 { 16. } else { 512. }] {
                let seed = 960 + turn as u64;
                let mut case = Case::random(seed, dtype, &[150], 64, 300).with_ignored(seed);
                for e in &mut case.inputs.embeddings {
                    *e *= scale;
                }
                case.inputs.reduction = reduction;
                for implementation in KERNELS {
                    for strategy in [Strategy::Fused, Strategy::Recompute] {
                        let what = format!(
                            "{implementation:?} {strategy:?} {dtype:?} {reduction:?} times {scale}"
                        );
                        let options = exact().implementation(implementation).strategy(strategy);
                        let gradients = |inside: bool| -> Result<[Vec<f64>; 3]> {
                            let tensors = case.tensors(&device)?;
                            let (e, c) = (&tensors.embeddings, &tensors.classifier);
                            let mut options = case.options(options.clone(), &tensors);
                            if inside {
                                options = options.z_loss_weight(WEIGHT);
                            }
                            let targets = &tensors.targets;
                            let output = linear_cross_entropy(e, c, targets, &options)?;
                            assert_eq!(output.z_loss.is_some(), inside, "{what}");
                            let loss = match inside {
                                true => output.loss,
                                false => {
                                    (output.loss
                                        + squared_lse(&output.lse, targets, &options)? * WEIGHT)?
                                }
                            };
                            let grads = loss.sum_all()?.backward()?;
                            let of = |tensor| numbers(grads.get(tensor).expect("a gradient"));
                            Ok([numbers(&loss)?, of(e)?, of(c)?])
                        };
                        let (inside, outside) = (gradients(true)?, gradients(false)?);
                        for (name, (a, b)) in
                            ["loss", "dE", "dC"].iter().zip(inside.iter().zip(&outside))
                        {
                            let difference = norm(a.iter().zip(b).map(|(a, b)| a - b));
                            let size = norm(b.iter().copied());
                            let allowed = match *name {
                                "loss" => 1e-5,
                                _ => 2. * gradient_tolerance(dtype),
                            };
                            assert!(
                                difference <= allowed * size,
                                "{what}: {name} differs by {difference:e} of {size:e}"
                            );
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// More than one launch of the products takes: dE is the sum of several. The second range is too short for clusters to share
/// outputs, or long enough: then what they share is added to what the first has left.
#[test]
fn a_vocabulary_of_several_ranges_is_right() {
    let Some(device) = device() else { return };
    for more in [300, 8400] {
        let mut case = Case::random(980, DType::BF16, &[150], 16, 262_144 + more);
        case.inputs.targets[0] = 262_144;
        case.inputs.reduction = Reduced::Mean;
        let upstream = case.upstream(1, true, false);
        let options = exact().strategy(Strategy::Fused);
        let result = check(&case, options, &device, &upstream, (0., 0.));
        result.unwrap_or_else(|e| panic!("{more} more classes: {e}"));
    }
}

/// Row tiles times strips of columns are no multiple of the clusters of any of these GPUs: these share what is left.
#[test]
fn gradients_that_clusters_share_are_right() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    // Strips of one width, of two, and fewer tiles than clusters; enough classes for it to be worth while.
    for (rows, hidden, vocab) in [(1500, 2304, 8200), (3000, 896, 8200), (150, 264, 9000)] {
        let e = Var::randn(0f32, 1., (rows, hidden), &device)?.to_dtype(DType::BF16)?;
        let c = Tensor::randn(0f32, 2. / (hidden as f32).sqrt(), (vocab, hidden), &device)?;
        let (e, c) = (
            Var::from_tensor(&e)?,
            Var::from_tensor(&c.to_dtype(DType::BF16)?)?,
        );
        let targets: Vec<i64> = (0..rows as i64)
            .map(|row| row * 37 % vocab as i64)
            .collect();
        let targets = Tensor::new(targets, &device)?;
        let formed = || {
            let options = exact().strategy(Strategy::Fused);
            let loss = linear_cross_entropy(&e, &c, &targets, &options)?.loss;
            let grads = loss.backward()?;
            let of = |var: &Var| grads.get(var).expect("a gradient").to_dtype(DType::F32);
            Ok::<_, candle_core::Error>([of(&e)?, of(&c)?])
        };
        let (got, again) = (formed()?, formed()?);
        let (e, c) = (
            e.to_dtype(DType::F32)?.detach(),
            c.to_dtype(DType::F32)?.detach(),
        );
        let softmax = candle_nn::ops::softmax(&e.matmul(&c.t()?)?, 1)?;
        let ones = Tensor::full(-1f32, (rows, 1), &device)?;
        let g = (softmax.scatter_add(&targets.unsqueeze(1)?, &ones, 1)? / rows as f64)?;
        for (which, want) in [g.matmul(&c)?, g.t()?.matmul(&e)?].into_iter().enumerate() {
            let squares = |x: &Tensor| x.sqr()?.sum(1)?.to_vec1::<f32>();
            let errors = squares(&(&got[which] - &want)?)?;
            for (row, (error, norm)) in errors.into_iter().zip(squares(&want)?).enumerate() {
                let error = (error / norm).sqrt();
                assert!(
                    error < 8e-3,
                    "{rows}, {hidden}: row {row} of gradient {which}: {error}"
                );
            }
            let difference = (&got[which] - &again[which])?
                .abs()?
                .max_all()?
                .to_scalar::<f32>()?;
            assert_eq!(
                difference, 0.,
                "{rows}, {hidden}: gradient {which} of another run"
            );
        }
    }
    Ok(())
}

/// A tile is not kept for the targets in it: they are apart.
#[test]
fn at_the_highest_threshold_only_the_targets_are_left() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let (rows, hidden, vocab) = (300, 64, 1500);
    let mut case = Case::random(970, DType::BF16, &[rows], hidden, vocab).with_bias(971);
    for (row, target) in case.inputs.targets.iter_mut().enumerate() {
        // Some of them several times, next to each other or not.
        *target = [7, 1499, (row / 2 * 5) as i64][row % 3];
    }
    case.inputs.reduction = Reduced::Sum;
    // All rows at once, and 128 of 300 at a time.
    for workspace in [1 << 30, (15 << 20) + (600 << 10)] {
        let tensors = case.tensors(&device)?;
        let options = Options::default()
            .filter(Filter::Drop(0.999))
            .strategy(Strategy::Fused)
            .workspace(workspace);
        let options = case.options(options, &tensors);
        let (e, c) = (&tensors.embeddings, &tensors.classifier);
        let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
        let grads = output.loss.backward()?;
        assert_eq!(output.kept_tiles()?, Some(0.));
        let reference = Reference::new(case.inputs.clone());
        let (mut want_dc, mut want_db) = (vec![0.; vocab * hidden], vec![0.; vocab]);
        let mut want_de = Vec::new();
        for row in 0..rows {
            let target = case.inputs.targets[row] as usize;
            let part = (-reference.nll[row]).exp() - 1.;
            want_db[target] += part;
            for d in 0..hidden {
                want_dc[target * hidden + d] += part * case.inputs.embeddings[row * hidden + d];
                want_de.push(part * case.inputs.classifier[target * hidden + d]);
            }
        }
        let bias = tensors.bias.as_ref().expect("a bias");
        for (what, tensor, want) in [
            ("dE", e, want_de),
            ("dC", c, want_dc),
            ("db", bias, want_db),
        ] {
            let got = numbers(grads.get(tensor).expect("a gradient"))?;
            let difference = norm(got.iter().zip(&want).map(|(a, b)| a - b));
            let size = norm(want.iter().copied());
            assert!(
                difference <= 2f64.powi(-8) * size,
                "{workspace}: {what} differs by {difference:e} of {size:e}"
            );
        }
    }
    Ok(())
}
