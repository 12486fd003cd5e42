//! What a decoder computes: gradients, windows, tokens, what it learns and says.

use crate::common::{
    assert_close, assert_gradients, error, exact, expected, folder, load, norm, small, values,
    CASES,
};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::{
    clip_gradients, generate, CausalLm, Config, Decoder, Family, Sampling,
};
use candle_cut_cross_entropy::{backward, Options};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use serde_json::json;

#[test]
fn every_new_weight_of_every_family_gets_a_gradient() -> Result<()> {
    for family in Family::ALL {
        let config = Config::from_json(&small(family.model_type(), json!({})).to_string())?;
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let decoder = Decoder::new(config, vb)?;
        assert_eq!(vars.all_vars().len(), decoder.tensors().len());
        let ids = Tensor::new(&[[3u32, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], &Device::Cpu)?;
        let loss = decoder.loss(&ids, &ids, &exact())?.loss;
        assert_gradients(family.model_type(), &decoder, &loss.backward()?);
    }
    Ok(())
}

#[test]
fn a_gradient_is_the_slope_of_the_loss() -> Result<()> {
    for case in ["phi3_long", "gemma2", "gemma3"] {
        let vars = VarMap::new();
        let decoder = Decoder::load(folder(case), &vars, DType::F64, &Device::Cpu)?;
        let expected = expected(case)?;
        let loss = || decoder.loss(&expected["ids"], &expected["labels"], &exact());
        let gradients = loss()?.loss.backward()?;
        let named = vars.data().lock().unwrap().clone();
        for (name, var) in &named {
            let direction = var.randn_like(0., 1.)?;
            let gradient = gradients.get(var).expect("a gradient");
            let slope = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
            let (at, step) = (var.copy()?, 1e-5);
            let at_step = |step: f64| -> Result<f64> {
                var.set(&(&at + (&direction * step)?)?)?;
                // The loss is f32: summed over what it is the mean of, in f64, it would be finer.
                let hidden = decoder.hidden_states(&expected["ids"])?;
                f64_loss(&decoder, &hidden, &expected["labels"])
            };
            let measured = (at_step(step)? - at_step(-step)?) / (2. * step);
            var.set(&at)?;
            let difference = (slope - measured).abs() / measured.abs().max(1e-2);
            assert!(
                difference < 1e-4,
                "{case} {name}: slope {slope}, measured {measured}"
            );
        }
    }
    Ok(())
}

/// The loss from stored logits, in f64.
fn f64_loss(decoder: &Decoder, hidden: &Tensor, labels: &Tensor) -> Result<f64> {
    let logits = decoder.logits(hidden)?.to_vec3::<f64>()?;
    let labels = labels.to_vec2::<i64>()?;
    let (mut sum, mut count) = (0., 0.);
    for (logits, labels) in logits.iter().zip(&labels) {
        for (row, &label) in logits.iter().zip(&labels[1..]) {
            if label >= 0 {
                let lse = row.iter().map(|z| z.exp()).sum::<f64>().ln();
                sum += lse - row[label as usize];
                count += 1.;
            }
        }
    }
    Ok(sum / count)
}

#[test]
fn a_position_sees_its_window_and_nothing_after_it() -> Result<()> {
    // One layer, so that a window is not carried on by the next.
    let window = json!({"sliding_window": 3, "num_hidden_layers": 1});
    let config = Config::from_json(&small("mistral", window).to_string())?;
    let vars = VarMap::new();
    let decoder = Decoder::new(
        config,
        VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu),
    )?;
    let states = |ids: [u32; 8]| -> Result<Vec<Vec<f32>>> {
        let ids = Tensor::new(&[ids], &Device::Cpu)?;
        decoder.hidden_states(&ids)?.squeeze(0)?.to_vec2()
    };
    let before = states([1, 2, 3, 4, 5, 6, 7, 8])?;
    let after = states([1, 2, 9, 4, 5, 6, 7, 8])?;
    let changed: Vec<usize> = (0..8).filter(|&t| before[t] != after[t]).collect();
    assert_eq!(changed, [2, 3, 4]);
    Ok(())
}

#[test]
fn training_on_a_text_learns_it() -> Result<()> {
    let (decoder, vars) = load("qwen3")?;
    let ids = expected("qwen3")?["ids"].clone();
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-2)?;
    let mut losses = Vec::new();
    for _ in 0..40 {
        let loss = decoder.loss(&ids, &ids, &Options::default())?.loss;
        losses.push(loss.to_scalar::<f32>()?);
        let mut gradients = backward(&loss)?;
        clip_gradients(&mut gradients, &vars.all_vars(), 1.)?;
        optimizer.step(&gradients)?;
    }
    assert!(losses[39] < 0.1 * losses[0], "{losses:?}");
    let text: Vec<u32> = ids.get(0)?.to_dtype(DType::U32)?.to_vec1()?;
    let sampling = Sampling {
        max_new_tokens: 10,
        ..Sampling::default()
    };
    assert_eq!(generate(&decoder, &text[..10], &sampling)?, text[10..]);
    Ok(())
}

/// Of every family: with windows, without angles, and with angles that change at a length.
#[test]
fn a_continuation_has_the_logits_of_the_whole() -> Result<()> {
    for case in CASES {
        let (decoder, _) = load(case)?;
        let vocab = decoder.config().vocab_size as u32;
        let tokens: Vec<u32> = (0..24).map(|i| (i * i * 7 + 3) % vocab).collect();
        let mut continuation = decoder.continuation()?;
        // The prompt at once, then one by one, then two.
        let ends: Vec<usize> = [5].into_iter().chain(6..=20).chain([22, 24]).collect();
        let mut start = 0;
        for end in ends {
            let got = continuation.next_token_logits(&tokens[start..end])?;
            let ids = Tensor::new(&tokens[..end], &Device::Cpu)?.unsqueeze(0)?;
            let want = decoder.next_token_logits(&ids)?.squeeze(0)?;
            assert_close(&format!("{case} {end}"), &got, &want, 1e-5);
            start = end;
        }
    }
    let (decoder, _) = load("llama")?;
    let mut continuation = decoder.continuation()?;
    let message = error(continuation.next_token_logits(&[]));
    assert!(message.contains("no tokens"), "{message}");
    let logits = continuation.next_token_logits(&[1, 2])?;
    assert!(!logits.track_op());
    let message = error(continuation.next_token_logits(&[u32::MAX]));
    assert!(message.contains("outside the vocabulary"), "{message}");
    // What failed left nothing behind.
    let got = continuation.next_token_logits(&[3])?;
    let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?;
    let want = decoder.next_token_logits(&ids)?.squeeze(0)?;
    assert_close("after an error", &got, &want, 1e-5);
    Ok(())
}

#[test]
fn generation_takes_the_likeliest_token_or_draws_by_the_seed() -> Result<()> {
    let (decoder, _) = load("gemma2")?;
    let prompt = [1u32, 5, 9];
    let greedy = |n, stop: Vec<u32>| {
        let sampling = Sampling {
            max_new_tokens: n,
            stop,
            ..Sampling::default()
        };
        generate(&decoder, &prompt, &sampling)
    };
    let tokens = greedy(4, vec![])?;
    let ids = Tensor::new(&prompt, &Device::Cpu)?.unsqueeze(0)?;
    let likeliest = decoder
        .next_token_logits(&ids)?
        .argmax(1)?
        .to_vec1::<u32>()?;
    assert_eq!((tokens.len(), tokens[0]), (4, likeliest[0]));
    let until = tokens.iter().position(|t| *t == tokens[2]).unwrap() + 1;
    assert_eq!(greedy(4, vec![tokens[2]])?, tokens[..until]);

    let drawn = |seed| {
        let sampling = Sampling {
            max_new_tokens: 12,
            temperature: 2.,
            seed,
            stop: vec![],
        };
        generate(&decoder, &prompt, &sampling)
    };
    assert_eq!(drawn(1)?, drawn(1)?);
    assert_ne!(drawn(1)?, drawn(2)?);
    let message = error(generate(&decoder, &[], &Sampling::default()));
    assert!(message.contains("prompt is empty"), "{message}");
    let none = Tensor::zeros((1, 0), DType::U32, &Device::Cpu)?;
    let message = error(decoder.hidden_states(&none));
    assert!(message.contains("no tokens"), "{message}");
    Ok(())
}

#[test]
fn tokens_outside_the_vocabulary_are_named() -> Result<()> {
    let (decoder, _) = load("gemma2")?;
    let cpu = &Device::Cpu;
    for (ids, named) in [
        (
            Tensor::new(&[[1u32, 32]], cpu)?,
            "token 32 is outside the vocabulary of 32",
        ),
        (Tensor::new(&[[1, u32::MAX]], cpu)?, "token 4294967295"),
        (
            Tensor::new(&[[1, i64::MAX]], cpu)?,
            "token 9223372036854775807",
        ),
        (Tensor::new(&[[1i64, -1]], cpu)?, "token -1"),
        (Tensor::new(&[[1i64, 1 << 32]], cpu)?, "token 4294967296"),
        (Tensor::new(&[[1u8, 255]], cpu)?, "token 255"),
        (
            Tensor::new(&[[1f32, 2.]], cpu)?,
            "must be integers, got F32",
        ),
    ] {
        let message = error(decoder.hidden_states(&ids));
        assert!(message.contains(named), "{named}: {message}");
    }
    // The last of the vocabulary is one, in every dtype: 255 of 256 in u8 too.
    let config = json!({"vocab_size": 256, "num_hidden_layers": 1});
    let config = Config::from_json(&small("llama", config).to_string())?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, cpu);
    let decoder = Decoder::new(config, vb)?;
    let want = decoder.hidden_states(&Tensor::new(&[[7i64, 255]], cpu)?)?;
    assert!(norm(&want.narrow(1, 1, 1)?)? > 0.);
    for ids in [
        Tensor::new(&[[7u8, 255]], cpu)?,
        Tensor::new(&[[7u32, 255]], cpu)?,
    ] {
        assert_eq!(values(&decoder.hidden_states(&ids)?)?, values(&want)?);
    }
    Ok(())
}
