//! The memory of the gradients.

use super::launch::{Gpu, Unfinished};
use crate::matrices::{Matrices, View};
use crate::op::contract::{Gradients, Wanted};
use candle_core::{CudaStorage, DType, Result, Shape};

/// The gradients that are wanted, to be written.
pub(super) struct Outputs {
    embeddings: Option<Unfinished>,
    classifier: Option<Unfinished>,
    bias: Option<Unfinished>,
}

impl Outputs {
    /// `embeddings_grad` is the dtype of the gradient of the embeddings.
    pub fn new(
        gpu: &Gpu,
        matrices: Matrices<View<'_, CudaStorage>>,
        wanted: Wanted,
        embeddings_grad: DType,
    ) -> Result<Self> {
        let dtype = matrices.classifier.dtype();
        let (vocab, columns) = matrices.trained().dims2()?;
        let allocate = |wanted: bool, dtype: DType, shape: Shape, zeroed| match wanted {
            true => gpu.unfinished(dtype, shape, zeroed).map(Some),
            false => Ok(None),
        };
        Ok(Self {
            // Rows that do not count are never written.
            embeddings: allocate(
                wanted.embeddings,
                embeddings_grad,
                matrices.embeddings.shape().clone(),
                true,
            )?,
            classifier: allocate(wanted.classifier, dtype, (vocab, columns).into(), false)?,
            bias: allocate(wanted.bias, dtype, vocab.into(), false)?,
        })
    }

    /// Those of embeddings (0), classifier (1) and bias (2) that are wanted.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Unfinished)> {
        [&self.embeddings, &self.classifier, &self.bias]
            .into_iter()
            .enumerate()
            .filter_map(|(which, grad)| Some((which, grad.as_ref()?)))
    }

    pub fn results(&self) -> Results {
        let address = |grad: &Option<Unfinished>| grad.as_ref().map_or(0, |g| g.address);
        Results {
            embeddings: address(&self.embeddings),
            classifier: address(&self.classifier),
            bias: address(&self.bias),
        }
    }

    /// Once every kernel that writes them is launched.
    pub fn finish(self, gpu: &Gpu) -> Gradients {
        let finish = |grad: Option<Unfinished>| grad.map(|g| g.finish(gpu));
        Gradients {
            embeddings: finish(self.embeddings),
            classifier: finish(self.classifier),
            bias: finish(self.bias),
        }
    }
}

/// Addresses of the gradients, 0 for one that is not wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Results {
    pub embeddings: u64,
    pub classifier: u64,
    pub bias: u64,
}

impl Results {
    pub fn any(self) -> bool {
        self.embeddings != 0 || self.classifier != 0 || self.bias != 0
    }

    /// Those of them that are wanted.
    pub fn of(self, wanted: Wanted) -> Self {
        let of = |address: u64, wanted: bool| if wanted { address } else { 0 };
        Self {
            embeddings: of(self.embeddings, wanted.embeddings),
            classifier: of(self.classifier, wanted.classifier),
            bias: of(self.bias, wanted.bias),
        }
    }
}
