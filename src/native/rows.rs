//! The positions that count, picked on the host.

use crate::problem::Problem;
use crate::terms::Terms;
use crate::Reduction;
use candle_core::{DType, Device, Result};

/// The target of a row whose class is in the shard of another rank. No row of a classifier has this number.
pub(crate) const ELSEWHERE: u32 = u32::MAX;

/// The positions that count: parallel lists, in the order of the positions.
#[derive(Debug, Clone)]
pub(crate) struct HostRows {
    /// Row of the embeddings.
    pub embedding: Vec<u32>,
    /// Position in the result.
    pub position: Vec<u32>,
    /// Row of the classifier, or [`ELSEWHERE`].
    pub target: Vec<u32>,
    /// Positions in the result, counting or not.
    pub positions: usize,
    /// Whether these are all rows of the embeddings, in order.
    pub all: bool,
    /// Of every row.
    terms: Terms,
    weights: Option<HostWeights>,
}

/// [`Weights`](crate::terms::Weights) of the rows.
#[derive(Debug, Clone)]
struct HostWeights {
    terms: Vec<Terms>,
    total: f64,
}

impl HostRows {
    /// # Errors
    /// A target outside `[0, V)` that is not ignore_index: the first one is named. Where the classes are sharded this
    /// is found out later, see [`Problem::check_shards`].
    pub fn new(problem: &Problem) -> Result<Self> {
        let targets = problem
            .targets
            .to_device(&Device::Cpu)?
            .to_dtype(DType::I64)?
            .to_vec1::<i64>()?;
        let positions = problem.positions;
        let vocab = problem.vocab();
        let mut rows = Self {
            embedding: Vec::with_capacity(positions.len()),
            position: Vec::with_capacity(positions.len()),
            target: Vec::with_capacity(positions.len()),
            positions: positions.len(),
            all: false,
            terms: problem.settings.terms,
            weights: None,
        };
        for position in 0..positions.len() {
            let row = positions.row(position);
            let target = targets[row + positions.shift];
            if target == problem.settings.ignore_index {
                continue;
            }
            let class = match &problem.settings.vocab_parallel {
                Some(shard) => shard.local(target).unwrap_or(ELSEWHERE),
                None if (0..vocab as i64).contains(&target) => target as u32,
                None => return Err(problem.bad_target(row + positions.shift, target)),
            };
            rows.embedding.push(row as u32);
            rows.position.push(position as u32);
            rows.target.push(class);
        }
        rows.all = rows.len() == positions.rows();
        if let Some(weights) = &problem.weights {
            let terms = weights.terms.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            let of = |kind: usize, position: &u32| terms[kind][*position as usize];
            let of_row = |position| Terms {
                nll: of(0, position),
                lse: of(1, position),
                square: of(2, position),
                rest: of(3, position),
                named: of(4, position),
                entropy: of(5, position),
            };
            rows.weights = Some(HostWeights {
                terms: rows.position.iter().map(of_row).collect(),
                total: weights.total.to_dtype(DType::F64)?.to_vec1::<f64>()?[0],
            });
        }
        Ok(rows)
    }

    pub fn len(&self) -> usize {
        self.target.len()
    }

    /// What the loss of a row is made of.
    pub fn terms(&self, row: usize) -> Terms {
        match &self.weights {
            None => self.terms,
            Some(weights) => weights.terms[row],
        }
    }

    /// For each row, the number of ranks among this one that have its target: 1 or 0.
    pub fn here(&self) -> Vec<f32> {
        let here = |target: &u32| f32::from(u8::from(*target != ELSEWHERE));
        self.target.iter().map(here).collect()
    }

    /// What the reduced loss multiplies the sum of the losses by.
    pub fn scale(&self, reduction: Reduction) -> f64 {
        let total = match &self.weights {
            None => self.len() as f64,
            Some(weights) => weights.total,
        };
        match reduction {
            Reduction::Mean if total != 0. => 1. / total,
            _ => 1.,
        }
    }
}
