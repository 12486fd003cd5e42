//! Losses with a low-rank adapter of the classifier, beside the reference.
//!
//! The reference is told of what the loss says it rounds: `scale A`, their product with the embeddings and `B`, to the dtype
//! of the embeddings. So it is the loss of embeddings and a classifier of `r` more columns. Of the classifier with the
//! adapter in it, nothing rounded, it has to come close.

use super::reference::{Gradient, Gradients, Inputs, Reduced, Reference, Upstream};
use super::{gradient_close, norm, numbers, output_close, round_to, weighted, Case, Random};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Implementation, LowRank, Options, Output, Strategy,
};

/// A case and an adapter of its classifier.
#[derive(Debug, Clone)]
pub struct Adapted {
    pub case: Case,
    /// `(rank, hidden)` and `(vocab, rank)`, numbers of the adapter's dtype.
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    pub rank: usize,
    pub scale: f64,
    pub dtype: DType,
}

/// What a loss with an adapter leaves.
pub struct Computed {
    pub output: Output,
    /// dE, dA, dB and db, if there is one.
    pub gradients: Vec<(&'static str, Vec<f64>)>,
}

/// The sizes of a call: leading dimensions, columns, classes, rank.
type Sizes = (&'static [usize], usize, usize, usize);

/// Ragged ones, and whole tiles.
pub const SIZES: [Sizes; 8] = [
    (&[37], 64, 300, 16),
    (&[2, 50], 100, 257, 1),
    (&[130], 72, 700, 8),
    (&[3, 60], 128, 513, 40),
    (&[260], 200, 1000, 64),
    (&[5], 8, 3, 16),
    (&[64], 65, 130, 72),
    (&[256], 256, 1024, 24),
];

impl Adapted {
    pub fn random(seed: u64, dtype: DType, sizes: Sizes) -> Self {
        let (lead, hidden, vocab, rank) = sizes;
        let case = Case::random(seed, dtype, lead, hidden, vocab);
        let mut random = Random::new(seed + 1000);
        let adapter_dtype = match (dtype, seed.is_multiple_of(2)) {
            (DType::F64, _) => DType::F64,
            (_, true) => DType::F32,
            (dtype, false) => dtype,
        };
        let mut normals = |n: usize, size: f64| -> Vec<f64> {
            let normals = random.normals(n, size).into_iter();
            normals.map(|x| round_to(adapter_dtype, x)).collect()
        };
        Self {
            a: normals(rank * hidden, 1. / (hidden as f64).sqrt()),
            b: normals(vocab * rank, 1. / (rank as f64).sqrt()),
            case,
            rank,
            scale: 0.75,
            dtype: adapter_dtype,
        }
    }

    /// Options of the case, of which a seed decides: those that go together with all others, and what there is beside.
    pub fn with_options(mut self, seed: u64) -> Self {
        let case = &mut self.case;
        let mut random = Random::new(seed);
        if random.below(2) == 0 {
            *case = case.clone().with_bias(seed + 1);
        }
        if random.below(2) == 0 {
            *case = case.clone().with_ignored(seed + 2);
        }
        if case.lead.len() > 1 {
            case.inputs.shift = random.below(2);
        }
        case.inputs.softcap = (random.below(3) == 0).then_some(4.);
        case.inputs.reduction = [Reduced::Mean, Reduced::Sum, Reduced::None][random.below(3)];
        *case = case.clone().with_some_options(seed + 3);
        self
    }

    fn adapter(&self, device: &Device) -> Result<(Var, Var)> {
        let var = |values: &[f64], shape: (usize, usize)| {
            let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
            Var::from_tensor(&tensor.to_dtype(self.dtype)?.to_device(device)?)
        };
        let Inputs { hidden, vocab, .. } = self.case.inputs;
        Ok((
            var(&self.a, (self.rank, hidden))?,
            var(&self.b, (vocab, self.rank))?,
        ))
    }

    pub fn compute(
        &self,
        options: Options,
        device: &Device,
        upstream: &Upstream,
    ) -> Result<Computed> {
        let tensors = self.case.tensors(device)?;
        let (a, b) = self.adapter(device)?;
        let options = self.case.options(options, &tensors);
        let options = options.adapter(LowRank::new(&a, &b, self.scale));
        let classifier = tensors.classifier.detach();
        let targets = &tensors.targets;
        let output = linear_cross_entropy(&tensors.embeddings, &classifier, targets, &options)?;
        let grads = backward(&weighted(&output, upstream)?)?;
        let vars = [
            ("dE", Some(&tensors.embeddings)),
            ("dA", Some(&a)),
            ("dB", Some(&b)),
            ("db", tensors.bias.as_ref()),
        ];
        let mut gradients = Vec::new();
        for (what, var) in vars {
            let Some(var) = var else { continue };
            let Some(grad) = grads.get(var) else {
                candle_core::bail!("{what} is missing")
            };
            if grad.dtype() != var.dtype() || grad.dims() != var.dims() {
                candle_core::bail!("{what} is {:?} {:?}", grad.dtype(), grad.dims())
            }
            gradients.push((what, numbers(grad)?));
        }
        Ok(Computed { output, gradients })
    }

    /// `scale A`, its product with the embeddings and `B` as they are rounded.
    fn rounded(&self, device: &Device) -> Result<[Vec<f64>; 3]> {
        let dtype = self.case.dtype;
        let tensors = self.case.tensors(device)?;
        let (a, b) = self.adapter(device)?;
        let a = (a.as_tensor() * self.scale)?.to_dtype(dtype)?;
        // A product of as many columns as the loss has: another may be summed in another order.
        let padded = a.pad_with_zeros(0, 0, self.rank.next_multiple_of(8) - self.rank)?;
        let rows = tensors.embeddings.reshape(((), self.case.inputs.hidden))?;
        let inner = rows.matmul(&padded.t()?)?.narrow(1, 0, self.rank)?;
        Ok([
            numbers(&a)?,
            numbers(&inner)?,
            numbers(&b.to_dtype(dtype)?)?,
        ])
    }

    /// The gradients of embeddings, `A`, `B` and bias from those of the wide matrices.
    fn narrow(&self, wide: Gradients, a: &[f64]) -> Vec<Gradient> {
        let (hidden, rank) = (self.case.inputs.hidden, self.rank);
        let embeddings = &self.case.inputs.embeddings;
        let rows = embeddings.len() / hidden;
        let part = |of: &Gradient, from: usize, columns: usize| {
            let pick = |values: &[f64]| -> Vec<f64> {
                let rows = values.chunks(hidden + rank);
                rows.flat_map(|row| row[from..from + columns].to_vec())
                    .collect()
            };
            Gradient {
                value: pick(&of.value),
                magnitude: pick(&of.magnitude),
                droppable: pick(&of.droppable),
                added: pick(&of.added),
            }
        };
        let mut of_embeddings = part(&wide.embeddings, 0, hidden);
        let inner = part(&wide.embeddings, hidden, rank);
        let mut of_a = Gradient {
            value: vec![0.; a.len()],
            magnitude: vec![0.; a.len()],
            droppable: vec![0.; a.len()],
            added: vec![0.; a.len()],
        };
        // The gradient of the inner product is rounded before it goes on: of small numbers f16 has few digits.
        let smallest = if self.case.dtype == DType::F16 {
            2f64.powi(-25)
        } else {
            0.
        };
        for (i, k) in (0..rows).flat_map(|i| (0..rank).map(move |k| (i, k))) {
            let from = i * rank + k;
            for d in 0..hidden {
                let (e, at) = (embeddings[i * hidden + d], k * hidden + d);
                let pairs = [
                    (&mut of_embeddings, i * hidden + d, a[at]),
                    (&mut of_a, at, self.scale * e),
                ];
                for (to, at, factor) in pairs {
                    to.value[at] += inner.value[from] * factor;
                    to.magnitude[at] += inner.magnitude[from] * factor.abs();
                    to.added[at] += inner.added[from] * factor;
                    to.droppable[at] += smallest * factor.abs();
                }
            }
        }
        let of_b = part(&wide.classifier, hidden, rank);
        vec![of_embeddings, of_a, of_b, wide.bias]
    }

    /// What a loss on this device is compared with.
    pub fn expected(&self, device: &Device, upstream: &Upstream) -> Result<Expected> {
        let [a, inner, b] = self.rounded(device)?;
        let Inputs { hidden, .. } = self.case.inputs;
        let joined = |left: &[f64], right: &[f64]| -> Vec<f64> {
            let rows = left.chunks(hidden).zip(right.chunks(self.rank));
            rows.flat_map(|(left, right)| [left, right].concat())
                .collect()
        };
        let reference = Reference::new(Inputs {
            hidden: hidden + self.rank,
            embeddings: joined(&self.case.inputs.embeddings, &inner),
            classifier: joined(&self.case.inputs.classifier, &b),
            ..self.case.inputs.clone()
        });
        let wide = reference.gradients(upstream, 0.);
        Ok(Expected {
            gradients: self.narrow(wide, &a),
            reference,
            merged: self.merged(upstream),
        })
    }

    /// Loss, dE, dA and dB of the classifier that has the adapter in it.
    fn merged(&self, upstream: &Upstream) -> [Vec<f64>; 4] {
        let (hidden, rank) = (self.case.inputs.hidden, self.rank);
        let mut classifier = self.case.inputs.classifier.clone();
        for (row, b) in classifier.chunks_mut(hidden).zip(self.b.chunks(rank)) {
            for (b, a) in b.iter().zip(self.a.chunks(hidden)) {
                let add = |(c, a): (&mut f64, &f64)| *c += self.scale * b * a;
                row.iter_mut().zip(a).for_each(add);
            }
        }
        let reference = Reference::new(Inputs {
            classifier,
            ..self.case.inputs.clone()
        });
        let gradients = reference.gradients(upstream, 0.);
        let (mut of_a, mut of_b) = (vec![0.; self.a.len()], vec![0.; self.b.len()]);
        for (j, row) in gradients.classifier.value.chunks(hidden).enumerate() {
            for k in 0..rank {
                let at = j * rank + k;
                for (d, g) in row.iter().enumerate() {
                    of_a[k * hidden + d] += self.scale * self.b[at] * g;
                    of_b[at] += self.scale * self.a[k * hidden + d] * g;
                }
            }
        }
        [reference.loss, gradients.embeddings.value, of_a, of_b]
    }

    /// Compares a loss and its gradients with what is expected.
    pub fn check(
        &self,
        computed: &Computed,
        expected: &Expected,
    ) -> std::result::Result<(), String> {
        let dtype = self.case.dtype;
        output_close(&computed.output, &self.case, &expected.reference)?;
        for ((what, got), want) in computed.gradients.iter().zip(&expected.gradients) {
            let largest = expected.reference.largest_logit;
            gradient_close(what, got, want, dtype, largest)?;
        }
        let tolerance = match dtype {
            DType::BF16 => 4e-2,
            DType::F16 => 5e-3,
            DType::F32 => 3e-5,
            _ => 1e-6,
        };
        let loss = numbers(&computed.output.loss).map_err(|e| e.to_string())?;
        let gradients = computed.gradients.iter().map(|(what, got)| (*what, got));
        let all = [("loss", &loss)].into_iter().chain(gradients);
        for ((what, got), want) in all.zip(&expected.merged) {
            let off = norm(got.iter().zip(want).map(|(got, want)| got - want));
            let size = norm(want.iter().copied());
            if off.is_nan() || off > tolerance * size.max(1e-3) {
                return Err(format!(
                    "{what} is {off:e} off that of the merged classifier, of {size:e}"
                ));
            }
        }
        Ok(())
    }
}

/// What a loss with an adapter is compared with.
pub struct Expected {
    /// Of the wide matrices.
    reference: Reference,
    /// dE, dA, dB and db.
    gradients: Vec<Gradient>,
    merged: [Vec<f64>; 4],
}

/// What is wrong with adapters of all sizes under options that seeds decide, `seeds` of each, by each implementation and
/// strategy.
pub fn wrong(
    device: &Device,
    dtypes: &[DType],
    implementations: &[Implementation],
    seeds: u64,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (i, sizes) in SIZES.into_iter().enumerate() {
        for &dtype in dtypes {
            for seed in 0..seeds {
                let seed = 100 * i as u64 + 10 * seed + dtype as u64;
                let adapted = Adapted::random(seed, dtype, sizes).with_options(seed);
                let upstream = adapted.case.upstream(seed, true, seed.is_multiple_of(3));
                let expected = adapted.expected(device, &upstream).unwrap();
                for &implementation in implementations {
                    for strategy in [Strategy::Fused, Strategy::Recompute] {
                        let options = Options::default()
                            .implementation(implementation)
                            .strategy(strategy);
                        let computed = adapted.compute(options, device, &upstream);
                        let result = computed.map_err(|e| e.to_string());
                        let result = result.and_then(|c| adapted.check(&c, &expected));
                        if let Err(error) = result {
                            wrong.push(format!(
                                "{}, rank {}, {implementation:?} {strategy:?}: {error}",
                                super::grid::describe(&adapted.case),
                                adapted.rank
                            ));
                        }
                    }
                }
            }
        }
    }
    wrong
}
