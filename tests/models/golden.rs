//! Logits, losses and gradients against Hugging Face transformers (golden files by tests/golden/models.py).

use crate::common::{assert_close, assert_gradients, exact, expected, folder, load, norm, CASES};
use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::backward;
use candle_cut_cross_entropy::models::{CausalLm, Decoder};
use candle_nn::VarMap;

#[test]
fn logits_are_those_of_transformers() -> Result<()> {
    for case in CASES {
        let (decoder, _) = load(case)?;
        let expected = expected(case)?;
        let ids = &expected["ids"];
        let logits = decoder.logits(&decoder.hidden_states(ids)?)?;
        assert_close(
            &format!("{case} logits"),
            &logits,
            &expected["logits"],
            1e-4,
        );
        let short = ids.narrow(1, 0, expected["short_logits"].dim(1)?)?;
        let logits = decoder.logits(&decoder.hidden_states(&short)?)?;
        assert_close(
            &format!("{case} short logits"),
            &logits,
            &expected["short_logits"],
            1e-4,
        );
        let last = logits.narrow(1, short.dim(1)? - 1, 1)?;
        assert_close(case, &decoder.next_token_logits(&short)?, &last, 1e-5);
    }
    Ok(())
}

#[test]
fn bf16_and_f16_come_close() -> Result<()> {
    for (dtype, tolerance) in [(DType::BF16, 1e-2), (DType::F16, 1e-3)] {
        for case in CASES {
            let vars = VarMap::new();
            let decoder = Decoder::load(folder(case), &vars, dtype, &Device::Cpu)?;
            let expected = expected(case)?;
            let (ids, labels) = (&expected["ids"], &expected["labels"]);
            let hidden = decoder.hidden_states(ids)?;
            assert_eq!(hidden.dtype(), dtype);
            let loss = decoder.loss(ids, labels, &exact())?.loss;
            let what = format!("{case} {dtype:?} loss");
            assert_close(&what, &loss, &expected["loss"], tolerance);
            assert_gradients(case, &decoder, &backward(&loss)?);
        }
    }
    Ok(())
}

#[test]
fn losses_and_gradients_are_those_of_transformers() -> Result<()> {
    for case in CASES {
        let (decoder, _) = load(case)?;
        let expected = expected(case)?;
        // The shift is 1 and the softcap that of the model, unless the options have their own.
        let other = exact().softcap(0.1);
        let capped = decoder.loss(&expected["ids"], &expected["labels"], &other)?;
        assert!(norm(&(capped.loss - &expected["loss"])?)? > 1e-4, "{case}");
        let options = exact();
        let loss = decoder
            .loss(&expected["ids"], &expected["labels"], &options)?
            .loss;
        assert_close(&format!("{case} loss"), &loss, &expected["loss"], 1e-5);
        let gradients = backward(&loss)?;
        assert_gradients(case, &decoder, &gradients);
        let norms = decoder
            .tensors()
            .values()
            .filter_map(|tensor| gradients.get(tensor))
            .map(norm)
            .collect::<Result<Vec<f64>>>()?;
        let norms = Tensor::new(norms, &Device::Cpu)?;
        assert_close(
            &format!("{case} gradient norms"),
            &norms,
            &expected["gradient_norms"],
            1e-4,
        );
    }
    Ok(())
}
