//! The differentiable operations on a GPU.

use crate::common::ops::{
    attention, check, check_repeats, check_tied_head, embedding, rows, Operation,
};
use crate::{device, DTYPES};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::ops::{self, AttentionOptions};

/// The cases of an operation, for a dtype.
type Cases = fn(DType) -> Vec<Box<dyn Operation>>;

const OPERATIONS: [Cases; 5] = [
    rows::norms,
    rows::gated,
    rows::ropes,
    embedding::lookups,
    attention::attentions,
];

fn check_all(cases: impl Fn(DType) -> Vec<Box<dyn Operation>>) {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        check(&cases(dtype), &device);
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
    let Some(device) = device() else {
        return Ok(());
    };
    DTYPES
        .into_iter()
        .try_for_each(|dtype| check_tied_head(dtype, &device))
}

#[test]
fn attention_matches_the_formulas() {
    check_all(attention::attentions);
}

#[test]
fn candle_operations_match_the_formulas() {
    // There are no kernels for f64.
    let Some(device) = device() else { return };
    for cases in OPERATIONS {
        check(&cases(DType::F64), &device);
    }
}

#[test]
fn every_run_gives_the_same_bits() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        for cases in OPERATIONS {
            check_repeats(&cases(dtype), &device)?;
        }
    }
    Ok(())
}

#[test]
fn attention_of_many_tiles_agrees_with_the_cpu() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        for head_dim in [64, 128] {
            let case = attention::Attention {
                dtype,
                batch: 2,
                queries: 1000,
                keys: 1000,
                // More tiles of queries and of keys than an H200 has multiprocessors.
                heads: 20,
                key_heads: 10,
                head_dim,
                options: AttentionOptions {
                    causal: true,
                    ..AttentionOptions::default()
                },
                views: true,
            };
            let on_cpu = attention::Attention {
                dtype: DType::F64,
                ..case.clone()
            };
            close(&case.computed(&device)?, &on_cpu, dtype)?;
        }
    }
    Ok(())
}

/// The inputs of a case in f64 are not rounded, so that half precision is compared to within its rounding.
fn close(
    got: &[crate::common::ops::Numbers],
    want: &attention::Attention,
    dtype: DType,
) -> Result<()> {
    let tolerance = 2. * crate::common::gradient_tolerance(dtype);
    for (got, want) in got.iter().zip(want.computed(&Device::Cpu)?) {
        let differences = got.values.iter().zip(&want.values).map(|(a, b)| a - b);
        let error = crate::common::norm(differences);
        let size = crate::common::norm(want.values.iter().copied());
        assert!(
            error <= tolerance * size,
            "{dtype:?}: {} is off by {error:e} of {size:e}",
            got.name
        );
    }
    Ok(())
}

#[test]
fn attention_of_a_long_sequence_takes_no_memory_for_scores() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    // Scores would take 128 GiB in bf16.
    let (length, heads, head_dim) = (1 << 17, 4, 64);
    let random = |heads: usize| {
        let normal = Tensor::randn(0f32, 1., (1, length, heads, head_dim), &device)?;
        Var::from_tensor(&normal.to_dtype(DType::BF16)?)
    };
    let (q, k, v) = (random(heads)?, random(2)?, random(2)?);
    let options = AttentionOptions {
        causal: true,
        ..AttentionOptions::default()
    };
    let out = ops::attention(&q, &k, &v, &options)?;
    let gradients = out.sum_all()?.backward()?;
    for var in [&q, &k, &v] {
        let gradient = gradients.get(var).expect("a gradient");
        let sum = gradient.to_dtype(DType::F32)?.sqr()?.sum_all()?;
        let sum = sum.to_scalar::<f32>()?;
        assert!(sum.is_finite() && sum > 0., "{sum}");
    }
    // Some rows of the last head, by the formula.
    let head = |x: &Tensor, head: usize| -> Result<Vec<Vec<f64>>> {
        let x = x.narrow(2, head, 1)?.reshape((length, head_dim))?;
        x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec2()
    };
    let (q, k, v, out) = (
        head(&q, heads - 1)?,
        head(&k, 1)?,
        head(&v, 1)?,
        head(&out, heads - 1)?,
    );
    for row in [0, 1, 1000, 65_537, length - 1] {
        let score = |key: &Vec<f64>| -> f64 {
            let product: f64 = key.iter().zip(&q[row]).map(|(a, b)| a * b).sum();
            (product / (head_dim as f64).sqrt()).exp()
        };
        let weights: Vec<f64> = k[..=row].iter().map(score).collect();
        let sum: f64 = weights.iter().sum();
        for (d, got) in out[row].iter().enumerate() {
            let terms = weights.iter().zip(&v).map(|(weight, v)| weight * v[d]);
            let want = terms.clone().sum::<f64>() / sum;
            // Every weight is rounded to bf16 before the product, and the result after it: by 2^-8 at most, each.
            let allowed = 2f64.powi(-7) * terms.map(f64::abs).sum::<f64>() / sum;
            assert!(
                (got - want).abs() <= allowed,
                "row {row}: {got}, want {want} within {allowed}"
            );
        }
    }
    Ok(())
}
