//! A head sharded over ranks: its shards, its errors and its transports.

use crate::common::shards::{errors, sharded, whole, NAMES, TIMEOUT};
use crate::common::{exact, numbers, Case};
use candle_core::{bail, DType, Device, Result, Tensor};
use candle_cut_cross_entropy::objectives::squared_lse;
use candle_cut_cross_entropy::vocab_parallel::{
    Communicator, ReduceOp, ThreadCommunicator, VocabParallel,
};
use candle_cut_cross_entropy::{linear_cross_entropy, Options, Output};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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
fn class_weights_of_a_shard_are_those_of_all_classes() -> Result<()> {
    let e = Tensor::ones((2, 4), DType::F32, &Device::Cpu)?;
    let c = Tensor::ones((5, 4), DType::F32, &Device::Cpu)?;
    let y = Tensor::new(&[11i64, 12], &Device::Cpu)?;
    let weights = Tensor::ones(14, DType::F32, &Device::Cpu)?;
    let options = Options::default().vocab_parallel(one_rank(10, 15)?);
    let result = linear_cross_entropy(&e, &c, &y, &options.class_weights(&weights));
    let error = result.unwrap_err().to_string();
    assert!(
        error.contains("at least 15") && error.contains("[14]"),
        "{error}"
    );
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
