//! A head sharded over ranks.

use crate::common::grid::describe;
use crate::common::reference::{Reduced, Reference, CPU_TILE};
use crate::common::shards::{errors, sharded, whole, NAMES, TIMEOUT};
use crate::common::{exact, gradient_tolerance, halving, numbers, Case, Random};
use candle_core::{bail, DType, Device, Result, Tensor};
use candle_cut_cross_entropy::objectives::squared_lse;
use candle_cut_cross_entropy::vocab_parallel::{
    Communicator, ReduceOp, ThreadCommunicator, VocabParallel,
};
use candle_cut_cross_entropy::{
    linear_cross_entropy, Entropy, Filter, Implementation, Options, Output,
};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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

#[test]
fn class_weights_of_a_shard_are_those_of_all_classes() -> Result<()> {
    let e = Tensor::ones((2, 4), DType::F32, &Device::Cpu)?;
    let c = Tensor::ones((5, 4), DType::F32, &Device::Cpu)?;
    let y = Tensor::new(&[11i64, 12], &Device::Cpu)?;
    let weights = Tensor::ones(14, DType::F32, &Device::Cpu)?;
    let options = Options::default().vocab_parallel(one_rank(10, 15)?);
    let result = linear_cross_entropy(&e, &c, &y, &options.class_weights(&weights));
    let error = result.unwrap_err().to_string();
    assert!(
        error.contains("10..15") && error.contains("[14]"),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_vocabulary_is_cut_evenly_and_the_first_ranks_have_the_rest() -> Result<()> {
    let cut = |vocab: usize, ranks: usize| -> Result<Vec<(usize, usize)>> {
        ThreadCommunicator::group(ranks, TIMEOUT)?
            .into_iter()
            .map(|rank| {
                let shard = VocabParallel::from_vocab(vocab, Arc::new(rank))?;
                Ok((shard.start, shard.stop))
            })
            .collect()
    };
    assert_eq!(cut(10, 4)?, [(0, 3), (3, 6), (6, 8), (8, 10)]);
    assert_eq!(cut(4, 4)?, [(0, 1), (1, 2), (2, 3), (3, 4)]);
    let error = cut(3, 4).unwrap_err().to_string();
    assert!(error.contains("empty"), "{error}");
    Ok(())
}

fn one_rank(start: usize, stop: usize) -> Result<VocabParallel> {
    let communicator = ThreadCommunicator::group(1, TIMEOUT)?.remove(0);
    Ok(VocabParallel {
        start,
        stop,
        communicator: Arc::new(communicator),
        reduce_e_grad: true,
    })
}

fn loss(targets: &[i64], shard: VocabParallel) -> Result<Output> {
    let e = Tensor::ones((targets.len(), 4), DType::F32, &Device::Cpu)?;
    let c = Tensor::ones((5, 4), DType::F32, &Device::Cpu)?;
    let targets = Tensor::new(targets, &Device::Cpu)?;
    linear_cross_entropy(&e, &c, &targets, &Options::default().vocab_parallel(shard))
}

#[test]
fn shards_that_do_not_fit_are_errors() -> Result<()> {
    for (start, stop, piece) in [(3, 3, "empty"), (4, 3, "empty"), (10, 16, "10..16")] {
        let error = loss(&[11, 12], one_rank(start, stop)?)
            .unwrap_err()
            .to_string();
        assert!(error.contains(piece), "{piece:?} is not in {error:?}");
    }
    assert!(loss(&[11, 12], one_rank(10, 15)?).is_ok());
    Ok(())
}

#[test]
fn a_target_of_no_rank_is_an_error() -> Result<()> {
    let error = loss(&[11, 15], one_rank(10, 15)?).unwrap_err().to_string();
    assert!(error.contains("15") || error.contains("[1]"), "{error}");
    Ok(())
}

#[test]
fn a_part_of_the_gradient_is_left_to_the_caller_where_asked_for() -> Result<()> {
    let case = Case::random(730, DType::F32, &[20], 8, 30);
    let upstream = case.upstream(1, true, false);
    let parts: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ThreadCommunicator::group(3, TIMEOUT)?
            .into_iter()
            .map(|communicator| {
                let (case, upstream) = (&case, &upstream);
                scope.spawn(move || -> Result<Vec<f64>> {
                    let mut shard = VocabParallel::from_vocab(30, Arc::new(communicator))?;
                    shard.reduce_e_grad = false;
                    let [_, _, de, ..] =
                        crate::common::shards::rank(case, &exact(), upstream, &Device::Cpu, shard)?;
                    Ok(de)
                })
            })
            .collect();
        let parts = threads.into_iter().map(|thread| thread.join().unwrap());
        parts.collect::<Result<_>>()
    })?;
    let [_, _, want, ..] = whole(&case, &exact(), &upstream, &Device::Cpu)?;
    let mut differs = false;
    for (i, want) in want.iter().enumerate() {
        let sum: f64 = parts.iter().map(|part| part[i]).sum();
        assert!((sum - want).abs() < 1e-5, "{i}: {sum} {want}");
        differs |= (parts[0][i] - want).abs() > 1e-3;
    }
    assert!(differs, "a part is the whole");
    Ok(())
}

#[test]
fn a_z_loss_of_the_outputs_works_on_shards() -> Result<()> {
    let case = Case::random(740, DType::F64, &[20], 8, 30);
    let upstream = case.upstream(1, true, false);
    let inside = exact().z_loss_weight(0.1);
    let cpu = &vec![Device::Cpu; 7];
    let [total, lse, ..] = sharded(&case, &inside, &upstream, cpu, &[0, 11, 30])?;
    let [plain, ..] = sharded(&case, &exact(), &upstream, cpu, &[0, 11, 30])?;
    let lse = Tensor::new(lse, &Device::Cpu)?;
    let targets = Tensor::zeros(20, DType::I64, &Device::Cpu)?;
    let z = numbers(&squared_lse(&lse, &targets, &exact())?)?[0];
    assert!(
        (total[0] - plain[0] - 0.1 * z).abs() < 1e-5,
        "{total:?} {plain:?} {z}"
    );
    Ok(())
}

/// A rank that returns, panics or never comes: the others get an error, in time.
#[test]
fn a_rank_that_fails_does_not_hang_the_others() -> Result<()> {
    for (how, timeout) in [("returns", 60), ("panics", 60), ("sleeps", 1)] {
        let begin = Instant::now();
        let group = ThreadCommunicator::group(3, Duration::from_secs(timeout))?;
        let errors: Vec<Option<String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = group
                .into_iter()
                .map(|communicator| {
                    scope.spawn(move || -> Option<String> {
                        if communicator.rank() == 1 {
                            match how {
                                "returns" => return None,
                                "panics" => panic!("on purpose"),
                                _ => std::thread::sleep(Duration::from_secs(3)),
                            }
                            return None;
                        }
                        let shard = VocabParallel::from_vocab(15, Arc::new(communicator)).ok()?;
                        Some(
                            loss(&[1, 2], shard)
                                .expect_err("a rank is missing")
                                .to_string(),
                        )
                    })
                })
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|result| result.unwrap_or(None)).collect()
        });
        for rank in [0, 2] {
            let error = errors[rank].as_ref().expect("an error");
            assert!(error.contains('1'), "{how}: {error}");
        }
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(30), "{how}: {took:?}");
    }
    Ok(())
}

/// A transport of a user's own: rank 0 gathers over channels, reduces, and sends the result.
struct Channels {
    rank: usize,
    to: Vec<Sender<Tensor>>,
    from: Mutex<Vec<Receiver<Tensor>>>,
}

impl Channels {
    fn group(ranks: usize) -> Vec<Self> {
        let mut group: Vec<Self> = (0..ranks)
            .map(|rank| Self {
                rank,
                to: Vec::new(),
                from: Mutex::new(Vec::new()),
            })
            .collect();
        for other in 1..ranks {
            for (a, b) in [(0, other), (other, 0)] {
                let (to, from) = channel();
                group[a].to.push(to);
                group[b].from.get_mut().unwrap().push(from);
            }
        }
        group
    }
}

impl Communicator for Channels {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        3
    }

    fn all_reduce(&self, mut tensor: Tensor, op: ReduceOp) -> Result<Tensor> {
        let from = self.from.lock().unwrap();
        let receive = |from: &Receiver<Tensor>| match from.recv_timeout(TIMEOUT) {
            Ok(tensor) => Ok(tensor),
            Err(error) => bail!("no answer: {error}"),
        };
        if self.rank > 0 {
            self.to[0].send(tensor).map_err(candle_core::Error::wrap)?;
            return receive(&from[0]);
        }
        for from in from.iter() {
            let other = receive(from)?;
            tensor = match op {
                ReduceOp::Max => tensor.maximum(&other)?,
                ReduceOp::Sum => (tensor + other)?,
            };
        }
        for to in &self.to {
            to.send(tensor.clone()).map_err(candle_core::Error::wrap)?;
        }
        Ok(tensor)
    }
}

#[test]
fn a_transport_of_ones_own_is_enough() -> Result<()> {
    let case = Case::random(750, DType::F32, &[20], 8, 31);
    let upstream = case.upstream(1, true, true);
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = Channels::group(3)
            .into_iter()
            .map(|communicator| {
                let (case, upstream) = (&case, &upstream);
                scope.spawn(move || {
                    let shard = VocabParallel::from_vocab(31, Arc::new(communicator))?;
                    crate::common::shards::rank(case, &exact(), upstream, &Device::Cpu, shard)
                })
            })
            .collect();
        let ranks = threads.into_iter().map(|thread| thread.join().unwrap());
        ranks.collect::<Result<_>>()
    })?;
    let mut got = ranks[0].clone();
    for rank in &ranks[1..] {
        got[3].extend(&rank[3]);
        got[4].extend(&rank[4]);
    }
    let want = whole(&case, &exact(), &upstream, &Device::Cpu)?;
    for (name, error) in NAMES.iter().zip(errors(&got, &want)) {
        assert!(error <= 1e-6, "{name} differs by {error:e}");
    }
    Ok(())
}

/// A communicator that breaks its word is found out.
#[test]
fn a_result_of_another_shape_is_an_error() -> Result<()> {
    struct Wrong;
    impl Communicator for Wrong {
        fn rank(&self) -> usize {
            0
        }
        fn world_size(&self) -> usize {
            1
        }
        fn all_reduce(&self, tensor: Tensor, _: ReduceOp) -> Result<Tensor> {
            tensor.narrow(0, 0, 1)
        }
    }
    let shard = VocabParallel {
        start: 0,
        stop: 5,
        communicator: Arc::new(Wrong),
        reduce_e_grad: true,
    };
    let error = loss(&[1, 2], shard).unwrap_err().to_string();
    assert!(error.contains("all_reduce"), "{error}");
    Ok(())
}
