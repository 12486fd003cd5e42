//! PPO and GRPO: gradients, clipping, masks, extremes, errors.

use crate::common::differences;
use crate::common::{close, numbers, Random};
use candle_core::{DType, Device, Result, Tensor, Var, D};
use candle_cut_cross_entropy::objectives::{
    group_advantages, grpo_loss, ppo_loss, Average, GrpoOptions,
};

fn assert_close(what: &str, got: &Tensor, want: &[f64]) {
    close(what, &numbers(got).unwrap(), want, 1e-6, 1.).unwrap()
}

const SHAPE: (usize, usize) = (4, 5);

fn normals(random: &mut Random, scale: f64) -> Result<Tensor> {
    let values = random.normals(SHAPE.0 * SHAPE.1, scale);
    Tensor::from_vec(values, SHAPE, &Device::Cpu)
}

#[test]
fn gradients_of_grpo_are_those_of_finite_differences() -> Result<()> {
    let mut random = Random::new(21);
    let log_probs = Var::from_tensor(&(normals(&mut random, 1.)? - 4.)?)?;
    let old = (log_probs.detach() + normals(&mut random, 0.3)?)?;
    let reference = (log_probs.detach() + normals(&mut random, 0.5)?)?;
    let entropies = Var::from_tensor(&normals(&mut random, 1.)?)?;
    let of_tokens = normals(&mut random, 1.)?;
    let of_sequences = of_tokens.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?;
    let mask = of_tokens.gt(-0.8)?;
    for average in [Average::Sequences, Average::Tokens, Average::Length(9)] {
        for sequence_ratios in [false, true] {
            for advantages in [&of_tokens, &of_sequences] {
                let options = GrpoOptions::default()
                    .clip(0.1, 0.2)
                    .average(average)
                    .sequence_ratios(sequence_ratios)
                    .kl(&reference, 0.3)
                    .entropy(&entropies, 0.2);
                let what = format!("{average:?} {sequence_ratios} {:?}", advantages.dims());
                differences::check(&what, &[&log_probs, &entropies], || {
                    // The options hold what the entropies were; the variable is looked at anew.
                    let options = options.clone().entropy(&entropies, 0.2);
                    grpo_loss(&log_probs, &old, advantages, Some(&mask), &options)
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn ppo_loss_stops_the_gradient_of_clipped_ratios() -> Result<()> {
    let old = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
    let ratios = [1.5f32, 1.5, 0.5, 0.5];
    let log_probs = Var::new(&ratios.map(f32::ln), &Device::Cpu)?;
    let advantages = Tensor::new(&[1f32, -1., 1., -1.], &Device::Cpu)?;
    let loss = ppo_loss(&log_probs, &old, &advantages, None, 0.2)?;
    // min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-0.5, -0.8)
    assert_close("loss", &loss, &[-(1.2 - 1.5 + 0.5 - 0.8) / 4.]);
    let grads = loss.backward()?;
    let want = [0., 1.5 / 4., -0.5 / 4., 0.];
    assert_close("d log_probs", grads.get(&log_probs).unwrap(), &want);
    Ok(())
}

#[test]
fn ppo_loss_of_an_infinite_ratio_has_the_gradient_of_the_clipped_one() -> Result<()> {
    let zeros = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
    let ones = Tensor::ones(2, DType::F32, &Device::Cpu)?;
    for huge in [100f32, f32::INFINITY] {
        let log_probs = Var::new(&[huge, 0.], &Device::Cpu)?;
        let loss = ppo_loss(&log_probs, &zeros, &ones, None, 0.2)?;
        assert_close("loss", &loss, &[-1.1]);
        let grads = loss.backward()?;
        assert_close("d log_probs", grads.get(&log_probs).unwrap(), &[0., -0.5]);
    }
    // With a negative advantage nothing stops a ratio: 0 is clipped to 0.8, NaN stays one.
    let log_probs = Var::new(&[f32::NEG_INFINITY, 0.], &Device::Cpu)?;
    let loss = ppo_loss(&log_probs, &zeros, &ones.neg()?, None, 0.2)?;
    assert_close("loss", &loss, &[0.9]);
    let grads = loss.backward()?;
    assert_close("d log_probs", grads.get(&log_probs).unwrap(), &[0., 0.5]);
    let log_probs = Tensor::new(&[f32::NAN, 0.], &Device::Cpu)?;
    let loss = ppo_loss(&log_probs, &zeros, &ones, None, 0.2)?;
    assert!(loss.to_scalar::<f32>()?.is_nan(), "{loss}");
    Ok(())
}

#[test]
fn ppo_loss_ignores_what_stands_under_the_mask() -> Result<()> {
    let log_probs = Var::new(&[0f32, f32::INFINITY, f32::NAN], &Device::Cpu)?;
    let zeros = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
    let ones = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    let mask = Tensor::new(&[1u8, 0, 0], &Device::Cpu)?;
    let loss = ppo_loss(&log_probs, &zeros, &ones, Some(&mask), 0.2)?;
    assert_close("loss", &loss, &[-1.]);
    let grads = loss.backward()?;
    assert_close(
        "d log_probs",
        grads.get(&log_probs).unwrap(),
        &[-1., 0., 0.],
    );
    Ok(())
}

#[test]
fn averages_weigh_sequences_or_tokens() -> Result<()> {
    // Ratios of 1: the loss of a token is its sequence's advantage, negative.
    let log_probs = Tensor::zeros((3, 4), DType::F64, &Device::Cpu)?;
    let advantages = Tensor::new(&[1f64, 10., 100.], &Device::Cpu)?;
    let mask = Tensor::new(&[[1u8, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], &Device::Cpu)?;
    for (average, want) in [
        (Average::Sequences, 11. / 3.),
        (Average::Tokens, 14. / 5.),
        (Average::Length(7), 14. / 21.),
    ] {
        let options = GrpoOptions::default().average(average);
        let loss = grpo_loss(&log_probs, &log_probs, &advantages, Some(&mask), &options)?;
        assert_close(&format!("{average:?}"), &loss, &[-want]);
    }
    Ok(())
}

#[test]
fn a_sequence_has_the_geometric_mean_of_its_ratios() -> Result<()> {
    let log_probs = Var::new(&[[0.1f64, 0.3, 50.]], &Device::Cpu)?;
    let zeros = log_probs.zeros_like()?;
    let mask = Tensor::new(&[[1u8, 1, 0]], &Device::Cpu)?;
    let advantages = Tensor::new(&[1f64], &Device::Cpu)?;
    let options = GrpoOptions::default().clip(0.2, 0.5).sequence_ratios(true);
    let loss = grpo_loss(&log_probs, &zeros, &advantages, Some(&mask), &options)?;
    let ratio = 0.2f64.exp();
    assert_close("loss", &loss, &[-ratio]);
    let gradients = loss.backward()?;
    let want = [-ratio / 2., -ratio / 2., 0.];
    assert_close("d log_probs", gradients.get(&log_probs).unwrap(), &want);
    Ok(())
}

#[test]
fn the_upper_clip_may_differ_from_the_lower() -> Result<()> {
    let ratios = [1.25f64, 1.35, 0.75, 0.85];
    let log_probs = Tensor::new(&ratios.map(f64::ln), &Device::Cpu)?;
    let advantages = Tensor::new(&[1f64, 1., -1., -1.], &Device::Cpu)?;
    let options = GrpoOptions::default()
        .clip(0.2, 0.28)
        .average(Average::Tokens);
    let zeros = log_probs.zeros_like()?;
    let loss = grpo_loss(&log_probs, &zeros, &advantages, None, &options)?;
    assert_close("loss", &loss, &[-(1.25 + 1.28 - 0.8 - 0.85) / 4.]);
    let options = options.clip(0.2, f64::INFINITY);
    let loss = grpo_loss(&log_probs, &zeros, &advantages, None, &options)?;
    assert_close("loss", &loss, &[-(1.25 + 1.35 - 0.8 - 0.85) / 4.]);
    Ok(())
}

#[test]
fn what_does_not_count_changes_nothing() -> Result<()> {
    let mask = Tensor::new(&[[1u8, 1, 0], [1, 0, 0]], &Device::Cpu)?;
    let advantages = Tensor::new(&[1f32, -1.], &Device::Cpu)?;
    let zeros = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let run = |bad: f32, sequence_ratios: bool| -> Result<[Vec<f64>; 3]> {
        let tensor = Tensor::new(&[[0.1f32, -0.1, bad], [0.2, bad, bad]], &Device::Cpu)?;
        let log_probs = Var::from_tensor(&tensor)?;
        let entropies = Var::from_tensor(&tensor)?;
        let options = GrpoOptions::default()
            .sequence_ratios(sequence_ratios)
            .kl(&tensor.neg()?, 0.1)
            .entropy(&entropies, 0.1);
        let loss = grpo_loss(&log_probs, &zeros, &advantages, Some(&mask), &options)?;
        let gradients = loss.backward()?;
        let of = |var: &Var| numbers(gradients.get(var).unwrap());
        Ok([numbers(&loss)?, of(&log_probs)?, of(&entropies)?])
    };
    for sequence_ratios in [false, true] {
        let want = run(0., sequence_ratios)?;
        assert!(want.iter().flatten().all(|x| x.is_finite()), "{want:?}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1000.] {
            assert_eq!(run(bad, sequence_ratios)?, want, "{bad}");
        }
    }
    Ok(())
}

#[test]
fn loss_and_gradient_are_finite_where_ratios_are_clipped() -> Result<()> {
    // Where a good answer has become likelier and a bad one less likely, by e^100.
    let log_probs = Var::new(&[[100f32], [-100.], [-100.], [0.]], &Device::Cpu)?;
    let zeros = log_probs.zeros_like()?;
    let advantages = Tensor::new(&[1f32, -1., 1., 1.], &Device::Cpu)?;
    for sequence_ratios in [false, true] {
        let options = GrpoOptions::default().sequence_ratios(sequence_ratios);
        let loss = grpo_loss(&log_probs, &zeros, &advantages, None, &options)?;
        assert_close("loss", &loss, &[-(1.2 - 0.8 + 0. + 1.) / 4.]);
        let gradients = loss.backward()?;
        let want = [0., 0., 0., -0.25];
        assert_close("d log_probs", gradients.get(&log_probs).unwrap(), &want);
    }
    Ok(())
}

#[test]
fn what_overflows_is_infinite_and_never_nan() -> Result<()> {
    let options = GrpoOptions::default();
    let one = Tensor::new(&[[0f32, 0.]], &Device::Cpu)?;
    let bad = Tensor::new(&[-1f32], &Device::Cpu)?;
    let reference = Tensor::new(&[[100f32, 0.]], &Device::Cpu)?;
    for (log_probs, options, sign) in [
        ([[200f32, 0.]], options.clone(), f32::INFINITY),
        (
            [[200., 0.]],
            options.clone().sequence_ratios(true),
            f32::INFINITY,
        ),
        ([[0., 0.]], options.kl(&reference, 0.1), f32::NEG_INFINITY),
    ] {
        let log_probs = Var::new(&log_probs, &Device::Cpu)?;
        let loss = grpo_loss(&log_probs, &one, &bad, None, &options)?;
        assert_eq!(loss.to_scalar::<f32>()?, f32::INFINITY);
        let gradient = loss.backward()?.get(&log_probs).unwrap().to_vec2::<f32>()?;
        assert_eq!(gradient[0][0], sign);
        assert!(!gradient[0][1].is_nan(), "{gradient:?}");
    }
    // In f64 such numbers are within range, and in f32 the divergence is where the policy is the likelier one.
    let log_probs = Var::new(&[[100f64]], &Device::Cpu)?;
    let zero = log_probs.zeros_like()?;
    let bad = Tensor::new(&[-1f64], &Device::Cpu)?;
    let loss = grpo_loss(&log_probs, &zero, &bad, None, &GrpoOptions::default())?;
    assert_close("loss", &loss, &[100f64.exp()]);
    let log_probs = Var::new(&[[100f32]], &Device::Cpu)?;
    let zero = log_probs.zeros_like()?;
    let options = GrpoOptions::default().kl(&zero, 1.);
    let loss = grpo_loss(&log_probs, &log_probs.detach(), &zero, None, &options)?;
    assert_close("loss", &loss, &[99.]);
    let gradients = loss.backward()?;
    assert_close("d log_probs", gradients.get(&log_probs).unwrap(), &[1.]);
    Ok(())
}

#[test]
fn advantages_are_of_a_group_and_detached() -> Result<()> {
    let rewards = Var::new(&[[1f32, 2., 3.], [0.1, 0.1, 0.1]], &Device::Cpu)?;
    let advantages = group_advantages(&rewards, true)?;
    let one = 1. / (1. + 1e-4);
    assert_close("scaled", &advantages, &[-one, 0., one, 0., 0., 0.]);
    assert!(!advantages.track_op());
    let of_half = group_advantages(&rewards.to_dtype(DType::BF16)?, false)?;
    assert_eq!(of_half.dtype(), DType::F32);
    assert_close("not scaled", &of_half, &[-1., 0., 1., 0., 0., 0.]);
    Ok(())
}

#[test]
fn errors_over_tokens_say_what_is_wanted() -> Result<()> {
    let cpu = &Device::Cpu;
    let tensor = |shape: &[usize]| Tensor::zeros(shape, DType::F32, cpu);
    let (good, other) = (tensor(&[2, 3])?, tensor(&[3, 2])?);
    let (scalar, empty) = (tensor(&[])?, tensor(&[2, 0])?);
    let usual = GrpoOptions::default();
    let with = |options: GrpoOptions| grpo_loss(&good, &good, &good, None, &options);
    for (got, pieces) in [
        (
            grpo_loss(&scalar, &scalar, &scalar, None, &usual),
            ["log_probs", "(.., T)", "[]"],
        ),
        (
            grpo_loss(&empty, &empty, &empty, None, &usual),
            ["log_probs", "not be empty", "[2, 0]"],
        ),
        (
            grpo_loss(&good, &other, &good, None, &usual),
            ["old_log_probs", "[2, 3]", "[3, 2]"],
        ),
        (
            grpo_loss(&good, &good, &other, None, &usual),
            ["advantages", "sequences, [2]", "[3, 2]"],
        ),
        (
            ppo_loss(&good, &good, &tensor(&[2])?, None, 0.2),
            ["advantages", "[2, 3]", "got [2]"],
        ),
        (
            grpo_loss(&good, &good, &good, Some(&good), &usual),
            ["mask", "u8", "F32"],
        ),
        (
            with(usual.clone().kl(&other, 0.1)),
            ["reference_log_probs", "[2, 3]", "[3, 2]"],
        ),
        (
            with(usual.clone().entropy(&other, 0.1)),
            ["entropies", "[2, 3]", "[3, 2]"],
        ),
        (
            with(usual.clone().kl(&good, -0.1)),
            ["weight of kl", "at least 0", "-0.1"],
        ),
        (
            with(usual.clone().entropy(&good, f64::NAN)),
            ["weight of entropy", "at least 0", "NaN"],
        ),
        (
            with(usual.clone().clip(1., 0.2)),
            ["lower clip", "(0, 1)", "1"],
        ),
        (
            with(usual.clone().clip(0.2, 0.)),
            ["upper clip", "positive", "0"],
        ),
        (
            with(usual.average(Average::Length(0))),
            ["length", "at least 1", "0"],
        ),
        (
            group_advantages(&tensor(&[3, 1])?, true),
            ["rewards", "at least 2", "[3, 1]"],
        ),
    ] {
        let message = got.expect_err("an error was expected").to_string();
        for piece in pieces {
            assert!(message.contains(piece), "{piece:?} is not in {message:?}");
        }
    }
    Ok(())
}
