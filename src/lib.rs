//! Cut Cross-Entropy for [Candle](https://docs.rs/candle-core): the cross-entropy loss of a linear
//! classifier, and its gradients, without ever storing the `N x V` logits.
#![deny(missing_docs)]

mod backward;
#[cfg(feature = "cuda")]
mod cuda;
mod layer;
mod loss;
#[cfg(feature = "models")]
pub mod models;
mod native;
pub mod objectives;
mod op;
mod options;
mod problem;

pub use backward::backward;
pub use layer::LinearCrossEntropy;
pub use loss::{linear_cross_entropy, Output};
pub use options::{Filter, Implementation, Options, Preset, Reduction, Strategy};
