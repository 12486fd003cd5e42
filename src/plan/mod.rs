//! How the CUDA kernels go through rows and classes: pure functions of sizes, which need no GPU.

mod divergence;
mod forward;
mod fused;
mod hopper;
mod sharing;
mod sweep;
#[cfg(test)]
mod tests;

pub(crate) use divergence::{divergence, Rounds, Side};
pub(crate) use forward::{forward, Groups};
pub(crate) use fused::{fused, gradient_stride, Chunks, Forming, OUTPUTS_BYTES};
pub(crate) use hopper::{
    longest_range, mixed_strips, wide_strips, PANEL, PARTIALS_BYTES, PIECE_ROWS, STRIP,
};
pub(crate) use sharing::{shares_outputs, PART_BYTES};
pub(crate) use sweep::{sweeps, Sweep};

/// Rows and classes of a tile of the gradient filter.
pub(crate) const TILE: usize = 128;

/// Which form of the products runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    Portable,
    Hopper,
}

/// What the plans want to know of a call and the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub hidden: usize,
    pub vocab: usize,
    /// Of the classifier's adapter, 0 without one.
    pub rank: usize,
    /// Bytes of a number of the matrices.
    pub number: usize,
    pub softcap: bool,
    pub multiprocessors: usize,
}

impl Sizes {
    pub fn class_tiles(self) -> usize {
        self.vocab.div_ceil(TILE)
    }

    /// Class tiles from one row of the masses to the next.
    pub fn mass_stride(self) -> usize {
        self.class_tiles().next_multiple_of(TILE)
    }

    /// Bytes of what the forward leaves of a row in a tile for the filter.
    pub fn statistics_bytes(self) -> usize {
        self.number.max(2) * 2
    }

    /// Bytes of what stands in the place of averaged tiles while the products run, whatever the rows.
    fn averages_bytes(self) -> usize {
        self.class_tiles() * self.hidden * self.number + self.vocab * 16
    }

    /// And of each row.
    fn averages_row_bytes(self) -> usize {
        self.hidden * self.number / 2 + 8
    }

    /// Bytes of the units of dC between two chunks of rows on compute capability 9.0: one a class and block of columns.
    pub fn exponent_bytes(self) -> usize {
        self.vocab * self.hidden.div_ceil(STRIP) * 2
    }

    /// Bytes of what chunks of rows leave of dC and db beside dC itself.
    fn between_bytes(self) -> usize {
        let of_classifier = match self.rank {
            0 => self.exponent_bytes(),
            rank => self.vocab * rank * 4,
        };
        of_classifier + self.vocab * 4
    }

    /// Bytes of the partial sums of dC of more rows than one piece has, on compute capability 9.0.
    fn partials_bytes(self, rows: usize) -> usize {
        match rows > PIECE_ROWS {
            true => self.clusters() * 2 * PARTIALS_BYTES,
            false => 0,
        }
    }

    /// Pairs of blocks that run at the same time on compute capability 9.0.
    fn clusters(self) -> usize {
        (self.multiprocessors / 2).max(1)
    }
}

/// Bytes of workspace: as many as the user said, or half of the usual as often as the device had no room.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workspace {
    pub given: Option<usize>,
    pub halvings: u32,
}

impl Workspace {
    /// `usual` where none is given.
    fn or(self, usual: usize) -> usize {
        self.given.unwrap_or(usual >> self.halvings)
    }
}
