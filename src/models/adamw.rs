//! AdamW whose weights and moments are f32 whatever the variables are.

use super::gradients::summed_in;
use super::staging::Staging;
use super::update::{self, Step};
use candle_core::backprop::GradStore;
use candle_core::{bail, DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// AdamW with moments, and for bf16 and f16 variables also weights, in f32.
///
/// candle-nn's keeps all of it in the variable's dtype: a bf16 weight near 1 then loses every update
/// below 0.004, and squared gradients below 6e-8 are 0 in f16. Here the update happens on a master
/// copy, f32 (f64 for f64), and the variable is the master rounded. With the gradient `g` and `t` the
/// number of steps of this variable,
///
/// ```text
/// m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
/// w <- (1 - lr weight_decay) w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
/// ```
///
/// Variables of fewer than two dimensions, norms and biases, are not decayed;
/// [`AdamW::with_groups`] gives each variable its own weight decay and learning rate. A variable that is
/// listed twice is stepped once.
///
/// It takes 8 bytes a weight, 12 for bf16 and f16. A variable without a gradient stays as it is. A
/// bf16 or f16 variable that is set to other values between two steps gets them taken back by the next
/// one: make the optimizer after loading the weights.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_cut_cross_entropy::models::AdamW;
/// use candle_nn::{Init, Optimizer, ParamsAdamW, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let w = vars.get(2, "w", Init::Const(1.), DType::BF16, &Device::Cpu)?;
/// let mut optimizer = AdamW::from_varmap(&vars, ParamsAdamW::default())?;
/// optimizer.step(&w.sum_all()?.backward()?)?;
/// # Ok(())
/// # }
/// ```
///
/// Source: Loshchilov and Hutter, *Decoupled Weight Decay Regularization*,
/// [arXiv 1711.05101](https://arxiv.org/abs/1711.05101), algorithm 2.
#[derive(Debug)]
pub struct AdamW {
    slots: Vec<Slot>,
    params: ParamsAdamW,
}

/// What variables that are trained alike have of their own, beside [`ParamsAdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// What the learning rate is multiplied by, whatever it is set to.
    pub lr_factor: f64,
    /// In place of the weight decay in [`ParamsAdamW`].
    pub weight_decay: f64,
}

impl Group {
    /// The group of a variable where nothing else is said: decayed as the parameters say if it has two
    /// dimensions or more, else, as norms and biases, not at all.
    ///
    /// Source: the rule of Hugging Face transformers' `Trainer`.
    pub fn of(var: &Var, params: &ParamsAdamW) -> Self {
        Self {
            lr_factor: 1.,
            weight_decay: match var.rank() {
                0 | 1 => 0.,
                _ => params.weight_decay,
            },
        }
    }

    fn validate(&self, name: &str) -> Result<()> {
        for (what, value) in [
            ("lr_factor", self.lr_factor),
            ("weight_decay", self.weight_decay),
        ] {
            if !(value >= 0. && value.is_finite()) {
                bail!("{what} of {name} must be at least 0 and finite, got {value}")
            }
        }
        Ok(())
    }
}

/// A variable and its state.
#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    group: Group,
    /// The weights, where the variable is narrower.
    master: Option<Tensor>,
    first_moment: Tensor,
    second_moment: Tensor,
    steps: u32,
}

impl Slot {
    fn new(name: String, var: Var, group: Group) -> Result<Self> {
        group.validate(&name)?;
        let dtype = summed_in(var.dtype());
        // Not one tensor twice: kernels change them in place.
        let zeros = || Tensor::zeros(var.shape(), dtype, var.device());
        Ok(Self {
            master: match var.dtype() == dtype {
                true => None,
                false => Some(var.detach().to_dtype(dtype)?),
            },
            first_moment: zeros()?,
            second_moment: zeros()?,
            steps: 0,
            name,
            var,
            group,
        })
    }

    fn step(&mut self, gradient: &Tensor, params: &ParamsAdamW) -> Result<()> {
        let &ParamsAdamW {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay: _,
        } = params;
        let lr = lr * self.group.lr_factor;
        let decay = lr * self.group.weight_decay;
        let steps = self.steps + 1;
        let first_scale = 1. / (1. - beta1.powf(steps.into()));
        let second_scale = 1. / (1. - beta2.powf(steps.into()));
        let step = Step {
            beta1,
            beta2,
            keep: 1. - decay,
            rate: lr * first_scale,
            second_scale,
            eps,
        };
        #[cfg(feature = "cuda")]
        if self.has_kernel(gradient)? {
            use crate::cuda::ops::optimizer::{adamw, State};
            let state = State {
                variable: &self.var,
                master: self.master.as_ref(),
                first_moment: &self.first_moment,
                second_moment: &self.second_moment,
            };
            adamw(&apart(gradient, &self.var)?, &state, step)?;
            self.steps = steps;
            return Ok(());
        }
        let gradient = gradient.detach().to_dtype(self.first_moment.dtype())?;
        match self.var.device().is_cpu() {
            true => self.step_on_cpu(&apart(&gradient, &self.var)?, step)?,
            false => self.step_by_candle(&gradient, step)?,
        }
        self.steps = steps;
        Ok(())
    }

    fn step_on_cpu(&mut self, gradient: &Tensor, step: Step) -> Result<()> {
        if gradient.shape() != self.var.shape() {
            bail!(
                "the gradient of {} has shape {:?}, the variable {:?}",
                self.name,
                gradient.dims(),
                self.var.dims()
            )
        }
        let weights = self.master.as_ref().unwrap_or(&self.var);
        let state = [weights, &self.first_moment, &self.second_moment];
        match weights.dtype() {
            DType::F64 => update::on_cpu::<f64>(gradient, state, step)?,
            _ => update::on_cpu::<f32>(gradient, state, step)?,
        }
        match &self.master {
            Some(master) => self.var.set(&master.to_dtype(self.var.dtype())?),
            None => Ok(()),
        }
    }

    fn step_by_candle(&mut self, gradient: &Tensor, step: Step) -> Result<()> {
        let Step {
            beta1,
            beta2,
            keep,
            rate,
            second_scale,
            eps,
        } = step;
        let first = ((&self.first_moment * beta1)? + (gradient * (1. - beta1))?)?;
        let second = ((&self.second_moment * beta2)? + (gradient.sqr()? * (1. - beta2))?)?;
        let size = ((&second * second_scale)?.sqrt()? + eps)?;
        let update = ((&first * rate)? / size)?;
        let weights = match &self.master {
            Some(master) => master.clone(),
            None => self.var.detach(),
        };
        let weights = ((weights * keep)? - update)?;
        self.var.set(&weights.to_dtype(self.var.dtype())?)?;
        if let Some(master) = &mut self.master {
            *master = weights;
        }
        (self.first_moment, self.second_moment) = (first, second);
        Ok(())
    }

    /// Whether one kernel does the step, in place.
    #[cfg(feature = "cuda")]
    fn has_kernel(&self, gradient: &Tensor) -> Result<bool> {
        let var = self.var.as_tensor();
        let alike = gradient.dtype() == var.dtype()
            && gradient.shape() == var.shape()
            && gradient.device().same_device(var.device());
        Ok(alike && var.is_contiguous() && crate::cuda::ops::can_run(var)?)
    }
}

/// The gradient, contiguous and in memory of its own: the variable is written to while it is read.
fn apart(gradient: &Tensor, var: &Var) -> Result<Tensor> {
    let same = {
        let (of_gradient, of_var) = (gradient.storage_and_layout().0, var.storage_and_layout().0);
        std::ptr::eq(&*of_gradient, &*of_var)
    };
    match same {
        true => gradient.copy()?.contiguous(),
        false => gradient.contiguous(),
    }
}

impl AdamW {
    /// For the variables of a map, under their names there, which a saved state needs.
    ///
    /// # Errors
    /// A lock that another thread has poisoned; memory that runs out.
    pub fn from_varmap(vars: &VarMap, params: ParamsAdamW) -> Result<Self> {
        Self::with_groups(vars, params.clone(), |_, var| Group::of(var, &params))
    }

    /// Like [`AdamW::from_varmap`], with a group for each variable by its name and itself. Of a variable
    /// with several names the first counts.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Var};
    /// use candle_cut_cross_entropy::models::{AdamW, Group};
    /// use candle_nn::{ParamsAdamW, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// # let vars = VarMap::new();
    /// let params = ParamsAdamW { lr: 1e-4, weight_decay: 0.1, ..ParamsAdamW::default() };
    /// let optimizer = AdamW::with_groups(&vars, params.clone(), |name, var| match name {
    ///     "lm_head.weight" => Group { lr_factor: 0.1, weight_decay: 0. },
    ///     _ => Group::of(var, &params),
    /// })?;
    /// # let _ = optimizer;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A factor or weight decay that is negative or not finite, and those of [`AdamW::from_varmap`].
    pub fn with_groups(
        vars: &VarMap,
        params: ParamsAdamW,
        group: impl Fn(&str, &Var) -> Group,
    ) -> Result<Self> {
        let named = match vars.data().lock() {
            Ok(vars) => vars.clone(),
            Err(_) => bail!("the VarMap's lock is poisoned"),
        };
        let named: BTreeMap<String, Var> = named.into_iter().collect();
        Self::named(named, params, group)
    }

    fn named(
        vars: impl IntoIterator<Item = (String, Var)>,
        params: ParamsAdamW,
        group: impl Fn(&str, &Var) -> Group,
    ) -> Result<Self> {
        let mut seen = HashSet::new();
        let slots = vars
            .into_iter()
            .filter(|(_, var)| var.dtype().is_float() && seen.insert(var.id()))
            .map(|(name, var)| {
                let group = group(&name, &var);
                Slot::new(name, var, group)
            })
            .collect::<Result<_>>()?;
        Ok(Self { slots, params })
    }

    /// The hyper-parameters.
    pub fn params(&self) -> &ParamsAdamW {
        &self.params
    }

    /// Saves moments, master weights and numbers of steps as safetensors, to go on as if nothing had
    /// happened: with [`AdamW::load`], after loading the variables' own values. The file takes the
    /// place of one before it once it is complete. The hyper-parameters are not in it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = HashMap::new();
        for slot in &self.slots {
            let mut put = |part: &str, tensor: &Tensor| -> Result<()> {
                let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
                tensors.insert(format!("{}.{part}", slot.name), tensor);
                Ok(())
            };
            put("first_moment", &slot.first_moment)?;
            put("second_moment", &slot.second_moment)?;
            put("steps", &Tensor::new(slot.steps, &Device::Cpu)?)?;
            if let Some(master) = &slot.master {
                put("master", master)?;
            }
        }
        let path = path.as_ref();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let folder = path.parent().unwrap_or(Path::new(""));
        let staging = Staging::new(folder)?;
        let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor));
        staging.write_tensors(&name, tensors, None)?;
        staging.commit(&[&name])
    }

    /// Takes up a state that [`AdamW::save`] wrote. bf16 and f16 variables are set to their master
    /// weights. An error leaves the optimizer and the variables as they were.
    ///
    /// # Errors
    /// A file that cannot be read, a variable that it lacks or has in another shape or dtype.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let tensors =
            candle_core::safetensors::load(path, &Device::Cpu).map_err(|e| e.with_path(path))?;
        let mut slots = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let get = |part: &str| match tensors.get(&format!("{}.{part}", slot.name)) {
                Some(tensor) => Ok(tensor),
                None => bail!("{}: no tensor {}.{part}", path.display(), slot.name),
            };
            let read = |part: &str, like: &Tensor| -> Result<Tensor> {
                let tensor = get(part)?;
                if tensor.shape() != like.shape() || tensor.dtype() != like.dtype() {
                    bail!(
                        "{}: {}.{part} is {:?} {:?}, expected {:?} {:?}",
                        path.display(),
                        slot.name,
                        tensor.dtype(),
                        tensor.dims(),
                        like.dtype(),
                        like.dims()
                    )
                }
                tensor.to_device(like.device())
            };
            slots.push(Slot {
                name: slot.name.clone(),
                var: slot.var.clone(),
                group: slot.group,
                master: match &slot.master {
                    Some(master) => Some(read("master", master)?),
                    None => None,
                },
                first_moment: read("first_moment", &slot.first_moment)?,
                second_moment: read("second_moment", &slot.second_moment)?,
                steps: get("steps")?.to_scalar()?,
            });
        }
        for slot in &slots {
            if let Some(master) = &slot.master {
                slot.var.set(&master.to_dtype(slot.var.dtype())?)?;
            }
        }
        self.slots = slots;
        Ok(())
    }
}

impl Optimizer for AdamW {
    type Config = ParamsAdamW;

    /// The variables are named by their places, 0, 1, .., in a saved state; `VarMap::all_vars` has
    /// another order in every run, so that [`AdamW::from_varmap`] is what a map needs.
    fn new(vars: Vec<Var>, params: ParamsAdamW) -> Result<Self> {
        let named = vars.into_iter().enumerate();
        let named = named.map(|(i, var)| (i.to_string(), var));
        Self::named(named, params.clone(), |_, var| Group::of(var, &params))
    }

    fn step(&mut self, gradients: &GradStore) -> Result<()> {
        for slot in &mut self.slots {
            if let Some(gradient) = gradients.get(&slot.var) {
                slot.step(gradient, &self.params)?;
            }
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr;
    }
}
