//! A backward pass that spares the large gradients Candle's accumulation.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

thread_local! {
    /// What the [`backward`] that runs on this thread collects.
    static COLLECTED: RefCell<Option<Collected>> = const { RefCell::new(None) };
}

struct Collected {
    /// The nodes of the graph that is differentiated. A node of another graph, one that an op
    /// differentiates in its own backward, hands its gradients to Candle.
    nodes: HashSet<TensorId>,
    /// Variables and the sums of their gradients so far.
    sums: HashMap<TensorId, (Tensor, Tensor)>,
}

/// `loss.backward()` at a third of the memory for the gradients of this crate's losses.
///
/// Candle adds every gradient it is handed to a tensor of zeros, so that three tensors of the size of
/// the classifier exist for a moment. Here the gradient of a `Var` that enters a loss of this crate
/// directly (a head, most of all) goes into the returned store as it is; where it enters several, they
/// are added up as they come. Everything else is as in [`Tensor::backward`], and works for any graph,
/// also one with ops that run a backward of their own.
///
/// Several threads may differentiate one graph at once. On a GPU see
/// [Threads and GPUs](crate#threads-and-gpus).
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// # use candle_cut_cross_entropy::{backward, linear_cross_entropy, Options};
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (16, 64), &Device::Cpu)?;
/// # let head = Var::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// # let targets = Tensor::zeros(16, candle_core::DType::I64, &Device::Cpu)?;
/// let loss = linear_cross_entropy(&hidden, &head, &targets, &Options::default())?.loss;
/// let grads = backward(&loss)?; // then: optimizer.step(&grads)?
/// assert!(grads.get(&head).is_some());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`Tensor::backward`].
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    /// Puts back what was there, whatever way the scope is left.
    struct Restore(Option<Collected>);
    impl Drop for Restore {
        fn drop(&mut self) {
            COLLECTED.with(|c| *c.borrow_mut() = self.0.take());
        }
    }
    let collected = Collected {
        nodes: loss.sorted_nodes().iter().map(|node| node.id()).collect(),
        sums: HashMap::new(),
    };
    let restore = Restore(COLLECTED.with(|c| c.borrow_mut().replace(collected)));
    let mut grads = loss.backward()?;
    let collected = COLLECTED.with(|c| c.borrow_mut().take());
    drop(restore);
    let sums = collected.map(|c| c.sums).unwrap_or_default();
    for (variable, grad) in sums.into_values() {
        let grad = match grads.get(&variable) {
            Some(other) => (other + grad)?,
            None => grad,
        };
        grads.insert(&variable, grad);
    }
    Ok(grads)
}

/// Hands the gradients that `node` has for its arguments to Candle, or those of a `Var` to [`backward`] where that is what
/// differentiates the node.
pub(crate) fn deliver<const COUNT: usize>(
    node: &Tensor,
    arguments: [&Tensor; COUNT],
    gradients: Vec<Option<Tensor>>,
) -> Result<[Option<Tensor>; COUNT]> {
    let mut to_candle = [const { None }; COUNT];
    COLLECTED.with(|c| {
        let mut collected = c.borrow_mut();
        let mut ours = collected
            .as_mut()
            .filter(|collected| collected.nodes.contains(&node.id()));
        for ((to_candle, argument), gradient) in to_candle.iter_mut().zip(arguments).zip(gradients)
        {
            *to_candle = match (&mut ours, gradient) {
                (Some(collected), Some(gradient)) if argument.is_variable() => {
                    collected.add(argument, gradient)?;
                    None
                }
                (_, gradient) => gradient,
            };
        }
        Ok(to_candle)
    })
}

/// Hands over the sum of a variable's gradients so far, if [`backward`] differentiates `node` and has one.
pub(crate) fn take_sum(node: &Tensor, variable: &Tensor) -> Option<Tensor> {
    COLLECTED.with(|c| {
        let mut collected = c.borrow_mut();
        let ours = collected
            .as_mut()
            .filter(|c| c.nodes.contains(&node.id()))?;
        ours.sums.remove(&variable.id()).map(|(_, sum)| sum)
    })
}

impl Collected {
    fn add(&mut self, variable: &Tensor, gradient: Tensor) -> Result<()> {
        let sum = match self.sums.remove(&variable.id()) {
            Some((_, sum)) => (sum + gradient)?,
            None => gradient,
        };
        self.sums.insert(variable.id(), (variable.clone(), sum));
        Ok(())
    }
}
