//! The rows that count.

use super::launch::{Array, Buffer, Gpu, Kernel, ROWS};
use super::operands::Operands;
use super::params::rows::{GatherParams, PadParams, PickParams, SortParams};
use super::terms::Loss;
use crate::problem::Problem;
use candle_core::{bail, DType, Result};

/// The rows that count, as the device knows them.
pub(super) struct Rows {
    /// The most there can be: positions of the result.
    pub positions: usize,
    pub embedding: Buffer,
    pub position: Buffer,
    pub target: Buffer,
    /// Rows that count, index of the first target out of range.
    pub count: Array<u32>,
}

impl Rows {
    /// These rows of the embeddings, where neither positions nor targets matter.
    pub fn known(gpu: &Gpu, embedding: &[u32]) -> Result<Self> {
        let bytes: Vec<u8> = embedding.iter().flat_map(|row| row.to_ne_bytes()).collect();
        Ok(Self {
            positions: embedding.len(),
            embedding: gpu.upload(&bytes)?,
            position: gpu.buffer(0)?,
            target: gpu.buffer(0)?,
            count: gpu.upload(&[embedding.len() as u32, u32::MAX])?,
        })
    }

    pub fn pick(gpu: &Gpu, problem: &Problem, loss: Loss) -> Result<Self> {
        let positions = problem.positions;
        let n = positions.len();
        let rows = Self {
            positions: n,
            embedding: gpu.buffer(n * 4)?,
            position: gpu.buffer(n * 4)?,
            target: gpu.buffer(n * 4)?,
            count: gpu.array(2)?,
        };
        let kernel = match problem.targets.dtype() {
            DType::I64 => "pick_rows_i64",
            DType::U32 => "pick_rows_u32",
            DType::I32 => "pick_rows_i32",
            dtype => bail!("targets must be i64, u32 or i32, got {dtype:?}"),
        };
        let shard = problem.settings.vocab_parallel.as_ref();
        gpu.read(&problem.targets, |targets| {
            let params = PickParams {
                targets,
                row_embedding: rows.embedding.address,
                row_position: rows.position.address,
                row_target: rows.target.address,
                count: rows.count.address,
                packed: loss.packed,
                entropy: loss.entropy,
                predicted: loss.predicted,
                ignore_index: problem.settings.ignore_index,
                first_class: shard.map_or(0, |shard| shard.start) as i64,
                positions: n as u32,
                time: positions.time as u32,
                shift: positions.shift as u32,
                vocab: problem.vocab() as u32,
            };
            gpu.launch(&Kernel::one_block(ROWS, kernel), &params)
        })?;
        // Of a shard, targets are checked once those of the other ranks are known.
        if problem.settings.check_targets && shard.is_none() {
            // Waits for the device.
            let index = gpu.to_host(&rows.count)?[1];
            if index != u32::MAX {
                let target = problem.target(index as usize)?;
                return Err(problem.bad_target(index as usize, target));
            }
        }
        Ok(rows)
    }

    /// Copies these rows of the embeddings, one after the other, zeros where there are fewer rows or columns.
    pub fn gather(
        &self,
        gpu: &Gpu,
        operands: Operands,
        first_row: usize,
        rows: usize,
        into: &Buffer,
    ) -> Result<()> {
        if operands.embedding_columns < operands.hidden || !operands.embeddings.is_multiple_of(16) {
            let params = PadParams {
                row_embedding: self.embedding.address,
                count: self.count.address,
                first_row: first_row as u32,
                ..pad_params(operands, operands.embeddings, into)
            };
            return gpu.launch(&Kernel::new(ROWS, "pad_rows", (rows, 1), 128), &params);
        }
        let params = GatherParams {
            embeddings: operands.embeddings,
            row_embedding: self.embedding.address,
            count: self.count.address,
            gathered: into.address,
            chunks: (operands.hidden * operands.kind.size / 16) as i64,
            first_row: first_row as u32,
        };
        gpu.launch(&Kernel::new(ROWS, "gather_rows", (rows, 1), 128), &params)
    }
}

/// Copies the classifier to where every row begins on 16 bytes, of `operands.hidden` columns.
pub(super) fn pad_classifier(gpu: &Gpu, operands: Operands, into: &Buffer) -> Result<()> {
    let params = pad_params(operands, operands.classifier.own, into);
    let kernel = Kernel::new(ROWS, "pad_rows", (operands.vocab, 1), 128);
    gpu.launch(&kernel, &params)
}

fn pad_params(operands: Operands, matrix: u64, into: &Buffer) -> PadParams {
    PadParams {
        matrix,
        padded: into.address,
        columns: operands.embedding_columns as i64,
        padded_columns: operands.hidden as i64,
        pairs: u32::from(operands.embedding_columns.is_multiple_of(2) && matrix.is_multiple_of(4)),
        ..Default::default()
    }
}

/// Rows of a chunk by target, then by row.
pub(super) struct Sorted {
    pub row: Buffer,
    pub target: Buffer,
}

pub(super) fn sort_targets(gpu: &Gpu, rows: &Rows, first_row: usize, len: usize) -> Result<Sorted> {
    let sorted = Sorted {
        row: gpu.buffer(len * 4)?,
        target: gpu.buffer(len * 4)?,
    };
    let params = SortParams {
        row_target: rows.target.address,
        count: rows.count.address,
        sorted_row: sorted.row.address,
        sorted_target: sorted.target.address,
        first_row: first_row as u32,
        rows: len as u32,
    };
    gpu.launch(
        &Kernel::new(ROWS, "sort_targets", (len / 8, 1), 256),
        &params,
    )?;
    Ok(sorted)
}
