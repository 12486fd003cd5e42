//! The loss as a node of Candle's graph.
//!
//! An implementation computes a packed f32 vector `[losses (n), lse (n), loss (1)]` over the `n` positions
//! of the result, where `loss` is the reduced loss. [`CutCrossEntropy`] is the op that computes this vector from the
//! storages of its arguments, so that one backward sees every upstream gradient at once.
//!
//! Two values cannot be computed by an op of their own, and join the graph ready-made ([`attach`]):
//!
//! - The reduced loss where the forward has formed its gradients. It has the same arguments as the vector and comes out
//!   of the same kernels, but an op has one result, and a part of the vector would not do: which numbers of it a user
//!   differentiates could then be told only by the values of its upstream gradient, for which a GPU is waited for. It
//!   is one number.
//! - The vector where Candle's tensor operations compute it on a CUDA device ([`Choice::TensorOperations`]). They take
//!   tensors, and a tensor is made of a `CudaStorage` by a copy, here of the embeddings and the classifier. On Metal it
//!   is a handle.

use super::contract::{Backward, Forward, KeptTiles, Left, Ran, Wanted};
use super::dispatch::Choice;
use crate::backward::deliver;
use crate::matrices::{Matrices, OfStorage, View};
use crate::native;
use crate::node::{attach, Node};
use crate::problem::Problem;
use crate::VocabParallel;
use candle_core::backend::BackendStorage;
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape,
    Storage, Tensor,
};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

const NAME: &str = "cut-cross-entropy";

/// The results of a forward, parts of the graph.
pub(crate) struct Applied {
    /// One number a position.
    pub losses: Tensor,
    pub lse: Tensor,
    /// One number.
    pub loss: Tensor,
    pub ran: Ran,
    pub kept: Arc<KeptTiles>,
}

/// Makes the loss part of the graph.
pub(crate) fn apply(problem: &Problem, matrices: Matrices<&Tensor>) -> Result<Applied> {
    let kept = Arc::new(KeptTiles::default());
    let shard = &problem.settings.vocab_parallel;
    let ready = |value: Tensor, backward: Box<dyn Backward>| -> Result<Tensor> {
        if !wanted(matrices).any() {
            return Ok(value);
        }
        let mut arguments = vec![matrices.embeddings, matrices.classifier];
        arguments.extend(matrices.bias);
        let shard = shard.clone();
        attach(value, &arguments, Computed { backward, shard })
    };
    let (packed, ran, formed) = match Choice::new(problem)? {
        Choice::TensorOperations if problem.device.is_cuda() => {
            let detached = matrices.detach();
            let Forward { packed, left } = native::in_tensors(problem, detached.as_ref(), &kept)?;
            (ready(packed, left.backward)?, left.ran, left.loss)
        }
        _ => {
            let op = CutCrossEntropy {
                problem: problem.clone(),
                wanted: wanted(matrices),
                kept: kept.clone(),
                backward: OnceLock::new(),
                rest: Arc::default(),
            };
            let rest = op.rest.clone();
            let (embeddings, classifier) = (matrices.embeddings, matrices.classifier);
            let packed = match matrices.bias {
                None => embeddings.apply_op2(classifier, op)?,
                Some(bias) => embeddings.apply_op3(classifier, bias, op)?,
            };
            let rest = rest.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(Rest { ran, formed }) = rest else {
                bail!("{NAME}: not computed")
            };
            (packed, ran, formed)
        }
    };
    let n = problem.positions.len();
    let loss = packed.narrow(0, 2 * n, 1)?;
    let loss = match formed {
        None => loss,
        Some(formed) => ready(loss.detach().force_contiguous()?, formed)?,
    };
    Ok(Applied {
        losses: packed.narrow(0, 0, n)?,
        lse: packed.narrow(0, n, n)?,
        loss,
        ran,
        kept,
    })
}

pub(crate) fn wanted(matrices: Matrices<&Tensor>) -> Wanted {
    Wanted {
        embeddings: matrices.embeddings.track_op(),
        classifier: matrices.classifier.track_op(),
        bias: matrices.bias.is_some_and(Tensor::track_op),
    }
}

/// The gradients of the arguments, in their order.
fn gradients(
    backward: &dyn Backward,
    shard: Option<&VocabParallel>,
    arguments: &[&Tensor],
    upstream: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let matrices = Matrices {
        embeddings: arguments[0],
        classifier: arguments[1],
        bias: arguments.get(2).copied(),
    };
    let wanted = wanted(matrices);
    let detached = matrices.detach();
    let upstream = upstream.detach().contiguous()?;
    let gradients = backward.backward(detached.as_ref(), &upstream, wanted)?;
    let of_embeddings = match (shard, gradients.embeddings) {
        (Some(shard), Some(here)) => {
            Some(shard.embeddings_gradient(here, matrices.embeddings.dtype())?)
        }
        (_, gradient) => gradient,
    };
    Ok(vec![of_embeddings, gradients.classifier, gradients.bias])
}

/// A value that a forward has computed beside what an op returned.
struct Computed {
    backward: Box<dyn Backward>,
    shard: Option<VocabParallel>,
}

impl Node for Computed {
    const NAME: &'static str = NAME;

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        gradients(
            self.backward.as_ref(),
            self.shard.as_ref(),
            arguments,
            upstream,
        )
    }
}

/// The op. Its arguments are the embeddings, the classifier and, if there is one, the bias; its result the packed vector.
struct CutCrossEntropy {
    problem: Problem,
    wanted: Wanted,
    kept: Arc<KeptTiles>,
    /// Once computed.
    backward: OnceLock<Box<dyn Backward>>,
    /// What else the forward leaves, for [`apply`].
    rest: Arc<Mutex<Option<Rest>>>,
}

/// What a forward leaves beside the packed vector and its backward.
struct Rest {
    ran: Ran,
    /// The source of the reduced loss's gradients, where they are formed.
    formed: Option<Box<dyn Backward>>,
}

impl CutCrossEntropy {
    fn computed<P>(&self, forward: Forward<P>) -> Result<(P, Shape)> {
        let Left {
            ran,
            backward,
            loss,
        } = forward.left;
        if self.backward.set(backward).is_err() {
            bail!("{NAME}: computed twice")
        }
        *self.rest.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Rest { ran, formed: loss });
        let numbers = 2 * self.problem.positions.len() + 1;
        Ok((forward.packed, numbers.into()))
    }

    fn cpu(&self, matrices: Matrices<View<'_, CpuStorage>>) -> Result<(CpuStorage, Shape)> {
        let forward = native::on_cpu(&self.problem, matrices, self.wanted, &self.kept)?;
        let (packed, shape) = self.computed(forward)?;
        Ok((CpuStorage::F32(packed), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, matrices: Matrices<View<'_, CudaStorage>>) -> Result<(CudaStorage, Shape)> {
        self.computed(crate::cuda::forward(
            &self.problem,
            matrices,
            self.wanted,
            &self.kept,
        )?)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(&self, _: Matrices<View<'_, CudaStorage>>) -> Result<(CudaStorage, Shape)> {
        bail!("{NAME}: no kernels without the feature `cuda`")
    }

    fn metal(&self, matrices: Matrices<View<'_, MetalStorage>>) -> Result<(MetalStorage, Shape)> {
        let tensors = matrices.tensors(Storage::Metal)?;
        let forward = native::in_tensors(&self.problem, tensors.as_ref(), &self.kept)?;
        let (packed, shape) = self.computed(forward)?;
        let (storage, layout) = packed.storage_and_layout();
        Ok((MetalStorage::of(&storage)?.try_clone(layout)?, shape))
    }

    fn gradients<const COUNT: usize>(
        &self,
        arguments: [&Tensor; COUNT],
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<[Option<Tensor>; COUNT]> {
        let Some(backward) = self.backward.get() else {
            bail!("{NAME}: differentiated before it is computed")
        };
        let shard = self.problem.settings.vocab_parallel.as_ref();
        let gradients = gradients(backward.as_ref(), shard, &arguments, upstream)?;
        deliver(result, arguments, gradients)
    }
}

impl CustomOp2 for CutCrossEntropy {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        embeddings: &CpuStorage,
        embeddings_layout: &Layout,
        classifier: &CpuStorage,
        classifier_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu(Matrices {
            embeddings: View::new(embeddings, embeddings_layout),
            classifier: View::new(classifier, classifier_layout),
            bias: None,
        })
    }

    fn cuda_fwd(
        &self,
        embeddings: &CudaStorage,
        embeddings_layout: &Layout,
        classifier: &CudaStorage,
        classifier_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda(Matrices {
            embeddings: View::new(embeddings, embeddings_layout),
            classifier: View::new(classifier, classifier_layout),
            bias: None,
        })
    }

    fn metal_fwd(
        &self,
        embeddings: &MetalStorage,
        embeddings_layout: &Layout,
        classifier: &MetalStorage,
        classifier_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal(Matrices {
            embeddings: View::new(embeddings, embeddings_layout),
            classifier: View::new(classifier, classifier_layout),
            bias: None,
        })
    }

    fn bwd(
        &self,
        embeddings: &Tensor,
        classifier: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [e, c] = self.gradients([embeddings, classifier], result, upstream)?;
        Ok((e, c))
    }
}

impl CustomOp3 for CutCrossEntropy {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        embeddings: &CpuStorage,
        embeddings_layout: &Layout,
        classifier: &CpuStorage,
        classifier_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu(Matrices {
            embeddings: View::new(embeddings, embeddings_layout),
            classifier: View::new(classifier, classifier_layout),
            bias: Some(View::new(bias, bias_layout)),
        })
    }

    fn cuda_fwd(
        &self,
        embeddings: &CudaStorage,
        embeddings_layout: &Layout,
        classifier: &CudaStorage,
        classifier_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda(Matrices {
            embeddings: View::new(embeddings, embeddings_layout),
            classifier: View::new(classifier, classifier_layout),
            bias: Some(View::new(bias, bias_layout)),
        })
    }

    fn metal_fwd(
        &self,
        embeddings: &MetalStorage,
        embeddings_layout: &Layout,
        classifier: &MetalStorage,
        classifier_layout: &Layout,
        bias: &MetalStorage,
        bias_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal(Matrices {
            embeddings: View::new(embeddings, embeddings_layout),
            classifier: View::new(classifier, classifier_layout),
            bias: Some(View::new(bias, bias_layout)),
        })
    }

    fn bwd(
        &self,
        embeddings: &Tensor,
        classifier: &Tensor,
        bias: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [e, c, b] = self.gradients([embeddings, classifier, bias], result, upstream)?;
        Ok((e, c, b))
    }
}
