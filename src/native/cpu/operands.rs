//! The values of a call's tensors.

use super::element::{Element, Real};
use super::inputs::Inputs;
use crate::native::rows::HostRows;
use crate::problem::{Matrices, Settings};
use candle_core::{Result, Storage, Tensor};

/// Calls `f` with the values of a contiguous tensor.
fn with_slice<T: Element, O>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<O>) -> Result<O> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => {
            let values = T::cpu_storage_as_slice(storage)?;
            let start = layout.start_offset();
            f(&values[start..start + layout.shape().elem_count()])
        }
        other => candle_core::bail!(
            "expected a tensor on the CPU, got one on {:?}",
            other.device().location()
        ),
    }
}

/// Calls `f` with the operands of a call.
pub(super) fn with_inputs<T: Element, O>(
    matrices: Matrices<'_>,
    rows: &HostRows,
    settings: &Settings,
    lanes: usize,
    f: impl FnOnce(&Inputs<'_, T>) -> Result<O>,
) -> Result<O> {
    let (vocab, hidden) = matrices.classifier.dims2()?;
    let bias = match matrices.bias {
        None => None,
        Some(bias) => Some(with_slice::<T, _>(bias, |values| {
            let mut wide = vec![T::Real::default(); values.len()];
            T::widen(values, &mut wide);
            Ok(wide)
        })?),
    };
    with_slice::<T, _>(matrices.embeddings, |embeddings| {
        with_slice::<T, _>(matrices.classifier, |classifier| {
            f(&Inputs {
                embeddings,
                classifier,
                bias,
                hidden,
                vocab,
                rows,
                softcap: settings.softcap.map(T::Real::from_f64),
                lanes,
            })
        })
    })
}
