//! In main memory, on all threads. What is stored in half precision is widened row by row.

use crate::by_class::ByClass;
use crate::matrices::{Matrices, View};
use crate::native::{Element, Real};
use crate::op::contract::{Gradients, Wanted};
use candle_core::{bail, CpuStorage, DType, Device, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

fn values<'a, T: Element>(view: View<'a, CpuStorage>) -> Result<&'a [T]> {
    let values = T::cpu_storage_as_slice(view.storage)?;
    let start = view.layout.start_offset();
    Ok(&values[start..start + view.shape().elem_count()])
}

/// The numbers of a call.
struct Operands<'a, T> {
    embeddings: &'a [T],
    classifier: &'a [T],
    bias: Option<&'a [T]>,
    hidden: usize,
    /// Row by row.
    classes: &'a [u32],
}

impl<'a, T: Element> Operands<'a, T> {
    fn new(matrices: Matrices<View<'a, CpuStorage>>, classes: &'a [u32]) -> Result<Self> {
        Ok(Self {
            embeddings: values(matrices.embeddings)?,
            classifier: values(matrices.classifier)?,
            bias: matrices.bias.map(values).transpose()?,
            hidden: matrices.embeddings.dims2()?.1,
            classes,
        })
    }

    fn k(&self) -> usize {
        self.classes.len() * self.hidden / self.embeddings.len()
    }

    fn embedding(&self, row: usize) -> &'a [T] {
        &self.embeddings[row * self.hidden..][..self.hidden]
    }

    fn class(&self, class: u32) -> &'a [T] {
        &self.classifier[class as usize * self.hidden..][..self.hidden]
    }
}

/// These values in the type that is computed in, in the buffer where that is another one.
fn wide<'a, T: Element>(values: &'a [T], buffer: &'a mut Vec<T::Real>) -> &'a [T::Real] {
    match T::as_real(values) {
        Some(values) => values,
        None => {
            buffer.resize(values.len(), T::Real::default());
            T::widen(values, buffer);
            buffer
        }
    }
}

fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    const LANES: usize = 32;
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut lanes = [R::default(); LANES];
            let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
            let rest = a.remainder().iter().zip(b.remainder());
            for (a, b) in a.zip(b) {
                for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                    *lane += *a * *b;
                }
            }
            for (lane, (a, b)) in lanes.iter_mut().zip(rest) {
                *lane += *a * *b;
            }
            lanes.iter().fold(R::default(), |sum, lane| sum + *lane)
        },
    )
}

/// `sums += factor * values`
fn add<R: Real>(sums: &mut [R], factor: R, values: &[R]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += factor * *value;
            }
        },
    )
}

/// The products and the bias, `(rows, k)`, f32.
pub(super) fn products(matrices: Matrices<&Tensor>, classes: &[u32], k: usize) -> Result<Tensor> {
    let dtype = matrices.embeddings.dtype();
    let products = matrices.read::<CpuStorage, _>(|views| match dtype {
        DType::F32 => Ok(Operands::<f32>::new(views, classes)?.products()),
        DType::F64 => Ok(Operands::<f64>::new(views, classes)?.products()),
        DType::BF16 => Ok(Operands::<bf16>::new(views, classes)?.products()),
        DType::F16 => Ok(Operands::<f16>::new(views, classes)?.products()),
        other => bail!("embeddings of {other:?}"),
    })?;
    Tensor::from_vec(products, (classes.len() / k, k), &Device::Cpu)
}

/// `upstream` `(rows, k)` is the gradient of the products.
pub(super) fn gradients(
    matrices: Matrices<&Tensor>,
    classes: &[u32],
    upstream: &Tensor,
    wanted: Wanted,
) -> Result<Gradients> {
    let upstream = upstream.flatten_all()?.to_vec1::<f32>()?;
    match matrices.embeddings.dtype() {
        DType::F32 => gradients_of::<f32>(matrices, classes, &upstream, wanted),
        DType::F64 => gradients_of::<f64>(matrices, classes, &upstream, wanted),
        DType::BF16 => gradients_of::<bf16>(matrices, classes, &upstream, wanted),
        DType::F16 => gradients_of::<f16>(matrices, classes, &upstream, wanted),
        other => bail!("embeddings of {other:?}"),
    }
}

fn gradients_of<T: Element>(
    matrices: Matrices<&Tensor>,
    classes: &[u32],
    upstream: &[f32],
    wanted: Wanted,
) -> Result<Gradients> {
    matrices.read(|views| {
        let operands = Operands::<T>::new(views, classes)?;
        let tensor = |values: Vec<T>, of: &Tensor| {
            Tensor::from_vec(values, of.shape(), &Device::Cpu).map(Some)
        };
        let mut gradients = Gradients::default();
        if wanted.embeddings {
            gradients.embeddings = tensor(operands.of_embeddings(upstream), matrices.embeddings)?;
        }
        if wanted.classifier || wanted.bias {
            let vocab = matrices.classifier.dim(0)?;
            let by_class = ByClass::new(classes, vocab);
            if wanted.classifier {
                let values = operands.of_classifier(&by_class, upstream);
                gradients.classifier = tensor(values, matrices.classifier)?;
            }
            if let (true, Some(bias)) = (wanted.bias, matrices.bias) {
                gradients.bias = tensor(sums::<T>(&by_class, vocab, upstream), bias)?;
            }
        }
        Ok(gradients)
    })
}

impl<T: Element> Operands<'_, T> {
    fn products(&self) -> Vec<f32> {
        let k = self.k();
        let mut products = vec![0.; self.classes.len()];
        let rows = products.par_chunks_mut(k).zip(self.classes.par_chunks(k));
        rows.enumerate().for_each_init(
            || (Vec::new(), Vec::new()),
            |(of_row, of_class), (row, (logits, classes))| {
                let embedding = wide(self.embedding(row), of_row);
                for (logit, class) in logits.iter_mut().zip(classes) {
                    let mut z = dot(embedding, wide(self.class(*class), of_class)).to_f64();
                    if let Some(bias) = self.bias {
                        z += bias[*class as usize].to_f64();
                    }
                    *logit = z as f32;
                }
            },
        );
        products
    }

    fn of_embeddings(&self, upstream: &[f32]) -> Vec<T> {
        let k = self.k();
        let mut gradient = vec![T::from_f64(0.); self.embeddings.len()];
        let rows = gradient.par_chunks_mut(self.hidden);
        let rows = rows.zip(self.classes.par_chunks(k).zip(upstream.par_chunks(k)));
        rows.for_each_init(
            || (Vec::new(), Vec::new()),
            |(sums, buffer), (gradient, (classes, upstream))| {
                sums.clear();
                sums.resize(self.hidden, T::Real::default());
                for (class, g) in classes.iter().zip(upstream) {
                    if *g != 0. {
                        let g = T::Real::from_f64(*g as f64);
                        add(sums, g, wide(self.class(*class), buffer));
                    }
                }
                T::narrow(sums, gradient);
            },
        );
        gradient
    }

    fn of_classifier(&self, by_class: &ByClass, upstream: &[f32]) -> Vec<T> {
        let k = self.k();
        let mut gradient = vec![T::from_f64(0.); self.classifier.len()];
        let classes = gradient.par_chunks_mut(self.hidden).enumerate();
        classes.for_each_init(
            || (Vec::new(), Vec::new()),
            |(sums, buffer), (class, gradient)| {
                let entries = by_class.entries(class);
                if entries.is_empty() {
                    return;
                }
                sums.clear();
                sums.resize(self.hidden, T::Real::default());
                for entry in entries {
                    // Rows without a gradient add nothing, whatever (NaN, infinity) their embeddings are.
                    let g = upstream[*entry];
                    if g != 0. {
                        let g = T::Real::from_f64(g as f64);
                        add(sums, g, wide(self.embedding(*entry / k), buffer));
                    }
                }
                T::narrow(sums, gradient);
            },
        );
        gradient
    }
}

/// The sum of the upstream gradients of each class.
fn sums<T: Element>(by_class: &ByClass, vocab: usize, upstream: &[f32]) -> Vec<T> {
    let sum = |class| {
        let entries = by_class.entries(class).iter();
        T::from_f64(entries.map(|entry| upstream[*entry] as f64).sum())
    };
    (0..vocab).map(sum).collect()
}
