//! What the loss promises, on the CPU.

#[path = "../common/mod.rs"]
mod common;

mod grid;
