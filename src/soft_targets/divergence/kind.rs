//! The kinds of divergence.

/// How far two distributions over the classes are from each other: the student's, `p`, and the teacher's, `q`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Divergence {
    /// `KL(q || p) = sum_j q_j (log q_j - log p_j)`: the student is to cover all that the teacher does.
    ForwardKl,
    /// `KL(p || q) = sum_j p_j (log p_j - log q_j)`: the student is to keep to what the teacher does.
    ReverseKl,
    /// The generalized Jensen-Shannon divergence of GKD, `beta KL(q || m) + (1 - beta) KL(p || m)` with
    /// `m = beta q + (1 - beta) p`, for `beta` between 0 and 1, ends excluded. Divided by `beta` it goes to
    /// `ForwardKl` for small `beta`, and divided by `1 - beta` to `ReverseKl` for large. TRL's `beta` is the same, where
    /// 0 and 1 stand for these two.
    JensenShannon(f64),
}
