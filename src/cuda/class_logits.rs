//! `cuda/class_logits.cu`: logits of chosen classes and their gradients. All tensors are contiguous, classes i64 and upstream
//! gradients f32, both `(rows, k)`.

use super::launch::{Gpu, Kernel, CLASS_LOGITS};
use super::operands::{aligned, kernels, Kind};
use super::params::class_logits::{ByClassParams, EmbeddingsParams, EntriesParams, ProductsParams};
use super::sort::Pairs;
use super::write::write;
use crate::matrices::Matrices;
use crate::op::contract::{Gradients, Wanted};
use candle_core::{bail, DType, Result, Tensor};

/// Threads of a block, at most where the columns of a row are shared out.
const THREADS: usize = 256;
/// Products of a warp.
const PRODUCTS: usize = 4;
/// Entries that a block adds up.
const PIECE: usize = 512;

/// The products and the bias, NaN of a class that does not exist. `None` where the kernels cannot run.
pub(crate) fn products(matrices: Matrices<&Tensor>, classes: &Tensor) -> Result<Option<Tensor>> {
    let Some((gpu, kind)) = kernels(matrices.classifier)? else {
        return Ok(None);
    };
    let (rows, k) = classes.dims2()?;
    let (vocab, hidden) = matrices.classifier.dims2()?;
    let products = gpu.unfinished(DType::F32, (rows, k), false)?;
    let launch = |embeddings, classifier, bias, classes| {
        let params = ProductsParams {
            embeddings,
            classifier,
            bias,
            classes,
            products: products.address,
            rows: rows as i64,
            hidden: hidden as i64,
            vocab: vocab as i64,
            k: k as u32,
            aligned: aligned(kind, &[embeddings, classifier], &[hidden]).into(),
        };
        let warps = rows * k.div_ceil(PRODUCTS);
        let grid = (warps.div_ceil(THREADS / 32), 1);
        let name = kind.kernel("class_products");
        gpu.launch(
            &Kernel::new(CLASS_LOGITS, name, grid, THREADS as u32),
            &params,
        )
    };
    gpu.read(matrices.embeddings, |embeddings| {
        gpu.read(matrices.classifier, |classifier| {
            gpu.read(classes, |classes| match matrices.bias {
                None => launch(embeddings, classifier, 0, classes),
                Some(bias) => gpu.read(bias, |bias| launch(embeddings, classifier, bias, classes)),
            })
        })
    })?;
    Ok(Some(products.finish(&gpu)))
}

/// The gradients of the products that are wanted, added in place to `others` where there are any. `None` where the kernels
/// cannot run.
pub(crate) fn gradients(
    matrices: Matrices<&Tensor>,
    classes: &Tensor,
    upstream: &Tensor,
    wanted: Wanted,
    others: Option<&Gradients>,
) -> Result<Option<Gradients>> {
    let Some((gpu, kind)) = kernels(matrices.classifier)? else {
        return Ok(None);
    };
    let (rows, k) = classes.dims2()?;
    let (vocab, hidden) = matrices.classifier.dims2()?;
    if rows * k > i32::MAX as usize {
        bail!(
            "{rows} positions of {k} classes are {} gradients: at most {} can be sorted",
            rows * k,
            i32::MAX
        )
    }
    let sums = match others {
        Some(others) => others.clone(),
        None => Gradients::zeros(matrices, wanted)?,
    };
    let call = Call {
        gpu,
        kind,
        rows,
        k,
        hidden,
        vocab,
    };
    if let Some(sums) = &sums.embeddings {
        call.of_embeddings(matrices.classifier, classes, upstream, sums)?;
    }
    if sums.classifier.is_some() || sums.bias.is_some() {
        let entries = call.by_class(classes, upstream)?;
        if let Some(sums) = &sums.classifier {
            call.of_classifier(matrices.embeddings, &entries, upstream, sums)?;
        }
        if let Some(sums) = &sums.bias {
            call.of_bias(&entries, upstream, sums)?;
        }
    }
    Ok(Some(sums))
}

/// Adds rows of an f32 or half-precision gradient `(n, hidden)` to the rows of `sums` `(vocab, hidden)` that `ids` `(n)` name,
/// in place. `false` where the kernels cannot run.
#[cfg(feature = "models")]
pub(crate) fn add_rows(sums: &Tensor, ids: &Tensor, rows: &Tensor) -> Result<bool> {
    let count = ids.elem_count();
    let matrices = Matrices {
        embeddings: rows,
        classifier: sums,
        adapter: None,
        bias: None,
    };
    let wanted = Wanted {
        embeddings: false,
        classifier: true,
        bias: false,
    };
    let others = Gradients {
        classifier: Some(sums.clone()),
        ..Gradients::default()
    };
    let ones = Tensor::ones((count, 1), DType::F32, ids.device())?;
    let classes = ids.reshape((count, 1))?;
    Ok(gradients(matrices, &classes, &ones, wanted, Some(&others))?.is_some())
}

struct Call {
    gpu: Gpu,
    kind: Kind,
    rows: usize,
    k: usize,
    hidden: usize,
    vocab: usize,
}

impl Call {
    fn kernel(&self, name: &str, grid: (usize, usize), threads: usize) -> Kernel {
        Kernel::new(CLASS_LOGITS, self.kind.kernel(name), grid, threads as u32)
    }

    /// A kernel of `blocks` for each part of the columns.
    fn columns_kernel(&self, name: &str, blocks: usize, aligned: bool) -> Kernel {
        let width = match aligned {
            true => 16 / self.kind.size,
            false => 1,
        };
        let needed = self.hidden.div_ceil(width);
        let parts = needed.div_ceil(THREADS);
        let threads = needed.div_ceil(parts).next_multiple_of(32);
        self.kernel(name, (blocks, parts), threads)
    }

    fn of_embeddings(
        &self,
        classifier: &Tensor,
        classes: &Tensor,
        upstream: &Tensor,
        gradient: &Tensor,
    ) -> Result<()> {
        self.gpu.read(classifier, |classifier| {
            self.gpu.read(classes, |classes| {
                self.gpu.read(upstream, |upstream| {
                    write(gradient, &|gradient| {
                        let aligned = aligned(self.kind, &[classifier, gradient], &[self.hidden]);
                        let params = EmbeddingsParams {
                            classifier,
                            classes,
                            upstream,
                            gradient,
                            hidden: self.hidden as i64,
                            vocab: self.vocab as i64,
                            k: self.k as u32,
                            aligned: aligned.into(),
                        };
                        let name = "class_embeddings_gradient";
                        let kernel = self.columns_kernel(name, self.rows, aligned);
                        self.gpu.launch(&kernel, &params)
                    })
                })
            })
        })
    }

    /// The entries by class, those that have none to add to last.
    fn by_class(&self, classes: &Tensor, upstream: &Tensor) -> Result<Pairs> {
        let count = self.rows * self.k;
        let entries = Pairs::new(&self.gpu, count)?;
        self.gpu.read(classes, |classes| {
            self.gpu.read(upstream, |upstream| {
                let params = EntriesParams {
                    classes,
                    upstream,
                    keys: entries.keys.address,
                    entries: entries.values.address,
                    vocab: self.vocab as i64,
                    count: count as u32,
                    unused: 0,
                };
                let grid = (count.div_ceil(THREADS), 1);
                let kernel = Kernel::new(CLASS_LOGITS, "list_entries", grid, THREADS as u32);
                self.gpu.launch(&kernel, &params)
            })
        })?;
        entries.sorted(&self.gpu, self.vocab as u32)
    }

    fn of_classifier(
        &self,
        embeddings: &Tensor,
        entries: &Pairs,
        upstream: &Tensor,
        gradient: &Tensor,
    ) -> Result<()> {
        let pieces = entries.count.div_ceil(PIECE);
        let partials = self.gpu.array::<f32>(2 * pieces * self.hidden)?;
        self.gpu.read(embeddings, |embeddings| {
            self.gpu.read(upstream, |upstream| {
                write(gradient, &|gradient| {
                    let aligned = aligned(self.kind, &[embeddings, gradient], &[self.hidden]);
                    let params = ByClassParams {
                        embeddings,
                        partials: partials.address,
                        gradient,
                        pieces: pieces as u32,
                        aligned: aligned.into(),
                        ..self.params(entries, upstream)
                    };
                    for name in ["class_classifier_gradient", "class_sum_runs"] {
                        let kernel = self.columns_kernel(name, pieces, aligned);
                        self.gpu.launch(&kernel, &params)?;
                    }
                    Ok(())
                })
            })
        })
    }

    fn of_bias(&self, entries: &Pairs, upstream: &Tensor, gradient: &Tensor) -> Result<()> {
        self.gpu.read(upstream, |upstream| {
            write(gradient, &|gradient| {
                let params = ByClassParams {
                    gradient,
                    ..self.params(entries, upstream)
                };
                let grid = (entries.count.div_ceil(THREADS / 32), 1);
                let kernel = self.kernel("class_bias_gradient", grid, THREADS);
                self.gpu.launch(&kernel, &params)
            })
        })
    }

    fn params(&self, entries: &Pairs, upstream: u64) -> ByClassParams {
        ByClassParams {
            upstream,
            classes: entries.keys.address,
            entries: entries.values.address,
            hidden: self.hidden as i64,
            vocab: self.vocab as i64,
            count: entries.count as u32,
            k: self.k as u32,
            ..ByClassParams::default()
        }
    }
}
