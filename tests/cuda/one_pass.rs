//! What can be asked of one pass beside the mean loss, over several tiles of rows and classes: against Candle's own
//! operations on stored logits in f64.

use super::common::{gradient_tolerance, norm, numbers, Random};
use super::{device, DTYPES, KERNELS};
use candle_core::{DType, Device, Result, Tensor, Var, D};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Entropy, Filter, Implementation, Options, Output, Reduction,
    Strategy,
};

const IGNORED: i64 = -100;

/// A combination of options.
#[derive(Debug, Clone)]
struct Asked {
    bias: bool,
    softcap: Option<f64>,
    scale: f64,
    smoothing: f64,
    class_weights: bool,
    token_weights: bool,
    z_loss: f64,
    bonus: f64,
    entropy: Entropy,
    predicted: bool,
    reduction: Reduction,
    strategy: Strategy,
    filter: Filter,
}

impl Asked {
    fn random(random: &mut Random) -> Self {
        let softcap = (random.below(3) == 0).then_some(4.);
        let entropies = [Entropy::Off, Entropy::Value, Entropy::Differentiable];
        Self {
            bias: random.below(2) == 0,
            softcap,
            scale: [1., 0.6, 1.7][random.below(3)],
            smoothing: match softcap {
                None => [0., 0.1, 0.4][random.below(3)],
                Some(_) => 0.,
            },
            class_weights: random.below(2) == 0,
            token_weights: random.below(2) == 0,
            z_loss: [0., 1e-2][random.below(2)],
            bonus: [0., 0.2][random.below(2)],
            entropy: entropies[random.below(3)],
            predicted: random.below(2) == 0,
            reduction: [Reduction::Mean, Reduction::Sum, Reduction::None][random.below(3)],
            strategy: [Strategy::Auto, Strategy::Recompute, Strategy::Fused][random.below(3)],
            filter: [Filter::Off, Filter::Threshold(0.)][random.below(2)],
        }
    }
}

/// The tensors of a problem in f64 on the host, of numbers that the dtype holds.
struct Problem {
    embeddings: Tensor,
    classifier: Tensor,
    bias: Tensor,
    class_weights: Tensor,
    token_weights: Tensor,
    targets: Tensor,
}

const BATCH: usize = 3;
const TIME: usize = 101;
const SHIFT: usize = 1;

impl Problem {
    fn new(random: &mut Random, dtype: DType, hidden: usize, vocab: usize) -> Result<Self> {
        let mut normal = |shape: &[usize], scale: f64| -> Result<Tensor> {
            let numbers = random.normals(shape.iter().product(), scale);
            let tensor = Tensor::from_vec(numbers, shape, &Device::Cpu)?;
            tensor.to_dtype(dtype)?.to_dtype(DType::F64)
        };
        let embeddings = normal(&[BATCH, TIME, hidden], 1.)?;
        let classifier = normal(&[vocab, hidden], 2. / (hidden as f64).sqrt())?;
        // Two classes alike: where they are the likeliest, the first is.
        let alike = classifier.narrow(0, 5, 1)?.copy()?;
        classifier.slice_set(&alike, 0, vocab - 3)?;
        let bias = normal(&[vocab], 1.)?;
        bias.slice_set(&bias.narrow(0, 5, 1)?.copy()?, 0, vocab - 3)?;
        let positive = |tensor: Tensor| tensor.abs()?.to_dtype(DType::F32)?.to_dtype(DType::F64);
        let class_weights = positive(normal(&[vocab], 1.)?)?;
        let token_weights = positive(normal(&[BATCH, TIME], 1.)?)?;
        let target = |_| match random.below(4) {
            0 => IGNORED,
            _ => random.below(vocab) as i64,
        };
        let targets: Vec<i64> = (0..BATCH * TIME).map(target).collect();
        Ok(Self {
            embeddings,
            classifier,
            bias,
            class_weights,
            token_weights,
            targets: Tensor::from_vec(targets, (BATCH, TIME), &Device::Cpu)?,
        })
    }

    /// Loss, lse, entropy and likeliest class of stored logits, and the inputs they are made of.
    fn dense(&self, asked: &Asked) -> Result<(Vec<Var>, [Tensor; 4])> {
        let [e, c, b] = [
            Var::from_tensor(&self.embeddings)?,
            Var::from_tensor(&self.classifier)?,
            Var::from_tensor(&self.bias)?,
        ];
        let steps = TIME - SHIFT;
        let rows = e.narrow(1, 0, steps)?.flatten_to(1)?;
        let mut z = rows.matmul(&c.t()?)?;
        if asked.bias {
            z = z.broadcast_add(&b)?;
        }
        if let Some(cap) = asked.softcap {
            z = ((z / cap)?.tanh()? * cap)?;
        }
        let z = (z * asked.scale)?;
        let targets = self.targets.narrow(1, SHIFT, steps)?.flatten_all()?;
        let counts = targets.ne(IGNORED)?.to_dtype(DType::F64)?;
        let classes = targets.maximum(0i64)?;
        let max = z.max_keepdim(D::Minus1)?.detach();
        let exp = z.broadcast_sub(&max)?.exp()?;
        let lse = (exp.sum_keepdim(D::Minus1)?.log()? + max)?;
        let log_p = z.broadcast_sub(&lse)?;
        let of_target = log_p.gather(&classes.unsqueeze(1)?, 1)?.squeeze(1)?;
        let ones = self.class_weights.ones_like()?;
        let weights = if asked.class_weights {
            &self.class_weights
        } else {
            &ones
        };
        let of_class = weights.index_select(&classes, 0)?;
        let tokens = match asked.token_weights {
            true => self.token_weights.narrow(1, SHIFT, steps)?.flatten_all()?,
            false => counts.ones_like()?,
        };
        let vocab = weights.dim(0)? as f64;
        let smooth = (log_p.broadcast_mul(weights)?.sum(1)? * (asked.smoothing / vocab))?;
        let nll = ((of_target * &of_class)? * (1. - asked.smoothing))?;
        let lse = lse.squeeze(1)?;
        let z_loss = (lse.sqr()? * asked.z_loss)?;
        let entropy = log_p.exp()?.mul(&log_p)?.sum(1)?.neg()?.mul(&counts)?;
        let losses = (((z_loss - nll)? - smooth)? - (&entropy * asked.bonus)?)?;
        let losses = losses.mul(&tokens)?.mul(&counts)?;
        let loss = match asked.reduction {
            Reduction::None => losses.reshape((BATCH, steps))?,
            Reduction::Sum => losses.sum_all()?,
            Reduction::Mean => {
                let total = tokens.mul(&of_class)?.mul(&counts)?.sum_all()?;
                losses.sum_all()?.div(&total)?
            }
        };
        let predicted = z.detach().argmax(D::Minus1)?.to_dtype(DType::F64)?;
        let none = (predicted.ones_like()? * f64::from(u32::MAX))?;
        let predicted = targets.ne(IGNORED)?.where_cond(&predicted, &none)?;
        let shape = (BATCH, steps);
        Ok((
            vec![e, c, b],
            [
                loss,
                lse.mul(&counts)?.reshape(shape)?,
                entropy.reshape(shape)?,
                predicted.reshape(shape)?,
            ],
        ))
    }

    /// The same by the crate, on a device.
    fn computed(
        &self,
        asked: &Asked,
        dtype: DType,
        implementation: Implementation,
        device: &Device,
    ) -> Result<(Vec<Var>, Output)> {
        let var = |tensor: &Tensor| Var::from_tensor(&tensor.to_dtype(dtype)?.to_device(device)?);
        let [e, c, b] = [
            var(&self.embeddings)?,
            var(&self.classifier)?,
            var(&self.bias)?,
        ];
        let weights = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_device(device);
        let options = Options::default()
            .bias(asked.bias.then_some(b.as_tensor()))
            .softcap(asked.softcap)
            .logit_scale(asked.scale)
            .label_smoothing(asked.smoothing)
            .z_loss_weight(asked.z_loss)
            .entropy_bonus(asked.bonus)
            .entropy(asked.entropy)
            .predicted(asked.predicted)
            .reduction(asked.reduction)
            .strategy(asked.strategy)
            .filter(asked.filter)
            .shift(SHIFT)
            .ignore_index(IGNORED)
            .implementation(implementation);
        let class_weights = weights(&self.class_weights)?;
        let token_weights = weights(&self.token_weights)?;
        let options = options
            .class_weights(asked.class_weights.then_some(&class_weights))
            .token_weights(asked.token_weights.then_some(&token_weights));
        let output = linear_cross_entropy(&e, &c, &self.targets.to_device(device)?, &options)?;
        Ok((vec![e, c, b], output))
    }
}

/// The relative error, in Frobenius norm.
fn error(got: &Tensor, want: &Tensor) -> Result<f64> {
    let (got, want) = (numbers(got)?, numbers(want)?);
    assert_eq!(got.len(), want.len());
    let size = norm(want.iter().copied());
    Ok(norm(got.iter().zip(&want).map(|(a, b)| a - b)) / size.max(1e-6))
}

#[test]
fn everything_that_can_be_asked_matches_stored_logits() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let mut random = Random::new(17);
    let mut wrong = Vec::new();
    for turn in 0..90 {
        let dtype = DTYPES[turn % 3];
        let implementation = KERNELS[turn / 3 % 2];
        let (hidden, vocab) = [(64, 700), (72, 1000), (40, 130), (33, 517)][random.below(4)];
        let asked = Asked::random(&mut random);
        let problem = Problem::new(&mut random, dtype, hidden, vocab)?;
        let (dense, [loss, lse, entropy, predicted]) = problem.dense(&asked)?;
        let (vars, output) = problem.computed(&asked, dtype, implementation, &device)?;
        let mut check = |what: &str, error: f64, most: f64| {
            if error.is_nan() || error > most {
                wrong.push(format!(
                    "{what} off by {error:e}: {dtype:?} {implementation:?} {hidden} {vocab} {asked:?}"
                ));
            }
        };
        let of_values = 1e-5;
        check("loss", error(&output.loss, &loss)?, of_values);
        check("lse", error(&output.lse, &lse)?, of_values);
        let known = asked.entropy != Entropy::Off || asked.bonus != 0.;
        assert_eq!(output.entropy.is_some(), known);
        if let Some(got) = &output.entropy {
            check("entropy", error(got, &entropy)?, of_values);
        }
        assert_eq!(output.predicted.is_some(), asked.predicted);
        if let Some(got) = &output.predicted {
            let differing = numbers(got)?;
            let differing = differing.iter().zip(numbers(&predicted)?);
            let differing = differing.filter(|(a, b)| *a != b).count();
            check("predicted", differing as f64, 0.);
        }
        // Weights that differ from position to position.
        let weights = |like: &Tensor, step: f64| -> Result<Tensor> {
            let numbers = (0..like.elem_count()).map(|i| (i as f64 * step).sin());
            Tensor::from_iter(numbers, &Device::Cpu)?.reshape(like.shape())
        };
        let total = |loss: &Tensor, lse: &Tensor, entropy: Option<&Tensor>| -> Result<Tensor> {
            let sum = |tensor: &Tensor, step: f64| -> Result<Tensor> {
                let weights = weights(tensor, step)?;
                let weights = weights
                    .to_dtype(tensor.dtype())?
                    .to_device(tensor.device())?;
                (tensor * weights)?.sum_all()
            };
            let mut total = match loss.rank() {
                0 => loss.clone(),
                _ => sum(loss, 0.7)?,
            };
            if turn % 4 == 0 {
                total = (total + sum(lse, 0.3)?)?;
            }
            match entropy {
                Some(entropy) => total + sum(entropy, 1.1)?,
                None => Ok(total),
            }
        };
        let differentiated = asked.entropy == Entropy::Differentiable;
        let of_entropy = |entropy| Some(entropy).filter(|_| differentiated);
        let want = total(&loss, &lse, of_entropy(&entropy))?.backward()?;
        let got = output.entropy.as_ref().filter(|_| differentiated);
        let got = backward(&total(&output.loss, &output.lse, got)?)?;
        for (name, (var, of)) in ["dE", "dC", "db"].iter().zip(vars.iter().zip(&dense)) {
            let (Some(got), Some(want)) = (got.get(var), want.get(of)) else {
                assert!(*name == "db" && !asked.bias, "no {name}");
                continue;
            };
            check(name, error(got, want)?, gradient_tolerance(dtype));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    Ok(())
}
