//! Sums and norms of gradients.

use crate::common::{assert_close, error, exact, expected, load};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::models::{clip_gradients, Accumulator, CausalLm};
use candle_cut_cross_entropy::{backward, Reduction};

/// A gradient for this variable.
fn gradient(var: &Var, value: f64) -> Result<GradStore> {
    let gradient = Tensor::full(value, var.shape(), &Device::Cpu)?.to_dtype(var.dtype())?;
    let mut gradients = GradStore::default();
    gradients.insert(var, gradient);
    Ok(gradients)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

#[test]
fn many_small_batches_average_to_what_each_is() -> Result<()> {
    for dtype in [DType::BF16, DType::F16, DType::F32, DType::F64] {
        let var = Var::zeros(3, dtype, &Device::Cpu)?;
        let mut sum = Accumulator::new(vec![var.clone()]);
        for _ in 0..2 {
            for _ in 0..1024 {
                sum.add(gradient(&var, 1.)?)?;
            }
            let average = sum.take(1. / 1024.)?.expect("gradients");
            let average = average.get(&var).unwrap();
            assert_eq!(average.dtype(), dtype);
            assert_eq!(values(average)?, [1.; 3], "{dtype:?}");
        }
        assert!(sum.take(1.)?.is_none());
    }
    // More than f16 holds, before it is scaled.
    let var = Var::zeros(1, DType::F16, &Device::Cpu)?;
    let mut sum = Accumulator::new(vec![var.clone()]);
    for _ in 0..4 {
        sum.add(gradient(&var, 60000.)?)?;
    }
    let average = sum.take(0.25)?.expect("gradients");
    assert_eq!(values(average.get(&var).unwrap())?, [60000. - 60000. % 32.]);
    Ok(())
}

#[test]
fn a_variable_that_is_listed_twice_counts_once() -> Result<()> {
    let var = Var::zeros(1, DType::F32, &Device::Cpu)?;
    let twice = [var.clone(), var.clone()];
    let mut sum = Accumulator::new(twice.to_vec());
    for value in [1., 2.] {
        sum.add(gradient(&var, value)?)?;
    }
    let total = sum.take(2.)?.expect("gradients");
    assert_eq!(values(total.get(&var).unwrap())?, [6.]);

    let mut gradients = gradient(&var, 4.)?;
    assert_eq!(clip_gradients(&mut gradients, &twice, 2.)?, 4.);
    assert_eq!(values(gradients.get(&var).unwrap())?, [2.]);
    Ok(())
}

#[test]
fn a_gradient_that_is_not_its_variables_is_named_and_not_added() -> Result<()> {
    let var = Var::zeros(2, DType::F32, &Device::Cpu)?;
    let mut sum = Accumulator::new(vec![var.clone()]);
    sum.add(gradient(&var, 1.)?)?;
    let mut wrong = GradStore::default();
    wrong.insert(&var, Tensor::zeros(3, DType::F32, &Device::Cpu)?);
    let error = sum.add(wrong).unwrap_err().to_string();
    assert!(error.contains("[2]") && error.contains("[3]"), "{error}");
    let total = sum.take(1.)?.expect("gradients");
    assert_eq!(values(total.get(&var).unwrap())?, [1., 1.]);
    Ok(())
}

#[test]
fn norms_of_f64_gradients_may_be_beyond_f32() -> Result<()> {
    let var = Var::zeros((2, 2), DType::F64, &Device::Cpu)?;
    let mut gradients = gradient(&var, 1e30)?;
    let norm = clip_gradients(&mut gradients, std::slice::from_ref(&var), 1.)?;
    assert!((norm / 2e30 - 1.).abs() < 1e-12, "{norm}");
    for value in values(gradients.get(&var).unwrap())? {
        assert!((value - 0.5).abs() < 1e-12, "{value}");
    }
    Ok(())
}

#[test]
fn accumulated_gradients_are_those_of_the_whole_batch() -> Result<()> {
    let (decoder, vars) = load("llama")?;
    let expected = expected("llama")?;
    let (ids, labels) = (&expected["ids"], &expected["labels"]);
    let options = exact().reduction(Reduction::Sum);
    let whole = backward(&decoder.loss(ids, labels, &options)?.loss)?;
    let mut parts = Accumulator::new(vars.all_vars());
    for row in 0..2 {
        let (ids, labels) = (ids.narrow(0, row, 1)?, labels.narrow(0, row, 1)?);
        parts.add(backward(&decoder.loss(&ids, &labels, &options)?.loss)?)?;
    }
    let parts = parts.take(1.)?.expect("gradients");
    for (name, tensor) in decoder.tensors() {
        let (got, want) = (parts.get(tensor).unwrap(), whole.get(tensor).unwrap());
        assert_close(name, got, want, 1e-5);
    }
    Ok(())
}

#[test]
fn clipped_gradients_have_the_norm_asked_for() -> Result<()> {
    let a = Var::new(&[1f32, 2.], &Device::Cpu)?;
    let b = Var::new(&[3f64], &Device::Cpu)?;
    let loss = ((a.as_tensor() * 3.)?.sum_all()?.to_dtype(DType::F64)?
        + (b.as_tensor() * 4.)?.sum_all()?)?;
    let vars = [a.clone(), b.clone()];
    let norm = 34f64.sqrt();
    for (most, factor) in [(100., 1.), (1., 1. / norm)] {
        let mut gradients = loss.backward()?;
        assert!((clip_gradients(&mut gradients, &vars, most)? - norm).abs() < 1e-6);
        let a = gradients.get(&a).unwrap().to_vec1::<f32>()?;
        assert!((a[0] as f64 - 3. * factor).abs() < 1e-6, "{a:?}");
        let b = gradients.get(&b).unwrap().to_vec1::<f64>()?;
        assert!((b[0] - 4. * factor).abs() < 1e-6, "{b:?}");
    }
    let message = error(clip_gradients(&mut loss.backward()?, &vars, 0.));
    assert!(message.contains("max_norm"), "{message}");
    Ok(())
}
