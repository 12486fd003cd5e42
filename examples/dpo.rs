//! Direct preference optimisation of a small decoder.
//!
//! `cargo run --release --example dpo`
//!
//! The world's answers count up or down from the prompt's last token. The model is first trained on both alike; then
//! it learns from pairs alone that counting up is preferred, measured from a copy of itself.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_cut_cross_entropy::models::{AdamW, CausalLm, Config, Decoder};
use candle_cut_cross_entropy::objectives::{dpo_loss, sequence_log_probs, Preferences};
use candle_cut_cross_entropy::{backward, Options, Reduction};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder, VarMap};
use clap::Parser;
use rand::{rngs::StdRng, Rng, SeedableRng};

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

const VOCAB: i64 = 64;
const PROMPT: usize = 4;
const ANSWER: usize = 6;
const BATCH: usize = 32;
const IGNORED: i64 = -100;

/// Token ids and labels `(BATCH, PROMPT + ANSWER)` of answers that count by these steps. The prompt is not learnt.
fn batch(prompts: &[[i64; PROMPT]], step: impl Fn(usize) -> i64) -> Result<(Tensor, Tensor)> {
    let (mut ids, mut labels) = (Vec::new(), Vec::new());
    for (row, prompt) in prompts.iter().enumerate() {
        ids.extend(prompt);
        labels.extend([IGNORED; PROMPT]);
        for i in 1..=ANSWER as i64 {
            let token = (prompt[PROMPT - 1] + i * step(row)).rem_euclid(VOCAB);
            ids.push(token);
            labels.push(token);
        }
    }
    let shape = (prompts.len(), PROMPT + ANSWER);
    let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
    Ok((tensor(ids)?, tensor(labels)?))
}

fn prompts(rng: &mut StdRng) -> Vec<[i64; PROMPT]> {
    (0..BATCH)
        .map(|_| std::array::from_fn(|_| rng.random_range(0..VOCAB)))
        .collect()
}

fn log_probs(model: &Decoder, (ids, labels): &(Tensor, Tensor)) -> Result<Tensor> {
    let options = Options::default().reduction(Reduction::None);
    let nll = model.loss(ids, labels, &options)?.loss;
    Ok(sequence_log_probs(&nll, None)?)
}

/// The share of answers counting up that the model finds likelier than those counting down.
fn preference(model: &Decoder, prompts: &[[i64; PROMPT]]) -> Result<f32> {
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
    let config = Config::from_json(
        &serde_json::json!({
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "tie_word_embeddings": true,
        })
        .to_string(),
    )?;
    let model = |vars: &VarMap| {
        let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
        Decoder::new(config.clone(), vb)
    };
    let vars = VarMap::new();
    let policy = model(&vars)?;
    let optimizer = |lr: f64| {
        let params = ParamsAdamW {
            lr,
            ..ParamsAdamW::default()
        };
        AdamW::from_varmap(&vars, params)
    };

    let mut pretraining = optimizer(3e-3)?;
    for step in 1..=args.pretraining {
        let up: Vec<i64> = (0..BATCH)
            .map(|_| [1, -1][rng.random_range(0..2)])
            .collect();
        let (ids, labels) = batch(&prompts(&mut rng), |row| up[row])?;
        let loss = policy.loss(&ids, &labels, &Options::default())?.loss;
        pretraining.step(&backward(&loss)?)?;
        if step % 50 == 0 || step == 1 {
            println!(
                "pretraining step {step}: loss {:.3}",
                loss.to_scalar::<f32>()?
            );
        }
    }

    // The same weights, which stay.
    let reference_vars = VarMap::new();
    let reference = model(&reference_vars)?;
    for (name, var) in reference_vars
        .data()
        .lock()
        .expect("no panic before")
        .iter()
    {
        let trained = vars.data().lock().expect("no panic before")[name].copy()?;
        var.set(&trained)?;
    }

    let held_out = prompts(&mut rng);
    let before = preference(&policy, &held_out)?;
    println!(
        "before: counting up is likelier after {:.0}% of the prompts",
        before * 100.
    );
    let mut tuning = optimizer(3e-4)?;
    for step in 1..=args.steps {
        let prompts = prompts(&mut rng);
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
