//! Files as others are.

use candle_core::{Error, Result, Tensor};
use std::fs::{self, File};
use std::path::Path;

/// Writes tensors, which must be on the CPU and contiguous, as safetensors.
///
/// safetensors keeps a file to its owner; this one is as readable as any other new file here.
pub(super) fn write_tensors<'a, N>(
    path: &Path,
    tensors: impl IntoIterator<Item = (N, &'a Tensor)>,
) -> Result<()>
where
    N: AsRef<str> + Ord + std::fmt::Display,
{
    let permissions = File::create(path)
        .and_then(|file| file.metadata())
        .map_err(|e| Error::from(e).with_path(path))?
        .permissions();
    safetensors::serialize_to_file(tensors, None, path)
        .map_err(|e| Error::wrap(e).with_path(path))?;
    fs::set_permissions(path, permissions).map_err(|e| Error::from(e).with_path(path))
}
