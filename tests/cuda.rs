//! The grid of `tests/common/grid.rs` on a GPU, against the f64 reference on the host.

mod common;

use candle_core::{DType, Device};
use candle_cut_cross_entropy::Implementation;
use common::grid::{self, Grid};

/// The first GPU, or a line that says the tests are skipped.
fn device() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            eprintln!("skipped: no CUDA device ({error})");
            None
        }
    }
}

fn run(implementation: Implementation, step: usize) {
    let Some(device) = device() else { return };
    let computed = grid::run(&Grid {
        device,
        implementation,
        dtypes: vec![DType::BF16, DType::F16, DType::F32],
        step,
    });
    println!("{computed} cases");
}

#[test]
fn kernels_match_the_reference_on_every_combination_of_options() {
    run(Implementation::Cuda, 10);
}

#[test]
fn automatic_choice_matches_the_reference() {
    run(Implementation::Auto, 97);
}

#[test]
fn native_matches_the_reference_on_the_gpu() {
    run(Implementation::Native, 97);
}
