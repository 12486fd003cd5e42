//! Sizes around the edges of every tile, addresses that are not aligned, and more logits than 32 bits count.

use crate::common::reference::{Reduced, Reference};
use crate::common::{
    exact, gradients_close, norm, numbers, round_to, weighted, Case, Random, Tensors,
};
use crate::{assert_nothing, device, wrong, KERNELS};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::{linear_cross_entropy, Filter, Implementation, Options, Strategy};
use std::io::Write;

const ROWS: [usize; 7] = [1, 127, 128, 129, 255, 256, 257];
const CLASSES: [usize; 17] = [
    1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385, 513,
];
const HIDDEN: [usize; 11] = [1, 7, 8, 16, 31, 32, 33, 64, 72, 136, 264];

/// Every pair of rows and classes once, and with it one of the hidden sizes in turn: their numbers are prime to
/// each other.
pub fn ragged(dtype: DType) -> impl Iterator<Item = Case> {
    (0..ROWS.len() * CLASSES.len()).map(move |turn| {
        let rows = ROWS[turn % ROWS.len()];
        let vocab = CLASSES[turn % CLASSES.len()];
        // A gradient of a single number may be small by cancellation, and half precision's error of it large.
        let least = if rows == 1 { 7 } else { 1 };
        let hidden = HIDDEN[turn % HIDDEN.len()].max(least);
        let mut case = Case::random(500 + turn as u64, dtype, &[rows], hidden, vocab);
        case.inputs.reduction = Reduced::None;
        if turn % 2 == 1 {
            case = case.with_bias(turn as u64);
        }
        if turn % 3 == 1 {
            case.inputs.softcap = Some(4.);
        }
        // Fewer rows than the most there can be: the count is known on the device only.
        if turn % 5 == 1 && rows > 1 {
            case = case.with_ignored(turn as u64);
        }
        case
    })
}

fn assert_ragged_sizes_are_right(dtype: DType) {
    let Some(device) = device() else { return };
    let mut all = Vec::new();
    for (turn, case) in ragged(dtype).enumerate() {
        let (of_loss, of_lse) = [(true, true), (true, false), (false, true)][turn % 3];
        let upstream = case.upstream(turn as u64, of_loss, of_lse);
        all.extend(wrong(&case, &upstream, Strategy::Auto, &device));
    }
    assert_nothing(all);
}

#[test]
fn sizes_around_tile_edges_are_right_in_bf16() {
    assert_ragged_sizes_are_right(DType::BF16);
}

#[test]
fn sizes_around_tile_edges_are_right_in_f16() {
    assert_ragged_sizes_are_right(DType::F16);
}

#[test]
fn sizes_around_tile_edges_are_right_in_f32() {
    assert_ragged_sizes_are_right(DType::F32);
}

#[test]
fn several_tiles_in_every_direction_are_right() {
    let Some(device) = device() else { return };
    let mut all = Vec::new();
    for (seed, dtype) in [DType::BF16, DType::F16, DType::F32]
        .into_iter()
        .enumerate()
    {
        let mut case = Case::random(seed as u64, dtype, &[700], 72, 900).with_bias(1);
        case.inputs.reduction = [Reduced::Mean, Reduced::Sum, Reduced::None][seed];
        all.extend(wrong(
            &case,
            &case.upstream(2, true, false),
            Strategy::Auto,
            &device,
        ));
    }
    assert_nothing(all);
}

/// A matrix that begins one number after the start of its buffer, and the `Var` that it is a part of.
fn shifted(case: &Case, values: &[f64], shape: &[usize], device: &Device) -> Result<(Var, Tensor)> {
    let mut all = vec![0.];
    all.extend_from_slice(values);
    let var = Var::from_tensor(&case.tensor(&all, &[all.len()], device)?)?;
    let matrix = var.narrow(0, 1, values.len())?.reshape(shape)?;
    Ok((var, matrix))
}

#[test]
fn matrices_need_not_begin_on_sixteen_bytes() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let (rows, hidden, vocab) = (200, 64, 300);
        let mut case = Case::random(520, dtype, &[rows], hidden, vocab);
        case.inputs.reduction = Reduced::None;
        let reference = Reference::new(case.inputs.clone());
        let upstream = case.upstream(1, true, true);
        let want = reference.gradients(&upstream, 0.);
        for implementation in KERNELS {
            for (of_embeddings, of_classifier) in [(true, false), (false, true), (true, true)] {
                let what = format!(
                    "{implementation:?} {dtype:?} embeddings {of_embeddings} classifier {of_classifier}"
                );
                let plain = case.tensors(&device)?;
                let (e_values, c_values) = (&case.inputs.embeddings, &case.inputs.classifier);
                let (e_var, e) = shifted(&case, e_values, &[rows, hidden], &device)?;
                let (c_var, c) = shifted(&case, c_values, &[vocab, hidden], &device)?;
                let e = if of_embeddings {
                    &e
                } else {
                    plain.embeddings.as_tensor()
                };
                let c = if of_classifier {
                    &c
                } else {
                    plain.classifier.as_tensor()
                };
                let options = case.options(exact().implementation(implementation), &plain);
                let output = linear_cross_entropy(e, c, &plain.targets, &options)?;
                let mut grads = weighted(&output, &upstream)?.backward()?;
                // Where the variable is the whole buffer, its first number has no part in the loss.
                for (var, to, values, is) in [
                    (&e_var, &plain.embeddings, e_values, of_embeddings),
                    (&c_var, &plain.classifier, c_values, of_classifier),
                ] {
                    if is {
                        let grad = grads.get(var).expect("a gradient");
                        let grad = grad.narrow(0, 1, values.len())?.reshape(to.shape())?;
                        grads.insert(to, grad);
                    }
                }
                let tensors = Tensors {
                    bias: None,
                    ..plain
                };
                gradients_close(&grads, &tensors, &want, dtype, reference.largest_logit)
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
            }
        }
    }
    Ok(())
}

/// Whether every row of a matrix is what it should be, within the rounding to bf16 of the terms that it is a sum
/// of: `sizes` holds the sum of their norms.
fn assert_rows_close(what: &str, got: &[f64], want: &[f64], sizes: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let columns = want.len() / sizes.len();
    let mut wrong = Vec::new();
    let rows = got.chunks(columns).zip(want.chunks(columns)).zip(sizes);
    for (row, ((got, want), size)) in rows.enumerate() {
        let difference = norm(got.iter().zip(want).map(|(a, b)| a - b));
        if difference.is_nan() || difference > 5e-3 * size {
            wrong.push(format!(
                "row {row} differs by {difference:e} of {size:e}, begins {:?}, want {:?}",
                &got[..3.min(columns)],
                &want[..3.min(columns)]
            ));
        }
    }
    let count = wrong.len();
    wrong.truncate(6);
    assert!(
        count == 0,
        "{what}: {count} rows are wrong, the first are\n    {}",
        wrong.join("\n    ")
    );
}

#[test]
fn more_logits_than_32_bits_count_are_right() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    // Few rows that differ, in no order: so that what comes out is known from a few products.
    const DISTINCT: usize = 4;
    let (rows, vocab, hidden) = (16_640, 262_144, 64);
    assert!(rows * vocab > 1 << 32);
    let mut random = Random::new(530);
    let mut matrix = |rows: usize| -> Vec<f64> {
        let mut number = || round_to(DType::BF16, 2. * random.uniform() - 1.);
        (0..rows * hidden).map(|_| number()).collect()
    };
    let (distinct, classes) = (matrix(DISTINCT), matrix(vocab));
    let kinds: Vec<usize> = (0..rows).map(|_| random.below(DISTINCT)).collect();
    let mut targets: Vec<usize> = (0..rows).map(|_| random.below(vocab)).collect();
    // The corners of the logits.
    (targets[0], targets[1]) = (0, vocab - 1);
    (targets[rows - 2], targets[rows - 1]) = (0, vocab - 1);

    // The sum of all losses, and its gradients, in f64.
    let row = |matrix: &[f64], index: usize| -> Vec<f64> {
        matrix[index * hidden..(index + 1) * hidden].to_vec()
    };
    let (mut lse, mut logits) = (Vec::new(), Vec::new());
    let mut mean_class = vec![vec![0.; hidden]; DISTINCT];
    let (mut want_dc, mut size_dc) = (vec![0.; vocab * hidden], vec![0.; vocab]);
    let length = |row: &[f64]| norm(row.iter().copied());
    for (kind, mean_class) in mean_class.iter_mut().enumerate() {
        let e = row(&distinct, kind);
        let of_kind = kinds.iter().filter(|&&k| k == kind).count() as f64;
        let z: Vec<f64> = classes
            .chunks(hidden)
            .map(|c| c.iter().zip(&e).map(|(c, e)| c * e).sum())
            .collect();
        let log_sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
        for (class, z) in z.iter().enumerate() {
            let p = (z - log_sum).exp();
            size_dc[class] += of_kind * p * length(&e);
            for d in 0..hidden {
                mean_class[d] += p * classes[class * hidden + d];
                want_dc[class * hidden + d] += of_kind * p * e[d];
            }
        }
        lse.push(log_sum);
        logits.push(z);
    }
    let (mut want_de, mut size_de) = (Vec::with_capacity(rows * hidden), Vec::new());
    for (&kind, &target) in kinds.iter().zip(&targets) {
        size_de.push(length(&mean_class[kind]) + length(&row(&classes, target)));
        size_dc[target] += length(&row(&distinct, kind));
        for d in 0..hidden {
            want_de.push(mean_class[kind][d] - classes[target * hidden + d]);
            want_dc[target * hidden + d] -= distinct[kind * hidden + d];
        }
    }

    let tensor = |values: &[f64], rows: usize| -> Result<Var> {
        let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        let tensor = Tensor::from_vec(values, (rows, hidden), &device)?;
        Var::from_tensor(&tensor.to_dtype(DType::BF16)?)
    };
    let all_rows: Vec<f64> = kinds.iter().flat_map(|&k| row(&distinct, k)).collect();
    let (embeddings, classifier) = (tensor(&all_rows, rows)?, tensor(&classes, vocab)?);
    let target_tensor: Vec<i64> = targets.iter().map(|&t| t as i64).collect();
    let target_tensor = Tensor::from_vec(target_tensor, rows, &device)?;
    let run = |what: &str, options: Options| -> Result<()> {
        let options = options.reduction(candle_cut_cross_entropy::Reduction::None);
        let output = linear_cross_entropy(&embeddings, &classifier, &target_tensor, &options)?;
        let (loss, got_lse) = (numbers(&output.loss)?, numbers(&output.lse)?);
        for (i, (&kind, &target)) in kinds.iter().zip(&targets).enumerate() {
            let want = lse[kind] - logits[kind][target];
            let (loss, got_lse) = (loss[i], got_lse[i]);
            assert!(
                (loss - want).abs() < 1e-4 && (got_lse - lse[kind]).abs() < 1e-4,
                "{what}: row {i} target {target}: loss {loss}, want {want}; lse {got_lse}, want {}",
                lse[kind]
            );
        }
        let grads = output.loss.sum_all()?.backward()?;
        let grad = |var: &Var| numbers(grads.get(var).expect("a gradient"));
        assert_rows_close(
            &format!("{what}: dE"),
            &grad(&embeddings)?,
            &want_de,
            &size_de,
        );
        assert_rows_close(
            &format!("{what}: dC"),
            &grad(&classifier)?,
            &want_dc,
            &size_dc,
        );
        Ok(())
    };
    for implementation in KERNELS {
        let options = exact().implementation(implementation);
        run(&format!("{implementation:?} exact"), options.clone())?;
        // Drops nothing, but by way of the lists of tiles.
        let listed = options.filter(Filter::Threshold(0.));
        run(&format!("{implementation:?} threshold 0"), listed)?;
    }
    // The gradient of all logits at once, 9 GB: where there is room.
    if let Err(error) = Tensor::zeros(12 << 30, DType::U8, &device) {
        let _ = writeln!(
            std::io::stderr(),
            "skipped: a workspace of 10 GiB ({error})"
        );
        return Ok(());
    }
    let whole = exact()
        .implementation(Implementation::Cuda)
        .workspace(10 << 30);
    run("Cuda, a workspace of 10 GiB", whole)
}
