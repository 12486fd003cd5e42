//! A small head with the character of a whole one: how much of the probability each tile of classes has, row by row.
//!
//! Its rows are the first of the whole. Its classes are blocks of [`BLOCK`] neighbours, spread evenly over the whole's, and
//! one class more that stands for all others: it has their mass together and is the target where one of them is. So the
//! classes of the blocks have the probabilities that they have in the whole.
//!
//! Its dimensions are those that hold the most of these logits: the truncated singular value decomposition, each row less its
//! mean, which no softmax sees. What is lost that way is noise on the logits.

use super::Head;
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, D};

#[derive(Clone, Copy)]
pub struct Sizes {
    pub rows: usize,
    pub blocks: usize,
    pub dims: usize,
}

/// Classes of a block, those of a tile of the filter.
const BLOCK: usize = 128;
/// How often the subspace is improved.
const ITERATIONS: usize = 30;

/// The cut, and the norm of what its logits lack relative to theirs.
pub fn cut(whole: &Head, sizes: Sizes) -> Result<(Head, f64)> {
    let Sizes { rows, blocks, dims } = sizes;
    let ((n, _), v) = (whole.embeddings.dims2()?, whole.classifier.dim(0)?);
    let (all, classes) = (v / BLOCK, blocks * BLOCK + 1);
    ensure!(
        rows <= n && blocks < all && dims <= rows.min(classes - 1),
        "--cut {rows},{blocks},{dims} needs {rows} rows of {n}, less than {all} blocks, and at most {} dimensions",
        rows.min(classes - 1)
    );
    let ids = (0..blocks).flat_map(|block| (block * all / blocks * BLOCK..).take(BLOCK));
    let ids: Vec<i64> = ids.map(|id| id as i64).collect();
    let place = |id| ids.binary_search(id).unwrap_or(ids.len()) as i64;
    let targets = whole.targets[..rows].iter().map(place).collect();

    let embeddings = whole.embeddings.narrow(0, 0, rows)?;
    let logits = embeddings.matmul(&whole.classifier.t()?)?;
    let logits = logits.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let of_blocks = logits.index_select(&Tensor::new(ids.as_slice(), &Device::Cpu)?, 1)?;
    let lse = logits.log_sum_exp(D::Minus1)?;
    let mass = (of_blocks.log_sum_exp(D::Minus1)? - &lse)?.exp()?;
    let others = (lse + mass.affine(-1., 1.)?.maximum(1e-9)?.log()?)?.unsqueeze(1)?;
    let logits = Tensor::cat(&[of_blocks, others], 1)?;
    let logits = logits.broadcast_sub(&logits.mean_keepdim(D::Minus1)?)?;

    // Nearly all rows have most of their mass in the class of the others: it is to be right to the digit.
    let weight = (classes as f64).sqrt();
    let weights = (0..classes).map(|class| if class + 1 < classes { 1. } else { weight });
    let weights = Tensor::from_iter(weights, &Device::Cpu)?;
    let basis = subspace(&logits.broadcast_mul(&weights)?, dims)?;
    // logits ~ basis basis^T logits, so basis^T logits is the classifier, up to a scale for both.
    let classifier = logits.t()?.matmul(&basis)?;
    let lost = (&logits - basis.matmul(&classifier.t()?)?)?;
    let lost = norm(&lost)? / norm(&logits)?;
    let scale = (rows as f64).sqrt();
    let head = Head {
        embeddings: (basis * scale)?.to_dtype(DType::F32)?,
        classifier: (classifier / scale)?.to_dtype(DType::F32)?,
        targets,
        softcap: None,
    };
    Ok((head, lost))
}

/// An orthonormal basis, `(rows, dims)`, of the space of `z`'s largest left singular vectors.
fn subspace(z: &Tensor, dims: usize) -> Result<Tensor> {
    let gram = z.matmul(&z.t()?)?;
    let mut basis = gram.narrow(1, 0, dims)?;
    for _ in 0..ITERATIONS {
        basis = gram.matmul(&orthonormal(&basis)?)?;
    }
    orthonormal(&basis)
}

/// Gram and Schmidt's basis of the columns, twice for its rounding.
fn orthonormal(columns: &Tensor) -> Result<Tensor> {
    let mut rows: Vec<Vec<f64>> = columns.t()?.to_vec2()?;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for i in 0..rows.len() {
        let (before, rest) = rows.split_at_mut(i);
        let row = &mut rest[0];
        for other in before.iter().chain(before.iter()) {
            let share = dot(row, other);
            row.iter_mut().zip(other).for_each(|(x, y)| *x -= share * y);
        }
        let length = dot(row, row).sqrt();
        ensure!(
            length > 0.,
            "the logits have fewer than {} dimensions",
            columns.dim(1)?
        );
        row.iter_mut().for_each(|x| *x /= length);
    }
    let shape = (rows.len(), columns.dim(0)?);
    let values = rows.concat();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?
        .t()?
        .contiguous()?)
}

fn norm(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}
