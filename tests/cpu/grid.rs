//! Every combination of the options.

use crate::common::grid::{run, Grid};
use candle_core::{DType, Device};
use candle_cut_cross_entropy::Implementation;

fn check(implementation: Implementation, dtype: DType, step: usize) {
    let computed = run(&Grid {
        device: Device::Cpu,
        implementation,
        dtypes: vec![dtype],
        step,
    });
    assert!(computed > 500, "only {computed} cases computed");
}

#[test]
fn every_combination_matches_the_reference_in_bf16() {
    check(Implementation::Auto, DType::BF16, 2);
}

#[test]
fn every_combination_matches_the_reference_in_f16() {
    check(Implementation::Auto, DType::F16, 2);
}

#[test]
fn every_combination_matches_the_reference_in_f32() {
    check(Implementation::Auto, DType::F32, 2);
}

#[test]
fn every_combination_matches_the_reference_in_f64() {
    check(Implementation::Auto, DType::F64, 2);
}

#[test]
fn the_native_implementation_matches_the_reference_when_asked_for() {
    check(Implementation::Native, DType::F32, 20);
}
