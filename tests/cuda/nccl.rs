//! Ranks over NCCL.

use crate::common::shards::{errors, rank, whole, NAMES, TIMEOUT};
use crate::common::{exact, gradient_tolerance, Case};
use crate::device;
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::vocab_parallel::{NcclCommunicator, NcclId, VocabParallel};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[test]
fn a_world_of_one_rank_is_the_whole() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let case = Case::random(850, DType::BF16, &[300], 64, 1000).with_bias(851);
    let upstream = case.upstream(1, true, true);
    let id: NcclId = NcclId::new()?.to_string().parse()?;
    let nccl = NcclCommunicator::new(id, &device, 0, 1, TIMEOUT)?;
    let shard = VocabParallel::from_vocab(1000, Arc::new(nccl))?;
    let got = rank(&case, &exact(), &upstream, &device, shard)?;
    let want = whole(&case, &exact(), &upstream, &device)?;
    for (name, error) in NAMES.iter().zip(errors(&got, &want)) {
        assert!(
            error <= gradient_tolerance(DType::BF16),
            "{name} differs by {error:e}"
        );
    }
    Ok(())
}

/// A line that says the test is skipped, where there is one GPU only.
fn two_devices() -> Option<[Device; 2]> {
    let first = device()?;
    match Device::new_cuda(1) {
        Ok(second) => Some([first, second]),
        Err(error) => {
            let _ = writeln!(
                std::io::stderr(),
                "skipped: no second CUDA device ({error})"
            );
            None
        }
    }
}

#[test]
fn two_gpus_give_what_one_gives() -> Result<()> {
    let Some(devices) = two_devices() else {
        return Ok(());
    };
    for dtype in [DType::BF16, DType::F32] {
        let case = Case::random(860, dtype, &[300], 64, 1001).with_bias(861);
        let upstream = case.upstream(1, true, true);
        let id = NcclId::new()?;
        let ranks: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = devices
                .iter()
                .enumerate()
                .map(|(r, device)| {
                    let (case, upstream) = (&case, &upstream);
                    scope.spawn(move || {
                        let nccl = NcclCommunicator::new(id, device, r, 2, TIMEOUT)?;
                        let shard = VocabParallel::from_vocab(1001, Arc::new(nccl))?;
                        rank(case, &exact(), upstream, device, shard)
                    })
                })
                .collect();
            let ranks = threads.into_iter().map(|thread| thread.join().unwrap());
            ranks.collect::<Result<_>>()
        })?;
        let mut got = ranks[0].clone();
        got[3].extend(&ranks[1][3]);
        got[4].extend(&ranks[1][4]);
        let want = whole(&case, &exact(), &upstream, &devices[0])?;
        for (name, error) in NAMES.iter().zip(errors(&got, &want)) {
            let allowed = match *name {
                "loss" | "lse" => 1e-6,
                _ => gradient_tolerance(dtype),
            };
            assert!(error <= allowed, "{dtype:?}: {name} differs by {error:e}");
        }
    }
    Ok(())
}

#[test]
fn a_rank_that_leaves_does_not_hang_the_other() -> Result<()> {
    let Some(devices) = two_devices() else {
        return Ok(());
    };
    let case = Case::random(870, DType::BF16, &[30], 64, 1001);
    let upstream = case.upstream(1, true, false);
    let id = NcclId::new()?;
    let begin = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let threads = [0, 1].map(|r| {
            let (case, upstream, device) = (&case, &upstream, &devices[r]);
            scope.spawn(move || -> Result<Option<String>> {
                let nccl = NcclCommunicator::new(id, device, r, 2, Duration::from_secs(10))?;
                if r == 1 {
                    return Ok(None);
                }
                let shard = VocabParallel::from_vocab(1001, Arc::new(nccl))?;
                let result = rank(case, &exact(), upstream, device, shard);
                Ok(Some(result.expect_err("a rank is missing").to_string()))
            })
        });
        for (r, thread) in threads.into_iter().enumerate() {
            let error = thread.join().unwrap()?;
            assert_eq!(error.is_some(), r == 0, "{error:?}");
        }
        Ok(())
    })?;
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "{:?}",
        begin.elapsed()
    );
    Ok(())
}
