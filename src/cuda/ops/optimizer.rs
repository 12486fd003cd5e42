//! `cuda/optimizer.cu`.

use super::{addresses, aligned, kernel, operands};
use crate::cuda::launch::{ONE_BLOCK, OPTIMIZER};
use crate::cuda::operands::Kind;
use crate::cuda::params::optimizer::{AdamWParams, GradientParams, NormParams};
use crate::cuda::write::write;
use crate::models::update::Step;
use candle_core::{bail, DType, Result, Tensor};

const THREADS: usize = 256;
/// Blocks, and sums of squares, of a gradient at most.
const BLOCKS: usize = 1024;

/// Blocks that go through a gradient together.
fn blocks(count: usize, width: usize) -> usize {
    count.div_ceil(THREADS * width).min(BLOCKS)
}

fn width(kind: Kind, aligned: bool) -> usize {
    match aligned {
        true => 16 / kind.size,
        false => 1,
    }
}

/// The norm of all gradients together and what to multiply them with for it to be at most `max_norm`, each one f32 number
/// on the device. They are contiguous, and all on one device.
pub(crate) fn norm(gradients: &[Tensor], max_norm: f64) -> Result<(Tensor, Tensor)> {
    let Some(first) = gradients.first() else {
        bail!("the norm of no gradients")
    };
    let gpu = operands([first], |[first]| Ok(first.gpu()))?;
    let partials = gpu.array::<f32>(gradients.len() * BLOCKS)?;
    let mut count = 0;
    for gradient in gradients {
        operands([gradient], |all| {
            let kind = all[0].kind()?;
            addresses(&gpu, all, |[address]| {
                let numbers = gradient.elem_count();
                let aligned = aligned(kind, &[address], &[numbers]);
                let params = GradientParams {
                    gradient: address,
                    partials: partials.address + count as u64 * 4,
                    count: numbers as u64,
                    aligned: aligned.into(),
                    ..GradientParams::default()
                };
                let blocks = blocks(numbers, width(kind, aligned));
                count += blocks;
                let name = kind.kernel("sum_of_squares");
                let kernel = kernel(OPTIMIZER, name, (blocks, 1), THREADS as u32, 0);
                gpu.launch(&kernel, &params)
            })
        })?;
    }
    let norm = gpu.unfinished(DType::F32, (), false)?;
    let factor = gpu.unfinished(DType::F32, (), false)?;
    let params = NormParams {
        partials: partials.address,
        norm: norm.address,
        factor: factor.address,
        count: count as u64,
        max_norm: max_norm as f32,
        unused: 0,
    };
    let kernel = kernel(OPTIMIZER, "gradient_norm".into(), (1, 1), ONE_BLOCK, 0);
    gpu.launch(&kernel, &params)?;
    Ok((norm.finish(&gpu), factor.finish(&gpu)))
}

/// A contiguous gradient times a number on the device.
pub(crate) fn scaled(gradient: &Tensor, factor: &Tensor) -> Result<Tensor> {
    operands([gradient, factor], |all| {
        let (gpu, kind) = (all[0].gpu(), all[0].kind()?);
        let out = gpu.unfinished(kind.dtype, gradient.shape(), false)?;
        addresses(&gpu, all, |[address, factor]| {
            let count = gradient.elem_count();
            let aligned = aligned(kind, &[address], &[count]);
            let params = GradientParams {
                gradient: address,
                factor,
                out: out.address,
                count: count as u64,
                aligned: aligned.into(),
                ..GradientParams::default()
            };
            let blocks = blocks(count, width(kind, aligned));
            let name = kind.kernel("scale_gradient");
            let kernel = kernel(OPTIMIZER, name, (blocks, 1), THREADS as u32, 0);
            gpu.launch(&kernel, &params)
        })?;
        Ok(out.finish(&gpu))
    })
}

/// What a step changes. All contiguous; the moments and the master are f32, and there is a master where the variable is not.
pub(crate) struct State<'a> {
    pub variable: &'a Tensor,
    pub master: Option<&'a Tensor>,
    pub first_moment: &'a Tensor,
    pub second_moment: &'a Tensor,
}

/// One step, in place.
pub(crate) fn adamw(gradient: &Tensor, state: &State<'_>, step: Step) -> Result<()> {
    operands([gradient], |all| {
        let (gpu, kind) = (all[0].gpu(), all[0].kind()?);
        let count = gradient.elem_count();
        let launch = |addresses: [u64; 5]| {
            let aligned = aligned(kind, &addresses, &[count]);
            let params = AdamWParams {
                gradient: addresses[0],
                variable: addresses[1],
                first_moment: addresses[2],
                second_moment: addresses[3],
                master: addresses[4],
                count: count as u64,
                beta1: step.beta1 as f32,
                beta2: step.beta2 as f32,
                one_minus_beta1: (1. - step.beta1) as f32,
                one_minus_beta2: (1. - step.beta2) as f32,
                keep: step.keep as f32,
                rate: step.rate as f32,
                second_scale: step.second_scale as f32,
                eps: step.eps as f32,
                aligned: aligned.into(),
                unused: 0,
            };
            let grid = (count.div_ceil(THREADS * width(kind, aligned)), 1);
            let kernel = kernel(OPTIMIZER, kind.kernel("adamw"), grid, THREADS as u32, 0);
            gpu.launch(&kernel, &params)
        };
        addresses(&gpu, all, |[gradient]| {
            write(state.variable, &|variable| {
                write(state.first_moment, &|first| {
                    write(state.second_moment, &|second| match state.master {
                        None => launch([gradient, variable, first, second, 0]),
                        Some(master) => write(master, &|master| {
                            launch([gradient, variable, first, second, master])
                        }),
                    })
                })
            })
        })
    })
}
