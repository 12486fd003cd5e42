//! What the loss promises, on the CPU.

#[path = "../common/mod.rs"]
mod common;

mod autograd;
mod backward;
mod edges;
mod entropy;
mod errors;
mod filter;
mod golden;
mod golden_objectives;
mod golden_soft_targets;
mod grid;
mod hostile;
mod layer;
mod low_rank;
mod objectives;
mod ops;
mod paths;
mod policies;
mod preferences;
mod properties;
mod reference;
mod shards;
mod soft_targets;
mod soft_targets_edges;
mod soft_targets_errors;
mod vocab_parallel;
mod weights;
