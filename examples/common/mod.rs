//! What the examples share. Each uses a part of it.

#![allow(dead_code)]

pub mod corpus;
pub mod counting;
pub mod files;
pub mod memory;
pub mod meter;
pub mod plot;
pub mod tokens;
pub mod training;

#[cfg(test)]
pub mod fixture;
