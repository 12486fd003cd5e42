//! One head of a divergence: its logits, and its gradients from those of the logits.

use crate::cuda::between::Between;
use crate::cuda::call::Range;
use crate::cuda::hopper::{self, Making, Tiles};
use crate::cuda::launch::{Buffer, Gpu, Kernel, BACKWARD};
use crate::cuda::operands::Operands;
use crate::cuda::outputs::{Outputs, Results};
use crate::cuda::params::backward::{BiasParams, FinishParams};
use crate::cuda::params::divergence::SideParams;
use crate::cuda::rows::Rows;
use crate::op::contract::Gradients;
use crate::plan::{gradient_stride, longest_range, Rounds};
use candle_core::Result;

pub(super) struct Side {
    pub operands: Operands,
    outputs: Outputs,
    results: Results,
    /// Of a block: `(rows, stride)` in f32, and `(rows, class tiles, 2)`.
    logits: Buffer,
    tile_sums: Buffer,
    /// Of a chunk: `(rows, D)`.
    gathered: Buffer,
    /// Of a chunk: `(rows, stride)`, where a gradient is wanted.
    gradient: Option<Buffer>,
    /// Of a chunk: `(rows, D)` in f32, where that of the embeddings is.
    sums: Option<Buffer>,
    between: Between,
    /// Classes of a launch of the products.
    range: usize,
}

impl Side {
    /// For `chunks` chunks of rows.
    pub fn new(
        gpu: &Gpu,
        operands: Operands,
        outputs: Outputs,
        plan: Rounds,
        chunks: usize,
    ) -> Result<Self> {
        let Operands { hidden, kind, .. } = operands;
        let stride = gradient_stride(operands.sizes());
        let results = outputs.results();
        let when = |wanted: bool, bytes: usize| match wanted {
            true => gpu.buffer(bytes).map(Some),
            false => Ok(None),
        };
        Ok(Self {
            logits: gpu.buffer(plan.block * stride * 4)?,
            tile_sums: gpu.buffer(plan.block * operands.class_tiles() * 8)?,
            gathered: gpu.buffer(plan.chunk * hidden * kind.size)?,
            gradient: when(results.any(), plan.chunk * stride * kind.size)?,
            sums: when(results.embeddings != 0, plan.chunk * hidden * 4)?,
            between: Between::new(gpu, operands, results, chunks)?,
            range: longest_range(operands.sizes(), plan.chunk),
            operands,
            outputs,
            results,
        })
    }

    /// The embeddings of a chunk of rows.
    pub fn gather(&self, gpu: &Gpu, rows: &Rows, first: usize, len: usize) -> Result<()> {
        rows.gather(gpu, self.operands, first, len, &self.gathered)
    }

    /// The logits of a block of the chunk that begins with `first`.
    pub fn logits(
        &self,
        gpu: &Gpu,
        rows: &Rows,
        first: usize,
        block: usize,
        len: usize,
    ) -> Result<()> {
        let row_bytes = self.operands.hidden * self.operands.kind.size;
        let tiles = Tiles {
            count: rows.count.address,
            gradient: self.logits.address,
            sums: self.tile_sums.address,
            first_row: block,
            rows: len,
            range: self.operands.vocab,
            stride: gradient_stride(self.operands.sizes()),
            ..Default::default()
        };
        let gathered = self.gathered.address + ((block - first) * row_bytes) as u64;
        hopper::tiles(gpu, self.operands, Making::Logits, gathered, &tiles)
    }

    /// What is made of the logits of that block.
    pub fn params(&self, first: usize, block: usize) -> SideParams {
        let row_bytes = gradient_stride(self.operands.sizes()) * self.operands.kind.size;
        let offset = ((block - first) * row_bytes) as u64;
        SideParams {
            logits: self.logits.address,
            sums: self.tile_sums.address,
            gradient: self.gradient.as_ref().map_or(0, |g| g.address + offset),
            softcap: self.operands.softcap,
            logit_scale: self.operands.logit_scale,
        }
    }

    /// The gradients that a chunk of rows adds to, where they are wanted.
    pub fn products(&self, gpu: &Gpu, rows: &Rows, first: usize, len: usize) -> Result<()> {
        let Some(gradient) = &self.gradient else {
            return Ok(());
        };
        let Operands {
            hidden,
            vocab,
            kind,
            ..
        } = self.operands;
        let count = rows.count.address;
        let chunk = self
            .between
            .chunk(first == 0, first + len >= rows.positions);
        let stride = gradient_stride(self.operands.sizes());
        for first_class in (0..vocab).step_by(self.range) {
            let part = Range {
                first_class,
                classes: self.range,
                stride,
                first_row: first,
                rows: len,
                gradient: gradient.address + (first_class * kind.size) as u64,
                sums: self.sums.as_ref().map_or(0, |sums| sums.address),
                add_to_sums: first_class > 0,
                classifier_grad: self.results.classifier,
                chunk,
                ..Default::default()
            };
            hopper::products(gpu, self.operands, count, 0, part, &self.gathered)?;
        }
        if let Some(sums) = &self.sums {
            let params = FinishParams {
                sums: sums.address,
                row_embedding: rows.embedding.address,
                count,
                embeddings_grad: self.results.embeddings,
                hidden: hidden as i64,
                embedding_columns: self.operands.embedding_columns as i64,
                first_row: first as u32,
                ..Default::default()
            };
            let kernel = Kernel::new(BACKWARD, kind.kernel("finish_embeddings"), (len, 1), 256);
            gpu.launch(&kernel, &params)?;
        }
        if self.results.bias != 0 {
            let params = BiasParams {
                gradient: gradient.address,
                count,
                bias_grad: self.results.bias,
                vocab: vocab as i64,
                range: stride as i64,
                first_row: first as u32,
                rows: len as u32,
                class_tiles: self.operands.class_tiles() as u32,
                overwrite: chunk.first.into(),
                bias_sums: chunk.bias_sums,
                last: chunk.last.into(),
                ..Default::default()
            };
            let grid = (vocab.div_ceil(32), 1);
            let kernel = Kernel::new(BACKWARD, kind.kernel("bias_gradient"), grid, 256);
            gpu.launch(&kernel, &params)?;
        }
        Ok(())
    }

    pub fn finish(self, gpu: &Gpu) -> Gradients {
        self.outputs.finish(gpu)
    }
}
