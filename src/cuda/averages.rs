//! What stands in the gradients in the place of tiles that the filter does not keep: `cuda/averages.cu` has the formula.

use super::call::{AverageAddresses, Call, Range, Scales};
use super::filter::Filter;
use super::launch::{Buffer, Kernel, AVERAGES, ONE_BLOCK};
use super::operands::Operands;
use super::outputs::Results;
use super::params::averages::{
    EntryParams, ListTargetsParams, ScaleMassesParams, ShareParams, SumMassesParams,
};
use super::params::classifier::ClassifierParams;
use super::rows::sort_targets;
use super::{hopper, portable};
use crate::plan::{Path, TILE};
use candle_core::Result;

/// The bits of the table of kept tiles, as in `common.cuh`.
const KEEP_FOR_EMBEDDINGS: u32 = 1;
const KEEP_FOR_CLASSIFIER: u32 = 2;

/// The masses of some rows, and by what the rows are multiplied.
#[derive(Clone, Copy)]
pub(super) struct Masses<'a> {
    pub call: Call<'a>,
    pub path: Path,
    pub filter: Filter,
    /// Of row 0.
    pub masses: u64,
    pub keep: u64,
    pub first_row: usize,
    pub len: usize,
    /// The gathered embeddings of these rows, by the Hopper kernels.
    pub gathered: Option<&'a Buffer>,
    /// The upstream gradients of the softmax of row 0 and later; 0: none, all is in `row_scale`.
    pub p_scale: u64,
    /// What the gradients multiply these rows by afterwards; 0: nothing.
    pub row_scale: u64,
}

/// Shared out among the classes of a tile.
pub(super) struct Averages {
    shares: Buffer,
    /// `(class tiles, hidden)`, for the gradient of the classifier.
    mass_rows: Option<Buffer>,
    /// `(class tiles)`, for the gradient of the bias.
    mass_sums: Option<Buffer>,
    entries: Option<Entries>,
}

/// The entries of the targets that lie in no kept tile.
struct Entries {
    /// Of each row, for the gradient of the embeddings.
    embeddings: Buffer,
    /// Of each class, for that of the classifier, and what several rows have together.
    list: Buffer,
    combined: Option<Buffer>,
    /// For that of the bias: where the sum of a class's entries lies, and the sums.
    bias: Option<(Buffer, Buffer)>,
}

impl Averages {
    /// The averages of these rows; their part of dE begins `sums`.
    pub fn new(masses: Masses<'_>, results: Results, sums: u64) -> Result<Self> {
        let Call {
            gpu,
            operands,
            rows,
            ..
        } = masses.call;
        let Operands {
            hidden,
            vocab,
            kind,
            ..
        } = operands;
        let tiles = operands.class_tiles();
        // By the portable kernels, the mean rows are those of all rows, whatever the chunk.
        let all = match masses.path {
            Path::Hopper => masses,
            Path::Portable => Masses {
                first_row: 0,
                len: rows.positions.next_multiple_of(TILE),
                ..masses
            },
        };
        let of_classes = gpu.buffer(tiles * hidden * kind.size)?;
        let unscaled = all.of_rows(all.masses);
        // A power of two, which changes no digit.
        let scale = 1. / all.len.next_power_of_two() as f32;
        let of_scale = gpu.number(scale)?;
        all.classes(unscaled, of_scale.address, &of_classes)?;
        let mass_sums = all.sum(unscaled, scale)?;
        let shares = gpu.buffer(vocab * 4)?;
        let mean_classes = gpu.buffer(tiles * hidden * kind.size)?;
        let params = ShareParams {
            classifier: operands.classifier.own,
            bias: operands.bias,
            row_sums: of_classes.address,
            mass_sums: mass_sums.address,
            shares: shares.address,
            mean_classes: mean_classes.address,
            hidden: hidden as i64,
            vocab: vocab as i64,
            softcap: operands.softcap,
            logit_scale: operands.logit_scale,
            aligned: operands.aligned.into(),
            scale,
        };
        // A thread has 16 bytes of a row, or twice as many.
        let threads = (hidden * kind.size / 16)
            .next_multiple_of(32)
            .clamp(32, 512);
        let kernel = Kernel::new(
            AVERAGES,
            kind.kernel("share_masses"),
            (tiles, 1),
            threads as u32,
        );
        gpu.launch(&kernel, &params)?;
        let as_they_are = masses.p_scale == 0 && masses.filter.is_uniform();
        let mut scaled = None;
        let mut scaled_for = |bit: u32| -> Result<u64> {
            if as_they_are {
                return Ok(masses.of_rows(masses.masses));
            }
            if scaled.is_none() || !masses.filter.is_uniform() {
                scaled = None;
                scaled = Some(masses.scale(bit)?);
            }
            Ok(address(&scaled))
        };
        if results.embeddings != 0 {
            let scaled = scaled_for(KEEP_FOR_EMBEDDINGS)?;
            masses.embeddings(scaled, &mean_classes, sums)?;
        }
        drop(mean_classes);
        let mut averages = Self {
            shares,
            mass_rows: None,
            mass_sums: None,
            entries: None,
        };
        if results.classifier != 0 || results.bias != 0 {
            let scaled = scaled_for(KEEP_FOR_CLASSIFIER)?;
            if results.bias != 0 {
                averages.mass_sums = Some(masses.sum(scaled, scale)?);
            }
            if results.classifier != 0 {
                if !as_they_are {
                    masses.classes(scaled, of_scale.address, &of_classes)?;
                }
                averages.mass_rows = Some(of_classes);
            }
        }
        Ok(averages)
    }

    /// Adds the entries of the targets that no kept tile has.
    pub fn with_entries(
        mut self,
        call: Call<'_>,
        scales: &Scales,
        keep: u64,
        (first_row, rows): (usize, usize),
    ) -> Result<Self> {
        let Call {
            gpu,
            operands,
            rows: all,
            statistics,
        } = call;
        let row = |array: &Buffer| array.address + first_row as u64 * 4;
        let (embeddings, classifier) = (gpu.buffer(rows * 4)?, gpu.buffer(rows * 4)?);
        let params = EntryParams {
            row_max: row(&statistics.row_max),
            row_log_sum: row(&statistics.row_log_sum),
            target_logit: row(&statistics.target_logit),
            row_target: row(&all.target),
            count: all.count.address,
            keep: keep + (first_row / TILE * operands.class_tiles()) as u64,
            p_scale: row(&scales.p),
            target_scale: row(&scales.target),
            embeddings_entry: embeddings.address,
            classifier_entry: classifier.address,
            first_row: first_row as u32,
            rows: rows as u32,
            class_tiles: operands.class_tiles() as u32,
            softcap: operands.softcap,
        };
        let grid = (rows.div_ceil(256), 1);
        gpu.launch(&Kernel::new(AVERAGES, "target_entries", grid, 256), &params)?;
        let sorted = sort_targets(gpu, all, first_row, rows)?;
        let list = gpu.zeros(operands.vocab * 8)?;
        let combined = match self.mass_rows {
            None => None,
            Some(_) => Some(gpu.buffer(rows / 2 * operands.hidden * operands.kind.size)?),
        };
        let bias = match operands.bias {
            0 => None,
            _ => Some((gpu.zeros(operands.vocab * 4)?, gpu.buffer(rows * 4)?)),
        };
        let params = ListTargetsParams {
            embeddings: operands.embeddings,
            row_embedding: row(&all.embedding),
            sorted_row: sorted.row.address,
            sorted_target: sorted.target.address,
            entry: classifier.address,
            count: all.count.address,
            list: list.address,
            combined: address(&combined),
            slots: bias.as_ref().map_or(0, |(slots, _)| slots.address),
            target_bias: bias.as_ref().map_or(0, |(_, sums)| sums.address),
            hidden: operands.hidden as i64,
            embedding_columns: operands.embedding_columns as i64,
            first_row: first_row as u32,
            rows: rows as u32,
        };
        let name = operands.kind.kernel("list_targets");
        gpu.launch(&Kernel::new(AVERAGES, name, (rows, 1), 256), &params)?;
        self.entries = Some(Entries {
            embeddings,
            list,
            combined,
            bias,
        });
        Ok(self)
    }

    pub fn addresses(&self) -> AverageAddresses {
        let mut addresses = AverageAddresses {
            shares: self.shares.address,
            mass_rows: address(&self.mass_rows),
            mass_sums: address(&self.mass_sums),
            ..Default::default()
        };
        if let Some(entries) = &self.entries {
            addresses.list = entries.list.address;
            addresses.combined = address(&entries.combined);
            if let Some((slots, sums)) = &entries.bias {
                addresses.slots = slots.address;
                addresses.target_bias = sums.address;
            }
            addresses.embeddings_entry = entries.embeddings.address;
        }
        addresses
    }
}

impl Masses<'_> {
    /// The first of these rows in a matrix of masses of all rows.
    fn of_rows(&self, masses: u64) -> u64 {
        let row_bytes = self.call.operands.mass_stride() * self.call.operands.kind.size;
        masses + (self.first_row * row_bytes) as u64
    }

    /// The masses that one gradient averages, times the upstream gradients.
    fn scale(&self, bit: u32) -> Result<Buffer> {
        let Operands { kind, .. } = self.call.operands;
        let (stride, class_tiles) = (
            self.call.operands.mass_stride(),
            self.call.operands.class_tiles(),
        );
        let scaled = self.call.gpu.buffer(self.len * stride * kind.size)?;
        let params = ScaleMassesParams {
            masses: self.of_rows(self.masses),
            keep: self.keep + (self.first_row / TILE * class_tiles) as u64,
            p_scale: match self.p_scale {
                0 => 0,
                p_scale => p_scale + self.first_row as u64 * 4,
            },
            count: self.call.rows.count.address,
            scaled: scaled.address,
            first_row: self.first_row as u32,
            class_tiles: class_tiles as u32,
            mass_stride: stride as u32,
            bit,
        };
        let name = kind.kernel("scale_masses");
        self.call
            .gpu
            .launch(&Kernel::new(AVERAGES, name, (self.len, 1), 256), &params)?;
        Ok(scaled)
    }

    /// The sum of each tile's masses, times `scale`.
    fn sum(&self, masses: u64, scale: f32) -> Result<Buffer> {
        let tiles = self.call.operands.class_tiles();
        let sums = self.call.gpu.buffer(tiles * 4)?;
        let params = SumMassesParams {
            masses,
            row_scale: self.row_scale,
            count: self.call.rows.count.address,
            sums: sums.address,
            first_row: self.first_row as u32,
            rows: self.len as u32,
            class_tiles: tiles as u32,
            mass_stride: self.call.operands.mass_stride() as u32,
            scale,
        };
        let name = self.call.operands.kind.kernel("sum_masses");
        self.call.gpu.launch(
            &Kernel::new(AVERAGES, name, (tiles.div_ceil(32), 1), ONE_BLOCK),
            &params,
        )?;
        Ok(sums)
    }

    /// A matrix of masses as a gradient whose classes are the tiles.
    fn part(&self, masses: u64) -> Range {
        Range {
            classes: self.call.operands.mass_stride(),
            stride: self.call.operands.mass_stride(),
            first_row: self.first_row,
            rows: self.len,
            gradient: masses,
            ..Default::default()
        }
    }

    /// `scale` is the address of a factor of the gradient of the classifier, 0 for 1.
    fn multiply(&self, classifier: u64, scale: u64, part: Range) -> Result<()> {
        let operands = Operands {
            classifier: ClassifierParams {
                own: classifier,
                ..self.call.operands.classifier
            },
            vocab: self.call.operands.class_tiles(),
            // What is made of these is padded too.
            embedding_columns: self.call.operands.hidden,
            ..self.call.operands
        };
        match self.gathered {
            None => portable::products(self.call.gpu, operands, self.call.rows, scale, part),
            Some(gathered) => {
                let count = self.call.rows.count.address;
                hopper::products(self.call.gpu, operands, count, scale, part, gathered)
            }
        }
    }

    /// `into` `(class tiles, hidden)` becomes the sum of the rows of E, each times its mass in the tile, times what is at
    /// `scale`.
    fn classes(&self, masses: u64, scale: u64, into: &Buffer) -> Result<()> {
        let part = Range {
            classifier_grad: into.address,
            ..self.part(masses)
        };
        self.multiply(self.call.operands.classifier.own, scale, part)
    }

    /// `sums` `(rows, hidden)` becomes the sum of the tiles' mean classes, each times the row's mass in the tile.
    fn embeddings(&self, masses: u64, mean_classes: &Buffer, sums: u64) -> Result<()> {
        let part = Range {
            sums,
            ..self.part(masses)
        };
        self.multiply(mean_classes.address, 0, part)
    }
}

fn address(buffer: &Option<Buffer>) -> u64 {
    buffer.as_ref().map_or(0, |buffer| buffer.address)
}
