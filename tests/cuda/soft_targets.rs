//! Distillation on a GPU, by kernels where they can run, else by Candle tensor operations.

use crate::common::soft_cases::{Case, Features, ALL, KINDS, PLAIN, REDUCTIONS};
use crate::common::soft_reference::Teacher;
use crate::common::{norm, numbers};
use crate::device;
use candle_core::{DType, Result, Tensor, Var};
use candle_cut_cross_entropy::soft_targets::class_logits;
use candle_cut_cross_entropy::{backward, Filter, Implementation, Options, Reduction, Strategy};

#[test]
fn losses_and_gradients_are_those_of_the_reference() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for kind in KINDS {
        for (features, name) in [(&PLAIN, "plain"), (&ALL, "all")] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let case = Case::new(dtype, &[3, 7], 53, kind, features);
                for reduction in REDUCTIONS {
                    let what = format!("{kind:?} {name}");
                    case.check(&what, &device, Options::default(), reduction)?;
                }
            }
        }
    }
    Ok(())
}

/// Both gradients of a matrix in one tensor, whatever way that of the lse comes about; with columns that the kernels of
/// Hopper take.
#[test]
fn the_loss_and_the_named_classes_share_a_gradient() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let [plain, all] = [PLAIN, ALL].map(|features| Features {
        hidden: 64,
        ..features
    });
    for kind in &KINDS[3..] {
        for (features, name) in [(&plain, "plain"), (&all, "all")] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let case = Case::new(dtype, &[2, 70], 300, *kind, features);
                for strategy in [Strategy::Fused, Strategy::Recompute] {
                    for reduction in REDUCTIONS {
                        let options = Options::default().filter(Filter::Off).strategy(strategy);
                        let what = format!("{kind:?} {name} {strategy:?}");
                        case.check(&what, &device, options, reduction)?;
                    }
                }
                let native = Options::default().implementation(Implementation::Native);
                let what = format!("{kind:?} {name} native");
                case.check(&what, &device, native, Reduction::Mean)?;
            }
        }
    }
    Ok(())
}

#[test]
fn blocks_of_any_size_and_either_strategy_give_the_same() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for kind in &KINDS[..3] {
        for dtype in [DType::F32, DType::BF16] {
            let case = Case::new(dtype, &[2, 9], 150, *kind, &ALL);
            for workspace in [1, 20_000, 100_000] {
                for strategy in [Strategy::Fused, Strategy::Recompute] {
                    let options = Options::default().workspace(workspace).strategy(strategy);
                    let what = format!("{kind:?} workspace {workspace} {strategy:?}");
                    case.check(&what, &device, options, Reduction::Mean)?;
                }
            }
        }
    }
    Ok(())
}

/// Of heads that the kernels take, several tiles of rows and classes, some of them ragged.
#[test]
fn kernels_of_a_whole_teacher_match_the_reference() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for kind in &KINDS[..3] {
        for (features, name) in [(&PLAIN, "plain"), (&ALL, "all")] {
            for (hidden, vocab) in [([24, 40], 53), ([64, 64], 300), ([72, 24], 1501)] {
                let case = Case::sized(DType::BF16, &[3, 51], hidden, vocab, *kind, features);
                for reduction in REDUCTIONS {
                    for strategy in [Strategy::Auto, Strategy::Recompute] {
                        let options = Options::default().strategy(strategy);
                        let what = format!("{kind:?} {name} {hidden:?} {vocab} {strategy:?}");
                        case.check(&what, &device, options, reduction)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// One chunk of rows; several, of one block of logits or more; and a workspace that leaves it to the operations.
#[test]
fn several_chunks_of_rows_of_a_whole_teacher_are_right() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for kind in &KINDS[..3] {
        let case = Case::sized(DType::BF16, &[600], [24, 40], 700, *kind, &ALL);
        for workspace in [
            8 << 20,
            5300 << 10,
            4 << 20,
            2600 << 10,
            1700 << 10,
            300 << 10,
        ] {
            let options = Options::default().workspace(workspace);
            let what = format!("{kind:?} workspace {workspace}");
            case.check(&what, &device, options, Reduction::Mean)?;
        }
    }
    Ok(())
}

#[test]
fn gradients_of_a_whole_teacher_repeat_and_scale() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for kind in &KINDS[..3] {
        let case = Case::sized(DType::BF16, &[300], [64, 72], 1000, *kind, &ALL);
        let run = |factor| case.computed(&device, Options::default(), factor);
        let once = run(1.)?;
        assert_eq!(once, run(1.)?, "{kind:?}");
        let fourfold = run(-4.)?;
        assert_eq!(once[0], fourfold[0]);
        for (a, b) in once[1..].iter().zip(&fourfold[1..]) {
            let a: Vec<f64> = a.iter().map(|x| -4. * x).collect();
            assert_eq!(&a, b, "{kind:?}");
        }
    }
    Ok(())
}

/// Classes that neither side has, by a bias of -inf, and a student and a teacher that are the same, whose gradients are 0.
#[test]
fn impossible_classes_and_equal_sides_make_no_nan() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for kind in &KINDS[..3] {
        let mut case = Case::sized(DType::BF16, &[150], [24, 40], 300, *kind, &ALL);
        let impossible = |bias: &mut Option<Vec<f64>>| {
            for bias in bias.iter_mut().flatten().step_by(7) {
                *bias = f64::NEG_INFINITY;
            }
        };
        let student = {
            case.soft.student.softcap = None;
            impossible(&mut case.soft.student.bias);
            case.soft.student.clone()
        };
        let teacher = match &mut case.soft.teacher {
            Teacher::Forward(head) | Teacher::Reverse(head) => head,
            Teacher::JensenShannon(head, _) => head,
            Teacher::TopK(..) => unreachable!("a whole teacher"),
        };
        teacher.softcap = None;
        impossible(&mut teacher.bias);
        let kernels = case.computed(&device, Options::default(), 1.)?;
        let operations = case.computed(&device, Options::default().workspace(1), 1.)?;
        for (a, b) in kernels.iter().zip(&operations) {
            let off = norm(a.iter().zip(b).map(|(a, b)| a - b));
            let size = norm(b.iter().copied());
            assert!(off <= 5e-3 * size, "{kind:?}: off by {off:e} of {size:e}");
        }
        let teacher = match &mut case.soft.teacher {
            Teacher::Forward(head) | Teacher::Reverse(head) => head,
            Teacher::JensenShannon(head, _) => head,
            Teacher::TopK(..) => unreachable!("a whole teacher"),
        };
        *teacher = student;
        for numbers in case.computed(&device, Options::default(), 1.)? {
            assert!(numbers.iter().all(|x| x.abs() <= 1e-6), "{kind:?}");
        }
    }
    Ok(())
}

#[test]
fn a_class_that_does_not_exist_is_a_nan_or_an_error() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let e = Var::ones((2, 4), DType::BF16, &device)?;
    let c = Var::ones((5, 4), DType::BF16, &device)?;
    for dtype in [DType::I64, DType::U32, DType::I32] {
        let classes = Tensor::new(&[[4i64, 5], [0, 1 << 30]], &candle_core::Device::Cpu)?;
        let classes = classes.to_dtype(dtype)?.to_device(&device)?;
        let logits = class_logits(&e, &c, &classes, &Options::default())?;
        let values = numbers(&logits)?;
        assert_eq!([values[0], values[2]], [4., 4.]);
        assert!(values[1].is_nan() && values[3].is_nan());
        let gradients = backward(&logits.sum_all()?)?;
        let gradient = numbers(gradients.get(&c).expect("a gradient"))?;
        assert!(gradient.iter().all(|g| g.is_finite()), "{gradient:?}");
        assert_eq!(gradient.iter().sum::<f64>(), 8.);
        let checked = Options::default().check_targets(true);
        let error = class_logits(&e, &c, &classes, &checked).expect_err("an error");
        let error = error.to_string();
        assert!(
            error.contains("class 5 at [0, 1] is outside [0, 5)"),
            "{error}"
        );
    }
    Ok(())
}
