//! The place of the loss in Candle's graph.

use crate::common::reference::{Reduced, Reference};
use crate::common::{exact, gradients_close, norm, numbers, weighted, Case, Random, Tensors};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::{backward, linear_cross_entropy, Options, Output, Strategy};

const STRATEGIES: [Strategy; 2] = [Strategy::Recompute, Strategy::Fused];

fn run(tensors: &Tensors, options: &Options) -> Result<Output> {
    linear_cross_entropy(
        &tensors.embeddings,
        &tensors.classifier,
        &tensors.targets,
        options,
    )
}

fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    Ok(numbers(tensor)?.into_iter().map(f64::to_bits).collect())
}

#[test]
fn gradients_agree_with_finite_differences_of_the_loss() -> Result<()> {
    // The loss is f32, so the step is large and directions are random: the error is about
    // 1e-7 / step from rounding and step^2 from curvature.
    let step = 1e-2;
    for (seed, softcap, reduction) in [
        (1, None, Reduced::Mean),
        (2, Some(2.), Reduced::Sum),
        (3, Some(3.), Reduced::None),
    ] {
        let mut case = Case::random(seed, DType::F64, &[2, 5], 6, 9)
            .with_bias(seed)
            .with_ignored(seed);
        case.inputs.softcap = softcap;
        case.inputs.reduction = reduction;
        case.inputs.shift = 1;
        let upstream = case.upstream(seed, true, true);
        let loss = |case: &Case| -> Result<(Tensors, Tensor)> {
            let tensors = case.tensors(&Device::Cpu)?;
            let output = run(&tensors, &case.options(exact(), &tensors))?;
            let loss = weighted(&output, &upstream)?;
            Ok((tensors, loss))
        };
        let (tensors, at) = loss(&case)?;
        let grads = at.backward()?;
        let mut random = Random::new(seed);
        let inputs = [
            &tensors.embeddings,
            &tensors.classifier,
            tensors.bias.as_ref().unwrap(),
        ];
        for (which, var) in inputs.into_iter().enumerate() {
            let grad = numbers(grads.get(var).unwrap())?;
            let direction = random.normals(grad.len(), 1. / (grad.len() as f64).sqrt());
            let moved = |step: f64| -> Result<f64> {
                let mut case = case.clone();
                let values = match which {
                    0 => &mut case.inputs.embeddings,
                    1 => &mut case.inputs.classifier,
                    _ => case.inputs.bias.as_mut().unwrap(),
                };
                for (value, d) in values.iter_mut().zip(&direction) {
                    *value += step * d;
                }
                Ok(numbers(&loss(&case)?.1)?[0])
            };
            let got = (moved(step)? - moved(-step)?) / (2. * step);
            let want: f64 = grad.iter().zip(&direction).map(|(g, d)| g * d).sum();
            assert!(
                (got - want).abs() < 2e-4 * norm(grad.iter().copied()).max(1.),
                "case {seed} input {which}: difference {got}, gradient {want}"
            );
        }
    }
    Ok(())
}

/// How an input takes part in the graph.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Part {
    Frozen,
    Var,
    /// The result of an operation on a Var.
    Intermediate,
}

#[test]
fn every_mix_of_variables_intermediates_and_frozen_inputs_works() -> Result<()> {
    use Part::{Frozen, Intermediate};
    let parts = [Frozen, Part::Var, Intermediate];
    let case = Case::random(5, DType::F32, &[2, 4], 6, 13)
        .with_bias(6)
        .with_ignored(7);
    let upstream = case.upstream(8, true, true);
    let reference = Reference::new(case.inputs.clone());
    let want = reference.gradients(&upstream, 0.);
    let of = |var: &Var, part: Part| -> Result<Tensor> {
        match part {
            Frozen => Ok(var.detach()),
            Part::Var => Ok(var.as_tensor().clone()),
            Intermediate => var.affine(1., 0.),
        }
    };
    for embeddings in parts {
        for classifier in parts {
            for bias in [None, Some(Frozen), Some(Part::Var), Some(Intermediate)] {
                for (strategy, own_backward) in
                    STRATEGIES.into_iter().flat_map(|s| [(s, false), (s, true)])
                {
                    let what = format!(
                        "E {embeddings:?} C {classifier:?} b {bias:?} {strategy:?} {own_backward}"
                    );
                    let mut case = case.clone();
                    let mut want = want.clone();
                    if bias.is_none() {
                        case.inputs.bias = None;
                        want = Reference::new(case.inputs.clone()).gradients(&upstream, 0.);
                    }
                    let tensors = case.tensors(&Device::Cpu)?;
                    let mut options = case.options(exact(), &tensors).strategy(strategy);
                    if let (Some(var), Some(part)) = (&tensors.bias, bias) {
                        options = options.bias(&of(var, part)?);
                    }
                    let output = linear_cross_entropy(
                        &of(&tensors.embeddings, embeddings)?,
                        &of(&tensors.classifier, classifier)?,
                        &tensors.targets,
                        &options,
                    )?;
                    let tracked = [Some(embeddings), Some(classifier), bias]
                        .into_iter()
                        .flatten()
                        .any(|part| part != Frozen);
                    assert_eq!(output.loss.track_op(), tracked, "{what}");
                    let loss = weighted(&output, &upstream)?;
                    let grads = if own_backward {
                        backward(&loss)?
                    } else {
                        loss.backward()?
                    };
                    let vars = [
                        (
                            Some(&tensors.embeddings),
                            Some(embeddings),
                            &want.embeddings,
                        ),
                        (
                            Some(&tensors.classifier),
                            Some(classifier),
                            &want.classifier,
                        ),
                        (tensors.bias.as_ref(), bias, &want.bias),
                    ];
                    for (i, (var, part, want)) in vars.into_iter().enumerate() {
                        let (Some(var), Some(part)) = (var, part) else {
                            continue;
                        };
                        let Some(grad) = grads.get(var) else {
                            assert_eq!(part, Frozen, "{what}: input {i} has no gradient");
                            continue;
                        };
                        assert_ne!(part, Frozen, "{what}: frozen input {i} has a gradient");
                        crate::common::gradient_close(
                            &what,
                            &numbers(grad)?,
                            want,
                            DType::F32,
                            reference.largest_logit,
                        )
                        .unwrap();
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_second_backward_of_the_same_graph_gives_the_same_bits() -> Result<()> {
    for strategy in STRATEGIES {
        let case = Case::random(9, DType::BF16, &[30], 16, 90)
            .with_bias(1)
            .with_ignored(2);
        let tensors = case.tensors(&Device::Cpu)?;
        let options = case
            .options(Options::default(), &tensors)
            .strategy(strategy);
        let output = run(&tensors, &options)?;
        let first = output.loss.backward()?;
        // Another use of the graph in between, with other upstream gradients.
        let upstream = case.upstream(3, true, true);
        let other = weighted(&output, &upstream)?.backward()?;
        let second = output.loss.backward()?;
        let reference = Reference::new(case.inputs.clone());
        let eps = crate::common::auto_threshold(DType::BF16);
        let want = reference.averaged(&upstream, (eps, eps), crate::common::reference::CPU_TILE);
        gradients_close(&other, &tensors, &want, case.dtype, reference.largest_logit).unwrap();
        for var in [
            &tensors.embeddings,
            &tensors.classifier,
            tensors.bias.as_ref().unwrap(),
        ] {
            let grad = |grads: &GradStore| bits(grads.get(var).unwrap());
            assert_eq!(grad(&first)?, grad(&second)?, "{strategy:?}");
        }
    }
    Ok(())
}

#[test]
fn two_runs_give_the_same_bits() -> Result<()> {
    for dtype in [DType::BF16, DType::F32] {
        for strategy in STRATEGIES {
            let case = Case::random(10, dtype, &[2, 100], 48, 600).with_ignored(2);
            let once = || -> Result<Vec<Vec<u64>>> {
                let tensors = case.tensors(&Device::Cpu)?;
                let options = case
                    .options(Options::default(), &tensors)
                    .strategy(strategy);
                let output = run(&tensors, &options)?;
                let grads = output.loss.backward()?;
                Ok(vec![
                    bits(&output.loss)?,
                    bits(&output.lse)?,
                    bits(grads.get(&tensors.embeddings).unwrap())?,
                    bits(grads.get(&tensors.classifier).unwrap())?,
                ])
            };
            let first = once()?;
            for _ in 0..4 {
                assert!(first == once()?, "{dtype:?} {strategy:?}: runs differ");
            }
        }
    }
    Ok(())
}

#[test]
fn embeddings_and_classifier_may_be_the_same_variable() -> Result<()> {
    let case = Case::random(13, DType::F64, &[8], 5, 8);
    let both = case.tensor(&case.inputs.embeddings, &[8, 5], &Device::Cpu)?;
    let (both, apart) = (Var::from_tensor(&both)?, Var::from_tensor(&both)?);
    let targets = case.tensors(&Device::Cpu)?.targets;
    for strategy in STRATEGIES {
        let options = exact().strategy(strategy);
        let grads = linear_cross_entropy(&both, &apart, &targets, &options)?
            .loss
            .backward()?;
        let want = (grads.get(&both).unwrap() + grads.get(&apart).unwrap())?;
        let want = numbers(&want)?;
        let loss = linear_cross_entropy(&both, &both, &targets, &options)?.loss;
        for grads in [loss.backward()?, backward(&loss)?] {
            let got = numbers(grads.get(&both).unwrap())?;
            let error = norm(got.iter().zip(&want).map(|(g, w)| g - w));
            assert!(
                error <= 1e-12 * norm(want.iter().copied()),
                "error {error:e}"
            );
        }
    }
    Ok(())
}

#[test]
fn inputs_need_not_be_contiguous() -> Result<()> {
    for (dtype, strategy) in [DType::BF16, DType::F32]
        .into_iter()
        .flat_map(|d| STRATEGIES.map(|s| (d, s)))
    {
        let case = Case::random(15, dtype, &[3, 4], 6, 10).with_bias(1);
        let plain = case.tensors(&Device::Cpu)?;
        let options = case.options(exact(), &plain).strategy(strategy);
        let output = run(&plain, &options)?;
        let want = output.loss.backward()?;

        // Embeddings from the middle of a wider tensor, with time before batch; a transposed head; every
        // second bias; targets with their dimensions swapped.
        let wide = plain
            .embeddings
            .transpose(0, 1)?
            .contiguous()?
            .pad_with_zeros(2, 1, 2)?;
        let wide = Var::from_tensor(&wide)?;
        let embeddings = wide.narrow(2, 1, 6)?.transpose(0, 1)?;
        let head = Var::from_tensor(&plain.classifier.t()?.contiguous()?)?;
        let bias = plain.bias.as_ref().unwrap();
        let bias = Var::from_tensor(&Tensor::stack(&[bias.as_tensor(), bias.as_tensor()], 1)?)?;
        let targets = plain.targets.t()?.contiguous()?.t()?;
        let options = options.bias(&bias.narrow(1, 1, 1)?.squeeze(1)?);
        let strided = linear_cross_entropy(&embeddings, &head.t()?, &targets, &options)?;
        assert_eq!(bits(&strided.loss)?, bits(&output.loss)?);
        let grads = strided.loss.backward()?;
        let of_wide = grads.get(&wide).unwrap().narrow(2, 1, 6)?.transpose(0, 1)?;
        for (got, want) in [
            (of_wide, want.get(&plain.embeddings).unwrap()),
            (
                grads.get(&head).unwrap().t()?,
                want.get(&plain.classifier).unwrap(),
            ),
            (
                grads.get(&bias).unwrap().narrow(1, 1, 1)?.squeeze(1)?,
                want.get(plain.bias.as_ref().unwrap()).unwrap(),
            ),
        ] {
            assert_eq!(bits(&got)?, bits(want)?, "{dtype:?} {strategy:?}");
        }
    }
    Ok(())
}

#[test]
fn an_optimizer_learns_from_the_gradients() -> Result<()> {
    let case = Case::random(16, DType::F32, &[20], 8, 12);
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(Options::default(), &tensors);
    let loss = || Ok::<_, candle_core::Error>(run(&tensors, &options)?.loss);
    let before = loss()?.to_scalar::<f32>()?;
    for _ in 0..60 {
        let grads = backward(&loss()?)?;
        for var in [&tensors.embeddings, &tensors.classifier] {
            var.set(&(var.as_tensor() - (grads.get(var).unwrap() * 2.)?)?)?;
        }
    }
    let after = loss()?.to_scalar::<f32>()?;
    assert!(after < 0.3 * before, "loss {before} -> {after}");
    Ok(())
}
