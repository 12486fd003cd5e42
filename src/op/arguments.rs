//! The arguments of the op as the matrices of a call, and what the op does around an implementation.

use super::packed::Packed;
use super::smoothing::Smoothing;
use crate::matrices::{Matrices, OfStorage, View};
use crate::VocabParallel;
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// What the op does around an implementation's forward and backward.
#[derive(Clone)]
pub(super) struct Added {
    /// The classifier where an adapter is the argument in its place.
    pub frozen: Option<Tensor>,
    pub shard: Option<VocabParallel>,
    pub smoothing: Option<Arc<Smoothing>>,
    pub layout: Packed,
}

impl Added {
    /// The matrices that these arguments are.
    pub fn matrices<'a>(
        &'a self,
        embeddings: &'a Tensor,
        trained: &'a Tensor,
        bias: Option<&'a Tensor>,
    ) -> Matrices<&'a Tensor> {
        Matrices {
            embeddings,
            classifier: self.frozen.as_ref().unwrap_or(trained),
            adapter: self.frozen.as_ref().map(|_| trained),
            bias,
        }
    }

    /// The same of storages, while that of the classifier is held for reading.
    pub fn read<S: OfStorage, R>(
        &self,
        [embeddings, trained]: [View<'_, S>; 2],
        bias: Option<View<'_, S>>,
        with: impl FnOnce(Matrices<View<'_, S>>) -> Result<R>,
    ) -> Result<R> {
        let Some(frozen) = &self.frozen else {
            return with(Matrices {
                embeddings,
                classifier: trained,
                adapter: None,
                bias,
            });
        };
        let (storage, layout) = frozen.storage_and_layout();
        with(Matrices {
            embeddings,
            classifier: View::new(S::of(&storage)?, layout),
            adapter: Some(trained),
            bias,
        })
    }
}
