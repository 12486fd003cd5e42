//! Distillation of a small decoder into a smaller one, from the teacher's likeliest tokens.
//!
//! `cargo run --release --example distill`
//!
//! The teacher says of every position which `k` tokens it finds likeliest, and how likely; the student learns that
//! distribution. Its logits are not stored: with the teacher's probabilities `q_j`, made to sum to one, the
//! Kullback-Leibler divergence of a position is `lse + sum_j q_j (log q_j - z_j)`. The loss has lse as an output, and `z_j`
//! are the logits of `k` tokens.

mod common;

use anyhow::Result;
use candle_core::{DType, Tensor, D};
use candle_cut_cross_entropy::models::{CausalLm, Decoder};
use candle_cut_cross_entropy::objectives::counted;
use candle_cut_cross_entropy::{backward, Options};
use candle_nn::ops::log_softmax;
use candle_nn::Optimizer;
use clap::Parser;
use common::counting::{either_way, new_decoder, optimizer, pretrained};
use rand::{rngs::StdRng, SeedableRng};

/// Train a teacher, then a student on what the teacher says.
#[derive(Parser, Debug)]
struct Args {
    #[arg(long, default_value_t = 300)]
    pretraining: usize,
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Tokens that the teacher names at each position
    #[arg(long, default_value_t = 4)]
    k: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// The tokens that a teacher finds likeliest after each position but the last, and the logarithms of their
/// probabilities, which sum to one. Both `(batch, time - 1, k)`.
struct Likeliest {
    tokens: Tensor,
    log_probs: Tensor,
}

impl Likeliest {
    fn of(teacher: &Decoder, ids: &Tensor, k: usize) -> Result<Self> {
        let hidden = predicting(&teacher.hidden_states(ids)?)?;
        let logits = teacher.logits(&hidden)?.detach();
        let order = logits.arg_sort_last_dim(false)?;
        let tokens = order.narrow(D::Minus1, 0, k)?.contiguous()?;
        let log_probs = log_softmax(&logits.gather(&tokens, D::Minus1)?, D::Minus1)?;
        Ok(Self { tokens, log_probs })
    }

    /// The mean divergence of a student over the positions whose label is not ignored.
    fn divergence(&self, student: &Decoder, ids: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let hidden = student.hidden_states(ids)?;
        let head = student.head(&Options::default())?;
        // The lse does not depend on the labels, but for those that are ignored.
        let lse = head.forward(&hidden, labels)?.lse;
        let (batch, time, k) = self.tokens.dims3()?;
        let rows = head.weight().index_select(&self.tokens.flatten_all()?, 0)?;
        let rows = rows.reshape((batch, time, k, ()))?;
        let hidden = predicting(&hidden)?.unsqueeze(2)?;
        let logits = rows.broadcast_mul(&hidden)?.sum(D::Minus1)?;
        // log q - log p = log q - z + lse
        let against = (&self.log_probs - logits)?.broadcast_add(&lse.unsqueeze(D::Minus1)?)?;
        let divergences = (self.log_probs.exp()? * against)?.sum(D::Minus1)?;
        let mask = counted(labels, &Options::default().shift(1))?.to_dtype(DType::F32)?;
        Ok(((divergences * &mask)?.sum_all()? / mask.sum_all()?)?)
    }
}

/// The hidden states that predict a token: all but the last of each sequence.
fn predicting(hidden: &Tensor) -> Result<Tensor> {
    Ok(hidden.narrow(1, 0, hidden.dim(1)? - 1)?)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut rng = StdRng::seed_from_u64(args.seed);
    let (teacher, _) = pretrained(args.pretraining, args.seed, &mut rng)?;
    let (student, vars) = new_decoder(32, 1, args.seed + 1)?;
    let (held_out, labels) = either_way(&mut rng)?;
    let taught = Likeliest::of(&teacher, &held_out, args.k)?;
    let divergence = || -> Result<f32> {
        let divergence = taught.divergence(&student, &held_out, &labels)?;
        Ok(divergence.to_scalar()?)
    };
    let before = divergence()?;
    println!("before: divergence {before:.3}");
    let mut optimizer = optimizer(&vars, 1e-2)?;
    for step in 1..=args.steps {
        let (ids, labels) = either_way(&mut rng)?;
        let taught = Likeliest::of(&teacher, &ids, args.k)?;
        let loss = taught.divergence(&student, &ids, &labels)?;
        optimizer.step(&backward(&loss)?)?;
        if step % 50 == 0 || step == 1 {
            let loss = loss.to_scalar::<f32>()?;
            println!("step {step}: divergence {loss:.3}");
        }
    }
    let after = divergence()?;
    println!("after: divergence {after:.3}");
    anyhow::ensure!(
        after < 0.2 * before,
        "nothing was learnt: {before} before, {after} after"
    );
    Ok(())
}
