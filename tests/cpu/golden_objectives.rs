//! Objectives against a file that TRL wrote: see `tests/golden/objectives.py`.

use crate::common::{close, numbers};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::objectives::{
    cpo_loss, dpo_loss, group_advantages, grpo_loss, ipo_loss, kto_kl, kto_loss, mean_log_probs,
    orpo_loss, ppo_loss, sequence_log_probs, simpo_loss, Average, GrpoOptions, KtoOptions,
    Preferences,
};
use std::collections::{BTreeSet, HashMap};

/// The tensors of a case in a dtype; those whose gradients are in the file are variables.
struct Inputs<'a> {
    case: &'a str,
    tensors: HashMap<String, Tensor>,
    vars: Vec<(String, Var)>,
}

impl<'a> Inputs<'a> {
    fn new(golden: &HashMap<String, Tensor>, case: &'a str, dtype: DType) -> Result<Self> {
        let mut inputs = Self {
            case,
            tensors: HashMap::new(),
            vars: Vec::new(),
        };
        for (name, tensor) in golden {
            let Some(name) = name.strip_prefix(&format!("{case}/")) else {
                continue;
            };
            let tensor = match tensor.dtype() {
                DType::F64 if name != "loss" && !name.starts_with("grad_") => {
                    tensor.to_dtype(dtype)?
                }
                _ => tensor.clone(),
            };
            if golden.contains_key(&format!("{case}/grad_{name}")) {
                inputs
                    .vars
                    .push((name.to_owned(), Var::from_tensor(&tensor)?));
            } else {
                inputs.tensors.insert(name.to_owned(), tensor);
            }
        }
        Ok(inputs)
    }

    fn get(&self, name: &str) -> &Tensor {
        let var = self.vars.iter().find(|(other, _)| other == name);
        match var {
            Some((_, var)) => var.as_tensor(),
            None => self
                .tensors
                .get(name)
                .unwrap_or_else(|| panic!("no {}/{name} in the golden file", self.case)),
        }
    }

    fn sums(&self, of: &str) -> Result<Tensor> {
        sequence_log_probs(self.get(of), Some(self.get("mask")))
    }

    fn means(&self, of: &str) -> Result<Tensor> {
        mean_log_probs(self.get(of), self.get("mask"))
    }
}

/// The halves of a batch.
fn halves(log_probs: &Tensor) -> Result<(Tensor, Tensor)> {
    let pairs = log_probs.dim(0)? / 2;
    Ok((
        log_probs.narrow(0, 0, pairs)?,
        log_probs.narrow(0, pairs, pairs)?,
    ))
}

type WithReference = fn(Preferences<'_>, Preferences<'_>, f64) -> Result<Tensor>;

fn with_reference(
    loss: WithReference,
    policy: &Tensor,
    reference: &Tensor,
    beta: f64,
) -> Result<Tensor> {
    let ((chosen, rejected), reference) = (halves(policy)?, halves(reference)?);
    let policy = Preferences {
        chosen: &chosen,
        rejected: &rejected,
    };
    let reference = Preferences {
        chosen: &reference.0,
        rejected: &reference.1,
    };
    loss(policy, reference, beta)
}

fn without_reference(
    policy: &Tensor,
    loss: impl Fn(Preferences<'_>) -> Result<Tensor>,
) -> Result<Tensor> {
    let (chosen, rejected) = halves(policy)?;
    loss(Preferences {
        chosen: &chosen,
        rejected: &rejected,
    })
}

fn kto(inputs: &Inputs<'_>, options: KtoOptions) -> Result<Tensor> {
    let kl = kto_kl(inputs.get("mismatched"), inputs.get("reference_mismatched"))?;
    let (policy, reference) = (inputs.sums("nll")?, inputs.sums("reference_nll")?);
    kto_loss(&policy, &reference, inputs.get("desirable"), &kl, &options)
}

fn grpo(inputs: &Inputs<'_>, options: GrpoOptions) -> Result<Tensor> {
    grpo_loss(
        inputs.get("log_probs"),
        inputs.get("old_log_probs"),
        inputs.get("advantages"),
        Some(inputs.get("mask")),
        &options,
    )
}

fn loss(inputs: &Inputs<'_>) -> Result<Tensor> {
    let options = GrpoOptions::default();
    let reference = || inputs.get("reference_log_probs");
    match inputs.case {
        "dpo" => with_reference(
            dpo_loss,
            &inputs.sums("nll")?,
            &inputs.sums("reference_nll")?,
            0.3,
        ),
        "ipo" => with_reference(
            ipo_loss,
            &inputs.means("nll")?,
            &inputs.means("reference_nll")?,
            0.4,
        ),
        "cpo" => without_reference(&inputs.sums("nll")?, |pairs| cpo_loss(pairs, 0.2, 0.7)),
        "simpo" => without_reference(&inputs.means("nll")?, |pairs| simpo_loss(pairs, 2., 0.5)),
        "orpo" => without_reference(&inputs.means("nll")?, |pairs| orpo_loss(pairs, 0.6)),
        "kto" => kto(inputs, KtoOptions::default().beta(0.3).weights(1.5, 0.7)),
        "kto_below" => kto(inputs, KtoOptions::default().beta(0.3)),
        "grpo" => grpo(inputs, options),
        "grpo_kl" => grpo(inputs, options.kl(reference(), 0.04)),
        "dapo" => grpo(inputs, options.clip(0.2, 0.28).average(Average::Tokens)),
        "dr_grpo" => grpo(inputs, options.average(Average::Length(16))),
        "gspo" => grpo(inputs, options.clip(0.05, 0.1).sequence_ratios(true)),
        "everything" => grpo(
            inputs,
            options
                .clip(0.05, 0.1)
                .average(Average::Tokens)
                .sequence_ratios(true)
                .kl(reference(), 0.2)
                .entropy(inputs.get("entropies"), 0.3),
        ),
        "entropy" => grpo(inputs, options.entropy(inputs.get("entropies"), 0.1)),
        "ppo" => ppo_loss(
            inputs.get("log_probs"),
            inputs.get("old_log_probs"),
            inputs.get("advantages"),
            Some(inputs.get("mask")),
            0.2,
        ),
        other => panic!("the golden file has an unknown case {other}"),
    }
}

fn golden() -> Result<HashMap<String, Tensor>> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/objectives.safetensors"
    );
    candle_core::safetensors::load(path, &Device::Cpu)
}

#[test]
fn losses_and_gradients_are_those_of_trl() -> Result<()> {
    let golden = golden()?;
    let cases: BTreeSet<&str> = golden
        .keys()
        .filter_map(|name| name.strip_suffix("/loss"))
        .collect();
    assert_eq!(cases.len(), 15);
    for case in cases {
        for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
            let inputs = Inputs::new(&golden, case, dtype)?;
            let loss = loss(&inputs)?;
            assert_eq!((loss.rank(), loss.dtype()), (0, dtype), "{case}");
            let what = format!("{case} {dtype:?}");
            let want = numbers(inputs.get("loss"))?;
            close(&what, &numbers(&loss)?, &want, tolerance, 0.1).unwrap();
            let gradients = loss.backward()?;
            for (name, var) in &inputs.vars {
                let what = format!("{what} gradient of {name}");
                let want = numbers(inputs.get(&format!("grad_{name}")))?;
                let got = numbers(gradients.get(var).expect(&what))?;
                close(&what, &got, &want, tolerance, 1e-2).unwrap();
            }
        }
    }
    Ok(())
}

#[test]
fn advantages_are_those_of_trl() -> Result<()> {
    let golden = golden()?;
    let get = |name: &str| &golden[&format!("group_advantages/{name}")];
    for (scaled, name) in [(false, "above"), (true, "scaled")] {
        let advantages = group_advantages(get("rewards"), scaled)?;
        assert_eq!(advantages.dims(), [4, 6]);
        let (got, want) = (numbers(&advantages)?, numbers(get(name))?);
        close(name, &got, &want, 1e-12, 1.).unwrap();
    }
    Ok(())
}
