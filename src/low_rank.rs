//! A low-rank adapter of the classifier, `C + scale B A`, that is never formed.
//!
//! `E (C + scale B A)^T = E C^T + U B^T` with `U = scale E A^T`: the product of the embeddings with `U` beside them and
//! the classifier with `B` beside it. So an implementation is given embeddings of more columns, a copy of the user's:
//!
//! ```text
//! embeddings  (rows, W)  [ E | 0 | U ]     W = D rounded up to a multiple of 64, plus r
//! classifier  (V, D)     [ C ]
//! adapter     (V, r)             [ B ]     r rounded up to a multiple of 8 by columns of zeros
//! ```
//!
//! and where it multiplies by the classifier it takes the adapter's columns after the classifier's. The gradient of the
//! embeddings is as wide as they are, and that of the adapter comes in the place of the classifier's.

use crate::devices::same_device;
use crate::node::{attach, Node};
use crate::op::contract::accumulator;
use candle_core::{bail, DType, Result, Tensor, D};
use std::fmt;
use std::sync::Arc;

/// Where an adapter's columns begin is a multiple of this: the kernels read 64 columns at a time.
const ALIGNMENT: usize = 64;
/// What the rank is rounded up to, so that rows of half-precision numbers begin on 16 bytes.
const RANKS: usize = 8;

/// A low-rank adapter (LoRA) of a frozen classifier `C`, which stands for
///
/// ```text
/// C + scale B A,   A (r, D), B (V, r)
/// ```
///
/// without a matrix of the size of `C`: see [`Options::adapter`](crate::Options::adapter).
///
/// The products are computed in the dtype of the embeddings, to which `scale A`, `E (scale A)^T` and `B` are rounded. `A`
/// and `B` may be f32 beside embeddings and a classifier of bf16, and their gradients are in their own dtypes.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_cut_cross_entropy::{backward, linear_cross_entropy, LowRank, Options};
///
/// # fn main() -> candle_core::Result<()> {
/// let (rank, alpha) = (4, 8.);
/// let hidden = Tensor::randn(0f32, 1., (16, 64), &Device::Cpu)?;
/// let head = Tensor::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?; // frozen
/// let a = Var::randn(0f32, 0.1, (rank, 64), &Device::Cpu)?;
/// let b = Var::zeros((1000, rank), DType::F32, &Device::Cpu)?;
/// let targets = Tensor::zeros(16, DType::I64, &Device::Cpu)?;
/// let options = Options::default().adapter(LowRank::new(&a, &b, alpha / rank as f64));
/// let loss = linear_cross_entropy(&hidden, &head, &targets, &options)?.loss;
/// assert_eq!(backward(&loss)?.get(&b).unwrap().dims(), [1000, rank]);
/// # Ok(())
/// # }
/// ```
///
/// Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*,
/// [arXiv 2106.09685](https://arxiv.org/abs/2106.09685).
#[derive(Clone)]
pub struct LowRank {
    a: Tensor,
    b: Tensor,
    scale: f64,
    input: Option<Arc<Input>>,
}

type Input = dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync;

impl fmt::Debug for LowRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LowRank")
            .field("a", &self.a)
            .field("b", &self.b)
            .field("scale", &self.scale)
            .finish_non_exhaustive()
    }
}

impl LowRank {
    /// `A` `(r, D)` and `B` `(V, r)`, in bf16, f16, f32 or f64, and what their product is multiplied by.
    pub fn new(a: &Tensor, b: &Tensor, scale: f64) -> Self {
        Self {
            a: a.clone(),
            b: b.clone(),
            scale,
            input: None,
        }
    }

    /// What `A` multiplies instead of the embeddings, of their shape, which is `(rows, D)`, and dtype: a dropout of them,
    /// say. Each call of the loss calls it once, as does one of
    /// [`LinearCrossEntropy::logits`](crate::LinearCrossEntropy::logits); on shards of the classes it must do the same on every
    /// rank.
    pub fn input(
        mut self,
        input: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Self {
        self.input = Some(Arc::new(input));
        self
    }

    /// # Errors
    /// An input that is not like embeddings, and those of making it.
    fn input_of(&self, embeddings: &Tensor) -> Result<Option<Tensor>> {
        let Some(input) = &self.input else {
            return Ok(None);
        };
        let input = input(embeddings)?;
        if input.dims() != embeddings.dims() || input.dtype() != embeddings.dtype() {
            bail!(
                "the input of an adapter must be like embeddings {:?} of {:?}, got {:?} of {:?}",
                embeddings.dims(),
                embeddings.dtype(),
                input.dims(),
                input.dtype()
            )
        }
        same_device("the input of the adapter", &input, "embeddings", embeddings)?;
        input.contiguous().map(Some)
    }

    /// What the adapter adds to the logits `(rows, V)` of embeddings `(rows, D)`, before their bias: stored.
    pub(crate) fn logits(&self, embeddings: &Tensor) -> Result<Tensor> {
        let (a, b) = self.rounded(embeddings.dtype())?;
        let input = self.input_of(embeddings)?;
        let input = input.as_ref().unwrap_or(embeddings);
        input.matmul(&a.t()?)?.matmul(&b.t()?)
    }

    /// # Errors
    /// What does not match: it is named.
    pub(crate) fn check(&self, embeddings: &Tensor, classifier: &Tensor) -> Result<()> {
        let (vocab, hidden) = classifier.dims2()?;
        let (a, b) = (self.a.dims(), self.b.dims());
        let rank = a.first().copied().unwrap_or_default();
        if rank == 0 || a != [rank, hidden] || b != [vocab, rank] {
            bail!(
                "an adapter of classifier {:?} must have A (r, {hidden}) and B ({vocab}, r), got {a:?} and {b:?}",
                classifier.dims()
            )
        }
        for (name, tensor) in [("A of the adapter", &self.a), ("B of the adapter", &self.b)] {
            let floats = [DType::BF16, DType::F16, DType::F32, DType::F64];
            if !floats.contains(&tensor.dtype()) {
                bail!(
                    "{name} must be bf16, f16, f32 or f64, got {:?}",
                    tensor.dtype()
                )
            }
            same_device(name, tensor, "embeddings", embeddings)?;
        }
        if !(self.scale as f32).is_finite() {
            bail!(
                "the scale of an adapter must be finite, as an f32 too, got {}",
                self.scale
            )
        }
        if classifier.track_op() {
            bail!("a classifier with an adapter is frozen: detach it, or leave the adapter out")
        }
        Ok(())
    }

    /// `scale A` and `B` in a dtype, contiguous.
    fn rounded(&self, dtype: DType) -> Result<(Tensor, Tensor)> {
        let a = match self.scale {
            1. => self.a.clone(),
            // Candle rounds the factor to the dtype of what it multiplies.
            scale => (self.a.to_dtype(accumulator(self.a.dtype()))? * scale)?,
        };
        let (a, b) = (a.to_dtype(dtype)?, self.b.to_dtype(dtype)?);
        Ok((a.contiguous()?, b.contiguous()?))
    }

    /// The embeddings `(rows, W)` and the adapter `(V, r)` as implementations take them, of contiguous embeddings
    /// `(rows, D)`.
    pub(crate) fn widen(&self, embeddings: &Tensor) -> Result<(Tensor, Tensor)> {
        let (a, b) = self.rounded(embeddings.dtype())?;
        let missing = a.dim(0)?.next_multiple_of(RANKS) - a.dim(0)?;
        let a = a.pad_with_zeros(0, 0, missing)?;
        let b = b.pad_with_zeros(D::Minus1, 0, missing)?.contiguous()?;
        let input = self.input_of(embeddings)?;
        let arguments: Vec<&Tensor> = [embeddings, &a].into_iter().chain(&input).collect();
        let value = widened(&arguments)?;
        let wide = match arguments.iter().any(|argument| argument.track_op()) {
            true => attach(value, &arguments, Widen)?,
            false => value,
        };
        Ok((wide, b))
    }
}

/// `[E | 0 | X A^T]` of `E`, `A` and, where that is not `E`, `X`, outside of their graph.
fn widened(arguments: &[&Tensor]) -> Result<Tensor> {
    let (embeddings, a) = (arguments[0].detach(), arguments[1].detach());
    let (rows, hidden) = embeddings.dims2()?;
    let input = arguments.get(2).map_or(embeddings.clone(), |x| x.detach());
    let inner = input.matmul(&a.t()?)?;
    let between = hidden.next_multiple_of(ALIGNMENT) - hidden;
    if between == 0 {
        return Tensor::cat(&[embeddings, inner], 1);
    }
    let zeros = Tensor::zeros((rows, between), a.dtype(), a.device())?;
    Tensor::cat(&[embeddings, zeros, inner], 1)
}

/// A copy of the first columns of a wider matrix: of two parts side by side, which Candle copies row by row. As
/// `contiguous`, or within a sum, it would look up where each number lies.
fn first_columns(matrix: &Tensor, columns: usize) -> Result<Tensor> {
    let half = columns / 2;
    if half == 0 {
        return matrix.narrow(1, 0, columns)?.contiguous();
    }
    let parts = [
        matrix.narrow(1, 0, half)?,
        matrix.narrow(1, half, columns - half)?,
    ];
    Tensor::cat(&parts, 1)
}

/// As [`widened`]. As Candle's operations, each part would be added to zeros, and computed where nobody wants it.
struct Widen;

impl Node for Widen {
    const NAME: &'static str = "widened-embeddings";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let (embeddings, a) = (arguments[0], arguments[1].detach());
        let (rank, hidden) = a.dims2()?;
        let upstream = upstream.detach();
        let of_inner = upstream.narrow(1, upstream.dim(1)? - rank, rank)?;
        let of_inner = of_inner.contiguous()?;
        let input = arguments.get(2).copied();
        let through_a = |wanted: bool| match wanted {
            true => of_inner.matmul(&a).map(Some),
            false => Ok(None),
        };
        let mut gradients = vec![
            match embeddings.track_op() {
                false => None,
                true => {
                    let direct = first_columns(&upstream, hidden)?;
                    Some(match through_a(input.is_none())? {
                        Some(through_a) => (direct + through_a)?,
                        None => direct,
                    })
                }
            },
            match arguments[1].track_op() {
                false => None,
                true => {
                    let input = input.unwrap_or(embeddings).detach();
                    Some(of_inner.t()?.matmul(&input)?)
                }
            },
        ];
        if let Some(input) = input {
            gradients.push(through_a(input.track_op())?);
        }
        Ok(gradients)
    }
}
