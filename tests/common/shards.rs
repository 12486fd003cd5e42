//! A loss over shards of its classes, each on a thread, beside the loss over all of them.

use super::reference::Upstream;
use super::{numbers, weighted, Case, Tensors};
use candle_core::{Device, Result, Tensor, Var};
use candle_cut_cross_entropy::vocab_parallel::{Communicator, ThreadCommunicator, VocabParallel};
use candle_cut_cross_entropy::{linear_cross_entropy, Options};
use std::sync::Arc;
use std::time::Duration;

/// Far more than a rank ever takes.
pub const TIMEOUT: Duration = Duration::from_secs(120);

/// What a rank gets; empty for what there is none of.
pub type Numbers = [Vec<f64>; 7];
pub const NAMES: [&str; 7] = ["loss", "lse", "dE", "dC", "db", "entropy", "predicted"];

fn compute(
    case: &Case,
    tensors: &Tensors,
    options: &Options,
    upstream: &Upstream,
) -> Result<Numbers> {
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let options = case.options(options.clone(), tensors);
    let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
    let grads = weighted(&output, upstream)?.backward()?;
    let optional = |tensor: &Option<Tensor>| match tensor {
        Some(tensor) => numbers(tensor),
        None => Ok(Vec::new()),
    };
    let grad = |tensor: &Tensor| numbers(grads.get(tensor).expect("a gradient"));
    Ok([
        numbers(&output.loss)?,
        numbers(&output.lse)?,
        grad(e)?,
        grad(c)?,
        match &tensors.bias {
            Some(bias) => grad(bias)?,
            None => Vec::new(),
        },
        optional(&output.entropy)?,
        optional(&output.predicted)?,
    ])
}

/// Over all classes.
pub fn whole(
    case: &Case,
    options: &Options,
    upstream: &Upstream,
    device: &Device,
) -> Result<Numbers> {
    compute(case, &case.tensors(device)?, options, upstream)
}

/// By one rank: the rows of its shard.
pub fn rank(
    case: &Case,
    options: &Options,
    upstream: &Upstream,
    device: &Device,
    shard: VocabParallel,
) -> Result<Numbers> {
    let mut tensors = case.tensors(device)?;
    let part = |var: &Var| -> Result<Var> {
        let rows = var
            .as_tensor()
            .narrow(0, shard.start, shard.stop - shard.start)?;
        Var::from_tensor(&rows.detach().force_contiguous()?)
    };
    tensors.classifier = part(&tensors.classifier)?;
    if let Some(bias) = tensors.bias.take() {
        tensors.bias = Some(part(&bias)?);
    }
    compute(
        case,
        &tensors,
        &options.clone().vocab_parallel(shard),
        upstream,
    )
}

/// By ranks of which rank `r` has the classes `bounds[r]..bounds[r + 1]`, on the first, second, .. device. Those of the
/// classifier and the bias are put together, all others must be the same bits on every rank.
pub fn sharded(
    case: &Case,
    options: &Options,
    upstream: &Upstream,
    devices: &[Device],
    bounds: &[usize],
) -> Result<Numbers> {
    let group = ThreadCommunicator::group(bounds.len() - 1, TIMEOUT)?;
    let ranks: Vec<Numbers> = std::thread::scope(|scope| {
        let threads: Vec<_> = group
            .into_iter()
            .map(|communicator| {
                scope.spawn(move || {
                    let r = communicator.rank();
                    let shard = VocabParallel {
                        start: bounds[r],
                        stop: bounds[r + 1],
                        communicator: Arc::new(communicator),
                        reduce_e_grad: true,
                    };
                    rank(case, options, upstream, &devices[r], shard)
                })
            })
            .collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect::<Result<_>>()
    })?;
    let mut all = ranks[0].clone();
    for (r, numbers) in ranks.iter().enumerate().skip(1) {
        for i in [0, 1, 2, 5, 6] {
            let same = numbers[i].len() == all[i].len()
                && (numbers[i].iter().zip(&all[i])).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} of rank {r} is not that of rank 0", NAMES[i]);
        }
        for i in 3..5 {
            all[i].extend(&numbers[i]);
        }
    }
    Ok(all)
}

/// The largest error of each of the numbers, relative to the norm.
pub fn errors(got: &Numbers, want: &Numbers) -> [f64; 7] {
    std::array::from_fn(|i| {
        assert_eq!(got[i].len(), want[i].len(), "{}", NAMES[i]);
        let difference = super::norm(got[i].iter().zip(&want[i]).map(|(a, b)| a - b));
        let size = super::norm(want[i].iter().copied());
        match difference {
            0. => 0.,
            _ => difference / size,
        }
    })
}
