//! What is done with gradients between a backward and an optimizer's step.

use candle_core::backprop::GradStore;
use candle_core::{bail, DType, Result, Tensor, Var};

/// Scales the gradients of these variables so that the norm of all together is at most `max_norm`, and
/// returns the norm before. Variables without a gradient are passed over.
///
/// A norm that is not finite is returned and nothing is scaled: skip that step.
///
/// ```
/// # use candle_core::{Device, Var};
/// use candle_cut_cross_entropy::models::clip_gradients;
/// # fn main() -> candle_core::Result<()> {
/// let var = Var::new(&[1f32, 2.], &Device::Cpu)?;
/// let mut gradients = (var.as_tensor() * 3.)?.sum_all()?.backward()?;
/// let norm = clip_gradients(&mut gradients, &[var], 1.)?;
/// assert!((norm - 18f64.sqrt()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A `max_norm` that is not positive.
pub fn clip_gradients(gradients: &mut GradStore, vars: &[Var], max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0. {
        bail!("max_norm must be positive, got {max_norm}")
    }
    let mut sum: Option<Tensor> = None;
    for gradient in vars.iter().filter_map(|var| gradients.get(var)) {
        let wide = match gradient.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let squares = gradient.to_dtype(wide)?.sqr()?.sum_all()?;
        // Metal has no f64, so only the numbers that are f64 already stay it.
        let squares = squares.to_dtype(DType::F32)?;
        sum = Some(match sum {
            Some(sum) => (sum + squares)?,
            None => squares,
        });
    }
    let norm = match sum {
        Some(sum) => f64::from(sum.to_scalar::<f32>()?).sqrt(),
        None => 0.,
    };
    if norm.is_finite() && norm > max_norm {
        scale(gradients, vars, max_norm / norm)?;
    }
    Ok(norm)
}

/// The sum of the gradients of several backward passes: a batch larger than memory holds.
///
/// Sums are in the gradients' dtype. Let the losses be sums ([`Reduction::Sum`](crate::Reduction::Sum))
/// and divide by the number of positions that count at the end: means of batches that differ in it do
/// not add up to the mean of all.
///
/// ```
/// # use candle_core::{Device, Var};
/// use candle_cut_cross_entropy::models::Accumulator;
/// # fn main() -> candle_core::Result<()> {
/// let var = Var::new(&[1f32, 2.], &Device::Cpu)?;
/// let mut sum = Accumulator::new(vec![var.clone()]);
/// for _ in 0..4 {
///     sum.add((var.as_tensor() * 3.)?.sum_all()?.backward()?)?;
/// }
/// let gradients = sum.take(1. / 4.)?.expect("something was added");
/// assert_eq!(gradients.get(&var).unwrap().to_vec1::<f32>()?, [3., 3.]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Accumulator {
    vars: Vec<Var>,
    sum: Option<GradStore>,
}

impl Accumulator {
    /// An empty sum for these variables.
    pub fn new(vars: Vec<Var>) -> Self {
        Self { vars, sum: None }
    }

    /// Adds the gradients of a backward.
    ///
    /// # Errors
    /// Gradients whose shapes or dtypes changed.
    pub fn add(&mut self, mut gradients: GradStore) -> Result<()> {
        if let Some(sum) = self.sum.take() {
            for var in &self.vars {
                let total = match (sum.get(var), gradients.get(var)) {
                    (Some(sum), Some(new)) => (sum + new)?,
                    (Some(sum), None) => sum.clone(),
                    (None, _) => continue,
                };
                gradients.insert(var, total);
            }
        }
        self.sum = Some(gradients);
        Ok(())
    }

    /// The sum times `factor`, `None` where nothing was added since the last time; the next sum is
    /// empty.
    ///
    /// # Errors
    /// Those of Candle's multiplication.
    pub fn take(&mut self, factor: f64) -> Result<Option<GradStore>> {
        let Some(mut sum) = self.sum.take() else {
            return Ok(None);
        };
        if factor != 1. {
            scale(&mut sum, &self.vars, factor)?;
        }
        Ok(Some(sum))
    }
}

fn scale(gradients: &mut GradStore, vars: &[Var], factor: f64) -> Result<()> {
    for var in vars {
        if let Some(gradient) = gradients.get(var) {
            let scaled = (gradient * factor)?;
            gradients.insert(var, scaled);
        }
    }
    Ok(())
}
