//! A small head with the character of a whole one.
//!
//! Its rows are the first of the whole; its classes are the rows' targets and, spread evenly between them, others, all in
//! the order of their ids. So likely classes lie among unlikely ones, and positions of one text beside each other, as they
//! do in the whole. What is lost is most of the many classes that are never likely, and with them their share of the mass.
//!
//! Its dimensions are those that hold the most of the logits: the truncated singular value decomposition of the rows'
//! logits, each row less its mean, which no softmax sees.

use super::Head;
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, D};
use std::collections::BTreeSet;

#[derive(Clone, Copy)]
pub struct Sizes {
    pub rows: usize,
    pub classes: usize,
    pub dims: usize,
}

/// How often the subspace is improved.
const ITERATIONS: usize = 30;

/// The cut, and the norm of what its logits lack relative to theirs.
pub fn cut(whole: &Head, sizes: Sizes) -> Result<(Head, f64)> {
    let Sizes {
        rows,
        classes,
        dims,
    } = sizes;
    let ((n, d), v) = (whole.embeddings.dims2()?, whole.classifier.dim(0)?);
    ensure!(
        rows <= n && classes <= v && dims <= d.min(rows).min(classes),
        "--cut {rows},{classes},{dims} is more than N = {n}, V = {v} and D = {d} have"
    );
    let targets = &whole.targets[..rows];
    let mut ids: BTreeSet<i64> = targets.iter().copied().collect();
    ensure!(
        ids.len() <= classes,
        "{rows} rows have {} targets, more than {classes} classes",
        ids.len()
    );
    let (others, wanted) = (v - ids.len(), classes - ids.len());
    let taken = |i: usize| (i + 1) * wanted / others != i * wanted / others;
    let free: Vec<i64> = (0..v as i64).filter(|id| !ids.contains(id)).collect();
    ids.extend(
        free.into_iter()
            .enumerate()
            .filter(|(i, _)| taken(*i))
            .map(|(_, id)| id),
    );
    let ids: Vec<i64> = ids.into_iter().collect();
    let targets = targets
        .iter()
        .map(|id| ids.partition_point(|other| other < id) as i64);
    let targets = targets.collect();

    let at = Tensor::new(ids, whole.classifier.device())?;
    let f64_of = |tensor: Tensor| tensor.to_dtype(DType::F64)?.to_device(&Device::Cpu);
    let e = f64_of(whole.embeddings.narrow(0, 0, rows)?)?;
    let c = f64_of(whole.classifier.index_select(&at, 0)?)?;
    let logits = e.matmul(&c.t()?)?;
    let logits = logits.broadcast_sub(&logits.mean_keepdim(D::Minus1)?)?;
    let basis = subspace(&logits, dims)?;
    // logits ~ basis basis^T logits, so basis^T logits is the classifier, up to a scale for both.
    let classifier = logits.t()?.matmul(&basis)?;
    let lost = (&logits - basis.matmul(&classifier.t()?)?)?;
    let lost = (norm(&lost)? / norm(&logits)?).min(1.);
    let scale = (rows as f64).sqrt();
    let head = Head {
        embeddings: (basis * scale)?.to_dtype(DType::F32)?,
        classifier: (classifier / scale)?.to_dtype(DType::F32)?,
        targets,
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
