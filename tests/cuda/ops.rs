//! The differentiable operations on a GPU.

use crate::common::ops::{attention, check, check_repeats, rows, Operation};
use crate::{device, DTYPES};
use candle_core::{DType, Device, Result};

fn check_all(cases: impl Fn(DType) -> Vec<Box<dyn Operation>>) {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        check(&cases(dtype), &device);
    }
}

#[test]
fn norms_match_the_formulas() {
    check_all(rows::norms);
}

#[test]
fn gated_activations_match_the_formulas() {
    check_all(rows::gated);
}

#[test]
fn rotary_embeddings_match_the_formulas() {
    check_all(rows::ropes);
}

#[test]
fn attention_matches_the_formulas() {
    check_all(attention::attentions);
}

#[test]
fn candle_operations_match_the_formulas() {
    // There are no kernels for f64.
    let Some(device) = device() else { return };
    for cases in [rows::norms, rows::gated, rows::ropes, attention::attentions] {
        check(&cases(DType::F64), &device);
    }
}

#[test]
fn every_run_gives_the_same_bits() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        for cases in [rows::norms, rows::gated, rows::ropes, attention::attentions] {
            check_repeats(&cases(dtype), &device)?;
        }
    }
    Ok(())
}

#[test]
fn attention_of_many_tiles_agrees_with_the_cpu() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        for head_dim in [64, 128] {
            let case = attention::Attention {
                dtype,
                batch: 2,
                queries: 1000,
                keys: 1000,
                heads: 8,
                key_heads: 2,
                head_dim,
                options: candle_cut_cross_entropy::ops::AttentionOptions {
                    causal: true,
                    ..Default::default()
                },
                views: true,
            };
            let on_cpu = attention::Attention {
                dtype: DType::F64,
                ..case.clone()
            };
            close(&case.computed(&device)?, &on_cpu, dtype)?;
        }
    }
    Ok(())
}

/// The inputs of a case in f64 are not rounded, so that half precision is compared to within its rounding.
fn close(
    got: &[crate::common::ops::Numbers],
    want: &attention::Attention,
    dtype: DType,
) -> Result<()> {
    let tolerance = 2. * crate::common::gradient_tolerance(dtype);
    for (got, want) in got.iter().zip(want.computed(&Device::Cpu)?) {
        let differences = got.values.iter().zip(&want.values).map(|(a, b)| a - b);
        let error = crate::common::norm(differences);
        let size = crate::common::norm(want.values.iter().copied());
        assert!(
            error <= tolerance * size,
            "{dtype:?}: {} is off by {error:e} of {size:e}",
            got.name
        );
    }
    Ok(())
}
