//! Gradients that are summed over many chunks of rows.

use crate::common::reference::{Reduced, Reference, Upstream};
use crate::common::{exact, norm, numbers, Case};
use crate::{device, Computed};
use candle_core::{DType, Result, Tensor};
use candle_cut_cross_entropy::{linear_cross_entropy, Options, Strategy};

const ROWS: usize = 4000;

/// Workspaces with room for 256 of the rows, or fewer.
fn many_chunks() -> [(&'static str, Options); 2] {
    [
        (
            "fused",
            exact()
                .strategy(Strategy::Fused)
                .workspace((15 << 20) + (1200 << 10)),
        ),
        (
            "recomputed",
            exact().strategy(Strategy::Recompute).workspace(1100 << 10),
        ),
    ]
}

fn case() -> Case {
    let mut case = Case::random(940, DType::BF16, &[ROWS], 136, 1500)
        .with_bias(941)
        .with_ignored(942);
    case.inputs.reduction = Reduced::Mean;
    case
}

/// Their error is that of one chunk. Rounding to bf16 once leaves 1.7e-3, sixteen times 4e-3.
#[test]
fn gradients_of_the_head_are_rounded_once() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let case = case();
    let tensors = case.tensors(&device)?;
    let reference = Reference::new(case.inputs.clone());
    let upstream = Upstream {
        loss: Some(vec![1.]),
        ..Default::default()
    };
    let want = reference.gradients(&upstream, 0.);
    let errors = |options: Options| -> Result<[f64; 2]> {
        let (e, c) = (&tensors.embeddings, &tensors.classifier);
        let options = case.options(options, &tensors);
        let grads = linear_cross_entropy(e, c, &tensors.targets, &options)?
            .loss
            .backward()?;
        let error = |tensor: &Tensor, want: &[f64]| -> Result<f64> {
            let got = numbers(grads.get(tensor).expect("a gradient"))?;
            assert_eq!(got.len(), want.len());
            let off = norm(got.iter().zip(want).map(|(got, want)| got - want));
            Ok(off / norm(want.iter().copied()))
        };
        let bias = tensors.bias.as_ref().expect("a bias");
        Ok([
            error(c, &want.classifier.value)?,
            error(bias, &want.bias.value)?,
        ])
    };
    for (what, options) in many_chunks() {
        let alone = errors(options.clone().workspace(1 << 30))?;
        let many = errors(options)?;
        for (name, alone, many) in [("dC", alone[0], many[0]), ("db", alone[1], many[1])] {
            assert!(alone < 4e-3, "{what}: {name} is off by {alone:.2e}");
            let limit = 1.1 * alone + 1e-4;
            assert!(
                many < limit,
                "{what}: {name} is off by {many:.2e}, in one chunk by {alone:.2e}"
            );
        }
    }
    Ok(())
}

/// As the outliers among the features of real models.
#[test]
fn a_large_column_costs_the_others_no_digits() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    const LARGE: usize = 5;
    let mut case = case();
    let hidden = case.inputs.hidden;
    for e in case
        .inputs
        .embeddings
        .iter_mut()
        .skip(LARGE)
        .step_by(hidden)
    {
        *e *= 64.;
    }
    for c in case
        .inputs
        .classifier
        .iter_mut()
        .skip(LARGE)
        .step_by(hidden)
    {
        *c /= 64.;
    }
    let tensors = case.tensors(&device)?;
    let upstream = Upstream {
        loss: Some(vec![1.]),
        ..Default::default()
    };
    let want = Reference::new(case.inputs.clone()).gradients(&upstream, 0.);
    let of_others = |values: &[f64]| -> Vec<f64> {
        let others = values.iter().enumerate();
        others
            .filter(|(i, _)| i % hidden != LARGE)
            .map(|(_, x)| *x)
            .collect()
    };
    let want = of_others(&want.classifier.value);
    let error = |options: Options| -> Result<f64> {
        let options = case.options(options, &tensors);
        let (e, c) = (&tensors.embeddings, &tensors.classifier);
        let grads = linear_cross_entropy(e, c, &tensors.targets, &options)?
            .loss
            .backward()?;
        let got = of_others(&numbers(grads.get(c).expect("a gradient"))?);
        let off = norm(got.iter().zip(&want).map(|(got, want)| got - want));
        Ok(off / norm(want.iter().copied()))
    };
    for (what, options) in many_chunks() {
        let alone = error(options.clone().workspace(1 << 30))?;
        let many = error(options)?;
        assert!(
            many < 1.1 * alone + 1e-4,
            "{what}: off by {many:.2e}, in one chunk by {alone:.2e}"
        );
    }
    Ok(())
}

#[test]
fn many_chunks_give_the_same_bits_every_time() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for (what, options) in many_chunks() {
        let computed = || Computed::new(&case(), options.clone(), &device);
        computed()?.assert_same(&computed()?, what);
    }
    Ok(())
}

/// A row of the first chunk, so that the others find what it leaves.
#[test]
fn what_is_not_finite_stays_so() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let mut case = case();
    let first = case.inputs.targets.iter().position(|target| *target >= 0);
    case.inputs.embeddings[first.expect("a row that counts") * 136 + 3] = f64::NAN;
    let tensors = case.tensors(&device)?;
    for (what, options) in many_chunks() {
        let (e, c) = (&tensors.embeddings, &tensors.classifier);
        let options = case.options(options, &tensors);
        let grads = linear_cross_entropy(e, c, &tensors.targets, &options)?
            .loss
            .backward()?;
        let dc = numbers(grads.get(c).expect("a gradient"))?;
        let finite = dc.iter().filter(|x| x.is_finite()).count();
        assert_eq!(finite, 0, "{what}: of {}", dc.len());
    }
    Ok(())
}
