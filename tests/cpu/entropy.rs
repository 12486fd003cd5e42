//! The entropy and the predicted class of each position.

use crate::common::reference::{Reduced, Upstream};
use crate::common::{check, close, exact, numbers, weighted, Case};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::objectives::{accuracy, grpo_loss, GrpoOptions};
use candle_cut_cross_entropy::{
    linear_cross_entropy, Entropy, Filter, Implementation, Options, Output, Strategy,
};

const IMPLEMENTATIONS: [Implementation; 2] = [Implementation::Auto, Implementation::Native];
const STRATEGIES: [Strategy; 3] = [Strategy::Auto, Strategy::Recompute, Strategy::Fused];

fn ways() -> impl Iterator<Item = Options> {
    IMPLEMENTATIONS
        .into_iter()
        .flat_map(|i| STRATEGIES.map(|s| exact().implementation(i).strategy(s)))
}

/// A loss of one row of embeddings `(1, 1)`, 1, whose logits are these.
fn of_logits(logits: &[f32], target: u32, options: &Options) -> Result<(Var, Output)> {
    let e = Tensor::ones((1, 1), DType::F32, &Device::Cpu)?;
    let c = Var::from_tensor(&Tensor::from_slice(
        logits,
        (logits.len(), 1),
        &Device::Cpu,
    )?)?;
    let y = Tensor::new(&[target], &Device::Cpu)?;
    let output = linear_cross_entropy(&e, &c, &y, options)?;
    Ok((c, output))
}

fn predicted(output: &Output) -> Result<Vec<u32>> {
    output
        .predicted
        .as_ref()
        .expect("asked for")
        .flatten_all()?
        .to_vec1()
}

#[test]
fn the_lowest_of_several_likeliest_classes_is_predicted() -> Result<()> {
    for options in ways() {
        let options = options.predicted(true);
        for (at, want) in [
            (vec![3, 5], 3),
            (vec![299, 400, 512], 299),
            (vec![255, 256], 255),
            (vec![1023], 1023),
        ] {
            // The target is one of them, none of them, or lower.
            for target in [0, 3, 256, 299, 400, 512] {
                let mut logits = vec![0f32; 1024];
                at.iter().for_each(|class| logits[*class] = 2.);
                let (_, output) = of_logits(&logits, target, &options)?;
                assert_eq!(predicted(&output)?, [want], "{at:?} target {target}");
            }
        }
        for target in [0, 1, 700] {
            let (_, output) = of_logits(&vec![0.25; 701], target, &options)?;
            assert_eq!(predicted(&output)?, [0], "all the same, target {target}");
        }
    }
    Ok(())
}

#[test]
fn the_softcap_does_not_change_what_is_predicted_but_for_ties() -> Result<()> {
    for options in ways() {
        let options = options.predicted(true).softcap(1.).logit_scale(3.);
        let (_, output) = of_logits(&[0.1, 0.3, 0.2], 0, &options)?;
        assert_eq!(predicted(&output)?, [1]);
    }
    Ok(())
}

/// Where a class has all the probability, or several share it and the others have none.
#[test]
fn entropy_is_right_where_probabilities_are_zero_or_one() -> Result<()> {
    let none = f32::NEG_INFINITY;
    for options in ways() {
        let options = options.entropy(Entropy::Differentiable).predicted(true);
        for (logits, want) in [
            (vec![500f32, 0., -500.], 0f64),
            (vec![0., 1e30, 0.], 0.),
            (vec![none, 0., none, 0.], 2f64.ln()),
            (vec![0., none, none], 0.),
            (
                vec![none; 300].into_iter().chain([1., 1., 1.]).collect(),
                3f64.ln(),
            ),
            (vec![7.; 600], 600f64.ln()),
        ] {
            let finite = logits.iter().position(|z| z.is_finite()).unwrap();
            for target in [finite, logits.len() - 1] {
                let options = match logits[target].is_finite() {
                    true => options.clone(),
                    // Its loss is infinite, and of no interest.
                    false => continue,
                };
                // Infinite entries are those of a bias: a product with them has no gradient.
                let e = Tensor::ones((1, 1), DType::F32, &Device::Cpu)?;
                let c = Var::zeros((logits.len(), 1), DType::F32, &Device::Cpu)?;
                let bias = Var::from_tensor(&Tensor::new(logits.clone(), &Device::Cpu)?)?;
                let y = Tensor::new(&[target as u32], &Device::Cpu)?;
                let output = linear_cross_entropy(&e, &c, &y, &options.bias(bias.as_tensor()))?;
                let entropy = output.entropy.as_ref().expect("asked for");
                let got = numbers(entropy)?[0];
                assert!((got - want).abs() < 1e-5, "{got}, want {want}");
                // Every distribution here is uniform over some classes: the gradient of its entropy is 0.
                let grads = entropy.sum_all()?.backward()?;
                for var in [&c, &bias] {
                    let gradient = numbers(grads.get(var).expect("a gradient"))?;
                    assert!(gradient.iter().all(|g| g.abs() < 1e-6), "{gradient:?}");
                }
            }
        }
    }
    Ok(())
}

/// Beside the loss and the lse, for every reduction, ignored positions and a shift.
#[test]
fn entropy_and_its_gradient_match_the_reference() {
    for (turn, reduction) in [Reduced::Mean, Reduced::Sum, Reduced::None]
        .into_iter()
        .enumerate()
    {
        for softcap in [None, Some(2.)] {
            for dtype in [DType::F32, DType::BF16, DType::F64] {
                let mut case = Case::random(40 + turn as u64, dtype, &[2, 30], 12, 600)
                    .with_bias(1)
                    .with_ignored(2);
                case.inputs.reduction = reduction;
                case.inputs.softcap = softcap;
                case.inputs.shift = turn;
                case.inputs.logit_scale = 1.3;
                case.entropy = Entropy::Differentiable;
                case.predicted = true;
                for options in ways() {
                    for (of_loss, of_lse) in [(false, false), (true, false), (true, true)] {
                        let upstream = case.upstream(3, of_loss, of_lse);
                        check(&case, options.clone(), &Device::Cpu, &upstream, (0., 0.)).unwrap();
                    }
                }
            }
        }
    }
}

/// They are of the loss alone, which is all that is differentiated here.
#[test]
fn gradients_formed_in_the_forward_are_right_beside_an_entropy() -> Result<()> {
    for entropy in [Entropy::Value, Entropy::Differentiable] {
        let mut case = Case::random(50, DType::F32, &[40], 12, 600);
        case.entropy = entropy;
        let upstream = Upstream {
            loss: Some(vec![1.]),
            ..Upstream::default()
        };
        let options = exact().strategy(Strategy::Fused);
        check(&case, options, &Device::Cpu, &upstream, (0., 0.)).unwrap();
    }
    Ok(())
}

/// A bonus within the loss leaves the forward to form the gradients, and needs no entropy asked for.
#[test]
fn an_entropy_bonus_within_the_loss_is_formed_in_the_forward() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        for reduction in [Reduced::Mean, Reduced::Sum, Reduced::None] {
            for strategy in [Strategy::Fused, Strategy::Recompute] {
                let mut case = Case::random(57, dtype, &[3, 5], 8, 600).with_token_weights(58);
                case.inputs.entropy_bonus = 0.4;
                case.inputs.reduction = reduction;
                let options = Options::default().strategy(strategy);
                let upstream = case.upstream(1, true, false);
                check(&case, options.clone(), &Device::Cpu, &upstream, (0., 0.))
                    .unwrap_or_else(|e| panic!("{dtype:?} {reduction:?} {strategy:?}: {e}"));
                let tensors = case.tensors(&Device::Cpu)?;
                let options = case.options(options, &tensors);
                let (e, c) = (&tensors.embeddings, &tensors.classifier);
                let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
                let formed = strategy == Strategy::Fused && reduction != Reduced::None;
                assert_eq!(output.strategy == Strategy::Fused, formed);
                assert!(!output.entropy.expect("of the bonus").track_op());
            }
        }
    }
    Ok(())
}

#[test]
fn an_entropy_that_is_only_a_value_has_no_gradient() -> Result<()> {
    let mut case = Case::random(51, DType::F32, &[5], 12, 60);
    case.entropy = Entropy::Value;
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(exact(), &tensors);
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
    let entropy = output.entropy.expect("asked for");
    assert!(!entropy.track_op());
    assert!(entropy.sum_all()?.backward()?.get(c).is_none());
    Ok(())
}

/// No filter comes between an entropy and its gradient; one that is only a value leaves the filter alone.
#[test]
fn a_filter_gives_way_to_the_gradient_of_an_entropy() -> Result<()> {
    for (entropy, exact) in [(Entropy::Value, false), (Entropy::Differentiable, true)] {
        for filter in [Filter::Threshold(0.5), Filter::Drop(0.5)] {
            let mut case = Case::random(52, DType::F32, &[30], 12, 600);
            case.entropy = entropy;
            let tensors = case.tensors(&Device::Cpu)?;
            let options = case.options(Options::default().filter(filter), &tensors);
            let (e, c) = (&tensors.embeddings, &tensors.classifier);
            let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
            weighted(&output, &case.upstream(1, true, false))?.backward()?;
            let kept = output.kept_tiles()?.expect("a backward");
            assert_eq!(kept == 1., exact, "{entropy:?} {filter:?} kept {kept}");
        }
    }
    Ok(())
}

#[test]
fn positions_that_do_not_count_have_no_entropy_and_no_class() -> Result<()> {
    for options in ways() {
        for all in [false, true] {
            let mut case = Case::random(53, DType::F32, &[2, 4], 6, 40);
            case.entropy = Entropy::Differentiable;
            case.predicted = true;
            case.inputs.shift = 1;
            case.inputs.targets[2] = case.inputs.ignore_index;
            case.inputs.embeddings[6..12].fill(f64::NAN);
            if all {
                case.inputs.targets.fill(case.inputs.ignore_index);
            }
            let tensors = case.tensors(&Device::Cpu)?;
            let options = case.options(options.clone(), &tensors);
            let (e, c) = (&tensors.embeddings, &tensors.classifier);
            let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
            let entropy = output.entropy.as_ref().expect("asked for");
            assert_eq!((entropy.dims(), entropy.dtype()), (&[2, 3][..], DType::F32));
            let (entropies, classes) = (numbers(entropy)?, predicted(&output)?);
            let ignored = |position: usize| all || position == 1;
            for (position, (h, class)) in entropies.iter().zip(&classes).enumerate() {
                assert_eq!(*h == 0., ignored(position), "{entropies:?}");
                assert_eq!(*class == u32::MAX, ignored(position), "{classes:?}");
            }
            let grads = entropy.sum_all()?.backward()?;
            let de = numbers(grads.get(e).expect("a gradient"))?;
            assert!(de[6..12].iter().all(|g| *g == 0.));
            assert!(de.iter().all(|g| g.is_finite()));
            let accuracy = accuracy(
                output.predicted.as_ref().unwrap(),
                &tensors.targets,
                &options,
            )?;
            assert!(!all || accuracy.to_scalar::<f32>()? == 0.);
        }
    }
    Ok(())
}

#[test]
fn accuracy_is_the_share_of_right_predictions() -> Result<()> {
    let predicted = Tensor::new(
        &[[3u32, 1, u32::MAX], [u32::MAX, u32::MAX, 5]],
        &Device::Cpu,
    )?;
    let options = Options::default().shift(1);
    for dtype in [DType::I64, DType::I32] {
        let targets = Tensor::new(&[[-100i64, 3, 2, -100], [7, -100, -100, 5]], &Device::Cpu)?;
        let share = accuracy(&predicted, &targets.to_dtype(dtype)?, &options)?;
        assert_eq!(share.dims(), [0usize; 0]);
        assert!((share.to_scalar::<f32>()? - 2. / 3.).abs() < 1e-6);
    }
    let targets = Tensor::full(-100i64, (2, 4), &Device::Cpu)?;
    assert_eq!(
        accuracy(&predicted, &targets, &options)?.to_scalar::<f32>()?,
        0.
    );
    for (wrong, piece) in [
        (predicted.to_dtype(DType::I64)?, "u32"),
        (predicted.narrow(1, 0, 2)?, "[2, 3]"),
    ] {
        let error = accuracy(&wrong, &targets, &options)
            .unwrap_err()
            .to_string();
        assert!(error.contains(piece), "{error}");
    }
    Ok(())
}

/// A NaN is a NaN, in the entropy of its row too.
#[test]
fn a_nan_is_in_the_entropy_of_its_row() -> Result<()> {
    for options in ways() {
        let mut case = Case::random(54, DType::F32, &[3], 6, 600);
        case.entropy = Entropy::Value;
        case.predicted = true;
        case.inputs.embeddings[7] = f64::NAN;
        let tensors = case.tensors(&Device::Cpu)?;
        let options = case.options(options, &tensors);
        let (e, c) = (&tensors.embeddings, &tensors.classifier);
        let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
        let entropy = numbers(output.entropy.as_ref().expect("asked for"))?;
        assert_eq!([0, 1, 2].map(|i| entropy[i].is_nan()), [false, true, false]);
        assert!(predicted(&output)?.iter().all(|class| *class < 600));
    }
    Ok(())
}

/// The entropy bonus of an objective: the gradient of the mean entropy, by its weight.
#[test]
fn an_entropy_bonus_has_its_gradient() -> Result<()> {
    let mut case = Case::random(55, DType::F32, &[2, 6], 8, 60);
    case.inputs.reduction = Reduced::None;
    case.entropy = Entropy::Differentiable;
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(exact(), &tensors);
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
    let (log_probs, entropy) = (output.loss.neg()?, output.entropy.expect("asked for"));
    let advantages = Tensor::new(&[1f32, -0.5], &Device::Cpu)?;
    let loss = |options: &GrpoOptions| {
        let old = log_probs.detach();
        grpo_loss(&log_probs, &old, &advantages, None, options)
    };
    let of = |loss: Tensor| numbers(loss.backward()?.get(c).expect("a gradient"));
    let with = of(loss(&GrpoOptions::default().entropy(&entropy, 0.1))?)?;
    let without = of(loss(&GrpoOptions::default())?)?;
    let bonus = of((entropy.mean_all()? * 0.1)?)?;
    let want: Vec<f64> = without.iter().zip(&bonus).map(|(a, b)| a - b).collect();
    close("dC", &with, &want, 1e-6, 1.).unwrap();
    assert!(bonus.iter().any(|g| g.abs() > 1e-3));
    Ok(())
}
