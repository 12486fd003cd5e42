//! Distillation of a small decoder into a smaller one.
//!
//! `cargo run --release --example distill -- --teacher top-k` (or `whole`)
//!
//! From the likeliest tokens the teacher says of every position which `k` tokens it finds likeliest, and how likely, as
//! could be stored with the text. The whole teacher says all that it knows, from its hidden states and its head. Either way
//! no logits of the student are stored.

mod common;

use anyhow::Result;
use candle_core::{Tensor, D};
use candle_cut_cross_entropy::models::{CausalLm, Decoder};
use candle_cut_cross_entropy::soft_targets::{
    divergence, top_k_divergence, Divergence, Teacher, TopK,
};
use candle_cut_cross_entropy::{backward, Options};
use candle_nn::ops::softmax;
use candle_nn::Optimizer;
use clap::{Parser, ValueEnum};
use common::counting::{either_way, new_decoder, optimizer, pretrained};
use rand::{rngs::StdRng, SeedableRng};

/// Train a teacher, then a student on what the teacher says.
#[derive(Parser, Debug)]
struct Args {
    #[arg(long, default_value_t = 300)]
    pretraining: usize,
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// What the student learns from
    #[arg(long, value_enum, default_value_t = Says::TopK)]
    teacher: Says,
    /// Tokens that the teacher names at each position (top-k)
    #[arg(long, default_value_t = 4)]
    k: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// What a teacher says of a position.
#[derive(ValueEnum, Debug, Clone, Copy)]
enum Says {
    /// Its likeliest tokens
    TopK,
    /// The distribution over all tokens
    Whole,
}

/// The tokens that the teacher finds likeliest after each position, and their probabilities.
fn likeliest(teacher: &Decoder, ids: &Tensor, k: usize) -> Result<TopK> {
    let logits = teacher.logits(&teacher.hidden_states(ids)?)?.detach();
    let order = logits.arg_sort_last_dim(false)?;
    let tokens = order.narrow(D::Minus1, 0, k)?.contiguous()?;
    let probabilities = softmax(&logits, D::Minus1)?.gather(&tokens, D::Minus1)?;
    Ok(TopK::new(&tokens, &probabilities))
}

/// The mean divergence of the student from the teacher over the positions whose label is not ignored.
fn loss(
    args: &Args,
    teacher: &Decoder,
    student: &Decoder,
    (ids, labels): &(Tensor, Tensor),
) -> Result<Tensor> {
    let hidden = student.hidden_states(ids)?;
    // With its adapter in it, where it has one: distillation takes none beside the weight.
    let weight = &student.head_weight()?;
    let head = student.head(&Options::default())?;
    let options = &head.options().clone().adapter(None);
    let loss = match args.teacher {
        Says::TopK => {
            let few = likeliest(teacher, ids, args.k)?;
            top_k_divergence(&hidden, weight, labels, &few, options)?
        }
        Says::Whole => {
            let states = teacher.hidden_states(ids)?.detach();
            let whole = Teacher::new(&states, &teacher.head_weight()?.detach());
            divergence(
                &hidden,
                weight,
                labels,
                &whole,
                Divergence::ForwardKl,
                options,
            )?
        }
    };
    Ok(loss)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut rng = StdRng::seed_from_u64(args.seed);
    let (teacher, _) = pretrained(args.pretraining, args.seed, &mut rng)?;
    let (student, vars) = new_decoder(32, 1, args.seed + 1)?;
    let held_out = either_way(&mut rng)?;
    let divergence =
        || -> Result<f32> { Ok(loss(&args, &teacher, &student, &held_out)?.to_scalar()?) };
    let before = divergence()?;
    println!("before: divergence {before:.3}");
    let mut optimizer = optimizer(&vars, 1e-2)?;
    for step in 1..=args.steps {
        let loss = loss(&args, &teacher, &student, &either_way(&mut rng)?)?;
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
