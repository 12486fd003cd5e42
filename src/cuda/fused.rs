//! Gradients formed in the forward, on compute capability 9.0 and for bf16: three matrix products instead of four.
//!
//! For a chunk of rows at a time the kernel `probabilities` leaves `exp(z - reference)` of every class in the
//! workspace, the reference of a row being its target's logit. Once lse is known, the row lacks one factor and the
//! target's entry; the factor goes into dE's rows and, for dC, into a copy of E's, and the targets' part is added in
//! f32 before either is rounded. The gradients are those of the loss itself; the backward multiplies them by the
//! upstream gradient.
//!
//! Should lse be so far from a reference that its row leaves the range of bf16, the device does the chunk again, as
//! the backward would; otherwise the launches that would do so find no rows.

use super::averages::{self, filter_blocks, mass_stride, Averages, Filter, Masses};
use super::launch::{Buffer, Gpu};
use super::params::*;
use super::plan::Workspace;
use super::{
    count_kept, hopper, logits, per_block, Kind, Operands, Outputs, Path, Range, Results, Rows,
    Saved, Statistics, TILE,
};
use crate::matrices::Matrices;
use crate::op::contract::{self as op, Gradients, Wanted};
use crate::problem::Settings;
use crate::{Reduction, Strategy};
use candle_core::{DType, Result, Tensor};
use std::sync::{Arc, Mutex};

/// Bytes of the workspace unless the user says otherwise.
const WORKSPACE: usize = 3 << 29;
/// Classes below which nearly every tile of a trained head matters: then forming the exact gradients takes less time than
/// computing the logits twice.
const FEW_CLASSES: usize = 1 << 16;
/// Rows of a chunk below which `Auto` computes the logits twice instead.
const LEAST_ROWS: usize = 1024;
/// The most chunks: dC is rounded once in each. More rows than one piece of a sum in f32 are one chunk.
const MOST_CHUNKS: usize = 4;
/// Columns of a block that sums the targets' part of dC.
const TARGET_COLUMNS: usize = 1024;

/// How many rows go through at a time, and how many classes of them through a launch of the products.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    chunk_rows: usize,
    range: usize,
}

impl Plan {
    /// `None` where the gradients are better, or can only be, computed in the backward.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        gpu: &Gpu,
        path: Path,
        operands: Operands,
        rows: usize,
        settings: &Settings,
        wanted: Wanted,
        filter: Option<Filter>,
        workspace: Workspace,
    ) -> Result<Option<Self>> {
        let runs = path == Path::Hopper
            && operands.kind.dtype == DType::BF16
            && settings.reduction != Reduction::None
            && settings.strategy != Strategy::Recompute
            && wanted.any();
        if !runs {
            return Ok(None);
        }
        let all_rows = rows.next_multiple_of(TILE);
        let averaging = filter.is_some_and(|filter| !filter.drop);
        let of_tiles = operands.class_tiles() * (4 + 4 + if operands.softcap > 0. { 4 } else { 0 });
        let of_masses = if averaging {
            mass_stride(operands) * 2
        } else {
            0
        };
        let row_bytes = stride(operands) * 2
            + of_tiles
            + of_masses
            + operands.hidden * (operands.kind.size + 4);
        let fused = settings.strategy == Strategy::Fused;
        let (budget, least) = match filter {
            _ if fused => (WORKSPACE, TILE),
            None => (WORKSPACE, LEAST_ROWS.min(all_rows)),
            // Of few tiles the logits cost less than to write them all.
            Some(_) => return Ok(None),
        };
        let mut budget = workspace.or(budget);
        if averaging {
            budget = budget.saturating_sub(Averages::fixed_bytes(operands));
        }
        let most = budget.saturating_sub(hopper::EVALUATION_BYTES) / row_bytes / TILE * TILE;
        let chunks = match all_rows > hopper::PIECE_ROWS {
            true => 1,
            false => MOST_CHUNKS,
        };
        let fewest = (all_rows / TILE).div_ceil(chunks).max(1) * TILE;
        if most < least.max(fewest) {
            return Ok(None);
        }
        let multiprocessors = gpu.multiprocessors()?;
        let sizes = fewest..=most.min(all_rows);
        let chunk_rows = best_chunk(operands.hidden, all_rows, sizes, multiprocessors / 2);
        let range = hopper::longest_range(chunk_rows, multiprocessors);
        Ok((range > 0).then_some(Self { chunk_rows, range }))
    }
}

/// What is filtered of gradients that the forward forms.
pub(super) fn filter(
    settings: &Settings,
    operands: Operands,
    filter: Option<Filter>,
) -> Option<Filter> {
    filter.filter(|_| !(settings.automatic_filter && operands.vocab < FEW_CLASSES))
}

/// The rows of a chunk that leave the fewest clusters idle in the product for dE and read dC least often.
fn best_chunk(
    hidden: usize,
    all_rows: usize,
    sizes: std::ops::RangeInclusive<usize>,
    clusters: usize,
) -> usize {
    let strips = hidden.div_ceil(hopper::STRIP);
    let cost = |chunk: usize| {
        let chunks = all_rows.div_ceil(chunk);
        let rounds = (chunk / TILE * strips).div_ceil(clusters.max(1));
        let embeddings = (rounds * clusters * TILE) as f64 / strips as f64;
        chunks as f64 * (embeddings + hopper::ROWS_A_CHUNK as f64)
    };
    let fewest = *sizes.start();
    sizes
        .step_by(TILE)
        .min_by(|&a, &b| cost(a).total_cmp(&cost(b)))
        .unwrap_or(fewest)
}

/// Classes from one row of the workspace to the next.
fn stride(operands: Operands) -> usize {
    operands.vocab.next_multiple_of(2 * TILE)
}

/// Computes lse, nll and the gradients of the loss. Returns how many tiles were kept.
#[allow(clippy::too_many_arguments)]
pub(super) fn forward(
    gpu: &Gpu,
    operands: Operands,
    rows: &Rows,
    statistics: &Statistics,
    packed: u64,
    settings: &Settings,
    filter: Option<Filter>,
    results: Results,
    plan: Plan,
) -> Result<Tensor> {
    let all_rows = rows.positions.next_multiple_of(TILE);
    let of_tiles = |filter: Option<Filter>| match filter {
        None => Ok(None),
        Some(_) => gpu
            .buffer(plan.chunk_rows * operands.class_tiles() * 4)
            .map(Some),
    };
    let chunk = Chunk {
        gpu,
        operands,
        rows,
        statistics,
        packed,
        settings,
        keep: match filter {
            None => None,
            Some(_) => Some(gpu.buffer(all_rows / TILE * operands.class_tiles())?),
        },
        // One chunk's masses at a time.
        masses: match filter {
            Some(filter) if !filter.drop => {
                Some(gpu.buffer(plan.chunk_rows * mass_stride(operands) * operands.kind.size)?)
            }
            _ => None,
        },
        filter,
        results,
        plan,
        gradient: gpu.buffer(plan.chunk_rows * stride(operands) * operands.kind.size)?,
        sums: gpu.buffer(plan.chunk_rows * operands.class_tiles() * 4)?,
        maxima: of_tiles(filter)?,
        capped: of_tiles(filter.filter(|_| operands.softcap > 0.))?,
        gathered: gpu.buffer(plan.chunk_rows * operands.hidden * operands.kind.size)?,
        wide: gpu.buffer(plan.chunk_rows * operands.hidden * 4)?,
        reference: gpu.buffer(plan.chunk_rows * 4)?,
        target_part: gpu.buffer(plan.chunk_rows * 4)?,
        factor: gpu.buffer(plan.chunk_rows * 4)?,
    };
    for first_row in (0..all_rows).step_by(plan.chunk_rows) {
        chunk.run(first_row, plan.chunk_rows.min(all_rows - first_row))?;
    }
    count_kept(gpu, rows, chunk.keep_table(), operands.class_tiles())
}

/// What all chunks of rows have in common, and the workspace that one after the other uses.
struct Chunk<'a> {
    gpu: &'a Gpu,
    operands: Operands,
    rows: &'a Rows,
    statistics: &'a Statistics,
    packed: u64,
    settings: &'a Settings,
    filter: Option<Filter>,
    /// The table of kept tiles, of all rows.
    keep: Option<Buffer>,
    /// `(chunk_rows, mass_stride)`, where tiles are averaged.
    masses: Option<Buffer>,
    results: Results,
    plan: Plan,
    gradient: Buffer,
    sums: Buffer,
    maxima: Option<Buffer>,
    /// The sums by the softcap's derivative, where there is one.
    capped: Option<Buffer>,
    gathered: Buffer,
    /// `(chunk_rows, hidden)` in f32: sums of dE, then the targets' part of dC.
    wide: Buffer,
    reference: Buffer,
    target_part: Buffer,
    factor: Buffer,
}

impl Chunk<'_> {
    fn keep_table(&self) -> u64 {
        self.keep.as_ref().map_or(0, |keep| keep.address)
    }

    fn run(&self, first_row: usize, rows: usize) -> Result<()> {
        let gpu = self.gpu;
        let Operands { hidden, kind, .. } = self.operands;
        self.rows
            .gather(gpu, self.operands, first_row, rows, &self.gathered)?;
        let params = ReferenceParams {
            gathered: self.gathered.address,
            classifier: self.operands.classifier,
            bias: self.operands.bias,
            row_target: self.rows.target.address,
            count: self.rows.count.address,
            reference: self.reference.address,
            hidden: hidden as i64,
            first_row: first_row as u32,
            softcap: self.operands.softcap,
        };
        let grid = (rows / 4, 1);
        gpu.launch(
            &per_block(kind.kernel("reference_logits"), grid, 128),
            &params,
        )?;
        let tiles = hopper::Tiles {
            count: self.rows.count.address,
            row_target: self.rows.target.address + first_row as u64 * 4,
            row_max: self.reference.address,
            gradient: self.gradient.address,
            sums: self.sums.address,
            maxima: self.maxima.as_ref().map_or(0, |maxima| maxima.address),
            masses: self.capped.as_ref().map_or(0, |capped| capped.address),
            target_logit: self.statistics.target_logit.address + first_row as u64 * 4,
            first_row,
            rows,
            range: self.operands.vocab,
            stride: stride(self.operands),
            ..Default::default()
        };
        hopper::tiles(
            gpu,
            self.operands,
            "probabilities_sm90a",
            &self.gathered,
            &tiles,
        )?;
        // The count of rows where all must be done again, else 0.
        let redo = gpu.zeros(4)?;
        self.merge(first_row, rows, redo.address)?;
        self.do_again(first_row, rows, redo.address)?;
        self.finish_rows(first_row, rows, redo.address)?;
        self.products(first_row, rows)
    }

    /// lse and nll, and whether all must be done again.
    fn merge(&self, first_row: usize, rows: usize, redo: u64) -> Result<()> {
        let params = SumsParams {
            reference: self.reference.address,
            sums: self.sums.address,
            target_logit: self.statistics.target_logit.address,
            row_position: self.rows.position.address,
            row_target: self.rows.target.address,
            count: self.rows.count.address,
            row_max: self.statistics.row_max.address,
            row_log_sum: self.statistics.row_log_sum.address,
            packed: self.packed,
            redo,
            first_row: first_row as u32,
            chunk_rows: rows as u32,
            class_tiles: self.operands.class_tiles() as u32,
            positions: self.rows.positions as u32,
            z_loss: self.settings.z_loss as f32,
        };
        self.gpu.launch(
            &per_block("merge_sums", (rows.div_ceil(32), 1), super::ONE_BLOCK),
            &params,
        )
    }

    fn do_again(&self, first_row: usize, rows: usize, redo: u64) -> Result<()> {
        logits(
            self.gpu,
            Path::Hopper,
            self.operands,
            self.rows,
            redo,
            self.statistics,
            self.packed,
            self.settings.z_loss as f32,
            first_row..first_row + rows,
            None,
            None,
        )?;
        let offset = first_row as u64 * 4;
        // In the place of the factors, which come later.
        let shares = match self.settings.z_loss {
            0. => 0,
            weight => {
                let params = SharesParams {
                    row_max: self.statistics.row_max.address,
                    row_log_sum: self.statistics.row_log_sum.address,
                    count: redo,
                    shares: self.factor.address,
                    first_row: first_row as u32,
                    z_loss: weight as f32,
                };
                let grid = (rows / TILE, 1);
                self.gpu
                    .launch(&per_block("softmax_shares", grid, TILE as u32), &params)?;
                self.factor.address
            }
        };
        let tiles = hopper::Tiles {
            count: redo,
            row_target: self.rows.target.address + offset,
            row_max: self.statistics.row_max.address + offset,
            row_log_sum: self.statistics.row_log_sum.address + offset,
            p_scale: shares,
            gradient: self.gradient.address,
            first_row,
            rows,
            range: self.operands.vocab,
            stride: stride(self.operands),
            ..Default::default()
        };
        hopper::tiles(
            self.gpu,
            self.operands,
            "gradient_sm90a",
            &self.gathered,
            &tiles,
        )
    }

    /// The factors of the rows, the target's part, and the tiles that matter.
    fn finish_rows(&self, first_row: usize, rows: usize, redo: u64) -> Result<()> {
        let (gpu, kind) = (self.gpu, self.operands.kind);
        let params = FactorParams {
            row_max: self.statistics.row_max.address,
            row_log_sum: self.statistics.row_log_sum.address,
            target_logit: self.statistics.target_logit.address,
            row_target: self.rows.target.address,
            count: self.rows.count.address,
            redo,
            factor: self.factor.address,
            target_part: self.target_part.address,
            gathered: match self.results.classifier {
                0 if self.masses.is_none() => 0,
                _ => self.gathered.address,
            },
            hidden: self.operands.hidden as i64,
            first_row: first_row as u32,
            mean: u32::from(self.settings.reduction == Reduction::Mean),
            softcap: self.operands.softcap,
            z_loss: self.settings.z_loss as f32,
        };
        gpu.launch(
            &per_block(kind.kernel("factor_rows"), (rows, 1), 128),
            &params,
        )?;
        if let (Some(filter), Some(maxima)) = (self.filter, &self.maxima) {
            let params = ProbableParams {
                maxima: maxima.address,
                sums: self.capped.as_ref().unwrap_or(&self.sums).address,
                row_log_sum: self.statistics.row_log_sum.address,
                row_target: self.rows.target.address,
                count: self.rows.count.address,
                redo,
                keep: self.keep_table(),
                masses: self.masses.as_ref().map_or(0, |masses| masses.address),
                first_row: first_row as u32,
                chunk_rows: rows as u32,
                class_tiles: self.operands.class_tiles() as u32,
                mass_stride: mass_stride(self.operands) as u32,
                embeddings_threshold: filter.thresholds[0],
                classifier_threshold: filter.thresholds[1],
            };
            let grid = (filter_blocks(self.operands), rows / TILE);
            let name = kind.kernel("filter_probabilities");
            gpu.launch(&averages::kernel(name, grid, TILE as u32), &params)?;
        }
        Ok(())
    }

    /// What stands in the place of tiles that are not kept, where they are averaged; it begins the sums of dE.
    fn averages(&self, first_row: usize, rows: usize) -> Result<Option<Averages>> {
        let (Some(filter), Some(masses)) = (self.filter, &self.masses) else {
            return Ok(None);
        };
        let row_bytes = mass_stride(self.operands) * self.operands.kind.size;
        let masses = Masses {
            gpu: self.gpu,
            path: Path::Hopper,
            operands: self.operands,
            rows: self.rows,
            filter,
            // Those of the chunk are all there are.
            masses: masses.address.wrapping_sub((first_row * row_bytes) as u64),
            keep: self.keep_table(),
            first_row,
            len: rows,
            gathered: Some(&self.gathered),
            p_scale: 0,
            row_scale: self.factor.address,
        };
        Averages::new(masses, self.results, self.wide.address).map(Some)
    }

    /// dE, then dC and db, whose part of the targets takes the place of dE's sums.
    fn products(&self, first_row: usize, rows: usize) -> Result<()> {
        let gpu = self.gpu;
        let Operands {
            hidden,
            vocab,
            kind,
            ..
        } = self.operands;
        let count = self.rows.count.address;
        let averages = self.averages(first_row, rows)?;
        let of_averages = match &averages {
            None => averages::Addresses::default(),
            Some(averages) => averages.addresses(),
        };
        if self.results.embeddings != 0 {
            self.multiply(first_row, rows, |part| Range {
                sums: self.wide.address,
                add_to_sums: part.first_class > 0 || averages.is_some(),
                ..part
            })?;
            let params = FinishParams {
                sums: self.wide.address,
                target_part: self.target_part.address,
                row_target: self.rows.target.address,
                classifier: self.operands.classifier,
                row_embedding: self.rows.embedding.address,
                count,
                row_scale: self.factor.address,
                embeddings_grad: self.results.embeddings,
                hidden: hidden as i64,
                first_row: first_row as u32,
                ..Default::default()
            };
            let kernel = per_block(kind.kernel("finish_embeddings"), (rows, 1), 256);
            gpu.launch(&kernel, &params)?;
        }
        if self.results.classifier == 0 && self.results.bias == 0 {
            return Ok(());
        }
        let targets = self.targets(first_row, rows)?;
        if self.results.classifier != 0 {
            self.multiply(first_row, rows, |part| Range {
                classifier_grad: self.results.classifier,
                add_to_classifier: first_row > 0,
                slots: targets.slots.address,
                target_rows: self.wide.address,
                averages: of_averages,
                ..part
            })?;
        }
        if self.results.bias != 0 {
            let params = BiasParams {
                gradient: self.gradient.address,
                count,
                keep: self.keep_table(),
                row_scale: self.factor.address,
                slots: targets.slots.address,
                target_bias: targets.bias.address,
                shares: of_averages.shares,
                mass_sums: of_averages.mass_sums,
                bias_grad: self.results.bias,
                vocab: vocab as i64,
                range: stride(self.operands) as i64,
                first_row: first_row as u32,
                rows: rows as u32,
                class_tiles: self.operands.class_tiles() as u32,
                overwrite: u32::from(first_row == 0),
                ..Default::default()
            };
            let grid = (vocab.div_ceil(32), 1);
            gpu.launch(&per_block(kind.kernel("bias_gradient"), grid, 256), &params)?;
        }
        Ok(())
    }

    /// The products of a chunk, of all ranges of classes, that `results` asks for.
    fn multiply(
        &self,
        first_row: usize,
        rows: usize,
        results: impl Fn(Range) -> Range,
    ) -> Result<()> {
        let Operands { vocab, kind, .. } = self.operands;
        let keep = self.keep_table();
        for first_class in (0..vocab).step_by(self.plan.range) {
            let part = results(Range {
                first_class,
                classes: self.plan.range,
                stride: stride(self.operands),
                first_row,
                rows,
                gradient: self.gradient.address + (first_class * kind.size) as u64,
                keep,
                ..Default::default()
            });
            let count = self.rows.count.address;
            hopper::products(self.gpu, self.operands, count, 0, part, &self.gathered)?;
        }
        Ok(())
    }

    /// Sums the targets' part of dC, into `wide`, and of db.
    fn targets(&self, first_row: usize, rows: usize) -> Result<Targets> {
        let (gpu, count) = (self.gpu, self.rows.count.address);
        let Operands { hidden, vocab, .. } = self.operands;
        let targets = Targets {
            slots: gpu.zeros(vocab * 4)?,
            bias: gpu.buffer(rows * 4)?,
        };
        let sorted = averages::sort_targets(gpu, self.rows, first_row, rows)?;
        let params = TargetsParams {
            embeddings: self.operands.embeddings,
            target_part: self.target_part.address,
            row_embedding: self.rows.embedding.address,
            sorted_row: sorted.row.address,
            sorted_target: sorted.target.address,
            count,
            slots: targets.slots.address,
            target_rows: match self.results.classifier {
                0 => 0,
                _ => self.wide.address,
            },
            target_bias: targets.bias.address,
            hidden: hidden as i64,
            first_row: first_row as u32,
            rows: rows as u32,
        };
        let columns = match self.results.classifier {
            0 => 1,
            _ => hidden.div_ceil(TARGET_COLUMNS),
        };
        let kernel = self.operands.kind.kernel("sum_targets");
        gpu.launch(&per_block(kernel, (rows, columns), 256), &params)?;
        Ok(targets)
    }
}

/// The classes that are targets of a chunk, and their part of db.
struct Targets {
    slots: Buffer,
    bias: Buffer,
}

/// The gradients of the loss, until the backward asks for them.
pub(super) struct Fused {
    saved: Arc<Saved>,
    formed: Mutex<Option<Outputs>>,
    kept: Tensor,
}

impl Fused {
    pub fn new(saved: Arc<Saved>, formed: Outputs, kept: Tensor) -> Self {
        Self {
            saved,
            formed: Mutex::new(Some(formed)),
            kept,
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
            let upstream = Tensor::cat(&[&others, upstream], 0)?;
            return self.saved.backward(matrices, &upstream, wanted);
        };
        let kind = Kind::of(matrices.classifier.dtype())?;
        gpu.read(upstream, |upstream| {
            for grad in formed.iter() {
                let params = UpstreamParams {
                    upstream,
                    gradient: grad.address,
                    numbers: grad.elem_count() as i64,
                };
                let grid = (gpu.multiprocessors()? * 4, 1);
                gpu.launch(
                    &per_block(kind.kernel("scale_gradient"), grid, 512),
                    &params,
                )?;
            }
            Ok(())
        })?;
        self.saved.kept.set(self.kept.clone());
        Ok(formed.finish(gpu))
    }
}
