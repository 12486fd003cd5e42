//! The loss and its gradients in f64, with plain loops over full logits: what every implementation is
//! compared with. Written for clarity; it shares nothing with the crate but the formulas.

mod gradients;

pub use gradients::{Gradient, Gradients};

/// How the losses of the positions become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduced {
    Mean,
    Sum,
    None,
}

/// The inputs of a loss, row-major.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Sequences.
    pub batch: usize,
    /// Steps of a sequence.
    pub time: usize,
    pub hidden: usize,
    pub vocab: usize,
    /// `(batch, time, hidden)`
    pub embeddings: Vec<f64>,
    /// `(vocab, hidden)`
    pub classifier: Vec<f64>,
    /// `(vocab)`
    pub bias: Option<Vec<f64>>,
    /// `(batch, time)`
    pub targets: Vec<i64>,
    pub ignore_index: i64,
    pub softcap: Option<f64>,
    /// Of the capped logits.
    pub logit_scale: f64,
    pub label_smoothing: f64,
    /// `(vocab)`
    pub class_weights: Option<Vec<f64>>,
    /// `(batch, time)`, as the targets are.
    pub token_weights: Option<Vec<f64>>,
    pub z_loss: f64,
    pub entropy_bonus: f64,
    pub shift: usize,
    pub reduction: Reduced,
}

/// Rows (that count, in order) and classes that a filter keeps or averages together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tile {
    pub rows: usize,
    pub classes: usize,
    /// How far off, relative to it, a largest probability may be that is compared with a threshold.
    pub off: f64,
}

/// The tiles of the CPU implementation.
pub const CPU_TILE: Tile = Tile {
    rows: 1,
    classes: 256,
    off: 1e-3,
};

/// The tiles of the CUDA kernels.
pub const CUDA_TILE: Tile = Tile {
    rows: 128,
    classes: 128,
    off: 0.02,
};

/// The upstream gradients: of the loss (one number, or one a position under `None`), and of the lse and the entropy of each
/// position.
#[derive(Debug, Clone, Default)]
pub struct Upstream {
    pub loss: Option<Vec<f64>>,
    pub lse: Option<Vec<f64>>,
    pub entropy: Option<Vec<f64>>,
}

impl Inputs {
    fn class_weight(&self, class: usize) -> f64 {
        self.class_weights.as_ref().map_or(1., |w| w[class])
    }

    /// The mean of the class weights, or of what `of` makes of them.
    fn mean_class_weight(&self, of: impl Fn(f64) -> f64) -> f64 {
        let sum: f64 = (0..self.vocab).map(|j| of(self.class_weight(j))).sum();
        sum / self.vocab as f64
    }

    /// `E . C_j + b_j`
    fn product(&self, e: &[f64], class: usize) -> f64 {
        let c = &self.classifier[class * self.hidden..(class + 1) * self.hidden];
        let dot: f64 = e.iter().zip(c).map(|(e, c)| e * c).sum();
        dot + self.bias.as_ref().map_or(0., |b| b[class])
    }

    /// The logit that such a product becomes.
    fn logit(&self, product: f64) -> f64 {
        let capped = match self.softcap {
            Some(cap) => cap * (product / cap).tanh(),
            None => product,
        };
        self.logit_scale * capped
    }
}

/// A position of the result that counts.
#[derive(Debug, Clone)]
struct Counting {
    /// Index in the result.
    position: usize,
    /// Row of the embeddings.
    row: usize,
    target: usize,
    token_weight: f64,
    lse: f64,
    entropy: f64,
    /// What logits are made of: before softcap and scale.
    products: Vec<f64>,
    logits: Vec<f64>,
}

/// The loss of some [`Inputs`].
#[derive(Debug, Clone)]
pub struct Reference {
    inputs: Inputs,
    counting: Vec<Counting>,
    /// A number, or one a position.
    pub loss: Vec<f64>,
    /// What the rounding of the loss is relative to: the largest sum of the magnitudes of its terms.
    pub loss_size: f64,
    /// One number a position, as are those that follow.
    pub nll: Vec<f64>,
    pub lse: Vec<f64>,
    pub entropy: Vec<f64>,
    /// The lowest class with the largest logit, `None` where the position does not count.
    pub predicted: Vec<Option<usize>>,
    /// What the mean divides by.
    total: f64,
    /// The largest `|z|`, at least 1: what the rounding of a loss is relative to.
    pub largest_logit: f64,
}

impl Reference {
    pub fn new(inputs: Inputs) -> Self {
        let steps = inputs.time - inputs.shift;
        let positions = inputs.batch * steps;
        let mut all = Self {
            counting: Vec::new(),
            loss: Vec::new(),
            loss_size: 0.,
            nll: vec![0.; positions],
            lse: vec![0.; positions],
            entropy: vec![0.; positions],
            predicted: vec![None; positions],
            total: 0.,
            largest_logit: 1.,
            inputs,
        };
        for position in 0..positions {
            let row = position / steps * all.inputs.time + position % steps;
            let target = all.inputs.targets[row + all.inputs.shift];
            if target != all.inputs.ignore_index {
                all.count(position, row, target as usize);
            }
        }
        let losses = all.counting.iter().map(|at| all.loss_of(at));
        let losses: Vec<(f64, f64)> = losses.collect();
        let sum: f64 = losses.iter().map(|(loss, _)| loss).sum();
        let size: f64 = losses.iter().map(|(_, size)| size).sum();
        (all.loss, all.loss_size) = match all.inputs.reduction {
            Reduced::None => {
                let mut of_positions = vec![0.; positions];
                for (at, (loss, _)) in all.counting.iter().zip(&losses) {
                    of_positions[at.position] = *loss;
                }
                (
                    of_positions,
                    losses.iter().fold(0f64, |a, (_, b)| a.max(*b)),
                )
            }
            Reduced::Sum => (vec![sum], size),
            Reduced::Mean => (vec![sum / all.divisor()], size / all.divisor().abs()),
        };
        all
    }

    /// What a position that counts has, beside its loss.
    fn count(&mut self, position: usize, row: usize, target: usize) {
        let inputs = &self.inputs;
        let e = &inputs.embeddings[row * inputs.hidden..(row + 1) * inputs.hidden];
        let products: Vec<f64> = (0..inputs.vocab).map(|j| inputs.product(e, j)).collect();
        let logits: Vec<f64> = products.iter().map(|z| inputs.logit(*z)).collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|z| (z - largest).exp()).sum();
        let lse = largest + sum.ln();
        // p log p is 0 where p is.
        let likely = logits.iter().map(|z| z - lse).filter(|log| log.exp() != 0.);
        let entropy = likely.map(|log| -log.exp() * log).sum();
        let token_weight = match &inputs.token_weights {
            Some(weights) => weights[row + inputs.shift],
            None => 1.,
        };
        self.total += token_weight * inputs.class_weight(target);
        self.nll[position] = lse - logits[target];
        self.lse[position] = lse;
        self.entropy[position] = entropy;
        self.predicted[position] = logits.iter().position(|z| *z == largest);
        for z in logits.iter().filter(|z| z.is_finite()) {
            self.largest_logit = self.largest_logit.max(z.abs());
        }
        self.counting.push(Counting {
            position,
            row,
            target,
            token_weight,
            lse,
            entropy,
            products,
            logits,
        });
    }

    /// The loss of a position, and the sum of the magnitudes of its terms.
    fn loss_of(&self, at: &Counting) -> (f64, f64) {
        let inputs = &self.inputs;
        let smoothing = inputs.label_smoothing;
        let of_class = inputs.class_weight(at.target);
        let nll = (1. - smoothing) * of_class * (at.lse - at.logits[at.target]);
        // Infinite logits make no NaN where there is no smoothing.
        let uniform = match smoothing {
            0. => 0.,
            _ => {
                let of = |j: usize| inputs.class_weight(j) * (at.lse - at.logits[j]);
                let sum: f64 = (0..inputs.vocab).map(of).sum();
                smoothing * sum / inputs.vocab as f64
            }
        };
        let square = match inputs.z_loss {
            0. => 0.,
            weight => weight * at.lse * at.lse,
        };
        let bonus = inputs.entropy_bonus * at.entropy;
        let of_logits =
            (1. - smoothing) * of_class.abs() + smoothing * inputs.mean_class_weight(f64::abs);
        (
            at.token_weight * (nll + uniform + square - bonus),
            at.token_weight.abs()
                * (of_logits * self.largest_logit
                    + square.abs()
                    + inputs.entropy_bonus.abs() * self.largest_logit),
        )
    }

    /// Where no weight counts, neither does the mean divide.
    fn divisor(&self) -> f64 {
        match self.total {
            0. => 1.,
            total => total,
        }
    }

    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// The logit of a class less the largest one of a position, where it counts.
    pub fn below_largest(&self, position: usize, class: usize) -> Option<f64> {
        let at = self.counting.iter().find(|at| at.position == position)?;
        let largest = at.logits[self.predicted[position]?];
        let logit = at.logits.get(class).copied();
        Some(logit.unwrap_or(f64::NEG_INFINITY) - largest)
    }

    fn p(&self, at: &Counting, class: usize) -> f64 {
        (at.logits[class] - at.lse).exp()
    }

    /// The derivative of the softcap: 1 - tanh^2.
    fn slope(&self, at: &Counting, class: usize) -> f64 {
        match self.inputs.softcap {
            Some(cap) => 1. - (at.products[class] / cap).tanh().powi(2),
            None => 1.,
        }
    }
}
