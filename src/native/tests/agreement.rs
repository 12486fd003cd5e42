//! Whatever the sizes and options, both give the same numbers.

use super::{compare, exact, noise, Case};
use crate::{Entropy, Reduction, Strategy};
use candle_core::{DType, Device, Tensor};

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
                        let name = format!("{bias} {softcap:?} {shift} {ignore:?} {strategy:?}");
                        compare(&name, &case, &options);
                    }
                }
            }
        }
    }
}

#[test]
fn what_else_can_be_asked_for_agrees() {
    let weights = |len: usize, seed: u64| {
        let shape = if len == 45 { vec![3, 15] } else { vec![len] };
        Tensor::from_vec(noise(len, seed), shape, &Device::Cpu).unwrap()
    };
    let (of_classes, of_tokens) = (weights(301, 6), weights(45, 7));
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        for entropy in [Entropy::Off, Entropy::Value, Entropy::Differentiable] {
            for bits in 0..16 {
                for strategy in [Strategy::Fused, Strategy::Recompute] {
                    let mut options = exact()
                        .strategy(strategy)
                        .entropy(entropy)
                        .predicted(bits & 1 > 0)
                        .logit_scale(if bits & 2 > 0 { 1.7 } else { 1. })
                        .shift(bits % 3)
                        .reduction([Reduction::Mean, Reduction::Sum, Reduction::None][bits % 3]);
                    if bits & 4 > 0 {
                        options = options.class_weights(&of_classes).label_smoothing(0.2);
                    }
                    if bits & 8 > 0 {
                        options = options.token_weights(&of_tokens).z_loss_weight(0.01);
                    }
                    if bits % 5 < 2 {
                        options = options.entropy_bonus(0.3);
                    }
                    if bits & 4 == 0 {
                        options = options.softcap([None, Some(3.)][bits % 2]);
                    }
                    let case = Case {
                        dtype,
                        ..Case::small()
                    };
                    let name = format!("{dtype:?} {entropy:?} {bits} {strategy:?}");
                    compare(&name, &case, &options);
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
fn adapters_agree() {
    for (rank, hidden) in [(1, 40), (8, 64), (20, 130)] {
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            for strategy in [Strategy::Fused, Strategy::Recompute] {
                for workspace in [1, 64 << 20] {
                    let case = Case {
                        dtype,
                        rank,
                        hidden,
                        bias: rank == 8,
                        ignore: (rank > 1).then_some(4),
                        ..Case::small()
                    };
                    let options = exact().strategy(strategy).workspace(workspace);
                    let name = format!("{rank} {hidden} {dtype:?} {strategy:?} {workspace}");
                    compare(&name, &case, &options.softcap((rank == 20).then_some(3.)));
                }
            }
        }
    }
}
