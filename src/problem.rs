//! A validated call: what every implementation is given.

use crate::devices::same_device;
use crate::matrices::Matrices;
use crate::positions::{copyable, pick_positions, PositionMap};
use crate::terms::{Terms, Weights};
use crate::{Entropy, Filter, Implementation, Options, Reduction, Strategy, VocabParallel};
use candle_core::{bail, DType, Device, Error, Result, Tensor};

/// The settings of a call that the implementations read, thresholds resolved for the dtype.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub softcap: Option<f64>,
    pub ignore_index: i64,
    pub reduction: Reduction,
    /// What every logit is multiplied by after the bias. `softcap` is that of logits so scaled.
    pub logit_scale: f64,
    /// Of every position, where the problem has no weights.
    pub terms: Terms,
    /// The share of the uniform distribution in the targets.
    pub label_smoothing: f64,
    pub entropy: Entropy,
    pub predicted: bool,
    pub filter_embeddings: Option<f64>,
    pub filter_classifier: Option<f64>,
    /// What the filter does not keep is dropped, not averaged.
    pub drop_filtered: bool,
    /// No threshold is the user's: the implementation may do without a filter where it does not pay.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub automatic_filter: bool,
    pub implementation: Implementation,
    pub strategy: Strategy,
    pub workspace: Option<usize>,
    /// The native implementation always checks.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub check_targets: bool,
    /// Which classes these are, where other ranks have others.
    pub vocab_parallel: Option<VocabParallel>,
}

impl Settings {
    /// Whether gradients go through the entropy: its own, or as part of the loss.
    pub fn differentiates_entropy(&self) -> bool {
        self.entropy == Entropy::Differentiable || self.terms.entropy != 0.
    }
}

/// A validated call, without its matrices.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    /// That of the matrices.
    pub dtype: DType,
    pub device: Device,
    vocab: usize,
    /// `(rows)`, contiguous, i64, u32 or i32.
    pub targets: Tensor,
    pub positions: PositionMap,
    /// The shape of the result under [`Reduction::None`].
    pub shape: Vec<usize>,
    /// Where positions differ in what their losses are made of.
    pub weights: Option<Weights>,
    pub settings: Settings,
}

impl Problem {
    /// The call, and its matrices as what they are in the user's graph.
    pub fn new(
        embeddings: &Tensor,
        classifier: &Tensor,
        targets: &Tensor,
        options: &Options,
    ) -> Result<(Self, Matrices<Tensor>)> {
        let (lead, hidden) = match embeddings.dims() {
            [lead @ .., hidden] => (lead, *hidden),
            [] => bail!("embeddings must have shape (.., D), got a scalar"),
        };
        let vocab = match classifier.dims() {
            [vocab, d] if *d == hidden => *vocab,
            dims => bail!(
                "classifier must have shape (V, {hidden}) to match embeddings {:?}, got {dims:?}",
                embeddings.dims()
            ),
        };
        if targets.dims() != lead {
            bail!(
                "targets must have shape {lead:?} to match embeddings {:?}, got {:?}",
                embeddings.dims(),
                targets.dims()
            )
        }
        if embeddings.elem_count() == 0 || vocab == 0 {
            bail!(
                "empty input: embeddings {:?}, classifier {:?}",
                embeddings.dims(),
                classifier.dims()
            )
        }
        let dtype = embeddings.dtype();
        if !matches!(dtype, DType::BF16 | DType::F16 | DType::F32 | DType::F64) {
            bail!("embeddings must be bf16, f16, f32 or f64, got {dtype:?}")
        }
        if !matches!(targets.dtype(), DType::I64 | DType::U32 | DType::I32) {
            bail!("targets must be i64, u32 or i32, got {:?}", targets.dtype())
        }
        let mut like_embeddings = vec![("classifier", classifier)];
        if let Some(bias) = &options.bias {
            if bias.dims() != [vocab] {
                bail!(
                    "bias must have shape [{vocab}] to match classifier {:?}, got {:?}",
                    classifier.dims(),
                    bias.dims()
                )
            }
            like_embeddings.push(("bias", bias));
        }
        for (name, tensor) in like_embeddings {
            if tensor.dtype() != dtype {
                bail!(
                    "{name} must have the dtype of embeddings, {dtype:?}, got {:?}",
                    tensor.dtype()
                )
            }
            same_device(name, tensor, "embeddings", embeddings)?;
        }
        if let Some(adapter) = &options.adapter {
            adapter.check(embeddings, classifier)?;
        }
        same_device("targets", targets, "embeddings", embeddings)?;
        if let Some(shard) = &options.vocab_parallel {
            shard.validate(vocab)?;
        }
        check_numbers(options)?;
        let (positions, shape) = pick_positions(lead, options.shift)?;
        if embeddings.elem_count() / hidden > u32::MAX as usize || vocab > u32::MAX as usize {
            bail!(
                "at most {} rows and classes are supported, got embeddings {:?}, classifier {:?}",
                u32::MAX,
                embeddings.dims(),
                classifier.dims()
            )
        }
        let threshold = |filter: Filter| {
            let threshold = filter.threshold(dtype)?;
            let exact = options.entropy == Entropy::Differentiable
                || options.entropy_bonus != 0.
                || options.adapter.is_some();
            Ok::<_, Error>(threshold.filter(|_| !exact))
        };
        // A matrix stays what it is: a `Var` that is reshaped is none to `backward`.
        let matrix = match embeddings.rank() {
            2 => embeddings.contiguous()?,
            _ => embeddings
                .reshape((positions.rows(), hidden))?
                .contiguous()?,
        };
        let (embeddings, adapter) = match &options.adapter {
            None => (matrix, None),
            Some(adapter) => {
                let (embeddings, adapter) = adapter.widen(&matrix)?;
                (embeddings, Some(adapter))
            }
        };
        let matrices = Matrices {
            embeddings,
            classifier: classifier.contiguous()?,
            adapter,
            bias: match &options.bias {
                Some(bias) => Some(bias.contiguous()?),
                None => None,
            },
        };
        let problem = Self {
            dtype,
            device: targets.device().clone(),
            vocab,
            targets: match targets.is_contiguous() {
                true => targets.flatten_all()?,
                false => copyable(targets)?.flatten_all()?.contiguous()?,
            },
            weights: Weights::new(targets, options, positions, &shape, vocab, dtype)?,
            positions,
            shape,
            settings: Settings {
                // scale * cap * tanh(z / cap) is the cap `scale * cap` of `scale * z`.
                softcap: options.softcap.map(|softcap| softcap * options.logit_scale),
                logit_scale: options.logit_scale,
                ignore_index: options.ignore_index,
                reduction: options.reduction,
                terms: Terms::new(options),
                label_smoothing: options.label_smoothing,
                entropy: match options.entropy {
                    Entropy::Off if options.entropy_bonus != 0. => Entropy::Value,
                    entropy => entropy,
                },
                predicted: options.predicted,
                filter_embeddings: threshold(options.filter_embeddings)?,
                filter_classifier: threshold(options.filter_classifier)?,
                drop_filtered: drops(options)?,
                automatic_filter: [options.filter_embeddings, options.filter_classifier]
                    .iter()
                    .all(|filter| matches!(filter, Filter::Auto | Filter::Off)),
                implementation: options.implementation,
                // Gradients cannot be formed before lse is known, over the classes of all ranks.
                strategy: match options.vocab_parallel {
                    Some(_) => Strategy::Recompute,
                    None => options.strategy,
                },
                workspace: options.workspace,
                check_targets: options.check_targets,
                vocab_parallel: options.vocab_parallel.clone(),
            },
        };
        Ok((problem, matrices))
    }

    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// The targets in their shape, with a shift that [`counting`](Self::counting) has too.
    pub fn shaped_targets(&self) -> Result<Tensor> {
        let PositionMap { batch, time, .. } = self.positions;
        self.targets.reshape((batch, time))
    }

    /// Options that say which of these targets count.
    pub fn counting(&self) -> Options {
        Options::default()
            .ignore_index(self.settings.ignore_index)
            .shift(self.positions.shift)
    }

    /// A target by its index among all targets. On a GPU this waits for the device.
    #[cfg(feature = "cuda")]
    pub fn target(&self, flat: usize) -> Result<i64> {
        crate::positions::to_i64(&self.targets.get(flat)?)?.to_scalar()
    }

    /// The error that names a target, given by its index among all targets.
    pub fn bad_target(&self, flat: usize, target: i64) -> Error {
        Error::Msg(format!(
            "target {target} at position {:?} is outside [0, {}) and is not ignore_index {}",
            self.index_of(flat),
            self.vocab(),
            self.settings.ignore_index
        ))
        .bt()
    }

    /// The index, in the shape of the targets, of one given by its index among all of them.
    fn index_of(&self, mut flat: usize) -> Vec<usize> {
        let mut dims = self.shape.clone();
        if let Some(last) = dims.last_mut() {
            *last += self.positions.shift;
        }
        let mut index = vec![0; dims.len()];
        for (i, dim) in index.iter_mut().zip(&dims).rev() {
            *i = flat % dim;
            flat /= dim;
        }
        index
    }

    /// `ranks` holds, for each row that counts, how many ranks have its target in their shard; there may be more
    /// numbers.
    ///
    /// # Errors
    /// It is not one rank for every row: the first is named.
    pub fn check_shards(&self, ranks: &Tensor) -> Result<()> {
        let ranks = ranks
            .to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .to_vec1::<f64>()?;
        let targets = self
            .targets
            .to_device(&Device::Cpu)?
            .to_dtype(DType::I64)?
            .to_vec1::<i64>()?;
        let counting = (0..self.positions.len())
            .map(|position| self.positions.row(position) + self.positions.shift)
            .filter(|&flat| targets[flat] != self.settings.ignore_index);
        for (flat, ranks) in counting.zip(ranks) {
            let (target, index) = (targets[flat], self.index_of(flat));
            if ranks == 0. {
                bail!(
                    "target {target} at position {index:?} is in the shard of no rank and is not ignore_index {}",
                    self.settings.ignore_index
                )
            }
            if ranks != 1. {
                bail!("target {target} at position {index:?} is in the shards of {ranks} ranks")
            }
        }
        Ok(())
    }
}

/// Whether the filters drop what they do not keep.
fn drops(options: &Options) -> Result<bool> {
    match [options.filter_embeddings, options.filter_classifier] {
        [Filter::Drop(_), Filter::Drop(_) | Filter::Off] | [Filter::Off, Filter::Drop(_)] => {
            Ok(true)
        }
        [a @ Filter::Drop(_), b] | [b, a @ Filter::Drop(_)] => bail!(
            "filters of the two gradients must both drop or both average, got {a:?} and {b:?}"
        ),
        _ => Ok(false),
    }
}

/// Whether the options' numbers are in their ranges.
fn check_numbers(options: &Options) -> Result<()> {
    let Options {
        z_loss_weight,
        entropy_bonus,
        label_smoothing,
        logit_scale,
        ..
    } = *options;
    if !(z_loss_weight as f32).is_finite() {
        bail!("z_loss_weight must be finite, as an f32 too, got {z_loss_weight}")
    }
    if !(entropy_bonus as f32).is_finite() {
        bail!("entropy_bonus must be finite, as an f32 too, got {entropy_bonus}")
    }
    // Inverses are used too: what f32 rounds to 0 or infinity would make NaN gradients.
    let normal = |x: f64| x > 0. && (x as f32).is_normal();
    if !normal(logit_scale) {
        bail!("logit_scale must be positive and finite, as an f32 too, got {logit_scale}")
    }
    if let Some(softcap) = options.softcap {
        if !normal(softcap) {
            bail!("softcap must be positive and finite, as an f32 too, got {softcap}")
        }
        if !normal(softcap * logit_scale) {
            bail!(
                "softcap times logit_scale must be positive and finite, as an f32 too, got {softcap} times {logit_scale}"
            )
        }
        if label_smoothing != 0. {
            bail!("label_smoothing does not go together with a softcap, got {label_smoothing} and {softcap}")
        }
    }
    if !(0. ..=1.).contains(&label_smoothing) {
        bail!("label_smoothing must be in [0, 1], got {label_smoothing}")
    }
    Ok(())
}
