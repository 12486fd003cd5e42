//! Sequences that lie end to end, and the dropout of adapters.

use crate::common::{assert_close, error, exact, load, load_as, values, CASES};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::{CausalLm, Decoder, Lora};
use candle_cut_cross_entropy::{backward, Reduction};
use candle_nn::VarMap;

const LENGTHS: [usize; 4] = [7, 1, 12, 7];

/// Tokens of sequences of these lengths, and labels of which each sequence's first is ignored.
fn packed() -> Result<(Tensor, Tensor)> {
    let count = LENGTHS.iter().sum::<usize>() as i64;
    let ids: Vec<i64> = (0..count).map(|i| (i * i + 3) % 29 + 1).collect();
    let mut labels = ids.clone();
    let mut start = 0;
    for length in LENGTHS {
        labels[start] = -100;
        start += length;
    }
    let cpu = &Device::Cpu;
    Ok((Tensor::new(ids, cpu)?, Tensor::new(labels, cpu)?))
}

fn packed_loss(decoder: &Decoder) -> Result<Tensor> {
    let (ids, labels) = packed()?;
    let hidden = decoder.packed_hidden_states(&ids, &LENGTHS)?;
    let options = exact().reduction(Reduction::Sum);
    Ok(decoder.head(&options)?.forward(&hidden, &labels)?.loss)
}

#[test]
fn packed_sequences_are_as_each_alone() -> Result<()> {
    for case in CASES {
        let (mut decoder, _vars) = load(case)?;
        let (ids, labels) = packed()?;
        let hidden = decoder.packed_hidden_states(&ids, &LENGTHS)?;
        let options = exact().reduction(Reduction::Sum);
        let (mut start, mut sum) = (0, Tensor::zeros((), DType::F32, &Device::Cpu)?);
        for length in LENGTHS {
            let part = |x: &Tensor| x.narrow(0, start, length)?.unsqueeze(0);
            let alone = decoder.hidden_states(&part(&ids)?)?;
            assert_close(case, &part(&hidden)?, &alone, 1e-5);
            if length > 1 {
                sum = (sum + decoder.loss(&part(&ids)?, &part(&labels)?, &options)?.loss)?;
            }
            start += length;
        }
        let want = backward(&sum)?;
        for checkpointing in [false, true] {
            decoder.set_gradient_checkpointing(checkpointing);
            let loss = packed_loss(&decoder)?;
            assert_close(case, &loss, &sum, 1e-5);
            let got = backward(&loss)?;
            for (name, tensor) in decoder.tensors() {
                let (got, want) = (got.get(tensor).unwrap(), want.get(tensor).unwrap());
                assert_close(&format!("{case} {name}"), got, want, 1e-4);
            }
        }
    }
    Ok(())
}

#[test]
fn lengths_that_do_not_fit_are_named() -> Result<()> {
    let (decoder, _vars) = load("llama")?;
    let ids = Tensor::new(&[1u32, 2, 3], &Device::Cpu)?;
    for lengths in [&[1, 1][..], &[2, 0, 1], &[], &[4]] {
        let message = error(decoder.packed_hidden_states(&ids, lengths));
        assert!(
            message.contains(&format!("{lengths:?} in 3 tokens")),
            "{message}"
        );
    }
    Ok(())
}

/// A decoder with adapters that matter, and its variables.
fn adapted(dropout: f64, dtype: DType) -> Result<(Decoder, VarMap)> {
    let (base, _weights) = load_as("llama", dtype)?;
    let vars = VarMap::new();
    let lora = Lora {
        rank: 3,
        dropout,
        ..Lora::default()
    };
    let decoder = base.with_lora(&lora.with_head(), &vars)?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        let values = (0..var.elem_count()).map(|i| 0.2 * ((i + name.len()) as f32).sin());
        let values = Tensor::from_iter(values, &Device::Cpu)?.reshape(var.shape())?;
        var.set(&values.to_dtype(dtype)?)?;
    }
    Ok((decoder, vars))
}

#[test]
fn dropout_follows_from_the_seed_and_is_off_without_one() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let (mut decoder, _vars) = adapted(0.5, dtype)?;
        let (without, _vars) = adapted(0., dtype)?;
        let loss = |decoder: &Decoder| values(&packed_loss(decoder)?);
        assert_eq!(loss(&decoder)?, loss(&without)?);
        decoder.set_dropout_seed(Some(1));
        let (first, again) = (loss(&decoder)?, loss(&decoder)?);
        assert_eq!(first, again);
        assert_ne!(first, loss(&without)?);
        assert_eq!(loss(&decoder.frozen()?)?, loss(&without)?);
        decoder.set_dropout_seed(Some(2));
        assert_ne!(first, loss(&decoder)?);
        decoder.set_dropout_seed(None);
        assert_eq!(loss(&decoder)?, loss(&without)?);
    }
    Ok(())
}

/// A layer that is computed again drops the same numbers.
#[test]
fn gradients_under_dropout_are_the_same_with_checkpointing_and_are_slopes() -> Result<()> {
    let (mut decoder, vars) = adapted(0.4, DType::F64)?;
    decoder.set_dropout_seed(Some(7));
    let plain = backward(&packed_loss(&decoder)?)?;
    decoder.set_gradient_checkpointing(true);
    let checkpointed = backward(&packed_loss(&decoder)?)?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        let (got, want) = (checkpointed.get(var).unwrap(), plain.get(var).unwrap());
        assert_eq!(values(got)?, values(want)?, "{name}");
        // The loss is f32: a step that is large enough for its digits.
        let (at, step) = (var.copy()?, 1e-3);
        let direction = var.ones_like()?;
        let at_step = |step: f64| -> Result<f64> {
            var.set(&(&at + (&direction * step)?)?)?;
            Ok(values(&packed_loss(&decoder)?)?[0])
        };
        let measured = (at_step(step)? - at_step(-step)?) / (2. * step);
        var.set(&at)?;
        let slope = values(&want.sum_all()?)?[0];
        let difference = (slope - measured).abs() / measured.abs().max(1.);
        assert!(
            difference < 2e-2,
            "{name}: slope {slope}, measured {measured}"
        );
    }
    Ok(())
}

#[test]
fn a_dropout_that_cannot_be_is_named() -> Result<()> {
    let (base, _weights) = load("llama")?;
    let with = |lora: Lora| error(base.with_lora(&lora, &VarMap::new()));
    for dropout in [-0.1, 1., f64::NAN] {
        let lora = Lora {
            dropout,
            ..Lora::default()
        };
        let message = with(lora);
        assert!(
            message.contains("dropout of an adapter must be"),
            "{message}"
        );
    }
    Ok(())
}
