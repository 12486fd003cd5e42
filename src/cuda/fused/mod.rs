//! Gradients formed in the forward, on compute capability 9.0: three matrix products instead of four.
//!
//! For a chunk of rows at a time the kernel `probabilities` leaves `exp(z - reference)` of every class in the
//! workspace, the reference of a row being its target's logit. Once lse is known, the row lacks one factor and the
//! target's entry; the factor goes into dE's rows and, for dC, into a copy of E's, and the targets' part is added in
//! f32 before either is rounded. The gradients are those of the loss itself; the backward multiplies them by the
//! upstream gradient.
//!
//! Should lse be so far from a reference that its row leaves the range of bf16, the device does the chunk again, as
//! the backward would; otherwise the launches that would do so find no rows. What f16 needs besides is in [`units`] and
//! [`again`].

mod again;
mod chunk;
mod products;
mod targets;
mod units;

use super::backward::Saved;
use super::between::Between;
use super::call::Call;
use super::filter::{count_kept, Filter};
use super::operands::{Kind, Operands};
use super::outputs::{Outputs, Results};
use super::scale::scale;
use super::terms::Loss;
use crate::matrices::Matrices;
use crate::op::contract::{self as op, Gradients, Wanted};
use crate::plan::{self, gradient_stride, Chunks, Forming, Path, Workspace, OUTPUTS_BYTES, TILE};
use crate::problem::Settings;
use crate::{Entropy, Reduction, Strategy};
use candle_core::{DType, Result, Tensor};
use chunk::Chunk;
use std::sync::{Arc, Mutex};
use units::Units;

/// Classes below which nearly every tile of a trained head matters: then forming the exact gradients takes less time than
/// computing the logits twice.
const FEW_CLASSES: usize = 1 << 16;

/// What is filtered of gradients that the forward forms.
pub(super) fn filter(
    settings: &Settings,
    operands: Operands,
    filter: Option<Filter>,
) -> Option<Filter> {
    filter.filter(|_| !(settings.automatic_filter && operands.vocab < FEW_CLASSES))
}

/// The chunks of rows; `None` where the gradients are better, or can only be, computed in the backward.
pub(super) fn plan(
    path: Path,
    call: Call<'_>,
    loss: Loss,
    settings: &Settings,
    (wanted, filter): (Wanted, Option<Filter>),
    workspace: Workspace,
) -> Option<Chunks> {
    let asked = settings.strategy == Strategy::Fused;
    // Of few tiles the logits cost less than to write them all.
    let pays = asked || (settings.strategy == Strategy::Auto && filter.is_none());
    let runs = path == Path::Hopper
        && settings.reduction != Reduction::None
        && settings.entropy != Entropy::Differentiable
        // The probabilities are stored times the softcap's slope: their logarithms are not known.
        && !(loss.has_entropy() && call.operands.softcap > 0.)
        && wanted.any();
    if !(pays && runs) {
        return None;
    }
    let averaging = filter.is_some_and(|filter| !filter.drop);
    // The rows that tiles are averaged by have their factors in them here: a weight would be one, of any sign.
    if averaging && loss.terms.of_positions != 0 {
        return None;
    }
    // f16 has no room for the sums of such rows, and for others where the gradients of the logits are bounded.
    if call.operands.kind.dtype == DType::F16 && (averaging || !loss.terms.at_most_one()) {
        return None;
    }
    let forming = Forming {
        averaging,
        asked,
        outputs: loss.more(),
    };
    let sizes = call.operands.sizes();
    plan::fused(sizes, call.rows.positions, forming, workspace)
}

/// What there is of the gradients beside themselves.
pub(super) struct Beside {
    /// How many tiles were kept.
    kept: Tensor,
    units: Units,
}

/// Computes lse, nll and the gradients of the loss, up to their units.
pub(super) fn forward(
    call: Call<'_>,
    loss: Loss,
    mean: bool,
    filter: Option<Filter>,
    results: Results,
    plan: Chunks,
) -> Result<Beside> {
    let Call {
        gpu,
        operands,
        rows,
        ..
    } = call;
    let stride = gradient_stride(operands.sizes());
    let all_rows = rows.positions.next_multiple_of(TILE);
    let of_tiles = |filter: Option<Filter>| match filter {
        None => Ok(None),
        Some(_) => gpu.buffer(plan.rows * operands.class_tiles() * 4).map(Some),
    };
    let chunk = Chunk {
        call,
        loss,
        mean,
        units: Units::new(call, loss, mean)?,
        keep: match filter {
            None => None,
            Some(_) => Some(gpu.buffer(all_rows / TILE * operands.class_tiles())?),
        },
        // One chunk's masses at a time.
        masses: match filter {
            Some(filter) if !filter.drop => {
                Some(gpu.buffer(plan.rows * operands.mass_stride() * operands.kind.size)?)
            }
            _ => None,
        },
        filter,
        results,
        plan,
        gradient: gpu.buffer(plan.rows * stride * operands.kind.size)?,
        sums: gpu.buffer(plan.rows * operands.class_tiles() * 4)?,
        maxima: of_tiles(filter)?,
        capped: of_tiles(filter.filter(|_| operands.softcap > 0.))?,
        outputs: match loss.more() {
            true => Some(gpu.buffer(plan.rows * operands.class_tiles() * OUTPUTS_BYTES)?),
            false => None,
        },
        gathered: gpu.buffer(plan.rows * operands.hidden * operands.kind.size)?,
        wide: gpu.buffer(plan.rows * operands.hidden * 4)?,
        between: Between::new(gpu, operands, results, all_rows.div_ceil(plan.rows))?,
        reference: gpu.buffer(plan.rows * 4)?,
        target_part: gpu.buffer(plan.rows * 4)?,
        factor: gpu.buffer(plan.rows * 4)?,
    };
    for first_row in (0..all_rows).step_by(plan.rows) {
        chunk.run(first_row, plan.rows.min(all_rows - first_row))?;
    }
    Ok(Beside {
        kept: count_kept(call, chunk.keep_table())?,
        units: chunk.units,
    })
}

/// The gradients of the loss, until the backward asks for them.
pub(super) struct Fused {
    saved: Arc<Saved>,
    formed: Mutex<Option<Outputs>>,
    beside: Beside,
}

impl Fused {
    pub fn new(saved: Arc<Saved>, formed: Outputs, beside: Beside) -> Self {
        Self {
            saved,
            formed: Mutex::new(Some(formed)),
            beside,
        }
    }
}

impl op::Backward for Fused {
    /// `upstream` is one number. The first call hands out what the forward formed; should there be another, it
    /// computes the logits again.
    fn backward(
        &self,
        matrices: Matrices<&Tensor>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        let gpu = &self.saved.gpu;
        let formed = self.formed.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(formed) = formed else {
            let others =
                Tensor::zeros(2 * self.saved.rows.positions, DType::F32, upstream.device())?;
            let of_entropies =
                Tensor::zeros(self.saved.rows.positions, DType::F32, upstream.device())?;
            let upstream = Tensor::cat(&[&others, upstream, &of_entropies], 0)?;
            return self.saved.backward(matrices, &upstream, wanted);
        };
        let kind = Kind::of(matrices.classifier.dtype())?;
        gpu.read(upstream, |upstream| {
            for (which, grad) in formed.iter() {
                let unit = self.beside.units.of_gradient(which);
                scale(gpu, kind, grad.address, grad.elem_count(), upstream, unit)?;
            }
            Ok(())
        })?;
        self.saved.kept.set(self.beside.kept.clone());
        Ok(formed.finish(gpu))
    }
}
