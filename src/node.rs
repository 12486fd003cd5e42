//! Nodes of Candle's graph whose value is computed before they become part of it.
//!
//! An op of Candle's computes its one result from the storages of at most three arguments. Not so here: a checkpointed
//! layer is made of other ops, which take tensors, and hands gradients to more variables than three; the weight of an
//! adapted layer likewise; and a forward of the loss may have a second result. The node copies the value, which Candle
//! has no way to move out of a tensor.

use crate::backward::{deliver, take_sum};
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result,
    Shape, Storage, Tensor,
};
use std::sync::Mutex;

/// What a node does in a backward.
pub(crate) trait Node: Send + Sync + 'static {
    const NAME: &'static str;

    /// The gradients of the arguments, in their order, shapes and dtypes, `None` for one that is not tracked. Each is in memory
    /// that nothing else reads. Called as often as the user differentiates the graph.
    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>>;

    /// The same for a node that can add to what a variable has from other nodes where that lies: `so_far` hands it over once,
    /// and it is to be part of the gradient that is returned.
    fn backward_onto(
        &self,
        arguments: &[&Tensor],
        upstream: &Tensor,
        _so_far: &dyn Fn(&Tensor) -> Option<Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        self.backward(arguments, upstream)
    }
}

/// `value` as the result of a node with these arguments, of which there are one to three.
pub(crate) fn attach(value: Tensor, arguments: &[&Tensor], node: impl Node) -> Result<Tensor> {
    let name = name(&node);
    let computed = Computed {
        value: Mutex::new(Some(value)),
        node,
    };
    match arguments {
        [a] => a.apply_op1(computed),
        [a, b] => a.apply_op2(b, computed),
        [a, b, c] => a.apply_op3(b, c, computed),
        _ => bail!("{name}: a node of {} arguments", arguments.len()),
    }
}

fn name<N: Node>(_: &N) -> &'static str {
    N::NAME
}

struct Computed<N> {
    /// Until the node has its copy.
    value: Mutex<Option<Tensor>>,
    node: N,
}

impl<N: Node> Computed<N> {
    fn storage(&self) -> Result<(Storage, Shape)> {
        let value = self.value.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(value) = value else {
            bail!("{}: computed twice", N::NAME)
        };
        let (storage, layout) = value.storage_and_layout();
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.storage()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            (other, _) => self.elsewhere("the CPU", &other),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.storage()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            (other, _) => self.elsewhere("CUDA", &other),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.storage()? {
            (Storage::Metal(storage), shape) => Ok((storage, shape)),
            (other, _) => self.elsewhere("Metal", &other),
        }
    }

    fn elsewhere<T>(&self, inputs: &str, value: &Storage) -> Result<T> {
        bail!(
            "{}: inputs on {inputs}, result on {:?}",
            N::NAME,
            value.device().location()
        )
    }

    fn gradients<const COUNT: usize>(
        &self,
        arguments: [&Tensor; COUNT],
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<[Option<Tensor>; COUNT]> {
        let so_far = |variable: &Tensor| take_sum(result, variable);
        let gradients = self.node.backward_onto(&arguments, upstream, &so_far)?;
        deliver(result, arguments, gradients)
    }
}

impl<N: Node> CustomOp1 for Computed<N> {
    fn name(&self) -> &'static str {
        N::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(&self, a: &Tensor, result: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let [a] = self.gradients([a], result, upstream)?;
        Ok(a)
    }
}

impl<N: Node> CustomOp2 for Computed<N> {
    fn name(&self) -> &'static str {
        N::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.gradients([a, b], result, upstream)?;
        Ok((a, b))
    }
}

impl<N: Node> CustomOp3 for Computed<N> {
    fn name(&self) -> &'static str {
        N::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.gradients([a, b, c], result, upstream)?;
        Ok((a, b, c))
    }
}
