//! The run: from the first look at the files to the fine-tuned model.

use super::arguments::Args;
use super::chat::Template;
use super::checkpoints::{self, Checkpoint, State};
use super::data::Rules;
use super::files::{self, Output};
use super::model;
use super::split::Sources;
use crate::common::tokens::{self, Encoder, Sequence};
use crate::common::{files as inputs, meter, plot, training};
use anyhow::{bail, ensure, Context, Result};
use candle_core::Tensor;
use candle_cut_cross_entropy::backward;
use candle_cut_cross_entropy::models::{clip_gradients, Accumulator, AdamW, Config, Decoder};
use candle_nn::{Optimizer, VarMap};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: f64 = (1 << 20) as f64;
/// Steps from one line of progress to the next where nobody sees the bar.
const LOG_EVERY: usize = 10;

/// What the steps need.
struct Setup<'a> {
    args: &'a Args,
    output: &'a Output,
    model: Decoder,
    frozen: Decoder,
    vars: VarMap,
    encoder: Encoder,
    train: Vec<Sequence>,
    validation: Vec<Sequence>,
    /// The texts of `--prompt` and their tokens.
    prompts: Vec<(&'a str, Vec<u32>)>,
}

/// How fast the steps of this process were.
#[derive(Default)]
struct Speed {
    tokens: usize,
    time: Duration,
}

impl Speed {
    fn per_second(&self) -> f64 {
        self.tokens as f64 / self.time.as_secs_f64()
    }
}

pub fn run(args: &Args) -> Result<()> {
    args.check()?;
    let run = &args.run;
    let device = run.device()?;
    let arguments = run.as_map()?;
    let saved = saved(args)?;
    let sources = Sources::read(run)?;
    let output = Output::prepare(&args.output, run, &checkpoints::folders(&args.output)?)?;
    let base = files::base(run, &output, &sources.data.texts(), saved.is_some())?;
    let weights = inputs::fingerprint(&base)?;

    let config = Config::from_file(base.join("config.json"))?;
    tokens::check_length(run.length, &config)?;
    let encoder = Encoder::load(&base, &config)?;
    let template = Template::load(&base, run.chat_template.as_deref())?;
    let rules = Rules {
        encoder: &encoder,
        template: template.as_ref(),
        learn: run.learn,
        length: run.length,
        strict: args.strict,
    };
    let split = sources.split(run, &rules)?;
    println!("{}", split.describe());
    for skipped in &split.skipped {
        println!("{skipped}");
    }
    let steps = args.total_steps(split.train.len())?;
    let prompts = args
        .prompt
        .iter()
        .map(|text| {
            Ok((
                &**text,
                model::prompt(text, &sources.data, &encoder, template.as_ref())?,
            ))
        })
        .collect::<Result<_>>()?;

    let meter = meter::Meter::new(&device)?;
    meter.start()?;
    let (model, vars) = model::load(run, &base, saved.as_ref(), &device)?;
    let mut optimizer = model::optimizer(run, &vars)?;
    let frozen = model.frozen()?;
    let mut state = match saved {
        Some(saved) => {
            let folder = saved.folder.display();
            let done = saved.state.step;
            ensure!(
                saved.state.data == split.fingerprint,
                "the data of --data, or its tokens, are others than in {folder}"
            );
            ensure!(
                saved.state.base == weights,
                "the weights in {} are others than those that {folder} began with",
                base.display()
            );
            ensure!(
                steps >= done,
                "{folder} has {done} steps done, more than the {steps} of --steps or --epochs"
            );
            saved.load_optimizer(&mut optimizer)?;
            match steps == done {
                true => println!("all {steps} steps of {folder} are done; more --steps go on"),
                false => println!("going on from {folder} to step {steps}"),
            }
            State {
                steps,
                ..saved.state
            }
        }
        None => {
            checkpoints::clear(&output.folder, None)?;
            State {
                step: 0,
                steps,
                base: weights,
                run: arguments,
                data: split.fingerprint,
                train: Vec::new(),
                validation: Vec::new(),
            }
        }
    };
    let mut setup = Setup {
        args,
        output: &output,
        model,
        frozen,
        vars,
        encoder,
        train: split.train,
        validation: split.validation,
        prompts,
    };
    if state.step == 0 {
        let loss = model::evaluate(&setup.frozen, run, &setup.validation)?;
        state.validation.extend(loss.map(|loss| (0, loss)));
    }
    let count: usize = setup.model.tensors().values().map(Tensor::elem_count).sum();
    let trained: usize = setup
        .vars
        .all_vars()
        .iter()
        .map(|var| var.elem_count())
        .sum();
    println!(
        "{:.1} million parameters, {:.1} million of them trained{}",
        count as f64 / 1e6,
        trained as f64 / 1e6,
        match state.validation.first() {
            Some((_, loss)) => format!(", validation perplexity before {:.2}", loss.exp()),
            None => String::new(),
        }
    );
    let speed = setup.steps(&mut state, &mut optimizer)?;
    let peak = meter.peak()?;
    setup.finish(&base, &state)?;
    for skipped in &split.skipped {
        println!("{skipped}");
    }
    if speed.tokens > 0 {
        println!(
            "peak memory {:.0} MiB, {:.0} tokens/s",
            peak as f64 / MIB,
            speed.per_second()
        );
    }
    println!("{}", summary(&state));
    Ok(())
}

/// The checkpoint to go on from, if any.
fn saved(args: &Args) -> Result<Option<Checkpoint>> {
    let newest = Checkpoint::newest(&args.output)?;
    let Some(saved) = newest else {
        if args.resume {
            println!("no checkpoint in {}: from the start", args.output.display());
        }
        return Ok(None);
    };
    if args.resume {
        saved.check_run(&args.run.as_map()?)?;
        return Ok(Some(saved));
    }
    if saved.state.step < saved.state.steps {
        bail!(
            "{} is of a run that was interrupted: go on with --resume, remove it, or choose another --output",
            saved.folder.display()
        )
    }
    Ok(None)
}

fn summary(state: &State) -> String {
    let ends = |curve: &[(usize, f64)]| Some((curve.first()?.1, curve.last()?.1));
    let mut parts = Vec::new();
    if let Some((first, last)) = ends(&state.train) {
        parts.push(format!("train loss {first:.6} -> {last:.6}"));
    }
    if let Some((first, last)) = ends(&state.validation) {
        let (first, last) = (first.exp(), last.exp());
        parts.push(format!("validation perplexity {first:.2} -> {last:.2}"));
    }
    parts.join(", ")
}

impl Setup<'_> {
    fn steps(&mut self, state: &mut State, optimizer: &mut AdamW) -> Result<Speed> {
        let run = &self.args.run;
        // Their order decides the rounding of the norm.
        let variables: Vec<_> = model::by_name(&self.vars).into_values().collect();
        let mut accumulator = Accumulator::new(variables.clone());
        let style = "{bar:40} {pos}/{len} steps, {elapsed} of about {duration}, {msg}";
        let bar = ProgressBar::new(state.steps as u64)
            .with_position(state.step as u64)
            .with_style(ProgressStyle::with_template(style)?);
        let seen = std::io::stderr().is_terminal();
        let log_every = self.args.log_every.or((!seen).then_some(LOG_EVERY));
        let validate_every = self.args.validate_every.unwrap_or(state.steps.div_ceil(5));
        let warm_up = run.warm_up.unwrap_or(state.steps.div_ceil(15));
        let mut metrics = self.output.metrics(state.step)?;
        let mut speed = Speed::default();
        while state.step < state.steps {
            let started = Instant::now();
            let size = run.batch * run.accumulate;
            let indices = training::batch_indices(state.step, size, self.train.len(), run.seed);
            let mut sequences: Vec<_> = indices.into_iter().map(|i| &self.train[i]).collect();
            // Like lengths side by side need little padding.
            sequences.sort_by_key(|sequence| sequence.ids.len());
            let positions = sequences.iter().map(|s| s.positions()).sum::<usize>();
            let weight = sequences.iter().map(|s| s.weight()).sum::<f64>();
            let mut sum = 0.;
            for (i, batch) in sequences.chunks(run.batch).enumerate() {
                // Another seed for every batch of the run.
                let seed = run.seed ^ ((state.step * run.accumulate + i) as u64).rotate_left(32);
                self.model.set_dropout_seed(Some(seed));
                let loss = model::summed_loss(&self.model, run, batch)?;
                accumulator.add(backward(&loss)?)?;
                sum += f64::from(loss.to_scalar::<f32>()?);
            }
            let gradients = accumulator.take(1. / weight)?;
            let mut gradients = gradients.context("no gradients")?;
            let norm = clip_gradients(&mut gradients, &variables, run.clip)?;
            let loss = sum / weight;
            let factor = run.schedule.factor(state.step, state.steps, warm_up);
            let rate = run.learning_rate() * factor;
            state.step += 1;
            let step = state.step;
            ensure!(
                loss.is_finite() && norm.is_finite(),
                "step {step}: loss {loss}, norm of the gradients {norm}; try a lower --learning-rate"
            );
            optimizer.set_learning_rate(rate);
            optimizer.step(&gradients)?;
            state.train.push((step, loss));
            let tokens = sequences.iter().map(|s| s.ids.len()).sum::<usize>();
            speed.tokens += tokens;
            speed.time += started.elapsed();
            metrics.add(&json!({
                "step": step, "loss": loss, "gradient_norm": norm, "learning_rate": rate,
                "tokens": tokens, "learnt_tokens": positions, "seconds": started.elapsed().as_secs_f64(),
            }))?;
            bar.inc(1);
            bar.set_message(format!(
                "loss {loss:.3}, {:.0} tokens/s",
                speed.per_second()
            ));
            let last = step == state.steps;
            if log_every.is_some_and(|every| step.is_multiple_of(every) || last) {
                let left = speed.time.as_secs_f64() / speed.tokens as f64
                    * (tokens * (state.steps - step)) as f64;
                bar.suspend(|| {
                    println!(
                        "step {step}/{}  loss {loss:.4}  norm {norm:.3}  rate {rate:.2e}  {:.0} tokens/s  {} left",
                        state.steps,
                        speed.per_second(),
                        clock(left)
                    )
                });
            }
            if step.is_multiple_of(validate_every) || last {
                bar.suspend(|| self.validate(state, &mut metrics))?;
            }
            if step.is_multiple_of(self.args.save_every) || last {
                let adapters = run.lora().is_some();
                checkpoints::save(&self.output.folder, state, &self.model, adapters, optimizer)?;
            }
        }
        bar.finish_and_clear();
        Ok(speed)
    }

    /// The loss on the validation data, and what the model says.
    fn validate(&self, state: &mut State, metrics: &mut files::Metrics) -> Result<()> {
        let step = state.step;
        if let Some(loss) = model::evaluate(&self.frozen, &self.args.run, &self.validation)? {
            state.validation.push((step, loss));
            metrics.add(&json!({"step": step, "validation_loss": loss}))?;
            println!(
                "step {step}/{}  validation loss {loss:.4}  perplexity {:.2}",
                state.steps,
                loss.exp()
            );
        }
        for (text, prompt) in &self.prompts {
            let answer = model::answer(&self.frozen, &self.encoder, prompt, 0.)?;
            println!("--- {text}\n{answer}\n---");
        }
        Ok(())
    }

    /// Leaves the model, the adapters, the picture, and a look at what was learnt.
    fn finish(&self, base: &Path, state: &State) -> Result<()> {
        let output = self.output;
        self.model.save(&output.model)?;
        if self.args.run.lora().is_some() {
            self.model.save_adapters(&output.adapter)?;
        }
        files::copy_tokenizer(base, &output.model)?;
        plot::draw(&output.picture, &state.train, &state.validation)
            .with_context(|| format!("drawing {}", output.picture.display()))?;
        if self.prompts.is_empty() {
            let sequence = self.validation.first().or(self.train.first());
            model::show(
                &self.frozen,
                &self.encoder,
                sequence.context("no sequence")?,
            )?;
        }
        println!(
            "fine-tuned model in {}, loss curve in {}",
            output.model.display(),
            output.picture.display()
        );
        Ok(())
    }
}

/// Hours, minutes and seconds.
fn clock(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    format!(
        "{}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}
