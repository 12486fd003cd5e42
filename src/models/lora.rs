//! Low-rank adapters (LoRA): small trainable matrices beside frozen weights.

use super::adapter::{last_name, saved_name, Adapter, Adapters, HEAD};
use super::causal_lm::CausalLm;
use super::config::Config;
use super::decoder::Decoder;
use super::loader::Loader;
use candle_core::{bail, Result, Tensor};
use candle_nn::{Init, VarBuilder, VarMap};
use std::collections::HashMap;

/// The module names of every projection of any family.
const PROJECTIONS: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
];

/// Which matrices of a decoder get a low-rank adapter: instead of `W` `(out, in)`, which is frozen,
///
/// ```text
/// W + (alpha / rank) B A,   A (rank, in), B (out, rank)
/// ```
///
/// with only `A` and `B` trained. `B` begins as 0, so that a new adapter changes nothing.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_cut_cross_entropy::models::{CausalLm, Config, Decoder, Lora};
/// # use candle_cut_cross_entropy::{backward, Options};
/// # use candle_nn::{VarBuilder, VarMap};
/// # fn main() -> candle_core::Result<()> {
/// # let config = Config::from_json(
/// #     r#"{
/// #         "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
/// #         "num_hidden_layers": 2, "num_attention_heads": 4
/// #     }"#,
/// # )?;
/// # let weights = VarMap::new();
/// # let base = Decoder::new(config, VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu))?;
/// let vars = VarMap::new(); // the adapters, to hand to an optimizer
/// let decoder = base.with_lora(&Lora { rank: 4, ..Lora::default() }, &vars)?;
/// # let ids = Tensor::new(&[[1u32, 5, 7, 9]], &Device::Cpu)?;
/// let gradients = backward(&decoder.loss(&ids, &ids, &Options::default())?.loss)?;
/// assert_eq!(vars.all_vars().len(), 2 * 7 * 2); // layers, projections, A and B
/// assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_some()));
/// # Ok(())
/// # }
/// ```
///
/// Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*,
/// [arXiv 2106.09685](https://arxiv.org/abs/2106.09685); names as in Hugging Face peft.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// Rows of `A`; at least 1.
    pub rank: usize,
    /// The product `B A` is scaled by `alpha / rank`.
    pub alpha: f64,
    /// The share of the numbers of `x` that are 0 in `B A x` while [`Decoder::set_dropout_seed`] asks for it; the others
    /// are divided by `1 - dropout`. At least 0 and less than 1.
    pub dropout: f64,
    /// The last names of the modules with an adapter, such as `q_proj`. `lm_head` is the head, of which the loss takes the
    /// two matrices as they are ([`Options::adapter`](crate::Options::adapter)); of a tied matrix its adapter changes the
    /// head only.
    pub targets: Vec<String>,
}

impl Default for Lora {
    /// Rank 8, alpha 16, no dropout, every projection of attention and MLP, not the head.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.,
            dropout: 0.,
            targets: PROJECTIONS.map(str::to_owned).to_vec(),
        }
    }
}

impl Lora {
    /// With an adapter of the head as well.
    pub fn with_head(mut self) -> Self {
        self.targets.push(HEAD.to_owned());
        self
    }

    /// The adapter of a module, if it is to have one.
    fn adapter(
        &self,
        vb: &VarBuilder,
        module: &str,
        inputs: usize,
        outputs: usize,
    ) -> Result<Option<Adapter>> {
        let &Self { rank, alpha, .. } = self;
        if !self
            .targets
            .iter()
            .any(|target| target == last_name(module))
        {
            return Ok(None);
        }
        let vb = vb.pp(saved_name(module));
        let bound = 1. / (inputs as f64).sqrt();
        let init = Init::Uniform {
            lo: -bound,
            up: bound,
        };
        Ok(Some(Adapter {
            a: vb.get_with_hints((rank, inputs), "lora_A.weight", init)?,
            b: vb.get_with_hints((outputs, rank), "lora_B.weight", Init::Const(0.))?,
            scale: alpha / rank as f64,
            dropout: self.dropout,
            number: 0,
        }))
    }
}

impl Decoder {
    /// This decoder with its weights frozen and adapters beside some of them, which are put into `vars`
    /// under peft's names (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, ..). What
    /// [`Decoder::save_adapters`] or peft saved is taken up by [`Decoder::load_adapters`].
    ///
    /// The weights are shared, not copied. [`Decoder::save`] saves them with the adapters merged.
    ///
    /// # Errors
    /// A rank of 0; an alpha that is not finite; a dropout that is no share; a target that no module has; a decoder that has
    /// adapters already.
    pub fn with_lora(&self, lora: &Lora, vars: &VarMap) -> Result<Self> {
        if lora.rank == 0 {
            bail!("the rank of an adapter must be at least 1")
        }
        if !lora.alpha.is_finite() {
            bail!("the alpha of an adapter must be finite, got {}", lora.alpha)
        }
        if !(0. ..1.).contains(&lora.dropout) {
            bail!(
                "the dropout of an adapter must be at least 0 and less than 1, got {}",
                lora.dropout
            )
        }
        if !self.adapters().is_empty() {
            bail!("the decoder has adapters already: save or merge it first")
        }
        let vb = VarBuilder::from_varmap(vars, self.dtype(), self.device());
        let decoder = self.rebuilt(
            self.config().clone(),
            self.detached(),
            &|module, inputs, outputs| lora.adapter(&vb, module, inputs, outputs),
        )?;
        // The default names the projections of every family.
        let unknown = |target: &&String| {
            let mut modules = decoder.adapters().keys();
            !PROJECTIONS.contains(&target.as_str()) && !modules.any(|m| last_name(m) == *target)
        };
        if let Some(target) = lora.targets.iter().find(unknown) {
            bail!("no module of the model is named {target:?}, which is to have an adapter")
        }
        if decoder.adapters().is_empty() {
            bail!("no module of the model is to have an adapter")
        }
        Ok(decoder)
    }

    /// The same weights and adapters, in the same memory, outside the graph: to evaluate with, as nothing
    /// is kept for a backward. A step of an optimizer changes them here too.
    ///
    /// # Errors
    /// None that making this decoder did not meet.
    pub fn frozen(&self) -> Result<Self> {
        self.rebuilt(self.config().clone(), self.detached(), &|module, _, _| {
            Ok(self.adapters().get(module).map(Adapter::detached))
        })
    }

    /// The decoder with its adapters in the weights, a full copy of those that change. An adapter of a
    /// tied head unties it.
    ///
    /// # Errors
    /// Memory that runs out.
    pub fn merged(&self) -> Result<Self> {
        let mut config = self.config().clone();
        let mut tensors = self.detached();
        for (module, adapter) in self.adapters() {
            let weight = match (module.as_str(), config.tie_word_embeddings) {
                (HEAD, true) => self.base_head(),
                _ => &self.tensors()[&format!("{module}.weight")],
            };
            let merged = adapter.merged(weight)?.detach();
            tensors.insert(format!("{module}.weight"), merged);
            if module == HEAD {
                config = config.untied()?;
            }
        }
        self.rebuilt(config, tensors, &|_, _, _| Ok(None))
    }

    pub(super) fn detached(&self) -> HashMap<String, Tensor> {
        let tensors = self.tensors().iter();
        tensors
            .map(|(name, tensor)| (name.clone(), tensor.detach()))
            .collect()
    }

    /// Another decoder of these tensors.
    pub(super) fn rebuilt(
        &self,
        config: Config,
        tensors: HashMap<String, Tensor>,
        adapters: &Adapters,
    ) -> Result<Self> {
        let vb = VarBuilder::from_tensors(tensors, self.dtype(), self.device());
        let mut decoder = Self::build(Loader::new(vb, &config, adapters), config)?;
        decoder.set_gradient_checkpointing(self.gradient_checkpointing());
        decoder.set_name_or_path(self.name_or_path());
        Ok(decoder)
    }
}
