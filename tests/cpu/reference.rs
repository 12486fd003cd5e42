//! The reference itself: its gradients are those of finite differences of its outputs.

use crate::common::reference::{Inputs, Reduced, Reference, Upstream};
use crate::common::{close, Case};
use candle_core::DType;
use candle_cut_cross_entropy::Entropy;

/// The scalar that the upstream gradients belong to.
fn scalar(inputs: &Inputs, upstream: &Upstream) -> f64 {
    let reference = Reference::new(inputs.clone());
    let pairs = [
        (&reference.loss, &upstream.loss),
        (&reference.lse, &upstream.lse),
        (&reference.entropy, &upstream.entropy),
    ];
    let dot = |(values, upstream): (&Vec<f64>, &Option<Vec<f64>>)| -> f64 {
        let upstream = upstream.iter().flatten();
        values.iter().zip(upstream).map(|(a, b)| a * b).sum()
    };
    pairs.into_iter().map(dot).sum()
}

/// Picks numbers among the inputs.
type Pick = fn(&mut Inputs) -> &mut Vec<f64>;

/// Central differences by the numbers that `of` picks.
fn differences(inputs: &Inputs, upstream: &Upstream, of: Pick) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut moved = inputs.clone();
    let mut at = |i: usize, step: f64| {
        of(&mut moved)[i] += step;
        let value = scalar(&moved, upstream);
        of(&mut moved)[i] -= step;
        value
    };
    let len = of(&mut inputs.clone()).len();
    (0..len)
        .map(|i| (at(i, STEP) - at(i, -STEP)) / (2. * STEP))
        .collect()
}

#[test]
fn gradients_of_the_reference_are_those_of_finite_differences() {
    for seed in 0..60 {
        let mut case = Case::random(seed, DType::F64, &[2, 4], 3, 6).with_bias(seed);
        case.inputs.reduction = [Reduced::Mean, Reduced::Sum, Reduced::None][seed as usize % 3];
        case.inputs.softcap = [None, Some(1.5)][seed as usize % 2];
        case.inputs.shift = seed as usize % 2;
        case = case.with_ignored(seed).with_some_options(seed + 5);
        case.entropy = Entropy::Differentiable;
        let upstream = case.upstream(seed, true, seed % 3 != 0);
        let gradients = Reference::new(case.inputs.clone()).gradients(&upstream, 0.);
        let checks: [(_, _, Pick); 3] = [
            ("dE", &gradients.embeddings, |i| &mut i.embeddings),
            ("dC", &gradients.classifier, |i| &mut i.classifier),
            ("db", &gradients.bias, |i| i.bias.as_mut().expect("a bias")),
        ];
        for (what, got, of) in checks {
            let want = differences(&case.inputs, &upstream, of);
            let what = format!("{what} of {}", crate::common::grid::describe(&case));
            close(&what, &got.value, &want, 1e-7, 1.).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}
