//! A head sharded over ranks, compared with the whole.
//!
//! `cargo run --release --example vocab_parallel` has four threads of the CPU as ranks, and its peaks are those of all
//! of them together;
//! `--features nccl --example vocab_parallel -- --nccl --ranks 2` a process and a GPU for each.

mod common;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_cut_cross_entropy::vocab_parallel::{Communicator, ThreadCommunicator, VocabParallel};
use candle_cut_cross_entropy::{backward, linear_cross_entropy, Options, Preset};
use clap::Parser;
use common::meter::Meter;
use rand::{rngs::StdRng, Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use std::sync::Arc;
use std::time::Duration;

/// Compute a loss whose classes are sharded over ranks, and compare it with that of the whole head.
#[derive(Parser, Debug)]
struct Args {
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    /// A process and a GPU a rank, over NCCL, in place of threads
    #[arg(long)]
    nccl: bool,
    /// N,D,V
    #[arg(long, value_delimiter = ',', default_values_t = [256, 128, 8003])]
    shape: Vec<usize>,
    /// f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: DType,
    #[arg(long, default_value = "cce_exact")]
    preset: Preset,
    #[arg(long, default_value_t = 5)]
    iters: usize,
    /// Seconds that a rank waits for the others
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// Does not compute the whole head
    #[arg(long)]
    no_check: bool,
    /// This rank, of 0 to RANKS - 1, leaves before the last step: the others must find out
    #[arg(long)]
    kill_rank: Option<usize>,
}

/// What a rank is told by the process that starts it.
const RANK: &str = "VOCAB_PARALLEL_RANK";
const MEETING: &str = "VOCAB_PARALLEL_MEETING";

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        args.shape.len() == 3 && args.shape.iter().all(|&size| size > 0),
        "--shape takes N,D,V, none of them 0, got {:?}",
        args.shape
    );
    if let Some(rank) = args.kill_rank {
        ensure!(
            rank < args.ranks,
            "--kill-rank {rank} is not one of {} ranks",
            args.ranks
        );
    }
    if !args.nccl {
        return threads(&args);
    }
    match (std::env::var(RANK), std::env::var(MEETING)) {
        (Ok(rank), Ok(meeting)) => nccl_rank(&args, rank.parse()?, &meeting),
        _ => launch(&args),
    }
}

fn threads(args: &Args) -> Result<()> {
    let group = ThreadCommunicator::group(args.ranks, Duration::from_secs(args.timeout))?;
    std::thread::scope(|scope| {
        let ranks: Vec<_> = group
            .into_iter()
            .map(|communicator| {
                scope.spawn(move || run(args, Arc::new(communicator), &Device::Cpu))
            })
            .collect();
        finish(
            args,
            ranks.into_iter().map(|rank| match rank.join() {
                Ok(result) => result,
                Err(_) => bail!("panicked"),
            }),
        )
    })
}

/// Starts a process for every rank.
fn launch(args: &Args) -> Result<()> {
    let meeting = std::env::temp_dir().join(format!("vocab-parallel-{}", std::process::id()));
    let processes = (0..args.ranks)
        .map(|rank| {
            std::process::Command::new(std::env::current_exe()?)
                .args(std::env::args_os().skip(1))
                .env(RANK, rank.to_string())
                .env(MEETING, &meeting)
                .spawn()
                .with_context(|| format!("starting rank {rank}"))
        })
        .collect::<Result<Vec<_>>>()?;
    finish(
        args,
        processes.into_iter().map(|mut process| {
            let status = process.wait()?;
            ensure!(status.success(), "{status}");
            Ok(())
        }),
    )
}

/// Whether the ranks ended as they should.
fn finish(args: &Args, results: impl Iterator<Item = Result<()>>) -> Result<()> {
    for (rank, result) in results.enumerate() {
        match (result, args.kill_rank) {
            (result, None) => result.with_context(|| format!("rank {rank}"))?,
            (Ok(()), Some(killed)) => ensure!(rank == killed, "rank {rank} found nothing amiss"),
            (Err(error), Some(_)) => {
                // The first line: the others are a backtrace.
                let text = format!("{error:#}");
                println!(
                    "rank {rank} found out: {}",
                    text.lines().next().unwrap_or_default()
                );
            }
        }
    }
    Ok(())
}

#[cfg(feature = "nccl")]
fn nccl_rank(args: &Args, rank: usize, meeting: &str) -> Result<()> {
    use candle_cut_cross_entropy::vocab_parallel::NcclCommunicator;
    let device = Device::new_cuda(rank)?;
    let timeout = Duration::from_secs(args.timeout);
    let nccl = NcclCommunicator::meet(meeting, &device, rank, args.ranks, timeout)?;
    run(args, Arc::new(nccl), &device)
}

#[cfg(not(feature = "nccl"))]
fn nccl_rank(_: &Args, rank: usize, _: &str) -> Result<()> {
    bail!("rank {rank}: --nccl needs the feature nccl")
}

/// Rows of a matrix of normal numbers, the same whoever makes them.
fn normal(rows: std::ops::Range<usize>, columns: usize, std: f32, seed: u64) -> Vec<f32> {
    let mut values = vec![0f32; rows.len() * columns];
    values
        .par_chunks_mut(columns)
        .enumerate()
        .for_each(|(row, values)| {
            let mut rng = StdRng::seed_from_u64(seed << 40 | (rows.start + row) as u64);
            for value in values {
                let sample: f32 = StandardNormal.sample(&mut rng);
                *value = sample * std;
            }
        });
    values
}

/// The inputs over some of the classes.
struct Inputs {
    embeddings: Var,
    classifier: Var,
    targets: Tensor,
}

/// What one step gives: loss, lse, dE, dC.
type Step = [Tensor; 4];

impl Inputs {
    fn new(args: &Args, classes: std::ops::Range<usize>, device: &Device) -> Result<Self> {
        let [n, d, v] = args.shape[..] else {
            bail!("--shape takes N,D,V")
        };
        let mut rng = StdRng::seed_from_u64(3);
        let targets: Vec<i64> = (0..n).map(|_| rng.random_range(0..v as i64)).collect();
        let var = |values: Vec<f32>, rows: usize| -> Result<Var> {
            let values = Tensor::from_vec(values, (rows, d), &Device::Cpu)?;
            Ok(Var::from_tensor(
                &values.to_dtype(args.dtype)?.to_device(device)?,
            )?)
        };
        Ok(Self {
            embeddings: var(normal(0..n, d, 1., 1), n)?,
            classifier: var(normal(classes.clone(), d, 0.02, 2), classes.len())?,
            targets: Tensor::from_vec(targets, n, device)?,
        })
    }

    fn step(&self, options: &Options) -> candle_core::Result<Step> {
        let (e, c) = (&self.embeddings, &self.classifier);
        let output = linear_cross_entropy(e, c, &self.targets, options)?;
        let grads = backward(&output.loss)?;
        let grad = |var: &Var| match grads.get(var) {
            Some(grad) => Ok(grad.clone()),
            None => candle_core::bail!("a gradient is missing"),
        };
        Ok([
            output.loss.detach(),
            output.lse.detach(),
            grad(e)?,
            grad(c)?,
        ])
    }

    /// A step, the median of its milliseconds, and its peak over the inputs in MiB: on the CPU that of
    /// all ranks' threads together.
    fn measure(&self, args: &Args, options: &Options, device: &Device) -> Result<(Step, f64, f64)> {
        let meter = Meter::new(device)?;
        let mut result = self.step(options)?;
        let (mut times, mut peak) = (Vec::new(), 0);
        for _ in 0..args.iters.max(1) {
            drop(result);
            let before = meter.start()?;
            let (step, ms) = meter.time(|| self.step(options))?;
            peak = peak.max(meter.peak()?.saturating_sub(before));
            times.push(ms);
            result = step;
        }
        times.sort_by(f64::total_cmp);
        Ok((
            result,
            times[times.len() / 2],
            peak as f64 / (1 << 20) as f64,
        ))
    }
}

/// The work of a rank.
fn run(args: &Args, communicator: Arc<dyn Communicator>, device: &Device) -> Result<()> {
    let [_, _, v] = args.shape[..] else {
        bail!("--shape takes N,D,V")
    };
    let rank = communicator.rank();
    let shard = VocabParallel::from_vocab(v, communicator)?;
    let classes = shard.start..shard.stop;
    let inputs = Inputs::new(args, classes.clone(), device)?;
    let options = Options::preset(args.preset);
    let (sharded, ms, peak) =
        inputs.measure(args, &options.clone().vocab_parallel(shard.clone()), device)?;
    println!(
        "rank {rank}: classes {}..{}, loss {:.6}, forward + backward {ms:.2} ms, peak over inputs {peak:.1} MiB",
        classes.start,
        classes.end,
        sharded[0].to_scalar::<f32>()?
    );
    if args.kill_rank == Some(rank) {
        println!("rank {rank}: leaves");
        return Ok(());
    }
    if args.kill_rank.is_some() {
        inputs.step(&options.vocab_parallel(shard))?;
        return Ok(());
    }
    if args.no_check {
        return Ok(());
    }
    // One after the other, where they share a device's memory: nobody else is at work.
    drop(inputs);
    let inputs = Inputs::new(args, 0..v, device)?;
    let (mut whole, ms, peak) = inputs.measure(args, &options, device)?;
    whole[3] = whole[3].narrow(0, classes.start, classes.len())?;
    let mut line =
        format!("rank {rank}: whole head {ms:.2} ms, {peak:.1} MiB; relative differences");
    for ((name, a), b) in ["loss", "lse", "dE", "dC"].iter().zip(&sharded).zip(&whole) {
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let norm = |tensor: Tensor| -> Result<f32> {
            Ok(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt())
        };
        let error = norm((wide(a)? - wide(b)?)?)? / norm(wide(b)?)?;
        line += &format!(" {name} {error:.1e}");
        let allowed = match (*name, args.dtype) {
            ("loss" | "lse", _) | (_, DType::F32) => 1e-5,
            _ => 1e-2,
        };
        ensure!(
            error <= allowed,
            "{name} differs by {error:e} from that of the whole head"
        );
    }
    println!("{line}");
    Ok(())
}
