//! Bad input is an error that says what was given and what is wanted.

use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::{
    cut_cross_entropy, linear_cross_entropy, Filter, Implementation, Options, Preset,
};
use candle_nn::{VarBuilder, VarMap};

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

/// Fails unless the call is an error whose message has all these pieces.
fn assert_error<T>(result: Result<T>, pieces: &[&str]) {
    let message = match result {
        Ok(_) => panic!("an error with {pieces:?} was expected"),
        Err(error) => error.to_string(),
    };
    for piece in pieces {
        assert!(message.contains(piece), "{piece:?} is not in {message:?}");
    }
}

/// The error for embeddings, classifier and targets of these shapes.
fn assert_shapes(e: &[usize], c: &[usize], y: &[usize], options: Options, pieces: &[&str]) {
    let (e, c, y) = (
        zeros(e, DType::F32),
        zeros(c, DType::F32),
        zeros(y, DType::I64),
    );
    assert_error(linear_cross_entropy(&e, &c, &y, &options), pieces);
}

fn assert_options(options: Options, pieces: &[&str]) {
    assert_shapes(&[2, 3, 4], &[5, 4], &[2, 3], options, pieces)
}

#[test]
fn shapes_that_do_not_match_are_quoted() {
    let default = Options::default;
    assert_shapes(
        &[],
        &[5, 4],
        &[],
        default(),
        &["embeddings", "(.., D)", "scalar"],
    );
    assert_shapes(
        &[3, 4],
        &[5, 6],
        &[3],
        default(),
        &["classifier", "(V, 4)", "[3, 4]", "[5, 6]"],
    );
    assert_shapes(
        &[3, 4],
        &[4],
        &[3],
        default(),
        &["classifier", "(V, 4)", "[4]"],
    );
    assert_shapes(
        &[3, 4],
        &[1, 5, 4],
        &[3],
        default(),
        &["classifier", "[1, 5, 4]"],
    );
    assert_shapes(
        &[2, 3, 4],
        &[5, 4],
        &[3, 2],
        default(),
        &["targets", "[2, 3]", "[2, 3, 4]", "[3, 2]"],
    );
    assert_shapes(
        &[2, 3, 4],
        &[5, 4],
        &[6],
        default(),
        &["targets", "[2, 3]", "[6]"],
    );
    let bias = zeros(&[4], DType::F32);
    assert_options(default().bias(&bias), &["bias", "[5]", "[5, 4]", "[4]"]);
    let bias = zeros(&[1, 5], DType::F32);
    assert_options(default().bias(&bias), &["bias", "[5]", "[1, 5]"]);
}

#[test]
fn empty_dimensions_are_errors() {
    let default = Options::default;
    assert_shapes(&[0, 4], &[5, 4], &[0], default(), &["empty", "[0, 4]"]);
    assert_shapes(
        &[2, 0, 4],
        &[5, 4],
        &[2, 0],
        default(),
        &["empty", "[2, 0, 4]"],
    );
    assert_shapes(
        &[3, 0],
        &[5, 0],
        &[3],
        default(),
        &["empty", "[3, 0]", "[5, 0]"],
    );
    assert_shapes(&[3, 4], &[0, 4], &[3], default(), &["empty", "[0, 4]"]);
}

#[test]
fn a_shift_beyond_the_sequence_is_an_error() {
    for shift in [3, 4, usize::MAX] {
        assert_options(
            Options::default().shift(shift),
            &["shift", &shift.to_string(), "[2, 3]"],
        );
    }
    assert_shapes(
        &[4],
        &[5, 4],
        &[],
        Options::default().shift(1),
        &["shift", "1", "[]"],
    );
}

#[test]
fn a_softcap_must_be_positive_and_finite() {
    for softcap in [0., -1.5, f64::INFINITY, f64::NAN] {
        assert_options(
            Options::default().softcap(softcap),
            &["softcap", "positive", "finite", &softcap.to_string()],
        );
    }
}

#[test]
fn a_logit_scale_must_be_positive_and_finite_with_the_softcap_too() {
    for scale in [0., -1., f64::INFINITY, f64::NAN, 1e-60, 1e60] {
        assert_options(
            Options::default().logit_scale(scale),
            &["logit_scale", "positive", "finite", &scale.to_string()],
        );
    }
    for (softcap, scale) in [(1e30, 1e30), (1e-30, 1e-30)] {
        assert_options(
            Options::default().softcap(softcap).logit_scale(scale),
            &["softcap times logit_scale", &softcap.to_string()],
        );
    }
}

#[test]
fn an_entropy_bonus_must_be_finite() {
    for weight in [f64::NAN, f64::INFINITY, 1e300] {
        assert_options(
            Options::default().entropy_bonus(weight),
            &["entropy_bonus", "finite", &weight.to_string()],
        );
    }
}

#[test]
fn label_smoothing_must_be_a_share_and_without_a_softcap() {
    for smoothing in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        assert_options(
            Options::default().label_smoothing(smoothing),
            &["label_smoothing", "[0, 1]", &smoothing.to_string()],
        );
    }
    assert_options(
        Options::default().label_smoothing(0.1).softcap(30.),
        &["label_smoothing", "softcap", "0.1", "30"],
    );
}

#[test]
fn weights_that_do_not_fit_are_quoted() {
    for shape in [&[4][..], &[1, 5], &[]] {
        let weights = zeros(shape, DType::F32);
        assert_options(
            Options::default().class_weights(&weights),
            &["class_weights", "[5]", &format!("{shape:?}")],
        );
    }
    for shape in [&[6][..], &[3, 2], &[2, 3, 4]] {
        let weights = zeros(shape, DType::F32);
        assert_options(
            Options::default().token_weights(&weights),
            &["token_weights", "[2, 3]", &format!("{shape:?}")],
        );
    }
    let (of_classes, of_tokens) = (zeros(&[5], DType::U32), zeros(&[2, 3], DType::I64));
    assert_options(
        Options::default().class_weights(&of_classes),
        &["class_weights", "float", "U32"],
    );
    assert_options(
        Options::default().token_weights(&of_tokens),
        &["token_weights", "float", "I64"],
    );
}

#[test]
fn a_filter_threshold_must_be_below_one() {
    for eps in [1., -0.1, f64::NAN, f64::INFINITY] {
        assert_options(
            Options::default().filter(Filter::Threshold(eps)),
            &["threshold", "[0, 1)", &eps.to_string()],
        );
    }
}

#[test]
fn dtypes_that_do_not_match_are_quoted() {
    let call = |e, c, y, options: &Options| {
        let (e, c, y) = (zeros(&[3, 4], e), zeros(&[5, 4], c), zeros(&[3], y));
        linear_cross_entropy(&e, &c, &y, options)
    };
    let default = Options::default();
    use DType::{BF16, F16, F32, F64, I64, U8};
    assert_error(
        call(I64, I64, I64, &default),
        &["embeddings", "bf16", "f64", "I64"],
    );
    assert_error(
        call(F32, BF16, I64, &default),
        &["classifier", "F32", "BF16"],
    );
    assert_error(call(F16, F64, I64, &default), &["classifier", "F16", "F64"]);
    assert_error(
        call(F32, F32, F32, &default),
        &["targets", "i64", "u32", "i32", "F32"],
    );
    assert_error(call(F32, F32, U8, &default), &["targets", "U8"]);
    let bias = Options::default().bias(&zeros(&[5], F16));
    assert_error(call(F32, F32, I64, &bias), &["bias", "F32", "F16"]);
}

#[test]
fn the_first_bad_target_is_named_with_its_place_and_value() -> Result<()> {
    let (e, c) = (zeros(&[2, 3, 4], DType::F32), zeros(&[5, 4], DType::F32));
    let cpu = &Device::Cpu;
    let call = |targets: &Tensor, options: Options| linear_cross_entropy(&e, &c, targets, &options);
    let targets = Tensor::new(&[[0i64, 4, -100], [1, 5, 6]], cpu)?;
    assert_error(
        call(&targets, Options::default()),
        &["target 5", "[1, 1]", "[0, 5)", "-100"],
    );
    assert_error(
        call(&targets, Options::default().shift(1)),
        &["target 5", "[1, 1]", "[0, 5)"],
    );
    assert_error(
        call(&targets, Options::default().ignore_index(5)),
        &["target -100", "[0, 2]", "ignore_index 5"],
    );
    let unsigned = Tensor::new(&[[0u32, 4, 4], [1, 2, u32::MAX]], cpu)?;
    assert_error(
        call(&unsigned, Options::default()),
        &["target 4294967295", "[1, 2]", "[0, 5)"],
    );
    let signed = Tensor::new(&[[0i32, 4, 4], [i32::MIN, 2, 0]], cpu)?;
    assert_error(
        call(&signed, Options::default()),
        &["target -2147483648", "[1, 0]", "[0, 5)"],
    );
    let huge = Tensor::new(&[[0i64, 4, 4], [1, 2, i64::MAX]], cpu)?;
    assert_error(
        call(&huge, Options::default()),
        &["target 9223372036854775807"],
    );
    // The first target of a sequence is never predicted under a shift, so what it is does not matter.
    let first = Tensor::new(&[[99i64, 4, 0], [99, 2, 1]], cpu)?;
    assert!(call(&first, Options::default().shift(1)).is_ok());
    Ok(())
}

#[test]
fn kernels_that_cannot_run_say_so() {
    assert_options(
        Options::default().implementation(Implementation::Cuda),
        &["Implementation::Cuda", "Cpu"],
    );
}

#[test]
fn an_unknown_preset_lists_those_there_are() -> Result<()> {
    for preset in Preset::ALL {
        assert_eq!(preset.to_string().parse::<Preset>()?, preset);
    }
    assert_eq!(
        "cce_kahan_full_c_full_e".parse::<Preset>()?,
        Preset::CceExact
    );
    assert_error("cee".parse::<Preset>(), &["\"cee\"", "cce_exact", "native"]);
    Ok(())
}

#[test]
fn the_layer_passes_errors_on() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let head = cut_cross_entropy(4, 5, Options::default(), vb)?;
    let targets = zeros(&[3], DType::I64);
    assert_error(
        head.forward(&zeros(&[3, 6], DType::F32), &targets),
        &["classifier", "[5, 4]", "[3, 6]"],
    );
    assert!(head.logits(&zeros(&[3, 6], DType::F32)).is_err());
    assert!(head.logits(&zeros(&[], DType::F32)).is_err());
    Ok(())
}
