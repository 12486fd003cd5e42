//! The operations of a decoder around its products, with a backward, for any Candle model (feature `models`).
//!
//! Candle's own fused forms ([`candle_nn::ops::rms_norm`], [`candle_nn::rotary_emb::rope`], `sdpa`) have none: a model
//! made of them cannot be trained, and says nothing. Its forms that have one are chains of small operations, each of
//! which keeps its result for the backward; attention so keeps all scores, a number for every pair of positions.
//!
//! | | |
//! |---|---|
//! | [`attention`] | grouped heads, causal or not, sliding window, softcap; memory that grows with the length, not its square |
//! | [`rms_norm`], [`add_rms_norm`] | both kinds of weight; with a residual added on the way |
//! | [`rope`] | rotary embedding of all or the first dimensions of a head |
//! | [`swiglu`], [`geglu`] | gated activations |
//! | [`embedding`] | rows of a table; its gradient summed in f32, added to that of a tied head in place |
//!
//! On CUDA (compute capability 8.0 and later) each is one kernel forward and few backward, for bf16, f16 and f32 with f32
//! inside. On the CPU they run on all threads, in f32 or f64; half precision is widened to f32 and rounded once at the
//! end. Elsewhere, Metal or f64 on CUDA, they are Candle operations. No kernel adds to memory that another adds to: a run
//! repeats bit by bit.
//!
//! Heads come as `(batch, time, heads, head_dim)`, what a projection's rows `(batch * time, heads * head_dim)` are
//! without moving anything.

pub(crate) mod activation;
pub(crate) mod angles;
pub(crate) mod attention;
pub(crate) mod cpu;
pub(crate) mod embedding;
pub(crate) mod gated;
pub(crate) mod rms_norm;
pub(crate) mod rope;

pub use attention::{attention, AttentionOptions};
pub use embedding::embedding;
pub use gated::{geglu, swiglu};
pub use rms_norm::{add_rms_norm, rms_norm};
pub use rope::rope;

use candle_core::{bail, DType, Layout, Result, Tensor};

/// Where an operation is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// This crate's CPU functions or CUDA kernels.
    Here,
    /// This crate's CPU functions, on f32 copies.
    Widened,
    /// Candle's operations.
    Candle,
}

impl Place {
    /// # Errors
    /// A dtype that is not a float, a tensor without numbers.
    fn of(name: &str, x: &Tensor) -> Result<Self> {
        if x.elem_count() == 0 {
            bail!("{name}: no numbers in a tensor of shape {:?}", x.dims())
        }
        Ok(match (x.device().is_cpu(), x.dtype()) {
            (_, dtype) if !matches!(dtype, DType::BF16 | DType::F16 | DType::F32 | DType::F64) => {
                bail!("{name}: expected bf16, f16, f32 or f64, got {dtype:?}")
            }
            (true, DType::BF16 | DType::F16) => Place::Widened,
            (true, _) => Place::Here,
            #[cfg(feature = "cuda")]
            (false, _) if crate::cuda::ops::can_run(x)? => Place::Here,
            _ => Place::Candle,
        })
    }
}

/// # Errors
/// Another tensor that is not of the dtype, or not on the device, of `x`.
fn check_alike(name: &str, x: &Tensor, others: &[(&str, &Tensor)]) -> Result<()> {
    for (what, other) in others {
        if other.dtype() != x.dtype() {
            bail!(
                "{name}: {what} is {:?}, expected {:?} as the others are",
                other.dtype(),
                x.dtype()
            )
        }
        if !other.device().same_device(x.device()) {
            bail!(
                "{name}: {what} is on {:?}, expected {:?} where the others are (clones of one device are the same, two calls of `new_cuda` are not)",
                other.device().location(),
                x.device().location()
            )
        }
    }
    Ok(())
}

/// What is computed in on this dtype.
fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// A tensor as rows: all dimensions but the last, which is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rows {
    pub count: usize,
    pub columns: usize,
    /// Numbers from one row to the next.
    pub stride: usize,
}

impl Rows {
    /// # Errors
    /// Rows that are not equally far apart.
    pub fn of(layout: &Layout) -> Result<Self> {
        match Self::find(layout) {
            Some(rows) => Ok(rows),
            None => bail!("no rows at equal distances: {layout:?}"),
        }
    }

    fn find(layout: &Layout) -> Option<Self> {
        let (dims, strides) = (layout.dims(), layout.stride());
        let (&columns, lead) = dims.split_last()?;
        if columns > 1 && strides[lead.len()] != 1 {
            return None;
        }
        let (mut count, mut stride) = (1, columns);
        for (&dim, &apart) in lead.iter().zip(strides).rev().filter(|(dim, _)| **dim != 1) {
            if count == 1 {
                stride = apart;
            } else if apart != stride * count {
                return None;
            }
            count *= dim;
        }
        Some(Self {
            count,
            columns,
            stride,
        })
    }

    /// The tensor itself where it has rows, else a contiguous copy.
    fn made(tensor: &Tensor) -> Result<Tensor> {
        match Self::find(tensor.layout()) {
            Some(_) => Ok(tensor.clone()),
            None => tensor.contiguous(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::Rows;
    use candle_core::{DType, Device, Result, Tensor, Var};

    pub(crate) fn random(shape: &[usize]) -> Result<Var> {
        Var::randn(0f64, 1., shape, &Device::Cpu)
    }

    /// Fails where two results, or the gradients of these variables through them, differ by more than f64 rounds.
    pub(crate) fn assert_same(here: &Tensor, there: &Tensor, vars: &[&Var]) -> Result<()> {
        let weights = Tensor::randn(0f64, 1., here.shape(), &Device::Cpu)?;
        let of_here = (here * &weights)?.sum_all()?.backward()?;
        let of_there = (there * &weights)?.sum_all()?.backward()?;
        let mut pairs = vec![(here, there)];
        for var in vars {
            match (of_here.get(var), of_there.get(var)) {
                (Some(here), Some(there)) => pairs.push((here, there)),
                _ => candle_core::bail!("a gradient is missing"),
            }
        }
        for (i, (here, there)) in pairs.into_iter().enumerate() {
            let off = (here - there)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(off < 1e-12, "result or gradient {i} is off by {off:e}");
        }
        Ok(())
    }

    #[test]
    fn rows_of_views_are_found_or_made() -> Result<()> {
        let x = Tensor::zeros((2, 3, 10), DType::F32, &Device::Cpu)?;
        let rows = |count, columns, stride| {
            Some(Rows {
                count,
                columns,
                stride,
            })
        };
        assert_eq!(Rows::find(x.layout()), rows(6, 10, 10));
        assert_eq!(Rows::find(x.narrow(2, 5, 5)?.layout()), rows(6, 5, 10));
        assert_eq!(Rows::find(x.narrow(1, 1, 1)?.layout()), rows(2, 10, 30));
        assert_eq!(Rows::find(x.narrow(1, 0, 2)?.layout()), None);
        let turned = x.transpose(1, 2)?;
        assert_eq!(Rows::find(turned.layout()), None);
        assert_eq!(Rows::find(Rows::made(&turned)?.layout()), rows(20, 3, 3));
        Ok(())
    }
}
