//! The product of rows with a matrix, as a node whose gradients go to a variable as they are.
//!
//! As Candle differentiates `x.matmul(&weight.t()?)`, the gradient of the weight is added to zeros twice: of the transposed
//! matrix, and of the matrix. And it is computed where nobody wants it.

use crate::backward::deliver;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Layout, MetalStorage, Result, Shape, Tensor,
};

/// `x W^T` for rows `x` `(rows, inputs)` and `W` `(outputs, inputs)`.
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.apply_op2(weight, Linear)
}

struct Linear;

fn product<S: BackendStorage>(
    x: &S,
    x_layout: &Layout,
    weight: &S,
    weight_layout: &Layout,
) -> Result<(S, Shape)> {
    let (rows, inputs) = x_layout.shape().dims2()?;
    let (outputs, _) = weight_layout.shape().dims2()?;
    let transposed = weight_layout.transpose(0, 1)?;
    let y = x.matmul(weight, (1, rows, outputs, inputs), x_layout, &transposed)?;
    Ok((y, (rows, outputs).into()))
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        product(x, x_layout, weight, weight_layout)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        product(x, x_layout, weight, weight_layout)
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        x_layout: &Layout,
        weight: &MetalStorage,
        weight_layout: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        product(x, x_layout, weight, weight_layout)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let upstream = upstream.detach();
        let of_x = match x.track_op() {
            true => Some(upstream.matmul(&weight.detach())?),
            false => None,
        };
        let of_weight = match weight.track_op() {
            true => Some(upstream.t()?.matmul(&x.detach())?),
            false => None,
        };
        let [x, weight] = deliver(result, [x, weight], vec![of_x, of_weight])?;
        Ok((x, weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn values_and_gradients_are_those_of_the_product() -> Result<()> {
        let normal = |rows, columns| Var::randn(0f64, 1., (rows, columns), &Device::Cpu);
        let (x, weight, factors) = (normal(5, 7)?, normal(3, 7)?, normal(5, 3)?);
        let numbers = |t: &Tensor| t.flatten_all()?.to_vec1::<f64>();
        let mut results = Vec::new();
        for y in [linear(&x, &weight)?, x.matmul(&weight.t()?)?] {
            let loss = (&y * factors.as_tensor())?.sum_all()?;
            let gradients = crate::backward(&loss)?;
            let plain = loss.backward()?;
            for store in [gradients, plain] {
                let of = |var: &Var| numbers(store.get(var).expect("a gradient"));
                results.push([numbers(&y)?, of(&x)?, of(&weight)?].concat());
            }
        }
        for result in &results[1..] {
            for (a, b) in result.iter().zip(&results[0]) {
                assert!((a - b).abs() < 1e-12, "{a} {b}");
            }
        }
        Ok(())
    }

    #[test]
    fn views_are_read_as_they_lie_and_what_is_not_tracked_has_no_gradient() -> Result<()> {
        let all = Tensor::randn(0f64, 1., (6, 9), &Device::Cpu)?;
        let x = Var::randn(0f64, 1., (4, 4), &Device::Cpu)?;
        let weight = all.narrow(0, 2, 3)?.narrow(1, 0, 4)?.contiguous()?;
        let column_major = x.t()?;
        let y = linear(&column_major, &weight)?;
        let want = column_major.contiguous()?.matmul(&weight.t()?)?;
        let off = (&y - want)?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(off < 1e-12, "{off}");
        let gradients = crate::backward(&y.sum_all()?)?;
        assert!(gradients.get(&weight).is_none());
        assert_eq!(gradients.get(&x).expect("a gradient").dims(), [4, 4]);
        Ok(())
    }
}
