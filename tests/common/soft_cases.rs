//! Distillation beside the reference: inputs, and what is asked of losses and gradients.

use super::soft_reference::{Head, HeadGradients, Rest, Soft, Teacher};
use super::{close, gradient_tolerance, norm, numbers, round_to, Random};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::soft_targets::{
    self, divergence, top_k_divergence, Divergence, TopK,
};
use candle_cut_cross_entropy::{backward, Options, Reduction};

/// Inputs in a dtype.
pub struct Case {
    pub soft: Soft,
    pub dtype: DType,
    lead: Vec<usize>,
    targets: Vec<i64>,
    /// A weight for each target.
    tokens: Option<Vec<f64>>,
}

const IGNORED: i64 = -7;

pub struct Features {
    /// Columns of the student's matrices.
    pub hidden: usize,
    pub bias: bool,
    pub softcap: Option<f64>,
    pub shift: usize,
    pub ignored: bool,
    pub temperature: f64,
    pub scale: f64,
    pub tokens: bool,
}

pub const PLAIN: Features = Features {
    hidden: 19,
    bias: false,
    softcap: None,
    shift: 0,
    ignored: false,
    temperature: 1.,
    scale: 1.,
    tokens: false,
};

pub const ALL: Features = Features {
    hidden: 19,
    bias: true,
    softcap: Some(4.),
    shift: 1,
    ignored: true,
    temperature: 2.,
    scale: 1.5,
    tokens: true,
};

fn head(random: &mut Random, dtype: DType, sizes: [usize; 3], features: &Features) -> Head {
    let [rows, hidden, vocab] = sizes;
    let mut numbers = |n: usize, scale: f64| -> Vec<f64> {
        let numbers = random.normals(n, scale).into_iter();
        numbers.map(|x| round_to(dtype, x)).collect()
    };
    Head {
        hidden,
        embeddings: numbers(rows * hidden, 1.),
        classifier: numbers(vocab * hidden, 1.5 / (hidden as f64).sqrt()),
        bias: features.bias.then(|| numbers(vocab, 1.)),
        softcap: features.softcap,
        scale: features.scale,
    }
}

#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Whole(Divergence),
    TopK(Rest),
}

pub const KINDS: [Kind; 6] = [
    Kind::Whole(Divergence::ForwardKl),
    Kind::Whole(Divergence::ReverseKl),
    Kind::Whole(Divergence::JensenShannon(0.3)),
    Kind::TopK(Rest::OneClass),
    Kind::TopK(Rest::Renormalized),
    Kind::TopK(Rest::LeftOut),
];

impl Case {
    pub fn new(
        dtype: DType,
        lead: &[usize],
        vocab: usize,
        kind: Kind,
        features: &Features,
    ) -> Self {
        Self::sized(dtype, lead, [features.hidden, 23], vocab, kind, features)
    }

    /// With these hidden sizes of student and teacher.
    pub fn sized(
        dtype: DType,
        lead: &[usize],
        hidden: [usize; 2],
        vocab: usize,
        kind: Kind,
        features: &Features,
    ) -> Self {
        let mut random = Random::new(vocab as u64);
        let rows: usize = lead.iter().product();
        let time = lead.last().copied().unwrap_or(1);
        let student = head(&mut random, dtype, [rows, hidden[0], vocab], features);
        let teacher = match kind {
            Kind::Whole(kind) => {
                let head = head(&mut random, dtype, [rows, hidden[1], vocab], features);
                match kind {
                    Divergence::ForwardKl => Teacher::Forward(head),
                    Divergence::ReverseKl => Teacher::Reverse(head),
                    Divergence::JensenShannon(beta) => Teacher::JensenShannon(head, beta),
                }
            }
            Kind::TopK(rest) => {
                let k = 5.min(vocab);
                let first = |random: &mut Random| random.below(vocab);
                let classes = (0..rows).flat_map(|_| {
                    let first = first(&mut random);
                    (0..k).map(move |i| (first + 2 * i) % vocab)
                });
                let classes: Vec<usize> = classes.collect();
                // Of sum 0.75; one is 0.
                let probabilities = (0..rows).flat_map(|_| {
                    let parts = (0..k).map(|i| if i == 1 { 0. } else { 1. + i as f64 });
                    let sum: f64 = parts.clone().sum();
                    parts.map(move |part| (0.75 * part / sum) as f32 as f64)
                });
                let probabilities = probabilities.collect();
                Teacher::TopK(k, classes, probabilities, rest)
            }
        };
        let targets: Vec<i64> = (0..rows)
            .map(|_| match features.ignored && random.below(3) == 0 {
                true => IGNORED,
                false => random.below(vocab) as i64,
            })
            .collect();
        let soft = Soft {
            vocab,
            time,
            shift: features.shift,
            counts: targets.iter().map(|target| *target != IGNORED).collect(),
            student,
            teacher,
            temperature: features.temperature,
        };
        Self {
            soft,
            dtype,
            lead: lead.to_vec(),
            tokens: features
                .tokens
                .then(|| (0..rows).map(|i| 0.25 * (i % 5) as f64).collect()),
            targets,
        }
    }

    fn vars(&self, head: &Head, device: &Device) -> Result<[Option<Var>; 3]> {
        let var = |values: &[f64], shape: &[usize]| {
            let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
            let tensor = tensor.to_dtype(self.dtype)?.to_device(device)?;
            Var::from_tensor(&tensor).map(Some)
        };
        let mut shape = self.lead.clone();
        shape.push(head.hidden);
        Ok([
            var(&head.embeddings, &shape)?,
            var(&head.classifier, &[self.soft.vocab, head.hidden])?,
            match &head.bias {
                Some(bias) => var(bias, &[self.soft.vocab])?,
                None => None,
            },
        ])
    }

    fn run(&self, device: &Device, options: Options) -> Result<Ran> {
        let student = self.vars(&self.soft.student, device)?;
        let [embeddings, classifier, bias] = &student;
        let (embeddings, classifier) = (embeddings.as_ref().unwrap(), classifier.as_ref().unwrap());
        let targets = Tensor::from_slice(&self.targets, self.lead.as_slice(), device)?;
        let tokens = match &self.tokens {
            Some(tokens) => {
                let tokens: Vec<f32> = tokens.iter().map(|weight| *weight as f32).collect();
                Some(Tensor::from_vec(tokens, self.lead.as_slice(), device)?)
            }
            None => None,
        };
        let options = options
            .bias(bias.as_deref())
            .softcap(self.soft.student.softcap)
            .logit_scale(self.soft.student.scale)
            .token_weights(tokens.as_ref())
            .ignore_index(IGNORED)
            .shift(self.soft.shift);
        let whole = |head: &Head, kind| -> Result<_> {
            let vars = self.vars(head, device)?;
            let [e, c, b] = &vars;
            let teacher = soft_targets::Teacher::new(e.as_ref().unwrap(), c.as_ref().unwrap())
                .bias(b.as_deref())
                .softcap(head.softcap)
                .logit_scale(head.scale)
                .temperature(self.soft.temperature);
            let loss = divergence(embeddings, classifier, &targets, &teacher, kind, &options)?;
            Ok((loss, Some(vars)))
        };
        let (loss, teacher) = match &self.soft.teacher {
            Teacher::Forward(head) => whole(head, Divergence::ForwardKl)?,
            Teacher::Reverse(head) => whole(head, Divergence::ReverseKl)?,
            Teacher::JensenShannon(head, beta) => whole(head, Divergence::JensenShannon(*beta))?,
            Teacher::TopK(k, classes, probabilities, rest) => {
                let mut shape = self.lead.clone();
                shape.push(*k);
                let classes: Vec<u32> = classes.iter().map(|class| *class as u32).collect();
                let classes = Tensor::from_vec(classes, shape.as_slice(), device)?;
                let probabilities =
                    Tensor::from_slice(probabilities, shape.as_slice(), &Device::Cpu)?
                        .to_dtype(DType::F32)?
                        .to_device(device)?;
                let teacher = TopK::new(&classes, &probabilities)
                    .rest(match rest {
                        Rest::OneClass => soft_targets::Rest::OneClass,
                        Rest::Renormalized => soft_targets::Rest::Renormalized,
                        Rest::LeftOut => soft_targets::Rest::LeftOut,
                    })
                    .temperature(self.soft.temperature);
                let loss = top_k_divergence(embeddings, classifier, &targets, &teacher, &options)?;
                (loss, None)
            }
        };
        Ok(Ran {
            loss,
            student,
            teacher,
        })
    }

    /// The loss, and the gradients of `factor` times it: of the student's and the teacher's embeddings, classifier and bias.
    pub fn computed(
        &self,
        device: &Device,
        options: Options,
        factor: f64,
    ) -> Result<Vec<Vec<f64>>> {
        let ran = self.run(device, options)?;
        let store = backward(&(&ran.loss * factor)?.sum_all()?)?;
        let mut all = vec![numbers(&ran.loss)?];
        for var in ran.student.iter().chain(ran.teacher.iter().flatten()) {
            let Some(var) = var else { continue };
            all.push(numbers(store.get(var).expect("a gradient"))?);
        }
        Ok(all)
    }

    /// Compares loss and gradients under a reduction with the reference.
    pub fn check(
        &self,
        what: &str,
        device: &Device,
        options: Options,
        reduction: Reduction,
    ) -> Result<()> {
        let what = format!("{what} {:?} {reduction:?}", self.dtype);
        let ran = self.run(device, options.reduction(reduction))?;
        let token = |row: usize| match &self.tokens {
            Some(tokens) => tokens[row + self.soft.shift],
            None => 1.,
        };
        let positions = self.soft.positions().into_iter();
        let tokens: Vec<f64> = positions.map(|row| row.map_or(0., token)).collect();
        let total = match tokens.iter().sum::<f64>() {
            0. => 1.,
            total => total,
        };
        let losses = self.soft.losses();
        let losses: Vec<f64> = losses.iter().zip(&tokens).map(|(l, w)| l * w).collect();
        let weights: Vec<f64> = (0..losses.len())
            .map(|i| match reduction {
                Reduction::None => ((i * 7 % 5) as f64) - 1.5,
                Reduction::Sum => 1.,
                Reduction::Mean => 1. / total,
            })
            .collect();
        let weighted = losses.iter().zip(&weights).map(|(loss, w)| loss * w);
        let (want, scalar) = match reduction {
            Reduction::None => {
                let mut shape = self.lead.clone();
                *shape.last_mut().unwrap() -= self.soft.shift;
                assert_eq!(ran.loss.dims(), shape);
                let weights: Vec<f32> = weights.iter().map(|w| *w as f32).collect();
                let weights = Tensor::from_vec(weights, shape, device)?;
                (losses.clone(), (&ran.loss * weights)?.sum_all()?)
            }
            _ => {
                assert_eq!(ran.loss.rank(), 0);
                (vec![weighted.sum()], ran.loss.clone())
            }
        };
        assert_eq!(ran.loss.dtype(), DType::F32);
        close(&what, &numbers(&ran.loss)?, &want, 3e-6, 1.).unwrap();
        let tolerance = match (&self.soft.teacher, self.dtype) {
            // What is between the loss and the logits is f32, and what the others have a difference of such numbers.
            (Teacher::TopK(..), DType::F64) => 5e-6,
            // A temperature of 2 rounds nothing; z and lse each round their gradient.
            (Teacher::TopK(..), dtype) => 2. * gradient_tolerance(dtype),
            (_, dtype) => gradient_tolerance(dtype),
        };
        let weights: Vec<f64> = weights.iter().zip(&tokens).map(|(a, b)| a * b).collect();
        let (of_student, of_teacher) = self.soft.gradients(&weights);
        for (name, store) in [("Candle's", scalar.backward()?), ("", backward(&scalar)?)] {
            let compare = |side: &str, vars: &[Option<Var>; 3], want: &HeadGradients| {
                let wants = [&want.embeddings, &want.classifier, &want.bias];
                for (i, (var, want)) in vars.iter().zip(wants).enumerate() {
                    let Some(var) = var else { continue };
                    let what = format!("{what}: {name} gradient {i} of the {side}");
                    let got = store.get(var).expect(&what);
                    assert_eq!((got.dtype(), got.dims()), (var.dtype(), var.dims()));
                    let got = numbers(got)?;
                    let off = norm(got.iter().zip(want).map(|(got, want)| got - want));
                    let size = norm(want.iter().copied());
                    assert!(
                        off <= tolerance * size,
                        "{what}: off by {off:e} of {size:e}"
                    );
                }
                Ok::<_, candle_core::Error>(())
            };
            compare("student", &ran.student, &of_student)?;
            if let (Some(vars), Some(want)) = (&ran.teacher, &of_teacher) {
                compare("teacher", vars, want)?;
            }
        }
        Ok(())
    }
}

struct Ran {
    loss: Tensor,
    /// Embeddings, classifier, bias.
    student: [Option<Var>; 3],
    teacher: Option<[Option<Var>; 3]>,
}

pub const REDUCTIONS: [Reduction; 3] = [Reduction::Mean, Reduction::Sum, Reduction::None];
