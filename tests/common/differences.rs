//! Gradients against finite differences, in f64.

use super::{close, numbers};
use candle_core::{Result, Tensor, Var};

/// Compares the gradients of a scalar with central differences, number by number.
pub fn check(what: &str, vars: &[&Var], loss: impl Fn() -> Result<Tensor>) -> Result<()> {
    const STEP: f64 = 1e-5;
    let gradients = loss()?.backward()?;
    for (i, var) in vars.iter().enumerate() {
        let point = numbers(var)?;
        let loss_at = |values: &[f64]| -> Result<f64> {
            var.set(&Tensor::from_slice(values, var.shape(), var.device())?)?;
            loss()?.to_scalar()
        };
        let mut want = Vec::new();
        for j in 0..point.len() {
            let mut moved = point.clone();
            moved[j] = point[j] + STEP;
            let above = loss_at(&moved)?;
            moved[j] = point[j] - STEP;
            want.push((above - loss_at(&moved)?) / (2. * STEP));
        }
        loss_at(&point)?;
        assert!(
            want.iter().any(|g| *g != 0.),
            "{what}: no gradient of input {i}"
        );
        let what = format!("{what}, gradient of input {i}");
        let got = numbers(gradients.get(var).expect(&what))?;
        close(&what, &got, &want, 1e-7, 1.).unwrap();
    }
    Ok(())
}
