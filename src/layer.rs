//! The loss as a layer that owns, or shares, the head's weight.

use crate::{linear_cross_entropy, Options, Output};
use candle_core::{Result, Tensor, D};
use candle_nn::{Linear, VarBuilder};

/// A language-model head and its loss: weight `(V, D)`, optional bias `(V)`, [`Options`].
///
/// A `Tensor` is a handle, so a head tied to the token embedding shares its storage:
/// `LinearCrossEntropy::new(embedding.embeddings().clone(), None, options)`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cut_cross_entropy::{cut_cross_entropy_no_bias, Options};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let head = cut_cross_entropy_no_bias(64, 1000, Options::default(), vb.pp("lm_head"))?;
/// let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?;
/// let targets = Tensor::zeros((2, 16), DType::I64, &Device::Cpu)?;
/// let loss = head.forward(&hidden, &targets)?.loss;
/// # let _ = loss;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LinearCrossEntropy {
    weight: Tensor,
    options: Options,
}

impl LinearCrossEntropy {
    /// A layer over an existing weight `(V, D)` and bias `(V)`. The bias takes the place of one in
    /// `options`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, mut options: Options) -> Self {
        if let Some(bias) = bias {
            options = options.bias(&bias);
        }
        Self { weight, options }
    }

    /// The layer of an existing head, sharing its weights.
    pub fn from_linear(head: &Linear, options: Options) -> Self {
        Self::new(head.weight().clone(), head.bias().cloned(), options)
    }

    /// The weight, `(V, D)`, without the [adapter](Options::adapter) of the options.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `(V)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.options.bias.as_ref()
    }

    /// The options the loss is computed with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The loss of embeddings `(.., D)` for targets `(..)`.
    ///
    /// # Errors
    /// Those of [`linear_cross_entropy`].
    pub fn forward(&self, embeddings: &Tensor, targets: &Tensor) -> Result<Output> {
        linear_cross_entropy(embeddings, &self.weight, targets, &self.options)
    }

    /// The logits `(.., V)` themselves, bias, softcap and scale included, for sampling: this stores them, so
    /// hand it the last position only.
    ///
    /// # Errors
    /// Shapes, dtypes or devices that do not match.
    pub fn logits(&self, embeddings: &Tensor) -> Result<Tensor> {
        let mut dims = embeddings.dims().to_vec();
        let hidden = embeddings.dim(D::Minus1)?;
        let rows = embeddings.reshape(((), hidden))?;
        let logits = rows.matmul(&self.weight.t()?)?;
        let logits = match &self.options.adapter {
            Some(adapter) => (logits + adapter.logits(&rows)?)?,
            None => logits,
        };
        let logits = match self.bias() {
            Some(bias) => logits.broadcast_add(bias)?,
            None => logits,
        };
        let scale = self.options.logit_scale;
        let logits = match self.options.softcap {
            Some(softcap) => ((logits / softcap)?.tanh()? * (softcap * scale))?,
            None if scale != 1. => (logits * scale)?,
            None => logits,
        };
        if let Some(last) = dims.last_mut() {
            *last = self.weight.dim(0)?;
        }
        logits.reshape(dims)
    }
}

/// A layer with `weight` of shape `(vocab_size, hidden_size)` and `bias` of shape `(vocab_size)`, loaded, or created with
/// the initial values of [`candle_nn::linear()`].
///
/// # Errors
/// Those of the `VarBuilder`: a missing tensor, a wrong shape.
pub fn cut_cross_entropy(
    hidden_size: usize,
    vocab_size: usize,
    options: Options,
    vb: VarBuilder,
) -> Result<LinearCrossEntropy> {
    let head = candle_nn::linear(hidden_size, vocab_size, vb)?;
    Ok(LinearCrossEntropy::from_linear(&head, options))
}

/// The same without a bias, as the heads of most language models are.
///
/// # Errors
/// Those of the `VarBuilder`: a missing tensor, a wrong shape.
pub fn cut_cross_entropy_no_bias(
    hidden_size: usize,
    vocab_size: usize,
    options: Options,
    vb: VarBuilder,
) -> Result<LinearCrossEntropy> {
    let head = candle_nn::linear_no_bias(hidden_size, vocab_size, vb)?;
    Ok(LinearCrossEntropy::from_linear(&head, options))
}
