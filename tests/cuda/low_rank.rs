//! Low-rank adapters of the classifier.

use crate::common::low_rank::{wrong, Adapted, SIZES};
use crate::{assert_nothing, device, DTYPES, KERNELS};
use candle_core::{DType, Result};
use candle_cut_cross_entropy::{Implementation, Options, Strategy};

#[test]
fn adapters_match_the_reference() {
    let Some(device) = device() else { return };
    assert_nothing(wrong(&device, &DTYPES, &KERNELS, 2));
}

#[test]
fn native_adapters_match_the_reference_on_the_gpu() {
    let Some(device) = device() else { return };
    let native = [Implementation::Native];
    assert_nothing(wrong(&device, &[DType::BF16, DType::F32], &native, 1));
}

/// More rows and classes than a workspace holds at a time, ranks of one column of blocks and of several.
#[test]
fn adapters_are_right_and_the_same_in_every_run_in_chunks_and_ranges() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        for (seed, rank) in [(70, 16), (71, 72)] {
            let sizes = (&[2usize, 500][..], 136, 3000, rank);
            let adapted = Adapted::random(seed, dtype, sizes).with_options(seed);
            let upstream = adapted.case.upstream(seed, true, false);
            let expected = adapted.expected(&device, &upstream)?;
            for implementation in KERNELS {
                for strategy in [Strategy::Fused, Strategy::Recompute] {
                    for workspace in [4 << 20, 20 << 20, 256 << 20] {
                        let options = Options::default()
                            .implementation(implementation)
                            .strategy(strategy)
                            .workspace(workspace);
                        let compute = || adapted.compute(options.clone(), &device, &upstream);
                        let (first, second) = (compute()?, compute()?);
                        let what = format!(
                            "{dtype:?} rank {rank} {implementation:?} {strategy:?} {workspace}"
                        );
                        let result = adapted.check(&first, &expected);
                        result.unwrap_or_else(|e| panic!("{what}: {e}"));
                        assert_eq!(first.gradients, second.gradients, "{what}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// A small one for the sanitizers.
#[test]
fn a_small_adapter_is_right() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let adapted = Adapted::random(3, dtype, SIZES[0]);
        let upstream = adapted.case.upstream(5, true, false);
        let expected = adapted.expected(&device, &upstream)?;
        for implementation in KERNELS {
            for strategy in [Strategy::Fused, Strategy::Recompute] {
                let options = Options::default()
                    .implementation(implementation)
                    .strategy(strategy);
                let computed = adapted.compute(options, &device, &upstream)?;
                let result = adapted.check(&computed, &expected);
                result.unwrap_or_else(|e| panic!("{dtype:?} {implementation:?}: {e}"));
            }
        }
    }
    Ok(())
}
