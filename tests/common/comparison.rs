//! Results beside those of the reference.

use super::reference::{Gradient, Gradients, Reduced, Reference, Upstream};
use super::{norm, numbers, tile, weighted, Case, Tensors};
use candle_core::{DType, Device, Tensor};
use candle_cut_cross_entropy::{Entropy, Options, Output};

/// How far gradients may be from f64, relative to their Frobenius norm.
pub fn gradient_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1e-2,
        DType::F16 => 1e-3,
        DType::F32 => 1e-5,
        _ => 1e-11,
    }
}

/// What a number in half precision may be off, relative to itself.
fn of_number(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 0.,
    }
}

/// What averaged terms may be off, relative to themselves, where masses and means are rounded to the dtype: masses before
/// and after the upstream gradient, and their products with the rows; and what the rounding of masses and mean row moves
/// the logits of the shares by.
fn averaged_rounding(dtype: DType, mean_logit: f64) -> f64 {
    of_number(dtype) * (3. + 2. * mean_logit)
}

/// An error that shows the first few numbers that differ by more than `allowed`.
fn differing(what: &str, got: &[f64], want: &[f64], allowed: impl Fn(usize) -> f64) -> String {
    let mut text = String::new();
    let off = |i: &usize| {
        let difference = (got[*i] - want[*i]).abs();
        difference.is_nan() || difference > allowed(*i)
    };
    for i in (0..got.len()).filter(off).take(6) {
        text += &format!("\n    {what}[{i}] = {:e}, want {:e}", got[i], want[i]);
    }
    text
}

/// Whether each number is within `tolerance * scale` of what is wanted.
pub fn close(
    what: &str,
    got: &[f64],
    want: &[f64],
    tolerance: f64,
    scale: f64,
) -> std::result::Result<(), String> {
    if got.len() != want.len() {
        return Err(format!(
            "{what}: {} numbers, want {}",
            got.len(),
            want.len()
        ));
    }
    let allowed = |i: usize| tolerance * scale.max(want[i].abs());
    let differing = differing(what, got, want, allowed);
    if differing.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "{what} differs by more than {tolerance:e} of {scale:e}{differing}"
        ))
    }
}

/// Whether a gradient is right: beyond what a filter may have dropped, entry by entry, its relative
/// error in Frobenius norm is at most the tolerance of the dtype.
pub fn gradient_close(
    what: &str,
    got: &[f64],
    want: &Gradient,
    dtype: DType,
    logit_scale: f64,
) -> std::result::Result<(), String> {
    gradient_within(what, got, want, dtype, 0., logit_scale)
}

fn gradient_within(
    what: &str,
    got: &[f64],
    want: &Gradient,
    dtype: DType,
    of_means: f64,
    logit_scale: f64,
) -> std::result::Result<(), String> {
    let Gradient {
        value,
        magnitude,
        droppable,
        added,
    } = want;
    if got.len() != value.len() {
        return Err(format!(
            "{what}: {} numbers, want {}",
            got.len(),
            value.len()
        ));
    }
    let tolerance = gradient_tolerance(dtype);
    // Where the softmax and the one-hot cancel, what is left of either one's rounding.
    let rounding = match dtype {
        DType::F64 => 1e-14,
        _ => 3e-7,
    } * logit_scale
        + of_means;
    // The numbers of f16 below 6e-5 lie 6e-8 apart.
    let smallest = match dtype {
        DType::F16 => 2f64.powi(-24),
        _ => f64::MIN_POSITIVE,
    };
    let allowed = tolerance * norm(value.iter().copied())
        + rounding * norm(magnitude.iter().copied())
        + 2. * of_number(dtype) * norm(added.iter().copied())
        + smallest * (value.len() as f64).sqrt();
    let excess = |i: usize| ((got[i] - value[i]).abs() - droppable[i]).max(0.);
    let error = norm((0..got.len()).map(excess));
    let finite = got.iter().all(|x| x.is_finite());
    if finite && error <= allowed {
        return Ok(());
    }
    let max = got.iter().zip(value).map(|(g, w)| (g - w).abs());
    Err(format!(
        "{what}: error {:e} of the norm (allowed {:e}), largest difference {:e}{}",
        error / norm(value.iter().copied()),
        allowed / norm(value.iter().copied()),
        max.fold(0., f64::max),
        differing(what, got, value, |i| {
            droppable[i] + tolerance * value[i].abs() + rounding * magnitude[i]
        })
    ))
}

/// Whether the outputs are f32-accurate and have the right shapes.
pub fn output_close(
    output: &Output,
    case: &Case,
    reference: &Reference,
) -> std::result::Result<(), String> {
    let numbers = |tensor: &Tensor| numbers(tensor).map_err(|e| e.to_string());
    let tolerance = if case.dtype == DType::F64 { 2e-7 } else { 2e-6 };
    let scale = reference.largest_logit;
    let loss_shape = match case.inputs.reduction {
        Reduced::None => case.positions(),
        Reduced::Mean | Reduced::Sum => vec![],
    };
    if output.loss.dims() != loss_shape || output.lse.dims() != case.positions() {
        return Err(format!(
            "loss has shape {:?}, lse {:?}, want {loss_shape:?} and {:?}",
            output.loss.dims(),
            output.lse.dims(),
            case.positions()
        ));
    }
    close(
        "loss",
        &numbers(&output.loss)?,
        &reference.loss,
        tolerance,
        reference.loss_size,
    )?;
    close(
        "lse",
        &numbers(&output.lse)?,
        &reference.lse,
        tolerance,
        scale,
    )?;
    let asked = case.entropy != Entropy::Off || case.inputs.entropy_bonus != 0.;
    if asked != output.entropy.is_some() || case.predicted != output.predicted.is_some() {
        return Err("not what is asked for beside the loss".to_owned());
    }
    if let Some(entropy) = &output.entropy {
        let got = numbers(entropy)?;
        close("entropy", &got, &reference.entropy, tolerance, scale)?;
    }
    match &output.predicted {
        Some(predicted) => predicted_close(predicted, case, reference, tolerance * scale),
        None => Ok(()),
    }
}

/// Whether the predicted classes have the largest logits, up to their rounding.
fn predicted_close(
    predicted: &Tensor,
    case: &Case,
    reference: &Reference,
    rounding: f64,
) -> std::result::Result<(), String> {
    if predicted.dtype() != DType::U32 || predicted.dims() != case.positions() {
        let (dtype, dims) = (predicted.dtype(), predicted.dims());
        return Err(format!("predicted is {dtype:?} {dims:?}"));
    }
    let got = predicted.flatten_all().and_then(|p| p.to_vec1::<u32>());
    for (position, got) in got.map_err(|e| e.to_string())?.into_iter().enumerate() {
        let want = reference.predicted[position];
        let right = match reference.below_largest(position, got as usize) {
            Some(below) => below >= -rounding,
            None => got == u32::MAX,
        };
        if !right {
            return Err(format!("predicted[{position}] = {got}, want {want:?}"));
        }
    }
    Ok(())
}

/// The gradients of the tensors of a case, in the order of [`Gradients`].
pub fn gradients_close(
    grads: &candle_core::backprop::GradStore,
    tensors: &Tensors,
    want: &Gradients,
    dtype: DType,
    logit_scale: f64,
) -> std::result::Result<(), String> {
    let vars = [
        ("dE", Some(&tensors.embeddings), &want.embeddings),
        ("dC", Some(&tensors.classifier), &want.classifier),
        ("db", tensors.bias.as_ref(), &want.bias),
    ];
    let of_means = match want.mean_logit {
        Some(mean_logit) if !tensors.embeddings.device().is_cpu() => {
            averaged_rounding(dtype, mean_logit)
        }
        _ => 0.,
    };
    for (what, var, want) in vars {
        let Some(var) = var else { continue };
        let Some(grad) = grads.get(var) else {
            return Err(format!("{what} is missing"));
        };
        if grad.dtype() != dtype || grad.dims() != var.dims() {
            return Err(format!(
                "{what} is {:?} {:?}, its tensor {dtype:?} {:?}",
                grad.dtype(),
                grad.dims(),
                var.dims()
            ));
        }
        let got = numbers(grad).map_err(|e| e.to_string())?;
        gradient_within(what, &got, want, dtype, of_means, logit_scale)?;
    }
    Ok(())
}

/// Computes a case with these options and compares everything with the reference. `eps` are the
/// thresholds of the averaging filters of embeddings and classifier that the options set.
pub fn check(
    case: &Case,
    options: Options,
    device: &Device,
    upstream: &Upstream,
    eps: (f64, f64),
) -> std::result::Result<(), String> {
    let reference = Reference::new(case.inputs.clone());
    let want = reference.averaged(upstream, eps, tile(device));
    check_against(case, options, device, upstream, &reference, &want)
}

/// Computes a case with these options and compares everything with what the reference says.
pub fn check_against(
    case: &Case,
    options: Options,
    device: &Device,
    upstream: &Upstream,
    reference: &Reference,
    want: &Gradients,
) -> std::result::Result<(), String> {
    let text = |e: candle_core::Error| e.to_string();
    let tensors = case.tensors(device).map_err(text)?;
    let options = case.options(options, &tensors);
    let output = candle_cut_cross_entropy::linear_cross_entropy(
        &tensors.embeddings,
        &tensors.classifier,
        &tensors.targets,
        &options,
    )
    .map_err(text)?;
    output_close(&output, case, reference)?;
    let grads = weighted(&output, upstream)
        .and_then(|loss| loss.backward())
        .map_err(text)?;
    gradients_close(&grads, &tensors, want, case.dtype, reference.largest_logit)
}
