//! Norms, gated activations and rotary embeddings.

use super::{differentiated, random, tensor, var, Numbers, Operation, Random, Want};
use candle_core::{DType, Device, Result};
use candle_cut_cross_entropy::ops::{add_rms_norm, geglu, rms_norm, rope, swiglu};

/// `rms_norm`, or `add_rms_norm` of two tensors.
pub struct Norm {
    pub dtype: DType,
    pub rows: usize,
    pub size: usize,
    pub offset: f64,
    pub adds: bool,
}

const EPS: f64 = 1e-3;

struct NormInputs {
    x: Vec<f64>,
    residual: Vec<f64>,
    weight: Vec<f64>,
    of_sum: Vec<f64>,
    of_normed: Vec<f64>,
}

impl Norm {
    fn inputs(&self) -> NormInputs {
        let mut source = Random::new((self.rows * 1000 + self.size) as u64);
        let mut next = |count, scale| random(&mut source, self.dtype, count, scale);
        let count = self.rows * self.size;
        NormInputs {
            x: next(count, 2.),
            residual: next(count, 1.),
            weight: next(self.size, 1.),
            of_sum: next(count, 1.),
            of_normed: next(count, 1.),
        }
    }
}

impl Operation for Norm {
    fn describe(&self) -> String {
        let name = if self.adds {
            "add_rms_norm"
        } else {
            "rms_norm"
        };
        format!(
            "{name} ({}, {}), offset {}",
            self.rows, self.size, self.offset
        )
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn computed(&self, device: &Device) -> Result<Vec<Numbers>> {
        let inputs = self.inputs();
        let shape = [self.rows, self.size];
        let x = var(&inputs.x, &shape, self.dtype, device)?;
        let weight = var(&inputs.weight, &[self.size], self.dtype, device)?;
        if !self.adds {
            let y = rms_norm(&x, &weight, EPS, self.offset)?;
            return differentiated(
                &[("normed", y)],
                &[&inputs.of_normed],
                &[("dx", &x), ("dweight", &weight)],
            );
        }
        let residual = var(&inputs.residual, &shape, self.dtype, device)?;
        let (sum, normed) = add_rms_norm(&x, &residual, &weight, EPS, self.offset)?;
        differentiated(
            &[("sum", sum), ("normed", normed)],
            &[&inputs.of_sum, &inputs.of_normed],
            &[("dx", &x), ("dresidual", &residual), ("dweight", &weight)],
        )
    }

    fn wanted(&self) -> Vec<Want> {
        let inputs = self.inputs();
        let sum: Vec<f64> = match self.adds {
            true => {
                let both = inputs.x.iter().zip(&inputs.residual);
                both.map(|(a, b)| super::round_to(self.dtype, a + b))
                    .collect()
            }
            false => inputs.x.clone(),
        };
        let (mut normed, mut of_x) = (vec![0.; sum.len()], vec![0.; sum.len()]);
        let mut of_weight = vec![0.; self.size];
        for row in 0..self.rows {
            let at = row * self.size..(row + 1) * self.size;
            let (x, upstream) = (&sum[at.clone()], &inputs.of_normed[at.clone()]);
            let mean = x.iter().map(|x| x * x).sum::<f64>() / self.size as f64;
            let rms = (mean + EPS).sqrt();
            let scaled = |i: usize| upstream[i] * (self.offset + inputs.weight[i]);
            let along: f64 = (0..self.size).map(|i| scaled(i) * x[i]).sum();
            for i in 0..self.size {
                normed[at.start + i] = x[i] / rms * (self.offset + inputs.weight[i]);
                of_weight[i] += upstream[i] * x[i] / rms;
                of_x[at.start + i] =
                    scaled(i) / rms - x[i] * along / (self.size as f64 * rms.powi(3));
            }
        }
        let normed = Want::new("normed", normed);
        let of_weight = Want::new("dweight", of_weight);
        if !self.adds {
            return vec![normed, Want::new("dx", of_x), of_weight];
        }
        let through: Vec<f64> = of_x
            .iter()
            .zip(&inputs.of_sum)
            .map(|(a, b)| a + b)
            .collect();
        vec![
            Want::new("sum", sum),
            normed,
            Want::new("dx", through.clone()),
            Want::new("dresidual", through),
            of_weight,
        ]
    }
}

pub fn norms(dtype: DType) -> Vec<Box<dyn Operation>> {
    let mut cases: Vec<Box<dyn Operation>> = Vec::new();
    for (i, rows) in [1, 7, 65, 130, 700].into_iter().enumerate() {
        for (j, size) in [3, 7, 64, 80, 130, 576, 2048].into_iter().enumerate() {
            cases.push(Box::new(Norm {
                dtype,
                rows,
                size,
                offset: ((i + j) % 2) as f64,
                adds: (i + j) % 3 == 0,
            }));
        }
    }
    cases
}

/// `swiglu` or `geglu`, of tensors of their own or of views of one projection.
pub struct Gated {
    pub dtype: DType,
    pub rows: usize,
    pub columns: usize,
    pub gelu: bool,
    pub views: bool,
}

impl Gated {
    /// Gate, up and the upstream gradient.
    fn inputs(&self) -> [Vec<f64>; 3] {
        let mut source = Random::new((self.rows * 777 + self.columns) as u64);
        [3., 1., 1.].map(|scale| {
            let count = self.rows * self.columns;
            random(&mut source, self.dtype, count, scale)
        })
    }

    /// The rows of two matrices side by side.
    fn beside(&self, a: &[f64], b: &[f64]) -> Vec<f64> {
        let rows = a.chunks(self.columns).zip(b.chunks(self.columns));
        rows.flat_map(|(a, b)| a.iter().chain(b).copied()).collect()
    }
}

impl Operation for Gated {
    fn describe(&self) -> String {
        let name = if self.gelu { "geglu" } else { "swiglu" };
        format!(
            "{name} ({}, {}), views {}",
            self.rows, self.columns, self.views
        )
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn computed(&self, device: &Device) -> Result<Vec<Numbers>> {
        let [gate, up, upstream] = self.inputs();
        let apply = if self.gelu { geglu } else { swiglu };
        let columns = self.columns;
        if self.views {
            let both = self.beside(&gate, &up);
            let both = var(&both, &[self.rows, 2 * columns], self.dtype, device)?;
            let y = apply(
                &both.narrow(1, 0, columns)?,
                &both.narrow(1, columns, columns)?,
            )?;
            return differentiated(&[("y", y)], &[&upstream], &[("dboth", &both)]);
        }
        let shape = [self.rows, columns];
        let gate = var(&gate, &shape, self.dtype, device)?;
        let up = var(&up, &shape, self.dtype, device)?;
        let y = apply(&gate, &up)?;
        differentiated(&[("y", y)], &[&upstream], &[("dgate", &gate), ("dup", &up)])
    }

    fn wanted(&self) -> Vec<Want> {
        let [gate, up, upstream] = self.inputs();
        let activation = |x: f64| match self.gelu {
            true => {
                let k = (2. / std::f64::consts::PI).sqrt();
                let tanh = (k * (x + 0.044715 * x.powi(3))).tanh();
                let inner = k * (1. + 3. * 0.044715 * x * x);
                (
                    0.5 * x * (1. + tanh),
                    0.5 * (1. + tanh) + 0.5 * x * (1. - tanh * tanh) * inner,
                )
            }
            false => {
                let sigmoid = 1. / (1. + (-x).exp());
                (x * sigmoid, sigmoid + x * sigmoid * (1. - sigmoid))
            }
        };
        let (mut y, mut of_gate, mut of_up) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..gate.len() {
            let (value, slope) = activation(gate[i]);
            y.push(value * up[i]);
            of_gate.push(upstream[i] * up[i] * slope);
            of_up.push(upstream[i] * value);
        }
        let y = Want::new("y", y);
        match self.views {
            true => vec![y, Want::new("dboth", self.beside(&of_gate, &of_up))],
            false => vec![y, Want::new("dgate", of_gate), Want::new("dup", of_up)],
        }
    }
}

pub fn gated(dtype: DType) -> Vec<Box<dyn Operation>> {
    let mut cases: Vec<Box<dyn Operation>> = Vec::new();
    for (i, rows) in [1, 7, 65, 130].into_iter().enumerate() {
        for (j, columns) in [1, 7, 64, 80, 257, 3000].into_iter().enumerate() {
            cases.push(Box::new(Gated {
                dtype,
                rows,
                columns,
                gelu: (i + j) % 2 == 0,
                views: (i + j) % 3 != 0,
            }));
        }
    }
    cases
}

/// Queries as a view of a projection that holds as many other heads after them.
pub struct Rope {
    pub dtype: DType,
    pub batch: usize,
    pub time: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub pairs: usize,
}

impl Rope {
    fn size(&self) -> usize {
        self.batch * self.time * self.heads * self.head_dim
    }

    /// The projection, cosines, sines and the upstream gradient.
    fn inputs(&self) -> [Vec<f64>; 4] {
        let mut source = Random::new((self.time * 31 + self.head_dim) as u64);
        let x = random(&mut source, self.dtype, 2 * self.size(), 1.);
        let angle = |i: usize| {
            let (time, pair) = (i / self.pairs, i % self.pairs);
            time as f64 * 10f64.powf(-4. * pair as f64 / self.pairs as f64)
        };
        let angles: Vec<f64> = (0..self.time * self.pairs).map(angle).collect();
        // Angles are given in f32 to half precision.
        let dtype = self.angle_dtype();
        let rounded = |f: fn(f64) -> f64| -> Vec<f64> {
            let values = angles.iter().map(|angle| f(*angle));
            values.map(|x| super::round_to(dtype, x)).collect()
        };
        let upstream = random(&mut source, self.dtype, self.size(), 1.);
        [x, rounded(f64::cos), rounded(f64::sin), upstream]
    }

    fn angle_dtype(&self) -> DType {
        match self.dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        }
    }

    /// The position of each head, and where the head begins in the projection.
    fn heads(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.batch * self.time * self.heads).map(|row| {
            let (position, head) = (row / self.heads, row % self.heads);
            (
                position % self.time,
                (position * 2 * self.heads + head) * self.head_dim,
            )
        })
    }

    /// A head turned by the angles of a position, or back.
    fn turned(&self, x: &[f64], cos: &[f64], sin: &[f64], direction: f64) -> Vec<f64> {
        let mut y = x.to_vec();
        for i in 0..self.pairs {
            let (a, b) = (x[i], x[i + self.pairs]);
            y[i] = a * cos[i] - b * direction * sin[i];
            y[i + self.pairs] = b * cos[i] + a * direction * sin[i];
        }
        y
    }
}

impl Operation for Rope {
    fn describe(&self) -> String {
        format!(
            "rope ({}, {}, {}, {}), {} pairs",
            self.batch, self.time, self.heads, self.head_dim, self.pairs
        )
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn computed(&self, device: &Device) -> Result<Vec<Numbers>> {
        let [x, cos, sin, upstream] = self.inputs();
        let shape = [self.batch, self.time, 2 * self.heads, self.head_dim];
        let x = var(&x, &shape, self.dtype, device)?;
        let shape = [self.time, self.pairs];
        let cos = tensor(&cos, &shape, self.angle_dtype(), device)?;
        let sin = tensor(&sin, &shape, self.angle_dtype(), device)?;
        let y = rope(&x.narrow(2, 0, self.heads)?, &cos, &sin)?;
        differentiated(&[("y", y)], &[&upstream], &[("dx", &x)])
    }

    fn wanted(&self) -> Vec<Want> {
        let [x, cos, sin, upstream] = self.inputs();
        let mut y = Vec::new();
        let mut of_x = vec![0.; x.len()];
        let rows: Vec<(usize, usize)> = self.heads().collect();
        for ((time, start), upstream) in rows.into_iter().zip(upstream.chunks(self.head_dim)) {
            let at = start..start + self.head_dim;
            let cos = &cos[time * self.pairs..];
            let sin = &sin[time * self.pairs..];
            y.extend(self.turned(&x[at.clone()], cos, sin, 1.));
            of_x[at].copy_from_slice(&self.turned(upstream, cos, sin, -1.));
        }
        vec![Want::new("y", y), Want::new("dx", of_x)]
    }
}

pub fn ropes(dtype: DType) -> Vec<Box<dyn Operation>> {
    let mut cases: Vec<Box<dyn Operation>> = Vec::new();
    for time in [1, 7, 65, 130] {
        for (head_dim, pairs) in [(6, 3), (64, 32), (80, 40), (96, 24), (128, 64), (256, 32)] {
            cases.push(Box::new(Rope {
                dtype,
                batch: 2,
                time,
                heads: 3,
                head_dim,
                pairs,
            }));
        }
    }
    cases
}
