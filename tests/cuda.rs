//! The grid of `tests/common/grid.rs` on a GPU, against the f64 reference on the host, and what only a
//! GPU does. Without one the tests are skipped, and say so.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::{linear_cross_entropy, Implementation, Options, Reduction};
use common::grid::{self, Grid};
use common::{numbers, Case};
use std::io::Write;

/// The first GPU, or a line that says the tests are skipped.
fn device() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            // Not by `eprintln!`, which the test harness keeps to itself.
            let _ = writeln!(std::io::stderr(), "skipped: no CUDA device ({error})");
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

/// A call of the kernels for three rows and five classes.
fn losses(device: &Device, targets: &[i64], options: Options) -> Result<Tensor> {
    let case = Case::random(1, DType::BF16, &[3], 8, 5);
    let tensors = case.tensors(device)?;
    let targets = Tensor::new(targets, device)?;
    let options = options
        .implementation(Implementation::Cuda)
        .reduction(Reduction::None);
    let (embeddings, classifier) = (&tensors.embeddings, &tensors.classifier);
    Ok(linear_cross_entropy(embeddings, classifier, &targets, &options)?.loss)
}

#[test]
fn a_bad_target_has_loss_nan_and_the_others_are_right() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let good = numbers(&losses(&device, &[1, 2, 4], Options::default())?)?;
    for bad in [5, -1, i64::MAX, i64::MIN] {
        let got = numbers(&losses(&device, &[1, bad, 4], Options::default())?)?;
        assert!(got[1].is_nan(), "target {bad}: loss {}", got[1]);
        assert_eq!([got[0], got[2]], [good[0], good[2]], "target {bad}");
    }
    Ok(())
}

#[test]
fn a_bad_target_is_an_error_where_asked_for() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let options = Options::default().check_targets(true);
    assert!(losses(&device, &[1, -100, 4], options.clone()).is_ok());
    let error = match losses(&device, &[1, 5, 4], options) {
        Ok(loss) => panic!("no error, but losses {loss}"),
        Err(error) => error.to_string(),
    };
    for piece in ["target 5", "[1]", "[0, 5)", "-100"] {
        assert!(error.contains(piece), "{piece:?} is not in {error:?}");
    }
    Ok(())
}
