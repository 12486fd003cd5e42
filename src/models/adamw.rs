//! AdamW whose state is f32 whatever the dtype of the variables.

use super::checkpoint::Pending;
use candle_core::backprop::GradStore;
use candle_core::{bail, DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use std::collections::HashMap;
use std::path::Path;

/// AdamW with moments in f32 and, for variables in bf16 or f16, weights in f32 beside them (f64 for f64).
///
/// candle-nn's computes in the variable's dtype: in bf16 a weight of 1 does not change by less than 0.004, so a step of
/// a usual learning rate is lost, and the second moment with it. Here every step starts from the weight in f32, and the
/// variable is that weight, rounded. It takes 12 bytes a number beside the variable, 8 where that is f32 itself.
///
/// With the gradient `g`, step `t`, learning rate `l` and weight decay `w`:
///
/// ```text
/// m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
/// x <- (1 - l w) x - l (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
/// ```
///
/// A variable without a gradient is passed over.
///
/// ```
/// # use candle_core::{DType, Device, Var};
/// use candle_cut_cross_entropy::models::AdamW;
/// use candle_nn::{Optimizer, ParamsAdamW};
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::ones(1, DType::BF16, &Device::Cpu)?;
/// let config = ParamsAdamW { lr: 1e-3, weight_decay: 0., ..ParamsAdamW::default() };
/// let mut optimizer = AdamW::new(vec![x.clone()], config)?;
/// for _ in 0..8 {
///     optimizer.step(&x.sum_all()?.backward()?)?;
/// }
/// // Eight steps of a thousandth; each by itself would be lost in bf16.
/// assert_eq!(x.to_dtype(DType::F32)?.to_vec1::<f32>()?, [0.9921875]);
/// # Ok(())
/// # }
/// ```
///
/// Source: Loshchilov and Hutter, *Decoupled Weight Decay Regularization*,
/// [arXiv 1711.05101](https://arxiv.org/abs/1711.05101).
#[derive(Debug)]
pub struct AdamW {
    slots: Vec<Slot>,
    steps: usize,
    config: ParamsAdamW,
}

/// A variable and what is kept of it, all on its device.
#[derive(Debug)]
struct Slot {
    name: String,
    variable: Var,
    /// `None` where the variable has its dtype.
    weight: Option<Tensor>,
    first: Tensor,
    second: Tensor,
}

impl Slot {
    fn new(name: String, variable: Var) -> Result<Self> {
        let wide = match variable.dtype() {
            DType::F64 => DType::F64,
            DType::F32 | DType::BF16 | DType::F16 => DType::F32,
            dtype => bail!("variable {name} is {dtype:?}, no float"),
        };
        let zeros = Tensor::zeros(variable.shape(), wide, variable.device())?;
        Ok(Self {
            weight: match variable.dtype() == wide {
                true => None,
                false => Some(variable.as_detached_tensor().to_dtype(wide)?),
            },
            first: zeros.clone(),
            second: zeros,
            name,
            variable,
        })
    }

    fn step(&mut self, gradient: &Tensor, steps: usize, config: &ParamsAdamW) -> Result<()> {
        let gradient = gradient.to_dtype(self.first.dtype())?;
        let (beta1, beta2) = (config.beta1, config.beta2);
        self.first = ((&self.first * beta1)? + (&gradient * (1. - beta1))?)?;
        self.second = ((&self.second * beta2)? + (gradient.sqr()? * (1. - beta2))?)?;
        let steps = steps as i32;
        let first = (&self.first / (1. - beta1.powi(steps)))?;
        let second = (&self.second / (1. - beta2.powi(steps)))?;
        let change = ((first / (second.sqrt()? + config.eps)?)? * config.lr)?;
        let before = match &self.weight {
            Some(weight) => weight.clone(),
            None => self.variable.as_detached_tensor(),
        };
        let after = ((before * (1. - config.lr * config.weight_decay))? - change)?;
        self.variable.set(&after.to_dtype(self.variable.dtype())?)?;
        if self.weight.is_some() {
            self.weight = Some(after);
        }
        Ok(())
    }

    /// What is saved, by name.
    fn state(&mut self) -> Vec<(String, &mut Tensor)> {
        let named = |what: &str| format!("{what}.{}", self.name);
        let mut state = vec![
            (named("first"), &mut self.first),
            (named("second"), &mut self.second),
        ];
        state.extend(
            self.weight
                .as_mut()
                .map(|weight| (format!("weight.{}", self.name), weight)),
        );
        state
    }
}

/// The name of the number of steps in a saved state.
const STEPS: &str = "steps";

impl AdamW {
    /// For all variables of a map, by whose names the state is saved.
    ///
    /// # Errors
    /// A variable that is no float.
    pub fn of(vars: &VarMap, config: ParamsAdamW) -> Result<Self> {
        let Ok(data) = vars.data().lock() else {
            bail!("the VarMap's lock is poisoned")
        };
        let mut vars: Vec<(String, Var)> = data
            .iter()
            .map(|(name, var)| (name.clone(), var.clone()))
            .collect();
        drop(data);
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        Self::named(vars, config)
    }

    fn named(vars: Vec<(String, Var)>, config: ParamsAdamW) -> Result<Self> {
        let slots = vars.into_iter().map(|(name, var)| Slot::new(name, var));
        Ok(Self {
            slots: slots.collect::<Result<_>>()?,
            steps: 0,
            config,
        })
    }

    /// Writes the state (not the variables in f32 and f64, which a checkpoint holds) to a safetensors file, which is
    /// there as a whole or not at all.
    ///
    /// # Errors
    /// Those of writing a file.
    pub fn save(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let steps = Tensor::new(&[self.steps as i64], &Device::Cpu)?;
        let mut tensors = HashMap::from([(STEPS.to_string(), steps)]);
        for slot in &mut self.slots {
            tensors.extend(
                slot.state()
                    .into_iter()
                    .map(|(name, tensor)| (name, tensor.clone())),
            );
        }
        let path = path.as_ref();
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("{} is no path of a file", path.display())
        };
        let file = Pending::new(folder, &name.to_string_lossy());
        candle_core::safetensors::save(&tensors, &file.temporary)?;
        file.commit()
    }

    /// Reads what [`AdamW::save`] wrote, of the same variables: then training goes on as if it had not stopped.
    ///
    /// # Errors
    /// Those of reading a file; a tensor that is missing or has another shape.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
        let mut take = |name: &str| match tensors.remove(name) {
            Some(tensor) => Ok(tensor),
            None => bail!("{} has no tensor {name}", path.display()),
        };
        self.steps = take(STEPS)?.to_vec1::<i64>()?[0] as usize;
        for slot in &mut self.slots {
            for (name, tensor) in slot.state() {
                let saved = take(&name)?;
                if saved.shape() != tensor.shape() || saved.dtype() != tensor.dtype() {
                    bail!(
                        "{}: {name} is {:?} {:?}, expected {:?} {:?}",
                        path.display(),
                        saved.dtype(),
                        saved.shape(),
                        tensor.dtype(),
                        tensor.shape()
                    )
                }
                *tensor = saved.to_device(tensor.device())?;
            }
        }
        Ok(())
    }
}

impl Optimizer for AdamW {
    type Config = ParamsAdamW;

    /// The state of these variables is saved by their place in the list.
    fn new(vars: Vec<Var>, config: ParamsAdamW) -> Result<Self> {
        let named = vars.into_iter().enumerate();
        Self::named(named.map(|(i, var)| (i.to_string(), var)).collect(), config)
    }

    fn step(&mut self, gradients: &GradStore) -> Result<()> {
        self.steps += 1;
        for slot in &mut self.slots {
            if let Some(gradient) = gradients.get(&slot.variable) {
                slot.step(gradient, self.steps, &self.config)?;
            }
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.config.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.config.lr = lr;
    }
}
