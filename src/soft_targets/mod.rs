//! Distillation: losses of a student that learns the distribution of a teacher, without logits of all positions and
//! classes.
//!
//! | the teacher | loss |
//! |---|---|
//! | names `k` classes a position and their probabilities, as stored or sent: [`TopK`] | [`top_k_divergence`] |
//! | is there, as embeddings and a head: [`Teacher`] | [`divergence`]: forward and reverse Kullback-Leibler, Jensen-Shannon |
//!
//! Both take embeddings, classifier, targets and [`Options`](crate::Options) as
//! [`linear_cross_entropy`](crate::linear_cross_entropy) does, and their results can be added to its loss.
//! [`class_logits`] computes the logits of chosen classes.

mod checks;
mod class_logits;
mod divergence;
mod loss_and_logits;
mod top_k;

pub use class_logits::class_logits;
pub use divergence::{divergence, Divergence, Teacher};
pub use top_k::{top_k_divergence, Rest, TopK};
