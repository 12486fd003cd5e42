//! What holds beside the agreement.

use super::{
    backward, error, exact, run_cpu, run_cpu_for, run_tensor, upstreams, values, wanted, Call,
    Case, ALL,
};
use crate::op::contract::{KeptTiles, Wanted};
use crate::{Filter, Options, Strategy};
use candle_core::{Device, Tensor};
use std::sync::Arc;

#[test]
fn a_filter_averages_tiles_and_loses_little() {
    let case = Case {
        time: 100,
        hidden: 32,
        vocab: 3000,
        ..Case::small()
    };
    for strategy in [Strategy::Fused, Strategy::Recompute] {
        for (filters, limit) in [
            ((3e-3, 3e-3), 0.1),
            ((0., 3e-3), 0.1),
            ((1e-15, 1e-15), 1e-5),
        ] {
            let options = exact()
                .strategy(strategy)
                .filter_embeddings(Filter::Threshold(filters.0))
                .filter_classifier(Filter::Threshold(filters.1));
            let call = case.call(&options);
            let kept = Arc::new(KeptTiles::default());
            let first = run_cpu_for(&call, ALL, &kept);
            let upstream = &upstreams(&call)[0];
            let a = backward(&call, &first, upstream, ALL);
            let b = backward(&call, &run_tensor(&call), upstream, ALL);
            for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                let off = error(a.as_ref().unwrap(), b.as_ref().unwrap());
                let limit = if i == 0 && filters.0 == 0. {
                    1e-5
                } else {
                    limit
                };
                assert!(off < limit, "{filters:?}: gradient {i} off by {off}");
            }
            let share = kept.share().unwrap().unwrap();
            assert_eq!(share < 1., filters.0 > 1e-3, "{filters:?} kept {share}");
        }
    }
}

#[test]
fn only_wanted_gradients_come_back_and_are_the_same() {
    let case = Case::small();
    for strategy in [Strategy::Fused, Strategy::Recompute] {
        let call = case.call(&exact().strategy(strategy));
        let upstream = &upstreams(&call)[0];
        let all = backward(&call, &run_cpu(&call), upstream, ALL);
        for mask in 1..8 {
            let wanted = Wanted {
                embeddings: mask & 1 != 0,
                classifier: mask & 2 != 0,
                bias: mask & 4 != 0,
            };
            let forward = run_cpu_for(&call, wanted, &Arc::default());
            let some = backward(&call, &forward, upstream, wanted);
            for (i, (some, all)) in some.iter().zip(&all).enumerate() {
                assert_eq!(some.is_some(), mask & (1 << i) != 0);
                if let (Some(some), Some(all)) = (some, all) {
                    assert!(error(some, all) < 1e-6);
                }
            }
        }
    }
}

#[test]
fn a_run_repeats_bit_by_bit() {
    let case = Case {
        time: 100,
        vocab: 2000,
        ..Case::small()
    };
    for strategy in [Strategy::Fused, Strategy::Recompute] {
        let call = case.call(&Options::default().strategy(strategy));
        let upstream = &upstreams(&call)[0];
        let run = || {
            let forward = run_cpu(&call);
            let gradients = backward(&call, &forward, upstream, ALL);
            (values(&forward.packed), gradients)
        };
        assert_eq!(run(), run());
    }
}

#[test]
fn a_nan_spoils_its_row_and_nothing_is_dropped() {
    let case = Case {
        vocab: 600,
        ignore: None,
        ..Case::small()
    };
    for strategy in [Strategy::Fused, Strategy::Recompute] {
        for poison in [f64::NAN, f64::INFINITY] {
            let mut call = case.call(&Options::default().strategy(strategy));
            let mut e = values(&call.matrices.embeddings);
            e[2 * case.hidden] = poison;
            call.matrices.embeddings =
                Tensor::from_vec(e, call.matrices.embeddings.dims(), &Device::Cpu)
                    .unwrap()
                    .to_dtype(case.dtype)
                    .unwrap();
            let forward = run_cpu(&call);
            let packed = values(&forward.packed);
            assert!(packed[2].is_nan() && !packed[1].is_nan() && !packed[3].is_nan());
            let gradients = backward(&call, &forward, &upstreams(&call)[0], ALL);
            let de = gradients[0].as_ref().unwrap();
            assert!(de[2 * case.hidden..3 * case.hidden]
                .iter()
                .all(|x| x.is_nan()));
            assert!(de[..2 * case.hidden].iter().all(|x| x.is_finite()));
            assert!(gradients[1].as_ref().unwrap().iter().all(|x| x.is_nan()));
            assert!(gradients[2].as_ref().unwrap().iter().all(|x| x.is_nan()));
        }
    }
}
#[test]
fn logits_of_ten_thousand_lose_no_bits_to_a_rounded_lse() {
    // Logits that f32 holds exactly: 10000 and 2, 1, 0, -1 for the first row, the negatives for the second. Their
    // lse is rounded by up to 5e-4; loss and softmax must not be.
    let e = Tensor::new(&[[5000f32, 1.], [5000., -1.]], &Device::Cpu).unwrap();
    let c = Tensor::new(&[[2f32, 2.], [2., 1.], [2., 0.], [2., -1.]], &Device::Cpu).unwrap();
    let targets = Tensor::new(&[1i64, 1], &Device::Cpu).unwrap();
    let call = Call::new(&e, &c, &targets, &exact());
    let rows = [[2f64, 1., 0., -1.], [-2., -1., 0., 1.]];
    let sums = rows.map(|row| row.map(f64::exp).iter().sum::<f64>());
    let want = (sums[0].ln() - 1. + sums[1].ln() + 1.) / 2.;
    for forward in [run_tensor(&call), run_cpu(&call)] {
        let loss = values(&forward.packed)[4];
        assert!((loss - want).abs() < 2e-6, "loss {loss}, want {want}");
        let upstream = Tensor::new(&[0f32, 0., 0., 0., 1.], &Device::Cpu).unwrap();
        let gradients = backward(&call, &forward, &upstream, wanted(&call));
        let dc = gradients[1].as_ref().unwrap();
        for class in 0..4 {
            // The second column of E is 1 and -1; the targets cancel.
            let p = |row: usize| rows[row][class].exp() / sums[row];
            let (got, want) = (dc[class * 2 + 1], (p(0) - p(1)) / 2.);
            assert!(
                (got - want).abs() < 1e-6,
                "dC of {class}: {got}, want {want}"
            );
        }
    }
}
