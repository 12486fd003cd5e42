//! The differentiable operations on the CPU.

use crate::common::differences;
use crate::common::ops::{
    attention, check, check_repeats, check_tied_head, embedding, rows, Operation,
};
use crate::common::Random;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::ops::{
    add_rms_norm, geglu, rms_norm, rope, swiglu, AttentionOptions,
};

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

fn check_all(cases: impl Fn(DType) -> Vec<Box<dyn Operation>>) {
    for dtype in DTYPES {
        check(&cases(dtype), &Device::Cpu);
    }
}

#[test]
fn norms_match_the_formulas() {
    check_all(rows::norms);
}

#[test]
fn gated_activations_match_the_formulas() {
    check_all(rows::gated);
}

#[test]
fn rotary_embeddings_match_the_formulas() {
    check_all(rows::ropes);
}

#[test]
fn embeddings_match_the_formulas() -> Result<()> {
    check_all(embedding::lookups);
    DTYPES
        .into_iter()
        .try_for_each(|dtype| check_tied_head(dtype, &Device::Cpu))
}

/// As sums in bf16 they would stay at 256.
#[test]
fn gradients_of_a_frequent_token_are_not_lost() -> Result<()> {
    let table = Var::ones((3, 2), DType::BF16, &Device::Cpu)?;
    let ids = Tensor::full(1u32, 1024, &Device::Cpu)?;
    let rows = candle_cut_cross_entropy::ops::embedding(&table, &ids)?;
    let gradients = rows.to_dtype(DType::F32)?.sum_all()?.backward()?;
    let of_table = gradients.get(&table).expect("a gradient");
    let of_table = of_table.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    assert_eq!(of_table, [[0., 0.], [1024., 1024.], [0., 0.]]);
    Ok(())
}

#[test]
fn ids_that_name_no_row_are_errors() -> Result<()> {
    use candle_cut_cross_entropy::ops::embedding;
    let table = Tensor::ones((3, 2), DType::F32, &Device::Cpu)?;
    for ids in [
        Tensor::new(&[0u32, 3], &Device::Cpu)?,
        Tensor::new(&[0u32, u32::MAX], &Device::Cpu)?,
        Tensor::new(&[-1i64], &Device::Cpu)?,
        Tensor::new(&[i64::MAX], &Device::Cpu)?,
    ] {
        let error = embedding(&table, &ids).expect_err("an id that is not there");
        assert!(error.to_string().contains("outside [0, 3)"), "{error}");
    }
    let id = Tensor::new(&[0u32], &Device::Cpu)?;
    let fails = |table: &Tensor, ids: &Tensor, with: &str| {
        let error = embedding(table, ids).expect_err(with).to_string();
        assert!(error.contains(with), "{error}");
    };
    fails(&table.flatten_all()?, &id, "(V, D)");
    fails(&table.narrow(1, 0, 0)?, &id, "no numbers");
    fails(&table, &id.to_dtype(DType::F32)?, "integers");
    let none = Tensor::zeros((2, 0), DType::U32, &Device::Cpu)?;
    let table = Var::from_tensor(&table)?;
    let rows = embedding(&table, &none)?;
    assert_eq!(rows.dims(), [2, 0, 2]);
    let gradients = (rows.sum_all()? + table.sum_all()?)?.backward()?;
    let of_table = gradients.get(&table).expect("a gradient");
    assert_eq!(of_table.to_vec2::<f32>()?, [[1., 1.]; 3]);
    Ok(())
}

#[test]
fn attention_matches_the_formulas() {
    check_all(attention::attentions);
}

#[test]
fn every_run_gives_the_same_bits() -> Result<()> {
    for cases in [rows::norms, attention::attentions] {
        check_repeats(&cases(DType::F32), &Device::Cpu)?;
    }
    Ok(())
}

fn random(seed: u64, shape: &[usize]) -> Result<Var> {
    let count = shape.iter().product();
    let values = Random::new(seed).normals(count, 1.);
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A scalar whose every part has another weight.
fn weighted(y: &Tensor) -> Result<Tensor> {
    (y * &*random(99, y.dims())?)?.sum_all()
}

#[test]
fn gradients_are_those_of_finite_differences() -> Result<()> {
    let (x, weight) = (random(1, &[3, 5])?, random(2, &[5])?);
    differences::check("rms_norm", &[&x, &weight], || {
        weighted(&rms_norm(&x, &weight, 1e-2, 1.)?)
    })?;
    let residual = random(3, &[3, 5])?;
    differences::check("add_rms_norm", &[&x, &residual, &weight], || {
        let (sum, normed) = add_rms_norm(&x, &residual, &weight, 1e-2, 0.)?;
        weighted(&sum)? + weighted(&normed)?.sqr()?
    })?;
    differences::check("swiglu", &[&x, &residual], || {
        weighted(&swiglu(&x, &residual)?)
    })?;
    differences::check("geglu", &[&x, &residual], || {
        weighted(&geglu(&x, &residual)?)
    })?;
    let (heads, angles) = (random(4, &[2, 3, 2, 5])?, random(5, &[3, 2])?);
    differences::check("rope", &[&heads], || {
        weighted(&rope(&heads, &angles.cos()?, &angles.sin()?)?)
    })?;
    Ok(())
}

#[test]
fn gradients_of_attention_are_those_of_finite_differences() -> Result<()> {
    let q = random(6, &[2, 5, 4, 3])?;
    let (k, v) = (random(7, &[2, 6, 2, 3])?, random(8, &[2, 6, 2, 3])?);
    let plain = AttentionOptions::default();
    let causal = AttentionOptions {
        causal: true,
        ..plain
    };
    let capped = AttentionOptions {
        softcap: Some(1.5),
        scale: Some(0.7),
        window: Some(3),
        ..causal
    };
    for options in [plain, causal, capped] {
        differences::check(&format!("{options:?}"), &[&q, &k, &v], || {
            weighted(&candle_cut_cross_entropy::ops::attention(
                &q, &k, &v, &options,
            )?)
        })?;
    }
    Ok(())
}

#[test]
fn frozen_arguments_get_no_gradient_and_change_no_other() -> Result<()> {
    let (x, weight) = (random(1, &[3, 5])?, random(2, &[5])?);
    let all = weighted(&rms_norm(&x, &weight, 1e-2, 0.)?)?.backward()?;
    let frozen = weighted(&rms_norm(&x, &weight.detach(), 1e-2, 0.)?)?.backward()?;
    assert!(frozen.get(&weight).is_none());
    let gradient = |store: &candle_core::backprop::GradStore| -> Result<Vec<Vec<f64>>> {
        store.get(&x).expect("dx").to_vec2()
    };
    assert_eq!(gradient(&all)?, gradient(&frozen)?);
    Ok(())
}

#[test]
fn errors_say_what_was_given_and_what_is_wanted() -> Result<()> {
    let attention = candle_cut_cross_entropy::ops::attention;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let plain = AttentionOptions::default();
    let causal = AttentionOptions {
        causal: true,
        ..plain
    };
    let (q, k) = (zeros(&[1, 4, 3, 8])?, zeros(&[1, 3, 2, 8])?);
    let one = zeros(&[1, 3, 1, 8])?;
    let with = |window, softcap, causal| AttentionOptions {
        window,
        softcap,
        causal,
        ..plain
    };
    let cases: Vec<(Result<Tensor>, &str)> = vec![
        (
            attention(&q, &k, &k, &plain),
            "heads a multiple of key_value_heads, got [1, 4, 3, 8], [1, 3, 2, 8]",
        ),
        (
            attention(&q, &one, &one, &causal),
            "of 4 queries and 3 keys with `causal`, the first queries see no key",
        ),
        (
            attention(&q, &one, &one, &with(Some(2), None, false)),
            "a window (2) is of the keys up to a position",
        ),
        (
            attention(&q, &one, &one, &with(Some(0), None, true)),
            "with a window of 0 no key is seen",
        ),
        (
            attention(&q, &one, &one, &with(None, Some(-1.), false)),
            "the softcap must be positive and finite, got -1",
        ),
        (
            attention(&q, &one.to_dtype(DType::F64)?, &one, &plain),
            "k is F64, expected F32",
        ),
        (
            rms_norm(&one, &zeros(&[8])?, -1., 0.),
            "eps must be at least 0 and finite, the offset finite, got -1 and 0",
        ),
        (
            rope(&q, &zeros(&[4, 4])?.to_dtype(DType::U32)?, &zeros(&[4, 4])?),
            "expected cos in bf16, f16, f32 or f64, got U32",
        ),
        (
            attention(
                &zeros(&[0, 4, 3, 8])?,
                &zeros(&[0, 3, 1, 8])?,
                &zeros(&[0, 3, 1, 8])?,
                &plain,
            ),
            "no numbers in a tensor of shape [0, 4, 3, 8]",
        ),
        (
            rms_norm(&zeros(&[2, 3])?, &zeros(&[4])?, 0., 0.),
            "expected x (.., D) and a weight (D), got [2, 3] and [4]",
        ),
        (
            add_rms_norm(&zeros(&[2, 3])?, &zeros(&[3])?, &zeros(&[3])?, 0., 0.).map(|both| both.0),
            "x has shape [2, 3], the residual [3]",
        ),
        (
            rms_norm(
                &zeros(&[2, 3])?.to_dtype(DType::U32)?,
                &zeros(&[3])?.to_dtype(DType::U32)?,
                0.,
                0.,
            ),
            "expected bf16, f16, f32 or f64, got U32",
        ),
        (
            swiglu(&zeros(&[2, 3])?, &zeros(&[3, 2])?),
            "the gate has shape [2, 3], up [3, 2]",
        ),
        (
            rope(&q, &zeros(&[4, 5])?, &zeros(&[4, 5])?),
            "2 P <= head_dim, got [1, 4, 3, 8], [4, 5] and [4, 5]",
        ),
        (
            rope(&q, &zeros(&[3, 4])?, &zeros(&[3, 4])?),
            "expected x (batch, time, heads, head_dim)",
        ),
    ];
    for (result, want) in cases {
        let error = result.expect_err(want).to_string();
        assert!(error.contains(want), "{error}\nwant: {want}");
    }
    Ok(())
}

#[test]
fn a_gradient_that_is_its_variable_is_a_gradient_like_others() -> Result<()> {
    use candle_cut_cross_entropy::models::AdamW;
    use candle_nn::{Optimizer, ParamsAdamW};
    let var = Var::new(&[1f32, -2.], &Device::Cpu)?;
    let mut gradients = candle_core::backprop::GradStore::default();
    gradients.insert(&var, var.as_detached_tensor());
    let params = ParamsAdamW {
        lr: 0.5,
        weight_decay: 0.,
        ..ParamsAdamW::default()
    };
    AdamW::new(vec![var.clone()], params)?.step(&gradients)?;
    assert_eq!(var.to_vec1::<f32>()?, [0.5, -1.5]);
    Ok(())
}
