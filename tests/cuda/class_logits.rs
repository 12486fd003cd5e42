//! The kernels of the logits of chosen classes, against sums in f64.

use crate::common::{close, gradient_tolerance, norm, numbers, round_to, Random};
use crate::{device, DTYPES};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::soft_targets::class_logits;
use candle_cut_cross_entropy::{backward, Implementation, Options};

/// Inputs in a dtype, row-major.
struct Case {
    dtype: DType,
    rows: usize,
    k: usize,
    hidden: usize,
    vocab: usize,
    embeddings: Vec<f64>,
    classifier: Vec<f64>,
    bias: Option<Vec<f64>>,
    softcap: Option<f64>,
    scale: f64,
    classes: Vec<i64>,
    /// What the logits of classes that exist are multiplied by in the sum that is differentiated; some are 0.
    upstream: Vec<f64>,
}

/// Logits, and the gradients of embeddings, classifier and bias where there are any.
type Numbers = [Option<Vec<f64>>; 4];

impl Case {
    /// `[rows, k, hidden, vocab]`
    fn new(dtype: DType, [rows, k, hidden, vocab]: [usize; 4]) -> Self {
        let mut random = Random::new((rows * hidden + k) as u64);
        let mut normals = |n: usize, scale: f64| -> Vec<f64> {
            let normals = random.normals(n, scale).into_iter();
            normals.map(|x| round_to(dtype, x)).collect()
        };
        let embeddings = normals(rows * hidden, 1.);
        let classifier = normals(vocab * hidden, 1. / (hidden as f64).sqrt());
        Self {
            dtype,
            rows,
            k,
            hidden,
            vocab,
            embeddings,
            classifier,
            bias: None,
            softcap: None,
            scale: 1.,
            classes: (0..rows * k).map(|_| random.below(vocab) as i64).collect(),
            upstream: (0..rows * k).map(|_| random.below(7) as f64 - 2.).collect(),
        }
    }

    fn with_all_options(mut self) -> Self {
        let mut random = Random::new(9);
        let bias = random.normals(self.vocab, 1.).into_iter();
        self.bias = Some(bias.map(|x| round_to(self.dtype, x)).collect());
        self.softcap = Some(3.);
        self.scale = 0.75;
        self
    }

    fn exists(&self, i: usize) -> bool {
        (0..self.vocab as i64).contains(&self.classes[i])
    }

    fn reference(&self) -> [Vec<f64>; 4] {
        let d = self.hidden;
        let mut logits = vec![f64::NAN; self.classes.len()];
        let mut of_embeddings = vec![0.; self.embeddings.len()];
        let mut of_classifier = vec![0.; self.classifier.len()];
        let mut of_bias = vec![0.; self.vocab];
        for i in (0..logits.len()).filter(|i| self.exists(*i)) {
            let (e, class) = (i / self.k * d, self.classes[i] as usize);
            let c = class * d;
            let products = (0..d).map(|x| self.embeddings[e + x] * self.classifier[c + x]);
            let z = products.sum::<f64>() + self.bias.as_ref().map_or(0., |bias| bias[class]);
            let (z, slope) = match self.softcap {
                None => (z, 1.),
                Some(cap) => (cap * (z / cap).tanh(), 1. - (z / cap).tanh().powi(2)),
            };
            logits[i] = z * self.scale;
            let g = self.upstream[i] * slope * self.scale;
            of_bias[class] += g;
            for x in 0..d {
                of_embeddings[e + x] += g * self.classifier[c + x];
                of_classifier[c + x] += g * self.embeddings[e + x];
            }
        }
        [logits, of_embeddings, of_classifier, of_bias]
    }

    fn tensor(&self, values: &[f64], shape: &[usize], device: &Device) -> Result<Tensor> {
        let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
        tensor.to_dtype(self.dtype)?.to_device(device)
    }

    /// `tracked` are embeddings, classifier and bias. Of what is `transposed` no row lies in one piece.
    fn run(
        &self,
        device: &Device,
        implementation: Implementation,
        tracked: [bool; 3],
        transposed: bool,
    ) -> Result<Numbers> {
        let matrix = |values: &[f64], rows: usize, tracked: bool| -> Result<_> {
            let mut tensor = self.tensor(values, &[rows, values.len() / rows], device)?;
            if transposed {
                tensor = tensor.t()?.contiguous()?;
            }
            let var = Var::from_tensor(&tensor)?;
            let used = match tracked {
                true => var.as_tensor().clone(),
                false => tensor,
            };
            let used = if transposed { used.t()? } else { used };
            Ok((var, used))
        };
        let (e, embeddings) = matrix(&self.embeddings, self.rows, tracked[0])?;
        let (c, classifier) = matrix(&self.classifier, self.vocab, tracked[1])?;
        let bias = match &self.bias {
            Some(bias) => Some(Var::from_tensor(&self.tensor(
                bias,
                &[self.vocab],
                device,
            )?)?),
            None => None,
        };
        let used_bias = bias.as_ref().map(|bias| match tracked[2] {
            true => bias.as_tensor().clone(),
            false => bias.as_detached_tensor(),
        });
        let shape = (self.rows, self.k);
        let mut classes = Tensor::from_slice(&self.classes, shape, device)?;
        if transposed {
            classes = classes.t()?.contiguous()?.t()?;
        }
        let options = Options::default()
            .bias(used_bias.as_ref())
            .softcap(self.softcap)
            .logit_scale(self.scale)
            .implementation(implementation);
        let logits = class_logits(&embeddings, &classifier, &classes, &options)?;
        let exists: Vec<u8> = (0..self.classes.len())
            .map(|i| self.exists(i).into())
            .collect();
        let exists = Tensor::from_vec(exists, shape, device)?;
        let upstream: Vec<f32> = self.upstream.iter().map(|g| *g as f32).collect();
        let upstream = Tensor::from_vec(upstream, shape, device)?;
        let zeros = upstream.zeros_like()?;
        let sum = (exists.where_cond(&logits, &zeros)? * upstream)?.sum_all()?;
        let gradients = backward(&sum)?;
        let of = |var: &Var, is_matrix: bool| match gradients.get(var) {
            Some(gradient) if transposed && is_matrix => numbers(&gradient.t()?).map(Some),
            Some(gradient) => numbers(gradient).map(Some),
            None => Ok(None),
        };
        Ok([
            Some(numbers(&logits)?),
            of(&e, true)?,
            of(&c, true)?,
            match &bias {
                Some(bias) => of(bias, false)?,
                None => None,
            },
        ])
    }

    fn check(&self, what: &str, device: &Device) -> Result<()> {
        let Self {
            dtype,
            rows,
            k,
            hidden,
            vocab,
            ..
        } = self;
        let what = format!("{what}: {dtype:?}, N {rows}, k {k}, D {hidden}, V {vocab}");
        let want = self.reference();
        let all = [true, true, self.bias.is_some()];
        let first = self.run(device, Implementation::Auto, all, false)?;
        self.compare(&what, &first, &want, all);
        let again = self.run(device, Implementation::Auto, all, false)?;
        for (first, again) in first.iter().zip(&again) {
            let bits = |numbers: &Option<Vec<f64>>| -> Vec<u64> {
                let numbers = numbers.iter().flatten();
                numbers.map(|x| x.to_bits()).collect()
            };
            assert_eq!(bits(first), bits(again), "{what}: another run");
        }
        Ok(())
    }

    fn compare(&self, what: &str, got: &Numbers, want: &[Vec<f64>; 4], tracked: [bool; 3]) {
        let logits = got[0].as_ref().unwrap();
        let known = |values: &[f64]| -> Vec<f64> {
            let known = (0..values.len()).filter(|i| self.exists(*i));
            known.map(|i| values[i]).collect()
        };
        close(what, &known(logits), &known(&want[0]), 2e-6, 4.).unwrap();
        for i in (0..logits.len()).filter(|i| !self.exists(*i)) {
            assert!(
                logits[i].is_nan(),
                "{what}: class {} has a logit",
                self.classes[i]
            );
        }
        for (i, tracked) in tracked.into_iter().enumerate() {
            let what = format!("{what}: gradient {i}");
            let (got, want) = (&got[i + 1], &want[i + 1]);
            let Some(got) = got else {
                assert!(!tracked, "{what} is missing");
                continue;
            };
            assert!(tracked, "{what} is not wanted");
            let off = norm(got.iter().zip(want).map(|(a, b)| a - b));
            let size = norm(want.iter().copied());
            let tolerance = gradient_tolerance(self.dtype);
            assert!(
                off <= tolerance * size,
                "{what}: off by {off:e} of {size:e}"
            );
            // That of a class that nobody chose.
            for class in (0..self.vocab).filter(|c| i > 0 && !self.classes.contains(&(*c as i64))) {
                let columns = got.len() / self.vocab;
                let of_class = &got[class * columns..][..columns];
                assert!(of_class.iter().all(|g| *g == 0.), "{what}: class {class}");
            }
        }
    }
}

/// Ragged and aligned rows, one number a row, several parts of a row, several pieces of entries, and as many classes as take
/// one, two and three digits to sort by.
const SIZES: [[usize; 4]; 8] = [
    [13, 5, 33, 29],
    [1, 1, 1, 1],
    [6, 1, 1, 3],
    [70, 64, 64, 1000],
    [200, 64, 24, 600],
    [3, 3, 2056, 7],
    [5, 2, 4104, 4],
    [40, 9, 8, 270_000],
];

#[test]
fn logits_and_gradients_are_those_of_the_reference() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        for sizes in SIZES {
            Case::new(dtype, sizes).check("plain", &device)?;
        }
        for sizes in [SIZES[0], SIZES[3]] {
            let case = Case::new(dtype, sizes).with_all_options();
            case.check("all options", &device)?;
        }
    }
    Ok(())
}

#[test]
fn a_class_may_be_chosen_by_all() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        // 700 entries of every class, runs of one and a half pieces; then one run of all; then some in between.
        for (name, classes) in [("rows alike", 5), ("one class", 1), ("two", 2)] {
            let mut case = Case::new(dtype, [700, 5, 40, 11]).with_all_options();
            for (i, class) in case.classes.iter_mut().enumerate() {
                *class = (i % 5 % classes) as i64 * 2 + 1;
            }
            case.check(name, &device)?;
        }
    }
    Ok(())
}

#[test]
fn a_class_that_does_not_exist_adds_nothing() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        for hidden in [7, 32] {
            let mut case = Case::new(dtype, [150, 6, hidden, 20]).with_all_options();
            let none = [20, -1, i64::MAX, i64::MIN, 1 << 32];
            for (i, class) in case.classes.iter_mut().enumerate() {
                if i % 3 == 0 || i / 6 == 4 {
                    *class = none[i % none.len()];
                }
            }
            case.check("some do not exist", &device)?;
            case.classes.fill(-5);
            case.check("none exists", &device)?;
        }
    }
    Ok(())
}

#[test]
fn views_and_frozen_matrices() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let case = Case::new(dtype, [50, 6, 24, 90]).with_all_options();
        let want = case.reference();
        for tracked in [
            [true, true, true],
            [true, false, false],
            [false, true, false],
            [false, false, true],
            [true, false, true],
        ] {
            for transposed in [false, true] {
                let what = format!("{dtype:?} {tracked:?}, transposed {transposed}");
                let got = case.run(&device, Implementation::Auto, tracked, transposed)?;
                case.compare(&what, &got, &want, tracked);
            }
        }
    }
    Ok(())
}

#[test]
fn tensor_operations_stay_an_implementation() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let mut case = Case::new(dtype, [50, 6, 24, 90]).with_all_options();
        case.classes[7] = 90;
        let all = [true; 3];
        let got = case.run(&device, Implementation::Native, all, false)?;
        case.compare("native", &got, &case.reference(), all);
    }
    Ok(())
}

/// As in the loss: what is not learnt from may hold anything.
#[test]
fn what_has_no_gradient_may_be_nan() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let e = Tensor::new(&[[f32::NAN, 1.], [2., 3.]], &device)?;
    let c = Tensor::new(&[[f32::INFINITY, 1.], [4., 5.]], &device)?;
    let (e, c) = (Var::from_tensor(&e)?, Var::from_tensor(&c)?);
    let classes = Tensor::new(&[[0u32, 1], [1, 0]], &device)?;
    let logits = class_logits(&e, &c, &classes, &Options::default())?;
    let gradients = backward(&logits.get(1)?.get(0)?)?;
    let of = |var: &Var| numbers(gradients.get(var).expect("a gradient"));
    assert_eq!(of(&e)?, [0., 0., 4., 5.]);
    assert_eq!(of(&c)?, [0., 0., 2., 3.]);
    Ok(())
}
