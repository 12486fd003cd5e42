//! Distillation on a GPU.

use crate::common::numbers;
use crate::common::soft_cases::{Case, Features, ALL, KINDS, PLAIN, REDUCTIONS};
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
