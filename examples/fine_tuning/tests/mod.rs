//! Whole runs of tiny models, with the arguments that a user writes.

use crate::common::fixture::{checkpoint, contents, Folder, TEXT};
use crate::common::tokens::{Encoder, Sequence};
use crate::fine_tuning::arguments::{Args, Learn};
use crate::fine_tuning::chat::Template;
use crate::fine_tuning::data::{Data, Rules, Sequences};
use crate::fine_tuning::run::run;
use crate::fine_tuning::split::Sources;
use anyhow::Result;
use candle_cut_cross_entropy::models::Config;
use clap::Parser;
use serde_json::{json, Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

mod chat;
mod data;
mod files;
mod training;

/// A folder with a checkpoint and a text, for a run of two steps into `out`.
struct Place(Folder);

impl Place {
    fn new(name: &str) -> Self {
        let folder = Folder::new(name);
        checkpoint(&folder.0.join("base"));
        folder.write("text.txt", TEXT.repeat(8));
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0 .0.join(name)
    }

    /// `@` in an argument is the folder; what is given here comes after, and in place of, the usual.
    fn arguments(&self, arguments: &[&str]) -> Result<Args> {
        let usual = [
            ("--checkpoint", "@/base"),
            ("--data", "@/text.txt"),
            ("--output", "@/out"),
            ("--length", "16"),
            ("--batch", "2"),
        ];
        let usual = usual.iter().filter(|(name, _)| !arguments.contains(name));
        let usual = usual.flat_map(|&(name, value)| [name, value]);
        let steps = ["--steps", "2"];
        let steps = steps
            .iter()
            .filter(|_| !arguments.contains(&"--steps") && !arguments.contains(&"--epochs"));
        let folder = self.0 .0.to_string_lossy();
        let all = ["finetune"].into_iter().chain(usual).chain(steps.copied());
        let all = all.chain(arguments.iter().copied());
        Ok(Args::try_parse_from(all.map(|a| a.replace('@', &folder)))?)
    }

    fn run(&self, arguments: &[&str]) -> Result<()> {
        run(&self.arguments(arguments)?)
    }

    fn error(&self, arguments: &[&str]) -> String {
        format!("{:#}", self.run(arguments).expect_err("an error is due"))
    }

    fn metrics(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(name).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    fn losses(&self, name: &str) -> Vec<f64> {
        let lines = self.metrics(name).into_iter();
        lines.filter_map(|line| line["loss"].as_f64()).collect()
    }

    /// What a file of records becomes.
    fn sequences(&self, name: &str, text: &str, template: Option<&Template>) -> Result<Sequences> {
        let path = self.0.write(name, text);
        let rules = Rules {
            encoder: &self.encoder(),
            template,
            learn: Learn::Answers,
            length: 32,
            strict: false,
        };
        Data::read(Some(&path))?.sequences(&rules)
    }

    fn encoder(&self) -> Encoder {
        let base = self.path("base");
        let config = Config::from_file(base.join("config.json")).unwrap();
        Encoder::load(&base, &config).unwrap()
    }
}

/// The text of a sequence, and that of its learnt tokens, special tokens included.
fn texts(encoder: &Encoder, sequence: &Sequence) -> (String, String) {
    let decode = |ids: &[u32]| encoder.tokenizer.decode(ids, false).unwrap();
    let learnt = sequence.ids.iter().zip(&sequence.weights);
    let learnt = learnt.filter(|(_, &weight)| weight > 0.);
    let learnt: Vec<u32> = learnt.map(|(&id, _)| id).collect();
    (decode(&sequence.ids), decode(&learnt))
}

fn all_files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    contents(folder).into_iter().collect()
}
