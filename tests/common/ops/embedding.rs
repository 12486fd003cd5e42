//! Rows of a table.

use super::{differentiated, random, var, Numbers, Operation, Random, Want};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_cut_cross_entropy::{backward, linear_cross_entropy, ops::embedding, Options};

pub struct Lookup {
    pub dtype: DType,
    pub vocab: usize,
    pub columns: usize,
    pub ids: usize,
    /// Every other place has the same row.
    pub frequent: bool,
}

impl Lookup {
    fn ids(&self) -> Vec<u32> {
        let mut source = Random::new((self.vocab * 31 + self.ids) as u64);
        let mut id = |i: usize| match self.frequent && i.is_multiple_of(2) {
            true => self.vocab as u32 - 1,
            false => ((source.uniform() * self.vocab as f64) as u32).min(self.vocab as u32 - 1),
        };
        (0..self.ids).map(&mut id).collect()
    }

    /// The table and the upstream gradient.
    fn inputs(&self) -> [Vec<f64>; 2] {
        let mut source = Random::new((self.vocab * 17 + self.columns) as u64);
        [self.vocab, self.ids].map(|rows| random(&mut source, self.dtype, rows * self.columns, 1.))
    }
}

impl Operation for Lookup {
    fn describe(&self) -> String {
        format!(
            "embedding of {} ids in ({}, {}), frequent {}",
            self.ids, self.vocab, self.columns, self.frequent
        )
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn computed(&self, device: &Device) -> Result<Vec<Numbers>> {
        let [table, upstream] = self.inputs();
        let table = var(&table, &[self.vocab, self.columns], self.dtype, device)?;
        let ids = Tensor::new(self.ids(), device)?;
        let y = embedding(&table, &ids)?;
        differentiated(&[("y", y)], &[&upstream], &[("dtable", &table)])
    }

    fn wanted(&self) -> Vec<Want> {
        let [table, upstream] = self.inputs();
        let mut y = Vec::new();
        let mut of_table = vec![0.; table.len()];
        for (id, upstream) in self.ids().iter().zip(upstream.chunks(self.columns)) {
            let at = *id as usize * self.columns;
            y.extend(&table[at..at + self.columns]);
            for (sum, value) in of_table[at..].iter_mut().zip(upstream) {
                *sum += value;
            }
        }
        vec![Want::new("y", y), Want::new("dtable", of_table)]
    }
}

pub fn lookups(dtype: DType) -> Vec<Box<dyn Operation>> {
    let sizes = [(1, 1, 1), (7, 5, 20), (300, 80, 1500), (50, 257, 700)];
    let mut cases: Vec<Box<dyn Operation>> = Vec::new();
    for (vocab, columns, ids) in sizes {
        for frequent in [false, true] {
            cases.push(Box::new(Lookup {
                dtype,
                vocab,
                columns,
                ids,
                frequent,
            }));
        }
    }
    cases
}

/// The gradient of a table that is the head too, by [`backward`] and by Candle's.
pub fn of_tied_head(dtype: DType, device: &Device) -> Result<[Tensor; 2]> {
    let (vocab, columns, count) = (40, 24, 300);
    let mut source = Random::new(7);
    let mut next = |rows: usize| random(&mut source, dtype, rows * columns, 0.3);
    let table: Var = var(&next(vocab), &[vocab, columns], dtype, device)?;
    let more = super::tensor(&next(count), &[count, columns], dtype, device)?;
    let ids: Vec<u32> = (0..count).map(|i| (i * i % vocab) as u32).collect();
    let ids = Tensor::new(ids, device)?;
    let hidden = (embedding(&table, &ids)? + more)?;
    let loss = linear_cross_entropy(&hidden, &table, &ids, &Options::default())?.loss;
    let gradients = [backward(&loss)?, loss.backward()?];
    let of = |i: usize| -> Result<Tensor> {
        let gradient = gradients[i].get(&table).expect("a gradient");
        gradient.to_dtype(DType::F64)?.to_device(&Device::Cpu)
    };
    Ok([of(0)?, of(1)?])
}
