//! The loss as a node of Candle's graph.
//!
//! An implementation computes a [packed](Packed) f32 vector of the losses, the lse, the reduced loss and what else is
//! asked for. [`CutCrossEntropy`] is the op that computes this vector from the
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

use super::arguments::Added;
use super::contract::{Backward, Forward, KeptTiles, Left, Ran, Wanted};
use super::dispatch::Choice;
use super::packed::Packed;
use super::smoothing::Smoothing;
use crate::backward::deliver;
use crate::matrices::{Matrices, OfStorage, View};
use crate::native;
use crate::node::{attach, Node};
use crate::problem::Problem;
use candle_core::backend::BackendStorage;
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape,
    Storage, Tensor,
};
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

const NAME: &str = "cut-cross-entropy";

/// The results of a forward, parts of the graph.
pub(crate) struct Applied {
    /// One number a position.
    pub losses: Tensor,
    pub lse: Tensor,
    /// One number.
    pub loss: Tensor,
    /// One number a position, where it is asked for.
    pub entropy: Option<Tensor>,
    pub predicted: Option<Tensor>,
    pub ran: Ran,
    pub kept: Arc<KeptTiles>,
}

/// Makes the loss part of the graph.
pub(crate) fn apply(problem: &Problem, matrices: Matrices<&Tensor>) -> Result<Applied> {
    let kept = Arc::new(KeptTiles::default());
    let layout = Packed::of(problem);
    let detached = matrices.detach();
    let smoothing = Smoothing::new(problem, detached.as_ref())?.map(Arc::new);
    let added = Added {
        frozen: detached
            .adapter
            .is_some()
            .then(|| detached.classifier.clone()),
        shard: problem.settings.vocab_parallel.clone(),
        smoothing: smoothing.clone(),
        layout,
    };
    let ready = |value: Tensor, backward: Box<dyn Backward>| -> Result<Tensor> {
        if !wanted(matrices).any() {
            return Ok(value);
        }
        let mut arguments = vec![matrices.embeddings, matrices.trained()];
        arguments.extend(matrices.bias);
        let added = added.clone();
        attach(value, &arguments, Computed { backward, added })
    };
    let (packed, rest) = match Choice::new(problem)? {
        Choice::TensorOperations if problem.device.is_cuda() => {
            let Forward { packed, left } = native::in_tensors(problem, detached.as_ref(), &kept)?;
            let (backward, rest) = Rest::of(left);
            (ready(packed, backward)?, rest)
        }
        _ => {
            let op = CutCrossEntropy {
                problem: problem.clone(),
                wanted: wanted(matrices),
                added: added.clone(),
                kept: kept.clone(),
                backward: OnceLock::new(),
                rest: Arc::default(),
            };
            let rest = op.rest.clone();
            let (embeddings, trained) = (matrices.embeddings, *matrices.trained());
            let packed = match matrices.bias {
                None => embeddings.apply_op2(trained, op)?,
                Some(bias) => embeddings.apply_op3(trained, bias, op)?,
            };
            let rest = rest.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(rest) = rest else {
                bail!("{NAME}: not computed")
            };
            (packed, rest)
        }
    };
    let part = |range: Range<usize>| packed.narrow(0, range.start, range.len());
    let loss = packed.narrow(0, layout.loss(), 1)?;
    let loss = match rest.formed {
        None => loss,
        Some(formed) => ready(loss.detach().force_contiguous()?, formed)?,
    };
    let losses = part(layout.losses())?;
    let (losses, loss) = match &smoothing {
        None => (losses, loss),
        Some(smoothing) => ((losses + &smoothing.losses)?, (loss + &smoothing.loss)?),
    };
    Ok(Applied {
        losses,
        lse: part(layout.lse())?,
        loss,
        entropy: layout.entropy().map(part).transpose()?,
        predicted: rest.predicted,
        ran: rest.ran,
        kept,
    })
}

pub(crate) fn wanted(matrices: Matrices<&Tensor>) -> Wanted {
    Wanted {
        embeddings: matrices.embeddings.track_op(),
        classifier: matrices.trained().track_op(),
        bias: matrices.bias.is_some_and(Tensor::track_op),
    }
}

/// The gradients of the arguments, in their order.
fn gradients(
    backward: &dyn Backward,
    added: &Added,
    arguments: &[&Tensor],
    upstream: &Tensor,
) -> Result<Vec<Option<Tensor>>> {
    let matrices = added.matrices(arguments[0], arguments[1], arguments.get(2).copied());
    let wanted = wanted(matrices);
    let detached = matrices.detach();
    let upstream = upstream.detach().contiguous()?;
    let gradients = backward.backward(detached.as_ref(), &upstream, wanted)?;
    if let Some(smoothing) = &added.smoothing {
        smoothing.add_to(&gradients, &detached.embeddings, &upstream, added.layout)?;
    }
    let of_embeddings = match (&added.shard, gradients.embeddings) {
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
    added: Added,
}

impl Node for Computed {
    const NAME: &'static str = NAME;

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        gradients(self.backward.as_ref(), &self.added, arguments, upstream)
    }
}

/// The op. Its arguments are the embeddings, the classifier or its adapter and, if there is one, the bias; its result the
/// packed vector.
struct CutCrossEntropy {
    problem: Problem,
    wanted: Wanted,
    added: Added,
    kept: Arc<KeptTiles>,
    /// Once computed.
    backward: OnceLock<Box<dyn Backward>>,
    /// What else the forward leaves, for [`apply`].
    rest: Arc<Mutex<Option<Rest>>>,
}

/// What a forward leaves beside the packed vector and its backward.
struct Rest {
    ran: Ran,
    predicted: Option<Tensor>,
    /// The source of the reduced loss's gradients, where they are formed.
    formed: Option<Box<dyn Backward>>,
}

impl Rest {
    fn of(left: Left) -> (Box<dyn Backward>, Self) {
        let rest = Self {
            ran: left.ran,
            predicted: left.predicted,
            formed: left.loss,
        };
        (left.backward, rest)
    }
}

impl CutCrossEntropy {
    fn computed<P>(&self, forward: Forward<P>) -> Result<(P, Shape)> {
        let (backward, rest) = Rest::of(forward.left);
        if self.backward.set(backward).is_err() {
            bail!("{NAME}: computed twice")
        }
        *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = Some(rest);
        Ok((forward.packed, self.added.layout.len().into()))
    }

    fn cpu(
        &self,
        arguments: [View<'_, CpuStorage>; 2],
        bias: Option<View<'_, CpuStorage>>,
    ) -> Result<(CpuStorage, Shape)> {
        let forward = self.added.read(arguments, bias, |matrices| {
            native::on_cpu(&self.problem, matrices, self.wanted, &self.kept)
        })?;
        let (packed, shape) = self.computed(forward)?;
        Ok((CpuStorage::F32(packed), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda(
        &self,
        arguments: [View<'_, CudaStorage>; 2],
        bias: Option<View<'_, CudaStorage>>,
    ) -> Result<(CudaStorage, Shape)> {
        let forward = self.added.read(arguments, bias, |matrices| {
            crate::cuda::forward(&self.problem, matrices, self.wanted, &self.kept)
        })?;
        self.computed(forward)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(
        &self,
        _: [View<'_, CudaStorage>; 2],
        _: Option<View<'_, CudaStorage>>,
    ) -> Result<(CudaStorage, Shape)> {
        bail!("{NAME}: no kernels without the feature `cuda`")
    }

    fn metal(
        &self,
        arguments: [View<'_, MetalStorage>; 2],
        bias: Option<View<'_, MetalStorage>>,
    ) -> Result<(MetalStorage, Shape)> {
        let tensors = self
            .added
            .read(arguments, bias, |matrices| matrices.tensors(Storage::Metal))?;
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
        let gradients = gradients(backward.as_ref(), &self.added, &arguments, upstream)?;
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
        trained: &CpuStorage,
        trained_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let embeddings = View::new(embeddings, embeddings_layout);
        let trained = View::new(trained, trained_layout);
        self.cpu([embeddings, trained], None)
    }

    fn cuda_fwd(
        &self,
        embeddings: &CudaStorage,
        embeddings_layout: &Layout,
        trained: &CudaStorage,
        trained_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let embeddings = View::new(embeddings, embeddings_layout);
        let trained = View::new(trained, trained_layout);
        self.cuda([embeddings, trained], None)
    }

    fn metal_fwd(
        &self,
        embeddings: &MetalStorage,
        embeddings_layout: &Layout,
        trained: &MetalStorage,
        trained_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let embeddings = View::new(embeddings, embeddings_layout);
        let trained = View::new(trained, trained_layout);
        self.metal([embeddings, trained], None)
    }

    fn bwd(
        &self,
        embeddings: &Tensor,
        trained: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [e, t] = self.gradients([embeddings, trained], result, upstream)?;
        Ok((e, t))
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
        trained: &CpuStorage,
        trained_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let embeddings = View::new(embeddings, embeddings_layout);
        let trained = View::new(trained, trained_layout);
        self.cpu([embeddings, trained], Some(View::new(bias, bias_layout)))
    }

    fn cuda_fwd(
        &self,
        embeddings: &CudaStorage,
        embeddings_layout: &Layout,
        trained: &CudaStorage,
        trained_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let embeddings = View::new(embeddings, embeddings_layout);
        let trained = View::new(trained, trained_layout);
        self.cuda([embeddings, trained], Some(View::new(bias, bias_layout)))
    }

    fn metal_fwd(
        &self,
        embeddings: &MetalStorage,
        embeddings_layout: &Layout,
        trained: &MetalStorage,
        trained_layout: &Layout,
        bias: &MetalStorage,
        bias_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let embeddings = View::new(embeddings, embeddings_layout);
        let trained = View::new(trained, trained_layout);
        self.metal([embeddings, trained], Some(View::new(bias, bias_layout)))
    }

    fn bwd(
        &self,
        embeddings: &Tensor,
        trained: &Tensor,
        bias: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [e, t, b] = self.gradients([embeddings, trained, bias], result, upstream)?;
        Ok((e, t, b))
    }
}
