//! A head sharded over ranks gives what the whole gives.

use crate::common::grid::describe;
use crate::common::reference::{Reduced, Reference, CPU_TILE};
use crate::common::shards::{errors, sharded, whole, NAMES};
use crate::common::{exact, gradient_tolerance, halving, Case, Random};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::{Entropy, Filter, Implementation, Options};

/// `ranks` shards of random length, or as `from_vocab` has them.
fn bounds(random: &mut Random, vocab: usize, ranks: usize) -> Vec<usize> {
    let mut cuts: Vec<usize> = (1..vocab).collect();
    for i in 0..ranks - 1 {
        let j = i + random.below(cuts.len() - i);
        cuts.swap(i, j);
    }
    let mut bounds = cuts[..ranks - 1].to_vec();
    bounds.extend([0, vocab]);
    bounds.sort();
    bounds
}

#[test]
fn shards_give_what_the_whole_gives() -> Result<()> {
    let mut random = Random::new(700);
    let mut turn = 0;
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        for ranks in [1, 2, 3, 4, 7] {
            for reduction in [Reduced::Mean, Reduced::Sum, Reduced::None] {
                for bits in 0..8 {
                    turn += 1;
                    let (bias, softcap, ignored) = (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0);
                    let vocab = [9, 40, 700][turn % 3];
                    let mut case = Case::random(turn as u64, dtype, &[2, 9], 12, vocab);
                    case.inputs.reduction = reduction;
                    case.inputs.shift = turn % 2;
                    case.inputs.softcap = softcap.then_some(3.);
                    if bias {
                        case = case.with_bias(turn as u64);
                    }
                    if ignored {
                        case = case.with_ignored(turn as u64);
                    }
                    // Targets of one class only: all other ranks have none.
                    if turn % 5 == 0 {
                        let ignore_index = case.inputs.ignore_index;
                        for target in &mut case.inputs.targets {
                            *target = if *target == ignore_index {
                                ignore_index
                            } else {
                                3
                            };
                        }
                    }
                    let mut options = match turn % 4 {
                        0 => Options::default().filter(Filter::Threshold(0.)),
                        _ => exact(),
                    };
                    if turn % 3 == 0 {
                        options = options.z_loss_weight(0.02);
                    }
                    if turn % 6 == 0 {
                        options = options.implementation(Implementation::Native);
                    }
                    case = case.with_some_options(turn as u64);
                    let upstream = case.upstream(turn as u64, true, turn % 2 == 0);
                    let bounds = bounds(&mut random, vocab, ranks);
                    let cpu = &vec![Device::Cpu; 7];
                    let got = sharded(&case, &options, &upstream, cpu, &bounds)?;
                    let want = whole(&case, &options, &upstream, &Device::Cpu)?;
                    for (name, error) in NAMES.iter().zip(errors(&got, &want)) {
                        let allowed = match (*name, dtype) {
                            ("loss" | "lse" | "entropy", _) | (_, DType::F32) => 1e-6,
                            ("predicted", _) => 0.,
                            (_, DType::F64) => 1e-12,
                            _ => gradient_tolerance(dtype),
                        };
                        assert!(
                            error <= allowed,
                            "{ranks} ranks {bounds:?} turn {turn}: {name} differs by {error:e}, {}",
                            describe(&case)
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

/// What a filter averages depends on lse over all classes, and so is the same whoever holds them. (Shards begin where
/// tiles do.)
#[test]
fn a_filter_averages_the_same_tiles_of_shards_and_of_the_whole() -> Result<()> {
    for filter in [Filter::Threshold, Filter::Drop] {
        let mut case = Case::random(720, DType::F32, &[300], 32, 1024).with_bias(3);
        // Some tiles without a target, which a filter that drops can drop.
        for target in &mut case.inputs.targets {
            *target %= 256;
        }
        case.inputs.softcap = Some(20.);
        let reference = Reference::new(case.inputs.clone());
        let eps = halving(&reference, CPU_TILE).unwrap();
        let upstream = case.upstream(1, true, true);
        let options = Options::default().filter(filter(eps));
        let cpu = &vec![Device::Cpu; 7];
        let got = sharded(&case, &options, &upstream, cpu, &[0, 512, 768, 1024])?;
        let want = whole(&case, &options, &upstream, &Device::Cpu)?;
        for (name, error) in NAMES.iter().zip(errors(&got, &want)) {
            assert!(error <= 3e-6, "{name} differs by {error:e}");
        }
        let exact = whole(&case, &exact(), &upstream, &Device::Cpu)?;
        let differences = errors(&got, &exact);
        assert!(
            differences[3] > 1e-3,
            "nothing was filtered: {differences:?}"
        );
    }
    Ok(())
}

/// The first class of several with the largest logit, wherever the ranks' shards begin and whatever the others hold.
#[test]
fn the_lowest_of_several_likeliest_classes_of_all_ranks_is_predicted() -> Result<()> {
    let mut case = Case::random(721, DType::F32, &[5], 4, 40);
    case.predicted = true;
    case.entropy = Entropy::Value;
    // Rows of ones, whose logits are a class's first number.
    case.inputs.embeddings.fill(0.);
    case.inputs
        .embeddings
        .iter_mut()
        .step_by(4)
        .for_each(|x| *x = 1.);
    let upstream = case.upstream(1, true, false);
    let cpu = &vec![Device::Cpu; 7];
    for (likeliest, want) in [
        (vec![0, 39], 0.),
        (vec![11, 12, 30], 11.),
        (vec![12], 12.),
        (vec![39], 39.),
    ] {
        case.inputs.classifier.fill(0.);
        for class in likeliest {
            case.inputs.classifier[class * 4] = 3.;
        }
        for implementation in [Implementation::Auto, Implementation::Native] {
            let options = exact().implementation(implementation);
            let [.., predicted] = sharded(&case, &options, &upstream, cpu, &[0, 12, 13, 29, 40])?;
            assert_eq!(predicted, [want; 5]);
        }
    }
    Ok(())
}

/// A rank whose every class is masked has no part in anything.
#[test]
fn a_rank_without_a_finite_logit_changes_nothing() -> Result<()> {
    for implementation in [Implementation::Auto, Implementation::Native] {
        let mut case = Case::random(722, DType::F32, &[5], 4, 40).with_bias(1);
        case.predicted = true;
        case.entropy = Entropy::Differentiable;
        let bias = case.inputs.bias.as_mut().expect("a bias");
        bias[10..20].fill(f64::NEG_INFINITY);
        case.inputs.targets.fill(3);
        let upstream = case.upstream(1, true, true);
        let cpu = &vec![Device::Cpu; 7];
        let options = exact().implementation(implementation);
        let got = sharded(&case, &options, &upstream, cpu, &[0, 10, 20, 40])?;
        let want = whole(&case, &options, &upstream, &Device::Cpu)?;
        for (name, error) in NAMES.iter().zip(errors(&got, &want)) {
            assert!(error <= 1e-6, "{name} differs by {error:e}");
        }
    }
    Ok(())
}
