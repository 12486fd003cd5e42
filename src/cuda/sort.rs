//! `cuda/sort.cu`: keys and values by key.

use super::launch::{Array, Gpu, Kernel, ONE_BLOCK, SORT};
use super::params::sort::SortParams;
use candle_core::Result;

const DIGIT_BITS: u32 = 9;
const THREADS: u32 = 256;
/// Keys of a block.
const TILE: usize = 4096;

pub(super) struct Pairs {
    pub keys: Array<u32>,
    pub values: Array<u32>,
    pub count: usize,
}

impl Pairs {
    /// Not initialised.
    pub fn new(gpu: &Gpu, count: usize) -> Result<Self> {
        Ok(Self {
            keys: gpu.array(count)?,
            values: gpu.array(count)?,
            count,
        })
    }

    /// By key; those of the same key in the order they have. No key is larger than `largest`.
    pub fn sorted(self, gpu: &Gpu, largest: u32) -> Result<Self> {
        let bits = u32::BITS - largest.leading_zeros();
        let tiles = self.count.div_ceil(TILE);
        let places = gpu.array::<u32>(tiles << DIGIT_BITS)?;
        let (mut from, mut to) = (self, None);
        for shift in (0..bits).step_by(DIGIT_BITS as usize) {
            let into = match to.take() {
                Some(into) => into,
                None => Self::new(gpu, from.count)?,
            };
            let params = SortParams {
                keys: from.keys.address,
                values: from.values.address,
                sorted_keys: into.keys.address,
                sorted_values: into.values.address,
                places: places.address,
                count: from.count as u32,
                tiles: tiles as u32,
                shift,
                unused: 0,
            };
            let by_tile = |name| Kernel::new(SORT, name, (tiles, 1), THREADS);
            gpu.launch(&by_tile("count_digits"), &params)?;
            let one_block = Kernel::new(SORT, "first_places", (1, 1), ONE_BLOCK);
            gpu.launch(&one_block, &params)?;
            gpu.launch(&by_tile("place"), &params)?;
            to = Some(std::mem::replace(&mut from, into));
        }
        Ok(from)
    }
}
