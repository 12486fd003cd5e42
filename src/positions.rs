//! Which positions a result has, and which target belongs to each.

use candle_core::{bail, DType, Device, Result, Tensor};

/// Which row of the embeddings and which target belong to a position of the result.
///
/// The `batch` sequences hold `time` steps each; the last `shift` steps of one predict nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PositionMap {
    pub batch: usize,
    pub time: usize,
    pub shift: usize,
}

impl PositionMap {
    /// Positions of the result.
    pub fn len(&self) -> usize {
        self.batch * (self.time - self.shift)
    }

    /// Rows of the embeddings, and number of targets.
    pub fn rows(&self) -> usize {
        self.batch * self.time
    }

    /// A number a row of the embeddings of numbers of positions: 0 for a row without one.
    pub fn to_rows(self, values: &Tensor) -> Result<Tensor> {
        let values = values.reshape((self.batch, self.time - self.shift))?;
        values.pad_with_zeros(1, 0, self.shift)?.flatten_all()
    }

    /// The numbers of the rows that have a position.
    pub fn of_rows(self, values: &Tensor) -> Result<Tensor> {
        let values = values.reshape((self.batch, self.time))?;
        values.narrow(1, 0, self.time - self.shift)?.flatten_all()
    }

    /// The row of the embeddings that makes this prediction; its target is `shift` further on.
    pub fn row(&self, position: usize) -> usize {
        let steps = self.time - self.shift;
        position / steps * self.time + position % steps
    }
}

/// Targets as i64.
pub(crate) fn to_i64(targets: &Tensor) -> Result<Tensor> {
    copyable(targets)?.to_dtype(DType::I64)
}

/// Targets in a dtype that Candle can cast, copy and compare where they are: it has no kernels for i32 on
/// a GPU, so these go through the host, which waits for the device.
pub(crate) fn copyable(targets: &Tensor) -> Result<Tensor> {
    if targets.dtype() != DType::I32 || targets.device().is_cpu() {
        return Ok(targets.clone());
    }
    let on_host = targets.to_device(&Device::Cpu)?.to_dtype(DType::I64)?;
    on_host.to_device(targets.device())
}

/// The positions of the result and its shape under [`Reduction::None`].
pub(crate) fn pick_positions(lead: &[usize], shift: usize) -> Result<(PositionMap, Vec<usize>)> {
    let mut shape = lead.to_vec();
    let rows = lead.iter().product();
    if shift == 0 {
        let positions = PositionMap {
            batch: 1,
            time: rows,
            shift,
        };
        return Ok((positions, shape));
    }
    match shape.last_mut() {
        Some(time) if shift < *time => {
            let positions = PositionMap {
                batch: rows / *time,
                time: *time,
                shift,
            };
            *time -= shift;
            Ok((positions, shape))
        }
        _ => bail!(
            "shift must be less than the last dimension of targets, got shift {shift} for {lead:?}"
        ),
    }
}
