//! The loss and its gradients in f64, with plain loops over full logits: what every implementation is
//! compared with. Written for clarity; it shares nothing with the crate but the formulas.

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
    pub shift: usize,
    pub reduction: Reduced,
}

/// The upstream gradients: of the loss (one number, or one a position under `None`) and of the lse of
/// each position.
#[derive(Debug, Clone, Default)]
pub struct Upstream {
    pub loss: Option<Vec<f64>>,
    pub lse: Option<Vec<f64>>,
}

/// A position of the result that counts.
#[derive(Debug, Clone)]
struct Counting {
    /// Index in the result.
    position: usize,
    /// Row of the embeddings.
    row: usize,
    target: usize,
    lse: f64,
    /// Logits before the softcap.
    raw: Vec<f64>,
    /// Logits after it.
    capped: Vec<f64>,
}

/// The loss of some [`Inputs`].
#[derive(Debug, Clone)]
pub struct Reference {
    inputs: Inputs,
    counting: Vec<Counting>,
    /// A number, or one a position.
    pub loss: Vec<f64>,
    /// One number a position.
    pub nll: Vec<f64>,
    /// One number a position.
    pub lse: Vec<f64>,
    /// The largest `|z|`, at least 1: what the rounding of a loss is relative to.
    pub logit_scale: f64,
}

/// Gradients, and for each entry how far a correct one may be off.
#[derive(Debug, Clone)]
pub struct Gradient {
    pub value: Vec<f64>,
    /// The sum of the magnitudes of the terms, as in `sum_j |G_ij| |C_jd|` with the softmax and the
    /// one-hot taken apart: what the rounding of the sum is relative to.
    pub magnitude: Vec<f64>,
    /// The sum of the magnitudes of the terms a filter may drop.
    pub droppable: Vec<f64>,
}

impl Gradient {
    fn zeros(len: usize) -> Self {
        Self {
            value: vec![0.; len],
            magnitude: vec![0.; len],
            droppable: vec![0.; len],
        }
    }
}

/// The gradients of all inputs.
#[derive(Debug, Clone)]
pub struct Gradients {
    pub embeddings: Gradient,
    pub classifier: Gradient,
    pub bias: Gradient,
}

impl Reference {
    pub fn new(inputs: Inputs) -> Self {
        let steps = inputs.time - inputs.shift;
        let mut nll = vec![0.; inputs.batch * steps];
        let mut lse = vec![0.; inputs.batch * steps];
        let mut counting = Vec::new();
        let mut logit_scale = 1f64;
        for sequence in 0..inputs.batch {
            for step in 0..steps {
                let position = sequence * steps + step;
                let row = sequence * inputs.time + step;
                let target = inputs.targets[sequence * inputs.time + step + inputs.shift];
                if target == inputs.ignore_index {
                    continue;
                }
                let target = target as usize;
                let raw = logits(&inputs, row);
                let capped: Vec<f64> = match inputs.softcap {
                    Some(cap) => raw.iter().map(|z| cap * (z / cap).tanh()).collect(),
                    None => raw.clone(),
                };
                let largest = capped.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = capped.iter().map(|z| (z - largest).exp()).sum();
                lse[position] = largest + sum.ln();
                nll[position] = lse[position] - capped[target];
                for z in capped.iter().filter(|z| z.is_finite()) {
                    logit_scale = logit_scale.max(z.abs());
                }
                counting.push(Counting {
                    position,
                    row,
                    target,
                    lse: lse[position],
                    raw,
                    capped,
                });
            }
        }
        let sum: f64 = nll.iter().sum();
        let loss = match inputs.reduction {
            Reduced::None => nll.clone(),
            Reduced::Sum => vec![sum],
            Reduced::Mean => vec![sum / counting.len().max(1) as f64],
        };
        Self {
            inputs,
            counting,
            loss,
            nll,
            lse,
            logit_scale,
        }
    }

    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// The gradients for these upstream gradients. What an exact implementation may drop is nothing
    /// (`eps` = 0); with a filter it is the terms of logits whose `|softmax - onehot|` is below `eps`,
    /// unless the lse's own gradient, the softmax, is not.
    pub fn gradients(&self, upstream: &Upstream, eps: f64) -> Gradients {
        let Inputs { hidden, vocab, .. } = self.inputs;
        let mut embeddings = Gradient::zeros(self.inputs.embeddings.len());
        let mut classifier = Gradient::zeros(vocab * hidden);
        let mut bias = Gradient::zeros(vocab);
        for at in &self.counting {
            let d_nll = match (&upstream.loss, self.inputs.reduction) {
                (None, _) => 0.,
                (Some(g), Reduced::None) => g[at.position],
                (Some(g), Reduced::Sum) => g[0],
                (Some(g), Reduced::Mean) => g[0] / self.counting.len() as f64,
            };
            let d_lse = upstream.lse.as_ref().map_or(0., |g| g[at.position]);
            for class in 0..vocab {
                let p = (at.capped[class] - at.lse).exp();
                let one_hot = if class == at.target { 1. } else { 0. };
                // Through the softcap: d capped / d raw = 1 - tanh^2.
                let slope = match self.inputs.softcap {
                    Some(cap) => 1. - (at.raw[class] / cap).tanh().powi(2),
                    None => 1.,
                };
                let d_raw = (d_nll * (p - one_hot) + d_lse * p) * slope;
                let magnitude = (d_nll.abs() * (p + one_hot) + d_lse.abs() * p) * slope;
                let g = (p - one_hot).abs();
                let droppable = g < eps && (d_lse == 0. || p < eps);
                let dropped = if droppable { d_raw.abs() } else { 0. };
                let add = |to: &mut Gradient, index: usize, factor: f64| {
                    to.value[index] += d_raw * factor;
                    to.magnitude[index] += magnitude * factor.abs();
                    to.droppable[index] += dropped * factor.abs();
                };
                for d in 0..hidden {
                    let (e, c) = (at.row * hidden + d, class * hidden + d);
                    add(&mut embeddings, e, self.inputs.classifier[c]);
                    add(&mut classifier, c, self.inputs.embeddings[e]);
                }
                add(&mut bias, class, 1.);
            }
        }
        Gradients {
            embeddings,
            classifier,
            bias,
        }
    }
}

/// `z_j = E_row . C_j + b_j`
fn logits(inputs: &Inputs, row: usize) -> Vec<f64> {
    let hidden = inputs.hidden;
    let e = &inputs.embeddings[row * hidden..(row + 1) * hidden];
    (0..inputs.vocab)
        .map(|class| {
            let c = &inputs.classifier[class * hidden..(class + 1) * hidden];
            let dot: f64 = e.iter().zip(c).map(|(e, c)| e * c).sum();
            dot + inputs.bias.as_ref().map_or(0., |b| b[class])
        })
        .collect()
}
