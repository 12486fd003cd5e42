//! Divergences from a teacher against a file that PyTorch wrote: see `tests/golden/soft_targets.py`.

use crate::common::{close, numbers};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::soft_targets::{
    divergence, top_k_divergence, Divergence, Rest, Teacher, TopK,
};
use candle_cut_cross_entropy::Options;
use std::collections::{BTreeSet, HashMap};

const LEARNT: [&str; 6] = [
    "embeddings",
    "classifier",
    "bias",
    "teacher_embeddings",
    "teacher_classifier",
    "teacher_bias",
];

/// The loss of a case, `x` being the inputs by their names and `vars` those that are learnt.
fn loss(case: &str, x: &HashMap<String, Tensor>, vars: &[Var]) -> Result<Tensor> {
    let [e, c, bias, teacher_e, teacher_c, teacher_bias] = vars else {
        panic!("{} variables", vars.len())
    };
    let (kind, all) = match case.strip_suffix("_all") {
        Some(kind) => (kind, true),
        None => (case, false),
    };
    let temperature = if all { 2. } else { 1. };
    let options = match all {
        true => Options::default()
            .bias(bias.as_tensor())
            .softcap(3.)
            .shift(1),
        false => Options::default().ignore_index(-1),
    };
    // Without the others' options every position counts.
    let targets = match all {
        true => x["targets"].clone(),
        false => x["targets"].zeros_like()?,
    };
    let whole = |kind| {
        let teacher = Teacher::new(teacher_e, teacher_c).temperature(temperature);
        let teacher = match all {
            true => teacher.bias(teacher_bias.as_tensor()).softcap(2.),
            false => teacher,
        };
        divergence(e, c, &targets, &teacher, kind, &options)
    };
    let few = |rest| {
        let teacher = TopK::new(&x["classes"], &x["probabilities"]);
        let teacher = teacher.rest(rest).temperature(temperature);
        top_k_divergence(e, c, &targets, &teacher, &options)
    };
    match kind {
        "forward" => whole(Divergence::ForwardKl),
        "reverse" => whole(Divergence::ReverseKl),
        "jensen_shannon" => whole(Divergence::JensenShannon(0.3)),
        "one_class" => few(Rest::OneClass),
        "left_out" => few(Rest::LeftOut),
        "renormalized" => few(Rest::Renormalized),
        other => panic!("the golden file has an unknown case {other}"),
    }
}

#[test]
fn losses_and_gradients_are_those_of_pytorch() -> Result<()> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/soft_targets.safetensors"
    );
    let golden = candle_core::safetensors::load(path, &Device::Cpu)?;
    let cases: BTreeSet<&str> = golden
        .keys()
        .filter_map(|name| name.strip_suffix("/loss"))
        .collect();
    assert_eq!(cases.len(), 12);
    let inputs: HashMap<String, Tensor> = golden
        .iter()
        .filter_map(|(name, x)| Some((name.strip_prefix("input/")?.to_owned(), x.clone())))
        .collect();
    for case in cases {
        for dtype in [DType::F64, DType::F32] {
            let var = |name: &&str| Var::from_tensor(&inputs[*name].to_dtype(dtype)?);
            let vars = LEARNT.iter().map(var).collect::<Result<Vec<_>>>()?;
            let what = format!("{case} {dtype:?}");
            let loss = loss(case, &inputs, &vars)?;
            let want = numbers(&golden[&format!("{case}/loss")])?;
            close(&what, &numbers(&loss)?, &want, 2e-6, 0.1).unwrap();
            let gradients = loss.backward()?;
            for (name, var) in LEARNT.iter().zip(&vars) {
                let what = format!("{what} gradient of {name}");
                let want = golden.get(&format!("{case}/grad_{name}"));
                let got = gradients.get(var);
                assert_eq!(got.is_some(), want.is_some(), "{what}");
                if let (Some(got), Some(want)) = (got, want) {
                    close(&what, &numbers(got)?, &numbers(want)?, 1e-5, 0.1).unwrap();
                }
            }
        }
    }
    Ok(())
}
