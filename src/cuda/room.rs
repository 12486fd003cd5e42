//! Less workspace where the device has no room for the usual.

use super::launch::is_out_of_memory;
use crate::plan::Workspace;
use candle_core::Result;

/// Calls `with` with the workspace that is given or, where none is, with the usual one and then with ever more halvings of
/// it until the device has the room. It must not rely on what a call that failed has left.
pub(super) fn with_room<R>(
    given: Option<usize>,
    mut with: impl FnMut(Workspace) -> Result<R>,
) -> Result<R> {
    const MOST: u32 = 6;
    for halvings in 0..MOST {
        match with(Workspace { given, halvings }) {
            Err(error) if given.is_none() && is_out_of_memory(&error) => continue,
            result => return result,
        }
    }
    with(Workspace {
        given,
        halvings: MOST,
    })
}
