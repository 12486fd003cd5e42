//! Gradient checkpointing: what a layer computes on the way is not kept but computed again.

use crate::backward;
use crate::node::{attach, Node};
use candle_core::{bail, DType, Result, Tensor, Var};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ThreadId};

/// A function of a tensor and of variables that it owns.
pub(super) trait Recompute: Send + Sync + 'static {
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
}

/// `layer.forward(x)`, of which only `x` and the result are kept: the backward computes the rest again.
///
/// `variables` are those whose gradients are wanted. They must be `Var`s, and nothing else that is tracked may enter
/// the layer.
///
/// A node of Candle's graph has at most three arguments. So the variables hang on a chain of nodes of one number
/// each, two to a node, whose end is an argument beside `x`:
///
/// ```text
/// v0 v1 -> chain 0 -> chain 1 -> checkpoint -> result
///             v2 v3 ---^    x ---^
/// ```
///
/// The backward reaches the checkpoint first, which forms all gradients; the chain then hands them out.
pub(super) fn checkpoint(
    layer: impl Recompute,
    x: &Tensor,
    variables: Vec<Tensor>,
) -> Result<Tensor> {
    if let Some(other) = variables.iter().find(|v| !v.is_variable()) {
        bail!(
            "gradient checkpointing: a weight of shape {:?} is the result of an operation, not a variable",
            other.dims()
        )
    }
    let value = layer.forward(&x.detach())?.detach();
    let formed = Formed::default();
    let mut chain: Option<Tensor> = None;
    for (i, pair) in variables.chunks(2).enumerate() {
        let link = Link {
            first: 2 * i,
            continues: chain.is_some(),
            formed: formed.clone(),
        };
        let arguments: Vec<&Tensor> = chain.iter().chain(pair).collect();
        let one_number = Tensor::zeros(1, DType::F32, x.device())?;
        chain = Some(attach(one_number, &arguments, link)?);
    }
    let node = Checkpoint {
        layer,
        variables,
        formed,
    };
    match (&chain, x.track_op()) {
        (None, false) => Ok(value),
        (None, true) => attach(value, &[x], node),
        (Some(chain), _) => attach(value, &[x, chain], node),
    }
}

/// The gradients of the variables, from when they are formed to when they are handed out. Each thread has its own:
/// several may differentiate one graph at once.
type Formed = Arc<Mutex<HashMap<ThreadId, Vec<Option<Tensor>>>>>;

struct Checkpoint<L> {
    layer: L,
    variables: Vec<Tensor>,
    formed: Formed,
}

impl<L: Recompute> Node for Checkpoint<L> {
    const NAME: &'static str = "checkpoint";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let x = Var::from_tensor(&arguments[0].detach())?;
        let y = self.layer.forward(&x)?;
        let mut gradients = backward(&(y * upstream)?.sum_all()?)?;
        let of_variables = self.variables.iter().map(|v| gradients.remove(v));
        let of_variables = of_variables.collect();
        let mut formed = self.formed.lock().unwrap_or_else(PoisonError::into_inner);
        formed.insert(thread::current().id(), of_variables);
        drop(formed);
        let of_x = match arguments[0].track_op() {
            true => gradients.remove(&x),
            false => None,
        };
        let mut all = vec![of_x];
        for chain in &arguments[1..] {
            all.push(Some(chain.zeros_like()?));
        }
        Ok(all)
    }
}

/// Two variables, or one, and the chain before them.
struct Link {
    first: usize,
    continues: bool,
    formed: Formed,
}

impl Node for Link {
    const NAME: &'static str = "checkpoint-variables";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let thread = thread::current().id();
        let mut formed = self.formed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(of_variables) = formed.get_mut(&thread) else {
            bail!("the gradients of a checkpointed layer were handed out before: does an op in the graph run a backward over the same graph?")
        };
        let mut gradients = Vec::with_capacity(arguments.len());
        let mut variables = arguments.len();
        if self.continues {
            gradients.push(Some(upstream.zeros_like()?));
            variables -= 1;
        }
        let end = self.first + variables;
        gradients.extend(of_variables[self.first..end].iter_mut().map(Option::take));
        if !self.continues {
            // The chain has come to its beginning.
            formed.remove(&thread);
        }
        Ok(gradients)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// The sum of the variables, each times its number from 1 on, times `x`.
    struct Weighted(Vec<Tensor>);

    impl Recompute for Weighted {
        fn forward(&self, x: &Tensor) -> Result<Tensor> {
            let mut y = x.zeros_like()?;
            for (i, variable) in self.0.iter().enumerate() {
                y = (y + (variable * x)?.affine(i as f64 + 1., 0.)?)?;
            }
            Ok(y)
        }
    }

    #[test]
    fn threads_that_differentiate_one_graph_get_every_gradient() -> Result<()> {
        let vars = (0..40)
            .map(|_| Var::ones(2, DType::F32, &Device::Cpu))
            .collect::<Result<Vec<_>>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let x = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
        let loss = checkpoint(Weighted(tensors.clone()), &x, tensors)?.sum_all()?;
        let differentiate = |ours: bool| -> Result<()> {
            for _ in 0..200 {
                let gradients = match ours {
                    true => backward(&loss)?,
                    false => loss.backward()?,
                };
                for (i, var) in vars.iter().enumerate() {
                    let Some(gradient) = gradients.get(var) else {
                        bail!("variable {i} has no gradient")
                    };
                    let want = [1., 2.].map(|x| (i as f32 + 1.) * x);
                    assert_eq!(gradient.to_vec1::<f32>()?, want, "variable {i}");
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads =
                [true, false, true, false].map(|ours| scope.spawn(move || differentiate(ours)));
            threads.into_iter().try_for_each(|t| t.join().unwrap())
        })
    }
}
