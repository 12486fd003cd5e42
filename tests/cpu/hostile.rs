//! Inputs that nobody means: they are errors, or work, and never a panic.

use candle_core::{DType, Device, Result, Tensor};
use candle_cut_cross_entropy::models::{CausalLm, Decoder};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Entropy, Filter, Options, Preset, Reduction, Strategy as How,
};
use candle_nn::VarMap;
use proptest::prelude::*;
use std::path::{Path, PathBuf};

/// Numbers that break things.
fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        prop::sample::select(vec![
            0.,
            -0.,
            1.,
            -1.,
            0.999,
            1e-300,
            1e300,
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            f64::MIN_POSITIVE,
        ]),
        any::<f64>(),
        -2f64..2.,
    ]
}

fn filter() -> impl Strategy<Value = Filter> {
    prop_oneof![
        Just(Filter::Off),
        Just(Filter::Auto),
        number().prop_map(Filter::Threshold),
        number().prop_map(Filter::Drop),
    ]
}

fn options() -> impl Strategy<Value = Options> {
    let numbers = (
        prop::option::of(number()),
        prop_oneof![Just(0.), number()],
        prop_oneof![3 => Just(1.), 1 => number()],
        prop_oneof![3 => Just(0.), 1 => 0f64..1., 1 => number()],
        prop_oneof![3 => Just(0.), 1 => number()],
    );
    let asked = (
        prop::sample::select(vec![Entropy::Off, Entropy::Value, Entropy::Differentiable]),
        any::<bool>(),
    );
    let choices = (
        prop::sample::select(vec![Reduction::Mean, Reduction::Sum, Reduction::None]),
        prop::sample::select(vec![How::Auto, How::Recompute, How::Fused]),
        prop::sample::select(Preset::ALL.to_vec()),
    );
    let sizes = (
        prop::option::of(prop_oneof![0usize..1 << 20, Just(usize::MAX)]),
        prop_oneof![0usize..6, Just(usize::MAX)],
        prop_oneof![-2i64..12, any::<i64>()],
    );
    (numbers, asked, choices, sizes, filter(), filter()).prop_map(
        |(numbers, asked, (reduction, how, preset), (workspace, shift, ignored), e, c)| {
            let (softcap, z_loss, scale, smoothing, bonus) = numbers;
            let options = Options::preset(preset)
                .softcap(softcap)
                .logit_scale(scale)
                .label_smoothing(smoothing)
                .entropy(asked.0)
                .predicted(asked.1)
                .z_loss_weight(z_loss)
                .entropy_bonus(bonus)
                .reduction(reduction)
                .strategy(how)
                .shift(shift)
                .ignore_index(ignored)
                .filter_embeddings(e)
                .filter_classifier(c);
            match workspace {
                Some(bytes) => options.workspace(bytes),
                None => options,
            }
        },
    )
}

/// A tensor of any shape near what fits.
fn tensor(dims: Vec<usize>, dtype: DType, values: &[f64]) -> Result<Tensor> {
    let len: usize = dims.iter().product();
    let values: Vec<f64> = values.iter().copied().cycle().take(len).collect();
    Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/models")
        .join(name)
}

/// Loads a checkpoint and computes a loss with it.
fn use_checkpoint(folder: &Path) -> Result<()> {
    let decoder = Decoder::load(folder, &VarMap::new(), DType::F32, &Device::Cpu)?;
    let ids = Tensor::new(&[[0u32, 1, 2, 3]], &Device::Cpu)?;
    backward(&decoder.loss(&ids, &ids, &Options::default())?.loss)?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_options_on_any_shapes_are_an_error_or_a_loss(
        options in options(),
        lead in prop::collection::vec(0usize..5, 0..3),
        (hidden, other, vocab) in (0usize..5, 0usize..5, 0usize..9),
        same in any::<bool>(),
        targets in prop::collection::vec(-1i64..9, 1..8),
        values in prop::collection::vec(number(), 1..6),
        dtype in prop::sample::select(vec![DType::BF16, DType::F16, DType::F32, DType::F64, DType::U8]),
        weights in (prop::option::of((0usize..9, any::<bool>())), prop::option::of(0usize..9)),
    ) {
        let other = if same { hidden } else { other };
        let run = || -> Result<()> {
            let e = tensor([lead.clone(), vec![hidden]].concat(), dtype, &values)?;
            let c = candle_core::Var::from_tensor(&tensor(vec![vocab, other], dtype, &values)?)?;
            let len: usize = lead.iter().product();
            let y: Vec<i64> = targets.iter().copied().cycle().take(len).collect();
            let y = Tensor::from_vec(y, lead.clone(), &Device::Cpu)?;
            let weights = (
                weights.0.map(|(len, fits)| tensor(vec![if fits { vocab } else { len }], dtype, &values)),
                weights.1.map(|len| match len {
                    // Most of them fit.
                    0 => tensor(vec![len], dtype, &values),
                    _ => tensor(lead.clone(), dtype, &values),
                }),
            );
            let (of_classes, of_tokens) = (weights.0.transpose()?, weights.1.transpose()?);
            let options = options.clone().class_weights(&of_classes).token_weights(&of_tokens);
            let output = linear_cross_entropy(&e, &c, &y, &options)?;
            let loss = output.loss.sum_all()?;
            backward(&match &output.entropy {
                Some(entropy) if entropy.track_op() => (loss + entropy.sum_all()?)?,
                _ => loss,
            })?;
            output.kept_tiles()?;
            Ok(())
        };
        let _ = run();
    }

    #[test]
    fn names_come_back_as_what_they_were(filter in filter(), text in ".{0,12}") {
        if let Ok(again) = filter.to_string().parse::<Filter>() {
            prop_assert_eq!(again, filter);
        }
        if let Ok(filter) = text.parse::<Filter>() {
            prop_assert_eq!(filter.to_string().parse::<Filter>().unwrap(), filter);
        }
        if let Ok(preset) = text.parse::<Preset>() {
            prop_assert!(Preset::ALL.contains(&preset));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes are replaced, most of them where a file says what it holds, and files are cut short.
    #[test]
    fn a_damaged_checkpoint_is_an_error_or_works(
        case in prop::sample::select(vec!["qwen2", "gemma2", "llama"]),
        damaged in prop::sample::select(vec!["config.json", "weights", "index"]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        digits in any::<bool>(),
        near in any::<bool>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let place = copy_of(case, damaged);
        let name = match (damaged, case) {
            ("config.json", _) => "config.json",
            ("index", "llama") => "model.safetensors.index.json",
            (_, "llama") => "model-00001-of-00004.safetensors",
            _ => "model.safetensors",
        };
        let mut bytes = std::fs::read(place.join(name)).unwrap();
        let reach = if near { bytes.len().min(1 << 10) } else { bytes.len() };
        for (at, byte) in &edits {
            let at = at.index(reach);
            // Numbers that are others, most of all: the file is still one of its kind.
            match digits {
                true if bytes[at].is_ascii_digit() => bytes[at] = b'0' + byte % 10,
                true => {}
                false => bytes[at] = *byte,
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(place.join(name), bytes).unwrap();
        let _ = use_checkpoint(&place);
        std::fs::remove_dir_all(&place).unwrap();
    }
}

#[test]
fn the_checkpoints_work_where_they_are_not_damaged() -> Result<()> {
    ["qwen2", "gemma2", "llama"]
        .map(folder)
        .iter()
        .try_for_each(|place| use_checkpoint(place))
}

/// A copy of a checkpoint, in a folder of its own.
fn copy_of(case: &str, damaged: &str) -> PathBuf {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Relaxed);
    let name = format!("hostile-{}-{case}-{damaged}-{number}", std::process::id());
    let place = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&place).unwrap();
    for file in std::fs::read_dir(folder(case)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), place.join(file.file_name())).unwrap();
    }
    place
}
