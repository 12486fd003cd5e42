//! Logits of chosen classes.

mod cpu;
mod tensor;

use super::checks;
use crate::matrices::Matrices;
use crate::node::{attach, Node};
use crate::op::contract::{Gradients, Wanted};
use crate::op::graph::wanted;
use crate::positions::to_i64;
use crate::problem::Problem;
use crate::{Implementation, Options};
use candle_core::{bail, DType, Device, Result, Tensor, D};

/// The logits of chosen classes, `z_ij = e_i . c_(y_ij) + b_(y_ij)` with the softcap and the scale of the options: f32 of
/// shape `(.., k)`, differentiable in the embeddings, the classifier and the bias.
///
/// - `embeddings` of shape `(.., D)` and `classifier` of shape `(V, D)`, in bf16, f16, f32 or f64.
/// - `classes` of shape `(.., k)`, in u32, i64 or i32, each in `[0, V)`.
/// - `options`: the bias, the softcap, the `logit_scale`, the implementation, and whether classes are checked on a GPU
///   ([`Options::check_targets`]; without it the logit of a class that does not exist is NaN there). The others are not read,
///   but `vocab_parallel` is an error.
///
/// With the lse of [`linear_cross_entropy`](crate::linear_cross_entropy) they give log-probabilities, `z_ij - lse_i`, of
/// as many tokens as one likes. For a backward the classes are kept and, with a softcap, the result. The gradient of the
/// classifier is summed up in f32 in the order of the positions and rounded once: on the CPU, and on CUDA in bf16, f16 and f32,
/// where `N` positions take `17 N k + N k D / 64` bytes for it. Elsewhere, and with
/// [`Implementation::Native`](crate::Implementation::Native) on a GPU, these are Candle operations on blocks of positions, within
/// 64 MiB and, for the gradient of the classifier, an f32 tensor of its size.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, D};
/// use candle_cut_cross_entropy::{linear_cross_entropy, soft_targets::class_logits, Options};
/// # fn main() -> candle_core::Result<()> {
/// # let hidden = Tensor::randn(0f32, 1., (2, 16, 64), &Device::Cpu)?;
/// # let head = Tensor::randn(0f32, 0.02, (1000, 64), &Device::Cpu)?;
/// # let tokens = Tensor::zeros((2, 16), DType::I64, &Device::Cpu)?;
/// # let candidates = Tensor::zeros((2, 16, 4), DType::U32, &Device::Cpu)?;
/// let options = Options::default();
/// let lse = linear_cross_entropy(&hidden, &head, &tokens, &options)?.lse;
/// let logits = class_logits(&hidden, &head, &candidates, &options)?;
/// let log_probs = logits.broadcast_sub(&lse.unsqueeze(D::Minus1)?)?;
/// assert_eq!(log_probs.dims(), [2, 16, 4]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Shapes, dtypes or devices that do not match, a head whose classes are sharded or that has an adapter, and a class outside
/// `[0, V)`: the first is named.
pub fn class_logits(
    embeddings: &Tensor,
    classifier: &Tensor,
    classes: &Tensor,
    options: &Options,
) -> Result<Tensor> {
    let (lead, k) = match (embeddings.dims(), classes.dims()) {
        ([lead @ .., _], [positions @ .., k]) if lead == positions => (lead, *k),
        (embeddings, classes) => bail!(
            "classes must have shape (.., k) to match embeddings {embeddings:?}, got {classes:?}"
        ),
    };
    if k == 0 {
        bail!(
            "classes must be at least one a position, got {:?}",
            classes.dims()
        )
    }
    checks::classes(classes, embeddings)?;
    if options.vocab_parallel.is_some() {
        bail!("class_logits does not work with vocab_parallel: the classes are those of one rank")
    }
    if options.adapter.is_some() {
        bail!("class_logits takes no adapter: hand it the classifier with the adapter in it")
    }
    // Embeddings, classifier and options are checked as those of a loss are.
    let targets = Tensor::zeros(lead, DType::U32, embeddings.device())?;
    let read = Options::default()
        .bias(options.bias.as_ref())
        .softcap(options.softcap)
        .logit_scale(options.logit_scale)
        .implementation(options.implementation)
        .check_targets(options.check_targets);
    let (problem, matrices) = Problem::new(embeddings, classifier, &targets, &read)?;
    let chosen = Chosen::new(classes, &problem)?;
    let detached = matrices.as_ref().detach();
    let logits = chosen.logits(detached.as_ref())?;
    let shape = classes.shape();
    if !wanted(matrices.as_ref()).any() {
        return logits.reshape(shape);
    }
    let mut arguments = vec![&matrices.embeddings, &matrices.classifier];
    arguments.extend(&matrices.bias);
    let node = ClassLogits {
        logits: chosen.keep(&logits),
        chosen,
    };
    attach(logits, &arguments, node)?.reshape(shape)
}

/// Classes on the host.
///
/// # Errors
/// One that does not exist: it is named.
fn known(classes: &Tensor, vocab: usize) -> Result<Vec<u32>> {
    let dims = classes.dims();
    let classes = classes
        .to_device(&Device::Cpu)?
        .to_dtype(DType::I64)?
        .flatten_all()?
        .to_vec1::<i64>()?;
    if let Some(flat) = classes.iter().position(|c| !(0..vocab as i64).contains(c)) {
        let mut rest = flat;
        let mut index: Vec<usize> = dims
            .iter()
            .rev()
            .map(|dim| {
                let i = rest % dim;
                rest /= dim;
                i
            })
            .collect();
        index.reverse();
        bail!(
            "class {} at {index:?} is outside [0, {vocab})",
            classes[flat]
        )
    }
    Ok(classes.into_iter().map(|class| class as u32).collect())
}

/// The chosen classes of all rows.
enum Classes {
    /// Row by row. All exist.
    OnHost(Vec<u32>),
    /// i64, `(rows, k)`, contiguous. Some may not exist.
    OnDevice(Tensor),
}

pub(super) struct Chosen {
    classes: Classes,
    /// Classes of a row.
    k: usize,
    /// What the products and the bias are multiplied by.
    scale: f64,
    /// Of the logits so scaled.
    softcap: Option<f64>,
    /// Whether kernels may run.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    kernels: bool,
}

impl Chosen {
    /// The settings are those of the problem. `classes` `(.., k)` are of its embeddings.
    pub fn new(classes: &Tensor, problem: &Problem) -> Result<Self> {
        let settings = &problem.settings;
        let k = classes.dim(D::Minus1)?;
        let on_host = match classes.device().is_cpu() || settings.check_targets {
            true => Some(known(classes, problem.vocab())?),
            false => None,
        };
        Ok(Self {
            classes: match on_host {
                Some(classes) if problem.device.is_cpu() => Classes::OnHost(classes),
                _ => Classes::OnDevice(to_i64(classes)?.reshape(((), k))?.contiguous()?),
            },
            k,
            scale: settings.logit_scale,
            softcap: settings.softcap,
            kernels: settings.implementation != Implementation::Native,
        })
    }

    /// `(rows, k)`, f32.
    pub fn logits(&self, matrices: Matrices<&Tensor>) -> Result<Tensor> {
        let logits = self.products(matrices)?;
        let logits = match self.scale {
            1. => logits,
            scale => (logits * scale)?,
        };
        match self.softcap {
            Some(softcap) => (logits / softcap)?.tanh()? * softcap,
            None => Ok(logits),
        }
    }

    /// What of the logits a backward needs.
    pub fn keep(&self, logits: &Tensor) -> Option<Tensor> {
        self.softcap.map(|_| logits.clone())
    }

    /// The logits without scale and softcap.
    fn products(&self, matrices: Matrices<&Tensor>) -> Result<Tensor> {
        match &self.classes {
            Classes::OnHost(classes) => cpu::products(matrices, classes, self.k),
            Classes::OnDevice(classes) => {
                #[cfg(feature = "cuda")]
                if self.kernels {
                    if let Some(products) = crate::cuda::class_logits::products(matrices, classes)?
                    {
                        return Ok(products);
                    }
                }
                let classes = on_device(classes, matrices)?;
                tensor::products(matrices, &classes, self.k)
            }
        }
    }

    /// The gradients, added to `others` if there are any, which may be in place. `upstream` is the gradient of the logits,
    /// `kept` what is [kept](Self::keep) of them.
    pub fn gradients(
        &self,
        matrices: Matrices<&Tensor>,
        kept: Option<&Tensor>,
        upstream: &Tensor,
        wanted: Wanted,
        others: Option<Gradients>,
    ) -> Result<Gradients> {
        let upstream = (upstream * self.scale)?;
        let upstream = match (kept, self.softcap) {
            (Some(logits), Some(softcap)) => {
                let slope = (logits / softcap)?.sqr()?.affine(-1., 1.)?;
                (upstream * slope)?
            }
            _ => upstream,
        };
        let upstream = upstream.contiguous()?;
        let own = match &self.classes {
            Classes::OnHost(classes) => cpu::gradients(matrices, classes, &upstream, wanted)?,
            Classes::OnDevice(classes) => {
                #[cfg(feature = "cuda")]
                if self.kernels {
                    use crate::cuda::class_logits::gradients;
                    let others = others.as_ref();
                    let sums = gradients(matrices, classes, &upstream, wanted, others)?;
                    if let Some(sums) = sums {
                        return Ok(sums);
                    }
                }
                let classes = on_device(classes, matrices)?;
                tensor::gradients(matrices, &classes, &upstream, wanted)?
            }
        };
        match others {
            Some(others) => others.plus(own),
            None => Ok(own),
        }
    }
}

/// For tensor operations.
fn on_device(classes: &Tensor, matrices: Matrices<&Tensor>) -> Result<tensor::Classes> {
    tensor::Classes::new(&classes.flatten_all()?, matrices.classifier.dim(0)?)
}

/// Joins the graph ready-made: the logits are few, and what computes them takes tensors.
struct ClassLogits {
    chosen: Chosen,
    /// What is kept of the result.
    logits: Option<Tensor>,
}

impl Node for ClassLogits {
    const NAME: &'static str = "class-logits";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let matrices = Matrices::of(arguments);
        let wanted = wanted(matrices);
        let detached = matrices.detach();
        let logits = self.logits.as_ref();
        let upstream = upstream.detach();
        let gradients =
            self.chosen
                .gradients(detached.as_ref(), logits, &upstream, wanted, None)?;
        Ok(vec![
            gradients.embeddings,
            gradients.classifier,
            gradients.bias,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two forms on the CPU, whose logits and gradients are to agree.
    #[test]
    fn tensor_operations_agree_with_the_loops() -> Result<()> {
        let (rows, k, hidden, vocab) = (70, 5, 33, 40);
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let normal =
                |shape: &[usize]| Tensor::randn(0f64, 1., shape, &Device::Cpu)?.to_dtype(dtype);
            let bias = normal(&[vocab])?;
            let (embeddings, classifier) = (normal(&[rows, hidden])?, normal(&[vocab, hidden])?);
            let matrices = Matrices {
                embeddings: &embeddings,
                classifier: &classifier,
                adapter: None,
                bias: Some(&bias),
            };
            let classes: Vec<u32> = (0..rows * k).map(|i| (i * i % vocab) as u32).collect();
            let on_device = classes.iter().map(|c| *c as i64).collect::<Vec<_>>();
            let on_device = tensor::Classes::new(&Tensor::new(on_device, &Device::Cpu)?, vocab)?;
            let upstream = Tensor::randn(0f32, 1., (rows, k), &Device::Cpu)?;
            let wanted = Wanted {
                embeddings: true,
                classifier: true,
                bias: true,
            };
            let loops = cpu::gradients(matrices, &classes, &upstream, wanted)?;
            let tensors = tensor::gradients(matrices, &on_device, &upstream, wanted)?;
            let pairs = [
                (
                    Some(cpu::products(matrices, &classes, k)?),
                    Some(tensor::products(matrices, &on_device, k)?),
                ),
                (loops.embeddings, tensors.embeddings),
                (loops.classifier, tensors.classifier),
                (loops.bias, tensors.bias),
            ];
            let tolerance = match dtype {
                DType::BF16 => 0.1,
                DType::F16 => 0.02,
                _ => 2e-5,
            };
            for (i, (a, b)) in pairs.into_iter().enumerate() {
                let (a, b) = (a.unwrap(), b.unwrap());
                assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
                let off = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?;
                let off = off.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(off < tolerance, "{dtype:?}, result {i}: {off}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_class_that_does_not_exist_is_never_read() -> Result<()> {
        let embeddings = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
        let classifier = Tensor::ones((4, 3), DType::F32, &Device::Cpu)?;
        let matrices = Matrices {
            embeddings: &embeddings,
            classifier: &classifier,
            adapter: None,
            bias: None,
        };
        let classes = Tensor::new(&[3i64, 4, -1, i64::MAX], &Device::Cpu)?;
        let classes = tensor::Classes::new(&classes, 4)?;
        let logits = tensor::products(matrices, &classes, 2)?;
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(logits[0], 3.);
        assert!(logits[1..].iter().all(|z| z.is_nan()), "{logits:?}");
        Ok(())
    }
}
