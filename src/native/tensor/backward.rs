//! Gradients from logits that are computed again.

use super::blocks::{classifier, logits, Blocks, DeviceRows};
use crate::blocks::blocks;
use crate::matrices::Matrices;
use crate::native::workspace::workspace;
use crate::op::contract::{accumulator, Backward, Gradients, KeptTiles, Wanted};
use crate::op::packed::Packed;
use crate::problem::Settings;
use crate::vocab_parallel::collective::LEAST_LOGARITHM;
use candle_core::{Device, Result, Tensor};
use std::ops::Range;
use std::sync::Arc;

pub(super) struct TensorBackward {
    pub rows: Arc<DeviceRows>,
    /// A row's softmax is `exp(z - max) / sum`: no rounded lse comes between the two. Both `(n, 1)`, accumulator
    /// dtype.
    pub max: Tensor,
    pub sum: Tensor,
    /// The mean of `z - max` by the softmax, `(n, 1)`, where the entropy is asked for: it is `ln sum - mean`.
    pub mean: Option<Tensor>,
    pub layout: Packed,
    pub settings: Settings,
    pub kept: Arc<KeptTiles>,
}

/// What each row's `exp(z - max)` and one-hot are multiplied by, `(n, 1)` each.
struct RowScales {
    exp: Tensor,
    one_hot: Tensor,
    /// What `exp(z - max) (z - max)` is multiplied by: the gradient of the entropy, where it has one.
    log: Option<Tensor>,
}

impl Backward for TensorBackward {
    fn backward(
        &self,
        matrices: Matrices<&Tensor>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        self.kept.set(Tensor::new(&[1f64, 1.], &Device::Cpu)?);
        let dtype = matrices.classifier.dtype();
        let n = self.rows.rows.len();
        if n == 0 {
            return Gradients::zeros(matrices, wanted);
        }
        // Accumulating dE over blocks of classes takes a copy of it in f32 for half-precision inputs.
        let acc = accumulator(dtype);
        let copy = n * matrices.embeddings.dim(1)? * acc.size_in_bytes();
        let scales = self.row_scales(upstream)?;
        if wanted.embeddings
            && (wanted.classifier || wanted.bias)
            && acc != dtype
            && copy > workspace(&self.settings) / 2
        {
            let only_embeddings = Wanted {
                embeddings: true,
                classifier: false,
                bias: false,
            };
            let others = Wanted {
                embeddings: false,
                ..wanted
            };
            return Ok(Gradients {
                embeddings: self
                    .gradients(matrices, &scales, only_embeddings)?
                    .embeddings,
                ..self.gradients(matrices, &scales, others)?
            });
        }
        self.gradients(matrices, &scales, wanted)
    }
}

fn add(sum: Option<Tensor>, term: Tensor) -> Result<Option<Tensor>> {
    match sum {
        Some(sum) => (sum + term).map(Some),
        None => Ok(Some(term)),
    }
}

impl TensorBackward {
    /// The gradients in one pass over the blocks of classes.
    fn gradients(
        &self,
        matrices: Matrices<&Tensor>,
        scales: &RowScales,
        wanted: Wanted,
    ) -> Result<Gradients> {
        let device = matrices.classifier.device();
        let vocab = matrices.classifier.dim(0)?;
        let hidden = matrices.embeddings.dim(1)?;
        let columns = matrices.trained_columns()?;
        let dtype = matrices.classifier.dtype();
        let acc = accumulator(dtype);
        let n = self.rows.rows.len();
        let size = Blocks::new(
            n,
            vocab,
            hidden,
            acc.size_in_bytes(),
            workspace(&self.settings),
        );
        let zeros = |wanted: bool, shape: &[usize], dtype| {
            wanted
                .then(|| Tensor::zeros(shape, dtype, device))
                .transpose()
        };
        let de = zeros(wanted.embeddings, &[n, hidden], acc)?;
        let dc = zeros(wanted.classifier, &[vocab, columns.len()], dtype)?;
        let db = zeros(wanted.bias, &[vocab], dtype)?;
        for classes in blocks(vocab, size.classes) {
            let c = classifier(matrices, &classes)?;
            let (mut dc_block, mut db_block) = (None, None);
            for row_block in blocks(n, size.rows) {
                let e = self.rows.embeddings(matrices.embeddings, &row_block)?;
                let g = self.of_logits(&e, matrices, scales, &row_block, &classes)?;
                if let Some(de) = &de {
                    let sum = (de.narrow(0, row_block.start, row_block.len())? + g.matmul(&c)?)?;
                    de.slice_set(&sum, 0, row_block.start)?;
                }
                if wanted.classifier {
                    let e = e.narrow(1, columns.start, columns.len())?.contiguous()?;
                    dc_block = add(dc_block, g.t()?.matmul(&e)?)?;
                }
                if wanted.bias {
                    db_block = add(db_block, g.sum(0)?)?;
                }
            }
            for (gradient, block) in [(&dc, dc_block), (&db, db_block)] {
                if let (Some(gradient), Some(block)) = (gradient, block) {
                    gradient.slice_set(&block.to_dtype(dtype)?, 0, classes.start)?;
                }
            }
        }
        Ok(Gradients {
            embeddings: match de {
                Some(de) => Some(self.spread(&de.to_dtype(dtype)?, matrices.embeddings)?),
                None => None,
            },
            classifier: dc,
            bias: db,
        })
    }

    /// The gradient of a block of the logits, `e` being the embeddings of its rows.
    fn of_logits(
        &self,
        e: &Tensor,
        matrices: Matrices<&Tensor>,
        scales: &RowScales,
        rows: &Range<usize>,
        classes: &Range<usize>,
    ) -> Result<Tensor> {
        let pick = |t: &Tensor| t.narrow(0, rows.start, rows.len());
        let z = logits(e, matrices, classes, &self.settings)?;
        let down = z.broadcast_sub(&pick(&self.max)?)?;
        let p = down.exp()?;
        let mut g = match &scales.log {
            None => p.broadcast_mul(&pick(&scales.exp)?)?,
            Some(log) => {
                let of_entropy = down.maximum(LEAST_LOGARITHM)?.broadcast_mul(&pick(log)?)?;
                (p * of_entropy.broadcast_add(&pick(&scales.exp)?)?)?
            }
        };
        if let Some((index, inside)) = self.rows.targets(rows, classes)? {
            let one_hot = pick(&scales.one_hot)?;
            let one_hot = inside.where_cond(&one_hot.neg()?, &one_hot.zeros_like()?)?;
            g = g.scatter_add(&index, &one_hot, 1)?;
        }
        match self.settings.softcap {
            Some(softcap) => g * (z / softcap)?.sqr()?.affine(-1., 1.)?,
            None => Ok(g),
        }
    }

    /// Rows that count, where they belong among all rows of the embeddings.
    fn spread(&self, gradient: &Tensor, embeddings: &Tensor) -> Result<Tensor> {
        match self.rows.rows.all {
            true => Ok(gradient.clone()),
            false => embeddings
                .zeros_like()?
                .index_add(&self.rows.embedding, gradient, 0),
        }
    }

    /// With the upstream gradients `g` of a row's loss (through the reduced loss or not), `h` of its lse and `k` of its
    /// entropy `H` (its own or through the loss), the gradient of its logits is `(g s + h) p - g t onehot(y) - k p (log p + H)`, where `p` is the
    /// softmax, and `s` and `t` are what the row's [terms](crate::terms::Terms) have of the two. With `mean` that of
    /// `z - max`, `log p + H` is `z - max - mean`.
    fn row_scales(&self, upstream: &Tensor) -> Result<RowScales> {
        let upstream = upstream.to_dtype(self.max.dtype())?;
        let pick = |range: Range<usize>| -> Result<Tensor> {
            upstream
                .narrow(0, range.start, range.len())?
                .index_select(&self.rows.position, 0)?
                .unsqueeze(1)
        };
        let layout = self.layout;
        let scale = self.rows.rows.scale(self.settings.reduction);
        let loss = (upstream.narrow(0, layout.loss(), 1)? * scale)?;
        let of_loss = pick(layout.losses())?.broadcast_add(&loss)?;
        let of_lse = pick(layout.lse())?;
        let lse = (&self.max + self.sum.log()?)?;
        let (softmax, one_hot) = self.rows.softmax_and_one_hot(&lse)?;
        let on_all = self.settings.logit_scale;
        let mut in_softmax = ((&of_loss * softmax)? + of_lse)?;
        let mut log = None;
        let differentiated = self.settings.differentiates_entropy();
        if let (true, Some(range), Some(mean)) = (differentiated, layout.entropy(), &self.mean) {
            let through_loss = (&of_loss * self.rows.entropy_factors()?)?;
            let of_entropy = (pick(range)? + through_loss)?;
            in_softmax = (in_softmax + (&of_entropy * mean)?)?;
            log = Some(((of_entropy * -on_all)? / &self.sum)?);
        }
        Ok(RowScales {
            exp: ((in_softmax * on_all)? / &self.sum)?,
            one_hot: ((of_loss * one_hot)? * on_all)?,
            log,
        })
    }
}
