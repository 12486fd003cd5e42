//! Decoders that train with this crate's loss, from and to Hugging Face checkpoints (feature `models`).
//!
//! [`Decoder`] is one trainable decoder for every [`Family`]: Llama, Mistral, Phi-3, Qwen 2 and 3,
//! Gemma 1 to 3, SmolLM 3, Granite 3. A [`Config`] read from `config.json` says how they differ. It is a [`CausalLm`]:
//! [`loss`](CausalLm::loss) never stores logits, [`generate`] shows what was learnt.
//!
//! For less memory: [`Lora`] trains adapters instead of weights,
//! [`set_gradient_checkpointing`](Decoder::set_gradient_checkpointing) computes activations again,
//! [`Accumulator`] adds up small batches. [`AdamW`] has f32 weights beside bf16 variables,
//! [`Decoder::frozen`] evaluates.
//!
//! # The models of candle-transformers
//!
//! They are written for inference: fused norms, softmax and rotary embeddings without a backward cut
//! the graph without an error, so none of them can be trained. For evaluation, the loss needs hidden
//! states and a head's weight:
//!
//! | models of candle-transformers 0.11 | |
//! |---|---|
//! | `qwen2`, `qwen3`, `qwen3_moe`, `smol::smollm3` | `Model::forward` returns the hidden states: wrap it in `WithHead` (feature `candle-transformers`). |
//! | `llama`, `mistral`, `phi3`, `gemma`, `gemma2`, `gemma3`, and most others | The only forward applies the head, which is private, and returns logits of the last position. [`Decoder`] loads their checkpoints. |
//!
//! `gemma`'s `forward_embeds_without_projection` stops before the last norm, which is private too.

mod adamw;
mod adapter;
mod adapter_files;
mod causal_lm;
mod checkpoint_files;
mod config;
mod continuation;
mod decoder;
mod entries;
mod gradients;
mod layers;
mod linear;
mod loader;
mod lora;
mod recompute;
mod rope;
mod staging;
mod stored;
pub(crate) mod update;
#[cfg(feature = "candle-transformers")]
mod with_head;

pub use adamw::{AdamW, Group};
pub use causal_lm::{generate, CausalLm, Continuation, Sampling};
pub use config::{Config, Family, LayerConfig};
pub use decoder::Decoder;
pub use gradients::{clip_gradients, clip_gradients_on_device, Accumulator};
pub use lora::Lora;
pub use rope::Rope;
#[cfg(feature = "candle-transformers")]
pub use with_head::WithHead;
