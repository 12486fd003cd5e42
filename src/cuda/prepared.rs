//! The form of the products, and operands as it wants them.

use super::hopper::can_run;
use super::launch::{is_out_of_memory, Buffer, Gpu};
use super::operands::Operands;
use super::params::classifier::ClassifierParams;
use super::rows::pad_classifier;
use crate::plan::Path;
use crate::problem::Settings;
use crate::Implementation;
use candle_core::Result;

/// How the products of a call run, and on what.
pub(super) struct Prepared {
    pub path: Path,
    pub operands: Operands,
    /// What the user's workspace has left.
    pub workspace: Option<usize>,
    /// The classifier that `operands` has, where it is a copy.
    _classifier: Option<Buffer>,
}

impl Prepared {
    /// Chooses the form of the products for so many rows. The copy engine of compute capability 9.0 wants rows that begin
    /// on 16 bytes: those of the embeddings do once they are gathered; a classifier whose rows do not is copied for the
    /// call, with columns of zeros, and the copy is a part of the workspace that the user gives. With an adapter nothing is
    /// copied: where its matrices do not begin so, the form is the portable one.
    pub fn new(gpu: &Gpu, operands: Operands, rows: usize, settings: &Settings) -> Result<Self> {
        let Operands { vocab, kind, .. } = operands;
        let portable = Self {
            path: Path::Portable,
            operands,
            workspace: settings.workspace,
            _classifier: None,
        };
        let operands = match operands.rank() {
            0 => Operands {
                hidden: operands.embedding_columns.next_multiple_of(16 / kind.size),
                aligned: true,
                ..operands
            },
            _ => operands,
        };
        if settings.implementation == Implementation::CudaPortable || !can_run(gpu, operands, rows)?
        {
            return Ok(portable);
        }
        let path = Path::Hopper;
        if operands.hidden == operands.embedding_columns
            && operands.classifier.own.is_multiple_of(16)
        {
            return Ok(Self {
                path,
                operands,
                ..portable
            });
        }
        let bytes = vocab * operands.hidden * kind.size;
        if settings.workspace.is_some_and(|given| given < 2 * bytes) {
            return Ok(portable);
        }
        let copy = match gpu.buffer(bytes) {
            Err(error) if is_out_of_memory(&error) => return Ok(portable),
            copy => copy?,
        };
        pad_classifier(gpu, operands, &copy)?;
        Ok(Self {
            path,
            operands: Operands {
                classifier: ClassifierParams {
                    own: copy.address,
                    own_columns: operands.hidden as i64,
                    adapter_column: operands.hidden as i64,
                    ..operands.classifier
                },
                ..operands
            },
            workspace: settings.workspace.map(|given| given - bytes),
            _classifier: Some(copy),
        })
    }
}
