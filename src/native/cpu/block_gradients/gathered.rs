//! Rows that are multiplied together, wherever they lie.

use crate::native::cpu::element::Real;

/// Whether these rows are one run.
pub(super) fn contiguous(rows: &[usize]) -> bool {
    match rows {
        [] => true,
        [first, ..] => rows[rows.len() - 1] - first + 1 == rows.len(),
    }
}

/// The parts of a list of rows that are multiplied together: all of it where the rows lie together, else about equal
/// ones of at most `most` rows.
pub(super) fn parts(rows: &[usize], most: usize) -> std::slice::Chunks<'_, usize> {
    let count = if contiguous(rows) {
        1
    } else {
        rows.len().div_ceil(most)
    };
    rows.chunks(rows.len().div_ceil(count).max(1))
}

/// Some rows, ascending, of those that begin with `start` and are `width` wide: themselves where they lie together, else
/// copies.
pub(super) fn gather<'a, R: Real>(
    values: &'a [R],
    start: usize,
    width: usize,
    rows: &[usize],
    copies: &'a mut Vec<R>,
) -> &'a [R] {
    let at = |row: usize| (row - start) * width;
    if contiguous(rows) {
        return &values[at(rows[0])..][..rows.len() * width];
    }
    copies.clear();
    for row in rows {
        copies.extend_from_slice(&values[at(*row)..][..width]);
    }
    copies
}
