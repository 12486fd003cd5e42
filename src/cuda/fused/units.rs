//! What gradients formed in f16 are multiplied by, for f16 has no room below. The rows of E that dC is summed from, and the
//! gradients until the upstream gradient is known, are multiplied by powers of two, so that they are as large as they can be.

use crate::cuda::call::Call;
use crate::cuda::launch::{Buffer, Kernel, FUSED};
use crate::cuda::params::fused::UnitsParams;
use crate::cuda::terms::Loss;
use candle_core::{DType, Result};

/// What gradients in f16 are multiplied by: addresses of numbers, 0 for 1.
#[derive(Debug, Default)]
pub(in crate::cuda) struct Units {
    numbers: Option<Buffer>,
}

impl Units {
    pub fn new(call: Call<'_>, loss: Loss, mean: bool) -> Result<Self> {
        let Call {
            gpu,
            operands,
            rows,
            ..
        } = call;
        if operands.kind.dtype != DType::F16 {
            return Ok(Self::default());
        }
        let trained = operands.trained();
        let (largest, numbers) = (gpu.zeros(4)?, gpu.buffer(8 * 4)?);
        let params = UnitsParams {
            // Those that the gradient of the classifier, or of its adapter, is summed from.
            embeddings: operands.embeddings + (trained.start * operands.kind.size) as u64,
            row_embedding: rows.embedding.address,
            count: rows.count.address,
            largest: largest.address,
            units: numbers.address,
            columns: trained.len() as i64,
            embeddings_stride: operands.embedding_columns as i64,
            terms: loss.terms,
            mean: u32::from(mean),
            logit_scale: operands.logit_scale,
        };
        let name = operands.kind.kernel("largest_embedding");
        gpu.launch(&Kernel::new(FUSED, name, (rows.positions, 1), 128), &params)?;
        gpu.launch(&Kernel::new(FUSED, "gradient_units", (1, 1), 1), &params)?;
        Ok(Self {
            numbers: Some(numbers),
        })
    }

    pub fn is_some(&self) -> bool {
        self.numbers.is_some()
    }

    /// The n-th number of `Units` in `cuda/fused.cu`.
    fn number(&self, n: u64) -> u64 {
        self.numbers.as_ref().map_or(0, |all| all.address + 4 * n)
    }

    /// Of the rows of E that dC is summed from.
    pub fn rows(&self) -> u64 {
        self.number(0)
    }

    /// What finished sums of dE are multiplied by.
    pub fn embeddings(&self) -> u64 {
        self.number(1)
    }

    /// What finished sums of dC are multiplied by, those of the targets' part and those of db.
    pub fn classifier(&self) -> u64 {
        self.number(2)
    }

    pub fn targets(&self) -> u64 {
        self.number(3)
    }

    pub fn bias(&self) -> u64 {
        self.number(4)
    }

    /// What leads from what is formed to the gradient of embeddings (0), classifier (1) and bias (2).
    pub fn of_gradient(&self, which: usize) -> u64 {
        self.number(5 + which as u64)
    }
}
