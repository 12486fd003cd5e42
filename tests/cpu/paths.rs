//! The output says which path ran.

use crate::common::shards::TIMEOUT;
use crate::common::{numbers, Case};
use candle_core::{DType, Device, Result, Var};
use candle_cut_cross_entropy::vocab_parallel::{ThreadCommunicator, VocabParallel};
use candle_cut_cross_entropy::{
    linear_cross_entropy, Implementation, Options, Reduction, Strategy,
};
use std::sync::Arc;

/// What runs where gradients are wanted, or none.
fn ran(options: Options, dtype: DType, tracked: bool) -> Result<Strategy> {
    let tensors = Case::random(1, dtype, &[40], 16, 300).tensors(&Device::Cpu)?;
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let output = match tracked {
        true => linear_cross_entropy(e, c, &tensors.targets, &options)?,
        false => linear_cross_entropy(&e.detach(), &c.detach(), &tensors.targets, &options)?,
    };
    assert_eq!(output.implementation, Implementation::Native);
    Ok(output.strategy)
}

#[test]
fn gradients_are_formed_in_the_forward_where_that_is_asked_for_and_can_be_done() -> Result<()> {
    let asked = || Options::default().strategy(Strategy::Fused);
    assert_eq!(ran(asked(), DType::F32, true)?, Strategy::Fused);
    assert_eq!(ran(asked(), DType::F16, true)?, Strategy::Fused);
    let not = [
        (asked().reduction(Reduction::None), true),
        (asked().workspace(1), true),
        (asked(), false),
        (Options::default().strategy(Strategy::Recompute), true),
    ];
    for (options, tracked) in not {
        let name = format!("{options:?}");
        assert_eq!(
            ran(options, DType::F32, tracked)?,
            Strategy::Recompute,
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn native_is_what_auto_takes_on_the_cpu() -> Result<()> {
    let case = Case::random(2, DType::BF16, &[40], 16, 300).with_bias(2);
    let tensors = case.tensors(&Device::Cpu)?;
    let run = |implementation| -> Result<[Vec<f64>; 3]> {
        let options = case.options(Options::default().implementation(implementation), &tensors);
        let (e, c) = (&tensors.embeddings, &tensors.classifier);
        let loss = linear_cross_entropy(e, c, &tensors.targets, &options)?.loss;
        let grads = loss.backward()?;
        let grad = |var: &Var| numbers(grads.get(var).expect("a gradient"));
        Ok([numbers(&loss)?, grad(e)?, grad(c)?])
    };
    assert_eq!(run(Implementation::Auto)?, run(Implementation::Native)?);
    Ok(())
}

#[test]
fn auto_says_what_it_took() -> Result<()> {
    assert_eq!(ran(Options::default(), DType::F32, true)?, Strategy::Fused);
    // A loss scale would make the gradients useless.
    assert_eq!(
        ran(Options::default(), DType::F16, true)?,
        Strategy::Recompute
    );
    Ok(())
}

#[test]
fn a_shard_recomputes() -> Result<()> {
    let Some(alone) = ThreadCommunicator::group(1, TIMEOUT)?.pop() else {
        unreachable!("a group of one")
    };
    let shard = VocabParallel::from_vocab(300, Arc::new(alone))?;
    let options = Options::default()
        .strategy(Strategy::Fused)
        .vocab_parallel(shard);
    assert_eq!(ran(options, DType::F32, true)?, Strategy::Recompute);
    Ok(())
}
