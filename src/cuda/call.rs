//! What the kernels of one call have in common, and what a launch of its products reads and writes.

use super::launch::{Buffer, Gpu};
use super::operands::Operands;
use super::rows::Rows;

/// What every launch of a call needs.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub gpu: &'a Gpu,
    pub operands: Operands,
    pub rows: &'a Rows,
    pub statistics: &'a Statistics,
}

/// `lse = row_max + row_log_sum` of every row, in two parts so that large logits keep their digits; and the logit of
/// its target.
pub(super) struct Statistics {
    pub target_logit: Buffer,
    pub row_max: Buffer,
    pub row_log_sum: Buffer,
    /// Where entropy or the likeliest class is asked for.
    pub row_entropy: Option<Buffer>,
}

/// Upstream gradients, per row and on the results.
pub(super) struct Scales {
    pub p: Buffer,
    pub target: Buffer,
    /// Of the softmax times its logarithm, where the entropy is differentiated.
    pub log: Option<Buffer>,
    pub result: Buffer,
}

/// The buffers of a launch of the forward.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub first_row: usize,
    pub partials: u64,
    /// What entropy and the likeliest class need, 0 where neither is asked for.
    pub extra: u64,
    pub target_logit: u64,
    /// What the filter wants to know, 0 where nothing is filtered.
    pub statistics: u64,
}

/// What a range of classes of the backward reads and writes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Range {
    pub first_class: usize,
    /// Classes, a multiple of 256.
    pub classes: usize,
    /// From one row of `gradient` to the next.
    pub stride: usize,
    pub first_row: usize,
    pub rows: usize,
    pub gradient: u64,
    /// `(row tiles, class tiles)` of all rows; 0 where every tile is kept.
    pub keep: u64,
    /// Sums of the gradient of the embeddings, 0 where not wanted.
    pub sums: u64,
    /// Whether the sums hold something already.
    pub add_to_sums: bool,
    /// Whether there is room for what clusters have of outputs of dE that they share.
    pub shared: bool,
    /// 0 where not wanted.
    pub classifier_grad: u64,
    pub chunk: RowChunk,
    /// What tiles that are not kept leave in the gradient of the classifier.
    pub averages: AverageAddresses,
    /// What the gradient of the classifier gets in f32: `(vocab)` of a class 1 + its row of `target_rows`, or 0. 0 for
    /// none at all.
    pub slots: u64,
    pub target_rows: u64,
}

/// Which of the chunks of rows that add to dC and db one is, and what they leave between two of them: addresses, 0 of a chunk
/// that is the only one, as it is by default.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowChunk {
    pub first: bool,
    pub last: bool,
    /// `(strips, 2, vocab)`: the units of dC.
    pub exponents: u64,
    /// `(vocab, rank)` in f32: the gradient of an adapter, in the place of dC.
    pub adapter_sums: u64,
    /// `(vocab)` in f32: db.
    pub bias_sums: u64,
}

impl Default for RowChunk {
    fn default() -> Self {
        Self {
            first: true,
            last: true,
            exponents: 0,
            adapter_sums: 0,
            bias_sums: 0,
        }
    }
}

/// Where the kernels find what stands in the place of averaged tiles; 0 for what there is not.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AverageAddresses {
    pub shares: u64,
    pub mass_rows: u64,
    pub mass_sums: u64,
    pub list: u64,
    pub combined: u64,
    pub slots: u64,
    pub target_bias: u64,
    pub embeddings_entry: u64,
}
