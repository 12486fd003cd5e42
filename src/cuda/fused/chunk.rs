//! A chunk of rows, from its logits to its part of the gradients.

use super::units::Units;
use crate::cuda::between::Between;
use crate::cuda::call::Call;
use crate::cuda::filter::{filter_blocks, Filter};
use crate::cuda::hopper;
use crate::cuda::launch::{Buffer, Kernel, FILTER, FUSED, ONE_BLOCK};
use crate::cuda::logits::logits;
use crate::cuda::operands::Operands;
use crate::cuda::outputs::Results;
use crate::cuda::params::filter::ProbableParams;
use crate::cuda::params::fused::{
    EntropyParams, FactorParams, ReferenceParams, SharesParams, SumsParams,
};
use crate::cuda::terms::Loss;
use crate::plan::{gradient_stride, Chunks, Path, TILE};
use candle_core::Result;

/// Columns of a block that adds the entropy.
const ENTROPY_COLUMNS: usize = 8192;

/// What all chunks of rows have in common, and the workspace that one after the other uses.
pub(super) struct Chunk<'a> {
    pub call: Call<'a>,
    pub loss: Loss,
    pub mean: bool,
    pub units: Units,
    pub filter: Option<Filter>,
    /// The table of kept tiles, of all rows.
    pub keep: Option<Buffer>,
    /// `(chunk_rows, mass_stride)`, where tiles are averaged.
    pub masses: Option<Buffer>,
    pub results: Results,
    pub plan: Chunks,
    pub gradient: Buffer,
    pub sums: Buffer,
    pub maxima: Option<Buffer>,
    /// The sums by the softcap's derivative, where there is one.
    pub capped: Option<Buffer>,
    /// What entropy and the likeliest class need of each tile, where asked for.
    pub outputs: Option<Buffer>,
    pub gathered: Buffer,
    /// `(chunk_rows, hidden)` in f32: sums of dE, then the targets' part of dC.
    pub wide: Buffer,
    pub between: Between,
    pub reference: Buffer,
    pub target_part: Buffer,
    pub factor: Buffer,
}

impl Chunk<'_> {
    pub fn keep_table(&self) -> u64 {
        self.keep.as_ref().map_or(0, |keep| keep.address)
    }

    /// The entropies of the rows where they are in the loss.
    fn entropies(&self) -> u64 {
        match &self.call.statistics.row_entropy {
            Some(entropies) if self.loss.has_entropy() => entropies.address,
            _ => 0,
        }
    }

    fn outputs_address(&self) -> u64 {
        self.outputs.as_ref().map_or(0, |outputs| outputs.address)
    }

    pub fn run(&self, first_row: usize, rows: usize) -> Result<()> {
        let gpu = self.call.gpu;
        let Operands { hidden, kind, .. } = self.call.operands;
        self.call
            .rows
            .gather(gpu, self.call.operands, first_row, rows, &self.gathered)?;
        let params = ReferenceParams {
            gathered: self.gathered.address,
            classifier: self.call.operands.classifier,
            bias: self.call.operands.bias,
            row_target: self.call.rows.target.address,
            count: self.call.rows.count.address,
            reference: self.reference.address,
            hidden: hidden as i64,
            first_row: first_row as u32,
            softcap: self.call.operands.softcap,
            logit_scale: self.call.operands.logit_scale,
        };
        let grid = (rows / 4, 1);
        gpu.launch(
            &Kernel::new(FUSED, kind.kernel("reference_logits"), grid, 128),
            &params,
        )?;
        let tiles = hopper::Tiles {
            count: self.call.rows.count.address,
            row_target: self.call.rows.target.address + first_row as u64 * 4,
            row_max: self.reference.address,
            gradient: self.gradient.address,
            sums: self.sums.address,
            maxima: self.maxima.as_ref().map_or(0, |maxima| maxima.address),
            masses: self.capped.as_ref().map_or(0, |capped| capped.address),
            outputs: self.outputs_address(),
            target_logit: self.call.statistics.target_logit.address + first_row as u64 * 4,
            first_row,
            rows,
            range: self.call.operands.vocab,
            stride: gradient_stride(self.call.operands.sizes()),
            ..Default::default()
        };
        hopper::tiles(
            gpu,
            self.call.operands,
            match self.outputs {
                None => hopper::Making::Probabilities,
                Some(_) => hopper::Making::ProbabilitiesAndOutputs,
            },
            self.gathered.address,
            &tiles,
        )?;
        // The count of rows where all must be done again, else 0.
        let redo = gpu.zeros(4)?;
        // As `RebaseParams` has it.
        let again = match self.units.is_some() {
            true => Some(gpu.zeros((1 + rows / TILE) * 4)?),
            false => None,
        };
        let of_again = again.as_ref().map_or(0, |again| again.address);
        self.merge(first_row, rows, redo.address, of_again)?;
        if let Some(again) = &again {
            self.write_again(again, &tiles)?;
        }
        self.do_again(first_row, rows, redo.address)?;
        self.add_entropy(first_row, rows, redo.address)?;
        self.finish_rows(first_row, rows, redo.address)?;
        self.products(first_row, rows)
    }

    /// lse and nll, and whether all must be done again.
    fn merge(&self, first_row: usize, rows: usize, redo: u64, again: u64) -> Result<()> {
        let row_entropy = &self.call.statistics.row_entropy;
        let params = SumsParams {
            reference: self.reference.address,
            sums: self.sums.address,
            outputs: self.outputs_address(),
            target_logit: self.call.statistics.target_logit.address,
            row_position: self.call.rows.position.address,
            row_target: self.call.rows.target.address,
            count: self.call.rows.count.address,
            row_max: self.call.statistics.row_max.address,
            row_log_sum: self.call.statistics.row_log_sum.address,
            row_entropy: row_entropy.as_ref().map_or(0, |entropy| entropy.address),
            packed: self.loss.packed,
            entropy: self.loss.entropy,
            predicted: self.loss.predicted,
            redo,
            again,
            terms: self.loss.terms,
            first_row: first_row as u32,
            chunk_rows: rows as u32,
            class_tiles: self.call.operands.class_tiles() as u32,
            positions: self.call.rows.positions as u32,
        };
        self.call.gpu.launch(
            &Kernel::new(FUSED, "merge_sums", (rows.div_ceil(32), 1), ONE_BLOCK),
            &params,
        )
    }

    fn do_again(&self, first_row: usize, rows: usize, redo: u64) -> Result<()> {
        let span = first_row..first_row + rows;
        logits(self.call, Path::Hopper, self.loss, redo, span, None, None)?;
        let offset = first_row as u64 * 4;
        // In the place of the factors and the target's part, which come later, and of the references, which have been used.
        let (of_softmax, of_one_hot, of_log) = match self.loss.terms.nll_only() {
            true => (0, 0, 0),
            false => {
                let params = SharesParams {
                    row_max: self.call.statistics.row_max.address,
                    row_log_sum: self.call.statistics.row_log_sum.address,
                    row_entropy: self.entropies(),
                    row_position: self.call.rows.position.address,
                    count: redo,
                    softmax: self.factor.address,
                    one_hot: self.target_part.address,
                    log: self.reference.address,
                    terms: self.loss.terms,
                    first_row: first_row as u32,
                    positions: self.call.rows.positions as u32,
                };
                let kernel = Kernel::new(FUSED, "row_shares", (rows / TILE, 1), TILE as u32);
                self.call.gpu.launch(&kernel, &params)?;
                (params.softmax, params.one_hot, params.log)
            }
        };
        let tiles = hopper::Tiles {
            count: redo,
            row_target: self.call.rows.target.address + offset,
            row_max: self.call.statistics.row_max.address + offset,
            row_log_sum: self.call.statistics.row_log_sum.address + offset,
            p_scale: of_softmax,
            target_scale: of_one_hot,
            log_scale: of_log,
            gradient: self.gradient.address,
            first_row,
            rows,
            range: self.call.operands.vocab,
            stride: gradient_stride(self.call.operands.sizes()),
            ..Default::default()
        };
        hopper::tiles(
            self.call.gpu,
            self.call.operands,
            match self.loss.has_entropy() {
                true => hopper::Making::EntropyGradient,
                false => hopper::Making::Gradient,
            },
            self.gathered.address,
            &tiles,
        )
    }

    /// Turns the probabilities into what the softmax has in the gradient, where the loss has an entropy.
    fn add_entropy(&self, first_row: usize, rows: usize, redo: u64) -> Result<()> {
        if !self.loss.has_entropy() {
            return Ok(());
        }
        let Operands { kind, .. } = self.call.operands;
        let sizes = self.call.operands.sizes();
        let classes = sizes.class_tiles() * TILE;
        let params = EntropyParams {
            gradient: self.gradient.address,
            row_max: self.call.statistics.row_max.address,
            row_log_sum: self.call.statistics.row_log_sum.address,
            row_entropy: self.entropies(),
            row_position: self.call.rows.position.address,
            count: self.call.rows.count.address,
            redo,
            stride: gradient_stride(sizes) as i64,
            classes: classes as i64,
            terms: self.loss.terms,
            first_row: first_row as u32,
            positions: self.call.rows.positions as u32,
        };
        let grid = (rows, classes.div_ceil(ENTROPY_COLUMNS));
        let kernel = Kernel::new(FUSED, kind.kernel("add_entropy"), grid, 256);
        self.call.gpu.launch(&kernel, &params)
    }

    /// The factors of the rows, the target's part, and the tiles that matter.
    fn finish_rows(&self, first_row: usize, rows: usize, redo: u64) -> Result<()> {
        let (gpu, kind) = (self.call.gpu, self.call.operands.kind);
        let trained = self.call.operands.trained();
        // Units have these in them.
        let (mean, logit_scale) = match self.units.is_some() {
            true => (false, 1.),
            false => (self.mean, self.call.operands.logit_scale),
        };
        let params = FactorParams {
            row_max: self.call.statistics.row_max.address,
            row_log_sum: self.call.statistics.row_log_sum.address,
            target_logit: self.call.statistics.target_logit.address,
            row_entropy: self.entropies(),
            row_position: self.call.rows.position.address,
            row_target: self.call.rows.target.address,
            count: self.call.rows.count.address,
            redo,
            factor: self.factor.address,
            target_part: self.target_part.address,
            gathered: match self.results.classifier {
                0 if self.masses.is_none() => 0,
                _ => self.gathered.address + (trained.start * kind.size) as u64,
            },
            unit: self.units.rows(),
            columns: trained.len() as i64,
            gathered_stride: self.call.operands.hidden as i64,
            terms: self.loss.terms,
            first_row: first_row as u32,
            positions: self.call.rows.positions as u32,
            mean: u32::from(mean),
            softcap: self.call.operands.softcap,
            logit_scale,
        };
        gpu.launch(
            &Kernel::new(FUSED, kind.kernel("factor_rows"), (rows, 1), 128),
            &params,
        )?;
        if let (Some(filter), Some(maxima)) = (self.filter, &self.maxima) {
            let params = ProbableParams {
                maxima: maxima.address,
                sums: self.capped.as_ref().unwrap_or(&self.sums).address,
                row_log_sum: self.call.statistics.row_log_sum.address,
                row_target: self.call.rows.target.address,
                count: self.call.rows.count.address,
                redo,
                keep: self.keep_table(),
                masses: self.masses.as_ref().map_or(0, |masses| masses.address),
                first_row: first_row as u32,
                chunk_rows: rows as u32,
                class_tiles: self.call.operands.class_tiles() as u32,
                mass_stride: self.call.operands.mass_stride() as u32,
                embeddings_threshold: filter.thresholds[0],
                classifier_threshold: filter.thresholds[1],
            };
            let grid = (filter_blocks(self.call.operands), rows / TILE);
            let name = kind.kernel("filter_probabilities");
            gpu.launch(&Kernel::new(FILTER, name, grid, TILE as u32), &params)?;
        }
        Ok(())
    }
}
