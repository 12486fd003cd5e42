//! Ranks that are threads of one process.

use super::{Communicator, ReduceOp};
use candle_core::{bail, Device, Result, Tensor};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Ranks that are threads of one process, for tests, for laptops, and for several shards on one GPU.
///
/// Tensors on a GPU go through the host's memory, which waits for the device: Candle gives each thread a stream of its
/// own, so this is also what orders their work. A rank works on tensors that it made itself, on its own clone of the
/// `Device` or on another device.
///
/// A rank that is dropped, because its thread returned an error or panicked, fails the calls of the others at once,
/// and those that come later. So does a rank that does not come within the timeout.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_cut_cross_entropy::vocab_parallel::{Communicator, ReduceOp, ThreadCommunicator};
/// use std::time::Duration;
///
/// # fn main() -> candle_core::Result<()> {
/// std::thread::scope(|scope| {
///     for rank in ThreadCommunicator::group(2, Duration::from_secs(60))? {
///         scope.spawn(move || -> candle_core::Result<()> {
///             let mine = Tensor::new(&[rank.rank() as f32], &Device::Cpu)?;
///             let sum = rank.all_reduce(mine, ReduceOp::Sum)?;
///             assert_eq!(sum.to_vec1::<f32>()?, [1.]);
///             Ok(())
///         });
///     }
///     Ok(())
/// })
/// # }
/// ```
#[derive(Debug)]
pub struct ThreadCommunicator {
    rank: usize,
    timeout: Duration,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    ranks: usize,
    round: Mutex<Round>,
    changed: Condvar,
}

/// An all-reduce: first every rank hands in its tensor, then every rank takes the result.
#[derive(Debug, Default)]
struct Round {
    /// On the CPU, by rank.
    tensors: Vec<Option<(Tensor, ReduceOp)>>,
    /// Once all are in.
    result: Option<std::result::Result<Tensor, String>>,
    /// Ranks that have taken the result.
    taken: usize,
    /// Why there will be no other result.
    failed: Option<String>,
}

impl ThreadCommunicator {
    /// The communicators of `world_size` ranks, in their order, each to be moved to a thread. `timeout` is how long a
    /// rank waits for the others in a call.
    ///
    /// # Errors
    /// No ranks.
    pub fn group(world_size: usize, timeout: Duration) -> Result<Vec<Self>> {
        if world_size == 0 {
            bail!("a group needs at least one rank")
        }
        let group = Arc::new(Group {
            ranks: world_size,
            round: Mutex::new(Round {
                tensors: vec![None; world_size],
                ..Round::default()
            }),
            changed: Condvar::new(),
        });
        let rank = |rank| Self {
            rank,
            timeout,
            group: group.clone(),
        };
        Ok((0..world_size).map(rank).collect())
    }

    fn round(&self) -> MutexGuard<'_, Round> {
        self.group.round.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until `ready`, which is asked first: what is ready is so whatever happened since.
    fn wait<'a>(
        &'a self,
        mut round: MutexGuard<'a, Round>,
        deadline: Instant,
        ready: impl Fn(&Round) -> bool,
    ) -> Result<MutexGuard<'a, Round>> {
        while !ready(&round) {
            if let Some(failed) = &round.failed {
                bail!("rank {}: {failed}", self.rank)
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing: Vec<usize> = (0..self.group.ranks)
                    .filter(|&rank| round.tensors[rank].is_none())
                    .collect();
                let failed = format!(
                    "ranks {missing:?} did not come to an all-reduce within {:?}",
                    self.timeout
                );
                round.failed = Some(failed.clone());
                self.group.changed.notify_all();
                bail!("rank {}: {failed}", self.rank)
            }
            round = match self.group.changed.wait_timeout(round, left) {
                Ok((round, _)) => round,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        Ok(round)
    }
}

impl Communicator for ThreadCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.group.ranks
    }

    fn all_reduce(&self, tensor: Tensor, op: ReduceOp) -> Result<Tensor> {
        let deadline = Instant::now() + self.timeout;
        let device = tensor.device().clone();
        let mine = tensor.to_device(&Device::Cpu)?;
        // Ranks may still be taking the last result.
        let mut round = self.wait(self.round(), deadline, |round| round.result.is_none())?;
        if let Some(failed) = &round.failed {
            bail!("rank {}: {failed}", self.rank)
        }
        round.tensors[self.rank] = Some((mine, op));
        if round.tensors.iter().all(Option::is_some) {
            round.result = Some(reduce(&round.tensors));
            round.taken = 0;
            self.group.changed.notify_all();
        }
        let mut round = self.wait(round, deadline, |round| round.result.is_some())?;
        let result = round.result.clone();
        round.taken += 1;
        if round.taken == self.group.ranks {
            round.result = None;
            round.tensors.fill(None);
            self.group.changed.notify_all();
        }
        drop(round);
        match result {
            Some(Ok(result)) => result.to_device(&device),
            Some(Err(error)) => bail!("rank {}: {error}", self.rank),
            None => bail!("rank {}: there is no result", self.rank),
        }
    }
}

/// The result for all ranks, in the order of the ranks.
fn reduce(tensors: &[Option<(Tensor, ReduceOp)>]) -> std::result::Result<Tensor, String> {
    let mut ranks = tensors.iter().flatten();
    let Some((first, op)) = ranks.next() else {
        return Err("no tensors".to_string());
    };
    let mut result = first.clone();
    for (tensor, other) in ranks {
        if other != op || tensor.shape() != first.shape() || tensor.dtype() != first.dtype() {
            return Err(format!(
                "the ranks disagree: {op:?} of {:?} {:?} on the first, {other:?} of {:?} {:?} on another",
                first.dtype(),
                first.shape(),
                tensor.dtype(),
                tensor.shape()
            ));
        }
        result = match op {
            ReduceOp::Max => result.maximum(tensor),
            ReduceOp::Sum => result + tensor,
        }
        .map_err(|e| e.to_string())?;
    }
    Ok(result)
}

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        let mut round = self.round();
        round
            .failed
            .get_or_insert(format!("rank {} has left the group", self.rank));
        self.group.changed.notify_all();
    }
}
