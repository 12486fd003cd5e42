//! What is known of a block of rows.

use candle_core::Tensor;

#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Pair<T> {
    pub student: T,
    pub teacher: T,
}

/// A block of rows of one head, `(rows, V)`.
pub(super) struct Logits<'a> {
    /// The products, before bias, softcap and temperature.
    pub products: Tensor,
    /// `(V)`, in the dtype of the products.
    pub bias: Option<&'a Tensor>,
    pub softcap: Option<f64>,
    pub scale: f64,
    /// Whether the gradient of the products is asked for.
    pub wanted: bool,
}

/// What a block comes to.
pub(super) struct Passed {
    /// `(rows)`
    pub losses: Tensor,
    /// The gradients of the products, `(rows, V)`.
    pub gradients: Pair<Option<Tensor>>,
}
