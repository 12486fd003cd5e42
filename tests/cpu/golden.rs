//! Against files that PyTorch wrote: see `tests/golden/make.py`.

use crate::common::{close, gradient_tolerance, norm, numbers};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::objectives::squared_lse;
use candle_cut_cross_entropy::{
    linear_cross_entropy, Entropy, Filter, Implementation, Options, Reduction, Strategy,
};
use std::collections::{BTreeSet, HashMap};

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn load() -> Result<Self> {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/golden.safetensors"
        );
        Ok(Self(candle_core::safetensors::load(path, &Device::Cpu)?))
    }

    fn cases(&self) -> BTreeSet<&str> {
        self.0
            .keys()
            .filter_map(|k| Some(k.split_once('/')?.0))
            .collect()
    }

    fn find(&self, case: &str, name: &str) -> Option<&Tensor> {
        self.0.get(&format!("{case}/{name}"))
    }

    fn get(&self, case: &str, name: &str) -> &Tensor {
        self.find(case, name)
            .unwrap_or_else(|| panic!("no {case}/{name} in the golden file"))
    }

    fn number(&self, case: &str, name: &str) -> f64 {
        numbers(self.get(case, name)).unwrap()[0]
    }
}

fn assert_gradient(what: &str, got: Option<&Tensor>, want: &Tensor, allowed: f64) {
    let got = got.unwrap_or_else(|| panic!("{what} is missing"));
    assert_eq!(got.dtype(), want.dtype(), "{what}");
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (numbers(got).unwrap(), numbers(want).unwrap());
    let error = norm(got.iter().zip(&want).map(|(g, w)| g - w)) / norm(want.iter().copied());
    assert!(
        error <= allowed,
        "{what}: relative error {error:e}, allowed {allowed:e}\n got {got:?}\nwant {want:?}"
    );
}

/// `inside`: the z-loss is part of the loss, not made of its outputs.
fn check_loss(golden: &Golden, case: &str, options: Options, inside: bool) -> Result<()> {
    let var = |name: &str| golden.find(case, name).map(Var::from_tensor).transpose();
    let embeddings = var("embeddings")?.unwrap();
    let classifier = var("classifier")?.unwrap();
    let bias = var("bias")?;
    let targets = golden.get(case, "targets");
    let mut options = options
        .shift(golden.number(case, "shift") as usize)
        .ignore_index(golden.number(case, "ignore_index") as i64)
        .softcap(
            golden
                .find(case, "softcap")
                .map(|_| golden.number(case, "softcap")),
        )
        .reduction(
            [Reduction::Mean, Reduction::Sum, Reduction::None]
                [golden.number(case, "reduction") as usize],
        );
    let number = |name: &str, default: f64| {
        let found = golden.find(case, name).map(|_| golden.number(case, name));
        found.unwrap_or(default)
    };
    let entropy_weights = golden.find(case, "entropy_weights");
    options = options
        .bias(bias.as_deref())
        .logit_scale(number("logit_scale", 1.))
        .label_smoothing(number("label_smoothing", 0.))
        .class_weights(golden.find(case, "class_weights"))
        .token_weights(golden.find(case, "token_weights"))
        .predicted(entropy_weights.is_some());
    if entropy_weights.is_some() {
        options = options.entropy(Entropy::Differentiable);
    }
    let z_weight = golden.number(case, "z_weight");
    if inside {
        options = options.z_loss_weight(z_weight);
    }
    let output = linear_cross_entropy(&embeddings, &classifier, targets, &options)?;
    let z = squared_lse(&output.lse, targets, &options)?;
    let assert_close = |what: &str, got: &Tensor| {
        let want = golden.get(case, what);
        assert_eq!(got.dims(), want.dims(), "{case} {what}");
        assert_eq!(got.dtype(), DType::F32, "{case} {what}");
        let (got, want) = (numbers(got).unwrap(), numbers(want).unwrap());
        let result = close(&format!("{case} {what}"), &got, &want, 2e-6, 1.);
        result.unwrap_or_else(|error| panic!("{error}"));
    };
    match &output.z_loss {
        None => assert_close("loss", &output.loss),
        Some(part) => {
            assert!(inside && z_weight > 0., "{case}");
            assert_close("loss", &(&output.loss - part)?);
            assert_close("z", &(part / z_weight)?);
        }
    }
    assert_close("lse", &output.lse);
    if let (Some(entropy), Some(predicted)) = (&output.entropy, &output.predicted) {
        assert_close("entropy", entropy);
        let want = golden.get(case, "predicted");
        assert_eq!(numbers(predicted)?, numbers(want)?, "{case} predicted");
    }
    assert_close("z", &z);

    let exact = gradient_tolerance(embeddings.dtype());
    // The z-loss is made of the f32 lse, so its gradient starts from f32 numbers.
    let allowed = exact.max(if z_weight > 0. { 1e-6 } else { 0. });
    // Without it, the backward of an exact zero would hide an lse that is not finite.
    let total = if z_weight > 0. && !inside {
        (output.loss + z_weight * z)?
    } else {
        output.loss
    };
    let mut total = (total * golden.get(case, "weights"))?.sum_all()?;
    if let (Some(entropy), Some(weights)) = (&output.entropy, entropy_weights) {
        total = (total + (entropy * weights)?.sum_all()?)?;
    }
    let grads = total.backward()?;
    let of = |what: &str| format!("{case} {what}");
    assert_gradient(
        &of("dE"),
        grads.get(&embeddings),
        golden.get(case, "grad_embeddings"),
        allowed,
    );
    assert_gradient(
        &of("dC"),
        grads.get(&classifier),
        golden.get(case, "grad_classifier"),
        allowed,
    );
    if let Some(bias) = &bias {
        assert_gradient(
            &of("db"),
            grads.get(bias),
            golden.get(case, "grad_bias"),
            allowed,
        );
    }
    Ok(())
}

#[test]
fn losses_and_gradients_are_those_of_pytorch() -> Result<()> {
    let golden = Golden::load()?;
    let mut checked = 0;
    for case in golden.cases() {
        for strategy in [Strategy::Recompute, Strategy::Fused] {
            for implementation in [Implementation::Auto, Implementation::Native] {
                let options = Options::default()
                    .filter(Filter::Off)
                    .strategy(strategy)
                    .implementation(implementation);
                check_loss(&golden, case, options.clone(), false)?;
                check_loss(&golden, case, options, true)?;
                checked += 1;
            }
        }
    }
    assert_eq!(checked, golden.cases().len() * 4);
    Ok(())
}
