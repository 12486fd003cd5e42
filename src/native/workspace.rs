//! How much memory the native implementation works in.

use crate::problem::Settings;

/// Bytes beyond inputs, outputs and gradients.
pub(super) fn workspace(settings: &Settings) -> usize {
    settings.workspace.unwrap_or(64 << 20)
}
