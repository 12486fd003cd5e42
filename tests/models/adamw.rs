//! AdamW against its definition in f64, its master weights, its saved state.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::models::{AdamW, Group};
use candle_nn::{Init, Optimizer, ParamsAdamW, VarMap};

const START: f64 = 0.75;

fn params() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.03,
        weight_decay: 0.2,
        ..ParamsAdamW::default()
    }
}

fn variable(dtype: DType) -> Result<(VarMap, Tensor)> {
    let vars = VarMap::new();
    let w = vars.get((1, 3), "w", Init::Const(START), dtype, &Device::Cpu)?;
    vars.get(2, "unused", Init::Const(START), dtype, &Device::Cpu)?;
    Ok((vars, w))
}

/// The gradients of step `t`: exact in bf16, so that every dtype has the same.
fn gradient(t: usize) -> [f64; 3] {
    [1., -0.5, if t.is_multiple_of(3) { 2. } else { -0.125 }]
}

fn step(optimizer: &mut AdamW, w: &Tensor, t: usize) -> Result<()> {
    let gradient = Tensor::new(&[gradient(t)], &Device::Cpu)?.to_dtype(w.dtype())?;
    optimizer.step(&(w * gradient)?.sum_all()?.backward()?)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// The weights after so many steps.
fn reference(steps: usize) -> [f64; 3] {
    let p = params();
    let (mut w, mut m, mut v) = ([START; 3], [0.; 3], [0.; 3]);
    for t in 1..=steps {
        for (i, g) in gradient(t - 1).into_iter().enumerate() {
            w[i] -= p.lr * p.weight_decay * w[i];
            m[i] = p.beta1 * m[i] + (1. - p.beta1) * g;
            v[i] = p.beta2 * v[i] + (1. - p.beta2) * g * g;
            let m_hat = m[i] / (1. - p.beta1.powi(t as i32));
            let v_hat: f64 = v[i] / (1. - p.beta2.powi(t as i32));
            w[i] -= p.lr * m_hat / (v_hat.sqrt() + p.eps);
        }
    }
    w
}

#[test]
fn steps_are_those_of_the_definition() -> Result<()> {
    for (dtype, tolerance) in [
        (DType::F64, 1e-12),
        (DType::F32, 2e-6),
        (DType::F16, 5e-4),
        (DType::BF16, 4e-3),
    ] {
        let (vars, w) = variable(dtype)?;
        let mut optimizer = AdamW::from_varmap(&vars, params())?;
        for t in 0..25 {
            step(&mut optimizer, &w, t)?;
            for (got, want) in values(&w)?.into_iter().zip(reference(t + 1)) {
                let difference = (got - want).abs();
                assert!(difference < tolerance, "{dtype:?} step {t}: {got}, {want}");
            }
        }
        let unused = vars.data().lock().unwrap()["unused"].clone();
        assert_eq!(values(&unused)?, [START; 2], "no gradient, no decay");
    }
    Ok(())
}

#[test]
fn updates_too_small_for_bf16_add_up() -> Result<()> {
    let tiny = ParamsAdamW {
        lr: 1e-4,
        weight_decay: 0.,
        ..ParamsAdamW::default()
    };
    let (vars, w) = variable(DType::BF16)?;
    let mut ours = AdamW::from_varmap(&vars, tiny.clone())?;
    let (vars, theirs_w) = variable(DType::BF16)?;
    let mut theirs = candle_nn::AdamW::new(vars.all_vars(), tiny)?;
    for _ in 0..200 {
        ours.step(&w.sum_all()?.backward()?)?;
        theirs.step(&theirs_w.sum_all()?.backward()?)?;
    }
    // 200 steps of 1e-4; bf16 near 0.75 has steps of 0.0039.
    let moved = START - values(&w)?[0];
    assert!((moved - 0.02).abs() < 2e-3, "moved by {moved}");
    // What makes the test one: in the variable's dtype they are lost.
    assert_eq!(values(&theirs_w)?[0], START);
    Ok(())
}

#[test]
fn a_saved_state_goes_on_with_the_same_bits() -> Result<()> {
    let path = std::env::temp_dir().join(format!("cce-adamw-{}.safetensors", std::process::id()));
    for dtype in [DType::F32, DType::BF16] {
        let (vars, w) = variable(dtype)?;
        let mut optimizer = AdamW::from_varmap(&vars, params())?;
        for t in 0..7 {
            step(&mut optimizer, &w, t)?;
        }
        optimizer.save(&path)?;
        let (again, again_w) = variable(dtype)?;
        again.data().lock().unwrap()["w"].set(&w.copy()?)?;
        let mut resumed = AdamW::from_varmap(&again, params())?;
        resumed.load(&path)?;
        for t in 7..20 {
            step(&mut optimizer, &w, t)?;
            step(&mut resumed, &again_w, t)?;
            assert_eq!(values(&w)?, values(&again_w)?, "{dtype:?} step {t}");
        }
    }
    // The file is of bf16 now.
    let (vars, _) = variable(DType::F64)?;
    let message = AdamW::from_varmap(&vars, params())?
        .load(&path)
        .unwrap_err();
    assert!(
        message.to_string().contains("first_moment is F32"),
        "{message}"
    );
    let named = VarMap::new();
    named.get(1, "other", Init::Const(1.), DType::F32, &Device::Cpu)?;
    let message = AdamW::from_varmap(&named, params())?
        .load(&path)
        .unwrap_err();
    assert!(
        message.to_string().contains("no tensor other."),
        "{message}"
    );
    std::fs::remove_file(&path)?;
    Ok(())
}

/// One step on `sum(w)` from 1 with a learning rate of 0.1: what is left of 1, of which Adam takes 0.1 times the
/// factor.
fn after_a_step(var: &Var, optimizer: &mut AdamW) -> Result<f64> {
    optimizer.step(&var.sum_all()?.backward()?)?;
    Ok(values(var)?[0])
}

fn decayed() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.1,
        weight_decay: 0.5,
        ..ParamsAdamW::default()
    }
}

#[test]
fn norms_and_biases_are_not_decayed() -> Result<()> {
    for (shape, want) in [
        (vec![], 0.9),
        (vec![2], 0.9),
        (vec![1, 2], 0.85),
        (vec![1, 1, 2], 0.85),
    ] {
        let var = Var::ones(shape.clone(), DType::F64, &Device::Cpu)?;
        let vars = VarMap::new();
        vars.data()
            .lock()
            .unwrap()
            .insert("w".to_owned(), var.clone());
        let got = after_a_step(&var, &mut AdamW::from_varmap(&vars, decayed())?)?;
        assert!((got - want).abs() < 1e-6, "{shape:?}: {got}");
        var.set(&var.ones_like()?)?;
        let mut optimizer = AdamW::new(vec![var.clone()], decayed())?;
        let got = after_a_step(&var, &mut optimizer)?;
        assert!((got - want).abs() < 1e-6, "{shape:?}: {got}");
    }
    Ok(())
}

#[test]
fn groups_have_their_own_rate_and_decay() -> Result<()> {
    let vars = VarMap::new();
    for name in ["fast", "slow", "usual"] {
        vars.get((1, 1), name, Init::Const(1.), DType::F64, &Device::Cpu)?;
    }
    let group = |name: &str, var: &Var| match name {
        "fast" => Group {
            lr_factor: 2.,
            weight_decay: 0.25,
        },
        "slow" => Group {
            lr_factor: 0.5,
            weight_decay: 0.,
        },
        _ => Group::of(var, &decayed()),
    };
    let mut optimizer = AdamW::with_groups(&vars, decayed(), group)?;
    let path = std::env::temp_dir().join(format!("cce-groups-{}.safetensors", std::process::id()));
    optimizer.save(&path)?;
    optimizer.load(&path)?;
    std::fs::remove_file(&path)?;
    for (name, want) in [
        ("fast", 1. - 0.2 * 0.25 - 0.2),
        ("slow", 0.95),
        ("usual", 0.85),
    ] {
        let var = vars.data().lock().unwrap()[name].clone();
        let got = after_a_step(&var, &mut optimizer)?;
        assert!((got - want).abs() < 1e-6, "{name}: {got}, want {want}");
    }
    for bad in [f64::NAN, -1., f64::INFINITY] {
        let group = |_: &str, _: &Var| Group {
            lr_factor: bad,
            weight_decay: 0.,
        };
        let error = AdamW::with_groups(&vars, decayed(), group)
            .unwrap_err()
            .to_string();
        assert!(error.contains("lr_factor of fast"), "{error}");
    }
    Ok(())
}

#[test]
fn a_variable_that_is_listed_twice_is_stepped_once() -> Result<()> {
    let var = Var::ones((1, 2), DType::F64, &Device::Cpu)?;
    let mut optimizer = AdamW::new(vec![var.clone(), var.clone()], decayed())?;
    let got = after_a_step(&var, &mut optimizer)?;
    assert!((got - 0.85).abs() < 1e-6, "{got}");
    let vars = VarMap::new();
    for name in ["embedding", "head"] {
        vars.data()
            .lock()
            .unwrap()
            .insert(name.to_owned(), var.clone());
    }
    var.set(&var.ones_like()?)?;
    let got = after_a_step(&var, &mut AdamW::from_varmap(&vars, decayed())?)?;
    assert!((got - 0.85).abs() < 1e-6, "{got}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_saved_state_is_as_readable_as_other_files() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = std::env::temp_dir().join(format!("cce-adamw-mode-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let (vars, _) = variable(DType::F32)?;
    AdamW::from_varmap(&vars, params())?.save(folder.join("state"))?;
    std::fs::write(folder.join("other"), "")?;
    let mode = |name: &str| -> Result<u32> {
        Ok(std::fs::metadata(folder.join(name))?.permissions().mode())
    };
    assert_eq!(mode("state")?, mode("other")?);
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
