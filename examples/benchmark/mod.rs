//! The parts of the example `bench`.

pub mod arguments;
pub mod data;
pub mod table;
