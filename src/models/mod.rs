//! Decoders that train with this crate's loss, from and to Hugging Face checkpoints (feature `models`).
//!
//! [`Decoder`] is one trainable decoder for every [`Family`]: Llama, Mistral, Phi-3, Qwen 2 and 3,
//! Gemma 1 to 3. A [`Config`] read from `config.json` says how they differ. It is a [`CausalLm`]:
//! [`loss`](CausalLm::loss) never stores logits, [`generate`] shows what was learnt.

mod causal_lm;
mod checkpoint;
mod config;
mod decoder;
mod gradients;
mod layers;
mod rope;

pub use causal_lm::{generate, CausalLm, Sampling};
pub use config::{Config, Family, LayerConfig};
pub use decoder::Decoder;
pub use gradients::{clip_gradients, Accumulator};
pub use rope::Rope;
