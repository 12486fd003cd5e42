//! What every implementation is given and gives back.

use crate::matrices::Matrices;
use crate::{Implementation, Strategy};
use candle_core::{DType, Device, Result, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// What gradients and statistics are summed up in for inputs of this dtype.
pub(crate) fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Which gradients are asked for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub embeddings: bool,
    /// Of what is [trained](Matrices::trained) of it.
    pub classifier: bool,
    pub bias: bool,
}

impl Wanted {
    pub fn any(self) -> bool {
        self.embeddings || self.classifier || self.bias
    }
}

/// Gradients in the dtype and shape of what they belong to, the classifier's of what is trained of it, `None` where not wanted. That of the embeddings may be f32
/// where the classes are sharded: then it is this rank's part of a sum.
#[derive(Debug, Default, Clone)]
pub(crate) struct Gradients {
    pub embeddings: Option<Tensor>,
    pub classifier: Option<Tensor>,
    pub bias: Option<Tensor>,
}

impl Gradients {
    /// Zeros, where wanted.
    pub fn zeros(matrices: Matrices<&Tensor>, wanted: Wanted) -> Result<Self> {
        let zeros = |wanted: bool, of: Option<&Tensor>| match of {
            Some(of) if wanted => of.zeros_like().map(Some),
            _ => Ok(None),
        };
        Ok(Self {
            embeddings: zeros(wanted.embeddings, Some(matrices.embeddings))?,
            classifier: zeros(wanted.classifier, Some(matrices.trained()))?,
            bias: zeros(wanted.bias, matrices.bias)?,
        })
    }

    /// The sums of two that have the same.
    pub fn plus(self, other: Self) -> Result<Self> {
        let sum = |a: Option<Tensor>, b: Option<Tensor>| match (a, b) {
            (Some(a), Some(b)) => (a + b).map(Some),
            (a, b) => Ok(a.or(b)),
        };
        Ok(Self {
            embeddings: sum(self.embeddings, other.embeddings)?,
            classifier: sum(self.classifier, other.classifier)?,
            bias: sum(self.bias, other.bias)?,
        })
    }
}

/// What a forward leaves behind. Used as often as the user differentiates the graph.
pub(crate) trait Backward: Send + Sync {
    /// `upstream` is the gradient of the packed vector, contiguous f32.
    fn backward(
        &self,
        matrices: Matrices<&Tensor>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients>;
}

/// What a forward returns.
pub(crate) struct Forward<P> {
    /// f32, see [`Packed`](super::packed::Packed).
    pub packed: P,
    pub left: Left,
}

/// What a forward leaves beside its results.
pub(crate) struct Left {
    pub ran: Ran,
    /// The likeliest class of each position, u32, [`u32::MAX`] where it does not count; where that is asked for.
    pub predicted: Option<Tensor>,
    pub backward: Box<dyn Backward>,
    /// Where the gradients of the reduced loss are formed already: their source. It takes one number as upstream
    /// gradient, and `backward` is then for the other numbers only.
    pub loss: Option<Box<dyn Backward>>,
}

/// Which code has computed a loss, and how its gradients come about. Neither is `Auto`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ran {
    pub implementation: Implementation,
    pub strategy: Strategy,
}

impl<B: Backward + ?Sized> Backward for Arc<B> {
    fn backward(
        &self,
        matrices: Matrices<&Tensor>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        (**self).backward(matrices, upstream, wanted)
    }
}

/// The tiles that the last backward kept, as known on the host or still counted on a device.
#[derive(Debug, Default)]
pub(crate) struct KeptTiles(Mutex<Option<Tensor>>);

impl KeptTiles {
    /// `kept` holds two u32 numbers or f64 numbers: tiles kept, tiles there are.
    pub fn set(&self, kept: Tensor) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
    }

    pub fn share(&self) -> Result<Option<f64>> {
        let kept = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match kept {
            None => Ok(None),
            Some(kept) => {
                let kept = kept
                    .to_device(&Device::Cpu)?
                    .to_dtype(DType::F64)?
                    .to_vec1::<f64>()?;
                // Of no tiles none is left out.
                Ok(Some(if kept[1] == 0. { 1. } else { kept[0] / kept[1] }))
            }
        }
    }
}
