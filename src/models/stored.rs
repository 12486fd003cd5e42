//! The tensors of a checkpoint, under whichever of the usual names they are stored.

use super::config::{Config, CONFIG};
use super::decoder::Decoder;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{bail, Device, Result, Tensor};
use std::collections::BTreeMap;

const EMBEDDING: &str = "embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// What the names begin with: in a model with a head, in gemma3 as published, in gemma3 as transformers
/// 5 saves it, and in a model without a head.
const PREFIXES: [&str; 4] = [
    "model.",
    "language_model.model.",
    "model.language_model.",
    "",
];

/// A checkpoint's tensors, by the names that [`Decoder`] asks for.
pub(super) struct Stored {
    tensors: MmapedSafetensors,
    /// The name in the files of each.
    names: BTreeMap<String, String>,
}

impl Stored {
    pub fn new(tensors: MmapedSafetensors) -> Self {
        let mut names = BTreeMap::new();
        for (name, _) in tensors.tensors() {
            names.insert(name.clone(), name);
        }
        let has = |prefix: &&str| names.contains_key(&format!("{prefix}{EMBEDDING}"));
        let prefix = PREFIXES.into_iter().find(has).unwrap_or("model.");
        let of_text = prefix.contains("language_model");
        let names = names
            .into_values()
            .filter(|name| {
                let of_images = ["vision_tower.", "multi_modal_projector."]
                    .iter()
                    .any(|part| {
                        name.strip_prefix("model.")
                            .unwrap_or(name)
                            .starts_with(part)
                    });
                // Older versions of transformers saved what follows from the config.
                let follows = name.ends_with("rotary_emb.inv_freq");
                !(follows || (of_text && of_images))
            })
            .map(|name| {
                let is_head = name.strip_prefix("language_model.").unwrap_or(&name) == HEAD;
                let asked = match name.strip_prefix(prefix) {
                    _ if is_head => HEAD.to_owned(),
                    Some(rest) => format!("model.{rest}"),
                    None => name.clone(),
                };
                (asked, name)
            })
            .collect();
        Self { tensors, names }
    }

    pub fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub fn load(&self, name: &str, device: &Device) -> Result<Option<Tensor>> {
        let stored = self.names.get(name);
        stored
            .map(|stored| self.tensors.load(stored, device))
            .transpose()
    }

    /// A head that is tied may be stored, if it is the embedding.
    pub fn check_head(&self, config: &Config) -> Result<()> {
        let embedding = self.names.get(&format!("model.{EMBEDDING}"));
        let (Some(head), Some(embedding)) = (self.names.get(HEAD), embedding) else {
            return Ok(());
        };
        if !config.tie_word_embeddings {
            return Ok(());
        }
        let (of_head, of_embedding) = (self.tensors.get(head)?, self.tensors.get(embedding)?);
        match of_head.dtype() == of_embedding.dtype() && of_head.data() == of_embedding.data() {
            true => Ok(()),
            false => bail!(
                "tie_word_embeddings is true, but {head} differs from {embedding}: set it to false in {CONFIG} to use that head, or remove the tensor"
            ),
        }
    }

    /// What the decoder did not ask for would be lost without a word.
    pub fn check_all_used(&self, decoder: &Decoder) -> Result<()> {
        let tied = decoder.config().tie_word_embeddings;
        let unused: Vec<&String> = self
            .names
            .iter()
            .filter(|(asked, _)| !decoder.tensors().contains_key(*asked))
            .filter(|(asked, _)| !(tied && *asked == HEAD))
            .map(|(_, name)| name)
            .collect();
        match unused.as_slice() {
            [] => Ok(()),
            [first, ..] => bail!(
                "{} of the checkpoint's tensors are not used by a {} as {CONFIG} describes it, the first is {first}",
                unused.len(),
                decoder.config().family
            ),
        }
    }
}
