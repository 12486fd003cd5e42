//! What is done with gradients between a backward and an optimizer's step.

use candle_core::backprop::GradStore;
use candle_core::{bail, DType, Device, Result, Tensor, Var, D};
use std::collections::HashSet;

/// Scales the gradients of these variables so that the norm of all together is at most `max_norm`, and
/// returns the norm before. Variables without a gradient are passed over, one that is listed twice
/// counts once.
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
    check_max_norm(max_norm)?;
    let vars = distinct(vars);
    #[cfg(feature = "cuda")]
    if let Some(given) = on_cuda(gradients, &vars)? {
        let (norm, factor) = crate::cuda::ops::optimizer::norm(&given, max_norm)?;
        // The one wait for the device.
        let norm = f64::from(norm.to_scalar::<f32>()?);
        if norm.is_finite() && norm > max_norm {
            scale_by(gradients, &vars, &factor)?;
        }
        return Ok(norm);
    }
    let squares = vars
        .iter()
        .filter_map(|var| gradients.get(var))
        .map(sum_of_squares)
        .collect::<Result<Vec<_>>>()?;
    let mut sum = 0.;
    for squares in squares {
        sum += squares
            .to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .to_scalar::<f64>()?;
    }
    let norm = sum.sqrt();
    if norm.is_finite() && norm > max_norm {
        for var in vars {
            if let Some(gradient) = gradients.get(var) {
                let scaled = (gradient * (max_norm / norm))?;
                gradients.insert(var, scaled);
            }
        }
    }
    Ok(norm)
}

/// [`clip_gradients`] without waiting for the device: the norm before is a tensor of one f32 number (f64 for f64) where the
/// gradients are.
///
/// Where the norm is not finite the gradients stay as they are, and only who reads the norm can tell.
///
/// ```
/// # use candle_core::{Device, Var};
/// use candle_cut_cross_entropy::models::clip_gradients_on_device;
/// # fn main() -> candle_core::Result<()> {
/// let var = Var::new(&[3f32, 4.], &Device::Cpu)?;
/// let mut gradients = var.sqr()?.sum_all()?.backward()?;
/// let norm = clip_gradients_on_device(&mut gradients, &[var.clone()], 1.)?;
/// assert_eq!(norm.to_scalar::<f32>()?, 10.);
/// let clipped = gradients.get(&var).unwrap().to_vec1::<f32>()?;
/// assert!((clipped[0] - 0.6).abs() < 1e-6 && (clipped[1] - 0.8).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A `max_norm` that is not positive, gradients on several devices or none at all.
pub fn clip_gradients_on_device(
    gradients: &mut GradStore,
    vars: &[Var],
    max_norm: f64,
) -> Result<Tensor> {
    check_max_norm(max_norm)?;
    let vars = distinct(vars);
    #[cfg(feature = "cuda")]
    if let Some(given) = on_cuda(gradients, &vars)? {
        let (norm, factor) = crate::cuda::ops::optimizer::norm(&given, max_norm)?;
        scale_by(gradients, &vars, &factor)?;
        return Ok(norm);
    }
    let mut sum: Option<Tensor> = None;
    for gradient in vars.iter().filter_map(|var| gradients.get(var)) {
        let squares = sum_of_squares(gradient)?;
        sum = Some(match sum {
            Some(sum) => (sum.to_dtype(squares.dtype())? + squares)?,
            None => squares,
        });
    }
    let Some(sum) = sum else {
        bail!("none of the {} variables has a gradient", vars.len())
    };
    let norm = sum.sqrt()?;
    let finite = norm.le(f64::from(f32::MAX))?;
    let factor = (norm.recip()? * max_norm)?.minimum(1.)?;
    let factor = finite.where_cond(&factor, &factor.ones_like()?)?;
    for var in vars {
        if let Some(gradient) = gradients.get(var) {
            let wide = gradient.to_dtype(factor.dtype())?.broadcast_mul(&factor)?;
            let scaled = wide.to_dtype(gradient.dtype())?;
            gradients.insert(var, scaled);
        }
    }
    Ok(norm)
}

fn check_max_norm(max_norm: f64) -> Result<()> {
    if max_norm.is_nan() || max_norm <= 0. {
        bail!("max_norm must be positive, got {max_norm}")
    }
    Ok(())
}

/// The gradients there are, contiguous, if kernels can take all of them.
#[cfg(feature = "cuda")]
fn on_cuda(gradients: &GradStore, vars: &[&Var]) -> Result<Option<Vec<Tensor>>> {
    let given = vars.iter().filter_map(|var| gradients.get(var));
    let given = given.map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    for gradient in &given {
        let first = given[0].device();
        if !gradient.device().same_device(first) || !crate::cuda::ops::can_run(gradient)? {
            return Ok(None);
        }
    }
    Ok((!given.is_empty()).then_some(given))
}

/// Multiplies the gradients there are with a number on the device.
#[cfg(feature = "cuda")]
fn scale_by(gradients: &mut GradStore, vars: &[&Var], factor: &Tensor) -> Result<()> {
    for var in vars {
        if let Some(gradient) = gradients.get(var) {
            let gradient = gradient.contiguous()?;
            let scaled = crate::cuda::ops::optimizer::scaled(&gradient, factor)?;
            gradients.insert(var, scaled);
        }
    }
    Ok(())
}

/// The sum of the gradients of several backward passes: a batch larger than memory holds.
///
/// Sums are in f32 (f64 for f64), and come back in the gradients' dtype: a sum of bf16 numbers in bf16 would
/// stop to grow at 256 times a number. Let the losses be sums ([`Reduction::Sum`](crate::Reduction::Sum))
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
    /// By variable; one gradient alone is kept in its dtype.
    sums: Vec<Option<Tensor>>,
    anything: bool,
}

impl Accumulator {
    /// An empty sum for these variables. One that is listed twice counts once.
    pub fn new(vars: Vec<Var>) -> Self {
        let vars: Vec<Var> = distinct(&vars).into_iter().cloned().collect();
        Self {
            sums: vec![None; vars.len()],
            vars,
            anything: false,
        }
    }

    /// Adds the gradients of a backward; those of other variables are dropped.
    ///
    /// # Errors
    /// A gradient whose shape or dtype is not its variable's, and nothing is added.
    pub fn add(&mut self, mut gradients: GradStore) -> Result<()> {
        for var in &self.vars {
            if let Some(gradient) = gradients.get(var) {
                if gradient.shape() != var.shape() || gradient.dtype() != var.dtype() {
                    bail!(
                        "the gradient of a variable {:?} {:?} is {:?} {:?}",
                        var.dtype(),
                        var.dims(),
                        gradient.dtype(),
                        gradient.dims()
                    )
                }
            }
        }
        for (var, sum) in self.vars.iter().zip(&mut self.sums) {
            let Some(new) = gradients.remove(var) else {
                continue;
            };
            let wide = summed_in(var.dtype());
            *sum = Some(match sum.take() {
                Some(sum) => (sum.to_dtype(wide)? + new.to_dtype(wide)?)?,
                None => new,
            });
        }
        self.anything = true;
        Ok(())
    }

    /// The sum times `factor`, `None` where nothing was added since the last time; the next sum is
    /// empty.
    ///
    /// # Errors
    /// Those of Candle's multiplication.
    pub fn take(&mut self, factor: f64) -> Result<Option<GradStore>> {
        if !std::mem::take(&mut self.anything) {
            return Ok(None);
        }
        let mut all = GradStore::default();
        for (var, sum) in self.vars.iter().zip(&mut self.sums) {
            let Some(mut sum) = sum.take() else { continue };
            if factor != 1. {
                sum = (sum.to_dtype(summed_in(var.dtype()))? * factor)?;
            }
            all.insert(var, sum.to_dtype(var.dtype())?);
        }
        Ok(Some(all))
    }
}

/// The variables without repetitions, in their order.
pub(super) fn distinct(vars: &[Var]) -> Vec<&Var> {
    let mut seen = HashSet::new();
    vars.iter().filter(|var| seen.insert(var.id())).collect()
}

/// What sums of numbers of this dtype are formed in.
pub(super) fn summed_in(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Of each row first: one f32 sum over hundreds of millions of numbers would stop to grow.
fn sum_of_squares(gradient: &Tensor) -> Result<Tensor> {
    let squares = gradient.to_dtype(summed_in(gradient.dtype()))?.sqr()?;
    match squares.rank() {
        0 | 1 => squares.sum_all(),
        _ => squares.sum(D::Minus1)?.sum_all(),
    }
}
