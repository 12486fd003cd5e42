//! Blocks of rows and classes, and their logits.

use crate::matrices::Matrices;
use crate::native::rows::HostRows;
use crate::op::contract::accumulator;
use crate::problem::Settings;
use crate::terms::{Terms, LEAST_REST};
use candle_core::{DType, Device, Result, Tensor};
use std::ops::Range;

/// [`HostRows`] and their lists as tensors `(n)` of u32.
pub(super) struct DeviceRows {
    pub rows: HostRows,
    pub embedding: Tensor,
    pub position: Tensor,
    target: Tensor,
    /// `(6, n)`, accumulator dtype: the fields of a row's [`Terms`], in their order.
    terms: Tensor,
}

impl DeviceRows {
    pub fn new(rows: HostRows, dtype: DType, device: &Device) -> Result<Self> {
        let factors: [fn(Terms) -> f64; 6] = [
            |t| t.nll,
            |t| t.lse,
            |t| t.square,
            |t| t.rest,
            |t| t.named,
            |t| t.entropy,
        ];
        let of_rows = |factor: fn(Terms) -> f64| {
            let factors = (0..rows.len()).map(|row| factor(rows.terms(row)));
            factors.collect::<Vec<_>>()
        };
        let terms: Vec<f64> = factors.into_iter().flat_map(of_rows).collect();
        Ok(Self {
            embedding: Tensor::new(rows.embedding.as_slice(), device)?,
            position: Tensor::new(rows.position.as_slice(), device)?,
            target: Tensor::new(rows.target.as_slice(), device)?,
            terms: Tensor::from_vec(terms, (6, rows.len()), &Device::Cpu)?
                .to_dtype(dtype)?
                .to_device(device)?,
            rows,
        })
    }

    /// The loss of each row, `(n, 1)`, from its nll, lse and, where it is asked for, its entropy.
    pub fn losses(&self, nll: &Tensor, lse: &Tensor, entropy: Option<&Tensor>) -> Result<Tensor> {
        let [of_nll, of_lse, of_square, .., of_entropy] = self.terms()?;
        let loss = keep(&of_nll, &(nll * &of_nll)?)?;
        let loss = (keep(&of_lse, &(lse * &of_lse)?)? + loss)?;
        let loss = (keep(&of_square, &(lse.sqr()? * &of_square)?)? + loss)?;
        match entropy {
            None => Ok(loss),
            Some(entropy) => keep(&of_entropy, &(entropy * &of_entropy)?)? + loss,
        }
    }

    /// What the softmax and the one-hot of each row have in the gradient of its loss, `(n, 1)`.
    pub fn softmax_and_one_hot(&self, lse: &Tensor) -> Result<(Tensor, Tensor)> {
        let [of_nll, of_lse, of_square, of_rest, named, _] = self.terms()?;
        let square = keep(&of_square, &((lse * &of_square)? * 2.)?)?;
        let named = (named - lse)?.exp()?;
        let others = named.affine(-1., 1.)?.maximum(LEAST_REST)?;
        let rest = keep(&of_rest, &((&of_rest * named)? / others)?)?;
        Ok(((((&of_nll + of_lse)? + square)? - rest)?, of_nll))
    }

    /// The classes of rows, `(n)`, as those of positions: [`u32::MAX`] where one does not count.
    pub fn spread_classes(&self, classes: &Tensor) -> Result<Tensor> {
        let none = self.rows.len() as u32;
        let mut row_of = vec![none; self.rows.positions];
        for (row, position) in self.rows.position.iter().enumerate() {
            row_of[*position as usize] = row as u32;
        }
        let device = classes.device();
        let last = Tensor::new(&[u32::MAX], device)?;
        Tensor::cat(&[classes, &last], 0)?.index_select(&Tensor::new(row_of, device)?, 0)
    }

    /// What the entropy has in the loss of each row, `(n, 1)`.
    pub fn entropy_factors(&self) -> Result<Tensor> {
        self.terms().map(|[.., of_entropy]| of_entropy)
    }

    fn terms(&self) -> Result<[Tensor; 6]> {
        let of = |kind: usize| self.terms.get(kind)?.unsqueeze(1);
        Ok([of(0)?, of(1)?, of(2)?, of(3)?, of(4)?, of(5)?])
    }

    /// The rows of this block of embeddings, in accumulator dtype.
    pub fn embeddings(&self, embeddings: &Tensor, block: &Range<usize>) -> Result<Tensor> {
        let block = if self.rows.all {
            embeddings.narrow(0, block.start, block.len())?
        } else {
            let index = self.embedding.narrow(0, block.start, block.len())?;
            embeddings.index_select(&index, 0)?
        };
        block.to_dtype(accumulator(block.dtype()))
    }

    /// For a block of rows and classes: the index of each row's target within the classes, clamped,
    /// and whether it lies there, both `(rows, 1)`; `None` where no target does.
    pub fn targets(
        &self,
        rows: &Range<usize>,
        classes: &Range<usize>,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let here = |t: &u32| classes.contains(&(*t as usize));
        let targets = &self.rows.target[rows.clone()];
        if !targets.iter().any(here) {
            return Ok(None);
        }
        let index: Vec<u32> = targets
            .iter()
            .map(|t| if here(t) { t - classes.start as u32 } else { 0 })
            .collect();
        let inside: Vec<u8> = targets.iter().map(|t| here(t) as u8).collect();
        let device = self.target.device();
        let shape = (rows.len(), 1);
        Ok(Some((
            Tensor::from_vec(index, shape, device)?,
            Tensor::from_vec(inside, shape, device)?,
        )))
    }
}

/// A product with factors, 0 where the factor is: what is infinite makes no NaN there.
fn keep(factor: &Tensor, product: &Tensor) -> Result<Tensor> {
    factor
        .ne(&factor.zeros_like()?)?
        .where_cond(product, &product.zeros_like()?)
}

/// The sizes of the blocks that keep the temporaries of one block within the workspace.
pub(super) struct Blocks {
    pub rows: usize,
    pub classes: usize,
}

impl Blocks {
    /// Temporaries of the size of a block that live at once, at most.
    const COPIES: usize = 6;

    pub fn new(rows: usize, vocab: usize, hidden: usize, size: usize, workspace: usize) -> Self {
        let rows = rows
            .min(1024)
            .min(workspace / 4 / (2 * hidden * size))
            .max(1);
        let classes = workspace / 4 * 3 / (Self::COPIES * rows * size + 2 * hidden * size);
        Self {
            rows,
            classes: classes.clamp(1, vocab),
        }
    }
}

/// Rows of the classifier, as wide as the embeddings, in accumulator dtype.
pub(super) fn classifier(matrices: Matrices<&Tensor>, classes: &Range<usize>) -> Result<Tensor> {
    let block = |t: &Tensor| -> Result<Tensor> {
        t.narrow(0, classes.start, classes.len())?
            .to_dtype(accumulator(t.dtype()))
    };
    let own = block(matrices.classifier)?;
    let Some(adapter) = matrices.adapter else {
        return Ok(own);
    };
    let between = matrices.trained_columns()?.start - own.dim(1)?;
    Tensor::cat(&[own.pad_with_zeros(1, 0, between)?, block(adapter)?], 1)
}

/// The block's logits: bias, scale and softcap applied.
pub(super) fn logits(
    embeddings: &Tensor,
    matrices: Matrices<&Tensor>,
    classes: &Range<usize>,
    settings: &Settings,
) -> Result<Tensor> {
    let mut z = embeddings.matmul(&classifier(matrices, classes)?.t()?)?;
    if let Some(bias) = matrices.bias {
        let bias = bias.narrow(0, classes.start, classes.len())?;
        z = z.broadcast_add(&bias.to_dtype(embeddings.dtype())?)?;
    }
    if settings.logit_scale != 1. {
        z = (z * settings.logit_scale)?;
    }
    match settings.softcap {
        Some(softcap) => (z / softcap)?.tanh()? * softcap,
        None => Ok(z),
    }
}
