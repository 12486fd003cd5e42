//! Group relative policy optimisation of a small decoder.
//!
//! `cargo run --release --example grpo`
//!
//! The world's answers count up or down from the prompt's last token. The model is first trained on both alike; then
//! it answers prompts, several times each, and learns from a reward alone: the share of an answer's tokens that are one
//! above the token before.

mod common;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor, D};
use candle_cut_cross_entropy::models::{CausalLm, Decoder};
use candle_cut_cross_entropy::objectives::{
    counted, group_advantages, grpo_loss, Average, GrpoOptions,
};
use candle_cut_cross_entropy::{backward, Options, Reduction};
use candle_nn::ops::softmax;
use candle_nn::Optimizer;
use clap::Parser;
use common::counting::{
    copied, counted_on, optimizer, pretrained, prompts, Prompt, ANSWER, BATCH, IGNORED, PROMPT,
};
use rand::distr::{weighted::WeightedIndex, Distribution};
use rand::{rngs::StdRng, SeedableRng};

/// Train on both kinds of answers, then on rewards.
#[derive(Parser, Debug)]
struct Args {
    #[arg(long, default_value_t = 150)]
    pretraining: usize,
    #[arg(long, default_value_t = 40)]
    steps: usize,
    /// Prompts a step
    #[arg(long, default_value_t = 16)]
    prompts: usize,
    /// Answers to each prompt
    #[arg(long, default_value_t = 8)]
    group: usize,
    /// Updates from the answers of a step
    #[arg(long, default_value_t = 2)]
    updates: usize,
    /// The weight of the divergence from the model before
    #[arg(long, default_value_t = 0.02)]
    kl: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Prompts and the answers that a model has drawn.
struct Rollouts {
    rows: Vec<Vec<i64>>,
}

impl Rollouts {
    fn sample<'a>(
        model: &Decoder,
        prompts: impl Iterator<Item = &'a Prompt>,
        rng: &mut StdRng,
    ) -> Result<Self> {
        let rows = prompts.map(|prompt| prompt.to_vec()).collect();
        let mut rollouts = Self { rows };
        for _ in 0..ANSWER {
            let logits = model.next_token_logits(&tensor(&rollouts.rows)?)?;
            let probabilities = softmax(&logits, D::Minus1)?.to_vec2::<f32>()?;
            for (row, probabilities) in rollouts.rows.iter_mut().zip(probabilities) {
                row.push(WeightedIndex::new(probabilities)?.sample(rng) as i64);
            }
        }
        Ok(rollouts)
    }

    /// The share of each answer's tokens that are one above the token before.
    fn rewards(&self) -> Vec<f32> {
        let up = |pair: &&[i64]| pair[1] == counted_on(pair[0], 1);
        let reward = |row: &Vec<i64>| row[PROMPT - 1..].windows(2).filter(up).count();
        let rewards = self.rows.iter().map(reward);
        rewards.map(|n| n as f32 / ANSWER as f32).collect()
    }

    /// The labels: the answers, the prompts ignored.
    fn labels(&self) -> Result<Tensor> {
        let mut rows = self.rows.clone();
        for row in &mut rows {
            row[..PROMPT].fill(IGNORED);
        }
        tensor(&rows)
    }
}

fn tensor(rows: &[Vec<i64>]) -> Result<Tensor> {
    let time = rows.first().context("no prompts")?.len();
    Ok(Tensor::from_vec(
        rows.concat(),
        (rows.len(), time),
        &Device::Cpu,
    )?)
}

/// The mean reward of one answer to each prompt.
fn mean_reward(model: &Decoder, prompts: &[Prompt], rng: &mut StdRng) -> Result<f32> {
    let rewards = Rollouts::sample(model, prompts.iter(), rng)?.rewards();
    Ok(rewards.iter().sum::<f32>() / rewards.len() as f32)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut rng = StdRng::seed_from_u64(args.seed);
    let (policy, vars) = pretrained(args.pretraining, args.seed, &mut rng)?;
    let reference = copied(&vars)?;

    let held_out = prompts(4 * BATCH, &mut rng);
    let before = mean_reward(&policy, &held_out, &mut rng)?;
    println!("before: mean reward {before:.2}");
    let options = Options::default().shift(1).reduction(Reduction::None);
    let mut tuning = optimizer(&vars, 3e-4)?;
    for step in 1..=args.steps {
        let prompts = prompts(args.prompts, &mut rng);
        let repeated = prompts
            .iter()
            .flat_map(|prompt| std::iter::repeat_n(prompt, args.group));
        let rollouts = Rollouts::sample(&policy, repeated, &mut rng)?;
        let rewards = rollouts.rewards();
        let mean = rewards.iter().sum::<f32>() / rewards.len() as f32;
        let rewards = Tensor::from_vec(rewards, (args.prompts, args.group), &Device::Cpu)?;
        let advantages = group_advantages(&rewards, true)?.flatten_all()?;

        let (ids, labels) = (tensor(&rollouts.rows)?, rollouts.labels()?);
        let mask = counted(&labels, &options)?;
        let log_probs = |model: &Decoder| -> Result<Tensor> {
            Ok(model.loss(&ids, &labels, &options)?.loss.neg()?)
        };
        let old_log_probs = log_probs(&policy)?.detach();
        let grpo = GrpoOptions::default()
            .clip(0.2, 0.28)
            .average(Average::Tokens)
            .kl(&log_probs(&reference)?.detach(), args.kl);
        for _ in 0..args.updates {
            let log_probs = log_probs(&policy)?;
            let loss = grpo_loss(&log_probs, &old_log_probs, &advantages, Some(&mask), &grpo)?;
            tuning.step(&backward(&loss)?)?;
        }
        if step % 5 == 0 || step == 1 {
            println!("step {step}: mean reward {mean:.2}");
        }
    }
    let after = mean_reward(&policy, &held_out, &mut rng)?;
    println!("after: mean reward {after:.2}");
    anyhow::ensure!(
        after > 0.8 && after > before,
        "nothing was learnt: {before} before, {after} after"
    );
    Ok(())
}
