//! What the ranks of a communicator have in common.

use super::library::check;
use candle_core::{bail, Error, Result};
use cudarc::nccl::sys as nccl;
use std::str::FromStr;

/// What the ranks of a communicator have in common: made by one of them, handed to the others by any means.
///
/// As text it is 256 hexadecimal digits, fit for an environment variable.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NcclId([u8; 128]);

impl NcclId {
    /// A new one.
    ///
    /// # Errors
    /// NCCL finds no network interface to listen on.
    pub fn new() -> Result<Self> {
        let mut id = nccl::ncclUniqueId { internal: [0; 128] };
        // SAFETY: NCCL fills the 128 bytes.
        check("make an id", unsafe { nccl::ncclGetUniqueId(&mut id) })?;
        Ok(Self(id.internal.map(|byte| byte as u8)))
    }

    pub(super) fn to_nccl(self) -> nccl::ncclUniqueId {
        nccl::ncclUniqueId {
            internal: self.0.map(|byte| byte as std::ffi::c_char),
        }
    }
}

impl std::fmt::Display for NcclId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for NcclId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NcclId({self})")
    }
}

impl FromStr for NcclId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let mut id = [0; 128];
        if text.len() != 2 * id.len() || !text.is_ascii() {
            bail!(
                "an NCCL id has 256 hexadecimal digits, got {} characters",
                text.len()
            )
        }
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(Error::wrap)?;
        }
        Ok(Self(id))
    }
}
