//! Matrix products of the slices of one task, on its thread.

use super::element::Real;

/// A row-major matrix within a slice, or its transpose.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, R> {
    values: &'a [R],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, R> Matrix<'a, R> {
    /// `rows` rows of `columns` values each, `stride` apart.
    pub fn new(values: &'a [R], rows: usize, columns: usize, stride: usize) -> Self {
        assert_fits(values.len(), rows, columns, stride);
        Self {
            values,
            rows,
            columns,
            row_stride: stride,
            column_stride: 1,
        }
    }

    pub fn t(self) -> Self {
        Self {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// `out = left right`, or `out += left right`, for a row-major `out` whose rows are `stride` apart.
pub(super) fn multiply<R: Real>(
    out: &mut [R],
    stride: usize,
    accumulate: bool,
    left: Matrix<'_, R>,
    right: Matrix<'_, R>,
) {
    assert_eq!(left.columns, right.rows);
    assert_fits(out.len(), left.rows, right.columns, stride);
    // SAFETY: every matrix lies within its slice (`assert_fits`), `out` is borrowed mutably and so
    // overlaps neither operand, and the strides are those of the slices.
    unsafe {
        gemm::gemm(
            left.rows,
            right.columns,
            left.columns,
            out.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            left.values.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.values.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            R::ONE,
            R::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        )
    }
}

fn assert_fits(len: usize, rows: usize, columns: usize, stride: usize) {
    assert!(columns <= stride && (rows == 0 || (rows - 1) * stride + columns <= len));
}
