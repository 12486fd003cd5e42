//! What a run trains on and what it validates on.

use super::arguments::Run;
use super::data::{Data, Rules, Sequences};
use crate::common::files;
use crate::common::tokens::Sequence;
use anyhow::{ensure, Result};
use rand::{rngs::StdRng, seq::SliceRandom, SeedableRng};

/// What `--data` and `--validation-data` name.
pub struct Sources {
    pub data: Data,
    held_out: Option<Data>,
}

pub struct Split {
    pub train: Vec<Sequence>,
    pub validation: Vec<Sequence>,
    /// A number that tells whether the data is the same.
    pub fingerprint: u64,
    /// Which records are skipped and why, a line each of the files that have some.
    pub skipped: Vec<String>,
    cut: usize,
    length: usize,
}

impl Sources {
    pub fn read(run: &Run) -> Result<Self> {
        let data = Data::read(run.data.as_deref())?;
        println!("{}", data.describe());
        let mut held_out = None;
        if let Some(path) = &run.validation_data {
            let data = held_out.insert(Data::read(Some(path))?);
            println!("to validate on, {}", data.describe());
        }
        Ok(Self { data, held_out })
    }

    pub fn split(&self, run: &Run, rules: &Rules) -> Result<Split> {
        let mut split = Split {
            train: Vec::new(),
            validation: Vec::new(),
            fingerprint: 0,
            skipped: Vec::new(),
            cut: 0,
            length: rules.length,
        };
        let made = split.note(&self.data, self.data.sequences(rules)?);
        split.fingerprint = fingerprint(&made);
        (split.train, split.validation) = match &self.held_out {
            None => hold_out(made, run.validation, run.seed)?,
            Some(data) => {
                let held_out = split.note(data, data.sequences(rules)?);
                (made, held_out)
            }
        };
        Ok(split)
    }
}

impl Split {
    /// Takes down what became of the records.
    fn note(&mut self, data: &Data, made: Sequences) -> Vec<Sequence> {
        let skipped = made.describe_skipped();
        self.skipped
            .extend(skipped.map(|skipped| format!("{}: {skipped}", data.name())));
        self.cut += made.cut;
        made.sequences
    }

    pub fn describe(&self) -> String {
        let total =
            |sequences: &[Sequence]| -> usize { sequences.iter().map(Sequence::positions).sum() };
        format!(
            "{} sequences with {} tokens to learn, {} with {} to validate on, {} cut to {} tokens",
            self.train.len(),
            total(&self.train),
            self.validation.len(),
            total(&self.validation),
            self.cut,
            self.length
        )
    }
}

/// Sets a share of the sequences apart, the same ones for the same seed: (to train on, to validate on).
fn hold_out(
    mut sequences: Vec<Sequence>,
    share: f64,
    seed: u64,
) -> Result<(Vec<Sequence>, Vec<Sequence>)> {
    let count = sequences.len();
    if share == 0. {
        return Ok((sequences, Vec::new()));
    }
    ensure!(
        count > 1,
        "{count} sequence, one to train on and one to validate on are the least; --validation 0 does without"
    );
    sequences.shuffle(&mut StdRng::seed_from_u64(seed));
    let held_out = (count as f64 * share).round() as usize;
    let validation = sequences.split_off(count - held_out.clamp(1, count - 1));
    Ok((sequences, validation))
}

/// A number that tells whether data is the same.
fn fingerprint(sequences: &[Sequence]) -> u64 {
    let mut hash = files::Fnv::default();
    for sequence in sequences {
        hash.add(&(sequence.ids.len() as u64).to_le_bytes());
        for (id, weight) in sequence.ids.iter().zip(&sequence.weights) {
            hash.add(&id.to_le_bytes());
            hash.add(&weight.to_le_bytes());
        }
    }
    hash.0
}
