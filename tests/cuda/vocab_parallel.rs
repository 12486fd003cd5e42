//! Shards of a head as threads that share a GPU.

use crate::common::reference::{Reduced, Upstream};
use crate::common::shards::{errors, sharded, whole, NAMES};
use crate::common::{gradient_tolerance, Case};
use crate::{device, filters, DTYPES, KERNELS};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::Options;

#[test]
fn shards_on_one_gpu_give_what_the_whole_gives() -> Result<()> {
    if device().is_none() {
        return Ok(());
    }
    let devices = (0..4)
        .map(|_| Device::new_cuda(0))
        .collect::<Result<Vec<_>>>()?;
    for dtype in DTYPES {
        for (turn, bounds) in [
            vec![0, 300, 301, 640, 1000],
            vec![0, 512, 1000],
            vec![0, 1000],
        ]
        .into_iter()
        .enumerate()
        {
            let seed = 800 + turn as u64;
            let mut case = Case::random(seed, dtype, &[2, 150], 64, 1000)
                .with_bias(seed)
                .with_ignored(seed + 10);
            case.inputs.shift = 1;
            case.inputs.reduction = [Reduced::Mean, Reduced::None, Reduced::Sum][turn];
            case.inputs.softcap = (turn == 1).then_some(5.);
            let upstream = case.upstream(seed, true, turn == 2);
            for implementation in KERNELS {
                for (filter, options, _) in filters(dtype) {
                    let options = options.implementation(implementation).z_loss_weight(0.01);
                    let what = format!("{implementation:?} {dtype:?} {filter} {bounds:?}");
                    shards_agree(&case, &options, &upstream, &devices, &bounds, &what)?;
                }
            }
        }
    }
    Ok(())
}

/// Fails where shards that end at these classes give another loss or gradient than the whole.
pub fn shards_agree(
    case: &Case,
    options: &Options,
    upstream: &Upstream,
    devices: &[Device],
    bounds: &[usize],
    what: &str,
) -> Result<()> {
    let got = sharded(case, options, upstream, devices, bounds)?;
    let want = whole(case, options, upstream, &devices[0])?;
    for (name, error) in NAMES.iter().zip(errors(&got, &want)) {
        let allowed = match (*name, case.dtype) {
            ("loss" | "lse", _) => 1e-6,
            (_, DType::F32) => 2e-6,
            (_, dtype) => gradient_tolerance(dtype),
        };
        assert!(error <= allowed, "{what}: {name} differs by {error:e}");
    }
    Ok(())
}
