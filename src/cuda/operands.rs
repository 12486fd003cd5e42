//! What every kernel wants to know of a problem's matrices.

use super::launch::Gpu;
use super::params::classifier::ClassifierParams;
use crate::matrices::{Matrices, View};
use crate::plan::Sizes;
use candle_core::{bail, CudaStorage, DType, Device, Result, Tensor};
use cudarc::driver::SyncOnDrop;

/// The end of a kernel's name, and the bytes of a number.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    pub dtype: DType,
    pub suffix: &'static str,
    pub size: usize,
}

impl Kind {
    pub fn of(dtype: DType) -> Result<Self> {
        let (suffix, size) = match dtype {
            DType::BF16 => ("bf16", 2),
            DType::F16 => ("f16", 2),
            DType::F32 => ("f32", 4),
            dtype => bail!("no CUDA kernels for {dtype:?}"),
        };
        Ok(Kind {
            dtype,
            suffix,
            size,
        })
    }

    pub fn kernel(self, name: &str) -> String {
        format!("{name}_{}", self.suffix)
    }
}

/// The device and kind of a matrix, `None` where the kernels cannot read it.
pub(super) fn kernels(matrix: &Tensor) -> Result<Option<(Gpu, Kind)>> {
    let Device::Cuda(device) = matrix.device() else {
        return Ok(None);
    };
    let gpu = Gpu::new(device);
    let runs = matches!(matrix.dtype(), DType::BF16 | DType::F16 | DType::F32)
        && gpu.compute_capability()?.0 >= 8;
    Ok(match runs {
        true => Some((gpu, Kind::of(matrix.dtype())?)),
        false => None,
    })
}

/// Whether numbers of these addresses, this many apart, all begin on 16 bytes.
pub(super) fn aligned(kind: Kind, addresses: &[u64], strides: &[usize]) -> bool {
    let on_16 = |bytes: u64| bytes.is_multiple_of(16);
    addresses.iter().all(|address| on_16(*address))
        && strides.iter().all(|s| on_16((s * kind.size) as u64))
}

/// The address of a matrix or vector, 0 for none, ready to be read until the guard is dropped.
fn address<'a>(
    gpu: &'a Gpu,
    view: Option<View<'a, CudaStorage>>,
) -> Result<(u64, Option<SyncOnDrop<'a>>)> {
    let Some(view) = view else {
        return Ok((0, None));
    };
    let (address, until_read) = gpu.address(view.storage, view.layout)?;
    Ok((address, Some(until_read)))
}

/// The addresses of a problem's matrices and what every kernel wants to know of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub embeddings: u64,
    pub classifier: ClassifierParams,
    pub bias: u64,
    /// Columns that the products have: of the classifier with its adapter, and of embeddings once they are gathered.
    pub hidden: usize,
    /// Columns of the embeddings as they are given and of their gradient: fewer where the products' are padded.
    pub embedding_columns: usize,
    pub vocab: usize,
    /// 0 for none. That of logits times their scale.
    pub softcap: f32,
    pub logit_scale: f32,
    pub kind: Kind,
    /// Whether every row of the matrices begins on 16 bytes.
    pub aligned: bool,
    pub multiprocessors: usize,
}

impl Operands {
    /// Runs `with` while the matrices are held for reading. The softcap is that of logits times their scale.
    pub fn read<R>(
        gpu: &Gpu,
        matrices: Matrices<View<'_, CudaStorage>>,
        softcap: Option<f64>,
        logit_scale: f64,
        with: impl FnOnce(Operands) -> Result<R>,
    ) -> Result<R> {
        let (vocab, own_columns) = matrices.classifier.dims2()?;
        let hidden = matrices.embeddings.dims2()?.1;
        let rank = match matrices.adapter {
            None => 0,
            Some(adapter) => adapter.dims2()?.1,
        };
        let kind = Kind::of(matrices.classifier.dtype())?;
        let multiprocessors = gpu.multiprocessors()?;
        let (embeddings, _embeddings) = address(gpu, Some(matrices.embeddings))?;
        let (classifier, _classifier) = address(gpu, Some(matrices.classifier))?;
        let (adapter, _adapter) = address(gpu, matrices.adapter)?;
        let (bias, _bias) = address(gpu, matrices.bias)?;
        with(Operands {
            embeddings,
            classifier: ClassifierParams {
                own: classifier,
                adapter,
                own_columns: own_columns as i64,
                adapter_column: (hidden - rank) as i64,
                rank: rank as i64,
            },
            bias,
            hidden,
            embedding_columns: hidden,
            vocab,
            softcap: softcap.unwrap_or(0.) as f32,
            logit_scale: logit_scale as f32,
            kind,
            aligned: aligned(
                kind,
                &[embeddings, classifier, adapter],
                &[hidden, own_columns, rank],
            ),
            multiprocessors,
        })
    }

    /// The adapter's rank, 0 without one.
    pub fn rank(&self) -> usize {
        self.classifier.rank as usize
    }

    /// The columns of the embeddings that the gradient of what is trained of the classifier has.
    pub fn trained(&self) -> std::ops::Range<usize> {
        match self.rank() {
            0 => 0..self.embedding_columns,
            rank => self.hidden - rank..self.hidden,
        }
    }

    /// How many of these columns the products have, padded or not.
    pub fn trained_padded(&self) -> usize {
        match self.rank() {
            0 => self.hidden,
            rank => rank,
        }
    }

    pub fn class_tiles(&self) -> usize {
        self.sizes().class_tiles()
    }

    /// Class tiles from one row of the masses to the next.
    pub fn mass_stride(&self) -> usize {
        self.sizes().mass_stride()
    }

    pub fn sizes(&self) -> Sizes {
        Sizes {
            hidden: self.hidden,
            vocab: self.vocab,
            rank: self.rank(),
            number: self.kind.size,
            softcap: self.softcap > 0.,
            multiprocessors: self.multiprocessors,
        }
    }
}
