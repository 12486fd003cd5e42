//! Direct preference optimisation of a small decoder.
//!
//! `cargo run --release --example dpo`
//!
//! The world's answers count up or down from the prompt's last token. The model is first trained on both alike; then
//! it learns from pairs alone that counting up is preferred, measured from a copy of itself.

mod common;

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_cut_cross_entropy::models::{CausalLm, Decoder};
use candle_cut_cross_entropy::objectives::{dpo_loss, sequence_log_probs, Preferences};
use candle_cut_cross_entropy::{backward, Options, Reduction};
use candle_nn::Optimizer;
use clap::Parser;
use common::counting::{batch, copied, optimizer, pretrained, prompts, Prompt, BATCH};
use rand::{rngs::StdRng, SeedableRng};

/// Train on both kinds of answers, then on preferences.
#[derive(Parser, Debug)]
struct Args {
    #[arg(long, default_value_t = 150)]
    pretraining: usize,
    #[arg(long, default_value_t = 40)]
    steps: usize,
    #[arg(long, default_value_t = 0.1)]
    beta: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn log_probs(model: &Decoder, (ids, labels): &(Tensor, Tensor)) -> Result<Tensor> {
    let options = Options::default().reduction(Reduction::None);
    let nll = model.loss(ids, labels, &options)?.loss;
    Ok(sequence_log_probs(&nll, None)?)
}

/// The share of answers counting up that the model finds likelier than those counting down.
fn preference(model: &Decoder, prompts: &[Prompt]) -> Result<f32> {
    let up = log_probs(model, &batch(prompts, |_| 1)?)?;
    let down = log_probs(model, &batch(prompts, |_| -1)?)?;
    Ok(up
        .gt(&down)?
        .to_dtype(DType::F32)?
        .mean_all()?
        .to_scalar()?)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut rng = StdRng::seed_from_u64(args.seed);
    let (policy, vars) = pretrained(args.pretraining, args.seed, &mut rng)?;
    let reference = copied(&vars)?;

    let held_out = prompts(BATCH, &mut rng);
    let before = preference(&policy, &held_out)?;
    println!(
        "before: counting up is likelier after {:.0}% of the prompts",
        before * 100.
    );
    let mut tuning = optimizer(&vars, 3e-4)?;
    for step in 1..=args.steps {
        let prompts = prompts(BATCH, &mut rng);
        let (up, down) = (batch(&prompts, |_| 1)?, batch(&prompts, |_| -1)?);
        let (chosen, rejected) = (log_probs(&policy, &up)?, log_probs(&policy, &down)?);
        let of_reference = [&up, &down].map(|pairs| log_probs(&reference, pairs));
        let [reference_chosen, reference_rejected] = of_reference;
        let loss = dpo_loss(
            Preferences {
                chosen: &chosen,
                rejected: &rejected,
            },
            Preferences {
                chosen: &reference_chosen?.detach(),
                rejected: &reference_rejected?.detach(),
            },
            args.beta,
        )?;
        tuning.step(&backward(&loss)?)?;
        if step % 10 == 0 || step == 1 {
            println!("step {step}: loss {:.3}", loss.to_scalar::<f32>()?);
        }
    }
    let after = preference(&policy, &held_out)?;
    println!("after: {:.0}%", after * 100.);
    anyhow::ensure!(
        after > 0.9 && after >= before,
        "nothing was learnt: {before} before, {after} after"
    );
    Ok(())
}
