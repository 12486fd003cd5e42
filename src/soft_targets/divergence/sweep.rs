//! The way through blocks of rows: the logits of both, their divergence and its gradients.

use super::block::{Logits, Pair};
use super::gradients::HeadGradient;
use super::kind::Divergence;
use super::{loops, operations};
use crate::blocks::blocks;
use crate::matrices::Matrices;
use crate::native::HostRows;
use crate::op::contract::{Gradients, Wanted};
use crate::Reduction;
use candle_core::{DType, Device, Result, Tensor};
use std::ops::Range;

/// What logits are made of.
pub(super) struct Head {
    /// Outside of any graph.
    pub matrices: Matrices<Tensor>,
    pub softcap: Option<f64>,
    /// What the logits are multiplied by after the softcap: the inverse of the temperature.
    pub scale: f64,
}

pub(super) struct Call {
    pub kind: Divergence,
    pub heads: Pair<Head>,
    pub rows: HostRows,
    /// What is computed in: f32, or f64.
    pub dtype: DType,
    pub reduction: Reduction,
    /// Bytes, where the user says so.
    pub workspace: Option<usize>,
    /// Whether kernels may run.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub kernels: bool,
}

/// Losses of the rows that count, times the rows' weights, and gradients of what the row weights make of them.
pub(super) struct Swept {
    pub losses: Tensor,
    pub gradients: Pair<Gradients>,
}

/// The sizes of the blocks that keep the temporaries within the workspace.
struct Sizes {
    rows: usize,
    /// Classes that are widened, or added to their gradient, at a time.
    classes: usize,
}

impl Call {
    fn device(&self) -> &Device {
        self.heads.student.matrices.classifier.device()
    }

    fn sizes(&self, gradients: usize) -> Result<Sizes> {
        let (vocab, student) = self.heads.student.matrices.classifier.dims2()?;
        let hidden = student.max(self.heads.teacher.matrices.classifier.dim(1)?);
        let size = self.dtype.size_in_bytes();
        // Blocks of logits that live at once.
        let copies = match self.device() {
            Device::Cpu => 2 + gradients,
            _ => 9 + 2 * gradients,
        };
        let workspace = self.workspace.unwrap_or(match self.device() {
            Device::Cpu => 64 << 20,
            _ => 512 << 20,
        });
        let rows = workspace / 4 * 3 / (copies * vocab * size);
        let classes = workspace / 4 / (2 * hidden * size);
        Ok(Sizes {
            rows: rows.clamp(1, self.rows.len().max(1)),
            classes: classes.clamp(1, vocab),
        })
    }

    /// The weights of the rows that count among each other, 1 unless the options say otherwise.
    pub fn tokens(&self) -> Result<Tensor> {
        let of_row = |row| self.rows.terms(row).nll;
        let tokens: Vec<f64> = (0..self.rows.len()).map(of_row).collect();
        let tokens = Tensor::new(tokens, &Device::Cpu)?.to_dtype(self.dtype)?;
        tokens.to_device(self.device())
    }

    /// The weight of each row that counts in the reduced divergence, times the upstream gradient of that.
    pub fn weights(&self, upstream: Option<&Tensor>) -> Result<Tensor> {
        let weights = (self.tokens()? * self.rows.scale(self.reduction))?;
        let Some(upstream) = upstream else {
            return Ok(weights);
        };
        let upstream = upstream.to_dtype(self.dtype)?;
        match self.reduction {
            Reduction::None => {
                let index = Tensor::new(self.rows.position.as_slice(), self.device())?;
                let upstream = upstream.flatten_all()?.contiguous()?;
                weights * upstream.index_select(&index, 0)?
            }
            Reduction::Mean | Reduction::Sum => weights.broadcast_mul(&upstream),
        }
    }

    /// The losses of the rows that count, among zeros for all positions.
    pub fn spread(&self, losses: &Tensor) -> Result<Tensor> {
        let zeros = Tensor::zeros(self.rows.positions, losses.dtype(), losses.device())?;
        match self.rows.len() {
            0 => Ok(zeros),
            _ => {
                let index = Tensor::new(self.rows.position.as_slice(), losses.device())?;
                zeros.index_add(&index, losses, 0)
            }
        }
    }

    /// `weights` are those of the rows that count; without them there are no gradients.
    pub fn sweep(&self, weights: Option<&Tensor>, wanted: Pair<Wanted>) -> Result<Swept> {
        #[cfg(feature = "cuda")]
        if let Some(swept) = self.on_cuda(weights, wanted)? {
            return Ok(swept);
        }
        let asked = [wanted.student, wanted.teacher];
        let sizes = self.sizes(asked.iter().filter(|wanted| wanted.any()).count())?;
        let index = Tensor::new(self.rows.embedding.as_slice(), self.device())?;
        let Pair { student, teacher } = &self.heads;
        let mut of_student = HeadGradient::new(&student.matrices, self.dtype, wanted.student)?;
        let mut of_teacher = HeadGradient::new(&teacher.matrices, self.dtype, wanted.teacher)?;
        let widened = |head: &Head| match &head.matrices.bias {
            Some(bias) => bias.to_dtype(self.dtype).map(Some),
            None => Ok(None),
        };
        let (bias, bias_of_teacher) = (widened(student)?, widened(teacher)?);
        let mut losses = Vec::new();
        for rows in blocks(self.rows.len(), sizes.rows) {
            let weights = match weights {
                Some(weights) => Some(weights.narrow(0, rows.start, rows.len())?),
                None => None,
            };
            let e = self.embeddings(student, &index, &rows)?;
            let t = self.embeddings(teacher, &index, &rows)?;
            let logits = Pair {
                student: student.logits(&e, &bias, &sizes, wanted.student)?,
                teacher: teacher.logits(&t, &bias_of_teacher, &sizes, wanted.teacher)?,
            };
            let passed = match self.device() {
                Device::Cpu => loops::pass(self.kind, &logits, weights.as_ref())?,
                _ => operations::pass(self.kind, &logits, weights.as_ref())?,
            };
            drop(logits);
            losses.push(passed.losses);
            if let Some(g) = passed.gradients.student {
                of_student.add(&g, &e, sizes.classes)?;
            }
            if let Some(g) = passed.gradients.teacher {
                of_teacher.add(&g, &t, sizes.classes)?;
            }
        }
        let losses = match losses.is_empty() {
            true => Tensor::zeros(1, self.dtype, self.device())?,
            false => (Tensor::cat(&losses, 0)? * self.tokens()?)?,
        };
        let index = (!self.rows.all).then_some(&index);
        let gradients = Pair {
            student: of_student.finish(&student.matrices, index)?,
            teacher: of_teacher.finish(&teacher.matrices, index)?,
        };
        Ok(Swept { losses, gradients })
    }

    /// By the CUDA kernels, where they can run.
    #[cfg(feature = "cuda")]
    fn on_cuda(&self, weights: Option<&Tensor>, wanted: Pair<Wanted>) -> Result<Option<Swept>> {
        use crate::cuda::divergence;
        if self.rows.len() == 0 || !self.kernels {
            return Ok(None);
        }
        let heads = [
            self.heads.student.for_kernels(wanted.student),
            self.heads.teacher.for_kernels(wanted.teacher),
        ];
        let rows = &self.rows.embedding;
        let swept = divergence::sweep(self.kind, heads, rows, weights, self.workspace)?;
        let Some(divergence::Swept {
            divergences,
            gradients: [student, teacher],
        }) = swept
        else {
            return Ok(None);
        };
        Ok(Some(Swept {
            losses: (divergences * self.tokens()?)?,
            gradients: Pair { student, teacher },
        }))
    }

    /// The embeddings of a block of the rows that count.
    fn embeddings(&self, head: &Head, index: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
        let embeddings = &head.matrices.embeddings;
        let block = match self.rows.all {
            true => embeddings.narrow(0, rows.start, rows.len())?,
            false => embeddings.index_select(&index.narrow(0, rows.start, rows.len())?, 0)?,
        };
        block.to_dtype(self.dtype)
    }
}

impl Head {
    #[cfg(feature = "cuda")]
    fn for_kernels(&self, wanted: Wanted) -> crate::cuda::divergence::Head<'_> {
        crate::cuda::divergence::Head {
            matrices: self.matrices.as_ref(),
            softcap: self.softcap.map(|softcap| softcap * self.scale),
            scale: self.scale,
            wanted,
        }
    }

    fn logits<'a>(
        &self,
        embeddings: &Tensor,
        bias: &'a Option<Tensor>,
        sizes: &Sizes,
        wanted: Wanted,
    ) -> Result<Logits<'a>> {
        Ok(Logits {
            products: products(embeddings, &self.matrices.classifier, sizes.classes)?,
            bias: bias.as_ref(),
            softcap: self.softcap,
            scale: self.scale,
            wanted: wanted.any(),
        })
    }
}

/// `E C^T`, the classifier widened a block of classes at a time.
fn products(embeddings: &Tensor, classifier: &Tensor, classes: usize) -> Result<Tensor> {
    let dtype = embeddings.dtype();
    if classifier.dtype() == dtype {
        return embeddings.matmul(&classifier.t()?);
    }
    let (rows, vocab) = (embeddings.dim(0)?, classifier.dim(0)?);
    let products = Tensor::zeros((rows, vocab), dtype, embeddings.device())?;
    for classes in blocks(vocab, classes) {
        let block = classifier.narrow(0, classes.start, classes.len())?;
        let block = embeddings.matmul(&block.to_dtype(dtype)?.t()?)?;
        products.slice_set(&block, 1, classes.start)?;
    }
    Ok(products)
}
