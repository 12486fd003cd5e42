//! A decoder to evaluate with.

use candle_core::Result;
use candle_cut_cross_entropy::models::{CausalLm, Decoder};
use candle_nn::VarBuilder;

/// The same weights, in the same memory, outside the graph: nothing is kept for a backward, and a step
/// of an optimizer changes them here too.
pub fn frozen(decoder: &Decoder) -> Result<Decoder> {
    let tensors = decoder
        .tensors()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.detach()))
        .collect();
    let device = decoder.head_weight().device();
    let vb = VarBuilder::from_tensors(tensors, decoder.dtype(), device);
    Decoder::new(decoder.config().clone(), vb)
}
