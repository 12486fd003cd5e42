//! The models of candle-transformers that show their hidden states.

use super::causal_lm::CausalLm;
use candle_core::{Device, Result, Tensor};
use candle_transformers::models::smol::smollm3;
use candle_transformers::models::{qwen2, qwen3, qwen3_moe};

/// A model of candle-transformers whose forward returns hidden states, and its head's weight: a
/// [`CausalLm`] to evaluate (feature `candle-transformers`).
///
/// It cannot be trained: candle-transformers' norms, softmax and rotary embeddings have no backward,
/// so that a loss's gradient reaches the head's weight and nothing below.
///
/// | model | |
/// |---|---|
/// | `qwen2::Model`, `qwen3::Model`, `qwen3_moe::Model`, `smol::smollm3::Model` | can |
/// | `llama`, `mistral`, `phi3`, `gemma`, `gemma2`, `gemma3` | cannot: head and last norm are private, and a forward returns logits of the last position |
#[derive(Debug, Clone)]
pub struct WithHead<M> {
    model: M,
    head: Tensor,
}

impl<M> WithHead<M> {
    /// A model that has not run yet, so that its cache of keys and values is empty, and the weight
    /// `(V, D)` of its head: the checkpoint's `lm_head.weight`, or `model.embed_tokens.weight` where
    /// the config ties them.
    pub fn new(model: M, head: Tensor) -> Self {
        Self { model, head }
    }
}

/// Each forward runs on a copy, whose cache starts empty; the weights are shared.
macro_rules! causal_lm {
    ($($model:ty: $($argument:expr),*;)*) => {$(
        impl CausalLm for WithHead<$model> {
            fn hidden_states(&self, ids: &Tensor) -> Result<Tensor> {
                self.model.clone().forward(ids, $($argument),*)
            }

            fn head_weight(&self) -> Result<Tensor> {
                Ok(self.head.clone())
            }

            fn device(&self) -> &Device {
                self.head.device()
            }
        }
    )*};
}

causal_lm! {
    qwen2::Model: 0, None;
    qwen3::Model: 0;
    qwen3_moe::Model: 0;
    smollm3::Model: 0;
}
