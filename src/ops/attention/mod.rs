//! Attention whose scores are never stored.

mod candle;
mod cpu;
pub(crate) mod sizes;

use super::Place;
use candle_core::{bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};
use sizes::{Settings, Sizes, NAME};
use std::sync::OnceLock;

pub use sizes::AttentionOptions;

/// Softmax attention:
///
/// ```text
/// out = softmax(cap(scale q k^T)) v     over the keys that a query sees
/// ```
///
/// `q` is `(batch, T, heads, head_dim)`, `k` and `v` are `(batch, S, key_value_heads, head_dim)`, and the result has the
/// shape of `q`. `key_value_heads` divides `heads`: query head `h` goes with head `h / (heads / key_value_heads)` of the
/// keys. All three may be views of one projection; a copy is made only of one whose last dimension is not contiguous, or on
/// CUDA not on 16 bytes; heads that are no multiple of 16 bytes are padded there.
///
/// bf16, f16, f32 and f64; scores, softmax and sums are f32 (f64 for f64), probabilities and the gradients of the scores are
/// rounded to the inputs' dtype for their products on CUDA, where f16 loses what is below 6e-8: scale the loss. Heads have at most 256 dimensions on CUDA, any number elsewhere.
///
/// Beside its inputs it keeps its result and a number a row, the log-sum-exp; the backward computes the scores again.
/// Memory grows with `T + S` on every device. Gradients of `q`, `k` and `v`, each the same bits in every run.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// use candle_cut_cross_entropy::ops::{attention, AttentionOptions};
/// # fn main() -> candle_core::Result<()> {
/// // Rows of one projection: 4 query heads, 2 heads of keys and of values, 8 dimensions each.
/// let projection = Var::randn(0f32, 1., (2 * 5, 8 * 8), &Device::Cpu)?;
/// let heads = projection.reshape((2, 5, 8, 8))?;
/// let (q, k, v) = (heads.narrow(2, 0, 4)?, heads.narrow(2, 4, 2)?, heads.narrow(2, 6, 2)?);
/// let options = AttentionOptions { causal: true, ..AttentionOptions::default() };
/// let out = attention(&q, &k, &v, &options)?; // (2, 5, 4, 8)
/// let gradients = out.sqr()?.sum_all()?.backward()?;
/// # assert!(gradients.get(&projection).is_some());
/// # Ok(())
/// # }
/// ```
///
/// Source: Dao, *FlashAttention-2*, [arXiv 2307.08691](https://arxiv.org/abs/2307.08691).
///
/// # Errors
/// Shapes, dtypes or devices other than these, a scale or softcap that is not positive and finite, options with which a
/// query sees nothing (a window of 0, more queries than keys with `causal`), tensors without numbers.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let sizes = Sizes::new(q, k, v)?;
    let settings = Settings::new(options, &sizes)?;
    match Place::of(NAME, q)? {
        Place::Here => here([q, k, v], settings, &sizes),
        Place::Widened => {
            let widened = |x: &Tensor| x.to_dtype(DType::F32);
            attention(&widened(q)?, &widened(k)?, &widened(v)?, options)?.to_dtype(q.dtype())
        }
        Place::Candle => candle::attention([q, k, v], settings, sizes),
    }
}

/// On this crate's CPU functions or kernels.
fn here(qkv: [&Tensor; 3], settings: Settings, sizes: &Sizes) -> Result<Tensor> {
    let op = Attention {
        settings,
        sizes: *sizes,
        lse: OnceLock::new(),
    };
    #[cfg(feature = "cuda")]
    if qkv[0].device().is_cuda() {
        return on_cuda(qkv, op);
    }
    let [q, k, v] = qkv;
    q.apply_op3(k, v, op)
}

/// Gives the kernels what they can read.
#[cfg(feature = "cuda")]
fn on_cuda([q, k, v]: [&Tensor; 3], op: Attention) -> Result<Tensor> {
    use crate::cuda::ops::attention::{granule, MOST};
    let head_dim = op.sizes.head_dim;
    if head_dim > MOST {
        bail!("{NAME}: heads of {head_dim} dimensions, on CUDA at most {MOST}")
    }
    let more = head_dim.next_multiple_of(granule(q.dtype())) - head_dim;
    if more == 0 {
        return readable(q)?.apply_op3(&readable(k)?, &readable(v)?, op);
    }
    // Zeros change no score, and add columns of zeros to the result.
    let last = candle_core::D::Minus1;
    let padded = |x: &Tensor| x.pad_with_zeros(last, 0, more)?.contiguous();
    let sizes = Sizes {
        head_dim: head_dim + more,
        ..op.sizes
    };
    let op = Attention { sizes, ..op };
    let out = padded(q)?.apply_op3(&padded(k)?, &padded(v)?, op)?;
    out.narrow(last, 0, head_dim)?.contiguous()
}

/// The tensor itself where the kernels can read it, else a copy.
#[cfg(feature = "cuda")]
fn readable(tensor: &Tensor) -> Result<Tensor> {
    match crate::cuda::ops::attention::readable(tensor)? {
        true => Ok(tensor.clone()),
        false => tensor.force_contiguous(),
    }
}

struct Attention {
    settings: Settings,
    sizes: Sizes,
    /// The log-sum-exp of each row's scores, known once the result is.
    lse: OnceLock<Tensor>,
}

impl Attention {
    fn lse(&self) -> Result<&Tensor> {
        match self.lse.get() {
            Some(lse) => Ok(lse),
            None => bail!("{NAME}: differentiated before it was computed"),
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let qkv = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let (out, lse) = match q {
            CpuStorage::F64(_) => cpu::forward::<f64>(qkv, &self.settings, &self.sizes)?,
            _ => cpu::forward::<f32>(qkv, &self.settings, &self.sizes)?,
        };
        // Nothing else sets it: an op is applied once.
        let _ = self.lse.set(lse);
        Ok((out, q_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &candle_core::CudaStorage,
        q_layout: &Layout,
        k: &candle_core::CudaStorage,
        k_layout: &Layout,
        v: &candle_core::CudaStorage,
        v_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use crate::cuda::ops::{attention, Operand};
        let operand = |storage, layout| Operand { storage, layout };
        let qkv = [
            operand(q, q_layout),
            operand(k, k_layout),
            operand(v, v_layout),
        ];
        let (out, lse) = attention::forward(qkv, self.settings)?;
        let _ = self.lse.set(lse);
        Ok((out, q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (qkv, lse) = ([q, k, v], self.lse()?);
        let [of_q, of_k, of_v] = match q.dtype() {
            #[cfg(feature = "cuda")]
            _ if q.device().is_cuda() => {
                let upstream = readable(&upstream.contiguous()?)?;
                let rows = [result, &upstream, lse];
                crate::cuda::ops::attention::backward(qkv, rows, self.settings)?
            }
            dtype => {
                let upstream = upstream.contiguous()?;
                let rows = [result, &upstream, lse];
                match dtype {
                    DType::F64 => cpu::backward::<f64>(qkv, rows, &self.settings, &self.sizes)?,
                    _ => cpu::backward::<f32>(qkv, rows, &self.settings, &self.sizes)?,
                }
            }
        };
        Ok((Some(of_q), Some(of_k), Some(of_v)))
    }
}
