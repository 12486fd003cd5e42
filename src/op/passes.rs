//! Passes over a whole matrix and a vector, in the type of sums: by kernels where they can run, elsewhere in Candle's
//! operations on blocks of rows.

use super::contract::accumulator;
use crate::blocks::blocks;
use crate::problem::Problem;
use crate::Implementation;
use candle_core::{bail, Result, Tensor, D};

/// Bytes in use at most, outside of an implementation's own forward and backward.
const WORKSPACE: usize = 64 << 20;
/// Blocks of rows that are in memory at once.
const BLOCKS: usize = 4;

#[derive(Debug, Clone, Copy)]
pub(super) struct Passes {
    numbers_at_once: usize,
    /// Whether kernels may run.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    kernels: bool,
}

impl Passes {
    /// Within the workspace of the call.
    pub fn new(problem: &Problem) -> Self {
        let bytes = BLOCKS * accumulator(problem.dtype).size_in_bytes();
        let workspace = problem.settings.workspace.unwrap_or(WORKSPACE);
        Self {
            numbers_at_once: workspace.min(WORKSPACE) / bytes,
            kernels: problem.settings.implementation != Implementation::Native,
        }
    }

    /// `sum_i weights_i matrix_i`, of the rows that count if that is given.
    pub fn weighted_sum(
        self,
        matrix: &Tensor,
        weights: &Tensor,
        counts: Option<&Tensor>,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.kernels {
            if let Some(sum) = crate::cuda::smoothing::weighted_sum(matrix, weights, counts)? {
                return Ok(sum);
            }
        }
        let mut sum: Option<Tensor> = None;
        for block in self.blocks(matrix)? {
            let (start, block) = block?;
            let weights = weights.narrow(0, start, block.dim(0)?)?.unsqueeze(0)?;
            let of_block = weights.matmul(&keep_rows(block, counts, start)?)?;
            sum = Some(match sum {
                Some(sum) => (sum + of_block)?,
                None => of_block,
            });
        }
        match sum {
            Some(sum) => sum.flatten_all(),
            None => bail!("a matrix without rows"),
        }
    }

    /// The products of the rows of a matrix with a vector.
    pub fn dots(self, matrix: &Tensor, vector: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.kernels {
            if let Some(dots) = crate::cuda::smoothing::dots(matrix, vector)? {
                return Ok(dots);
            }
        }
        let vector = vector.unsqueeze(1)?;
        let products = self
            .blocks(matrix)?
            .map(|block| block?.1.matmul(&vector))
            .collect::<Result<Vec<_>>>()?;
        Tensor::cat(&products, 0)?.flatten_all()
    }

    /// Adds `left right^T` to a matrix in place, to the rows that count if that is given.
    pub fn add_outer(
        self,
        matrix: &Tensor,
        left: &Tensor,
        right: &Tensor,
        counts: Option<&Tensor>,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.kernels && crate::cuda::smoothing::add_outer(matrix, left, right, counts)? {
            return Ok(());
        }
        let right = right.unsqueeze(0)?;
        for block in self.blocks(matrix)? {
            let (start, block) = block?;
            let left = left.narrow(0, start, block.dim(0)?)?.unsqueeze(D::Minus1)?;
            let added = keep_rows(left.matmul(&right)?, counts, start)?;
            let sum = (block + added)?;
            matrix.slice_set(&sum.to_dtype(matrix.dtype())?, 0, start)?;
        }
        Ok(())
    }

    /// Rows of a matrix, a block at a time, with the number of the first.
    fn blocks(self, matrix: &Tensor) -> Result<impl Iterator<Item = Result<(usize, Tensor)>> + '_> {
        let (rows, columns) = matrix.dims2()?;
        let acc = accumulator(matrix.dtype());
        let block = (self.numbers_at_once / columns).max(1);
        Ok(blocks(rows, block).map(move |rows| {
            let part = matrix.narrow(0, rows.start, rows.len())?;
            Ok((rows.start, part.to_dtype(acc)?))
        }))
    }
}

/// Rows of a block that begins at row `start`, zeros where they do not count, whatever they hold.
fn keep_rows(block: Tensor, counts: Option<&Tensor>, start: usize) -> Result<Tensor> {
    let Some(counts) = counts else {
        return Ok(block);
    };
    let counts = counts.narrow(0, start, block.dim(0)?)?.unsqueeze(1)?;
    counts
        .broadcast_as(block.shape())?
        .where_cond(&block, &block.zeros_like()?)
}
