//! The divergence from a whole teacher, on compute capability 9.0 and for bf16: the logits of both heads for some rows at a
//! time, what `cuda/divergence.cu` makes of them, and the products of the gradients.
//!
//! A block of rows has the logits of both heads in f32, for their rounding to bf16 would be that of large logits, not of
//! probabilities. What it leaves is the gradient of the logits in bf16; a chunk of several blocks goes through the products
//! of gradients, for dC is read and written once a chunk.

mod side;

use super::hopper;
use super::launch::{Gpu, Kernel, DIVERGENCE};
use super::operands::{kernels, Operands};
use super::outputs::Outputs;
use super::params::divergence::DivergenceParams;
use super::room::with_room;
use super::rows::Rows;
use crate::matrices::Matrices;
use crate::op::contract::{Gradients, Wanted};
use crate::plan::{self, gradient_stride, Rounds, TILE};
use crate::soft_targets::Divergence;
use candle_core::{DType, Result, Tensor};
use side::Side;

const THREADS: u32 = 512;

/// The student's or the teacher's.
pub(crate) struct Head<'a> {
    pub matrices: Matrices<&'a Tensor>,
    /// That of logits times their scale.
    pub softcap: Option<f64>,
    pub scale: f64,
    pub wanted: Wanted,
}

/// The divergences of the rows, f32, and the gradients of both heads.
pub(crate) struct Swept {
    pub divergences: Tensor,
    pub gradients: [Gradients; 2],
}

/// `heads` are the student's and the teacher's, `rows` the rows of their embeddings, of which there is one at least,
/// `weights` what the rows' gradients are multiplied by, f32, where one is wanted. `None` where the kernels cannot run.
pub(crate) fn sweep(
    kind: Divergence,
    heads: [Head<'_>; 2],
    rows: &[u32],
    weights: Option<&Tensor>,
    workspace: Option<usize>,
) -> Result<Option<Swept>> {
    let Some((gpu, _)) = kernels(heads[0].matrices.classifier)? else {
        return Ok(None);
    };
    let bf16 = |head: &Head<'_>| head.matrices.classifier.dtype() == DType::BF16;
    if !heads.iter().all(bf16) {
        return Ok(None);
    }
    let rows = Rows::known(&gpu, rows)?;
    let [student, teacher] = &heads;
    with_room(workspace, |workspace| {
        read(&gpu, student, |of_student| {
            read(&gpu, teacher, |of_teacher| {
                let operands = [of_student, of_teacher];
                for operands in operands {
                    if !hopper::can_run(&gpu, operands, rows.positions)? {
                        return Ok(None);
                    }
                }
                let sides = [0, 1].map(|i| plan::Side {
                    sizes: operands[i].sizes(),
                    wanted: heads[i].wanted.any(),
                });
                let Some(plan) = plan::divergence(sides, rows.positions, workspace) else {
                    return Ok(None);
                };
                let chunks = rows.positions.div_ceil(plan.chunk);
                let side = |head: &Head<'_>, operands| {
                    let outputs = head
                        .matrices
                        .read(|matrices| Outputs::new(&gpu, matrices, head.wanted, DType::BF16))?;
                    Side::new(&gpu, operands, outputs, plan, chunks)
                };
                let sides = [side(student, of_student)?, side(teacher, of_teacher)?];
                let run = |weights| run(&gpu, kind, sides, &rows, weights, plan);
                match weights {
                    None => run(0),
                    Some(weights) => gpu.read(weights, run),
                }
                .map(Some)
            })
        })
    })
}

fn read<R>(gpu: &Gpu, head: &Head<'_>, with: impl FnOnce(Operands) -> Result<R>) -> Result<R> {
    head.matrices
        .read(|matrices| Operands::read(gpu, matrices, head.softcap, head.scale, with))
}

fn run(
    gpu: &Gpu,
    kind: Divergence,
    sides: [Side; 2],
    rows: &Rows,
    weights: u64,
    plan: Rounds,
) -> Result<Swept> {
    let n = rows.positions;
    let divergences = gpu.unfinished(DType::F32, n, false)?;
    let [student, teacher] = &sides;
    let (name, beta) = match kind {
        Divergence::ForwardKl => ("forward_divergence", 0.),
        Divergence::ReverseKl => ("reverse_divergence", 0.),
        Divergence::JensenShannon(beta) => ("mixture_divergence", beta),
    };
    let all_rows = n.next_multiple_of(TILE);
    for first in (0..all_rows).step_by(plan.chunk) {
        let end = all_rows.min(first + plan.chunk);
        for side in &sides {
            side.gather(gpu, rows, first, end - first)?;
        }
        for block in (first..end).step_by(plan.block) {
            let len = plan.block.min(end - block);
            for side in &sides {
                side.logits(gpu, rows, first, block, len)?;
            }
            let of_row = |address: u64| match address {
                0 => 0,
                _ => address + block as u64 * 4,
            };
            let params = DivergenceParams {
                student: student.params(first, block),
                teacher: teacher.params(first, block),
                weights: of_row(weights),
                divergences: of_row(divergences.address),
                stride: gradient_stride(student.operands.sizes()) as i64,
                rows: len.min(n.saturating_sub(block)) as u32,
                vocab: student.operands.vocab as u32,
                class_tiles: student.operands.class_tiles() as u32,
                beta: beta as f32,
            };
            let name = student.operands.kind.kernel(name);
            gpu.launch(&Kernel::new(DIVERGENCE, name, (len, 1), THREADS), &params)?;
        }
        for side in &sides {
            side.products(gpu, rows, first, end - first)?;
        }
    }
    Ok(Swept {
        divergences: divergences.finish(gpu),
        gradients: sides.map(|side| side.finish(gpu)),
    })
}
