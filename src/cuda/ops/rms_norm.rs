//! `cuda/rms_norm.cu`.

use super::{addresses, aligned, kernel, operands, Operand};
use crate::cuda::launch::RMS_NORM;
use crate::cuda::params::rms_norm::RmsNormParams;
use crate::ops::rms_norm::Settings;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{Result, Tensor};

const ROW_THREADS: usize = 256;
const COLUMN_THREADS: usize = 128;
const SUM_COLUMNS: usize = 32;
/// Rows that one sum of the weight's gradient has at least, and sums there are at most.
const LEAST_CHUNK_ROWS: usize = 32;
const CHUNKS: usize = 256;

/// The norm of `x`, or of `x + residual` and that sum before it. All contiguous.
pub(crate) fn forward(
    x: Operand<'_>,
    residual: Option<Operand<'_>>,
    weight: Operand<'_>,
    settings: Settings,
) -> Result<(Option<CudaStorage>, CudaStorage)> {
    let (gpu, kind) = (x.gpu(), x.kind()?);
    let shape = x.layout.shape();
    let size = weight.layout.shape().elem_count();
    let rows = shape.elem_count() / size;
    let normed = gpu.unfinished(kind.dtype, shape, false)?;
    let sum = match residual {
        Some(_) => Some(gpu.unfinished(kind.dtype, shape, false)?),
        None => None,
    };
    // Without a residual, `x` stands in its place and is not read there.
    addresses(&gpu, [x, residual.unwrap_or(x), weight], |read| {
        let params = RmsNormParams {
            x: read[0],
            residual: if residual.is_some() { read[1] } else { 0 },
            weight: read[2],
            sum: sum.as_ref().map_or(0, |sum| sum.address),
            normed: normed.address,
            rows: rows as u64,
            size: size as u32,
            aligned: aligned(kind, &read, &[size]).into(),
            eps: settings.eps as f32,
            offset: settings.offset as f32,
            ..RmsNormParams::default()
        };
        let grid = (rows.div_ceil(ROW_THREADS / 32), 1);
        let name = kind.kernel("rms_norm_forward");
        gpu.launch(
            &kernel(RMS_NORM, name, grid, ROW_THREADS as u32, 0),
            &params,
        )
    })?;
    Ok((
        sum.map(|sum| sum.finish_storage(&gpu)),
        normed.finish_storage(&gpu),
    ))
}

/// The gradients of `x` and, where wanted, of the weight. All contiguous.
pub(crate) fn backward(
    [x, weight, upstream]: [&Tensor; 3],
    settings: Settings,
    weight_wanted: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    operands([x, weight, upstream], |all| {
        let (gpu, kind) = (all[0].gpu(), all[0].kind()?);
        let size = weight.elem_count();
        let rows = x.elem_count() / size;
        let chunk_rows = rows.div_ceil(CHUNKS).max(LEAST_CHUNK_ROWS);
        let chunks = rows.div_ceil(chunk_rows);
        let of_x = gpu.unfinished(kind.dtype, x.shape(), false)?;
        let inverse_rms = match weight_wanted {
            true => Some(gpu.array::<f32>(rows)?),
            false => None,
        };
        let of_weight = match weight_wanted {
            true => Some((
                gpu.array::<f32>(chunks * size)?,
                gpu.unfinished(kind.dtype, weight.shape(), false)?,
            )),
            false => None,
        };
        addresses(&gpu, all, |read| {
            let params = RmsNormParams {
                x: read[0],
                weight: read[1],
                upstream: read[2],
                x_grad: of_x.address,
                inverse_rms: inverse_rms.as_ref().map_or(0, |array| array.address),
                rows: rows as u64,
                size: size as u32,
                chunk_rows: chunk_rows as u32,
                chunks: chunks as u32,
                aligned: aligned(kind, &read, &[size]).into(),
                eps: settings.eps as f32,
                offset: settings.offset as f32,
                ..RmsNormParams::default()
            };
            let grid = (rows.div_ceil(ROW_THREADS / 32), 1);
            let name = kind.kernel("rms_norm_x_gradient");
            gpu.launch(
                &kernel(RMS_NORM, name, grid, ROW_THREADS as u32, 0),
                &params,
            )?;
            let Some((partials, of_weight)) = &of_weight else {
                return Ok(());
            };
            let params = RmsNormParams {
                partials: partials.address,
                weight_grad: of_weight.address,
                ..params
            };
            let grid = (size.div_ceil(COLUMN_THREADS), chunks);
            let name = kind.kernel("rms_norm_weight_partials");
            gpu.launch(
                &kernel(RMS_NORM, name, grid, COLUMN_THREADS as u32, 0),
                &params,
            )?;
            let grid = (size.div_ceil(SUM_COLUMNS), 1);
            let name = kind.kernel("rms_norm_weight_gradient");
            gpu.launch(&kernel(RMS_NORM, name, grid, 1024, 0), &params)
        })?;
        let of_weight = of_weight.map(|(_, of_weight)| of_weight.finish(&gpu));
        Ok((of_x.finish(&gpu), of_weight))
    })
}
