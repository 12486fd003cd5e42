//! The same bits every time, from every device and thread.

use crate::common::reference::Reduced;
use crate::common::{auto_threshold, exact, Case};
use crate::{device, Computed, DTYPES, KERNELS};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::{Filter, Implementation, Options};

/// Several tiles of rows and classes in every direction, some rows ignored.
fn case(seed: u64, dtype: DType, hidden: usize) -> Case {
    let mut case = Case::random(seed, dtype, &[2, 500], hidden, 1700)
        .with_bias(seed + 1)
        .with_ignored(seed + 2);
    case.inputs.shift = 1;
    case.inputs.reduction = Reduced::Sum;
    case
}

fn filtered() -> Options {
    Options::default().filter(Filter::Threshold(auto_threshold(DType::BF16)))
}

/// Every kernel, exact and filtered.
fn ways() -> impl Iterator<Item = (String, Options)> {
    KERNELS.into_iter().flat_map(|implementation| {
        [("exact", exact()), ("filtered", filtered())].map(|(filter, options)| {
            let options = options.implementation(implementation);
            (format!("{implementation:?} {filter}"), options)
        })
    })
}

#[test]
fn three_runs_give_the_same_bits() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    for dtype in DTYPES {
        let case = case(60, dtype, 136);
        for (way, options) in ways() {
            let first = Computed::new(&case, options.clone(), &device)?;
            for run in 2..4 {
                let again = Computed::new(&case, options.clone(), &device)?;
                again.assert_same(&first, &format!("{dtype:?} {way}, run {run}"));
            }
        }
    }
    Ok(())
}

#[test]
fn a_long_vocabulary_gives_the_same_bits_in_every_run() -> Result<()> {
    // Several splits of the classes, and with little workspace several ranges of them.
    let Some(device) = device() else {
        return Ok(());
    };
    let case = Case::random(63, DType::BF16, &[300], 64, 20_000).with_bias(64);
    for (way, options) in ways() {
        for workspace in [2 << 20, 256 << 20] {
            let options = options.clone().workspace(workspace);
            let first = Computed::new(&case, options.clone(), &device)?;
            let again = Computed::new(&case, options, &device)?;
            again.assert_same(&first, &format!("{way}, workspace {workspace}"));
        }
    }
    Ok(())
}

#[test]
fn two_devices_in_one_process_give_the_same_bits() -> Result<()> {
    if device().is_none() {
        return Ok(());
    }
    // Two handles with streams and kernels of their own, used in turns.
    let devices = [Device::new_cuda(0)?, Device::new_cuda(0)?];
    for dtype in DTYPES {
        let case = case(70, dtype, 72);
        for (way, options) in ways() {
            let first = Computed::new(&case, options.clone(), &devices[0])?;
            let second = Computed::new(&case, options, &devices[1])?;
            second.assert_same(&first, &format!("{dtype:?} {way}, second device"));
        }
    }
    Ok(())
}

#[test]
fn threads_with_devices_and_problems_of_their_own_do_not_disturb_each_other() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let mut problems = Vec::new();
    for turn in 0..4 {
        let dtype = [DType::BF16, DType::F32, DType::F16, DType::BF16][turn];
        let hidden = [64, 33, 136, 40][turn];
        let options = match turn % 2 {
            0 => exact(),
            _ => filtered(),
        };
        let options = options.implementation(match turn {
            3 => Implementation::CudaPortable,
            _ => Implementation::Cuda,
        });
        let case = case(80 + turn as u64, dtype, hidden);
        let alone = Computed::new(&case, options.clone(), &device)?;
        problems.push((case, options, alone));
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = problems
            .iter()
            .enumerate()
            .map(|(turn, (case, options, alone))| {
                scope.spawn(move || -> Result<()> {
                    let device = Device::new_cuda(0)?;
                    for run in 0..8 {
                        let together = Computed::new(case, options.clone(), &device)?;
                        together.assert_same(alone, &format!("thread {turn}, run {run}"));
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            match thread.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(())
    })
}

#[test]
fn threads_may_share_a_device() -> Result<()> {
    let Some(device) = device() else {
        return Ok(());
    };
    let cases: Vec<_> = (0..4)
        .map(|turn| case(90 + turn, DType::BF16, 48))
        .collect();
    // Both forms of the kernels at the same time.
    let options = |turn: usize| filtered().implementation(KERNELS[turn % 2]);
    let alone: Vec<_> = cases
        .iter()
        .enumerate()
        .map(|(turn, case)| Computed::new(case, options(turn), &device))
        .collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        for (turn, (case, alone)) in cases.iter().zip(&alone).enumerate() {
            let device = device.clone();
            scope.spawn(move || {
                for run in 0..8 {
                    let together = Computed::new(case, options(turn), &device).unwrap();
                    together.assert_same(alone, &format!("thread {turn}, run {run}"));
                }
            });
        }
    });
    Ok(())
}
