//! Distillation: errors.

use super::soft_targets_edges::{normal, targets, CPU};
use candle_core::{DType, Result, Tensor};
use candle_cut_cross_entropy::soft_targets::{
    class_logits, divergence, top_k_divergence, Divergence, Teacher, TopK,
};
use candle_cut_cross_entropy::vocab_parallel::ThreadCommunicator;
use candle_cut_cross_entropy::{Options, VocabParallel};
use std::sync::Arc;
use std::time::Duration;

fn error<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("no error"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn errors_say_what_is_wrong() -> Result<()> {
    let (e, c) = (normal(1, &[5, 8])?, normal(2, &[30, 8])?);
    let options = Options::default();
    let says = |text: String, parts: &[&str]| {
        for part in parts {
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
    };
    let classes = Tensor::new(&[[1i64, 30], [0, 0], [0, 0], [0, 0], [0, 0]], &CPU)?;
    let named = error(class_logits(&e, &c, &classes, &options));
    says(named, &["class 30 at [0, 1] is outside [0, 30)"]);
    let flat = error(class_logits(&e, &c, &targets(5)?, &options));
    says(flat, &["(.., k)", "[5, 8]", "[5]"]);
    let floats = error(class_logits(&e, &c, &normal(1, &[5, 2])?, &options));
    says(floats, &["u32, i64 or i32", "F32"]);

    let teacher = |e: &[usize], c: &[usize]| -> Result<Teacher> {
        Ok(Teacher::new(&normal(3, e)?, &normal(4, c)?))
    };
    let (kl, whole) = (Divergence::ForwardKl, teacher(&[5, 4], &[30, 4])?);
    let run = |teacher: &Teacher, kind, options: &Options| {
        error(targets(5).and_then(|t| divergence(&e, &c, &t, teacher, kind, options)))
    };
    says(
        run(&teacher(&[5, 4], &[31, 4])?, kl, &options),
        &["the same number of classes", "[31, 4]", "[30, 8]"],
    );
    says(
        run(&teacher(&[4, 4], &[30, 4])?, kl, &options),
        &["teacher", "[4, 4]", "[5]"],
    );
    says(
        run(&whole.clone().temperature(0.), kl, &options),
        &["temperature", "got 0"],
    );
    for beta in [0., 1., 1e-9, f64::NAN] {
        says(
            run(&whole, Divergence::JensenShannon(beta), &options),
            &["beta", "ForwardKl"],
        );
    }
    let too_hot = whole.clone().temperature(1e30);
    says(
        run(&too_hot, kl, &options.clone().logit_scale(1e-30)),
        &["logit_scale"],
    );
    says(
        run(&whole, kl, &options.clone().z_loss_weight(0.1)),
        &["z_loss_weight 0.1"],
    );
    says(
        run(&whole, kl, &options.clone().entropy_bonus(0.1)),
        &["entropy_bonus 0.1"],
    );
    says(
        run(&whole, kl, &options.clone().label_smoothing(0.1)),
        &["label_smoothing 0.1"],
    );
    let of_classes = options.clone().class_weights(&normal(1, &[30])?);
    says(run(&whole, kl, &of_classes), &["token_weights"]);
    let alone = ThreadCommunicator::group(1, Duration::from_secs(1))?.remove(0);
    let shard = VocabParallel::from_vocab(30, Arc::new(alone))?;
    says(
        run(&whole, kl, &options.clone().vocab_parallel(shard)),
        &["vocab_parallel"],
    );

    let classes = Tensor::zeros((5, 2), DType::U32, &CPU)?;
    let run = |teacher: TopK| {
        error(targets(5).and_then(|t| top_k_divergence(&e, &c, &t, &teacher, &options)))
    };
    says(
        run(TopK::new(&classes, &normal(1, &[5, 3])?)),
        &["[5, 2]", "[5, 3]"],
    );
    says(
        run(TopK::new(&targets(5)?, &normal(1, &[5])?)),
        &["(.., k)", "[5]"],
    );
    says(
        run(TopK::new(&classes, &classes)),
        &["floating-point", "U32"],
    );
    says(
        run(TopK::new(&classes, &normal(1, &[5, 2])?).temperature(-1.)),
        &["temperature", "-1"],
    );
    let floats = normal(1, &[5, 2])?;
    says(
        run(TopK::new(&floats, &floats)),
        &["u32, i64 or i32", "F32"],
    );
    Ok(())
}
