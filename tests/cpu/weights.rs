//! Weights of classes and tokens, and label smoothing.

use crate::common::reference::{Reduced, Reference};
use crate::common::{check, close, exact, numbers, Case};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Implementation, Options, Output, Strategy,
};

const REDUCTIONS: [Reduced; 3] = [Reduced::Mean, Reduced::Sum, Reduced::None];

/// Every way to compute a loss exactly on the CPU.
fn ways() -> impl Iterator<Item = Options> {
    [Implementation::Auto, Implementation::Native]
        .into_iter()
        .flat_map(|implementation| {
            [Strategy::Recompute, Strategy::Fused].map(|strategy| {
                exact()
                    .implementation(implementation)
                    .strategy(strategy)
                    .workspace(64 << 20)
            })
        })
}

fn assert_right(case: &Case, what: &str) {
    for options in ways() {
        for of_lse in [false, true] {
            let upstream = case.upstream(1, true, of_lse);
            let checked = check(case, options.clone(), &Device::Cpu, &upstream, (0., 0.));
            checked.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    }
}

#[test]
fn weights_and_smoothing_match_the_reference_together_and_alone() {
    for bits in 0..16 {
        for reduction in REDUCTIONS {
            let mut case = Case::random(bits, DType::F32, &[3, 7], 8, 300).with_ignored(bits);
            case.inputs.reduction = reduction;
            case.inputs.shift = bits as usize % 3;
            if bits & 1 > 0 {
                case = case.with_class_weights(bits);
            }
            if bits & 2 > 0 {
                case = case.with_token_weights(bits);
            }
            if bits & 4 > 0 {
                case.inputs.label_smoothing = 0.2;
            }
            if bits & 8 > 0 {
                case.inputs.z_loss = 0.1;
                case = case.with_bias(bits);
            }
            assert_right(&case, &format!("{bits} {reduction:?}"));
        }
    }
}

#[test]
fn negative_weights_are_weights() {
    for reduction in REDUCTIONS {
        let mut case = Case::random(31, DType::F32, &[9], 8, 40);
        case.inputs.reduction = reduction;
        let weights = (0..9).map(|i| [1.5, -0.5, -1.][i % 3]).collect();
        case.inputs.token_weights = Some(weights);
        // They sum up to 0: the mean does not divide.
        assert_right(&case, &format!("to nothing, {reduction:?}"));
        case.inputs.token_weights = Some((0..9).map(|i| -0.25 * i as f64).collect());
        assert_right(&case, &format!("below nothing, {reduction:?}"));
    }
}

#[test]
fn weights_of_zero_make_a_loss_and_gradients_of_zero() -> Result<()> {
    for reduction in REDUCTIONS {
        for options in ways() {
            for of_classes in [false, true] {
                let mut case = Case::random(32, DType::F32, &[2, 5], 8, 40).with_bias(1);
                case.inputs.reduction = reduction;
                // The z-loss has the weights of tokens, and none of classes.
                case.inputs.z_loss = if of_classes { 0. } else { 0.1 };
                match of_classes {
                    true => case.inputs.class_weights = Some(vec![0.; 40]),
                    false => case.inputs.token_weights = Some(vec![0.; 10]),
                }
                let tensors = case.tensors(&Device::Cpu)?;
                let options = case.options(options.clone(), &tensors);
                let (e, c) = (&tensors.embeddings, &tensors.classifier);
                let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
                let grads = output.loss.sum_all()?.backward()?;
                let bias = tensors.bias.as_deref().expect("a bias");
                let gradients = [e.as_tensor(), c, bias].map(|of| grads.get(of).expect("one"));
                for tensor in [&output.loss].into_iter().chain(gradients) {
                    let numbers = numbers(tensor)?;
                    assert!(numbers.iter().all(|x| *x == 0.), "{numbers:?}");
                }
                assert!(numbers(&output.lse)?.iter().all(|x| *x != 0.));
            }
        }
    }
    Ok(())
}

#[test]
fn a_position_of_weight_zero_changes_nothing() -> Result<()> {
    let mut case = Case::random(33, DType::F64, &[6], 8, 40);
    let mut weights = vec![1.; 6];
    (weights[1], weights[4]) = (0., 0.);
    case.inputs.token_weights = Some(weights);
    let mut without = case.clone();
    without.inputs.token_weights = None;
    for row in [1, 4] {
        without.inputs.targets[row] = without.inputs.ignore_index;
    }
    let (weighted, ignored) = (
        Reference::new(case.inputs.clone()),
        Reference::new(without.inputs),
    );
    close("loss", &weighted.loss, &ignored.loss, 1e-14, 1.).unwrap();
    assert_right(&case, "two of weight 0");
    Ok(())
}

/// What stands beside a target that does not count is not looked at.
#[test]
fn weights_of_ignored_positions_may_be_anything() -> Result<()> {
    for options in ways() {
        for implementation in [Implementation::Auto, Implementation::Native] {
            let mut case = Case::random(34, DType::F32, &[6], 8, 40);
            case.inputs.z_loss = 0.1;
            case.inputs.label_smoothing = 0.1;
            case.inputs.targets[2] = case.inputs.ignore_index;
            case.inputs.token_weights = Some(vec![0.5, 1., f64::NAN, 2., 0., 1.]);
            case.inputs.embeddings[2 * 8..3 * 8].fill(f64::NAN);
            let tensors = case.tensors(&Device::Cpu)?;
            let options = case
                .options(options.clone(), &tensors)
                .implementation(implementation);
            let (e, c) = (&tensors.embeddings, &tensors.classifier);
            let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
            let grads = output.loss.backward()?;
            let of = |tensor| numbers(grads.get(tensor).expect("a gradient"));
            let z_loss = output.z_loss.as_ref().expect("a z-loss");
            let finite = [numbers(&output.loss)?, numbers(z_loss)?, of(e)?, of(c)?].concat();
            assert!(finite.iter().all(|x| x.is_finite()));
            assert!(of(e)?[2 * 8..3 * 8].iter().all(|x| *x == 0.));
        }
    }
    Ok(())
}

#[test]
fn an_infinite_class_leaves_the_gradient_of_ignored_positions_alone() -> Result<()> {
    let mut case = Case::random(35, DType::F32, &[4], 8, 40);
    case.inputs.label_smoothing = 0.1;
    case.inputs.targets[2] = case.inputs.ignore_index;
    case.inputs.classifier[5] = f64::INFINITY;
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(exact(), &tensors);
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let grads = linear_cross_entropy(e, c, &tensors.targets, &options)?
        .loss
        .backward()?;
    let of_ignored = &numbers(grads.get(e).expect("a gradient"))?[2 * 8..3 * 8];
    assert!(of_ignored.iter().all(|x| *x == 0.), "{of_ignored:?}");
    Ok(())
}

/// Where every position is ignored there is nothing to weigh.
#[test]
fn nothing_counts_whatever_the_weights() -> Result<()> {
    for reduction in REDUCTIONS {
        for options in ways() {
            let mut case = Case::random(36, DType::F32, &[2, 4], 8, 40)
                .with_class_weights(1)
                .with_token_weights(2);
            case.inputs.reduction = reduction;
            case.inputs.label_smoothing = 0.1;
            case.inputs.z_loss = 0.1;
            case.inputs.targets.fill(case.inputs.ignore_index);
            let tensors = case.tensors(&Device::Cpu)?;
            let options = case.options(options, &tensors);
            let (e, c) = (&tensors.embeddings, &tensors.classifier);
            let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
            let grads = output.loss.sum_all()?.backward()?;
            let z_loss = output.z_loss.as_ref().expect("a z-loss");
            let of = |tensor| grads.get(tensor).expect("a gradient");
            for tensor in [&output.loss, z_loss, of(e), of(c)] {
                assert!(numbers(tensor)?.iter().all(|x| *x == 0.));
            }
        }
    }
    Ok(())
}

#[test]
fn weights_of_any_float_dtype_are_the_same() -> Result<()> {
    let case = Case::random(37, DType::F32, &[6], 8, 40);
    let tensors = case.tensors(&Device::Cpu)?;
    let loss = |dtype: DType| -> Result<Vec<f64>> {
        // Halves, which every dtype holds.
        let halves = |n: u32| {
            (Tensor::arange(0u32, n, &Device::Cpu)?.to_dtype(DType::F32)? / 2.)?.to_dtype(dtype)
        };
        let (of_classes, of_tokens) = (halves(40)?, halves(6)?);
        let options = case.options(exact(), &tensors);
        let options = options.class_weights(&of_classes).token_weights(&of_tokens);
        let (e, c) = (&tensors.embeddings, &tensors.classifier);
        numbers(&linear_cross_entropy(e, c, &tensors.targets, &options)?.loss)
    };
    let want = loss(DType::F32)?;
    for dtype in [DType::BF16, DType::F16, DType::F64] {
        assert_eq!(loss(dtype)?, want, "{dtype:?}");
    }
    Ok(())
}

/// The z-loss that is reported is the part of the loss that it is.
#[test]
fn the_reported_z_loss_has_the_weights() -> Result<()> {
    for reduction in REDUCTIONS {
        let mut case = Case::random(38, DType::F32, &[2, 5], 8, 40)
            .with_ignored(1)
            .with_class_weights(2)
            .with_token_weights(3);
        case.inputs.reduction = reduction;
        let tensors = case.tensors(&Device::Cpu)?;
        let run = |options: Options| -> Result<Output> {
            let options = case.options(options, &tensors);
            let (e, c) = (&tensors.embeddings, &tensors.classifier);
            linear_cross_entropy(e, c, &tensors.targets, &options)
        };
        let with = run(exact().z_loss_weight(0.1))?;
        let part = (&with.loss - run(exact())?.loss)?;
        let reported = with.z_loss.expect("a z-loss");
        assert_eq!(reported.dims(), with.loss.dims());
        close("z-loss", &numbers(&reported)?, &numbers(&part)?, 1e-5, 1.).unwrap();
    }
    Ok(())
}

/// What smoothing adds to the gradients comes each time, to whatever is tracked, through any backward.
#[test]
fn smoothed_gradients_come_again_and_for_what_is_tracked() -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for options in ways() {
            let mut case = Case::random(39, dtype, &[8], 16, 60)
                .with_bias(1)
                .with_class_weights(2);
            case.inputs.label_smoothing = 0.3;
            let tensors = case.tensors(&Device::Cpu)?;
            let options = case.options(options.clone(), &tensors);
            let bias = tensors.bias.as_ref().expect("a bias");
            let (e, c, y) = (&tensors.embeddings, &tensors.classifier, &tensors.targets);
            let output = linear_cross_entropy(e, c, y, &options)?;
            let all: [&Var; 3] = [e, c, bias];
            let first = output.loss.backward()?;
            // Loss scaling, as f16 needs it: a power of two changes no digit.
            let scaled = backward(&(&output.loss * 128.)?)?;
            let second = backward(&output.loss)?;
            for var in all {
                let of = |grads: &candle_core::backprop::GradStore| {
                    numbers(grads.get(var).expect("one"))
                };
                let want = of(&first)?;
                assert_eq!(of(&second)?, want, "{dtype:?}: again");
                let unscaled: Vec<f64> = of(&scaled)?.iter().map(|g| g / 128.).collect();
                close("scaled", &unscaled, &want, 2e-3, 1e-3).unwrap();
            }
            let frozen = e.detach();
            let grads = linear_cross_entropy(&frozen, c, y, &options)?
                .loss
                .backward()?;
            assert!(grads.get(&frozen).is_none());
            close(
                "dC",
                &numbers(grads.get(c).expect("one"))?,
                &numbers(first.get(c).expect("one"))?,
                1e-2,
                1e-3,
            )
            .unwrap();
        }
    }
    Ok(())
}

#[test]
fn the_weight_of_a_class_that_is_no_target_may_be_anything() -> Result<()> {
    // As the inverse of how often a class occurs is.
    let case = Case::random(3, DType::F32, &[6], 8, 10);
    let tensors = case.tensors(&Device::Cpu)?;
    let targets = Tensor::new(&[1i64, -100, 3, 4, 5, 9], &Device::Cpu)?;
    let mut weights = vec![2f32; 10];
    weights[9] = 0.5;
    let loss = |weights: Vec<f32>| -> Result<Vec<f64>> {
        let weights = Tensor::new(weights, &Device::Cpu)?;
        let options = exact().class_weights(&weights);
        let output =
            linear_cross_entropy(&tensors.embeddings, &tensors.classifier, &targets, &options)?;
        let gradients = backward(&output.loss)?;
        let mut all = numbers(&output.loss)?;
        all.extend(numbers(gradients.get(&tensors.classifier).unwrap())?);
        Ok(all)
    };
    let want = loss(weights.clone())?;
    for anything in [f32::INFINITY, f32::NAN] {
        weights[0] = anything;
        assert_eq!(loss(weights.clone())?, want);
    }
    Ok(())
}

#[test]
fn an_infinite_upstream_gradient_of_an_ignored_position_does_not_matter() -> Result<()> {
    let case = Case::random(4, DType::F32, &[4], 8, 10).with_bias(5);
    let tensors = case.tensors(&Device::Cpu)?;
    let bias = tensors.bias.as_ref().unwrap();
    let targets = Tensor::new(&[1i64, -100, 3, 4], &Device::Cpu)?;
    let options = exact()
        .bias(bias.as_tensor())
        .label_smoothing(0.1)
        .reduction(candle_cut_cross_entropy::Reduction::None);
    let output =
        linear_cross_entropy(&tensors.embeddings, &tensors.classifier, &targets, &options)?;
    // The loss of the ignored position is 0, and the slope of its logarithm infinite.
    let gradients = output.loss.log()?.sum_all()?.backward()?;
    for var in [&tensors.embeddings, &tensors.classifier, bias] {
        let gradient = numbers(gradients.get(var).unwrap())?;
        assert!(gradient.iter().all(|g| g.is_finite()), "{gradient:?}");
    }
    Ok(())
}
