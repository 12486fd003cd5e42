//! Rotary position embedding.

use super::angles::{Angles, NAME};
use super::cpu::{self, Number};
use super::{wide, Place};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, D};

/// Turns queries or keys by the angles of their positions.
///
/// `x` is `(batch, time, heads, head_dim)`, `cos` and `sin` are `(time, P)`, the cosines and sines of the angle of each
/// position for each of `P` pairs, `2 P <= head_dim`. Number `i` of a head and number `i + P` are a pair, the layout of
/// Hugging Face's checkpoints and of [`candle_nn::rotary_emb::rope`]:
///
/// ```text
/// y[i] = x[i] cos[i] - x[i + P] sin[i],   y[i + P] = x[i + P] cos[i] + x[i] sin[i]
/// ```
///
/// Numbers from `2 P` on stay as they are. `x` is bf16, f16, f32 or f64, and may be a view of a projection; `cos` and
/// `sin` may have any of these dtypes and are used in f32 (f64 for f64 `x`). The gradient of `x` is the turn back; `cos`
/// and `sin` get none.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::ops::rope;
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[1f32, 2., 3., 4.], &Device::Cpu)?.reshape((1, 2, 1, 2))?;
/// let cos = Tensor::new(&[[1f32], [0.]], &Device::Cpu)?; // a quarter turn at position 1
/// let sin = Tensor::new(&[[0f32], [1.]], &Device::Cpu)?;
/// let y = rope(&x, &cos, &sin)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [1., 2., -4., 3.]);
/// # Ok(())
/// # }
/// ```
///
/// Source: Su et al., *RoFormer*, [arXiv 2104.09864](https://arxiv.org/abs/2104.09864).
///
/// # Errors
/// Shapes other than these, dtypes that are not floats, devices that differ, a tensor without numbers.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let angles = Angles::new(x, cos, sin)?;
    match Place::of(NAME, x)? {
        Place::Here if x.stride()[3] == 1 => x.apply_op1(Rope(angles)),
        Place::Here => x.contiguous()?.apply_op1(Rope(angles)),
        Place::Widened => rope(&x.to_dtype(DType::F32)?, cos, sin)?.to_dtype(x.dtype()),
        Place::Candle => by_candle(x, &angles),
    }
}

fn by_candle(x: &Tensor, angles: &Angles) -> Result<Tensor> {
    let (dtype, pairs) = (x.dtype(), angles.cos.dim(1)?);
    let x = x.to_dtype(wide(dtype))?;
    let part = |start: usize, len| x.narrow(D::Minus1, start, len);
    let (first, second) = (part(0, pairs)?, part(pairs, pairs)?);
    let shape = (1, x.dim(1)?, 1, pairs);
    let (cos, sin) = (angles.cos.reshape(shape)?, angles.sin.reshape(shape)?);
    let mut parts = vec![
        (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
        (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?,
    ];
    let rest = x.dim(3)? - 2 * pairs;
    if rest > 0 {
        parts.push(part(2 * pairs, rest)?);
    }
    Tensor::cat(&parts, D::Minus1)?
        .contiguous()?
        .to_dtype(dtype)
}

struct Rope(Angles);

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = match x {
            CpuStorage::F64(_) => turn::<f64>(x, layout, &self.0)?,
            _ => turn::<f32>(x, layout, &self.0)?,
        };
        Ok((out, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use crate::cuda::ops::{rope, Operand};
        let out = rope::turn(Operand { storage, layout }, &self.0)?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let back = Angles {
            back: !self.0.back,
            ..self.0.clone()
        };
        let upstream = upstream.contiguous()?;
        Ok(Some(upstream.apply_op1_no_bwd(&Rope(back))?))
    }
}

fn turn<R: Number>(x: &CpuStorage, layout: &Layout, angles: &Angles) -> Result<CpuStorage> {
    let (_, time, heads, head_dim) = layout.shape().dims4()?;
    let pairs = angles.cos.dim(1)?;
    let strides = layout.stride();
    let x = cpu::values::<R>(x, layout)?;
    let direction = if angles.back { -R::ONE } else { R::ONE };
    cpu::opened([&angles.cos, &angles.sin], |[cos, sin]| {
        let cos = cpu::values::<R>(cos.0, cos.1)?;
        let sin = cpu::values::<R>(sin.0, sin.1)?;
        let mut out = vec![R::default(); layout.shape().elem_count()];
        cpu::rows(
            &mut out,
            head_dim,
            #[inline(always)]
            |row, out| {
                let (position, head) = (row / heads, row % heads);
                let (batch, time) = (position / time, position % time);
                let start = batch * strides[0] + time * strides[1] + head * strides[2];
                let x = &x[start..][..head_dim];
                let cos = &cos[time * pairs..][..pairs];
                let sin = &sin[time * pairs..][..pairs];
                for i in 0..pairs {
                    let sin = direction * sin[i];
                    out[i] = x[i] * cos[i] - x[i + pairs] * sin;
                    out[i + pairs] = x[i + pairs] * cos[i] + x[i] * sin;
                }
                out[2 * pairs..].copy_from_slice(&x[2 * pairs..]);
            },
        );
        Ok(cpu::storage(out))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same, random};

    #[test]
    fn candles_operations_give_the_same() -> Result<()> {
        let x = random(&[2, 3, 2, 6])?;
        for pairs in [2, 3] {
            let angles = random(&[3, pairs])?;
            let (cos, sin) = (angles.cos()?, angles.sin()?);
            let here = by_candle(&x, &Angles::new(&x, &cos, &sin)?)?;
            assert_same(&here, &rope(&x, &cos, &sin)?, &[&x])?;
        }
        Ok(())
    }
}
