//! Random shapes and options.

use crate::common::reference::Reduced;
use crate::common::{auto_threshold, check, Case};
use candle_core::{DType, Device};
use candle_cut_cross_entropy::{Filter, Options, Strategy as How};
use proptest::prelude::*;

/// Sizes with ones, powers of two, and what lies beside them.
fn size(max: usize) -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(1usize),
        2 => prop::sample::select(vec![2usize, 7, 8, 9, 16, 17, 31, 32, 33]).prop_map(move |n| n.min(max)),
        3 => 1..=max,
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    let lead = prop::collection::vec(size(9), 0..4);
    let dtype = prop::sample::select(vec![DType::BF16, DType::F16, DType::F32, DType::F64]);
    let target = prop::sample::select(vec![DType::I64, DType::U32, DType::I32]);
    let reduction = prop::sample::select(vec![Reduced::Mean, Reduced::Sum, Reduced::None]);
    let switches = (any::<bool>(), any::<bool>(), 0usize..4);
    let softcap = prop::option::of(0.5f64..50.);
    let sizes = (lead, size(40), size(200));
    (
        any::<u64>(),
        sizes,
        dtype,
        target,
        reduction,
        softcap,
        switches,
    )
        .prop_map(
            |(
                seed,
                (lead, hidden, vocab),
                dtype,
                target,
                reduction,
                softcap,
                (bias, ignored, shift),
            )| {
                let mut case = Case::random(seed, dtype, &lead, hidden, vocab);
                case.target_dtype = target;
                case.inputs.ignore_index = (vocab as u64 + seed % 5) as i64;
                case.inputs.reduction = reduction;
                case.inputs.softcap = softcap;
                case.inputs.shift = match lead.is_empty() {
                    true => 0,
                    false => shift.min(case.inputs.time - 1),
                };
                if bias {
                    case = case.with_bias(seed);
                }
                if ignored {
                    case = case.with_ignored(seed);
                }
                case.with_some_options(seed)
            },
        )
}

/// Options, and the threshold they set; `None` is the one of the dtype.
fn options() -> impl Strategy<Value = (Options, Option<f64>)> {
    let filter = prop_oneof![
        Just((Filter::Off, Some(0.))),
        Just((Filter::Auto, None)),
        (0f64..0.999).prop_map(|eps| (Filter::Threshold(eps), Some(eps))),
    ];
    let how = prop::sample::select(vec![How::Auto, How::Recompute, How::Fused]);
    let workspace = prop_oneof![Just(None), (0usize..100_000).prop_map(Some)];
    (filter, how, workspace).prop_map(|((filter, eps), how, workspace)| {
        let options = Options::default().filter(filter).strategy(how);
        match workspace {
            // Too little for what averaging has to know: the gradients are exact.
            Some(bytes) => (options.workspace(bytes), Some(0.)),
            None => (options, eps),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_and_options_match_the_reference(
        case in cases(),
        (options, eps) in options(),
        seed in any::<u64>(),
        upstream in prop::sample::select(vec![(true, false), (false, true), (true, true)]),
    ) {
        let eps = eps.unwrap_or(auto_threshold(case.dtype));
        let eps = if case.differentiates_entropy() { 0. } else { eps };
        let upstream = case.upstream(seed, upstream.0, upstream.1);
        let result = check(&case, options, &Device::Cpu, &upstream, (eps, eps));
        prop_assert!(result.is_ok(), "{}", result.unwrap_err());
    }
}
