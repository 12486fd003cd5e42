//! The implementation for tensors in main memory: matrix products of blocks of the logits on all
//! threads, everything between the products done while a block's tile is in a core's cache.
//!
//! Half-precision inputs are widened tile by tile, and every sum is an f32 one (f64 for f64 inputs).
//! Tiles are handed to the threads in any order, but every sum has one order: a run repeats bit by bit on
//! the same machine with as many threads, on which the sizes of the blocks depend.

mod average;
mod backward;
mod block_gradients;
mod element;
mod forward;
mod gradients;
mod inputs;
mod kept;
mod operands;
mod passes;
mod plan;
mod product;
mod recompute;
mod shards;
mod statistics;

pub(crate) use element::{Element, Real};
pub(super) use forward::forward;
