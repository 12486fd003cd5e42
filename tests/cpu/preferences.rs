//! Objectives over answers that are preferred or desirable: gradients, extremes, errors.

use crate::common::differences;
use crate::common::{close, numbers, Random};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::objectives::{
    cpo_loss, dpo_loss, ipo_loss, kto_kl, kto_loss, mean_log_probs, orpo_loss, simpo_loss,
    KtoOptions, Preferences,
};

fn assert_close(what: &str, got: &Tensor, want: &[f64]) {
    close(what, &numbers(got).unwrap(), want, 1e-6, 1.).unwrap()
}

fn pair<'a>(chosen: &'a Tensor, rejected: &'a Tensor) -> Preferences<'a> {
    Preferences { chosen, rejected }
}

/// Log-probabilities of `n` answers, from -8 to 0.
fn log_probs(random: &mut Random, n: usize) -> Result<Var> {
    let values: Vec<f64> = (0..n).map(|_| -8. * random.uniform()).collect();
    Var::from_vec(values, n, &Device::Cpu)
}

type OverPairs = fn(Preferences<'_>, Preferences<'_>) -> Result<Tensor>;

/// Every objective over pairs, of a policy and a reference.
const OVER_PAIRS: [(&str, OverPairs); 5] = [
    ("dpo", |policy, reference| dpo_loss(policy, reference, 0.3)),
    ("ipo", |policy, reference| ipo_loss(policy, reference, 0.3)),
    ("cpo", |policy, _| cpo_loss(policy, 0.3, 0.5)),
    ("simpo", |policy, _| simpo_loss(policy, 2., 0.5)),
    ("orpo", |policy, _| orpo_loss(policy, 0.7)),
];

#[test]
fn gradients_over_pairs_are_those_of_finite_differences() -> Result<()> {
    let mut random = Random::new(11);
    let chosen = log_probs(&mut random, 6)?;
    let rejected = log_probs(&mut random, 6)?;
    let of_reference = log_probs(&mut random, 12)?.detach();
    let (first, second) = (of_reference.narrow(0, 0, 6)?, of_reference.narrow(0, 6, 6)?);
    for (name, loss) in OVER_PAIRS {
        differences::check(name, &[&chosen, &rejected], || {
            loss(pair(&chosen, &rejected), pair(&first, &second))
        })?;
    }
    Ok(())
}

#[test]
fn losses_over_pairs_are_finite_for_margins_of_a_hundred() -> Result<()> {
    let zeros = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
    // Certain, impossible, and nearly so.
    let chosen = Var::new(&[-100f32, 0., -0.001, -100.], &Device::Cpu)?;
    let rejected = Var::new(&[0f32, -100., -100., -0.001], &Device::Cpu)?;
    let in_f64 = |var: &Var| Var::from_tensor(&var.to_dtype(DType::F64)?);
    let (chosen_f64, rejected_f64) = (in_f64(&chosen)?, in_f64(&rejected)?);
    let zeros_f64 = zeros.to_dtype(DType::F64)?;
    for (name, loss) in OVER_PAIRS {
        let narrow = loss(pair(&chosen, &rejected), pair(&zeros, &zeros))?;
        let wide = loss(
            pair(&chosen_f64, &rejected_f64),
            pair(&zeros_f64, &zeros_f64),
        )?;
        let want = numbers(&wide)?;
        assert!(want[0].is_finite(), "{name}: {want:?}");
        close(name, &numbers(&narrow)?, &want, 1e-6, 1.).unwrap();
        let (narrow, wide) = (narrow.backward()?, wide.backward()?);
        for (var, var_f64) in [(&chosen, &chosen_f64), (&rejected, &rejected_f64)] {
            let want = numbers(wide.get(var_f64).unwrap())?;
            assert!(want.iter().all(|g| g.is_finite()), "{name}: {want:?}");
            // Log-probabilities of -0.001 have 1 / (1 - e^x) = 1000 in their gradient.
            let got = numbers(narrow.get(var).unwrap())?;
            close(name, &got, &want, 1e-6, 1.).unwrap();
        }
    }
    Ok(())
}

#[test]
fn dpo_loss_is_stable_for_large_margins() -> Result<()> {
    let zeros = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
    let reference = Preferences {
        chosen: &zeros,
        rejected: &zeros,
    };
    let chosen = Var::new(&[-2000f32, 2000.], &Device::Cpu)?;
    let policy = Preferences {
        chosen: &chosen,
        rejected: &zeros,
    };
    let loss = dpo_loss(policy, reference, 1.)?;
    // -log sigmoid(-2000) = 2000, -log sigmoid(2000) = 0
    assert_close("loss", &loss, &[1000.]);
    let grads = loss.backward()?;
    assert_close("d chosen", grads.get(&chosen).unwrap(), &[-0.5, 0.]);
    Ok(())
}

#[test]
fn a_pair_of_infinite_margin_has_an_infinite_loss_and_no_nan() -> Result<()> {
    let zero = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
    let chosen = Var::new(&[f32::NEG_INFINITY], &Device::Cpu)?;
    let loss = dpo_loss(pair(&chosen, &zero), pair(&zero, &zero), 1.)?;
    assert_eq!(loss.to_scalar::<f32>()?, f32::INFINITY);
    let gradient = loss.backward()?.get(&chosen).unwrap().to_vec1::<f32>()?;
    assert_eq!(gradient, [-1.]);
    Ok(())
}

#[test]
fn log_odds_are_right_wherever_a_log_probability_is() -> Result<()> {
    // Of a rejected answer with probability 1/2 the log-odds are 0: the loss is softplus(-log_odds) - x.
    let rejected = Tensor::new(&[-(2f32.ln())], &Device::Cpu)?;
    for x in [-1e-20f32, -1e-6, -1e-3, -0.5, -5., -50., -100.] {
        let chosen = Tensor::new(&[x], &Device::Cpu)?;
        let got = orpo_loss(pair(&chosen, &rejected), 1.)?;
        let x = x as f64;
        let log_odds = x - (-x.exp_m1()).ln();
        let want = (-log_odds).exp().ln_1p() - x;
        assert_close("loss", &got, &[want]);
        // The other way round the loss is softplus(log_odds), large where the answer is likely.
        let got = orpo_loss(pair(&rejected, &chosen), 1.)?;
        assert_close(
            "loss",
            &got,
            &[log_odds.exp().ln_1p() + std::f64::consts::LN_2],
        );
    }
    Ok(())
}

#[test]
fn a_certain_answer_has_finite_odds() -> Result<()> {
    let certain = Var::new(&[0f32], &Device::Cpu)?;
    let half = Tensor::new(&[-(2f32.ln())], &Device::Cpu)?;
    let odds = 100. * std::f64::consts::LN_2;
    for (policy, loss, gradient) in [
        (pair(&certain, &half), 0., -1.),
        (pair(&half, &certain), odds + std::f64::consts::LN_2, 0.),
    ] {
        let orpo = orpo_loss(policy, 1.)?;
        assert_close("loss", &orpo, &[loss]);
        assert_close(
            "gradient",
            orpo.backward()?.get(&certain).unwrap(),
            &[gradient],
        );
    }
    Ok(())
}

#[test]
fn ipo_asks_for_a_margin_and_no_more() -> Result<()> {
    let zeros = Tensor::zeros(2, DType::F64, &Device::Cpu)?;
    let chosen = Var::new(&[1f64, 5.], &Device::Cpu)?;
    // 1 / (2 beta) = 2
    let loss = ipo_loss(pair(&chosen, &zeros), pair(&zeros, &zeros), 0.25)?;
    assert_close("loss", &loss, &[(1. + 9.) / 2.]);
    let gradients = loss.backward()?;
    assert_close("d chosen", gradients.get(&chosen).unwrap(), &[-1., 3.]);
    Ok(())
}

#[test]
fn mean_log_probs_are_over_the_tokens_that_count() -> Result<()> {
    let nll = Var::new(
        &[[1f32, 2., 9.], [f32::NAN, f32::INFINITY, 1.]],
        &Device::Cpu,
    )?;
    let mask = Tensor::new(&[[1u8, 1, 0], [0, 0, 0]], &Device::Cpu)?;
    let means = mean_log_probs(&nll, &mask)?;
    assert_eq!(means.to_vec1::<f32>()?, [-1.5, 0.]);
    let gradients = means.sum_all()?.backward()?;
    let want = [-0.5, -0.5, 0., 0., 0., 0.];
    assert_close("d nll", gradients.get(&nll).unwrap(), &want);
    Ok(())
}

#[test]
fn gradients_of_kto_are_those_of_finite_differences() -> Result<()> {
    let mut random = Random::new(12);
    let policy = log_probs(&mut random, 6)?;
    let reference = log_probs(&mut random, 6)?.detach();
    let desirable = Tensor::new(&[1u8, 0, 1, 1, 0, 0], &Device::Cpu)?;
    let kl = Tensor::new(0.7f64, &Device::Cpu)?;
    let options = KtoOptions::default().beta(0.4).weights(1.2, 0.5);
    differences::check("kto", &[&policy], || {
        kto_loss(&policy, &reference, &desirable, &kl, &options)
    })
}

#[test]
fn kto_is_finite_for_log_ratios_of_a_hundred() -> Result<()> {
    let zeros = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
    let policy = Var::new(&[-100f32, 100., -100., 100.], &Device::Cpu)?;
    let desirable = Tensor::new(&[1u8, 1, 0, 0], &Device::Cpu)?;
    let kl = Tensor::new(0f32, &Device::Cpu)?;
    let options = KtoOptions::default().beta(1.).weights(1., 3.);
    let loss = kto_loss(&policy, &zeros, &desirable, &kl, &options)?;
    // 1 - sigmoid(-100) = 1 and 1 - sigmoid(100) = 0; undesirable ones the other way round.
    assert_close("loss", &loss, &[(1. + 0. + 0. + 3.) / 4.]);
    let gradients = loss.backward()?;
    assert_close("d policy", gradients.get(&policy).unwrap(), &[0.; 4]);
    Ok(())
}

#[test]
fn the_reference_point_of_kto_is_not_negative_and_gets_no_gradient() -> Result<()> {
    let policy = Var::new(&[-1f32, -2.], &Device::Cpu)?;
    let reference = Tensor::new(&[-3f32, -4.], &Device::Cpu)?;
    assert_close("kl", &kto_kl(&policy, &reference)?, &[2.]);
    assert_close("kl", &kto_kl(&reference, &policy)?, &[0.]);
    let desirable = Tensor::new(&[1u8, 1], &Device::Cpu)?;
    let kl = kto_kl(&policy, &reference)?;
    let options = KtoOptions::default();
    let loss = kto_loss(&reference, &reference, &desirable, &kl, &options)?;
    assert_close("loss", &loss, &[1. / (1. + (-0.2f64).exp())]);
    assert!(loss.backward()?.get(&policy).is_none());
    Ok(())
}

#[test]
fn errors_over_answers_say_what_is_wanted() -> Result<()> {
    let cpu = &Device::Cpu;
    let tensor = |n: usize| Tensor::zeros(n, DType::F32, cpu);
    let (none, two, three) = (tensor(0)?, tensor(2)?, tensor(3)?);
    let flags = Tensor::zeros(2, DType::U8, cpu)?;
    let scalar = Tensor::zeros((), DType::F32, cpu)?;
    let usual = KtoOptions::default();
    let even = pair(&two, &two);
    for (got, pieces) in [
        (
            ipo_loss(even, pair(&three, &two), 0.1),
            ["reference.chosen", "[2]", "[3]"],
        ),
        (
            ipo_loss(even, even, f64::NAN),
            ["beta", "positive and finite", "NaN"],
        ),
        (
            cpo_loss(pair(&two, &three), 0.1, 1.),
            ["policy.rejected", "[2]", "[3]"],
        ),
        (
            cpo_loss(even, -1., 1.),
            ["beta", "positive and finite", "-1"],
        ),
        (
            cpo_loss(even, 0.1, -1.),
            ["alpha", "at least 0 and finite", "-1"],
        ),
        (
            simpo_loss(pair(&none, &none), 2., 1.),
            ["empty", "policy.chosen", "[0]"],
        ),
        (
            simpo_loss(even, 2., f64::INFINITY),
            ["gamma", "at least 0 and finite", "inf"],
        ),
        (
            orpo_loss(even, -0.1),
            ["lambda", "at least 0 and finite", "-0.1"],
        ),
        (
            kto_loss(&two, &three, &flags, &scalar, &usual),
            ["reference_log_probs", "[2]", "[3]"],
        ),
        (
            kto_loss(&two, &two, &two, &scalar, &usual),
            ["desirable", "u8", "F32"],
        ),
        (
            kto_loss(&three, &three, &flags, &scalar, &usual),
            ["desirable", "[3]", "[2]"],
        ),
        (
            kto_loss(&two, &two, &flags, &two, &usual),
            ["kl", "scalar", "[2]"],
        ),
        (
            kto_loss(&two, &two, &flags, &scalar, &usual.beta(0.)),
            ["beta", "positive and finite", "0"],
        ),
        (
            kto_loss(&two, &two, &flags, &scalar, &usual.weights(1., -2.)),
            ["undesirable", "at least 0", "-2"],
        ),
        (kto_kl(&none, &none), ["empty", "log_probs", "[0]"]),
        (
            mean_log_probs(&two, &Tensor::zeros(3, DType::U8, cpu)?),
            ["nll", "[3]", "[2]"],
        ),
    ] {
        let message = got.expect_err("an error was expected").to_string();
        for piece in pieces {
            assert!(message.contains(piece), "{piece:?} is not in {message:?}");
        }
    }
    Ok(())
}
