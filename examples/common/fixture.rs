//! Files for the tests of the examples.

use super::{corpus, training};
use std::fs;
use std::path::{Path, PathBuf};

/// A folder of its own, removed at the end.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let name = format!("cut-cross-entropy-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub const TEXT: &str = "The cat sat on the mat. The dog sat on the log. ";

/// A tiny checkpoint whose tokenizer puts `<s>` before a text and whose texts end with `</s>`.
pub fn checkpoint(folder: &Path) {
    use tokenizers::processors::template::TemplateProcessing;
    use tokenizers::AddedToken;
    let mut tokenizer = corpus::train_tokenizer(&[TEXT.repeat(4)], 300).unwrap();
    let special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    tokenizer
        .add_special_tokens(special.map(|token| AddedToken::from(token, true)))
        .unwrap();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let (begin, end) = (id("<s>"), id("</s>"));
    let vocab = tokenizer.get_vocab_size(true);
    let processor = TemplateProcessing::builder()
        .try_single("<s> $A")
        .unwrap()
        .special_tokens(vec![("<s>", begin)])
        .build()
        .unwrap();
    tokenizer.with_post_processor(Some(processor));
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab,
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "eos_token_id": end,
    });
    let (decoder, _) = training::new_decoder(&config.to_string(), 1).unwrap();
    decoder.save(folder).unwrap();
    tokenizer
        .save(folder.join("tokenizer.json"), false)
        .unwrap();
}

/// The bytes of every file in a folder, by their names.
pub fn contents(folder: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.is_file());
    files
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect()
}
