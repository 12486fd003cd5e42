//! Every combination of the options.

use crate::common::grid::{run, Grid};
use candle_core::{DType, Device};
use candle_cut_cross_entropy::Implementation;

fn check(dtype: DType) {
    let computed = run(&Grid {
        device: Device::Cpu,
        // On the CPU there is one implementation, whatever is asked for.
        implementation: Implementation::Auto,
        dtypes: vec![dtype],
        step: 2,
    });
    assert!(computed > 500, "only {computed} cases computed");
}

#[test]
fn every_combination_matches_the_reference_in_bf16() {
    check(DType::BF16);
}

#[test]
fn every_combination_matches_the_reference_in_f16() {
    check(DType::F16);
}

#[test]
fn every_combination_matches_the_reference_in_f32() {
    check(DType::F32);
}

#[test]
fn every_combination_matches_the_reference_in_f64() {
    check(DType::F64);
}
