//! Gradients formed in the forward in f16, which has less room than bf16.

use crate::common::reference::Reduced;
use crate::common::{check, exact, gradient_tolerance, norm, numbers, Case};
use crate::device;
use candle_core::{DType, Result};
use candle_cut_cross_entropy::{linear_cross_entropy, Strategy};

/// f16 has no room for probabilities 2^16 times that of their target: some rows' are written again. A loss scale is the
/// upstream gradient, and without one the smallest gradients are below what f16 has.
#[test]
fn probabilities_and_gradients_that_f16_has_no_room_for_are_right() {
    let Some(device) = device() else { return };
    for (turn, reduction) in [Reduced::Mean, Reduced::Sum].into_iter().enumerate() {
        for unlikely in [0, 1, 130, 700] {
            let seed = 990 + 10 * turn as u64;
            let mut case = Case::random(seed, DType::F16, &[700], 72, 1500).with_bias(seed + 1);
            case.inputs.reduction = reduction;
            case.inputs.softcap = (turn == 1).then_some(30.);
            let hidden = case.inputs.hidden;
            for e in &mut case.inputs.embeddings[..unlikely * hidden] {
                *e *= 8.;
            }
            case.round();
            let loss = match reduction {
                Reduced::Mean => 65_536.,
                _ => 1.,
            };
            let upstream = crate::Upstream {
                loss: Some(vec![loss]),
                ..Default::default()
            };
            // All rows at once, and some chunks.
            for workspace in [1 << 30, (15 << 20) + (1700 << 10)] {
                let options = exact().strategy(Strategy::Fused).workspace(workspace);
                check(&case, options, &device, &upstream, (0., 0.)).unwrap_or_else(|e| {
                    panic!("{reduction:?} {unlikely} unlikely rows {workspace} bytes: {e}")
                });
            }
        }
    }
}

/// The probabilities of a row whose target has no finite logit are not measured from that: here they are below what f16 has,
/// and the row's factor above.
#[test]
fn a_masked_target_far_below_zero_spoils_no_gradient() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let mut case = Case::random(1010, DType::F16, &[140], 64, 600).with_bias(1011);
    case.inputs.reduction = Reduced::Sum;
    let bias = case.inputs.bias.as_mut().expect("a bias");
    bias.fill(-20.);
    bias[case.inputs.targets[0] as usize] = f64::NEG_INFINITY;
    let tensors = case.tensors(&device)?;
    let (e, c) = (&tensors.embeddings, &tensors.classifier);
    let gradients = |strategy| {
        let options = case.options(exact().strategy(strategy), &tensors);
        let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
        let grads = output.loss.backward()?;
        let of = |tensor| numbers(grads.get(tensor).expect("a gradient"));
        Ok::<_, candle_core::Error>([of(e)?, of(c)?])
    };
    let (got, want) = (gradients(Strategy::Fused)?, gradients(Strategy::Recompute)?);
    for (name, (got, want)) in ["dE", "dC"].iter().zip(got.iter().zip(&want)) {
        let difference = norm(got.iter().zip(want).map(|(got, want)| got - want));
        let size = norm(want.iter().copied());
        assert!(
            difference <= 2. * gradient_tolerance(DType::F16) * size,
            "{name} differs by {difference:e} of {size:e}"
        );
    }
    Ok(())
}
