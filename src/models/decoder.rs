//! The decoder: embedding, layers, norm, head.

use super::adapter::Adapter;
use super::config::{Config, LayerConfig};
use super::layers::{Layer, Norm, Past, Positions, Shared};
use super::loader::{Loaded, Loader};
use super::recompute::{checkpoint, Recompute};
use crate::ops::embedding;
use candle_core::{bail, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A causal decoder of any [`Family`](super::Family), every operation of which has a backward.
///
/// Its tensors have the names of the Hugging Face checkpoint (`model.embed_tokens.weight`,
/// `model.layers.0.self_attn.q_proj.weight`, ..). [`Decoder::load`] makes variables of a checkpoint's,
/// [`Decoder::new`] takes those of any `VarBuilder`.
///
/// Neither the scores of attention nor the head's logits are ever stored: memory grows with the tokens.
/// There is no dropout but that of adapters. All sequences of a batch have one length: pad them on the right and ignore
/// the labels of the padding, which nothing before it sees; or lay them end to end
/// ([`Decoder::packed_hidden_states`]).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder};
/// use candle_cut_cross_entropy::{backward, Options};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let config = Config::from_json(
///     r#"{
///         "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
///         "num_hidden_layers": 2, "num_attention_heads": 4
///     }"#,
/// )?;
/// let vars = VarMap::new(); // new weights
/// let decoder = Decoder::new(config, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let ids = Tensor::new(&[[1u32, 5, 7, 9]], &Device::Cpu)?;
/// let loss = decoder.loss(&ids, &ids, &Options::default())?.loss;
/// let gradients = backward(&loss)?;
/// assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_some()));
/// # Ok(())
/// # }
/// ```
///
/// Source: the modelling files of Hugging Face transformers, whose logits, losses and gradients it
/// reproduces.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Norm,
    pub(super) head: Tensor,
    pub(super) head_adapter: Option<Adapter>,
    loaded: Loaded,
    gradient_checkpointing: bool,
    dropout_seed: Option<u64>,
    name_or_path: Option<String>,
    pub(super) device: Device,
}

impl Decoder {
    /// Loads, or creates, the weights, in the dtype and on the device of the `VarBuilder`. New ones
    /// are small random numbers (`initializer_range`), biases 0, and norms that change nothing.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape: it is named.
    pub fn new(config: Config, vb: VarBuilder) -> Result<Self> {
        Self::build(Loader::new(vb, &config, &|_, _, _| Ok(None)), config)
    }

    pub(super) fn build(loader: Loader, config: Config) -> Result<Self> {
        let device = loader.device().clone();
        let shape = (config.vocab_size, config.hidden_size);
        let model = loader.pp("model");
        let embedding = model.pp("embed_tokens").matrix(shape, "weight")?;
        let layers = (0..config.layers.len())
            .map(|i| Layer::new(&config, model.pp("layers").pp(i)))
            .collect::<Result<_>>()?;
        let norm = Norm::new(config.hidden_size, &config, model.pp("norm"))?;
        let of_head = loader.pp("lm_head");
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => of_head.matrix(shape, "weight")?,
        };
        let head_adapter = of_head.adapter(config.hidden_size, config.vocab_size)?;
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            head,
            head_adapter,
            loaded: loader.loaded(),
            gradient_checkpointing: false,
            dropout_seed: None,
            name_or_path: None,
            device,
        })
    }

    /// Whether the layers keep nothing for the backward but their inputs, and compute the rest again: about a quarter
    /// more time for activations of one layer instead of all. Off at first. The gradients are the same; a layer's
    /// weights must be variables or untracked.
    pub fn set_gradient_checkpointing(&mut self, on: bool) {
        self.gradient_checkpointing = on;
    }

    /// Whether the layers compute again what the backward needs.
    pub fn gradient_checkpointing(&self) -> bool {
        self.gradient_checkpointing
    }

    /// Turns the dropout of adapters on, for forwards that train: which numbers are dropped follows from the seed, so give
    /// each batch another, before [`head`](super::CausalLm::head) is called for it. `None`, as at first, turns it off. A
    /// [`Decoder::frozen`] decoder has it off.
    pub fn set_dropout_seed(&mut self, seed: Option<u64>) {
        self.dropout_seed = seed;
    }

    pub(super) fn dropout_seed(&self) -> Option<u64> {
        self.dropout_seed
    }

    /// Where the weights are from, which saved adapters name as their base: the folder that
    /// [`Decoder::load`] was given, or what [`Decoder::set_name_or_path`] has said.
    pub fn name_or_path(&self) -> Option<&str> {
        self.name_or_path.as_deref()
    }

    /// Says where the weights are from: a folder, or a name on the Hugging Face hub.
    pub fn set_name_or_path(&mut self, name_or_path: Option<&str>) {
        self.name_or_path = name_or_path.map(str::to_owned);
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weights by their names in the checkpoint. A tied head is not among them.
    /// Adapters are not in them.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.loaded.tensors
    }

    /// By the names of their modules.
    pub(super) fn adapters(&self) -> &BTreeMap<String, Adapter> {
        &self.loaded.adapters
    }

    /// The head's weight without its adapter.
    pub(super) fn base_head(&self) -> &Tensor {
        &self.head
    }

    /// What of a layer is trained.
    fn variables(&self, layer: usize) -> Vec<Tensor> {
        let prefix = format!("model.layers.{layer}.");
        let weights = self.loaded.tensors.iter();
        let weights = weights.map(|(name, weight)| (name, vec![weight]));
        let adapters = self.loaded.adapters.iter();
        let adapters = adapters.map(|(name, adapter)| (name, adapter.tensors().to_vec()));
        weights
            .chain(adapters)
            .filter(|(name, _)| name.starts_with(&prefix))
            .flat_map(|(_, tensors)| tensors)
            .filter(|tensor| tensor.track_op())
            .cloned()
            .collect()
    }

    /// The dtype of the weights.
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// The tokens in u32, on the device. Candle takes the largest number of a dtype for no row at all,
    /// and a GPU does not tell of one outside.
    pub(super) fn checked(&self, ids: &Tensor) -> Result<Tensor> {
        if !ids.dtype().is_int() {
            bail!("ids must be integers, got {:?}", ids.dtype())
        }
        let tokens = ids.to_device(&Device::Cpu)?.to_dtype(DType::I64)?;
        let tokens: Vec<i64> = tokens.flatten_all()?.to_vec1()?;
        let vocab_size = self.config.vocab_size;
        let inside = |&token: &i64| match u32::try_from(token) {
            Ok(id) if (id as usize) < vocab_size => Ok(id),
            _ => bail!("token {token} is outside the vocabulary of {vocab_size}"),
        };
        let tokens = tokens.iter().map(inside).collect::<Result<Vec<u32>>>()?;
        Tensor::new(tokens, &self.device)
    }

    /// The states that the head reads, `(tokens, D)`, of sequences that lie end to end in `ids`, `(tokens)`: the first
    /// has `lengths[0]` tokens, and so on. Each sees itself alone, and its positions begin at 0, as in a batch, but
    /// without padding. For a loss, the label of each first token must be one that is ignored: the token before it is
    /// another sequence's.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder};
    /// # use candle_cut_cross_entropy::Options;
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # fn main() -> candle_core::Result<()> {
    /// # let config = Config::from_json(
    /// #     r#"{
    /// #         "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
    /// #         "num_hidden_layers": 2, "num_attention_heads": 4
    /// #     }"#,
    /// # )?;
    /// # let weights = VarMap::new();
    /// # let decoder = Decoder::new(config, VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu))?;
    /// let ids = Tensor::new(&[1u32, 5, 7, 9, 8], &Device::Cpu)?; // 1 5 7 and 9 8
    /// let labels = Tensor::new(&[-100i64, 5, 7, -100, 8], &Device::Cpu)?;
    /// let hidden = decoder.packed_hidden_states(&ids, &[3, 2])?;
    /// let loss = decoder.head(&Options::default())?.forward(&hidden, &labels)?.loss;
    /// # let _ = loss;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Lengths that are 0 or do not add up to the tokens, and those of
    /// [`CausalLm::hidden_states`](super::CausalLm::hidden_states).
    pub fn packed_hidden_states(&self, ids: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let tokens = ids.dims1()?;
        if tokens == 0 || lengths.contains(&0) || lengths.iter().sum::<usize>() != tokens {
            bail!("sequences of lengths {lengths:?} in {tokens} tokens: each must have some, and all together as many")
        }
        let parts: Vec<_> = lengths.iter().map(|&length| (1, length)).collect();
        self.states(&self.checked(ids)?, &parts, None)
    }

    /// The states of rows of tokens, which are sequences of these `(batch, time)`, one part after the other. With a past
    /// they are one part, what comes after it; then it has them too.
    pub(super) fn states(
        &self,
        ids: &Tensor,
        parts: &[(usize, usize)],
        mut past: Option<&mut Remembered>,
    ) -> Result<Tensor> {
        let start = past.as_ref().map_or(0, |past| past.time);
        let rows = embedding(&self.embedding, ids)?;
        let mut x = match self.config.embedding_scale {
            Some(scale) => (rows * scale)?,
            None => rows,
        };
        let mut kinds: Vec<(LayerConfig, Arc<Shared>)> = Vec::new();
        for (i, (layer, kind)) in self.layers.iter().zip(&self.config.layers).enumerate() {
            let known = kinds.iter().find(|(other, _)| other == kind);
            let shared = match known {
                Some((_, shared)) => shared.clone(),
                None => {
                    let shared = Arc::new(self.shared(kind, parts, start)?);
                    kinds.push((*kind, shared.clone()));
                    shared
                }
            };
            x = match (&mut past, self.gradient_checkpointing) {
                (Some(past), _) => layer.forward(&x, &shared, Some(&mut past.layers[i]))?,
                (None, false) => layer.forward(&x, &shared, None)?,
                (None, true) => {
                    let layer = PlacedLayer {
                        layer: layer.clone(),
                        shared,
                    };
                    checkpoint(layer, &x, self.variables(i))?
                }
            };
        }
        if let Some(past) = past {
            past.time += parts.iter().map(|(_, time)| time).sum::<usize>();
        }
        let states = self.norm.forward(&x)?;
        match self.config.logit_scale {
            Some(scale) => states * scale,
            None => Ok(states),
        }
    }

    /// What the layers of one kind share in a forward of sequences that begin at position `start`.
    fn shared(&self, kind: &LayerConfig, parts: &[(usize, usize)], start: usize) -> Result<Shared> {
        let mut all: Vec<Arc<Positions>> = Vec::with_capacity(parts.len());
        for &(batch, time) in parts {
            let same = |other: &&Arc<Positions>| (other.batch, other.time) == (batch, time);
            let positions = match all.iter().find(same) {
                Some(positions) => positions.clone(),
                None => Arc::new(Positions {
                    batch,
                    time,
                    angles: match kind.rope {
                        Some(rope) => {
                            let rope = &self.config.ropes[rope];
                            let angles = rope.angles(start + time, self.dtype(), &self.device)?;
                            Some(if start > 0 {
                                angles.from(start)?
                            } else {
                                angles
                            })
                        }
                        None => None,
                    },
                    window: kind.window,
                }),
            };
            all.push(positions);
        }
        Ok(Shared {
            parts: all,
            dropout_seed: self.dropout_seed,
        })
    }
}

/// Keys and values of the tokens so far.
#[derive(Default)]
pub(super) struct Remembered {
    pub time: usize,
    pub layers: Vec<Past>,
}

/// A layer and what it shares with others.
struct PlacedLayer {
    layer: Layer,
    shared: Arc<Shared>,
}

impl Recompute for PlacedLayer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.layer.forward(x, &self.shared, None)
    }
}
