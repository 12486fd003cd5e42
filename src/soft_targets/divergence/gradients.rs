//! The gradients of a head while they are summed up over blocks of rows.

use super::add_product::AddProduct;
use crate::blocks::blocks;
use crate::matrices::Matrices;
use crate::op::contract::{Gradients, Wanted};
use candle_core::{DType, Result, Tensor};

pub(super) struct HeadGradient<'a> {
    classifier: &'a Tensor,
    wanted: Wanted,
    /// Of the blocks so far, in the dtype of the embeddings.
    of_embeddings: Vec<Tensor>,
    /// `(V, D)`, in the dtype that is computed in.
    of_classifier: Option<Tensor>,
    /// `(1, V)`
    of_bias: Option<Tensor>,
}

impl<'a> HeadGradient<'a> {
    /// `dtype` is what is computed in.
    pub fn new(matrices: &'a Matrices<Tensor>, dtype: DType, wanted: Wanted) -> Result<Self> {
        let classifier = &matrices.classifier;
        let (vocab, device) = (classifier.dim(0)?, classifier.device());
        let zeros = |wanted: bool, rows, columns| {
            wanted
                .then(|| Tensor::zeros((rows, columns), dtype, device))
                .transpose()
        };
        Ok(Self {
            classifier,
            wanted,
            of_embeddings: Vec::new(),
            of_classifier: zeros(wanted.classifier, vocab, classifier.dim(1)?)?,
            of_bias: zeros(wanted.bias, 1, vocab)?,
        })
    }

    /// Adds a block's: `g` `(rows, V)` is the gradient of its products, `e` `(rows, D)` its embeddings. `classes` are
    /// taken at a time.
    pub fn add(&mut self, g: &Tensor, e: &Tensor, classes: usize) -> Result<()> {
        if self.wanted.embeddings {
            let sums = self.times_classifier(g, classes)?;
            self.of_embeddings
                .push(sums.to_dtype(self.classifier.dtype())?);
        }
        if let Some(sums) = &self.of_classifier {
            add_product(sums, g, e, classes)?;
        }
        if let Some(sums) = &mut self.of_bias {
            let ones = Tensor::ones((1, g.dim(0)?), g.dtype(), g.device())?;
            *sums = (&*sums + ones.matmul(g)?)?;
        }
        Ok(())
    }

    /// `g C`
    fn times_classifier(&self, g: &Tensor, classes: usize) -> Result<Tensor> {
        if self.classifier.dtype() == g.dtype() {
            return g.matmul(self.classifier);
        }
        let shape = (g.dim(0)?, self.classifier.dim(1)?);
        let mut sums = Tensor::zeros(shape, g.dtype(), g.device())?;
        for classes in blocks(self.classifier.dim(0)?, classes) {
            let block = self.classifier.narrow(0, classes.start, classes.len())?;
            let g = g.narrow(1, classes.start, classes.len())?.contiguous()?;
            sums = (sums + g.matmul(&block.to_dtype(g.dtype())?)?)?;
        }
        Ok(sums)
    }

    /// The gradients in the dtypes and shapes of the matrices. `index` tells which rows the blocks were, if not all.
    pub fn finish(self, matrices: &Matrices<Tensor>, index: Option<&Tensor>) -> Result<Gradients> {
        let dtype = self.classifier.dtype();
        let of_embeddings = match (self.wanted.embeddings, self.of_embeddings.is_empty()) {
            (false, _) => None,
            (true, true) => Some(matrices.embeddings.zeros_like()?),
            (true, false) => {
                let rows = Tensor::cat(&self.of_embeddings, 0)?;
                Some(match index {
                    None => rows,
                    Some(index) => matrices
                        .embeddings
                        .zeros_like()?
                        .index_add(index, &rows, 0)?,
                })
            }
        };
        Ok(Gradients {
            embeddings: of_embeddings,
            classifier: match self.of_classifier {
                Some(sums) => Some(sums.to_dtype(dtype)?),
                None => None,
            },
            bias: match self.of_bias {
                Some(sums) => Some(sums.flatten_all()?.to_dtype(dtype)?),
                None => None,
            },
        })
    }
}

/// `sums += g^T e`, in place.
fn add_product(sums: &Tensor, g: &Tensor, e: &Tensor, classes: usize) -> Result<()> {
    if sums.device().is_cpu() {
        return sums.inplace_op3(g, e, &AddProduct);
    }
    for classes in blocks(sums.dim(0)?, classes) {
        let g = g
            .narrow(1, classes.start, classes.len())?
            .t()?
            .contiguous()?;
        let sum = (sums.narrow(0, classes.start, classes.len())? + g.matmul(e)?)?;
        sums.slice_set(&sum, 0, classes.start)?;
    }
    Ok(())
}
