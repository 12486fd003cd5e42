//! In Candle tensor operations, a block of rows at a time.

use crate::blocks::blocks;
use crate::matrices::Matrices;
use crate::op::contract::{accumulator, Gradients, Wanted};
use candle_core::{DType, Result, Tensor};
use std::ops::Range;

/// Bytes of the temporaries of a block.
const WORKSPACE: usize = 64 << 20;

/// The classes of all rows on their device, `(rows * k)`.
pub(super) struct Classes {
    /// u32; 0 for one that does not exist.
    index: Tensor,
    /// Whether it exists, u8.
    exists: Tensor,
}

impl Classes {
    /// `classes` is i64.
    pub fn new(classes: &Tensor, vocab: usize) -> Result<Self> {
        let exists = (classes.ge(0i64)? * classes.lt(vocab as i64)?)?;
        let index = exists.where_cond(classes, &classes.zeros_like()?)?;
        Ok(Self {
            index: index.to_dtype(DType::U32)?,
            exists,
        })
    }
}

/// A block of rows: their embeddings `(rows, D)`, the indices of their classes `(rows * k)` and these rows of the
/// classifier `(rows, k, D)`, in accumulator dtype.
struct Block {
    embeddings: Tensor,
    index: Tensor,
    classifier: Tensor,
}

impl Block {
    fn new(
        matrices: Matrices<&Tensor>,
        classes: &Classes,
        k: usize,
        rows: &Range<usize>,
    ) -> Result<Self> {
        let acc = accumulator(matrices.embeddings.dtype());
        let index = classes.index.narrow(0, rows.start * k, rows.len() * k)?;
        let classifier = matrices.classifier.index_select(&index, 0)?;
        Ok(Self {
            embeddings: matrices
                .embeddings
                .narrow(0, rows.start, rows.len())?
                .to_dtype(acc)?,
            index,
            classifier: classifier.to_dtype(acc)?.reshape((rows.len(), k, ()))?,
        })
    }
}

/// Rows of a block. `(rows * k, D)` are at most the selected classifier, in both dtypes, what is added to its gradient and
/// where.
fn rows_of_block(matrices: Matrices<&Tensor>, k: usize) -> Result<usize> {
    let hidden = matrices.classifier.dim(1)?;
    let size = matrices.classifier.dtype().size_in_bytes();
    let acc = accumulator(matrices.classifier.dtype()).size_in_bytes();
    Ok((WORKSPACE / (k * hidden * (size + 2 * acc + 4))).max(1))
}

/// The products and the bias, `(rows, k)`, f32; NaN of a class that does not exist.
pub(super) fn products(matrices: Matrices<&Tensor>, classes: &Classes, k: usize) -> Result<Tensor> {
    let n = matrices.embeddings.dim(0)?;
    let mut all = Vec::new();
    for rows in blocks(n, rows_of_block(matrices, k)?) {
        let block = Block::new(matrices, classes, k, &rows)?;
        let mut z = block
            .classifier
            .matmul(&block.embeddings.unsqueeze(2)?)?
            .squeeze(2)?;
        if let Some(bias) = matrices.bias {
            let bias = bias.index_select(&block.index, 0)?.to_dtype(z.dtype())?;
            z = (z + bias.reshape((rows.len(), k))?)?;
        }
        all.push(z.to_dtype(DType::F32)?);
    }
    let z = Tensor::cat(&all, 0)?;
    let nan = Tensor::full(f32::NAN, z.shape(), z.device())?;
    classes.exists.reshape((n, k))?.where_cond(&z, &nan)
}

/// `upstream` `(rows, k)` is the gradient of the products.
pub(super) fn gradients(
    matrices: Matrices<&Tensor>,
    classes: &Classes,
    upstream: &Tensor,
    wanted: Wanted,
) -> Result<Gradients> {
    let (n, k) = upstream.dims2()?;
    let dtype = matrices.classifier.dtype();
    let acc = accumulator(dtype);
    let upstream = upstream.to_dtype(acc)?;
    let exists = classes.exists.reshape((n, k))?;
    let g = exists.where_cond(&upstream, &upstream.zeros_like()?)?;
    let zeros = |wanted: bool, of: Option<&Tensor>| match of {
        Some(of) if wanted => Tensor::zeros(of.shape(), acc, of.device()).map(Some),
        _ => Ok(None),
    };
    let dc = zeros(wanted.classifier, Some(matrices.classifier))?;
    let db = zeros(wanted.bias, matrices.bias)?;
    let mut de = Vec::new();
    for rows in blocks(n, rows_of_block(matrices, k)?) {
        let block = Block::new(matrices, classes, k, &rows)?;
        let g = g.narrow(0, rows.start, rows.len())?;
        if wanted.embeddings {
            let sums = g.unsqueeze(1)?.matmul(&block.classifier)?.squeeze(1)?;
            de.push(sums.to_dtype(dtype)?);
        }
        if let Some(dc) = &dc {
            // Rows without a gradient add nothing, whatever (NaN, infinity) their embeddings are.
            let used = g.abs()?.sum_keepdim(1)?.ne(0f64)?;
            let e = &block.embeddings;
            let e = used
                .broadcast_as(e.shape())?
                .where_cond(e, &e.zeros_like()?)?;
            let terms = g.unsqueeze(2)?.broadcast_mul(&e.unsqueeze(1)?)?;
            let terms = terms.reshape((rows.len() * k, ()))?;
            let index = block.index.unsqueeze(1)?.broadcast_as(terms.shape())?;
            dc.scatter_add_set(&index.contiguous()?, &terms, 0)?;
        }
        if let Some(db) = &db {
            db.scatter_add_set(&block.index, &g.flatten_all()?, 0)?;
        }
    }
    let rounded = |sums: Option<Tensor>| sums.map(|sums| sums.to_dtype(dtype)).transpose();
    Ok(Gradients {
        embeddings: match wanted.embeddings {
            true => Some(Tensor::cat(&de, 0)?),
            false => None,
        },
        classifier: rounded(dc)?,
        bias: rounded(db)?,
    })
}
