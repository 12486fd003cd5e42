//! Root-mean-square norm.

use super::cpu::{self, Number};
use super::{check_alike, wide, Place};
use crate::backward::deliver;
use candle_core::{bail, CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

/// Each row of `x` over its root mean square, times a weight a column:
///
/// ```text
/// x / sqrt(mean(x^2) + eps) * (offset + weight)
/// ```
///
/// An `offset` of 0 is the norm of Llama and most others, 1 that of Gemma, whose weights begin as 0. `x` is `(.., D)`,
/// `weight` is `(D)`, both bf16, f16, f32 or f64; the result has the shape and dtype of `x`. Squares, their mean and the
/// products are f32 (f64 for f64), rounded once. Gradients of `x` and `weight`; the mean square is computed again in the
/// backward, nothing is kept beside `x`.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// use candle_cut_cross_entropy::ops::rms_norm;
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[3f32, 4.]], &Device::Cpu)?;
/// let weight = Var::ones(2, candle_core::DType::F32, &Device::Cpu)?;
/// let y = rms_norm(&x, &weight, 0., 0.)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[3. / 12.5f32.sqrt(), 4. / 12.5f32.sqrt()]]);
/// # Ok(())
/// # }
/// ```
///
/// Source: Zhang and Sennrich, *Root Mean Square Layer Normalization*, [arXiv 1910.07467](https://arxiv.org/abs/1910.07467).
///
/// # Errors
/// A weight whose length is not that of the rows, dtypes or devices that differ, an eps below 0 or not finite, an offset that
/// is not finite, a tensor without numbers.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, offset: f64) -> Result<Tensor> {
    check(x, weight)?;
    let settings = Settings::new(eps, offset)?;
    match Place::of(NAME, x)? {
        Place::Here => {
            let norm = RmsNorm {
                settings,
                #[cfg(feature = "cuda")]
                computed: fused::Computed::default(),
            };
            x.contiguous()?.apply_op2(&weight.contiguous()?, norm)
        }
        Place::Widened => rms_norm(
            &x.to_dtype(DType::F32)?,
            &weight.to_dtype(DType::F32)?,
            eps,
            offset,
        )?
        .to_dtype(x.dtype()),
        Place::Candle => by_candle(x, weight, settings),
    }
}

fn by_candle(x: &Tensor, weight: &Tensor, settings: Settings) -> Result<Tensor> {
    let Settings { eps, offset } = settings;
    let wide_x = x.to_dtype(wide(x.dtype()))?;
    let mean_square = wide_x.sqr()?.mean_keepdim(D::Minus1)?;
    let weight = (weight.to_dtype(wide_x.dtype())? + offset)?;
    wide_x
        .broadcast_div(&(mean_square + eps)?.sqrt()?)?
        .broadcast_mul(&weight)?
        .to_dtype(x.dtype())
}

/// The sum of `x` and a residual, and its norm: `(x + residual, rms_norm(x + residual, ..))`.
///
/// One kernel on CUDA, two operations elsewhere. Shapes, dtypes and the norm as in [`rms_norm`]; the sum is rounded to the
/// dtype before it is normalised, as two operations would do it. Both results may be used and differentiated.
///
/// # Errors
/// Those of [`rms_norm`]; a residual of another shape.
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
    offset: f64,
) -> Result<(Tensor, Tensor)> {
    check(x, weight)?;
    check_alike(NAME, x, &[("residual", residual)])?;
    if residual.shape() != x.shape() {
        bail!(
            "{NAME}: x has shape {:?}, the residual {:?}",
            x.dims(),
            residual.dims()
        )
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && Place::of(NAME, x)? == Place::Here {
        return fused::add_rms_norm([x, residual, weight], Settings::new(eps, offset)?);
    }
    let sum = (x + residual)?;
    let normed = rms_norm(&sum, weight, eps, offset)?;
    Ok((sum, normed))
}

const NAME: &str = "rms_norm";

fn check(x: &Tensor, weight: &Tensor) -> Result<()> {
    check_alike(NAME, x, &[("weight", weight)])?;
    match (x.dims().last(), weight.dims()) {
        (Some(size), [len]) if size == len => Ok(()),
        _ => bail!(
            "{NAME}: expected x (.., D) and a weight (D), got {:?} and {:?}",
            x.dims(),
            weight.dims()
        ),
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub eps: f64,
    pub offset: f64,
}

impl Settings {
    fn new(eps: f64, offset: f64) -> Result<Self> {
        if !(eps >= 0. && eps.is_finite() && offset.is_finite()) {
            bail!("{NAME}: eps must be at least 0 and finite, the offset finite, got {eps} and {offset}")
        }
        Ok(Self { eps, offset })
    }
}

struct RmsNorm {
    settings: Settings,
    #[cfg(feature = "cuda")]
    computed: fused::Computed,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = ((x, x_layout), (weight, weight_layout));
        let out = match x.0 {
            CpuStorage::F64(_) => forward::<f64>(x, weight, self.settings)?,
            _ => forward::<f32>(x, weight, self.settings)?,
        };
        Ok((out, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        x_layout: &Layout,
        weight: &candle_core::CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use crate::cuda::ops::{rms_norm, Operand};
        let operand = |storage, layout| Operand { storage, layout };
        let normed = match fused::lock(&self.computed).take() {
            Some(normed) => normed,
            None => {
                let (x, weight) = (operand(x, x_layout), operand(weight, weight_layout));
                rms_norm::forward(x, None, weight, self.settings)?.1
            }
        };
        Ok((normed, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let upstream = upstream.contiguous()?;
        let tensors = [x, weight, &upstream];
        let wanted = weight.track_op();
        let (of_x, of_weight) = match x.dtype() {
            #[cfg(feature = "cuda")]
            _ if x.device().is_cuda() => {
                crate::cuda::ops::rms_norm::backward(tensors, self.settings, wanted)?
            }
            DType::F64 => backward::<f64>(tensors, self.settings, wanted)?,
            _ => backward::<f32>(tensors, self.settings, wanted)?,
        };
        let [of_weight] = deliver(result, [weight], vec![of_weight])?;
        Ok((Some(of_x), of_weight))
    }
}

/// The sum and its norm by one kernel: two nodes of the graph, of which the first computes the second's result too.
#[cfg(feature = "cuda")]
mod fused {
    use super::{RmsNorm, Settings, NAME};
    use crate::cuda::ops::{operands, rms_norm, Operand};
    use candle_core::{bail, CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor};
    use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

    /// The norm, from when it is computed to when its node is made.
    pub(super) type Computed = Arc<Mutex<Option<CudaStorage>>>;

    pub(super) fn lock(computed: &Computed) -> MutexGuard<'_, Option<CudaStorage>> {
        computed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_rms_norm(
        [x, residual, weight]: [&Tensor; 3],
        settings: Settings,
    ) -> Result<(Tensor, Tensor)> {
        let computed = Computed::default();
        let weight = weight.contiguous()?;
        let add = Add {
            settings,
            weight: weight.detach(),
            computed: computed.clone(),
        };
        let sum = x.contiguous()?.apply_op2(&residual.contiguous()?, add)?;
        let normed = sum.apply_op2(&weight, RmsNorm { settings, computed })?;
        Ok((sum, normed))
    }

    struct Add {
        settings: Settings,
        weight: Tensor,
        computed: Computed,
    }

    impl CustomOp2 for Add {
        fn name(&self) -> &'static str {
            "add-rms-norm"
        }

        fn cpu_fwd(
            &self,
            _: &CpuStorage,
            _: &Layout,
            _: &CpuStorage,
            _: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            bail!("{NAME}: on the CPU the sum and its norm are two operations")
        }

        fn cuda_fwd(
            &self,
            x: &CudaStorage,
            x_layout: &Layout,
            residual: &CudaStorage,
            residual_layout: &Layout,
        ) -> Result<(CudaStorage, Shape)> {
            let operand = |storage, layout| Operand { storage, layout };
            let (x, residual) = (operand(x, x_layout), operand(residual, residual_layout));
            let (sum, normed) = operands([&self.weight], |[weight]| {
                rms_norm::forward(x, Some(residual), weight, self.settings)
            })?;
            *lock(&self.computed) = Some(normed);
            match sum {
                Some(sum) => Ok((sum, x_layout.shape().clone())),
                None => bail!("{NAME}: no sum"),
            }
        }

        fn bwd(
            &self,
            _: &Tensor,
            _: &Tensor,
            _: &Tensor,
            upstream: &Tensor,
        ) -> Result<(Option<Tensor>, Option<Tensor>)> {
            Ok((Some(upstream.clone()), Some(upstream.clone())))
        }
    }
}

type Stored<'a> = (&'a CpuStorage, &'a Layout);

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms<R: Number>(x: &[R], eps: f64) -> R {
    let squares = cpu::sum(x.len(), |i| x[i] * x[i]);
    let mean = candle_core::WithDType::to_f64(squares) / x.len() as f64;
    cpu::real(1. / (mean + eps).sqrt())
}

fn forward<R: Number>(x: Stored<'_>, weight: Stored<'_>, settings: Settings) -> Result<CpuStorage> {
    let size = weight.1.shape().elem_count();
    let count = x.1.shape().elem_count();
    let (x, weight) = (
        cpu::values::<R>(x.0, x.1)?,
        cpu::values::<R>(weight.0, weight.1)?,
    );
    let offset = cpu::real::<R>(settings.offset);
    let mut out = vec![R::default(); count];
    cpu::rows(
        &mut out,
        size,
        #[inline(always)]
        |row, out| {
            let x = &x[row * size..][..size];
            let inverse = inverse_rms(x, settings.eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(&weight[..size]) {
                *out = *x * inverse * (offset + *weight);
            }
        },
    );
    Ok(cpu::storage(out))
}

/// With `r = 1 / rms` and `g = upstream * (offset + weight)`: `dx = r (g - x r^2 mean(g x))`.
fn backward<R: Number>(
    [x, weight, upstream]: [&Tensor; 3],
    settings: Settings,
    weight_wanted: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (shape, weight_shape) = (x.shape(), weight.shape());
    let size = weight.elem_count();
    cpu::opened([x, weight, upstream], |[x, weight, upstream]| {
        let x = cpu::values::<R>(x.0, x.1)?;
        let weight = cpu::values::<R>(weight.0, weight.1)?;
        let upstream = cpu::values::<R>(upstream.0, upstream.1)?;
        let offset = cpu::real::<R>(settings.offset);
        let share = cpu::real::<R>(1. / size as f64);
        let mut of_x = vec![R::default(); shape.elem_count()];
        cpu::rows(
            &mut of_x,
            size,
            #[inline(always)]
            |row, of_x| {
                let (x, upstream) = (&x[row * size..][..size], &upstream[row * size..][..size]);
                let weight = &weight[..size];
                let inverse = inverse_rms(x, settings.eps);
                let along = cpu::sum(size, |i| upstream[i] * (offset + weight[i]) * x[i]);
                let along = inverse * inverse * along * share;
                for i in 0..size {
                    of_x[i] = inverse * (upstream[i] * (offset + weight[i]) - x[i] * along);
                }
            },
        );
        let of_weight = weight_wanted.then(|| {
            let of_weight = weight_gradient(&x[..of_x.len()], upstream, size, settings.eps);
            cpu::tensor(of_weight, weight_shape)
        });
        Ok((cpu::tensor(of_x, shape), of_weight))
    })
}

/// The sum over the rows of `upstream * x / rms`: of blocks of rows first, then of the blocks, in their order.
fn weight_gradient<R: Number>(x: &[R], upstream: &[R], size: usize, eps: f64) -> Vec<R> {
    const ROWS: usize = 64;
    let blocks = x
        .par_chunks(ROWS * size)
        .zip(upstream.par_chunks(ROWS * size));
    let sums: Vec<Vec<R>> = blocks
        .map(|(x, upstream)| {
            let mut sum = vec![R::default(); size];
            for (x, upstream) in x.chunks(size).zip(upstream.chunks(size)) {
                let inverse = inverse_rms(x, eps);
                for ((sum, x), upstream) in sum.iter_mut().zip(x).zip(upstream) {
                    *sum += *upstream * *x * inverse;
                }
            }
            sum
        })
        .collect();
    let mut total = vec![R::default(); size];
    for sum in sums {
        for (total, sum) in total.iter_mut().zip(sum) {
            *total += sum;
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same, random};

    #[test]
    fn candles_operations_give_the_same() -> Result<()> {
        let (x, weight) = (random(&[3, 5])?, random(&[5])?);
        let settings = Settings {
            eps: 1e-2,
            offset: 1.,
        };
        let here = by_candle(&x, &weight, settings)?;
        assert_same(&here, &rms_norm(&x, &weight, 1e-2, 1.)?, &[&x, &weight])
    }
}
