//! Embeddings of any number of columns: the Hopper kernels pad rows that do not begin on 16 bytes, and have strips of columns of
//! two widths.

use crate::common::reference::{Reduced, Reference, CUDA_TILE};
use crate::common::{check_against, exact, halving, Case};
use crate::{assert_nothing, device, DTYPES, KERNELS};
use candle_core::{DType, Result, Tensor, Var};
use candle_cut_cross_entropy::{
    linear_cross_entropy, Entropy, Filter, Implementation, Options, Strategy,
};

/// Of chunks, of pairs and of single numbers; in one strip of the products, two narrow ones, a wide and two narrow ones, and two
/// wide ones.
const COLUMNS: [usize; 8] = [34, 66, 67, 130, 392, 451, 776, 650];

/// A case of a turn: bias, softcap, smoothing, entropies and weights come and go.
fn case(turn: usize, dtype: DType, hidden: usize) -> Case {
    let seed = 1000 + 10 * turn as u64;
    let mut case = Case::random(seed, dtype, &[2, 140], hidden, 520).with_ignored(seed + 1);
    case.inputs.shift = turn % 2;
    case.inputs.reduction = [Reduced::Mean, Reduced::Sum, Reduced::None][turn % 3];
    if turn.is_multiple_of(2) {
        case = case.with_bias(seed + 2);
    }
    match turn % 4 {
        1 => case.inputs.softcap = Some(4.),
        2 => case.inputs.label_smoothing = 0.2,
        3 => case = case.with_token_weights(seed + 3),
        _ => {}
    }
    case.entropy = [Entropy::Off, Entropy::Value, Entropy::Differentiable][turn / 2 % 3];
    case.predicted = turn % 3 == 1;
    case
}

#[test]
fn columns_of_any_number_are_right() {
    let Some(device) = device() else { return };
    let mut wrong = Vec::new();
    for (turn, hidden) in COLUMNS.into_iter().cycle().take(16).enumerate() {
        for dtype in DTYPES {
            let case = case(turn, dtype, hidden);
            let reference = Reference::new(case.inputs.clone());
            let upstream = case.upstream(turn as u64, true, turn % 4 == 1);
            let threshold = halving(&reference, CUDA_TILE).unwrap_or(0.1);
            for (options, eps) in [
                (exact(), 0.),
                (
                    Options::default().filter(Filter::Threshold(threshold)),
                    threshold,
                ),
            ] {
                // Nothing is averaged of the entropy's gradient.
                let eps = if case.entropy == Entropy::Differentiable {
                    0.
                } else {
                    eps
                };
                let want = reference.averaged(&upstream, (eps, eps), CUDA_TILE);
                // The copy of the classifier is up to 800 KiB of the workspace: chunks of rows and ranges of classes, and
                // the portable kernels at last.
                for (strategy, workspace) in [
                    (Strategy::Fused, None),
                    (Strategy::Fused, Some(17 << 20)),
                    (Strategy::Recompute, None),
                    (Strategy::Recompute, Some(2 << 20)),
                    (Strategy::Auto, Some(1 << 20)),
                ] {
                    let mut options = options.clone().strategy(strategy);
                    if let Some(bytes) = workspace {
                        options = options.workspace(bytes);
                    }
                    let result =
                        check_against(&case, options, &device, &upstream, &reference, &want);
                    if let Err(error) = result {
                        wrong.push(format!(
                            "D {hidden}, {dtype:?} {strategy:?} {workspace:?} threshold {eps}, turn {turn}: {error}"
                        ));
                    }
                }
            }
        }
    }
    assert_nothing(wrong);
}

/// What runs on this GPU for a D that is a multiple of 8 runs for any other, unless the workspace has no room for twice the copy
/// of the classifier: otherwise the test above would compare the portable kernels alone.
#[test]
fn columns_of_any_number_take_the_same_kernels() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let vocab = 520;
    for dtype in [DType::BF16, DType::F16] {
        let ran = |hidden: usize, options: Options| -> Result<_> {
            let mut case = Case::random(1290, dtype, &[140], hidden, vocab);
            case.inputs.reduction = Reduced::Mean;
            let tensors = case.tensors(&device)?;
            let (e, c) = (&tensors.embeddings, &tensors.classifier);
            let options = case.options(options, &tensors);
            let output = linear_cross_entropy(e, c, &tensors.targets, &options)?;
            Ok((output.implementation, output.strategy))
        };
        let usual = ran(64, exact())?;
        for hidden in [66, 67] {
            assert_eq!(ran(hidden, exact())?, usual, "{dtype:?} D {hidden}");
        }
        let copy = vocab * 72 * 2;
        let (kernels, _) = ran(67, exact().workspace(2 * copy))?;
        assert_eq!(kernels, usual.0, "{dtype:?} in twice the copy");
        let (kernels, _) = ran(67, exact().workspace(2 * copy - 1))?;
        assert_eq!(kernels, Implementation::CudaPortable, "{dtype:?} in less");
    }
    Ok(())
}

/// What lies past the end of a matrix must not be read as its columns: there it is NaN.
#[test]
fn numbers_beside_a_matrix_do_not_matter() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in [DType::BF16, DType::F16] {
        let (rows, hidden, vocab) = (130, 67, 300);
        let case = Case::random(1300, dtype, &[rows], hidden, vocab);
        let within = |values: &[f64], shape: (usize, usize)| {
            let mut all = vec![f64::NAN; shape.1];
            all.extend_from_slice(values);
            all.extend(vec![f64::NAN; 2 * shape.1]);
            let all = case.tensor(&all, &[shape.0 + 3, shape.1], &device)?;
            let var = Var::from_tensor(&all)?;
            let matrix = var.narrow(0, 1, shape.0)?;
            Ok::<_, candle_core::Error>((var, matrix))
        };
        for implementation in KERNELS {
            let (e_var, e) = within(&case.inputs.embeddings, (rows, hidden))?;
            let (c_var, c) = within(&case.inputs.classifier, (vocab, hidden))?;
            let plain = case.tensors(&device)?;
            let options = exact().implementation(implementation);
            let of = |e: &Tensor, c: &Tensor| {
                linear_cross_entropy(e, c, &plain.targets, &options)?
                    .loss
                    .backward()
            };
            let got = of(&e, &c)?;
            let want = of(&plain.embeddings, &plain.classifier)?;
            for (var, of_plain, rows) in [
                (&e_var, &plain.embeddings, rows),
                (&c_var, &plain.classifier, vocab),
            ] {
                let got = got.get(var).expect("a gradient").narrow(0, 1, rows)?;
                let got = crate::numbers(&got)?;
                let want = crate::numbers(want.get(of_plain).expect("a gradient"))?;
                assert!(got == want, "{implementation:?} {dtype:?}");
            }
        }
    }
    Ok(())
}
