//! What the loss of a position is made of: its nll, its lse, the square of its lse and its entropy, each with a factor; and
//! what a teacher of few classes has in the gradient of the lse.

use crate::devices::same_device;
use crate::objectives::counted;
use crate::op::contract::accumulator;
use crate::positions::{to_i64, PositionMap};
use crate::{Options, Reduction};
use candle_core::{bail, DType, Result, Tensor, D};

/// What the probability of all classes that a teacher does not name is at least, in the derivative of its logarithm: f32
/// numbers do not tell less from rounding.
pub(crate) const LEAST_REST: f64 = 1e-6;

/// `loss = nll_factor * nll + lse_factor * lse + square_factor * lse^2 + entropy_factor * entropy`
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Terms {
    /// 1, or the weight of the position's target less what label smoothing takes of it.
    pub nll: f64,
    /// What label smoothing adds.
    pub lse: f64,
    /// The weight of the z-loss.
    pub square: f64,
    /// A teacher's probability of the classes it does not name. `-rest log(1 - S)`, where the named classes have the
    /// probability `S = exp(named - lse)`, is in the gradient alone: who sets it adds its value.
    pub rest: f64,
    /// The log-sum-exp of the named classes' logits.
    pub named: f64,
    /// Less the weight of the entropy bonus.
    pub entropy: f64,
}

impl Terms {
    /// Of positions without weights.
    pub fn new(options: &Options) -> Self {
        Self {
            nll: 1. - options.label_smoothing,
            lse: options.label_smoothing,
            square: options.z_loss_weight,
            rest: 0.,
            named: 0.,
            entropy: -options.entropy_bonus,
        }
    }

    /// The loss of a position; `entropy` counts where it has a factor.
    pub fn loss(&self, nll: f64, lse: f64, entropy: f64) -> f64 {
        // What is left out makes no NaN of what is infinite.
        let term = |factor: f64, value: f64| match factor {
            0. => 0.,
            factor => factor * value,
        };
        term(self.nll, nll)
            + term(self.lse, lse)
            + term(self.square, lse * lse)
            + term(self.entropy, entropy)
    }

    /// What the softmax has in the gradient of a position's loss, the entropy's apart. The one-hot has `nll`.
    pub fn softmax(&self, lse: f64) -> f64 {
        let of_square = match self.square {
            0. => 0.,
            factor => 2. * factor * lse,
        };
        let of_rest = match self.rest {
            0. => 0.,
            factor => {
                let named = (self.named - lse).exp();
                -factor * named / (1. - named).max(LEAST_REST)
            }
        };
        self.nll + self.lse + of_square + of_rest
    }
}

/// [`Terms`] that differ from position to position, and what the mean divides by. On the device of the
/// call, in the [accumulator] of its dtype.
#[derive(Debug, Clone)]
pub(crate) struct Weights {
    /// `(6, positions)`, contiguous: the fields of [`Terms`], in their order.
    pub terms: Tensor,
    /// The sum of the weights of the positions that count: one number.
    pub total: Tensor,
    /// `(positions)`: the weights of the tokens, 0 where one does not count.
    pub tokens: Tensor,
    /// `(V)`, of all classes.
    pub classes: Option<Tensor>,
}

impl Weights {
    /// `None` where every position has the same. `classes` are those here.
    pub fn new(
        targets: &Tensor,
        options: &Options,
        positions: PositionMap,
        shape: &[usize],
        classes: usize,
        dtype: DType,
    ) -> Result<Option<Self>> {
        let dtype = accumulator(dtype);
        if options.class_weights.is_none() && options.token_weights.is_none() {
            return Ok(None);
        }
        let n = positions.len();
        let of_positions = |of_targets: &Tensor| -> Result<Tensor> {
            match options.shift {
                0 => of_targets.flatten_all(),
                shift => of_targets
                    .narrow(D::Minus1, shift, shape[shape.len() - 1])?
                    .flatten_all(),
            }
        };
        let ones = || Tensor::ones(n, dtype, targets.device());
        let tokens = match &options.token_weights {
            None => ones()?,
            Some(weights) => {
                check("token_weights", weights, targets)?;
                if weights.dims() != targets.dims() {
                    bail!(
                        "token_weights must have the shape of targets, {:?}, got {:?}",
                        targets.dims(),
                        weights.dims()
                    )
                }
                of_positions(&weights.detach().to_dtype(dtype)?)?
            }
        };
        let counts = counted(targets, options)?.flatten_all()?;
        // 0 where a position does not count, whatever the weights hold there.
        let masked = |values: Tensor| counts.where_cond(&values, &values.zeros_like()?);
        let tokens = masked(tokens)?;
        let (of_class, mean, of_classes) = match &options.class_weights {
            None => (ones()?, None, None),
            Some(weights) => {
                check("class_weights", weights, targets)?;
                match (weights.dims(), &options.vocab_parallel) {
                    ([len], None) if *len == classes => {}
                    ([len], Some(shard)) if *len >= shard.stop => {}
                    (dims, None) => bail!(
                        "class_weights must have shape [{classes}], one for each class, got {dims:?}"
                    ),
                    (dims, Some(shard)) => bail!(
                        "class_weights must have shape [V], one for each class of all ranks and so at least {}, got {dims:?}",
                        shard.stop
                    ),
                }
                let weights = weights.detach().to_dtype(dtype)?.contiguous()?;
                let last = weights.dim(0)? as i64 - 1;
                let classes = of_positions(&to_i64(targets)?)?;
                let classes = counts.where_cond(&classes, &classes.zeros_like()?)?;
                // A target that is no class has loss NaN, whatever its weight.
                let classes = classes.clamp(0i64, last)?;
                let of_class = weights.index_select(&classes, 0)?;
                let mean = weights.mean_all()?;
                (of_class, Some(mean), Some(weights))
            }
        };
        let whole = masked((&tokens * &of_class)?)?;
        let smoothing = options.label_smoothing;
        let smoothed = match mean {
            // The weights of classes that are no targets do not matter then.
            _ if smoothing == 0. => tokens.zeros_like()?,
            None => (&tokens * smoothing)?,
            Some(mean) => masked((tokens.broadcast_mul(&mean)? * smoothing)?)?,
        };
        let none = tokens.zeros_like()?;
        let terms = [
            (&whole * (1. - smoothing))?,
            smoothed,
            (&tokens * options.z_loss_weight)?,
            none.clone(),
            none,
            (&tokens * -options.entropy_bonus)?,
        ];
        Ok(Some(Self {
            terms: Tensor::stack(&terms, 0)?,
            total: whole.sum_all()?.reshape(1)?,
            tokens,
            classes: of_classes,
        }))
    }

    /// The part of the loss with the square of the lse, reduced. `lse` is 0 where a position does not count.
    pub fn z_loss(&self, lse: &Tensor, reduction: Reduction) -> Result<Tensor> {
        let factors = self.terms.get(2)?;
        let lse_flat = lse.flatten_all()?.to_dtype(factors.dtype())?;
        let squares = (lse_flat.sqr()? * factors)?;
        let reduced = match reduction {
            Reduction::None => squares.reshape(lse.shape())?,
            Reduction::Sum => squares.sum_all()?,
            Reduction::Mean => {
                let total = self.total.get(0)?;
                let zero = total.zeros_like()?;
                let total = total.ne(&zero)?.where_cond(&total, &total.ones_like()?)?;
                (squares.sum_all()? / total)?
            }
        };
        reduced.to_dtype(DType::F32)
    }
}

fn check(name: &str, weights: &Tensor, targets: &Tensor) -> Result<()> {
    if !weights.dtype().is_float() {
        bail!("{name} must be of a float dtype, got {:?}", weights.dtype())
    }
    same_device(name, weights, "targets", targets)
}
