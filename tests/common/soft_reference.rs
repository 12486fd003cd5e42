//! Divergences from a teacher and their gradients in f64, with plain loops over full logits: what
//! `soft_targets` is compared with. The gradients are those of `f(log p, log q)` through both log-softmaxes, without the
//! simplifications that the crate makes.

/// A classifier and what it is given, row-major.
#[derive(Debug, Clone)]
pub struct Head {
    pub hidden: usize,
    /// `(rows, hidden)`
    pub embeddings: Vec<f64>,
    /// `(vocab, hidden)`
    pub classifier: Vec<f64>,
    pub bias: Option<Vec<f64>>,
    pub softcap: Option<f64>,
    /// What the logits are multiplied by after the softcap.
    pub scale: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rest {
    OneClass,
    Renormalized,
    LeftOut,
}

#[derive(Debug, Clone)]
pub enum Teacher {
    Forward(Head),
    Reverse(Head),
    JensenShannon(Head, f64),
    /// Classes and probabilities `(rows, k)`.
    TopK(usize, Vec<usize>, Vec<f64>, Rest),
}

#[derive(Debug, Clone)]
pub struct Soft {
    pub vocab: usize,
    /// Steps of a sequence.
    pub time: usize,
    pub shift: usize,
    /// `(rows)`: whether a row's target counts.
    pub counts: Vec<bool>,
    pub student: Head,
    pub teacher: Teacher,
    pub temperature: f64,
}

#[derive(Debug, Clone)]
pub struct HeadGradients {
    pub embeddings: Vec<f64>,
    pub classifier: Vec<f64>,
    pub bias: Vec<f64>,
}

impl Head {
    fn row(&self, row: usize, temperature: f64) -> Row {
        let e = &self.embeddings[row * self.hidden..][..self.hidden];
        let mut row = Row {
            log_probs: Vec::new(),
            slopes: Vec::new(),
        };
        for (j, c) in self.classifier.chunks(self.hidden).enumerate() {
            let raw = e.iter().zip(c).map(|(e, c)| e * c).sum::<f64>()
                + self.bias.as_ref().map_or(0., |bias| bias[j]);
            let (z, slope) = match self.softcap {
                None => (raw, 1.),
                Some(cap) => (cap * (raw / cap).tanh(), 1. - (raw / cap).tanh().powi(2)),
            };
            row.log_probs.push(z * self.scale / temperature);
            row.slopes.push(slope * self.scale / temperature);
        }
        let max = row.log_probs.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = row.log_probs.iter().map(|z| (z - max).exp()).sum();
        for z in &mut row.log_probs {
            *z -= max + sum.ln();
        }
        row
    }

    fn zeros(&self) -> HeadGradients {
        HeadGradients {
            embeddings: vec![0.; self.embeddings.len()],
            classifier: vec![0.; self.classifier.len()],
            bias: vec![0.; self.classifier.len() / self.hidden],
        }
    }

    /// Adds what a row's gradient of the log-probabilities, `of`, makes, times `weight`.
    fn add(&self, sums: &mut HeadGradients, row: usize, at: &Row, of: &[f64], weight: f64) {
        let total: f64 = of.iter().sum();
        for (j, of) in of.iter().enumerate() {
            let g = (of - at.log_probs[j].exp() * total) * at.slopes[j] * weight;
            sums.bias[j] += g;
            for d in 0..self.hidden {
                sums.embeddings[row * self.hidden + d] += g * self.classifier[j * self.hidden + d];
                sums.classifier[j * self.hidden + d] += g * self.embeddings[row * self.hidden + d];
            }
        }
    }
}

struct Row {
    log_probs: Vec<f64>,
    /// The derivatives of the logits at the softmax by those before the softcap.
    slopes: Vec<f64>,
}

/// A position's divergence and its derivatives by the log-probabilities of the student and the teacher.
struct Value {
    loss: f64,
    of_student: Vec<f64>,
    of_teacher: Vec<f64>,
}

/// `sum p (log p - log q)`, with the derivatives by `log p` and `log q`.
fn kl(p: &[f64], q: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    let (mut sum, mut by_p, mut by_q) = (0., Vec::new(), Vec::new());
    for (p, q) in p.iter().zip(q) {
        if *p == f64::NEG_INFINITY {
            by_p.push(0.);
            by_q.push(0.);
            continue;
        }
        sum += p.exp() * (p - q);
        by_p.push(p.exp() * (p - q + 1.));
        by_q.push(-p.exp());
    }
    (sum, by_p, by_q)
}

impl Soft {
    fn value(&self, row: usize, s: &[f64]) -> Value {
        let temperature = self.temperature;
        match &self.teacher {
            Teacher::Forward(teacher) => {
                let t = teacher.row(row, temperature).log_probs;
                let (loss, of_teacher, of_student) = kl(&t, s);
                Value {
                    loss,
                    of_student,
                    of_teacher,
                }
            }
            Teacher::Reverse(teacher) => {
                let t = teacher.row(row, temperature).log_probs;
                let (loss, of_student, of_teacher) = kl(s, &t);
                Value {
                    loss,
                    of_student,
                    of_teacher,
                }
            }
            Teacher::JensenShannon(teacher, beta) => {
                let t = teacher.row(row, temperature).log_probs;
                let mixed = |s: f64, t: f64| (beta * t.exp() + (1. - beta) * s.exp()).ln();
                let m: Vec<f64> = s.iter().zip(&t).map(|(s, t)| mixed(*s, *t)).collect();
                let (of_t, by_t, by_mt) = kl(&t, &m);
                let (of_s, by_s, by_ms) = kl(s, &m);
                let (mut of_student, mut of_teacher) = (Vec::new(), Vec::new());
                for j in 0..s.len() {
                    let by_m = beta * by_mt[j] + (1. - beta) * by_ms[j];
                    // d log m / d log p = (1 - beta) p / m
                    let share = |weight: f64, x: f64| match x == f64::NEG_INFINITY {
                        true => 0.,
                        false => weight * (x - m[j]).exp(),
                    };
                    of_student.push((1. - beta) * by_s[j] + by_m * share(1. - beta, s[j]));
                    of_teacher.push(beta * by_t[j] + by_m * share(*beta, t[j]));
                }
                Value {
                    loss: beta * of_t + (1. - beta) * of_s,
                    of_student,
                    of_teacher,
                }
            }
            Teacher::TopK(k, classes, probabilities, rest) => {
                let classes = &classes[row * k..][..*k];
                let mut q = probabilities[row * k..][..*k].to_vec();
                let mass: f64 = q.iter().sum();
                if *rest == Rest::Renormalized {
                    q.iter_mut().for_each(|q| *q /= mass);
                }
                let mut of_student = vec![0.; s.len()];
                let mut loss = 0.;
                for (class, q) in classes.iter().zip(&q).filter(|(_, q)| **q > 0.) {
                    loss += q * (q.ln() - s[*class]);
                    of_student[*class] -= q;
                }
                if *rest == Rest::OneClass && 1. - mass > 0. {
                    let q = 1. - mass;
                    let others = (0..s.len()).filter(|j| !classes.contains(j));
                    let p: f64 = others.clone().map(|j| s[j].exp()).sum();
                    loss += q * (q.ln() - p.ln());
                    for j in others {
                        of_student[j] -= q * s[j].exp() / p;
                    }
                }
                Value {
                    loss,
                    of_student,
                    of_teacher: Vec::new(),
                }
            }
        }
    }

    fn teacher(&self) -> Option<&Head> {
        match &self.teacher {
            Teacher::Forward(head) | Teacher::Reverse(head) | Teacher::JensenShannon(head, _) => {
                Some(head)
            }
            Teacher::TopK(..) => None,
        }
    }

    /// The positions of the result, with the row of the embeddings of one that counts.
    pub fn positions(&self) -> Vec<Option<usize>> {
        let rows = 0..self.counts.len();
        let predicting = rows.filter(|row| row % self.time + self.shift < self.time);
        let counting = |row: usize| self.counts[row + self.shift].then_some(row);
        predicting.map(counting).collect()
    }

    /// Of each position, 0 where it does not count.
    pub fn losses(&self) -> Vec<f64> {
        let loss = |row| {
            let s = self.student.row(row, self.temperature).log_probs;
            self.value(row, &s).loss
        };
        let positions = self.positions().into_iter();
        positions.map(|row| row.map_or(0., loss)).collect()
    }

    /// The gradients, of the student and the teacher, of the sum of the losses with these weights of the positions.
    pub fn gradients(&self, weights: &[f64]) -> (HeadGradients, Option<HeadGradients>) {
        let mut student = self.student.zeros();
        let mut teacher = self.teacher().map(Head::zeros);
        for (row, weight) in self.positions().into_iter().zip(weights) {
            let Some(row) = row else { continue };
            let at = self.student.row(row, self.temperature);
            let value = self.value(row, &at.log_probs);
            self.student
                .add(&mut student, row, &at, &value.of_student, *weight);
            if let (Some(sums), Some(head)) = (&mut teacher, self.teacher()) {
                let at = head.row(row, self.temperature);
                head.add(sums, row, &at, &value.of_teacher, *weight);
            }
        }
        (student, teacher)
    }
}
