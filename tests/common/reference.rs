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
    /// The sum of what the terms may be off because of a filter, in magnitude: of those it may drop, themselves.
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

    fn add(&mut self, index: usize, term: Term, factor: f64) {
        self.value[index] += term.value * factor;
        self.magnitude[index] += term.magnitude * factor.abs();
        self.droppable[index] += term.droppable * factor.abs();
    }
}

/// The gradients of all inputs.
#[derive(Debug, Clone)]
pub struct Gradients {
    pub embeddings: Gradient,
    pub classifier: Gradient,
    pub bias: Gradient,
    /// Where tiles are averaged, the largest `sum_d |C_jd| mean|E_d|` of a class and the rows of its tile's mean: what the
    /// rounding of masses and mean moves its logit by is relative to that.
    pub mean_logit: Option<f64>,
}

impl Gradients {
    /// Of two losses, the gradients of their sum.
    pub fn plus(mut self, other: &Self) -> Self {
        let pairs = [
            (&mut self.embeddings, &other.embeddings),
            (&mut self.classifier, &other.classifier),
            (&mut self.bias, &other.bias),
        ];
        let add = |a: &mut Vec<f64>, b: &Vec<f64>| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        for (a, b) in pairs {
            add(&mut a.value, &b.value);
            add(&mut a.magnitude, &b.magnitude);
            add(&mut a.droppable, &b.droppable);
        }
        self.mean_logit = self.mean_logit.or(other.mean_logit);
        self
    }
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
    /// (`eps` = 0); with a filter that drops it is the terms of logits whose `|softmax - onehot|` is below `eps`,
    /// unless the lse's own gradient, the softmax, is not.
    pub fn gradients(&self, upstream: &Upstream, eps: f64) -> Gradients {
        self.sum_up(upstream, |row, entry| {
            let at = &self.counting[row];
            let g = (entry.p - entry.one_hot).abs();
            let d_lse = upstream.lse.as_ref().map_or(0., |g| g[at.position]);
            let droppable = g < eps && (d_lse == 0. || entry.p < eps);
            let dropped = if droppable { entry.value.abs() } else { 0. };
            let term = Term {
                value: entry.value,
                magnitude: entry.magnitude,
                droppable: dropped,
            };
            (term, term)
        })
    }

    /// The gradients of a filter that averages tiles of these sizes, for thresholds of the gradients of the embeddings
    /// and the classifier; 0 is exact. A tile whose largest probability may be on either side of a threshold may go
    /// either way: that is the tolerance of the terms it has a part in.
    pub fn averaged(&self, upstream: &Upstream, eps: (f64, f64), tile: Tile) -> Gradients {
        let (rows, vocab) = (self.counting.len(), self.inputs.vocab);
        let tiles = vocab.div_ceil(tile.classes);
        let largest = self.largest(tile);
        // Of a tile and a gradient: whether it is averaged, and whether that is certain.
        let averaged = |group: usize, t: usize, eps: f64| {
            let p = largest[group * tiles + t];
            (
                p < eps,
                eps == 0. || (p - eps).abs() > tile.off * eps + 2e-7,
            )
        };
        let mut shares = vec![0.; vocab];
        let mut masses = vec![0.; rows * tiles];
        let mut uncertain = vec![false; tiles];
        let mut mean_logit = 0f64;
        for t in 0..tiles {
            let classes = t * tile.classes..((t + 1) * tile.classes).min(vocab);
            let mut mean = vec![0.; self.inputs.hidden];
            let mut mean_size = mean.clone();
            let mut total = 0.;
            for (i, at) in self.counting.iter().enumerate() {
                let mass = |class: usize| self.p(at, class) * self.slope(at, class);
                let others = classes.clone().filter(|class| *class != at.target);
                masses[i * tiles + t] = others.map(mass).sum();
                let of_embeddings = averaged(i / tile.rows, t, eps.0);
                let of_classifier = averaged(i / tile.rows, t, eps.1);
                uncertain[t] |= !of_embeddings.1 || !of_classifier.1;
                if of_embeddings.0 || of_classifier.0 {
                    total += masses[i * tiles + t];
                    let e = &self.inputs.embeddings[at.row * mean.len()..];
                    for ((mean, size), e) in mean.iter_mut().zip(&mut mean_size).zip(e) {
                        *mean += masses[i * tiles + t] * e;
                        *size += masses[i * tiles + t] * e.abs();
                    }
                }
            }
            if total > 0. {
                let all = mean.iter_mut().chain(&mut mean_size);
                all.for_each(|e| *e /= total);
            }
            let logit = |class| self.capped(logit(&self.inputs, &mean, class));
            let logits: Vec<f64> = classes.clone().map(logit).collect();
            let of_tile = classes.start * mean.len()..classes.end * mean.len();
            for class in self.inputs.classifier[of_tile].chunks(mean.len()) {
                let terms = class.iter().zip(&mean_size).map(|(c, e)| c.abs() * e);
                mean_logit = mean_logit.max(terms.sum());
            }
            let most = logits.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = logits.iter().map(|z| (z - most).exp()).sum();
            for (class, z) in classes.zip(logits) {
                shares[class] = if sum > 0. { (z - most).exp() / sum } else { 0. };
            }
        }
        let sums = self.sum_up(upstream, |i, entry| {
            let t = entry.class / tile.classes;
            let scale = entry.d_nll + entry.d_lse;
            let share = masses[i * tiles + t] * shares[entry.class];
            let term = |eps: f64| {
                let exact = Term {
                    value: entry.value,
                    magnitude: entry.magnitude,
                    droppable: 0.,
                };
                let (averaged, certain) = averaged(i / tile.rows, t, eps);
                if certain && !averaged {
                    return exact;
                }
                // A target's entry is exact, and has its class's share of the others' mass besides.
                let (value, magnitude) = match entry.one_hot {
                    1. => (entry.value, entry.magnitude),
                    _ => (0., 0.),
                };
                let value = value + scale * share;
                let either = (value - entry.value).abs();
                Term {
                    value: if averaged { value } else { entry.value },
                    magnitude: magnitude + (entry.d_nll.abs() + entry.d_lse.abs()) * share,
                    droppable: if uncertain[t] { either } else { 0. },
                }
            };
            (term(eps.0), term(eps.1))
        });
        Gradients {
            mean_logit: (eps.0 > 0. || eps.1 > 0.).then_some(mean_logit),
            ..sums
        }
    }

    /// Of each group of rows and each tile, `(groups, tiles)`: the largest probability of a class that is not its row's
    /// target.
    pub fn largest(&self, tile: Tile) -> Vec<f64> {
        let tiles = self.inputs.vocab.div_ceil(tile.classes);
        let groups = self.counting.len().div_ceil(tile.rows);
        let mut largest = vec![0f64; groups * tiles];
        for (i, at) in self.counting.iter().enumerate() {
            for class in (0..self.inputs.vocab).filter(|class| *class != at.target) {
                let of_tile = &mut largest[i / tile.rows * tiles + class / tile.classes];
                *of_tile = of_tile.max(self.p(at, class));
            }
        }
        largest
    }

    /// The gradients whose every logit's gradient is what `terms` has for the embeddings and for the classifier, given
    /// the index of a row that counts and the exact one.
    fn sum_up(
        &self,
        upstream: &Upstream,
        terms: impl Fn(usize, &Entry) -> (Term, Term),
    ) -> Gradients {
        let Inputs { hidden, vocab, .. } = self.inputs;
        let mut embeddings = Gradient::zeros(self.inputs.embeddings.len());
        let mut classifier = Gradient::zeros(vocab * hidden);
        let mut bias = Gradient::zeros(vocab);
        for (row, at) in self.counting.iter().enumerate() {
            let d_nll = match (&upstream.loss, self.inputs.reduction) {
                (None, _) => 0.,
                (Some(g), Reduced::None) => g[at.position],
                (Some(g), Reduced::Sum) => g[0],
                (Some(g), Reduced::Mean) => g[0] / self.counting.len() as f64,
            };
            let d_lse = upstream.lse.as_ref().map_or(0., |g| g[at.position]);
            for class in 0..vocab {
                let p = self.p(at, class);
                let one_hot = if class == at.target { 1. } else { 0. };
                let slope = self.slope(at, class);
                let (of_embeddings, of_classifier) = terms(
                    row,
                    &Entry {
                        class,
                        p,
                        one_hot,
                        d_nll,
                        d_lse,
                        value: (d_nll * (p - one_hot) + d_lse * p) * slope,
                        magnitude: (d_nll.abs() * (p + one_hot) + d_lse.abs() * p) * slope,
                    },
                );
                for d in 0..hidden {
                    let (e, c) = (at.row * hidden + d, class * hidden + d);
                    embeddings.add(e, of_embeddings, self.inputs.classifier[c]);
                    classifier.add(c, of_classifier, self.inputs.embeddings[e]);
                }
                bias.add(class, of_classifier, 1.);
            }
        }
        Gradients {
            embeddings,
            classifier,
            bias,
            mean_logit: None,
        }
    }

    fn p(&self, at: &Counting, class: usize) -> f64 {
        (at.capped[class] - at.lse).exp()
    }

    /// Through the softcap: d capped / d raw = 1 - tanh^2.
    fn slope(&self, at: &Counting, class: usize) -> f64 {
        match self.inputs.softcap {
            Some(cap) => 1. - (at.raw[class] / cap).tanh().powi(2),
            None => 1.,
        }
    }

    fn capped(&self, z: f64) -> f64 {
        match self.inputs.softcap {
            Some(cap) => cap * (z / cap).tanh(),
            None => z,
        }
    }
}

/// The exact gradient of a logit.
struct Entry {
    class: usize,
    p: f64,
    one_hot: f64,
    /// The upstream gradients of the row.
    d_nll: f64,
    d_lse: f64,
    value: f64,
    /// With the softmax and the one-hot taken apart.
    magnitude: f64,
}

/// A gradient of a logit, and how far a correct one may be off.
#[derive(Clone, Copy)]
struct Term {
    value: f64,
    magnitude: f64,
    droppable: f64,
}

/// `z_j = E_row . C_j + b_j`
fn logits(inputs: &Inputs, row: usize) -> Vec<f64> {
    let e = &inputs.embeddings[row * inputs.hidden..(row + 1) * inputs.hidden];
    (0..inputs.vocab)
        .map(|class| logit(inputs, e, class))
        .collect()
}

fn logit(inputs: &Inputs, e: &[f64], class: usize) -> f64 {
    let c = &inputs.classifier[class * inputs.hidden..(class + 1) * inputs.hidden];
    let dot: f64 = e.iter().zip(c).map(|(e, c)| e * c).sum();
    dot + inputs.bias.as_ref().map_or(0., |b| b[class])
}
