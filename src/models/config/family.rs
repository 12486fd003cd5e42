//! The families and what each of them means by an entry that is not there.

use crate::models::entries::invalid;
use candle_core::{Error, Result};
use std::str::FromStr;

/// The families of decoders, known by the `model_type` of their `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// `llama`: Llama 1 to 3.
    Llama,
    /// `mistral`: Llama with a sliding window.
    Mistral,
    /// `phi3`: Phi-3 and Phi-4, whose projections are stored fused.
    Phi3,
    /// `qwen2`: Qwen 1.5 to 2.5, with biases on queries, keys and values.
    Qwen2,
    /// `qwen3`: Qwen 3 (dense), with normalised queries and keys.
    Qwen3,
    /// `gemma`: Gemma 1.
    Gemma,
    /// `gemma2`: Gemma 2, with soft caps, alternating windows, and norms on both sides.
    Gemma2,
    /// `gemma3_text`: the text model of Gemma 3, with a rotary embedding for local layers and one for
    /// global ones. Of a `gemma3` checkpoint, which sees images too, it is the `text_config`.
    Gemma3,
    /// `smollm3`: SmolLM 3, a Llama of which every fourth layer turns nothing.
    SmolLm3,
    /// `granite`: Granite 3 (dense), a Llama with scales.
    Granite,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 10] = [
        Family::Llama,
        Family::Mistral,
        Family::Phi3,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma,
        Family::Gemma2,
        Family::Gemma3,
        Family::SmolLm3,
        Family::Granite,
    ];

    /// The `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Phi3 => "phi3",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gemma => "gemma",
            Family::Gemma2 => "gemma2",
            Family::Gemma3 => "gemma3_text",
            Family::SmolLm3 => "smollm3",
            Family::Granite => "granite",
        }
    }

    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Family::Gemma | Family::Gemma2 | Family::Gemma3)
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.model_type())
    }
}

impl FromStr for Family {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match Family::ALL.into_iter().find(|f| f.model_type() == name) {
            Some(family) => Ok(family),
            None => invalid(format!(
                "unsupported model_type {name:?}, expected one of {}, or gemma3 with a text_config",
                Family::ALL.map(Family::model_type).join(", ")
            )),
        }
    }
}

/// What an entry of `config.json` means where it is absent.
///
/// Source: the configuration classes of Hugging Face transformers 5.
pub(super) struct Defaults {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// `None`: as many as query heads.
    pub num_key_value_heads: Option<usize>,
    /// `None`: the hidden size divided by the query heads.
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub sliding_window: Option<usize>,
    pub rope_theta: f64,
    pub tie_word_embeddings: bool,
    pub eos_token_id: Option<u32>,
}

impl Family {
    pub(super) fn defaults(self) -> Defaults {
        let llama = Defaults {
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            sliding_window: None,
            rope_theta: 1e4,
            tie_word_embeddings: false,
            eos_token_id: Some(2),
        };
        let qwen = Defaults {
            vocab_size: 151_936,
            intermediate_size: 22_016,
            num_key_value_heads: Some(32),
            max_position_embeddings: 32_768,
            sliding_window: Some(4096),
            eos_token_id: None,
            ..llama
        };
        let gemma2 = Defaults {
            vocab_size: 256_000,
            hidden_size: 2304,
            intermediate_size: 9216,
            num_hidden_layers: 26,
            num_attention_heads: 8,
            num_key_value_heads: Some(4),
            head_dim: Some(256),
            max_position_embeddings: 8192,
            sliding_window: Some(4096),
            tie_word_embeddings: true,
            eos_token_id: Some(1),
            ..llama
        };
        match self {
            Family::Llama => llama,
            Family::Mistral => Defaults {
                intermediate_size: 14_336,
                num_key_value_heads: Some(8),
                max_position_embeddings: 131_072,
                sliding_window: Some(4096),
                ..llama
            },
            Family::Phi3 => Defaults {
                vocab_size: 32_064,
                hidden_size: 3072,
                intermediate_size: 8192,
                max_position_embeddings: 4096,
                rms_norm_eps: 1e-5,
                eos_token_id: Some(32_000),
                ..llama
            },
            Family::Qwen2 => qwen,
            Family::Qwen3 => Defaults {
                head_dim: Some(128),
                ..qwen
            },
            Family::Gemma => Defaults {
                hidden_size: 3072,
                intermediate_size: 24_576,
                num_hidden_layers: 28,
                num_attention_heads: 16,
                num_key_value_heads: Some(16),
                sliding_window: None,
                ..gemma2
            },
            Family::Gemma2 => gemma2,
            Family::Gemma3 => Defaults {
                vocab_size: 262_208,
                max_position_embeddings: 131_072,
                rope_theta: 1e6,
                ..gemma2
            },
            Family::SmolLm3 => Defaults {
                vocab_size: 128_256,
                hidden_size: 2048,
                num_hidden_layers: 36,
                num_attention_heads: 16,
                num_key_value_heads: Some(4),
                max_position_embeddings: 32_768,
                rope_theta: 2e6,
                tie_word_embeddings: true,
                eos_token_id: Some(128_001),
                ..llama
            },
            Family::Granite => llama,
        }
    }
}
