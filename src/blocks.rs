//! Blocks of rows or classes.

use std::ops::Range;

pub(crate) fn blocks(len: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(block)
        .map(move |start| start..(start + block).min(len))
}
