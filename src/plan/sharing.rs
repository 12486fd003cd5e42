//! Outputs of dE that clusters share, on compute capability 9.0.

use super::forward::EVALUATION_BYTES;
use super::hopper::rows_as_dealt;
use super::{Sizes, TILE};

/// Bytes of a block's part of an output of dE that clusters share, as `products_sm90a.cuh` asserts.
pub(crate) const PART_BYTES: usize = 128 * 192 * 4;
/// Tiles that an output must be summed over to be worth sharing.
const LEAST_SHARED: usize = 64;

/// Whether the outputs of dE that do not fill a round are shared out among all clusters, where all tiles are kept: where
/// dealt out whole they would leave a tenth of the clusters idle. Clusters that share one are at different classes at a time,
/// so that each reads its part of the classifier for itself. What they share takes the room of the logits, which have been
/// computed by then: in it there are fewer clusters than the kernels' lists (`PARTS_MAX`) hold.
pub(crate) fn shares_outputs(sizes: Sizes, rows: usize, classes: usize) -> bool {
    let rows = rows.next_multiple_of(TILE);
    let idle = rows_as_dealt(sizes, rows) > 1.1 * rows as f64;
    let room = sizes.clusters() * 2 * PART_BYTES <= EVALUATION_BYTES;
    idle && room && classes / TILE >= LEAST_SHARED
}
