//! Soft targets.
mod blocks;
mod class_logits;

pub use class_logits::class_logits;
