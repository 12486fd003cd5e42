//! The parts of the example `finetune`.

mod arguments;
mod chat;
mod checkpoints;
mod data;
mod files;
mod model;
mod python;
mod records;
mod run;
mod split;
#[cfg(test)]
mod tests;

pub use arguments::Args;
pub use run::run;
