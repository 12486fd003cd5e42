//! Gated activations.

use super::activation::Activation;
use super::cpu::{self, Number};
use super::{check_alike, wide, Place, Rows};
use candle_core::{bail, CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

/// `silu(gate) * up`, number by number, with `silu(x) = x / (1 + exp(-x))`.
///
/// Both have one shape, and bf16, f16, f32 or f64; so has the result. They may be views of one projection's rows. Computed
/// in f32 (f64 for f64), rounded once. Gradients of both; the activation is computed again in the backward.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::ops::swiglu;
/// # fn main() -> candle_core::Result<()> {
/// let gate_up = Tensor::new(&[[0f32, 20., 3., 0.5]], &Device::Cpu)?;
/// let y = swiglu(&gate_up.narrow(1, 0, 2)?, &gate_up.narrow(1, 2, 2)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0., 10.]]);
/// # Ok(())
/// # }
/// ```
///
/// Source: Shazeer, *GLU Variants Improve Transformer*, [arXiv 2002.05202](https://arxiv.org/abs/2002.05202).
///
/// # Errors
/// Shapes, dtypes or devices that differ, tensors without numbers.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated(gate, up, Activation::Silu)
}

/// `gelu(gate) * up`, number by number, with the tanh form of the activation:
///
/// ```text
/// gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
/// ```
///
/// All else as in [`swiglu`].
///
/// # Errors
/// Those of [`swiglu`].
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated(gate, up, Activation::GeluTanh)
}

fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let name = activation.name();
    check_alike(name, gate, &[("up", up)])?;
    if gate.shape() != up.shape() {
        bail!(
            "{name}: the gate has shape {:?}, up {:?}",
            gate.dims(),
            up.dims()
        )
    }
    match Place::of(name, gate)? {
        Place::Here => Rows::made(gate)?.apply_op2(&Rows::made(up)?, Gated(activation)),
        Place::Widened => gated(
            &gate.to_dtype(DType::F32)?,
            &up.to_dtype(DType::F32)?,
            activation,
        )?
        .to_dtype(gate.dtype()),
        Place::Candle => by_candle(gate, up, activation),
    }
}

fn by_candle(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (dtype, wide) = (gate.dtype(), wide(gate.dtype()));
    let (gate, up) = (gate.to_dtype(wide)?, up.to_dtype(wide)?);
    let activated = match activation {
        Activation::Silu => gate.silu()?,
        // Candle's own has a derivative of six digits.
        Activation::GeluTanh => {
            let factor = (2. / std::f64::consts::PI).sqrt();
            let inner = ((gate.sqr()? * (0.044715 * factor))? + factor)?;
            let tanh = (&gate * inner)?.tanh()?;
            ((&gate * (tanh + 1.)?)? * 0.5)?
        }
    };
    (activated * up)?.to_dtype(dtype)
}

struct Gated(Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = ((gate, gate_layout), (up, up_layout));
        let out = match gate.0 {
            CpuStorage::F64(_) => forward::<f64>(gate, up, self.0)?,
            _ => forward::<f32>(gate, up, self.0)?,
        };
        Ok((out, gate_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gate: &candle_core::CudaStorage,
        gate_layout: &Layout,
        up: &candle_core::CudaStorage,
        up_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use crate::cuda::ops::{gated, Operand};
        let operand = |storage, layout| Operand { storage, layout };
        let (gate, up) = (operand(gate, gate_layout), operand(up, up_layout));
        Ok((
            gated::forward(gate, up, self.0)?,
            gate_layout.shape().clone(),
        ))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let upstream = upstream.contiguous()?;
        let tensors = [gate, up, &upstream];
        let (of_gate, of_up) = match gate.dtype() {
            #[cfg(feature = "cuda")]
            _ if gate.device().is_cuda() => crate::cuda::ops::gated::backward(tensors, self.0)?,
            DType::F64 => backward::<f64>(tensors, self.0)?,
            _ => backward::<f32>(tensors, self.0)?,
        };
        Ok((Some(of_gate), Some(of_up)))
    }
}

type Stored<'a> = (&'a CpuStorage, &'a Layout);

fn forward<R: Number>(
    gate: Stored<'_>,
    up: Stored<'_>,
    activation: Activation,
) -> Result<CpuStorage> {
    let (gate_rows, up_rows) = (Rows::of(gate.1)?, Rows::of(up.1)?);
    let (gate, up) = (
        cpu::values::<R>(gate.0, gate.1)?,
        cpu::values::<R>(up.0, up.1)?,
    );
    let columns = gate_rows.columns;
    let mut out = vec![R::default(); gate_rows.count * columns];
    cpu::rows(
        &mut out,
        columns,
        #[inline(always)]
        |row, out| {
            let gate = &gate[row * gate_rows.stride..][..columns];
            let up = &up[row * up_rows.stride..][..columns];
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = activation.at(*gate).0 * *up;
            }
        },
    );
    Ok(cpu::storage(out))
}

fn backward<R: Number>(tensors: [&Tensor; 3], activation: Activation) -> Result<(Tensor, Tensor)> {
    let shape = tensors[0].shape();
    cpu::opened(tensors, |[gate, up, upstream]| {
        let (gate_rows, up_rows) = (Rows::of(gate.1)?, Rows::of(up.1)?);
        let gate = cpu::values::<R>(gate.0, gate.1)?;
        let up = cpu::values::<R>(up.0, up.1)?;
        let upstream = cpu::values::<R>(upstream.0, upstream.1)?;
        let columns = gate_rows.columns;
        let mut of_gate = vec![R::default(); shape.elem_count()];
        let mut of_up = vec![R::default(); shape.elem_count()];
        cpu::two_rows(
            [&mut of_gate, &mut of_up],
            columns,
            #[inline(always)]
            |row, of_gate, of_up| {
                let gate = &gate[row * gate_rows.stride..][..columns];
                let up = &up[row * up_rows.stride..][..columns];
                let upstream = &upstream[row * columns..][..columns];
                for i in 0..columns {
                    let (value, slope) = activation.at(gate[i]);
                    of_gate[i] = upstream[i] * up[i] * slope;
                    of_up[i] = upstream[i] * value;
                }
            },
        );
        Ok((cpu::tensor(of_gate, shape), cpu::tensor(of_up, shape)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::tests::{assert_same, random};

    #[test]
    fn candles_operations_give_the_same() -> Result<()> {
        let (gate, up) = (random(&[3, 5])?, random(&[3, 5])?);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let here = by_candle(&gate, &up, activation)?;
            assert_same(&here, &gated(&gate, &up, activation)?, &[&gate, &up])?;
        }
        Ok(())
    }
}
