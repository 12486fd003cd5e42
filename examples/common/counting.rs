//! A world of answers that count up or down from the prompt's last token, and a small decoder that has learnt both
//! alike.

use super::training;
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_cut_cross_entropy::models::{AdamW, CausalLm, Decoder};
use candle_cut_cross_entropy::{backward, Options};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use rand::{rngs::StdRng, Rng};

pub const VOCAB: i64 = 64;
pub const PROMPT: usize = 4;
pub const ANSWER: usize = 6;
pub const BATCH: usize = 32;
pub const IGNORED: i64 = -100;
const HIDDEN: usize = 64;
const LAYERS: usize = 2;

pub type Prompt = [i64; PROMPT];

pub fn prompts(count: usize, rng: &mut StdRng) -> Vec<Prompt> {
    (0..count)
        .map(|_| std::array::from_fn(|_| rng.random_range(0..VOCAB)))
        .collect()
}

/// The token that is `steps` from another.
pub fn counted_on(token: i64, steps: i64) -> i64 {
    (token + steps).rem_euclid(VOCAB)
}

/// Token ids and labels `(prompts, PROMPT + ANSWER)` of answers that count by these steps. The prompt is not learnt.
pub fn batch(prompts: &[Prompt], step: impl Fn(usize) -> i64) -> Result<(Tensor, Tensor)> {
    let (mut ids, mut labels) = (Vec::new(), Vec::new());
    for (row, prompt) in prompts.iter().enumerate() {
        ids.extend(prompt);
        labels.extend([IGNORED; PROMPT]);
        for i in 1..=ANSWER as i64 {
            let token = counted_on(prompt[PROMPT - 1], i * step(row));
            ids.push(token);
            labels.push(token);
        }
    }
    let shape = (prompts.len(), PROMPT + ANSWER);
    let tensor = |values| Tensor::from_vec(values, shape, &Device::Cpu);
    Ok((tensor(ids)?, tensor(labels)?))
}

/// `BATCH` answers that count up or down.
pub fn either_way(rng: &mut StdRng) -> Result<(Tensor, Tensor)> {
    let steps: Vec<i64> = (0..BATCH)
        .map(|_| [1, -1][rng.random_range(0..2)])
        .collect();
    batch(&prompts(BATCH, rng), |row| steps[row])
}

/// A decoder of this size with new weights.
pub fn new_decoder(hidden: usize, layers: usize, seed: u64) -> Result<(Decoder, VarMap)> {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": true,
    });
    training::new_decoder(&config.to_string(), seed)
}

pub fn optimizer(vars: &VarMap, lr: f64) -> Result<AdamW> {
    let params = ParamsAdamW {
        lr,
        ..ParamsAdamW::default()
    };
    Ok(AdamW::from_varmap(vars, params)?)
}

/// A decoder of two layers and hidden size 64 that has learnt, in so many steps, that answers count up or down.
pub fn pretrained(steps: usize, seed: u64, rng: &mut StdRng) -> Result<(Decoder, VarMap)> {
    let (decoder, vars) = new_decoder(HIDDEN, LAYERS, seed)?;
    let mut optimizer = optimizer(&vars, 3e-3)?;
    for step in 1..=steps {
        let (ids, labels) = either_way(rng)?;
        let loss = decoder.loss(&ids, &labels, &Options::default())?.loss;
        optimizer.step(&backward(&loss)?)?;
        if step % 50 == 0 || step == 1 {
            let loss = loss.to_scalar::<f32>()?;
            println!("pretraining step {step}: loss {loss:.3}");
        }
    }
    Ok((decoder, vars))
}

/// A decoder with the weights of a [`pretrained`] one, which stay when those are trained.
pub fn copied(vars: &VarMap) -> Result<Decoder> {
    let (decoder, copies) = new_decoder(HIDDEN, LAYERS, 0)?;
    let vars = vars.data().lock().expect("no panic before");
    for (name, copy) in copies.data().lock().expect("no panic before").iter() {
        copy.set(&vars[name].copy()?)?;
    }
    Ok(decoder)
}
