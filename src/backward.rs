//! A backward pass that spares the large gradients Candle's accumulation.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};
use std::cell::RefCell;

thread_local! {
    /// Variables and their gradients, while [`backward`] runs on this thread.
    static COLLECTED: RefCell<Option<Vec<(Tensor, Tensor)>>> = const { RefCell::new(None) };
}

/// `loss.backward()` at a third of the memory for the gradients of this crate's losses.
///
/// Candle adds every gradient it is handed to a tensor of zeros, so that three tensors of the size of
/// the classifier exist for a moment. Here the gradient of a `Var` that enters a loss of this crate
/// directly (a head, most of all) goes into the returned store as it is. Everything else is as in
/// [`Tensor::backward`], and works for any graph.
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
    struct Restore(Option<Vec<(Tensor, Tensor)>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            COLLECTED.with(|c| *c.borrow_mut() = self.0.take());
        }
    }
    let restore = Restore(COLLECTED.with(|c| c.borrow_mut().replace(Vec::new())));
    let mut grads = loss.backward()?;
    let collected = COLLECTED
        .with(|c| c.borrow_mut().take())
        .unwrap_or_default();
    drop(restore);
    for (variable, grad) in collected {
        let grad = match grads.get(&variable) {
            Some(other) => (other + grad)?,
            None => grad,
        };
        grads.insert(&variable, grad);
    }
    Ok(grads)
}

/// Hands a gradient to Candle, or to [`backward`] where that runs and the argument is a `Var`.
pub(crate) fn deliver(argument: &Tensor, grad: Option<Tensor>) -> Option<Tensor> {
    let grad = grad?;
    COLLECTED.with(|c| match c.borrow_mut().as_mut() {
        Some(collected) if argument.is_variable() => {
            collected.push((argument.clone(), grad));
            None
        }
        _ => Some(grad),
    })
}
