//! A GPU whose memory is nearly full.

use crate::common::reference::Reduced;
use crate::common::Case;
use crate::{device, filters, Computed};
use candle_core::cuda_backend::cudarc::driver::result::mem_get_info;
use candle_core::{DType, Result, Tensor};
use candle_cut_cross_entropy::Strategy;

/// The usual workspace takes 1 GiB here.
#[test]
#[ignore = "fills the GPU's memory, which other tests need: run it alone"]
fn what_has_no_room_takes_less() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    const LEFT: usize = 400 << 20;
    let mut case = Case::random(400, DType::BF16, &[8192], 64, 65_536);
    case.inputs.reduction = Reduced::Mean;
    for (filter, options, _) in filters(DType::BF16) {
        for strategy in [Strategy::Fused, Strategy::Recompute] {
            let options = options.clone().strategy(strategy);
            let want = Computed::new(&case, options.clone().workspace(100 << 20), &device)?;
            let free = mem_get_info().expect("a context").0;
            // What the pool of freed memory holds is not counted as free: it goes to the filling too.
            let mut filling = Vec::new();
            for bytes in [
                free.saturating_sub(LEFT).max(1 << 30),
                1 << 30,
                1 << 28,
                1 << 26,
            ] {
                while let Ok(tensor) = Tensor::zeros(bytes, DType::U8, &device) {
                    filling.push(tensor);
                    device.synchronize()?;
                }
            }
            // 400 MiB again.
            let mut given_back = 0;
            while given_back < LEFT {
                let Some(tensor) = filling.pop() else { break };
                given_back += tensor.elem_count();
            }
            let what = format!("{filter} {strategy:?}");
            let got = Computed::new(&case, options, &device)?;
            got.assert_close(&want, DType::BF16, &what);
        }
    }
    Ok(())
}
