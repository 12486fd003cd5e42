//! Blocks of rows and classes in Candle tensor operations, for any device.
//!
//! Half-precision inputs are converted block by block, so every product is an f32 one. The gradients are exact
//! whatever the filter: to average a block instead, the host would have to wait for the device.

mod backward;
mod blocks;
mod forward;

pub(super) use forward::forward;
