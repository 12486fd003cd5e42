//! The memory of a forward and backward on the CPU, counted by the allocator: a binary of its own, and one test at a
//! time, so that nothing else allocates.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder};
use candle_cut_cross_entropy::ops::{attention, AttentionOptions};
use candle_cut_cross_entropy::soft_targets::{class_logits, divergence, Divergence, Teacher};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Entropy, Filter, Options, Strategy,
};
use candle_nn::{VarBuilder, VarMap};
use rand::{rngs::StdRng, Rng, SeedableRng};
use rand_distr::StandardNormal;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// Normal numbers that a seed decides.
fn normal(rng: &mut StdRng, std: f32, (rows, columns): (usize, usize)) -> Result<Tensor> {
    let numbers = rng.sample_iter::<f32, _>(StandardNormal);
    let numbers: Vec<f32> = numbers.take(rows * columns).map(|x| x * std).collect();
    Tensor::from_vec(numbers, (rows, columns), &Device::Cpu)
}

/// The system's allocator, with the bytes in use and the most there were.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    let now = IN_USE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(now, Relaxed);
}

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        System.alloc(layout)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        System.alloc_zeroed(layout)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        System.dealloc(pointer, layout)
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both blocks may exist for a moment.
        grow(size);
        let moved = System.realloc(pointer, layout, size);
        IN_USE.fetch_sub(layout.size(), Relaxed);
        moved
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: usize = 1 << 20;

/// Held by the test that counts.
static COUNTING: Mutex<()> = Mutex::new(());

#[test]
fn forward_and_backward_stay_within_the_workspace() -> Result<()> {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let (hidden, vocab) = (128, 32000);
    let device = &Device::Cpu;
    let mut too_much = Vec::new();
    let half = Filter::Threshold(1.3e-4);
    for (dtype, n, ignored, z_loss, filter, smoothing) in [
        (DType::F32, 512, false, false, Filter::Off, 0.),
        (DType::F32, 512, true, false, Filter::Auto, 0.),
        (DType::BF16, 512, false, false, Filter::Auto, 0.),
        // About half of the tiles are kept: rows are gathered.
        (DType::F32, 512, false, false, half, 0.),
        (DType::BF16, 512, true, false, half, 0.),
        // What the forward has formed does not fit this upstream gradient.
        (DType::F32, 512, false, true, Filter::Off, 0.),
        (DType::BF16, 512, false, true, Filter::Off, 0.),
        // Fewer rows than the filter keeps or skips together.
        (DType::F32, 1, false, false, Filter::Off, 0.),
        // With all else that can be asked for.
        (DType::F32, 512, true, false, Filter::Off, 0.1),
        (DType::BF16, 512, false, false, Filter::Auto, 0.1),
    ] {
        let mut rng = StdRng::seed_from_u64(1);
        let mut random = |rows: usize, std: f32| -> Result<Var> {
            Var::from_tensor(&normal(&mut rng, std, (rows, hidden))?.to_dtype(dtype)?)
        };
        let (embeddings, classifier) = (random(n, 1.)?, random(vocab, 0.05)?);
        let targets = (0..n as i64).map(|i| match i % 4 {
            0 if ignored => -100,
            _ => i * 61,
        });
        let targets = Tensor::from_iter(targets, device)?;
        let gradients = (n + vocab) * hidden * dtype.size_in_bytes();
        for strategy in [Strategy::Auto, Strategy::Recompute, Strategy::Fused] {
            for workspace in [64 * MIB, 16 * MIB, 2 * MIB] {
                let options = Options::default()
                    .strategy(strategy)
                    .filter(filter)
                    .label_smoothing(smoothing)
                    .predicted(smoothing > 0.)
                    .entropy(match smoothing {
                        0. => Entropy::Off,
                        _ => Entropy::Value,
                    })
                    .workspace(workspace);
                let before = IN_USE.load(Relaxed);
                PEAK.store(before, Relaxed);
                let output = linear_cross_entropy(&embeddings, &classifier, &targets, &options)?;
                let loss = match z_loss {
                    true => (output.loss + 1e-4 * output.lse.sqr()?.mean_all()?)?,
                    false => output.loss,
                };
                let grads = backward(&loss)?;
                let peak = PEAK.load(Relaxed) - before;
                assert!(grads.get(&classifier).is_some());
                // The gradients themselves are counted too: the count is not of nothing.
                assert!(peak > gradients);
                if peak - gradients > workspace + MIB {
                    too_much.push(format!(
                        "{dtype:?} rows {n} ignored {ignored} z-loss {z_loss} smoothing {smoothing} {strategy:?} {filter:?}: {:.1} MiB beyond \
                             the gradients, the workspace is {} MiB",
                        (peak - gradients) as f64 / MIB as f64,
                        workspace / MIB
                    ));
                }
            }
        }
    }
    assert!(too_much.is_empty(), "{}", too_much.join("\n"));
    Ok(())
}

#[test]
fn losses_on_one_head_share_its_gradient() -> Result<()> {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let (rows, hidden, vocab, losses) = (16, 128, 16000, 8);
    let mut rng = StdRng::seed_from_u64(2);
    let head = Var::from_tensor(&normal(&mut rng, 0.05, (vocab, hidden))?)?;
    let targets = Tensor::zeros(rows, DType::I64, &Device::Cpu)?;
    let options = Options::default()
        .strategy(Strategy::Recompute)
        .workspace(2 * MIB);
    let mut total = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for _ in 0..losses {
        let x = normal(&mut rng, 1., (rows, hidden))?;
        total = (total + linear_cross_entropy(&x, &head, &targets, &options)?.loss)?;
    }
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let gradients = backward(&total)?;
    let peak = PEAK.load(Relaxed) - before;
    assert!(gradients.get(&head).is_some());
    let one = vocab * hidden * 4;
    // The sum, a new gradient and the new sum.
    assert!(
        (2 * one..3 * one + 4 * MIB).contains(&peak),
        "{:.1} gradients",
        peak as f64 / one as f64
    );
    Ok(())
}

#[test]
fn checkpointed_layers_keep_their_inputs_only() -> Result<()> {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let (layers, batch, time, hidden) = (8, 4, 64, 64);
    let config = Config::from_json(&format!(
        r#"{{"model_type": "llama", "vocab_size": 64, "hidden_size": {hidden}, "intermediate_size": 256,
            "num_hidden_layers": {layers}, "num_attention_heads": 4}}"#
    ))?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let mut decoder = Decoder::new(config, vb)?;
    let ids = Tensor::zeros((batch, time), DType::U32, &Device::Cpu)?;
    let mut kept = |checkpointing| -> Result<usize> {
        decoder.set_gradient_checkpointing(checkpointing);
        let before = IN_USE.load(Relaxed);
        let loss = decoder.loss(&ids, &ids, &Options::default())?.loss;
        let kept = IN_USE.load(Relaxed) - before;
        backward(&loss)?;
        Ok(kept)
    };
    let (all, inputs) = (kept(false)?, kept(true)?);
    let input = batch * time * hidden * 4;
    // Inputs, the states around them, and the loss's own gradients; of all that, a layer alone keeps ten times as much.
    assert!(
        inputs < (layers + 8) * input,
        "{inputs} bytes, an input has {input}"
    );
    assert!(
        all > 10 * layers * input,
        "{all} bytes, an input has {input}"
    );
    Ok(())
}

#[test]
fn attention_takes_memory_that_grows_with_the_length() -> Result<()> {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let (length, heads, head_dim) = (4096, 4, 16);
    let random = || Var::randn(0f32, 1., (1, length, heads, head_dim), &Device::Cpu);
    let (q, k, v) = (random()?, random()?, random()?);
    let options = AttentionOptions {
        causal: true,
        ..AttentionOptions::default()
    };
    // A tile of scores and one of their gradients a thread.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let tiles = threads * 2 * 64 * length * 4;
    let allowed = 16 * MIB + tiles;
    let scores = heads * length * length * 4;
    assert!(allowed < scores, "{threads} threads: nothing is shown");
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let gradients = attention(&q, &k, &v, &options)?.sum_all()?.backward()?;
    assert!(gradients.get(&q).is_some());
    let peak = PEAK.load(Relaxed) - before;
    assert!(
        peak <= allowed,
        "{:.1} MiB, allowed {:.1}, scores would take {:.1}",
        peak as f64 / MIB as f64,
        allowed as f64 / MIB as f64,
        scores as f64 / MIB as f64
    );
    Ok(())
}

#[test]
fn distillation_takes_its_workspace() -> Result<()> {
    let _alone = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let (n, hidden, vocab) = (512, 128, 32000);
    let mut rng = StdRng::seed_from_u64(3);
    let e = Var::from_tensor(&normal(&mut rng, 1., (n, hidden))?)?;
    let c = Var::from_tensor(&normal(&mut rng, 0.1, (vocab, hidden))?)?;
    let teacher = Teacher::new(
        &normal(&mut rng, 1., (n, 64))?,
        &normal(&mut rng, 0.1, (vocab, 64))?,
    );
    let targets = Tensor::zeros(n, DType::U32, &Device::Cpu)?;
    let gradients = (n + vocab) * hidden * 4;
    let kind = Divergence::ForwardKl;
    for workspace in [64 * MIB, 8 * MIB] {
        for strategy in [Strategy::Fused, Strategy::Recompute] {
            let options = Options::default().workspace(workspace).strategy(strategy);
            let before = IN_USE.load(Relaxed);
            PEAK.store(before, Relaxed);
            let store = backward(&divergence(&e, &c, &targets, &teacher, kind, &options)?)?;
            let peak = PEAK.load(Relaxed) - before;
            assert!(store.get(&c).is_some() && peak > gradients);
            let beyond = peak - gradients;
            assert!(
                beyond <= workspace + MIB,
                "{strategy:?}: {beyond} bytes of {workspace}"
            );
        }
    }
    // The rows of the classifier that these classes have would take 2 GiB.
    let k = 8192;
    let classes: Vec<u32> = (0..n * k).map(|i| (i * 7 % vocab) as u32).collect();
    let classes = Tensor::from_vec(classes, (n, k), &Device::Cpu)?;
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let logits = class_logits(&e, &c, &classes, &Options::default())?;
    backward(&logits.sum_all()?)?;
    let peak = PEAK.load(Relaxed) - before;
    // Some numbers of every logit: itself, its copy, its gradient, and where its class comes up.
    assert!(peak - gradients < 12 * n * k * 4, "{peak} bytes");
    Ok(())
}
