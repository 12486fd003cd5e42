//! `backward`: what it collects, and what it leaves to Candle.

use crate::common::{exact, norm, numbers, Case, Tensors};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use candle_cut_cross_entropy::{backward, linear_cross_entropy, Options, Output, Strategy};
use std::sync::{Arc, Mutex};

const STRATEGIES: [Strategy; 2] = [Strategy::Recompute, Strategy::Fused];

fn run(tensors: &Tensors, options: &Options) -> Result<Output> {
    linear_cross_entropy(
        &tensors.embeddings,
        &tensors.classifier,
        &tensors.targets,
        options,
    )
}

fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    Ok(numbers(tensor)?.into_iter().map(f64::to_bits).collect())
}

#[test]
fn backward_equals_candles_with_tied_embeddings() -> Result<()> {
    let case = Case::random(11, DType::F32, &[12], 6, 17).with_bias(3);
    let tensors = case.tensors(&Device::Cpu)?;
    let table = &tensors.classifier;
    let tokens = Tensor::new(&[3u32, 3, 0, 16, 5, 1, 2, 3, 9, 9, 11, 4], &Device::Cpu)?;
    for strategy in STRATEGIES {
        let hidden = (table.index_select(&tokens, 0)? + tensors.embeddings.as_tensor())?.tanh()?;
        let options = case.options(exact(), &tensors).strategy(strategy);
        let loss = linear_cross_entropy(&hidden, table, &tensors.targets, &options)?.loss;
        let (ours, candles) = (backward(&loss)?, loss.backward()?);
        for var in [table, &tensors.embeddings, tensors.bias.as_ref().unwrap()] {
            let got = numbers(ours.get(var).unwrap())?;
            let want = numbers(candles.get(var).unwrap())?;
            let error = norm(got.iter().zip(&want).map(|(g, w)| g - w));
            assert!(error <= 1e-6 * norm(want), "{strategy:?}: error {error:e}");
        }
    }
    Ok(())
}

#[test]
fn gradients_of_a_variable_in_two_losses_add_up() -> Result<()> {
    let case = Case::random(12, DType::F32, &[9], 6, 17);
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(exact(), &tensors);
    let once = run(&tensors, &options)?.loss;
    let single = once.backward()?;
    let twice = (run(&tensors, &options)?.loss + (run(&tensors, &options)?.loss * 2.)?)?;
    let regularised = (&twice + tensors.classifier.sqr()?.sum_all()?)?;
    for grads in [backward(&regularised)?, regularised.backward()?] {
        for var in [&tensors.embeddings, &tensors.classifier] {
            let mut want = (single.get(var).unwrap() * 3.)?;
            if var.id() == tensors.classifier.id() {
                want = (want + (tensors.classifier.as_tensor() * 2.)?)?;
            }
            let (got, want) = (numbers(grads.get(var).unwrap())?, numbers(&want)?);
            let error = norm(got.iter().zip(&want).map(|(g, w)| g - w));
            assert!(error <= 1e-6 * norm(want), "error {error:e}");
        }
    }
    Ok(())
}

/// A node whose backward fails, or panics.
struct Broken {
    panics: bool,
}

impl CustomOp1 for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn cpu_fwd(
        &self,
        storage: &candle_core::CpuStorage,
        layout: &candle_core::Layout,
    ) -> Result<(candle_core::CpuStorage, candle_core::Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        if self.panics {
            panic!("broken on purpose")
        }
        candle_core::bail!("broken on purpose")
    }
}

#[test]
fn a_backward_that_fails_leaves_nothing_behind() -> Result<()> {
    let case = Case::random(14, DType::F32, &[9], 6, 17).with_bias(1);
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(exact(), &tensors);
    let want = run(&tensors, &options)?.loss.backward()?;
    for panics in [false, true] {
        // The loss's own backward runs first, then the broken one beneath it.
        let hidden = tensors.embeddings.apply_op1(Broken { panics })?;
        let classifier = tensors.classifier.as_tensor();
        let broken = linear_cross_entropy(&hidden, classifier, &tensors.targets, &options)?.loss;
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| backward(&broken)));
        match result {
            Ok(result) => assert!(!panics && result.is_err()),
            Err(_) => assert!(panics),
        }
        // Candle's own backward gets every gradient itself, and ours no gradient of another loss.
        for grads in [
            run(&tensors, &options)?.loss.backward()?,
            backward(&run(&tensors, &options)?.loss)?,
        ] {
            for var in [
                &tensors.embeddings,
                &tensors.classifier,
                tensors.bias.as_ref().unwrap(),
            ] {
                let grad = |grads: &GradStore| bits(grads.get(var).unwrap());
                assert_eq!(grad(&grads)?, grad(&want)?, "panics {panics}");
            }
        }
    }
    Ok(())
}

/// The identity, which differentiates another loss by Candle's own means in its backward.
struct RunsABackward {
    other: Tensor,
    gradients: Arc<Mutex<Option<GradStore>>>,
}

impl CustomOp1 for RunsABackward {
    fn name(&self) -> &'static str {
        "runs-a-backward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        *self.gradients.lock().unwrap() = Some(self.other.backward()?);
        Ok(Some(upstream.clone()))
    }
}

#[test]
fn a_backward_inside_of_another_op_keeps_its_gradients() -> Result<()> {
    let case = Case::random(17, DType::F32, &[9], 6, 17).with_bias(2);
    let tensors = case.tensors(&Device::Cpu)?;
    let options = case.options(exact(), &tensors);
    let want = run(&tensors, &options)?.loss.backward()?;
    let gradients = Arc::new(Mutex::new(None));
    let hidden = tensors.embeddings.apply_op1(RunsABackward {
        other: run(&tensors, &options)?.loss,
        gradients: gradients.clone(),
    })?;
    let outer = linear_cross_entropy(&hidden, &tensors.classifier, &tensors.targets, &options)?;
    let outer = backward(&outer.loss)?;
    let inner = gradients.lock().unwrap().take().expect("the op ran");
    for (which, grads) in [("outer", &outer), ("inner", &inner)] {
        for var in [
            &tensors.embeddings,
            &tensors.classifier,
            tensors.bias.as_ref().unwrap(),
        ] {
            let got = grads.get(var);
            let got = got.unwrap_or_else(|| panic!("{which}: no gradient {:?}", var.dims()));
            assert_eq!(bits(got)?, bits(want.get(var).unwrap())?, "{which}");
        }
    }
    Ok(())
}
