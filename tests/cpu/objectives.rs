//! z-loss, perplexity and sequence log-probabilities against their formulas in f64.

use crate::common::{close, exact, numbers, Case};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::objectives::{
    counted, dpo_loss, perplexity, ppo_loss, sequence_log_probs, squared_lse, Preferences,
};
use candle_cut_cross_entropy::{linear_cross_entropy, Options, Output, Reduction};

const REDUCTIONS: [Reduction; 3] = [Reduction::Mean, Reduction::Sum, Reduction::None];

/// Targets `(2, 4)` whose counting positions under shift 1 are `[[0, 1], [2]]`.
fn targets() -> Result<Tensor> {
    Tensor::new(&[[-100i64, 3, 1, -100], [7, -100, -100, 2]], &Device::Cpu)
}

fn options(reduction: Reduction) -> Options {
    Options::default().shift(1).reduction(reduction)
}

fn assert_close(what: &str, got: &Tensor, want: &[f64]) {
    close(what, &numbers(got).unwrap(), want, 1e-6, 1.).unwrap()
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn positions_count_where_the_shifted_target_is_not_ignored() -> Result<()> {
    let mask = counted(&targets()?, &options(Reduction::Mean))?;
    assert_eq!(mask.to_vec2::<u8>()?, [[1, 1, 0], [0, 0, 1]]);
    let other = Options::default().ignore_index(7);
    let mask = counted(&targets()?, &other)?;
    assert_eq!(mask.to_vec2::<u8>()?, [[1, 1, 1, 1], [0, 1, 1, 1]]);
    let unsigned = Tensor::new(&[5u32, u32::MAX], &Device::Cpu)?;
    let other = Options::default().ignore_index(u32::MAX as i64);
    assert_eq!(counted(&unsigned, &other)?.to_vec1::<u8>()?, [1, 0]);
    Ok(())
}

#[test]
fn z_loss_squares_the_lse_of_positions_that_count() -> Result<()> {
    let lse = Var::new(&[[1f32, -2., 9.], [9., 9., 3.]], &Device::Cpu)?;
    for (reduction, want, scale) in [
        (Reduction::Mean, vec![14. / 3.], 1. / 3.),
        (Reduction::Sum, vec![14.], 1.),
        (Reduction::None, vec![1., 4., 0., 0., 0., 9.], 1.),
    ] {
        let z = squared_lse(&lse, &targets()?, &options(reduction))?;
        assert_close("z", &z, &want);
        let grads = z.sum_all()?.backward()?;
        let want = [2., -4., 0., 0., 0., 6.].map(|g| g * scale);
        assert_close("d lse", grads.get(&lse).unwrap(), &want);
    }
    Ok(())
}

#[test]
fn z_loss_reaches_embeddings_and_classifier() -> Result<()> {
    // d(lse^2)/dz = 2 lse softmax(z): the same as an lse with upstream gradient 2 lse.
    let case = Case::random(1, DType::F64, &[2, 5], 6, 11).with_ignored(2);
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(exact(), &tensors).reduction(Reduction::Sum);
    let run = || -> Result<Output> {
        linear_cross_entropy(
            &tensors.embeddings,
            &tensors.classifier,
            &tensors.targets,
            &options,
        )
    };
    let output = run()?;
    let z = squared_lse(&output.lse, &tensors.targets, &options)?.backward()?;
    let weights = (output.lse.detach() * 2.)?;
    let weighted = (run()?.lse * weights)?.sum_all()?.backward()?;
    for var in [&tensors.embeddings, &tensors.classifier] {
        let want = numbers(weighted.get(var).unwrap())?;
        assert!(want.iter().any(|g| g.abs() > 1e-3));
        close("gradient", &numbers(z.get(var).unwrap())?, &want, 1e-6, 1.).unwrap();
    }
    Ok(())
}

#[test]
fn perplexity_is_the_same_from_every_reduction() -> Result<()> {
    let case = Case::random(3, DType::F32, &[2, 6], 8, 20).with_ignored(4);
    let tensors = case.tensors(&Device::Cpu)?;
    let reference = crate::common::reference::Reference::new(case.inputs.clone());
    let want = reference.loss[0].exp();
    for reduction in REDUCTIONS {
        let options = case.options(exact(), &tensors).reduction(reduction);
        let loss = linear_cross_entropy(
            &tensors.embeddings,
            &tensors.classifier,
            &tensors.targets,
            &options,
        )?
        .loss;
        let perplexity = perplexity(&loss, &tensors.targets, &options)?;
        assert_eq!(perplexity.rank(), 0);
        close("perplexity", &numbers(&perplexity)?, &[want], 1e-5, 1.).unwrap();
    }
    Ok(())
}

#[test]
fn nothing_that_counts_gives_perplexity_one_and_z_loss_zero() -> Result<()> {
    let ignored = Tensor::full(-100i64, (2, 3), &Device::Cpu)?;
    for reduction in REDUCTIONS {
        let options = Options::default().reduction(reduction);
        let zeros = match reduction {
            Reduction::None => Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?,
            _ => Tensor::zeros((), DType::F32, &Device::Cpu)?,
        };
        assert_close(
            "perplexity",
            &perplexity(&zeros, &ignored, &options)?,
            &[1.],
        );
        let lse = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
        let z = squared_lse(&lse, &ignored, &options)?;
        assert!(numbers(&z)?.iter().all(|z| *z == 0.), "{reduction:?}: {z}");
    }
    Ok(())
}

#[test]
fn log_probs_of_a_sequence_are_summed_over_what_counts() -> Result<()> {
    let nll = Var::new(&[[1f32, 2., 0.], [0.5, 0., f32::INFINITY]], &Device::Cpu)?;
    let all = sequence_log_probs(&nll, None)?;
    assert_eq!(all.to_vec1::<f32>()?, [-3., f32::NEG_INFINITY]);
    let mask = Tensor::new(&[[1u8, 0, 1], [1, 1, 0]], &Device::Cpu)?;
    let masked = sequence_log_probs(&nll, Some(&mask))?;
    assert_eq!(masked.to_vec1::<f32>()?, [-1., -0.5]);
    let grads = masked.sum_all()?.backward()?;
    let want = [-1., 0., -1., -1., -1., 0.];
    assert_close("d nll", grads.get(&nll).unwrap(), &want);
    Ok(())
}

#[test]
fn an_infinite_lse_that_does_not_count_has_no_gradient() -> Result<()> {
    let targets = Tensor::new(&[1i64, -100], &Device::Cpu)?;
    let lse = Var::new(&[3f32, f32::INFINITY], &Device::Cpu)?;
    let z = squared_lse(&lse, &targets, &Options::default())?;
    assert_close("z", &z, &[9.]);
    assert_close("d lse", z.backward()?.get(&lse).unwrap(), &[6., 0.]);
    Ok(())
}

#[test]
fn half_precision_numbers_are_summed_in_f32() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        // A bf16 sum of ones ends at 256, an f16 one at 2048.
        let ones = Tensor::ones((1, 3000), dtype, &Device::Cpu)?;
        let log_probs = sequence_log_probs(&ones, None)?;
        assert_close("log-probability", &log_probs, &[-3000.]);
        let targets = Tensor::zeros((1, 3000), DType::I64, &Device::Cpu)?;
        let z = squared_lse(&ones, &targets, &Options::default())?;
        assert_close("z-loss", &z, &[1.]);
        let none = Options::default().reduction(Reduction::None);
        let e = perplexity(&ones, &targets, &none)?;
        assert_close("perplexity", &e, &[std::f64::consts::E]);
        let loss = ppo_loss(&ones, &ones, &ones, None, 0.2)?;
        assert_close("ppo", &loss, &[-1.]);
    }
    // 4 - 1000 and 1 - 1000: apart in f32, not in bf16.
    let tensor = |x: f32| Tensor::new(&[x], &Device::Cpu)?.to_dtype(DType::BF16);
    let (four, one, thousand) = (tensor(4.)?, tensor(1.)?, tensor(1000.)?);
    let pair = |chosen, rejected| Preferences { chosen, rejected };
    let loss = dpo_loss(pair(&four, &thousand), pair(&one, &thousand), 1.)?;
    assert_close("dpo", &loss, &[(-3f64).exp().ln_1p()]);
    Ok(())
}

#[test]
fn objectives_say_what_shape_they_want() -> Result<()> {
    let cpu = &Device::Cpu;
    let tensor = |n: usize| Tensor::zeros(n, DType::F32, cpu);
    let (two, three) = (tensor(2)?, tensor(3)?);
    let pair = |chosen, rejected| Preferences { chosen, rejected };
    let options = Options::default();
    let none = options.clone().reduction(Reduction::None);
    let y = Tensor::zeros(3, DType::I64, cpu)?;
    let scalar = Tensor::zeros((), DType::F32, cpu)?;
    for (got, pieces) in [
        (squared_lse(&two, &y, &options), ["lse", "[3]", "[2]"]),
        (
            squared_lse(&three, &y, &options.clone().shift(3)),
            ["shift", "3", "[3]"],
        ),
        (perplexity(&two, &y, &options), ["loss", "scalar", "[2]"]),
        (perplexity(&two, &y, &none), ["loss", "[3]", "[2]"]),
        (
            sequence_log_probs(&scalar, None),
            ["nll", "(.., T)", "scalar"],
        ),
        (sequence_log_probs(&two, Some(&two)), ["mask", "u8", "F32"]),
        (
            dpo_loss(pair(&two, &three), pair(&two, &two), 0.1),
            ["policy.rejected", "[2]", "[3]"],
        ),
        (
            dpo_loss(pair(&two, &two), pair(&two, &two), 0.),
            ["beta", "positive", "0"],
        ),
        (
            ppo_loss(&two, &three, &two, None, 0.2),
            ["old_log_probs", "[2]", "[3]"],
        ),
        (
            ppo_loss(&two, &two, &two, None, 1.),
            ["clip", "(0, 1)", "1"],
        ),
    ] {
        let message = message(got);
        for piece in pieces {
            assert!(message.contains(piece), "{piece:?} is not in {message:?}");
        }
    }
    Ok(())
}
