//! Distillation: what holds of any inputs, and extremes.

use crate::common::{close, numbers, Random};
use candle_core::{DType, Device, Result, Tensor, Var, D};
use candle_cut_cross_entropy::soft_targets::{
    class_logits, divergence, top_k_divergence, Divergence, Rest, Teacher, TopK,
};
use candle_cut_cross_entropy::{backward, Options, Reduction, Strategy};
use candle_nn::ops::log_softmax;

pub const CPU: Device = Device::Cpu;
const KINDS: [Divergence; 3] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::JensenShannon(0.3),
];

pub fn normal(seed: u64, shape: &[usize]) -> Result<Tensor> {
    let numbers = Random::new(seed).normals(shape.iter().product(), 1.);
    Tensor::from_vec(numbers, shape, &CPU)?.to_dtype(DType::F32)
}

fn var(seed: u64, shape: &[usize]) -> Result<Var> {
    Var::from_tensor(&normal(seed, shape)?)
}

pub fn targets(rows: usize) -> Result<Tensor> {
    Tensor::zeros(rows, DType::I64, &CPU)
}

fn nothing(values: &Tensor) -> Result<bool> {
    Ok(numbers(values)?.iter().all(|x| *x == 0.))
}

#[test]
fn equal_heads_are_no_way_apart() -> Result<()> {
    let (e, c) = (var(1, &[6, 8])?, var(2, &[40, 8])?);
    let teacher = Teacher::new(&e.as_tensor().copy()?, &c.as_tensor().copy()?);
    for kind in KINDS {
        let loss = divergence(&e, &c, &targets(6)?, &teacher, kind, &Options::default())?;
        assert!(nothing(&loss)?, "{kind:?}: {loss}");
        let gradients = backward(&loss)?;
        assert!(nothing(gradients.get(&e).unwrap())?);
        assert!(nothing(gradients.get(&c).unwrap())?);
    }
    Ok(())
}

#[test]
fn half_the_mixture_is_as_far_from_either() -> Result<()> {
    let (e, c) = (normal(1, &[6, 8])?, normal(2, &[40, 8])?);
    let (f, d) = (normal(3, &[6, 5])?, normal(4, &[40, 5])?);
    let kind = Divergence::JensenShannon(0.5);
    let options = Options::default().reduction(Reduction::None);
    let one = divergence(&e, &c, &targets(6)?, &Teacher::new(&f, &d), kind, &options)?;
    let other = divergence(&f, &d, &targets(6)?, &Teacher::new(&e, &c), kind, &options)?;
    close("swapped", &numbers(&one)?, &numbers(&other)?, 1e-6, 1.).unwrap();
    assert!(numbers(&one)?.iter().all(|x| *x > 0. && *x < 2f64.ln()));
    Ok(())
}

#[test]
fn a_teacher_that_names_every_class_is_the_whole_teacher() -> Result<()> {
    let (e, c) = (var(1, &[6, 8])?, var(2, &[21, 8])?);
    let (f, d) = (normal(3, &[6, 5])?, normal(4, &[21, 5])?);
    let options = Options::default();
    let whole = Teacher::new(&f, &d).temperature(3.);
    let whole = divergence(
        &e,
        &c,
        &targets(6)?,
        &whole,
        Divergence::ForwardKl,
        &options,
    )?;
    let wants = backward(&whole)?;
    let probabilities = log_softmax(&(f.matmul(&d.t()?)? / 3.)?, D::Minus1)?.exp()?;
    let classes = Tensor::arange(0u32, 21, &CPU)?.broadcast_as((6, 21))?;
    for rest in [Rest::OneClass, Rest::Renormalized, Rest::LeftOut] {
        let teacher = TopK::new(&classes, &probabilities)
            .rest(rest)
            .temperature(3.);
        let loss = top_k_divergence(&e, &c, &targets(6)?, &teacher, &options)?;
        close("loss", &numbers(&loss)?, &numbers(&whole)?, 2e-6, 1.).unwrap();
        let gradients = backward(&loss)?;
        for var in [&e, &c] {
            let (got, want) = (gradients.get(var).unwrap(), wants.get(var).unwrap());
            close("gradient", &numbers(got)?, &numbers(want)?, 1e-5, 0.02).unwrap();
        }
    }
    Ok(())
}

#[test]
fn classes_that_neither_side_has_add_nothing() -> Result<()> {
    let mut bias = vec![0f32; 30];
    bias[3..9].fill(f32::NEG_INFINITY);
    let bias = Tensor::new(bias, &CPU)?;
    let (e, c) = (var(1, &[6, 8])?, var(2, &[30, 8])?);
    let (f, d) = (normal(3, &[6, 5])?, normal(4, &[30, 5])?);
    let kept = |t: &Tensor| Tensor::cat(&[t.narrow(0, 0, 3)?, t.narrow(0, 9, 21)?], 0);
    let few = Var::from_tensor(&kept(&c)?)?;
    for kind in KINDS {
        let teacher = Teacher::new(&f, &d).bias(&bias);
        let options = Options::default().bias(&bias);
        let loss = divergence(&e, &c, &targets(6)?, &teacher, kind, &options)?;
        let teacher = Teacher::new(&f, &kept(&d)?);
        let want = divergence(&e, &few, &targets(6)?, &teacher, kind, &Options::default())?;
        close("loss", &numbers(&loss)?, &numbers(&want)?, 1e-6, 1.).unwrap();
        let (got, want) = (backward(&loss)?, backward(&want)?);
        let of_c = kept(got.get(&c).unwrap())?;
        let want_c = want.get(&few).unwrap();
        close("classifier", &numbers(&of_c)?, &numbers(want_c)?, 1e-5, 0.1).unwrap();
        let (got, want) = (got.get(&e).unwrap(), want.get(&e).unwrap());
        close("embeddings", &numbers(got)?, &numbers(want)?, 1e-5, 0.1).unwrap();
    }
    // Named, with no probability: its logit of -inf is no matter.
    let classes = Tensor::new(&[4u32, 10], &CPU)?.broadcast_as((6, 2))?;
    let probabilities = Tensor::new(&[0f32, 0.5], &CPU)?.broadcast_as((6, 2))?;
    for rest in [Rest::OneClass, Rest::Renormalized, Rest::LeftOut] {
        let teacher = TopK::new(&classes, &probabilities).rest(rest);
        let options = Options::default().bias(&bias);
        let loss = top_k_divergence(&e, &c, &targets(6)?, &teacher, &options)?;
        let gradients = backward(&loss)?;
        for values in [
            &loss,
            gradients.get(&e).unwrap(),
            gradients.get(&c).unwrap(),
        ] {
            assert!(numbers(values)?.iter().all(|x| x.is_finite()), "{rest:?}");
        }
    }
    Ok(())
}

#[test]
fn a_sure_student_has_a_gradient_yet() -> Result<()> {
    // All of the student's probability is on the named class, and the teacher's is not.
    let e = Var::new(&[[100f32]], &CPU)?;
    let c = Var::new(&[[1f32], [-1.], [-0.9]], &CPU)?;
    let classes = Tensor::new(&[[0u32]], &CPU)?;
    let probabilities = Tensor::new(&[[0.5f32]], &CPU)?;
    let teacher = TopK::new(&classes, &probabilities);
    let loss = top_k_divergence(&e, &c, &targets(1)?, &teacher, &Options::default())?;
    assert!(loss.to_scalar::<f32>()?.is_finite());
    let gradients = backward(&loss)?;
    assert!(numbers(gradients.get(&c).unwrap())?
        .iter()
        .all(|g| g.is_finite()));
    assert!(numbers(gradients.get(&e).unwrap())?[0].is_finite());
    Ok(())
}

#[test]
fn ignored_positions_are_not_read() -> Result<()> {
    let hole = |t: Tensor| -> Result<Tensor> {
        let nan = Tensor::full(f32::NAN, (1, t.dim(1)?), &CPU)?;
        Tensor::cat(&[t.narrow(0, 0, 2)?, nan, t.narrow(0, 3, 2)?], 0)
    };
    let targets = Tensor::new(&[0i64, 1, -100, 2, 0], &CPU)?;
    let (e, c) = (
        Var::from_tensor(&hole(normal(1, &[5, 8])?)?)?,
        var(2, &[30, 8])?,
    );
    let options = Options::default();
    let finite = |loss: &Tensor| -> Result<()> {
        let gradients = backward(loss)?;
        for values in [loss, gradients.get(&e).unwrap(), gradients.get(&c).unwrap()] {
            assert!(numbers(values)?.iter().all(|x| x.is_finite()));
        }
        assert!(nothing(&gradients.get(&e).unwrap().get(2)?)?);
        Ok(())
    };
    let teacher = Teacher::new(&hole(normal(3, &[5, 4])?)?, &normal(4, &[30, 4])?);
    for kind in KINDS {
        finite(&divergence(&e, &c, &targets, &teacher, kind, &options)?)?;
    }
    let classes = Tensor::new(&[[1i64, 2], [3, 4], [-1, 99], [5, 6], [7, 8]], &CPU)?;
    let probabilities = hole(Tensor::full(0.4f32, (5, 2), &CPU)?)?;
    for rest in [Rest::OneClass, Rest::Renormalized, Rest::LeftOut] {
        let teacher = TopK::new(&classes, &probabilities).rest(rest);
        finite(&top_k_divergence(&e, &c, &targets, &teacher, &options)?)?;
    }
    Ok(())
}

#[test]
fn nothing_to_learn_from_is_a_loss_of_zero() -> Result<()> {
    let none = Tensor::full(-100i64, 5, &CPU)?;
    let (e, c) = (var(1, &[5, 8])?, var(2, &[30, 8])?);
    let teacher = Teacher::new(&normal(3, &[5, 4])?, &normal(4, &[30, 4])?);
    let classes = Tensor::zeros((5, 2), DType::U32, &CPU)?;
    let few = TopK::new(&classes, &Tensor::full(0.2f32, (5, 2), &CPU)?);
    for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None] {
        let options = Options::default().reduction(reduction);
        for loss in [
            divergence(&e, &c, &none, &teacher, Divergence::ForwardKl, &options)?,
            top_k_divergence(&e, &c, &none, &few, &options)?,
        ] {
            assert!(nothing(&loss)?);
            let gradients = backward(&loss.sum_all()?)?;
            assert!(nothing(gradients.get(&e).unwrap())?);
            assert!(nothing(gradients.get(&c).unwrap())?);
        }
    }
    Ok(())
}

#[test]
fn gradients_reach_what_is_tracked() -> Result<()> {
    let vars = [
        var(1, &[5, 8])?,
        var(2, &[30, 8])?,
        var(3, &[30])?,
        var(4, &[5, 4])?,
        var(5, &[30, 4])?,
        var(6, &[30])?,
    ];
    let candidates = Tensor::arange(0u32, 10, &CPU)?.reshape((5, 2))?;
    let all = |tracked: u32| -> Vec<Tensor> {
        let tensors = vars.iter().enumerate();
        tensors
            .map(|(i, var)| match tracked >> i & 1 {
                1 => var.as_tensor().clone(),
                _ => var.as_detached_tensor(),
            })
            .collect()
    };
    let loss = |t: &[Tensor]| -> Result<Tensor> {
        let options = Options::default().bias(&t[2]);
        let teacher = Teacher::new(&t[3], &t[4]).bias(&t[5]);
        let kind = Divergence::JensenShannon(0.5);
        divergence(&t[0], &t[1], &targets(5)?, &teacher, kind, &options)?
            + class_logits(&t[0], &t[1], &candidates, &options)?.sum_all()?
    };
    let wants = backward(&loss(&all(63))?)?;
    for tracked in 1..64 {
        // Twice, and through an upstream gradient of 3: the second has nothing formed left.
        let loss = (loss(&all(tracked))? * 3.)?;
        for gradients in [backward(&loss)?, loss.backward()?] {
            for (i, var) in vars.iter().enumerate() {
                let got = gradients.get(var);
                assert_eq!(got.is_some(), tracked >> i & 1 == 1, "{tracked:b} {i}");
                if let Some(got) = got {
                    let want = numbers(&(wants.get(var).unwrap() * 3.)?)?;
                    close("gradient", &numbers(got)?, &want, 1e-5, 0.1).unwrap();
                }
            }
        }
    }
    Ok(())
}

#[test]
fn logits_of_classes_are_those_of_all_classes() -> Result<()> {
    let (e, c, bias) = (
        normal(1, &[2, 3, 8])?,
        normal(2, &[30, 8])?,
        normal(3, &[30])?,
    );
    let all = e.reshape((6, 8))?.matmul(&c.t()?)?.broadcast_add(&bias)?;
    let all = ((all / 5.)?.tanh()? * 5.)?;
    let classes: Vec<i64> = (0..24).map(|i| i * 11 % 30).collect();
    let classes = Tensor::from_vec(classes, (2, 3, 4), &CPU)?;
    let index = classes.reshape((6, 4))?.to_dtype(DType::U32)?;
    let want = numbers(&all.gather(&index, 1)?)?;
    let options = Options::default().bias(&bias).softcap(5.);
    for dtype in [DType::I64, DType::U32, DType::I32] {
        let logits = class_logits(&e, &c, &classes.to_dtype(dtype)?, &options)?;
        assert_eq!(
            (logits.dims(), logits.dtype()),
            (&[2, 3, 4][..], DType::F32)
        );
        close("logits", &numbers(&logits)?, &want, 1e-6, 1.).unwrap();
    }
    Ok(())
}

#[test]
fn student_and_teacher_may_have_dtypes_of_their_own() -> Result<()> {
    let (e, c) = (var(1, &[6, 8])?, var(2, &[40, 8])?);
    let half = |t: Tensor| t.to_dtype(DType::BF16);
    let (f, d) = (half(normal(3, &[6, 5])?)?, half(normal(4, &[40, 5])?)?);
    let wide = Teacher::new(&f.to_dtype(DType::F32)?, &d.to_dtype(DType::F32)?);
    let double = Teacher::new(&f.to_dtype(DType::F64)?, &d.to_dtype(DType::F64)?);
    for kind in KINDS {
        let run = |teacher: &Teacher| -> Result<_> {
            let options = Options::default();
            let loss = divergence(&e, &c, &targets(6)?, teacher, kind, &options)?;
            let gradients = backward(&loss)?;
            Ok((loss, gradients.get(&c).unwrap().clone()))
        };
        let (want, want_c) = run(&wide)?;
        for teacher in [&Teacher::new(&f, &d), &double] {
            let (loss, of_c) = run(teacher)?;
            assert_eq!((loss.dtype(), of_c.dtype()), (DType::F32, DType::F32));
            close("loss", &numbers(&loss)?, &numbers(&want)?, 1e-6, 1.).unwrap();
            close("gradient", &numbers(&of_c)?, &numbers(&want_c)?, 1e-5, 0.1).unwrap();
        }
    }
    Ok(())
}

#[test]
fn a_loss_scale_beyond_f16_is_multiplied_before_rounding() -> Result<()> {
    let half = |seed, shape: &[usize]| -> Result<Var> {
        Var::from_tensor(&normal(seed, shape)?.to_dtype(DType::F16)?)
    };
    let (e, c) = (half(1, &[6, 8])?, half(2, &[40, 8])?);
    let (teacher_e, teacher_c) = (half(3, &[6, 8])?, half(4, &[40, 8])?);
    let teacher = Teacher::new(&teacher_e.detach(), &teacher_c.detach());
    let mut all = Vec::new();
    for strategy in [Strategy::Fused, Strategy::Recompute] {
        let options = Options::default().strategy(strategy);
        let loss = divergence(
            &e,
            &c,
            &targets(6)?,
            &teacher,
            Divergence::ForwardKl,
            &options,
        )?;
        let gradients = (loss * 65536.)?.backward()?;
        all.push(numbers(gradients.get(&e).unwrap())?);
    }
    let size = all[1].iter().fold(0f64, |size, g| size.max(g.abs()));
    assert!(size.is_finite() && size > 1.);
    close("dE", &all[0], &all[1], 2e-3, size).map_err(candle_core::Error::msg)
}

#[test]
fn equal_weights_of_f64_tokens_change_nothing() -> Result<()> {
    let wide = |seed, shape: &[usize]| -> Result<Var> {
        Var::from_tensor(&normal(seed, shape)?.to_dtype(DType::F64)?)
    };
    let (e, c) = (wide(1, &[3, 8])?, wide(2, &[40, 8])?);
    let (teacher_e, teacher_c) = (wide(3, &[3, 8])?, wide(4, &[40, 8])?);
    let teacher = Teacher::new(&teacher_e.detach(), &teacher_c.detach());
    let gradient = |options: &Options| -> Result<Vec<f64>> {
        let loss = divergence(
            &e,
            &c,
            &targets(3)?,
            &teacher,
            Divergence::ForwardKl,
            options,
        )?;
        numbers(loss.backward()?.get(&c).unwrap())
    };
    let weights = Tensor::new(&[0.1f64; 3], &CPU)?;
    let without = gradient(&Options::default())?;
    let with = gradient(&Options::default().token_weights(&weights))?;
    let size = without.iter().fold(0f64, |size, g| size.max(g.abs()));
    close("dC", &with, &without, 1e-13, size).map_err(candle_core::Error::msg)
}
