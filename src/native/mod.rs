//! The implementation without a GPU's kernels: on the CPU, matrix products with the passes between
//! them fused in; on any other device, Candle tensor operations over blocks of rows and classes.
//!
//! Both need to know on the host which positions count, so on a GPU the targets are waited for once a
//! call.

mod cpu;
mod rows;
mod tensor;

#[cfg(feature = "models")]
pub(crate) use cpu::Real;

use crate::op::{Forward, KeptTiles, Wanted};
use crate::problem::Problem;
use candle_core::Result;
use std::sync::Arc;

pub(crate) const DEFAULT_WORKSPACE: usize = 64 << 20;

pub(crate) fn forward(problem: &Problem, wanted: Wanted, kept: &Arc<KeptTiles>) -> Result<Forward> {
    let rows = rows::Rows::new(problem)?;
    if problem.embeddings.device().is_cpu() {
        cpu::forward(problem, rows, wanted, kept.clone())
    } else {
        tensor::forward(problem, rows, kept.clone())
    }
}

#[cfg(test)]
mod tests {
    //! The two implementations against each other. Neither shares code with the other beyond the list
    //! of rows.

    use super::*;
    use crate::{Filter, Options, Reduction, Strategy};
    use candle_core::{DType, Device, Tensor};

    /// Numbers in `[-1, 1)` that a seed decides.
    fn noise(len: usize, seed: u64) -> Vec<f64> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 11) as f64 / (1u64 << 52) as f64 - 1.
            })
            .collect()
    }

    struct Case {
        batch: usize,
        time: usize,
        hidden: usize,
        vocab: usize,
        dtype: DType,
        bias: bool,
        /// Every so many-th target is ignored.
        ignore: Option<usize>,
        scale: f64,
        /// The first so many classes are likely, and the targets.
        likely: usize,
    }

    impl Case {
        fn small() -> Self {
            Self {
                batch: 3,
                time: 15,
                hidden: 19,
                vocab: 301,
                dtype: DType::F32,
                bias: true,
                ignore: Some(3),
                scale: 1.,
                likely: 301,
            }
        }

        fn problem(&self, options: &Options) -> Problem {
            let tensor = |shape: &[usize], seed, scale: f64| {
                let len = shape.iter().product();
                let values: Vec<f64> = noise(len, seed).iter().map(|x| x * scale).collect();
                Tensor::from_vec(values, shape, &Device::Cpu)
                    .unwrap()
                    .to_dtype(self.dtype)
                    .unwrap()
            };
            let e = tensor(&[self.batch, self.time, self.hidden], 1, self.scale);
            let c = tensor(&[self.vocab, self.hidden], 2, 1.);
            let targets: Vec<i64> = noise(self.batch * self.time, 3)
                .iter()
                .enumerate()
                .map(|(i, x)| match self.ignore {
                    Some(every) if i % every == 0 => -100,
                    _ => ((x + 1.) / 2. * self.likely.min(self.vocab) as f64) as i64,
                })
                .collect();
            let targets = Tensor::from_vec(targets, (self.batch, self.time), &Device::Cpu).unwrap();
            let mut options = options.clone();
            if self.bias {
                let mut bias = noise(self.vocab, 4);
                for unlikely in bias.iter_mut().skip(self.likely) {
                    *unlikely -= 20.;
                }
                let bias = Tensor::new(bias, &Device::Cpu).unwrap();
                options = options.bias(&bias.to_dtype(self.dtype).unwrap());
            }
            Problem::new(&e, &c, &targets, &options).unwrap()
        }
    }

    const ALL: Wanted = Wanted {
        embeddings: true,
        classifier: true,
        bias: true,
    };

    fn wanted(problem: &Problem) -> Wanted {
        Wanted {
            bias: problem.bias.is_some(),
            ..ALL
        }
    }

    fn backward(
        problem: &Problem,
        forward: &Forward,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Vec<Option<Vec<f64>>> {
        let matrices = crate::problem::Matrices {
            embeddings: &problem.embeddings,
            classifier: &problem.classifier,
            bias: problem.bias.as_ref(),
        };
        let gradients = forward
            .backward
            .backward(matrices, upstream, wanted)
            .unwrap();
        [
            (gradients.embeddings, Some(&problem.embeddings)),
            (gradients.classifier, Some(&problem.classifier)),
            (gradients.bias, problem.bias.as_ref()),
        ]
        .into_iter()
        .map(|(gradient, of)| {
            let gradient = gradient?;
            assert_eq!(gradient.dims(), of.unwrap().dims());
            assert_eq!(gradient.dtype(), of.unwrap().dtype());
            Some(values(&gradient))
        })
        .collect()
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        tensor
            .flatten_all()
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    /// The distance relative to the second one's length.
    fn error(a: &[f64], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let difference = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
        difference / norm(&mut b.iter().copied()).max(1e-30)
    }

    fn tolerance(dtype: DType) -> f64 {
        match dtype {
            DType::BF16 => 8e-3,
            DType::F16 => 1e-3,
            DType::F32 => 2e-6,
            _ => 1e-12,
        }
    }

    fn run_cpu(problem: &Problem) -> Forward {
        let rows = rows::Rows::new(problem).unwrap();
        cpu::forward(problem, rows, wanted(problem), Default::default()).unwrap()
    }

    fn run_tensor(problem: &Problem) -> Forward {
        let mut problem = problem.clone();
        problem.settings.workspace = None;
        let rows = rows::Rows::new(&problem).unwrap();
        tensor::forward(&problem, rows, Default::default()).unwrap()
    }

    /// Upstream gradients of the packed vector: of the loss alone, of another size, of everything.
    fn upstreams(problem: &Problem) -> Vec<Tensor> {
        let n = problem.positions.len();
        let loss = |u: f32| {
            let mut values = vec![0f32; 2 * n + 1];
            values[2 * n] = u;
            values
        };
        let all = noise(2 * n + 1, 5).iter().map(|x| *x as f32).collect();
        [loss(1.), loss(-0.75), all]
            .into_iter()
            .map(|values: Vec<f32>| Tensor::from_vec(values, 2 * n + 1, &Device::Cpu).unwrap())
            .collect()
    }

    fn compare(name: &str, case: &Case, options: &Options) {
        let problem = case.problem(options);
        let tolerance = tolerance(case.dtype);
        let second = run_tensor(&problem);
        for upstream in upstreams(&problem) {
            let first = run_cpu(&problem);
            let off = error(&values(&first.packed), &values(&second.packed));
            assert!(off < 2e-6, "{name}: loss off by {off}");
            let b = backward(&problem, &second, &upstream, wanted(&problem));
            // Twice: the second time there are no gradients left from the forward.
            for time in 0..2 {
                let a = backward(&problem, &first, &upstream, wanted(&problem));
                for ((a, b), of) in a.iter().zip(&b).zip(["de", "dc", "db"]) {
                    assert_eq!(a.is_some(), b.is_some());
                    if let (Some(a), Some(b)) = (a, b) {
                        let off = error(a, b);
                        assert!(
                            off < tolerance,
                            "{name}: {of} off by {off}, backward {time}"
                        );
                    }
                }
            }
        }
    }

    fn exact() -> Options {
        Options::default().filter(Filter::Off)
    }

    #[test]
    fn dtypes_and_strategies_agree() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            for strategy in [Strategy::Auto, Strategy::Fused, Strategy::Recompute] {
                for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None] {
                    for workspace in [1, 1 << 22, 64 << 20] {
                        let options = exact()
                            .strategy(strategy)
                            .reduction(reduction)
                            .workspace(workspace);
                        let case = Case {
                            dtype,
                            ..Case::small()
                        };
                        let name = format!("{dtype:?} {strategy:?} {reduction:?} {workspace}");
                        compare(&name, &case, &options);
                    }
                }
            }
        }
    }

    #[test]
    fn bias_softcap_shift_and_ignored_rows_agree() {
        for bias in [false, true] {
            for softcap in [None, Some(0.8), Some(30.)] {
                for shift in [0, 1, 14] {
                    for ignore in [None, Some(1), Some(4)] {
                        let case = Case {
                            bias,
                            ignore,
                            ..Case::small()
                        };
                        for strategy in [Strategy::Fused, Strategy::Recompute] {
                            let options = exact().softcap(softcap).shift(shift).strategy(strategy);
                            let name =
                                format!("{bias} {softcap:?} {shift} {ignore:?} {strategy:?}");
                            compare(&name, &case, &options);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn ragged_sizes_agree() {
        for (rows, hidden, vocab) in [
            (1, 1, 1),
            (1, 40, 1000),
            (33, 1, 257),
            (200, 3, 2),
            (70, 64, 1),
            (600, 24, 1500),
            (97, 130, 255),
        ] {
            for dtype in [DType::F32, DType::BF16] {
                for ignore in [None, Some(5)] {
                    let case = Case {
                        batch: 1,
                        time: rows,
                        hidden,
                        vocab,
                        dtype,
                        ignore: ignore.filter(|_| rows > 1),
                        ..Case::small()
                    };
                    for strategy in [Strategy::Fused, Strategy::Recompute] {
                        for workspace in [1, 7 << 20] {
                            let options = exact().strategy(strategy).workspace(workspace);
                            let name = format!("{rows} {hidden} {vocab} {dtype:?} {strategy:?}");
                            compare(&name, &case, &options);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_filter_averages_tiles_and_loses_little() {
        let case = Case {
            time: 100,
            hidden: 32,
            vocab: 3000,
            ..Case::small()
        };
        for strategy in [Strategy::Fused, Strategy::Recompute] {
            for (filters, limit) in [
                ((3e-3, 3e-3), 0.1),
                ((0., 3e-3), 0.1),
                ((1e-15, 1e-15), 1e-5),
            ] {
                let options = exact()
                    .strategy(strategy)
                    .filter_embeddings(Filter::Threshold(filters.0))
                    .filter_classifier(Filter::Threshold(filters.1));
                let problem = case.problem(&options);
                let kept = Arc::new(KeptTiles::default());
                let rows = rows::Rows::new(&problem).unwrap();
                let first = cpu::forward(&problem, rows, ALL, kept.clone()).unwrap();
                let upstream = &upstreams(&problem)[0];
                let a = backward(&problem, &first, upstream, ALL);
                let b = backward(&problem, &run_tensor(&problem), upstream, ALL);
                for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                    let off = error(a.as_ref().unwrap(), b.as_ref().unwrap());
                    let limit = if i == 0 && filters.0 == 0. {
                        1e-5
                    } else {
                        limit
                    };
                    assert!(off < limit, "{filters:?}: gradient {i} off by {off}");
                }
                let share = kept.share().unwrap().unwrap();
                assert_eq!(share < 1., filters.0 > 1e-3, "{filters:?} kept {share}");
            }
        }
    }

    #[test]
    fn only_wanted_gradients_come_back_and_are_the_same() {
        let case = Case::small();
        for strategy in [Strategy::Fused, Strategy::Recompute] {
            let problem = case.problem(&exact().strategy(strategy));
            let upstream = &upstreams(&problem)[0];
            let all = backward(&problem, &run_cpu(&problem), upstream, ALL);
            for mask in 1..8 {
                let wanted = Wanted {
                    embeddings: mask & 1 != 0,
                    classifier: mask & 2 != 0,
                    bias: mask & 4 != 0,
                };
                let rows = rows::Rows::new(&problem).unwrap();
                let forward = cpu::forward(&problem, rows, wanted, Default::default()).unwrap();
                let some = backward(&problem, &forward, upstream, wanted);
                for (i, (some, all)) in some.iter().zip(&all).enumerate() {
                    assert_eq!(some.is_some(), mask & (1 << i) != 0);
                    if let (Some(some), Some(all)) = (some, all) {
                        assert!(error(some, all) < 1e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn a_run_repeats_bit_by_bit() {
        let case = Case {
            time: 100,
            vocab: 2000,
            ..Case::small()
        };
        for strategy in [Strategy::Fused, Strategy::Recompute] {
            let problem = case.problem(&Options::default().strategy(strategy));
            let upstream = &upstreams(&problem)[0];
            let run = || {
                let forward = run_cpu(&problem);
                let gradients = backward(&problem, &forward, upstream, ALL);
                (values(&forward.packed), gradients)
            };
            assert_eq!(run(), run());
        }
    }

    #[test]
    fn a_nan_spoils_its_row_and_nothing_is_dropped() {
        let case = Case {
            vocab: 600,
            ignore: None,
            ..Case::small()
        };
        for strategy in [Strategy::Fused, Strategy::Recompute] {
            for poison in [f64::NAN, f64::INFINITY] {
                let mut problem = case.problem(&Options::default().strategy(strategy));
                let mut e = values(&problem.embeddings);
                e[2 * case.hidden] = poison;
                problem.embeddings = Tensor::from_vec(e, problem.embeddings.dims(), &Device::Cpu)
                    .unwrap()
                    .to_dtype(case.dtype)
                    .unwrap();
                let forward = run_cpu(&problem);
                let packed = values(&forward.packed);
                assert!(packed[2].is_nan() && !packed[1].is_nan() && !packed[3].is_nan());
                let gradients = backward(&problem, &forward, &upstreams(&problem)[0], ALL);
                let de = gradients[0].as_ref().unwrap();
                assert!(de[2 * case.hidden..3 * case.hidden]
                    .iter()
                    .all(|x| x.is_nan()));
                assert!(de[..2 * case.hidden].iter().all(|x| x.is_finite()));
                assert!(gradients[1].as_ref().unwrap().iter().all(|x| x.is_nan()));
                assert!(gradients[2].as_ref().unwrap().iter().all(|x| x.is_nan()));
            }
        }
    }
    #[test]
    fn logits_of_ten_thousand_lose_no_bits_to_a_rounded_lse() {
        // Logits that f32 holds exactly: 10000 and 2, 1, 0, -1 for the first row, the negatives for the second. Their
        // lse is rounded by up to 5e-4; loss and softmax must not be.
        let e = Tensor::new(&[[5000f32, 1.], [5000., -1.]], &Device::Cpu).unwrap();
        let c = Tensor::new(&[[2f32, 2.], [2., 1.], [2., 0.], [2., -1.]], &Device::Cpu).unwrap();
        let targets = Tensor::new(&[1i64, 1], &Device::Cpu).unwrap();
        let problem = Problem::new(&e, &c, &targets, &exact()).unwrap();
        let rows = [[2f64, 1., 0., -1.], [-2., -1., 0., 1.]];
        let sums = rows.map(|row| row.map(f64::exp).iter().sum::<f64>());
        let want = (sums[0].ln() - 1. + sums[1].ln() + 1.) / 2.;
        for forward in [run_tensor(&problem), run_cpu(&problem)] {
            let loss = values(&forward.packed)[4];
            assert!((loss - want).abs() < 2e-6, "loss {loss}, want {want}");
            let upstream = Tensor::new(&[0f32, 0., 0., 0., 1.], &Device::Cpu).unwrap();
            let gradients = backward(&problem, &forward, &upstream, wanted(&problem));
            let dc = gradients[1].as_ref().unwrap();
            for class in 0..4 {
                // The second column of E is 1 and -1; the targets cancel.
                let p = |row: usize| rows[row][class].exp() / sums[row];
                let (got, want) = (dc[class * 2 + 1], (p(0) - p(1)) / 2.);
                assert!(
                    (got - want).abs() < 1e-6,
                    "dC of {class}: {got}, want {want}"
                );
            }
        }
    }
}
