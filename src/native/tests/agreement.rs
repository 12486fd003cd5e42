//! Whatever the sizes and options, both give the same numbers.

use super::{compare, exact, Case};
use crate::{Reduction, Strategy};
use candle_core::DType;

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
