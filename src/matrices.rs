//! The embeddings, the classifier and the bias of a call: as tensors, and as the storages that Candle hands to an op.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{
    bail, CpuStorage, CudaStorage, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};
use std::ops::Range;

/// What a forward and a backward both multiply, all contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrices<M> {
    /// `(rows, D)`; with an adapter [wider](crate::low_rank), its last columns being what the adapter's multiply.
    pub embeddings: M,
    /// `(V, D)`
    pub classifier: M,
    /// `(V, r)`: columns of the classifier after the last, with the embeddings' last. Then the classifier is frozen.
    pub adapter: Option<M>,
    /// `(V)`
    pub bias: Option<M>,
}

impl<M> Matrices<M> {
    /// What of the classifier has a gradient: the adapter where there is one.
    pub fn trained(&self) -> &M {
        self.adapter.as_ref().unwrap_or(&self.classifier)
    }
}

/// A contiguous matrix or vector in a storage.
#[derive(Debug)]
pub(crate) struct View<'a, S> {
    pub storage: &'a S,
    pub layout: &'a Layout,
}

impl<S> Clone for View<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for View<'_, S> {}

impl<'a, S> View<'a, S> {
    pub fn new(storage: &'a S, layout: &'a Layout) -> Self {
        Self { storage, layout }
    }
}

impl<S: BackendStorage> View<'_, S> {
    pub fn shape(&self) -> &Shape {
        self.layout.shape()
    }

    pub fn dims2(&self) -> Result<(usize, usize)> {
        self.shape().dims2()
    }

    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// A tensor of the same values, outside of any graph. Of a Metal storage it is another handle, of any other a copy.
    fn tensor(&self, wrap: fn(S) -> Storage) -> Result<Tensor> {
        let storage = wrap(self.storage.try_clone(self.layout)?);
        let (start, len) = (self.layout.start_offset(), self.shape().elem_count());
        let all = Tensor::from_storage(storage, start + len, BackpropOp::none(), false);
        all.narrow(0, start, len)?.reshape(self.shape())
    }
}

/// A kind of storage.
pub(crate) trait OfStorage: Sized {
    /// # Errors
    /// Another kind.
    fn of(storage: &Storage) -> Result<&Self>;
}

macro_rules! of_storage {
    ($storage:ty, $variant:ident) => {
        impl OfStorage for $storage {
            fn of(storage: &Storage) -> Result<&Self> {
                match storage {
                    Storage::$variant(storage) => Ok(storage),
                    other => bail!(
                        concat!(
                            "expected a tensor on ",
                            stringify!($variant),
                            ", got one on {:?}"
                        ),
                        other.device().location()
                    ),
                }
            }
        }
    };
}

of_storage!(CpuStorage, Cpu);
of_storage!(CudaStorage, Cuda);
of_storage!(MetalStorage, Metal);

impl Matrices<Tensor> {
    pub fn as_ref(&self) -> Matrices<&Tensor> {
        Matrices {
            embeddings: &self.embeddings,
            classifier: &self.classifier,
            adapter: self.adapter.as_ref(),
            bias: self.bias.as_ref(),
        }
    }
}

impl<'a> Matrices<&'a Tensor> {
    /// The arguments of a node: embeddings, classifier and, if there is one, the bias.
    pub fn of(arguments: &[&'a Tensor]) -> Self {
        Self {
            embeddings: arguments[0],
            classifier: arguments[1],
            adapter: None,
            bias: arguments.get(2).copied(),
        }
    }

    /// The same outside of the user's graph.
    pub fn detach(self) -> Matrices<Tensor> {
        Matrices {
            embeddings: self.embeddings.detach(),
            classifier: self.classifier.detach(),
            adapter: self.adapter.map(Tensor::detach),
            bias: self.bias.map(Tensor::detach),
        }
    }

    /// The columns of the embeddings that the gradient of what is [trained](Matrices::trained) has.
    pub fn trained_columns(self) -> Result<Range<usize>> {
        let columns = self.embeddings.dim(1)?;
        Ok(columns - self.trained().dim(1)?..columns)
    }

    /// Calls `with` while the storages are held for reading.
    ///
    /// # Errors
    /// Tensors on another device than `S` stands for.
    pub fn read<S: OfStorage, R>(
        self,
        with: impl FnOnce(Matrices<View<'_, S>>) -> Result<R>,
    ) -> Result<R> {
        let embeddings = self.embeddings.storage_and_layout();
        let classifier = self.classifier.storage_and_layout();
        let adapter = self.adapter.map(Tensor::storage_and_layout);
        let bias = self.bias.map(Tensor::storage_and_layout);
        with(Matrices {
            embeddings: View::new(S::of(&embeddings.0)?, embeddings.1),
            classifier: View::new(S::of(&classifier.0)?, classifier.1),
            adapter: match &adapter {
                None => None,
                Some((storage, layout)) => Some(View::new(S::of(storage)?, layout)),
            },
            bias: match &bias {
                None => None,
                Some((storage, layout)) => Some(View::new(S::of(storage)?, layout)),
            },
        })
    }
}

impl<S: BackendStorage> Matrices<View<'_, S>> {
    /// Tensors of the same values, outside of any graph. Of Metal storages they are handles, of any other copies.
    pub fn tensors(&self, wrap: fn(S) -> Storage) -> Result<Matrices<Tensor>> {
        Ok(Matrices {
            embeddings: self.embeddings.tensor(wrap)?,
            classifier: self.classifier.tensor(wrap)?,
            adapter: match &self.adapter {
                None => None,
                Some(adapter) => Some(adapter.tensor(wrap)?),
            },
            bias: match &self.bias {
                None => None,
                Some(bias) => Some(bias.tensor(wrap)?),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn tensors_made_of_storages_have_the_values_wherever_these_begin() -> Result<()> {
        let numbers = Tensor::arange(0f32, 40., &Device::Cpu)?;
        let embeddings = numbers.narrow(0, 7, 6)?.reshape((2, 3))?;
        let classifier = numbers.narrow(0, 20, 12)?.reshape((4, 3))?;
        let bias = numbers.narrow(0, 36, 4)?;
        let matrices = Matrices {
            embeddings: &embeddings,
            classifier: &classifier,
            adapter: None,
            bias: Some(&bias),
        };
        let made = matrices.read(|views| views.tensors(Storage::Cpu))?;
        let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        assert_eq!(values(&made.embeddings)?, values(&embeddings)?);
        assert_eq!(values(&made.classifier)?, values(&classifier)?);
        assert_eq!(
            made.bias.map(|b| values(&b)).transpose()?,
            Some(values(&bias)?)
        );
        Ok(())
    }
}
