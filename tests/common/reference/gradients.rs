//! The gradients of the reference, with nothing, tiles or small entries filtered.

use super::{Counting, Inputs, Reduced, Reference, Tile, Upstream};

/// Gradients, and for each entry how far a correct one may be off.
#[derive(Debug, Clone)]
pub struct Gradient {
    pub value: Vec<f64>,
    /// The sum of the magnitudes of the terms, as in `sum_j |G_ij| |C_jd|` with the softmax and the
    /// one-hot taken apart: what the rounding of the sum is relative to.
    pub magnitude: Vec<f64>,
    /// The sum of what the terms may be off because of a filter, in magnitude: of those it may drop, themselves.
    pub droppable: Vec<f64>,
    /// What label smoothing has in it, which is added to the rest once that is rounded.
    pub added: Vec<f64>,
}

impl Gradient {
    fn zeros(len: usize) -> Self {
        Self {
            value: vec![0.; len],
            magnitude: vec![0.; len],
            droppable: vec![0.; len],
            added: vec![0.; len],
        }
    }

    fn add(&mut self, index: usize, term: Term, factor: f64) {
        self.value[index] += term.value * factor;
        self.magnitude[index] += term.magnitude * factor.abs();
        self.droppable[index] += term.droppable * factor.abs();
        self.added[index] += term.added * factor;
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
            add(&mut a.added, &b.added);
        }
        self.mean_logit = self.mean_logit.or(other.mean_logit);
        self
    }
}

impl Reference {
    /// The gradients for these upstream gradients. What an exact implementation may drop is nothing
    /// (`eps` = 0); with a filter that drops it is the terms of logits whose `|softmax - onehot|` is below `eps`,
    /// unless the lse's own gradient, the softmax, is not.
    pub fn gradients(&self, upstream: &Upstream, eps: f64) -> Gradients {
        self.sum_up(upstream, |_, entry| {
            let small = |x: f64| x.abs() < eps;
            let droppable =
                small(entry.p - entry.one_hot) && (entry.of_nll_alone || small(entry.p));
            let of_softmax = (entry.value - entry.rest).abs();
            let term = Term {
                value: entry.value,
                magnitude: entry.magnitude,
                droppable: if droppable { of_softmax } else { 0. },
                added: entry.rest,
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
            let logit = |class| self.inputs.logit(self.inputs.product(&mean, class));
            let logits: Vec<f64> = classes.clone().map(logit).collect();
            let of_tile = classes.start * mean.len()..classes.end * mean.len();
            for class in self.inputs.classifier[of_tile].chunks(mean.len()) {
                let terms = class.iter().zip(&mean_size).map(|(c, e)| c.abs() * e);
                mean_logit = mean_logit.max(self.inputs.logit_scale * terms.sum::<f64>());
            }
            let most = logits.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = logits.iter().map(|z| (z - most).exp()).sum();
            for (class, z) in classes.zip(logits) {
                shares[class] = if sum > 0. { (z - most).exp() / sum } else { 0. };
            }
        }
        let sums = self.sum_up(upstream, |i, entry| {
            let t = entry.class / tile.classes;
            let share = masses[i * tiles + t] * shares[entry.class];
            let term = |eps: f64| {
                let exact = Term {
                    value: entry.value,
                    magnitude: entry.magnitude,
                    droppable: 0.,
                    added: entry.rest,
                };
                let (averaged, certain) = averaged(i / tile.rows, t, eps);
                if certain && !averaged {
                    return exact;
                }
                // A target's entry is exact, and has its class's share of the others' mass besides.
                let (value, magnitude) = match entry.one_hot {
                    1. => (entry.value, entry.magnitude),
                    _ => (entry.rest, entry.rest.abs()),
                };
                let value = value + entry.scale * share;
                let either = (value - entry.value).abs();
                Term {
                    value: if averaged { value } else { entry.value },
                    magnitude: magnitude + entry.scale_size * share,
                    droppable: if uncertain[t] { either } else { 0. },
                    added: entry.rest,
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
            let factors = self.factors(at, upstream);
            for class in 0..vocab {
                let entry = self.entry(at, class, &factors);
                let (of_embeddings, of_classifier) = terms(row, &entry);
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

    /// What the loss, lse and entropy of a position have of the parts of its logits' gradients.
    fn factors(&self, at: &Counting, upstream: &Upstream) -> Factors {
        let inputs = &self.inputs;
        let of_position = |g: &Option<Vec<f64>>| g.as_ref().map_or(0., |g| g[at.position]);
        let d_loss = match (&upstream.loss, inputs.reduction) {
            (None, _) => 0.,
            (Some(g), Reduced::None) => g[at.position],
            (Some(g), Reduced::Sum) => g[0],
            (Some(g), Reduced::Mean) => g[0] / self.divisor(),
        } * at.token_weight;
        let d_lse = of_position(&upstream.lse);
        let smoothing = inputs.label_smoothing;
        let one_hot = d_loss * (1. - smoothing) * inputs.class_weight(at.target);
        let smoothed = d_loss * smoothing * inputs.mean_class_weight(|w| w);
        let smoothed_size = d_loss.abs() * smoothing * inputs.mean_class_weight(f64::abs);
        let square = match inputs.z_loss {
            0. => 0.,
            weight => d_loss * 2. * weight * at.lse,
        };
        Factors {
            softmax: one_hot + smoothed + square + d_lse,
            softmax_size: one_hot.abs() + smoothed_size + square.abs() + d_lse.abs(),
            one_hot,
            uniform: d_loss * smoothing / inputs.vocab as f64,
            entropy: of_position(&upstream.entropy) - d_loss * inputs.entropy_bonus,
        }
    }

    fn entry(&self, at: &Counting, class: usize, factors: &Factors) -> Entry {
        let p = self.p(at, class);
        let one_hot = if class == at.target { 1. } else { 0. };
        let uniform = match factors.uniform {
            0. => 0.,
            factor => -factor * self.inputs.class_weight(class),
        };
        // dH / dz_j = -p_j (log p_j + H), 0 where p is.
        let log = at.logits[class] - at.lse;
        let of_entropy = |of_log: f64| match p {
            0. => 0.,
            p => factors.entropy * p * of_log,
        };
        let to_product = self.inputs.logit_scale * self.slope(at, class);
        let value = factors.softmax * p - factors.one_hot * one_hot + uniform;
        let value = value - of_entropy(log + at.entropy);
        let magnitude = factors.softmax_size * p + factors.one_hot.abs() * one_hot + uniform.abs();
        let magnitude = magnitude + of_entropy(log.abs() + at.entropy).abs();
        Entry {
            class,
            p,
            one_hot,
            of_nll_alone: factors.softmax == factors.one_hot,
            scale: self.inputs.logit_scale * factors.softmax,
            scale_size: self.inputs.logit_scale * factors.softmax_size,
            rest: to_product * uniform,
            value: to_product * value,
            magnitude: to_product * magnitude,
        }
    }
}

/// What is multiplied by the parts of the gradients of a position's logits.
struct Factors {
    softmax: f64,
    /// The sum of the magnitudes of what `softmax` is the sum of.
    softmax_size: f64,
    one_hot: f64,
    /// Minus this is multiplied by the class weights: label smoothing.
    uniform: f64,
    entropy: f64,
}

/// The exact gradient of what a logit is made of, before softcap and scale.
struct Entry {
    class: usize,
    p: f64,
    one_hot: f64,
    /// The softmax and the one-hot have the same factor.
    of_nll_alone: bool,
    /// What the softmax is multiplied by, but for the softcap.
    scale: f64,
    scale_size: f64,
    /// What label smoothing has in it: the same whatever the filter.
    rest: f64,
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
    added: f64,
}
