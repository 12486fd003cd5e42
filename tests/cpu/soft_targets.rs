//! Distillation against a reference in f64, over dtypes, shapes, options and reductions.

use crate::common::close;
use crate::common::soft_cases::{Case, ALL, KINDS, PLAIN, REDUCTIONS};
use crate::common::soft_reference::{Head, HeadGradients, Soft, Teacher};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::{Options, Reduction, Strategy};

#[test]
fn losses_and_gradients_are_those_of_the_reference() -> Result<()> {
    for kind in KINDS {
        for (features, name) in [(&PLAIN, "plain"), (&ALL, "all")] {
            for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
                for (lead, vocab) in [(vec![3, 7], 53), (vec![1, 2], 7)] {
                    let case = Case::new(dtype, &lead, vocab, kind, features);
                    for reduction in REDUCTIONS {
                        let what = format!("{kind:?} {name} {lead:?}");
                        case.check(&what, &Device::Cpu, Options::default(), reduction)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn blocks_of_any_size_and_either_strategy_give_the_same() -> Result<()> {
    for kind in KINDS {
        for dtype in [DType::F32, DType::BF16] {
            let case = Case::new(dtype, &[2, 9], 150, kind, &ALL);
            for workspace in [1, 5000, 20_000] {
                for strategy in [Strategy::Fused, Strategy::Recompute] {
                    let options = Options::default().workspace(workspace).strategy(strategy);
                    let what = format!("{kind:?} workspace {workspace} {strategy:?}");
                    case.check(&what, &Device::Cpu, options, Reduction::Mean)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_reference_has_the_gradients_of_its_losses() {
    const STEP: f64 = 1e-5;
    for kind in KINDS {
        let case = Case::new(DType::F64, &[2, 3], 11, kind, &ALL);
        let soft = case.soft;
        let weights: Vec<f64> = (0..soft.positions().len()).map(|i| 1. + i as f64).collect();
        let total =
            |soft: &Soft| -> f64 { soft.losses().iter().zip(&weights).map(|(l, w)| l * w).sum() };
        let (student, teacher) = soft.gradients(&weights);
        fn of_teacher(soft: &mut Soft) -> &mut Head {
            match &mut soft.teacher {
                Teacher::Forward(head)
                | Teacher::Reverse(head)
                | Teacher::JensenShannon(head, _) => head,
                Teacher::TopK(..) => unreachable!("it has no head"),
            }
        }
        let check = |pick: fn(&mut Soft) -> &mut Head, want: &HeadGradients| {
            let parts: [fn(&mut Head) -> &mut Vec<f64>; 3] = [
                |head| &mut head.embeddings,
                |head| &mut head.classifier,
                |head| head.bias.as_mut().unwrap(),
            ];
            let wants = [&want.embeddings, &want.classifier, &want.bias];
            for (part, want) in parts.into_iter().zip(wants) {
                let by_differences: Vec<f64> = (0..want.len())
                    .map(|i| {
                        let moved = |by: f64| {
                            let mut soft = soft.clone();
                            part(pick(&mut soft))[i] += by;
                            total(&soft)
                        };
                        (moved(STEP) - moved(-STEP)) / (2. * STEP)
                    })
                    .collect();
                close(&format!("{kind:?}"), want, &by_differences, 1e-7, 1.).unwrap();
            }
        };
        check(|soft| &mut soft.student, &student);
        if let Some(teacher) = teacher {
            check(of_teacher, &teacher);
        }
    }
}
