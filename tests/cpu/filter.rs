//! What an averaging filter promises beyond its formula.

use crate::common::reference::{Reduced, Reference, CPU_TILE};
use crate::common::{exact, halving, norm, numbers, Case, Random};
use candle_core::{DType, Device, Result, Var};
use candle_cut_cross_entropy::{linear_cross_entropy, Filter, Options, Strategy};

const STRATEGIES: [Strategy; 2] = [Strategy::Recompute, Strategy::Fused];

/// Loss, dE, dC and db of the summed loss, and the share of tiles that was kept.
type Numbers = ([Vec<f64>; 4], f64);

fn compute(case: &Case, options: &Options) -> Result<Numbers> {
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(options.clone(), &tensors);
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
    let grads = output.loss.backward()?;
    let bias = tensors.bias.as_ref().unwrap();
    let grad = |var: &Var| numbers(grads.get(var).unwrap());
    let all = [numbers(&output.loss)?, grad(e)?, grad(c)?, grad(bias)?];
    Ok((all, output.kept_tiles()?.unwrap()))
}

fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    norm(got.iter().zip(want).map(|(a, b)| a - b)) / norm(want.iter().copied())
}

/// Many tiles, and a threshold at which about half are averaged.
fn case(seed: u64) -> (Case, f64) {
    let mut case = Case::random(seed, DType::F32, &[100], 24, 1500).with_bias(seed);
    case.inputs.reduction = Reduced::Sum;
    let eps = halving(&Reference::new(case.inputs.clone()), CPU_TILE).unwrap();
    (case, eps)
}

#[test]
fn every_row_of_the_gradient_sums_to_zero() -> Result<()> {
    let (mut case, eps) = case(1);
    let hidden = case.inputs.hidden;
    // A column of ones in C: its gradient of E is the sum of the row.
    for class in case.inputs.classifier.chunks_mut(hidden) {
        class[0] = 1.;
    }
    for strategy in STRATEGIES {
        let sums = |filter: Filter| -> Result<(Vec<f64>, f64)> {
            let options = Options::default().strategy(strategy).filter(filter);
            let ([_, de, _, db], kept) = compute(&case, &options)?;
            let mut sums: Vec<f64> = de.chunks(hidden).map(|row| row[0]).collect();
            sums.push(db.iter().sum());
            Ok((sums, kept))
        };
        let largest = |sums: &[f64]| sums.iter().fold(0f64, |max, sum| max.max(sum.abs()));
        let (averaged, kept) = sums(Filter::Threshold(eps))?;
        assert!(kept > 0.2 && kept < 0.8, "kept {kept}");
        assert!(largest(&averaged) < 1e-4, "{averaged:?}");
        let (averaged, kept) = sums(Filter::Threshold(0.999))?;
        assert_eq!(kept, 0.);
        assert!(largest(&averaged) < 1e-4, "{averaged:?}");
        let (dropped, _) = sums(Filter::Drop(0.999))?;
        assert!(largest(&dropped) > 0.1, "nothing was dropped");
    }
    Ok(())
}

#[test]
fn threshold_zero_gives_the_bits_of_the_exact_gradient() -> Result<()> {
    let (case, _) = case(2);
    for strategy in STRATEGIES {
        let run = |options: Options| compute(&case, &options.strategy(strategy));
        let zero = Options::default().filter(Filter::Threshold(0.));
        assert_eq!(run(zero)?, run(exact())?);
    }
    Ok(())
}

#[test]
fn tiles_of_equal_logits_give_the_exact_gradient() -> Result<()> {
    let (mut case, _) = case(3);
    let (hidden, classes) = (case.inputs.hidden, CPU_TILE.classes);
    let copy: Vec<f64> = case.inputs.classifier.clone();
    for (class, row) in case.inputs.classifier.chunks_mut(hidden).enumerate() {
        let first = class / classes * classes;
        row.copy_from_slice(&copy[first * hidden..][..hidden]);
    }
    let bias = case.inputs.bias.as_mut().unwrap();
    for class in 0..bias.len() {
        bias[class] = bias[class / classes * classes];
    }
    // A target has a share of the others' mass, so a tile with targets is exact up to one class of 256 only.
    for target in &mut case.inputs.targets {
        *target %= classes as i64;
    }
    for strategy in STRATEGIES {
        for softcap in [None, Some(3.)] {
            case.inputs.softcap = softcap;
            let (want, _) = compute(&case, &exact().strategy(strategy))?;
            for eps in [1e-3, 0.5] {
                let options = Options::default().strategy(strategy);
                let (got, kept) = compute(&case, &options.filter(Filter::Threshold(eps)))?;
                assert!(kept < 1., "eps {eps}: kept {kept}");
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let start = [0, 0, classes * hidden, classes][i];
                    let error = error(&got[start..], &want[start..]);
                    let allowed = if i == 1 { 1e-4 } else { 3e-6 };
                    let what = format!("{strategy:?} {softcap:?} eps {eps} {i}");
                    assert!(error < allowed, "{what}: {error:e}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_order_of_classes_in_a_tile_does_not_matter() -> Result<()> {
    let (case, eps) = case(4);
    let (hidden, vocab) = (case.inputs.hidden, case.inputs.vocab);
    // Where the class goes: to another place in its tile.
    let mut to: Vec<usize> = (0..vocab).collect();
    let mut random = Random::new(4);
    for tile in to.chunks_mut(CPU_TILE.classes) {
        for i in (1..tile.len()).rev() {
            tile.swap(i, random.below(i + 1));
        }
    }
    let mut moved = case.clone();
    let bias = moved.inputs.bias.as_mut().unwrap();
    for (from, &to) in to.iter().enumerate() {
        bias[to] = case.inputs.bias.as_ref().unwrap()[from];
        let row = &case.inputs.classifier[from * hidden..][..hidden];
        moved.inputs.classifier[to * hidden..][..hidden].copy_from_slice(row);
    }
    for target in &mut moved.inputs.targets {
        *target = to[*target as usize] as i64;
    }
    for strategy in STRATEGIES {
        let options = Options::default()
            .strategy(strategy)
            .filter(Filter::Threshold(eps));
        let (want, kept) = compute(&case, &options)?;
        let (got, kept_moved) = compute(&moved, &options)?;
        assert_eq!(kept, kept_moved);
        let back = |values: &[f64], width: usize| -> Vec<f64> {
            let row = |class: &usize| values[class * width..][..width].to_vec();
            to.iter().flat_map(row).collect()
        };
        assert!(error(&got[1], &want[1]) < 3e-6);
        assert!(error(&back(&got[2], hidden), &want[2]) < 3e-6);
        assert!(error(&back(&got[3], 1), &want[3]) < 3e-6);
        assert!(error(&got[2], &want[2]) > 0.1, "nothing was moved");
    }
    Ok(())
}

#[test]
fn averaged_gradients_repeat_bit_by_bit() -> Result<()> {
    let (case, eps) = case(5);
    for strategy in STRATEGIES {
        let options = Options::default()
            .strategy(strategy)
            .filter(Filter::Threshold(eps));
        assert_eq!(compute(&case, &options)?, compute(&case, &options)?);
    }
    Ok(())
}

#[test]
fn classes_that_are_no_target_are_pushed_down_as_much_as_by_the_exact_gradient() -> Result<()> {
    let (mut case, _) = case(6);
    for target in &mut case.inputs.targets {
        *target %= CPU_TILE.classes as i64;
    }
    let mean = |options: Options| -> Result<f64> {
        let ([.., db], _) = compute(&case, &options)?;
        let others = &db[CPU_TILE.classes..];
        Ok(others.iter().sum::<f64>() / others.len() as f64)
    };
    let want = mean(exact())?;
    let averaged = mean(Options::default().filter(Filter::Threshold(0.9)))?;
    let dropped = mean(Options::default().filter(Filter::Drop(0.9)))?;
    assert!((averaged / want - 1.).abs() < 1e-5, "{averaged} and {want}");
    assert_eq!(dropped, 0.);
    Ok(())
}
