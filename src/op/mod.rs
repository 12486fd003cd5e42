//! The loss as one operation of Candle: what its implementations have in common, which of them runs, and its node in
//! the graph.

mod arguments;
pub(crate) mod contract;
mod dispatch;
pub(crate) mod forward;
pub(crate) mod graph;
pub(crate) mod packed;
mod passes;
mod smoothing;
