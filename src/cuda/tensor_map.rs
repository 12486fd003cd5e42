//! How the copy engine is told of a matrix.

use candle_core::{bail, DType, Result};
use cudarc::driver::sys::{
    cuTensorMapEncodeTiled, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill,
    CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use cudarc::driver::DeviceRepr;
use std::mem::MaybeUninit;

/// Where the copy engine finds a row-major matrix of half-precision numbers, or the heads of a tensor, and what boxes it
/// copies: 64 columns wide, zeros outside, swizzled by 128 bytes.
#[repr(transparent)]
#[derive(Debug)]
pub(super) struct TensorMap(CUtensorMap);

// SAFETY: the driver's own 128 opaque bytes, passed by value.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// A matrix `(rows, columns)` at this address, its rows `stride` numbers apart, in boxes `box_rows` high.
    ///
    /// # Errors
    /// What the driver objects to: an address or a stride that is not a multiple of 16 bytes, most likely.
    pub fn new(
        address: u64,
        dtype: DType,
        (rows, columns): (usize, usize),
        stride: usize,
        box_rows: usize,
    ) -> Result<Self> {
        Self::encode(
            address,
            dtype,
            &[columns as u64, rows as u64],
            &[stride as u64],
            &[64, box_rows as u32],
        )
    }

    /// The heads of a tensor `(batch, time, heads, head_dim)`, `strides` numbers apart but for the last dimension, in boxes
    /// of 64 positions of a head.
    ///
    /// # Errors
    /// As [`TensorMap::new`].
    #[cfg(feature = "models")]
    pub fn of_heads(
        address: u64,
        dtype: DType,
        [batch, time, heads, head_dim]: [u32; 4],
        [of_batch, of_time, of_heads]: [i64; 3],
    ) -> Result<Self> {
        Self::encode(
            address,
            dtype,
            &[head_dim, time, heads, batch].map(u64::from),
            &[of_time, of_heads, of_batch].map(|stride| stride as u64),
            &[64, 64, 1, 1],
        )
    }

    /// All dimensions from the last, which is contiguous, to the first; strides in numbers.
    fn encode(
        address: u64,
        dtype: DType,
        dims: &[u64],
        strides: &[u64],
        boxes: &[u32],
    ) -> Result<Self> {
        let number = match dtype {
            DType::BF16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            dtype => bail!("no tensor maps for {dtype:?}"),
        };
        let mut map = MaybeUninit::<CUtensorMap>::uninit();
        let bytes: Vec<u64> = strides.iter().map(|stride| stride * 2).collect();
        let steps = [1u32; 5];
        // SAFETY: every pointer is to at least as many numbers as the rank asks for, and outlives the call.
        let result = unsafe {
            cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                number,
                dims.len() as u32,
                address as *mut std::ffi::c_void,
                dims.as_ptr(),
                bytes.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        if let Err(error) = result.result() {
            bail!(
                "cannot map {dtype:?} numbers {dims:?} at {address:#x}, {strides:?} apart: {error}"
            )
        }
        // SAFETY: the driver has filled it.
        Ok(Self(unsafe { map.assume_init() }))
    }
}
