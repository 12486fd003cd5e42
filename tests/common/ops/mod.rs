//! Cases of the differentiable operations: what they compute on a device, and what explicit formulas in f64 say.

pub mod attention;
pub mod embedding;
pub mod rows;

use super::{gradient_tolerance, norm, numbers, round_to, Random};
use candle_core::{DType, Device, Result, Tensor, Var};

/// A result or a gradient.
pub struct Numbers {
    pub name: &'static str,
    pub values: Vec<f64>,
}

/// What one is to be, and the size that its error is measured by: its norm, or more where terms cancel.
pub struct Want {
    pub name: &'static str,
    pub values: Vec<f64>,
    pub size: f64,
}

impl Want {
    pub fn new(name: &'static str, values: Vec<f64>) -> Self {
        let size = norm(values.iter().copied());
        Self { name, values, size }
    }

    /// With terms whose absolute values are these before they cancel.
    pub fn of_terms(name: &'static str, values: Vec<f64>, terms: &[f64]) -> Self {
        let mut want = Self::new(name, values);
        want.size = want.size.max(0.3 * norm(terms.iter().copied()));
        want
    }
}

pub trait Operation {
    fn describe(&self) -> String;
    fn dtype(&self) -> DType;
    /// Results, then gradients.
    fn computed(&self, device: &Device) -> Result<Vec<Numbers>>;
    /// The same by f64 formulas.
    fn wanted(&self) -> Vec<Want>;
}

/// What is wrong with a case, if anything.
pub fn wrong(case: &dyn Operation, device: &Device) -> Option<String> {
    let failed = |error: String| Some(format!("{:?} {}: {error}", case.dtype(), case.describe()));
    let computed = match case.computed(device) {
        Ok(computed) => computed,
        Err(error) => return failed(error.to_string()),
    };
    let wanted = case.wanted();
    assert_eq!(computed.len(), wanted.len(), "{}", case.describe());
    for (got, want) in computed.iter().zip(&wanted) {
        assert_eq!(got.name, want.name);
        if got.values.len() != want.values.len() {
            let (got, len) = (got.values.len(), want.values.len());
            return failed(format!("{} has {got} numbers, want {len}", want.name));
        }
        let differences = got.values.iter().zip(&want.values).map(|(a, b)| a - b);
        let error = norm(differences.clone());
        let allowed = gradient_tolerance(case.dtype()) * want.size;
        if error.is_nan() || error > allowed {
            let worst = differences.map(f64::abs).enumerate();
            let (at, _) = worst.fold(
                (0, 0.),
                |max, x| {
                    if x.1 > max.1 || x.1.is_nan() {
                        x
                    } else {
                        max
                    }
                },
            );
            return failed(format!(
                "{} is off by {error:e}, allowed {allowed:e}; at {at} of {} it is {:e}, want {:e}",
                want.name,
                want.values.len(),
                got.values[at],
                want.values[at]
            ));
        }
    }
    None
}

/// Fails with the first of what is wrong with these.
pub fn check(cases: &[Box<dyn Operation>], device: &Device) {
    let wrong: Vec<_> = cases
        .iter()
        .filter_map(|case| wrong(&**case, device))
        .collect();
    let shown = wrong.iter().take(12).cloned().collect::<Vec<_>>();
    assert!(
        wrong.is_empty(),
        "{} of {} cases are wrong, the first are:\n{}",
        wrong.len(),
        cases.len(),
        shown.join("\n")
    );
}

/// Fails where the gradient of a tied head is not the sum of its parts.
pub fn check_tied_head(dtype: DType, device: &Device) -> Result<()> {
    let [ours, candles] = embedding::of_tied_head(dtype, device)?;
    let error = norm((&ours - &candles)?.flatten_all()?.to_vec1::<f64>()?);
    let size = norm(candles.flatten_all()?.to_vec1::<f64>()?);
    let allowed = gradient_tolerance(dtype) * size;
    assert!(error <= allowed, "{dtype:?}: {error:e} of {size:e}");
    Ok(())
}

/// Fails where a second run gives other bits.
pub fn check_repeats(cases: &[Box<dyn Operation>], device: &Device) -> Result<()> {
    for case in cases {
        let (first, second) = (case.computed(device)?, case.computed(device)?);
        for (a, b) in first.iter().zip(&second) {
            let differ = a.values.iter().zip(&b.values);
            let differ = differ.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            let (what, name) = (case.describe(), a.name);
            assert_eq!(differ, 0, "{what}: numbers of {name} that differ");
        }
    }
    Ok(())
}

/// Random numbers that the dtype holds.
pub fn random(random: &mut Random, dtype: DType, count: usize, scale: f64) -> Vec<f64> {
    let rounded = random.normals(count, scale).into_iter();
    rounded.map(|x| round_to(dtype, x)).collect()
}

pub fn var(values: &[f64], shape: &[usize], dtype: DType, device: &Device) -> Result<Var> {
    Var::from_tensor(&tensor(values, shape, dtype, device)?)
}

pub fn tensor(values: &[f64], shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)
}

/// The results, and the gradients of the variables where each result has its upstream gradient.
pub fn differentiated(
    results: &[(&'static str, Tensor)],
    upstream: &[&[f64]],
    vars: &[(&'static str, &Var)],
) -> Result<Vec<Numbers>> {
    let mut all = Vec::new();
    let mut loss: Option<Tensor> = None;
    for ((name, result), upstream) in results.iter().zip(upstream) {
        let values = numbers(result)?;
        all.push(Numbers { name, values });
        let upstream = tensor(upstream, result.dims(), result.dtype(), result.device())?;
        let weighted = (result * upstream)?.sum_all()?;
        loss = Some(match loss {
            Some(loss) => (loss + weighted)?,
            None => weighted,
        });
    }
    let gradients = loss.expect("a result").backward()?;
    for (name, var) in vars {
        let Some(gradient) = gradients.get(var) else {
            candle_core::bail!("no gradient {name}")
        };
        if gradient.shape() != var.shape() || gradient.dtype() != var.dtype() {
            candle_core::bail!(
                "{name} is {:?} {:?}, want {:?} {:?}",
                gradient.dtype(),
                gradient.dims(),
                var.dtype(),
                var.dims()
            )
        }
        let values = numbers(gradient)?;
        all.push(Numbers { name, values });
    }
    Ok(all)
}
