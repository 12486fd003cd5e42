//! `cuda/smoothing.cu`: what label smoothing does with whole matrices. Matrices and vectors are contiguous, vectors and
//! results f32.

use super::launch::{Gpu, Kernel, SMOOTHING};
use super::operands::{kernels, Kind};
use super::params::smoothing::{DotsParams, OuterParams, SumPartialsParams, SumRowsParams};
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CudaStorage, DType, InplaceOp3, Layout, Result, Tensor};

const THREADS: usize = 256;
/// Blocks that have every so-many-th row.
const PARTS: usize = 256;

fn parts(rows: usize) -> usize {
    rows.min(PARTS)
}

/// `sum_i weights_i matrix_i`, of the rows that count (u8) if that is given.
pub(crate) fn weighted_sum(
    matrix: &Tensor,
    weights: &Tensor,
    counts: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let Some((gpu, kind)) = kernels(matrix)? else {
        return Ok(None);
    };
    let (rows, columns) = matrix.dims2()?;
    let parts = parts(rows);
    let counts = counts
        .map(|counts| counts.to_dtype(DType::U32))
        .transpose()?;
    let partials = gpu.buffer(parts * columns * 4)?;
    let launch = |matrix, weights, counts| {
        let params = SumRowsParams {
            matrix,
            weights,
            counts,
            partials: partials.address,
            rows: rows as i64,
            columns: columns as i64,
        };
        let grid = (columns.div_ceil(THREADS), parts);
        let name = kind.kernel("weighted_sum");
        gpu.launch(&Kernel::new(SMOOTHING, name, grid, THREADS as u32), &params)
    };
    gpu.read(matrix, |matrix| {
        gpu.read(weights, |weights| match &counts {
            None => launch(matrix, weights, 0),
            Some(counts) => gpu.read(counts, |counts| launch(matrix, weights, counts)),
        })
    })?;
    let sum = gpu.unfinished(DType::F32, columns, false)?;
    let params = SumPartialsParams {
        partials: partials.address,
        sum: sum.address,
        columns: columns as i64,
        parts: parts as u32,
    };
    let grid = (columns.div_ceil(THREADS), 1);
    let kernel = Kernel::new(SMOOTHING, "sum_partials", grid, THREADS as u32);
    gpu.launch(&kernel, &params)?;
    Ok(Some(sum.finish(&gpu)))
}

/// The products of the rows of a matrix with a vector.
pub(crate) fn dots(matrix: &Tensor, vector: &Tensor) -> Result<Option<Tensor>> {
    let Some((gpu, kind)) = kernels(matrix)? else {
        return Ok(None);
    };
    let (rows, columns) = matrix.dims2()?;
    let dots = gpu.unfinished(DType::F32, rows, false)?;
    gpu.read(matrix, |matrix| {
        gpu.read(vector, |vector| {
            let params = DotsParams {
                matrix,
                vector,
                dots: dots.address,
                rows: rows as i64,
                columns: columns as i64,
            };
            let grid = (rows.div_ceil(THREADS / 32), 1);
            let name = kind.kernel("dots");
            gpu.launch(&Kernel::new(SMOOTHING, name, grid, THREADS as u32), &params)
        })
    })?;
    Ok(Some(dots.finish(&gpu)))
}

/// Adds `left right^T` to a matrix in place, to the rows that count if that is given. Whether the kernels could.
pub(crate) fn add_outer(
    matrix: &Tensor,
    left: &Tensor,
    right: &Tensor,
    counts: Option<&Tensor>,
) -> Result<bool> {
    let Some((gpu, _)) = kernels(matrix)? else {
        return Ok(false);
    };
    let add = |counts| matrix.inplace_op3(left, right, &AddOuter { counts });
    match counts {
        None => add(0)?,
        Some(counts) => gpu.read(&counts.to_dtype(DType::U32)?, add)?,
    }
    Ok(true)
}

struct AddOuter {
    /// The address of the rows that count, or 0.
    counts: u64,
}

impl InplaceOp3 for AddOuter {
    fn name(&self) -> &'static str {
        "add-outer"
    }

    fn cpu_fwd(
        &self,
        _: &mut CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<()> {
        bail!("add-outer: on the CPU")
    }

    fn cuda_fwd(
        &self,
        matrix: &mut CudaStorage,
        layout: &Layout,
        left: &CudaStorage,
        left_layout: &Layout,
        right: &CudaStorage,
        right_layout: &Layout,
    ) -> Result<()> {
        let gpu = Gpu::new(matrix.device());
        let kind = Kind::of(matrix.dtype())?;
        let (rows, columns) = layout.shape().dims2()?;
        let (matrix, _written) = gpu.address_to_write(matrix, layout)?;
        let (left, _read) = gpu.address(left, left_layout)?;
        let (right, _read_too) = gpu.address(right, right_layout)?;
        let params = OuterParams {
            matrix,
            left,
            right,
            counts: self.counts,
            rows: rows as i64,
            columns: columns as i64,
        };
        let grid = (columns.div_ceil(THREADS), parts(rows));
        let name = kind.kernel("add_outer");
        gpu.launch(&Kernel::new(SMOOTHING, name, grid, THREADS as u32), &params)
    }
}
