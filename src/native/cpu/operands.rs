//! The values in a call's storages.

use super::element::{Element, Real};
use super::inputs::Inputs;
use super::statistics::Asked;
use crate::matrices::{Matrices, View};
use crate::native::rows::HostRows;
use crate::problem::Settings;
use crate::Entropy;
use candle_core::{CpuStorage, Result};

fn values<'a, T: Element>(view: View<'a, CpuStorage>) -> Result<&'a [T]> {
    let values = T::cpu_storage_as_slice(view.storage)?;
    let start = view.layout.start_offset();
    Ok(&values[start..start + view.shape().elem_count()])
}

/// The operands of a call.
pub(super) fn inputs<'a, T: Element>(
    matrices: Matrices<View<'a, CpuStorage>>,
    rows: &'a HostRows,
    settings: &Settings,
    lanes: usize,
) -> Result<Inputs<'a, T>> {
    let vocab = matrices.classifier.dims2()?.0;
    let hidden = matrices.embeddings.dims2()?.1;
    let bias = match matrices.bias {
        None => None,
        Some(bias) => {
            let values = values::<T>(bias)?;
            let mut wide = vec![T::Real::default(); values.len()];
            T::widen(values, &mut wide);
            Some(wide)
        }
    };
    Ok(Inputs {
        embeddings: values(matrices.embeddings)?,
        classifier: values(matrices.classifier)?,
        adapter: match matrices.adapter {
            None => None,
            Some(adapter) => Some(values(adapter)?),
        },
        bias,
        hidden,
        vocab,
        rows,
        scale: (settings.logit_scale != 1.).then(|| T::Real::from_f64(settings.logit_scale)),
        softcap: settings.softcap.map(T::Real::from_f64),
        asked: Asked {
            entropy: settings.entropy != Entropy::Off,
            predicted: settings.predicted,
        },
        lanes,
    })
}
