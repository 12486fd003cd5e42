//! Blocks of rows and classes in Candle tensor operations, for any device.
//!
//! Half-precision inputs are converted block by block, so every product is an f32 one. The gradients are exact
//! whatever the filter: to average a block instead, the host would have to wait for the device.

use super::rows::Rows;
use super::DEFAULT_WORKSPACE;
use crate::op::{Backward, Forward, Gradients, KeptTiles, Wanted};
use crate::problem::{Matrices, Problem, Settings};
use crate::vocab_parallel::ShardRows;
use candle_core::{DType, Device, Result, Tensor, D};
use std::ops::Range;
use std::sync::Arc;

/// Not above any logit but -inf, and finite: a block whose every logit is -inf stays without a NaN. In
/// f32, as Metal has no f64.
const LOWEST: f32 = f32::MIN;

/// The dtype that products and accumulators have for inputs of this dtype.
fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

struct Saved {
    rows: Arc<RowsOnDevice>,
    /// A row's softmax is `exp(z - max) / sum`: no rounded lse comes between the two. Both `(n, 1)`, accumulator
    /// dtype.
    max: Tensor,
    sum: Tensor,
    settings: Settings,
    kept: Arc<KeptTiles>,
}

/// [`Rows`] and their lists as tensors `(n)` of u32.
struct RowsOnDevice {
    rows: Rows,
    embedding: Tensor,
    position: Tensor,
    target: Tensor,
}

impl RowsOnDevice {
    fn new(rows: Rows, device: &Device) -> Result<Self> {
        Ok(Self {
            embedding: Tensor::new(rows.embedding.as_slice(), device)?,
            position: Tensor::new(rows.position.as_slice(), device)?,
            target: Tensor::new(rows.target.as_slice(), device)?,
            rows,
        })
    }

    /// The rows of this block of embeddings, in accumulator dtype.
    fn embeddings(&self, embeddings: &Tensor, block: &Range<usize>) -> Result<Tensor> {
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
    fn targets(
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

/// The sizes of the blocks that keep the temporaries of one block within the workspace.
struct Blocks {
    rows: usize,
    classes: usize,
}

impl Blocks {
    /// Temporaries of the size of a block that live at once, at most.
    const COPIES: usize = 6;

    fn new(rows: usize, vocab: usize, hidden: usize, size: usize, workspace: usize) -> Self {
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

fn blocks(len: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(block)
        .map(move |start| start..(start + block).min(len))
}

/// The block's logits, bias and softcap applied.
fn logits(
    embeddings: &Tensor,
    matrices: Matrices<'_>,
    classes: &Range<usize>,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let narrow = |t: &Tensor| -> Result<Tensor> {
        t.narrow(0, classes.start, classes.len())?
            .to_dtype(embeddings.dtype())
    };
    let mut z = embeddings.matmul(&narrow(matrices.classifier)?.t()?)?;
    if let Some(bias) = matrices.bias {
        z = z.broadcast_add(&narrow(bias)?)?;
    }
    match softcap {
        Some(softcap) => (z / softcap)?.tanh()? * softcap,
        None => Ok(z),
    }
}

pub(super) fn forward(problem: &Problem, rows: Rows, kept: Arc<KeptTiles>) -> Result<Forward> {
    let detached = problem.detached();
    let matrices = detached.matrices();
    let Matrices {
        embeddings,
        classifier,
        ..
    } = matrices;
    let settings = &problem.settings;
    let device = embeddings.device();
    let dtype = accumulator(embeddings.dtype());
    let rows = Arc::new(RowsOnDevice::new(rows, device)?);
    let n = rows.rows.len();
    let positions = rows.rows.positions;
    if n == 0 {
        let packed = Tensor::zeros(2 * positions + 1, DType::F32, device)?;
        let none = Tensor::zeros((0, 1), dtype, device)?;
        let backward = Box::new(Saved {
            rows,
            max: none.clone(),
            sum: none,
            settings: settings.clone(),
            kept,
        });
        return Ok(Forward {
            packed,
            backward,
            loss: None,
        });
    }
    let (vocab, hidden) = classifier.dims2()?;
    let size = Blocks::new(
        n,
        vocab,
        hidden,
        dtype.size_in_bytes(),
        settings.workspace.unwrap_or(DEFAULT_WORKSPACE),
    );
    let (mut maxima, mut sums, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for row_block in blocks(n, size.rows) {
        let e = rows.embeddings(embeddings, &row_block)?;
        let shape = (row_block.len(), 1);
        let mut max = Tensor::full(LOWEST, shape, device)?.to_dtype(dtype)?;
        let mut sum = Tensor::zeros(shape, dtype, device)?;
        let mut target = Tensor::zeros(shape, dtype, device)?;
        for classes in blocks(vocab, size.classes) {
            let z = logits(&e, matrices, &classes, settings.softcap)?;
            if let Some((index, inside)) = rows.targets(&row_block, &classes)? {
                target = inside.where_cond(&z.gather(&index, 1)?, &target)?;
            }
            let larger = max.maximum(&z.max_keepdim(D::Minus1)?)?;
            let here = z.broadcast_sub(&larger)?.exp()?.sum_keepdim(D::Minus1)?;
            sum = ((sum * (max - &larger)?.exp()?)? + here)?;
            max = larger;
        }
        maxima.push(max);
        sums.push(sum);
        targets.push(target);
    }
    let cat = |blocks: &[Tensor]| Tensor::cat(blocks, 0)?.flatten_all();
    let here = ShardRows {
        max: cat(&maxima)?,
        sum: cat(&sums)?,
        target: cat(&targets)?,
        ranks: Tensor::new(rows.rows.here(), device)?.to_dtype(dtype)?,
    };
    let all = match &settings.vocab_parallel {
        None => here,
        Some(shard) => {
            let all = shard.rows(here)?;
            problem.check_shards(&all.ranks)?;
            all
        }
    };
    let log_sum = all.sum.log()?;
    let lse = (&all.max + &log_sum)?.unsqueeze(1)?;
    let nll = ((&all.max - all.target)? + log_sum)?.unsqueeze(1)?;
    let losses = match settings.z_loss {
        0. => nll,
        weight => (nll + (lse.sqr()? * weight)?)?,
    };
    let loss = (losses.sum_all()? * rows.rows.scale(settings.reduction))?.reshape(1)?;
    let spread = |values: &Tensor| -> Result<Tensor> {
        let values = values.flatten_all()?.to_dtype(DType::F32)?;
        if n == positions {
            return Ok(values);
        }
        Tensor::zeros(positions, DType::F32, device)?.index_add(&rows.position, &values, 0)
    };
    let packed = Tensor::cat(
        &[spread(&losses)?, spread(&lse)?, loss.to_dtype(DType::F32)?],
        0,
    )?;
    let backward = Box::new(Saved {
        rows,
        max: all.max.unsqueeze(1)?,
        sum: all.sum.unsqueeze(1)?,
        settings: settings.clone(),
        kept,
    });
    Ok(Forward {
        packed,
        backward,
        loss: None,
    })
}

impl Backward for Saved {
    fn backward(
        &self,
        matrices: Matrices<'_>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        let device = upstream.device();
        self.kept.set(Tensor::new(&[1f64, 1.], &Device::Cpu)?);
        let (vocab, hidden) = matrices.classifier.dims2()?;
        let dtype = matrices.classifier.dtype();
        let n = self.rows.rows.len();
        if n == 0 {
            let zeros = |wanted: bool, of: Option<&Tensor>| match of {
                Some(of) if wanted => of.zeros_like().map(Some),
                _ => Ok(None),
            };
            return Ok(Gradients {
                embeddings: zeros(wanted.embeddings, Some(matrices.embeddings))?,
                classifier: zeros(wanted.classifier, Some(matrices.classifier))?,
                bias: zeros(wanted.bias, matrices.bias)?,
            });
        }
        let acc = accumulator(dtype);
        let workspace = self.settings.workspace.unwrap_or(DEFAULT_WORKSPACE);
        // Accumulating dE over blocks of classes takes a copy of it in f32 for half-precision inputs.
        let copy = n * hidden * acc.size_in_bytes();
        if wanted.embeddings
            && (wanted.classifier || wanted.bias)
            && acc != dtype
            && copy > workspace / 2
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
                    .backward(matrices, upstream, only_embeddings)?
                    .embeddings,
                ..self.backward(matrices, upstream, others)?
            });
        }
        let (softmax_scale, target_scale) = self.row_scales(upstream)?;
        let exp_scale = (softmax_scale / &self.sum)?;
        let size = Blocks::new(n, vocab, hidden, acc.size_in_bytes(), workspace);

        let de = Tensor::zeros(
            if wanted.embeddings {
                (n, hidden)
            } else {
                (1, 1)
            },
            acc,
            device,
        )?;
        let dc = Tensor::zeros(
            if wanted.classifier {
                (vocab, hidden)
            } else {
                (1, 1)
            },
            dtype,
            device,
        )?;
        let db = Tensor::zeros(if wanted.bias { vocab } else { 1 }, dtype, device)?;
        for classes in blocks(vocab, size.classes) {
            let c = matrices
                .classifier
                .narrow(0, classes.start, classes.len())?
                .to_dtype(acc)?;
            let (mut dc_block, mut db_block) = (None, None);
            let add = |sum: Option<Tensor>, term: Tensor| match sum {
                Some(sum) => (sum + term).map(Some),
                None => Ok(Some(term)),
            };
            for row_block in blocks(n, size.rows) {
                let pick = |t: &Tensor| t.narrow(0, row_block.start, row_block.len());
                let e = self.rows.embeddings(matrices.embeddings, &row_block)?;
                let z = logits(&e, matrices, &classes, self.settings.softcap)?;
                let mut g = z
                    .broadcast_sub(&pick(&self.max)?)?
                    .exp()?
                    .broadcast_mul(&pick(&exp_scale)?)?;
                if let Some((index, inside)) = self.rows.targets(&row_block, &classes)? {
                    let one_hot = pick(&target_scale)?;
                    let one_hot = inside.where_cond(&one_hot.neg()?, &one_hot.zeros_like()?)?;
                    g = g.scatter_add(&index, &one_hot, 1)?;
                }
                if let Some(softcap) = self.settings.softcap {
                    g = (g * (z / softcap)?.sqr()?.affine(-1., 1.)?)?;
                }
                if wanted.embeddings {
                    let sum = (pick(&de)? + g.matmul(&c)?)?;
                    de.slice_set(&sum, 0, row_block.start)?;
                }
                if wanted.classifier {
                    dc_block = add(dc_block, g.t()?.matmul(&e)?)?;
                }
                if wanted.bias {
                    db_block = add(db_block, g.sum(0)?)?;
                }
            }
            if let Some(block) = dc_block {
                dc.slice_set(&block.to_dtype(dtype)?, 0, classes.start)?;
            }
            if let Some(block) = db_block {
                db.slice_set(&block.to_dtype(dtype)?, 0, classes.start)?;
            }
        }
        Ok(Gradients {
            embeddings: if wanted.embeddings {
                let de = de.to_dtype(dtype)?;
                Some(if self.rows.rows.all {
                    de
                } else {
                    matrices
                        .embeddings
                        .zeros_like()?
                        .index_add(&self.rows.embedding, &de, 0)?
                })
            } else {
                None
            },
            classifier: wanted.classifier.then_some(dc),
            bias: wanted.bias.then_some(db),
        })
    }
}

impl Saved {
    /// What a row's softmax and its one-hot are multiplied by, `(n, 1)` each: with the upstream
    /// gradients `g` of its loss (through the reduced loss or not) and `h` of its lse, the gradient of
    /// its logits is `(g + h) softmax(z) - g onehot(y)`, and `g` has a share more in the softmax where
    /// there is a z-loss.
    fn row_scales(&self, upstream: &Tensor) -> Result<(Tensor, Tensor)> {
        let n = self.rows.rows.positions;
        let upstream = upstream.to_dtype(self.max.dtype())?;
        let pick = |start: usize| -> Result<Tensor> {
            upstream
                .narrow(0, start, n)?
                .index_select(&self.rows.position, 0)
        };
        let loss = (upstream.narrow(0, 2 * n, 1)? * self.rows.rows.scale(self.settings.reduction))?;
        let of_loss = pick(0)?.broadcast_add(&loss)?.unsqueeze(1)?;
        let of_lse = pick(n)?.unsqueeze(1)?;
        let in_softmax = match self.settings.z_loss {
            0. => of_loss.clone(),
            weight => {
                let lse = (&self.max + self.sum.log()?)?;
                (&of_loss * lse.affine(2. * weight, 1.)?)?
            }
        };
        Ok(((in_softmax + of_lse)?, of_loss))
    }
}
