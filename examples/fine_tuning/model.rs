//! The model of a run: its weights, its loss, and what it says.

use super::arguments::{Loss, Run};
use super::chat::Template;
use super::checkpoints::Checkpoint;
use super::data::Data;
use super::records::Chat;
use crate::common::tokens::{self, Batch, Encoder, Sequence, IGNORED};
use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_cut_cross_entropy::models::{generate, AdamW, CausalLm, Decoder, Group, Sampling};
use candle_cut_cross_entropy::{Options, Preset};
use candle_nn::{ParamsAdamW, VarMap};
use rand::{rngs::StdRng, Rng, SeedableRng};
use std::collections::BTreeMap;
use std::path::Path;

const NEW_TOKENS: usize = 48;

/// The decoder, at the start of the run or where it was saved, and what of it is trained.
pub fn load(
    run: &Run,
    base: &Path,
    saved: Option<&Checkpoint>,
    device: &Device,
) -> Result<(Decoder, VarMap)> {
    let mut vars = VarMap::new();
    let lora = run.lora();
    let weights = match (saved, &lora) {
        (Some(saved), None) => &saved.folder,
        _ => base,
    };
    let mut model = Decoder::load(weights, &vars, run.dtype(), device)?;
    if let Some(lora) = lora {
        vars = VarMap::new();
        model = model.with_lora(&lora, &vars)?;
        match saved {
            Some(saved) => vars.load(saved.adapters())?,
            None => seed_adapters(&vars, run.seed)?,
        }
    }
    model.set_gradient_checkpointing(run.gradient_checkpointing);
    Ok((model, vars))
}

/// Gives new adapters values that follow from the seed: those that Candle draws on the CPU do not.
fn seed_adapters(vars: &VarMap, seed: u64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    for (name, var) in by_name(vars) {
        if name.ends_with("lora_A.weight") {
            let bound = 1. / (var.dim(1)? as f32).sqrt();
            let values = (0..var.elem_count()).map(|_| rng.random_range(-bound..bound));
            let values = Tensor::from_iter(values, &Device::Cpu)?.reshape(var.shape())?;
            var.set(&values.to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
    }
    Ok(())
}

/// The variables in the order of their names: that of the map differs from run to run.
pub fn by_name(vars: &VarMap) -> BTreeMap<String, Var> {
    let vars = vars.data().lock().expect("no panic before");
    vars.clone().into_iter().collect()
}

/// The optimizer of all variables, each in the first group of `--group` that names it.
pub fn optimizer(run: &Run, vars: &VarMap) -> Result<AdamW> {
    let params = ParamsAdamW {
        beta1: run.beta1,
        beta2: run.beta2,
        weight_decay: run.weight_decay,
        ..ParamsAdamW::default()
    };
    let named = by_name(vars);
    let groups = run.groups()?;
    for (part, _) in &groups {
        ensure!(
            named.keys().any(|name| name.contains(part)),
            "--group {part}: none of the trained tensors has that in its name; the first is {}",
            named.keys().next().map_or("none", String::as_str)
        );
    }
    let optimizer = AdamW::with_groups(vars, params.clone(), |name, var| {
        let usual = Group::of(var, &params);
        let named = groups.iter().find(|(part, _)| name.contains(part));
        named.map_or(usual, |(_, (factor, decay))| Group {
            lr_factor: *factor,
            weight_decay: decay.unwrap_or(usual.weight_decay),
        })
    })?;
    Ok(optimizer)
}

/// The sum of the losses of all positions that count, each times its weight.
pub fn summed_loss(model: &Decoder, run: &Run, sequences: &[&Sequence]) -> Result<Tensor> {
    let batch = match run.packing {
        true => Batch::packed(sequences, model.device())?,
        false => Batch::padded(sequences, model.device())?,
    };
    let preset = match run.loss {
        Loss::Cce => Preset::Cce,
        Loss::CceKahanFullC => Preset::CceKahanFullC,
        Loss::Exact => Preset::CceExact,
        Loss::Native => Preset::Native,
        Loss::Baseline => return stored_logits_loss(model, &batch),
    };
    let mut options = Options::preset(preset);
    if let Some(filter) = &run.filter {
        options = options.filter(filter.parse()?);
    }
    Ok(batch.summed_loss(model, &options)?)
}

/// The same by Candle's own loss, which has no label to ignore: the positions that count are chosen.
fn stored_logits_loss(model: &Decoder, batch: &Batch) -> Result<Tensor> {
    if batch.weights.is_some() {
        bail!("the data has weights, which --loss baseline does not know")
    }
    let (ids, last) = (&batch.ids, batch.ids.rank() - 1);
    let steps = ids.dim(last)? - 1;
    let hidden = batch
        .hidden_states(model)?
        .narrow(last, 0, steps)?
        .flatten_to(last)?;
    let labels = batch.labels.narrow(last, 1, steps)?.flatten_all()?;
    let (rows, targets): (Vec<u32>, Vec<i64>) = (0..)
        .zip(labels.to_vec1::<i64>()?)
        .filter(|&(_, label)| label != IGNORED)
        .unzip();
    let count = rows.len() as f64;
    let rows = Tensor::new(rows, ids.device())?;
    let targets = Tensor::new(targets, ids.device())?;
    let logits = model.logits(&hidden.index_select(&rows, 0)?)?;
    let mean = candle_nn::loss::cross_entropy(&logits.to_dtype(DType::F32)?, &targets)?;
    Ok((mean * count)?)
}

/// The mean loss of all positions that count, by their weights; `None` of no sequences.
pub fn evaluate(model: &Decoder, run: &Run, sequences: &[Sequence]) -> Result<Option<f64>> {
    if sequences.is_empty() {
        return Ok(None);
    }
    let (mut sum, mut weight) = (0., 0.);
    let mut all: Vec<&Sequence> = sequences.iter().collect();
    // Like lengths side by side need little padding.
    all.sort_by_key(|sequence| sequence.ids.len());
    for batch in all.chunks(run.batch) {
        sum += f64::from(summed_loss(model, run, batch)?.to_scalar::<f32>()?);
        weight += batch.iter().map(|s| s.weight()).sum::<f64>();
    }
    let mean = sum / weight;
    ensure!(
        mean.is_finite(),
        "the loss of the validation data is {mean}; try a lower --learning-rate"
    );
    Ok(Some(mean))
}

/// The tokens of a prompt, in the form of the data.
pub fn prompt(
    text: &str,
    data: &Data,
    encoder: &Encoder,
    template: Option<&Template>,
) -> Result<Vec<u32>> {
    let ids = match template.filter(|_| data.has_chats()) {
        Some(template) => {
            let messages = [serde_json::json!({"role": "user", "content": text})];
            let rendered = template.render(&messages, &Chat::default(), true)?;
            encoder.encode(&rendered.text)?
        }
        None => encoder.encode_from_begin(&data.prompt(text))?,
    };
    ensure!(!ids.is_empty(), "--prompt {text:?} is no token");
    Ok(ids)
}

/// How the model goes on after these tokens, the likeliest or another way.
pub fn answer(
    model: &Decoder,
    encoder: &Encoder,
    prompt: &[u32],
    temperature: f64,
) -> Result<String> {
    let room = tokens::max_positions(model.config())?
        .map_or(NEW_TOKENS, |most| most.saturating_sub(prompt.len()));
    let sampling = Sampling {
        max_new_tokens: NEW_TOKENS.min(room),
        temperature,
        stop: encoder.ends().to_vec(),
        ..Sampling::default()
    };
    let answer = generate(model, prompt, &sampling)?;
    Ok(encoder.decode(&answer)?.trim_end().to_owned())
}

/// Prints how the model goes on after a sequence's prompt, or after its first half.
pub fn show(model: &Decoder, encoder: &Encoder, sequence: &Sequence) -> Result<()> {
    let first = sequence.weights.iter().position(|&weight| weight > 0.);
    let first = first.context("a sequence without anything to learn")?;
    let prompt = match first {
        0 => sequence.ids.len() / 2,
        first => first,
    };
    let (prompt, text) = sequence.ids.split_at(prompt);
    // An instruction has a likeliest answer; the likeliest text of a small model goes in circles.
    let temperature = if first > 0 { 0. } else { 0.7 };
    println!("--- after\n{}", encoder.decode(prompt)?.trim_end());
    println!("--- the data says\n{}", encoder.decode(text)?.trim_end());
    let answer = answer(model, encoder, prompt, temperature)?;
    println!("--- the model says\n{answer}\n---");
    Ok(())
}
