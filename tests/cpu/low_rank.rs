//! Low-rank adapters of the classifier.

use crate::common::low_rank::{wrong, Adapted, SIZES};
use crate::common::shards::TIMEOUT;
use crate::common::{exact, numbers, Case};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::vocab_parallel::{ThreadCommunicator, VocabParallel};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Filter, Implementation, LinearCrossEntropy, LowRank, Options,
};
use std::sync::Arc;

#[test]
fn losses_and_gradients_are_those_of_the_merged_classifier() {
    let dtypes = [DType::F64, DType::F32, DType::BF16, DType::F16];
    let wrong = wrong(&Device::Cpu, &dtypes, &[Implementation::Auto], 2);
    assert!(wrong.is_empty(), "{}\n{}", wrong.len(), wrong.join("\n"));
}

/// A small problem in f64 and its matrices: embeddings, classifier, A, B, targets.
fn small() -> Result<(Case, [Tensor; 4], Tensor)> {
    let case = Case::random(7, DType::F64, &[9], 6, 11).with_ignored(8);
    let tensors = case.tensors(&Device::Cpu)?;
    let a = Tensor::randn(0f64, 0.5, (3, 6), &Device::Cpu)?;
    let b = Tensor::randn(0f64, 0.5, (11, 3), &Device::Cpu)?;
    let matrices = [
        tensors.embeddings.detach(),
        tensors.classifier.detach(),
        a,
        b,
    ];
    Ok((case, matrices, tensors.targets))
}

/// 0.7 in bf16 is 0.69921875. And `A` may be a view.
#[test]
fn the_scale_is_not_rounded_to_the_dtype_of_a() -> Result<()> {
    let (_, [embeddings, classifier, a, b], targets) = small()?;
    let [embeddings, classifier, b] =
        [embeddings, classifier, b].map(|tensor| tensor.to_dtype(DType::F32));
    let (embeddings, classifier, b) = (embeddings?, classifier?, b?);
    let a = (a.to_dtype(DType::BF16)? * 8.)?;
    let beside = Tensor::cat(&[&a, &a], 1)?;
    let losses = |a: &Tensor| -> Result<Vec<f64>> {
        let options = exact().adapter(LowRank::new(a, &b, 0.7));
        let output = linear_cross_entropy(&embeddings, &classifier, &targets, &options)?;
        numbers(&output.lse)
    };
    let want = losses(&a.to_dtype(DType::F32)?)?;
    for a in [&a, &beside.narrow(1, 0, 6)?] {
        for (got, want) in losses(a)?.into_iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }
    Ok(())
}

#[test]
fn gradients_are_finite_differences() -> Result<()> {
    let (_, [embeddings, classifier, a, b], targets) = small()?;
    let loss = |e: &Tensor, a: &Tensor, b: &Tensor| {
        let adapter = LowRank::new(a, b, 0.7);
        let options = exact().softcap(5.).z_loss_weight(0.1).adapter(adapter);
        linear_cross_entropy(e, &classifier, &targets, &options)
    };
    let vars = [&embeddings, &a, &b].map(Var::from_tensor);
    let [e, a, b] = vars;
    let (e, a, b) = (e?, a?, b?);
    let gradients = backward(&loss(&e, &a, &b)?.loss)?;
    for (which, var) in [&e, &a, &b].into_iter().enumerate() {
        let gradient = numbers(gradients.get(var).expect("a gradient"))?;
        let values = numbers(var)?;
        for at in (0..values.len()).step_by(5) {
            // Losses are f32: a wide step.
            let h = 0.02;
            let at_step = |step: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[at] += step;
                let moved = Tensor::from_vec(moved, var.shape(), &Device::Cpu)?;
                let mut all = [e.as_tensor(), a.as_tensor(), b.as_tensor()];
                all[which] = &moved;
                Ok(loss(all[0], all[1], all[2])?.loss.to_scalar::<f32>()? as f64)
            };
            let (far, near) = (
                (at_step(2. * h)? - at_step(-2. * h)?) / (4. * h),
                (at_step(h)? - at_step(-h)?) / (2. * h),
            );
            let slope = (4. * near - far) / 3.;
            assert!(
                (slope - gradient[at]).abs() < 2e-4,
                "{which} [{at}]: {slope} and {}",
                gradient[at]
            );
        }
    }
    Ok(())
}

#[test]
fn only_what_is_tracked_gets_a_gradient() -> Result<()> {
    let (_, [embeddings, classifier, a, b], targets) = small()?;
    for tracked in 0..8 {
        let as_asked = |tensor: &Tensor, bit: usize| -> Result<Tensor> {
            match tracked >> bit & 1 {
                0 => Ok(tensor.clone()),
                _ => Ok(Var::from_tensor(tensor)?.as_tensor().clone()),
            }
        };
        let (e, a, b) = (
            as_asked(&embeddings, 0)?,
            as_asked(&a, 1)?,
            as_asked(&b, 2)?,
        );
        let options = exact().adapter(LowRank::new(&a, &b, 1.));
        let loss = linear_cross_entropy(&e, &classifier, &targets, &options)?.loss;
        for gradients in [backward(&loss)?, loss.backward()?] {
            for (bit, tensor) in [&e, &a, &b].into_iter().enumerate() {
                let got = gradients.get(tensor).map(|g| g.dims().to_vec());
                let want = (tracked >> bit & 1 == 1).then(|| tensor.dims().to_vec());
                assert_eq!(got, want, "{tracked:b}, {bit}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_adapter_multiplies_the_input_that_it_is_told_of() -> Result<()> {
    let (_, [embeddings, classifier, a, b], targets) = small()?;
    let factors = Tensor::rand(0f64, 2., embeddings.shape(), &Device::Cpu)?;
    let (e, a, b) = (
        Var::from_tensor(&embeddings)?,
        Var::from_tensor(&a)?,
        Var::from_tensor(&b)?,
    );
    let times = factors.clone();
    let adapter = LowRank::new(&a, &b, 0.7).input(move |e| e * &times);
    let options = exact().adapter(adapter);
    let output = linear_cross_entropy(&e, &classifier, &targets, &options)?;
    // The same with Candle's operations: the products side by side.
    let inner = (e.as_tensor() * &factors)?
        .matmul(&a.t()?)?
        .affine(0.7, 0.)?;
    let wide = Tensor::cat(&[e.as_tensor(), &inner], 1)?;
    let matrix = Tensor::cat(&[&classifier, b.as_tensor()], 1)?;
    let want = linear_cross_entropy(&wide, &matrix, &targets, &exact())?;
    let (got, expected) = (backward(&output.loss)?, want.loss.backward()?);
    for var in [&e, &a, &b] {
        let pair = [&got, &expected].map(|store| numbers(store.get(var).expect("a gradient")));
        let [got, expected] = pair;
        for (got, want) in got?.iter().zip(expected?) {
            assert!((got - want).abs() < 1e-9, "{got} {want}");
        }
    }
    let wrong = LowRank::new(&a, &b, 1.).input(|e| e.narrow(0, 0, 1));
    let options = Options::default().adapter(wrong);
    let error = linear_cross_entropy(&e, &classifier, &targets, &options).unwrap_err();
    assert!(
        error.to_string().contains("the input of an adapter"),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_layer_with_an_adapter_has_its_logits() -> Result<()> {
    let (_, [embeddings, classifier, a, b], targets) = small()?;
    let options = exact().adapter(LowRank::new(&a, &b, 0.7));
    let layer = LinearCrossEntropy::new(classifier.clone(), None, options);
    let merged = (&classifier + b.matmul(&a)?.affine(0.7, 0.)?)?;
    let plain = LinearCrossEntropy::new(merged, None, exact());
    let logits = numbers(&layer.logits(&embeddings)?)?;
    for (got, want) in logits.iter().zip(numbers(&plain.logits(&embeddings)?)?) {
        assert!((got - want).abs() < 1e-12, "{got} {want}");
    }
    let loss = |layer: &LinearCrossEntropy| -> Result<f32> {
        layer.forward(&embeddings, &targets)?.loss.to_scalar()
    };
    assert!((loss(&layer)? - loss(&plain)?).abs() < 1e-6);
    Ok(())
}

#[test]
fn nothing_is_filtered() -> Result<()> {
    let adapted = Adapted::random(3, DType::F32, SIZES[4]);
    let upstream = adapted.case.upstream(4, true, false);
    let of = |options: Options| adapted.compute(options, &Device::Cpu, &upstream);
    let exact = of(exact())?;
    for filter in [Filter::Threshold(0.5), Filter::Drop(0.5)] {
        let filtered = of(Options::default().filter(filter))?;
        assert_eq!(filtered.output.kept_tiles()?, Some(1.));
        assert_eq!(filtered.gradients, exact.gradients);
    }
    Ok(())
}

#[test]
fn rows_that_do_not_count_may_hold_anything_but_for_a() -> Result<()> {
    let (_, [embeddings, classifier, a, b], _) = small()?;
    let targets = Tensor::new(&[1i64, -100, 3, 4, -100, 0, 10, 2, 5], &Device::Cpu)?;
    let mut values = numbers(&embeddings)?;
    values[6..12].fill(f64::NAN);
    values[24..30].fill(f64::INFINITY);
    let e = Var::from_vec(values, (9, 6), &Device::Cpu)?;
    let b = Var::from_tensor(&b)?;
    let options = exact().adapter(LowRank::new(&a, &b, 1.));
    let output = linear_cross_entropy(&e, &classifier, &targets, &options)?;
    let gradients = backward(&output.loss)?;
    for var in [&e, &b] {
        let gradient = numbers(gradients.get(var).expect("a gradient"))?;
        assert!(gradient.iter().all(|g| g.is_finite()));
    }
    assert!(output.loss.to_scalar::<f32>()?.is_finite());
    Ok(())
}

#[test]
fn what_does_not_match_is_named() -> Result<()> {
    let (_, [embeddings, classifier, a, b], targets) = small()?;
    let error = |classifier: &Tensor, adapter: LowRank| {
        let options = Options::default().adapter(adapter);
        let error = linear_cross_entropy(&embeddings, classifier, &targets, &options);
        error.unwrap_err().to_string()
    };
    let says = |text: String, parts: &[&str]| {
        let all = parts.iter().all(|part| text.contains(part));
        assert!(all, "{text}: {parts:?}");
    };
    let short = a.narrow(1, 0, 5)?;
    says(
        error(&classifier, LowRank::new(&short, &b, 1.)),
        &["A (r, 6)", "[3, 5]"],
    );
    let few = b.narrow(0, 0, 10)?;
    says(
        error(&classifier, LowRank::new(&a, &few, 1.)),
        &["B (11, r)", "[10, 3]"],
    );
    let other = b.narrow(1, 0, 2)?;
    says(
        error(&classifier, LowRank::new(&a, &other, 1.)),
        &["[3, 6]", "[11, 2]"],
    );
    let whole = a.to_dtype(DType::I64)?;
    says(
        error(&classifier, LowRank::new(&whole, &b, 1.)),
        &["A of the adapter", "I64"],
    );
    says(
        error(&classifier, LowRank::new(&a, &b, f64::NAN)),
        &["scale", "NaN"],
    );
    let tracked = Var::from_tensor(&classifier)?;
    says(error(&tracked, LowRank::new(&a, &b, 1.)), &["frozen"]);
    Ok(())
}

/// What a rank with these classes gets of a small problem: loss, dE, dA and dB.
fn of_classes(
    classes: std::ops::Range<usize>,
    shard: Option<VocabParallel>,
) -> Result<[Vec<f64>; 4]> {
    let (_, [embeddings, classifier, ..], targets) = small()?;
    let sines = |n: usize| (0..n).map(|i| (i as f64 * 1.7).sin()).collect::<Vec<_>>();
    let var = |tensor: &Tensor| Var::from_tensor(&tensor.force_contiguous()?);
    let here = |tensor: &Tensor| tensor.narrow(0, classes.start, classes.len());
    let e = var(&embeddings)?;
    let a = var(&Tensor::from_vec(sines(18), (3, 6), &Device::Cpu)?)?;
    let b = var(&here(&Tensor::from_vec(sines(33), (11, 3), &Device::Cpu)?)?)?;
    let options = exact()
        .label_smoothing(0.1)
        .vocab_parallel(shard)
        .adapter(LowRank::new(&a, &b, 0.7));
    let loss = linear_cross_entropy(&e, &here(&classifier)?, &targets, &options)?.loss;
    let gradients = backward(&loss)?;
    let gradient = |var: &Var| numbers(gradients.get(var).expect("a gradient"));
    Ok([numbers(&loss)?, gradient(&e)?, gradient(&a)?, gradient(&b)?])
}

#[test]
fn shards_have_their_part_of_the_adapter() -> Result<()> {
    let [loss, de, da, db] = of_classes(0..11, None)?;
    let mut of_ranks = Vec::new();
    std::thread::scope(|scope| {
        let group = ThreadCommunicator::group(2, TIMEOUT)?.into_iter();
        let threads: Vec<_> = group
            .zip([0..4, 4..11])
            .map(|(communicator, classes)| {
                let shard = VocabParallel {
                    start: classes.start,
                    stop: classes.end,
                    communicator: Arc::new(communicator),
                    reduce_e_grad: true,
                };
                scope.spawn(|| of_classes(classes, Some(shard)))
            })
            .collect();
        for thread in threads {
            of_ranks.push(thread.join().unwrap()?);
        }
        Ok::<_, candle_core::Error>(())
    })?;
    let db_of_ranks = [&of_ranks[0][3][..], &of_ranks[1][3]].concat();
    let mut pairs = vec![(db, db_of_ranks)];
    for [loss_of_rank, de_of_rank, da_of_rank, _] in of_ranks {
        pairs.push((loss.clone(), loss_of_rank));
        pairs.push((de.clone(), de_of_rank));
        pairs.push((da.clone(), da_of_rank));
    }
    for (want, got) in pairs {
        assert_eq!(want.len(), got.len());
        for (want, got) in want.iter().zip(got) {
            assert!((want - got).abs() < 1e-6, "{got}, want {want}");
        }
    }
    Ok(())
}
