//! The CUDA kernels: which can run, what they are launched on, and their workspace.
//!
//! Nothing here waits for the device. How many rows count, which tiles the filter keeps and what the upstream
//! gradient is stay there; launches are sized for the most there can be, and blocks without work leave at once.

mod launch;
mod params;

use crate::op::{self, Gradients, KeptTiles, Wanted};
use crate::problem::{Matrices, Problem, Settings};
use crate::Reduction;
use candle_core::{bail, DType, Device, Result, Tensor};
use launch::{Array, Buffer, Gpu};
use params::*;
use std::sync::Arc;

pub(crate) const DEFAULT_WORKSPACE: usize = 256 << 20;

/// Rows and classes of a tile of the gradient filter, and rows of a block.
const TILE: usize = 128;
const THREADS: u32 = 256;
const ONE_BLOCK: u32 = 1024;
/// Bytes of row maxima that a forward holds at once.
const MAXIMA_BYTES: usize = 8 << 20;
/// Bytes of embeddings that blocks running at the same time share in the L2 cache.
const PANEL_BYTES: usize = 18 << 20;
/// Blocks of a forward launch, per multiprocessor.
const WAVES: usize = 4;

/// Why the kernels cannot run on this problem, if they cannot.
pub(crate) fn unsupported(problem: &Problem) -> Result<Option<String>> {
    let Device::Cuda(device) = problem.embeddings.device() else {
        return Ok(Some(format!(
            "the inputs are on {:?}",
            problem.embeddings.device().location()
        )));
    };
    let dtype = problem.embeddings.dtype();
    if !matches!(dtype, DType::BF16 | DType::F16 | DType::F32) {
        return Ok(Some(format!("there are none for {dtype:?}")));
    }
    let (major, minor) = Gpu::new(device).compute_capability()?;
    if major < 8 {
        return Ok(Some(format!(
            "they need compute capability 8.0, this GPU has {major}.{minor}"
        )));
    }
    Ok(None)
}

/// What depends on the dtype.
#[derive(Debug, Clone, Copy)]
struct Kind {
    suffix: &'static str,
    size: usize,
    /// Classes of a block of the forward, of the gradient of the logits (all tiles kept, or some), and
    /// columns of a block of the products.
    columns: usize,
}

impl Kind {
    fn of(dtype: DType) -> Result<Self> {
        let kind = |suffix, size, columns| Kind {
            suffix,
            size,
            columns,
        };
        Ok(match dtype {
            DType::BF16 => kind("bf16", 2, 256),
            DType::F16 => kind("f16", 2, 256),
            DType::F32 => kind("f32", 4, 128),
            dtype => bail!("no CUDA kernels for {dtype:?}"),
        })
    }

    fn kernel(self, name: &str) -> String {
        format!("{name}_{}", self.suffix)
    }

    /// Shared memory of a pipeline whose blocks are `columns` wide: 4 stages of 64 bytes a row.
    fn stages(columns: usize) -> usize {
        4 * 64 * (TILE + columns)
    }
}

/// The addresses of a problem's matrices and what every kernel wants to know of them.
#[derive(Debug, Clone, Copy)]
struct Operands {
    embeddings: u64,
    classifier: u64,
    bias: u64,
    hidden: usize,
    vocab: usize,
    softcap: f32,
    kind: Kind,
    /// Whether every row of both matrices begins on 16 bytes.
    aligned: bool,
}

impl Operands {
    /// Runs `with` while the matrices are held for reading.
    fn read<R>(
        gpu: &Gpu,
        matrices: Matrices<'_>,
        settings: &Settings,
        with: impl FnOnce(Operands) -> Result<R>,
    ) -> Result<R> {
        let (vocab, hidden) = matrices.classifier.dims2()?;
        let kind = Kind::of(matrices.classifier.dtype())?;
        gpu.read(matrices.embeddings, |embeddings| {
            gpu.read(matrices.classifier, |classifier| {
                let operands = |bias| Operands {
                    embeddings,
                    classifier,
                    bias,
                    hidden,
                    vocab,
                    softcap: settings.softcap.unwrap_or(0.) as f32,
                    kind,
                    aligned: hidden * kind.size % 16 == 0
                        && embeddings % 16 == 0
                        && classifier % 16 == 0,
                };
                match matrices.bias {
                    None => with(operands(0)),
                    Some(bias) => gpu.read(bias, |bias| with(operands(bias))),
                }
            })
        })
    }

    fn class_tiles(&self) -> usize {
        self.vocab.div_ceil(TILE)
    }
}

/// The rows that count, as the device knows them.
struct Rows {
    /// The most there can be: positions of the result.
    positions: usize,
    embedding: Buffer,
    position: Buffer,
    target: Buffer,
    /// Rows that count, index of the first target out of range.
    count: Array<u32>,
}

impl Rows {
    fn pick(gpu: &Gpu, problem: &Problem, packed: u64) -> Result<Self> {
        let positions = problem.positions;
        let n = positions.len();
        let rows = Self {
            positions: n,
            embedding: gpu.buffer(n * 4)?,
            position: gpu.buffer(n * 4)?,
            target: gpu.buffer(n * 4)?,
            count: gpu.array(2)?,
        };
        let kernel = match problem.targets.dtype() {
            DType::I64 => "pick_rows_i64",
            DType::U32 => "pick_rows_u32",
            DType::I32 => "pick_rows_i32",
            dtype => bail!("targets must be i64, u32 or i32, got {dtype:?}"),
        };
        gpu.read(&problem.targets, |targets| {
            let params = PickParams {
                targets,
                row_embedding: rows.embedding.address,
                row_position: rows.position.address,
                row_target: rows.target.address,
                count: rows.count.address,
                packed,
                ignore_index: problem.settings.ignore_index,
                positions: n as u32,
                time: positions.time as u32,
                shift: positions.shift as u32,
                vocab: problem.vocab() as u32,
            };
            gpu.launch(launch::ROWS, kernel, (1, 1), ONE_BLOCK, 0, &params)
        })?;
        if problem.settings.check_targets {
            let index = gpu.to_host(&rows.count)?[1];
            if index != u32::MAX {
                let target = problem.targets.get(index as usize)?.to_dtype(DType::I64)?;
                return Err(problem.bad_target(index as usize, target.to_scalar()?));
            }
        }
        Ok(rows)
    }
}

struct Saved {
    gpu: Gpu,
    rows: Rows,
    row_max: Buffer,
    row_log_sum: Buffer,
    /// `(row tiles, class tiles)`, where something is filtered.
    keep: Option<Buffer>,
    settings: Settings,
    kept: Arc<KeptTiles>,
}

pub(crate) fn forward(
    problem: &Problem,
    wanted: Wanted,
    kept: &Arc<KeptTiles>,
) -> Result<op::Forward> {
    let Device::Cuda(device) = problem.embeddings.device() else {
        bail!(
            "expected CUDA tensors, got {:?}",
            problem.embeddings.device().location()
        )
    };
    let gpu = Gpu::new(device);
    let settings = &problem.settings;
    let n = problem.positions.len();
    let packed = gpu.unfinished(DType::F32, 2 * n + 1, false)?;
    let rows = Rows::pick(&gpu, problem, packed.address)?;
    let (row_max, row_log_sum) = (gpu.buffer(n * 4)?, gpu.buffer(n * 4)?);
    let detached = (
        problem.embeddings.detach(),
        problem.classifier.detach(),
        problem.bias.as_ref().map(Tensor::detach),
    );
    let matrices = Matrices {
        embeddings: &detached.0,
        classifier: &detached.1,
        bias: detached.2.as_ref(),
    };
    let keep = Operands::read(&gpu, matrices, settings, |operands| {
        let thresholds = (
            settings.filter_embeddings.filter(|_| wanted.embeddings),
            settings
                .filter_classifier
                .filter(|_| wanted.classifier || wanted.bias),
        );
        // A gradient that is not wanted must not keep a tile: its threshold is above every gradient.
        let threshold = |filter: Option<f64>, wanted: bool| match filter {
            Some(eps) => eps as f32,
            None if wanted => -1.,
            None => f32::INFINITY,
        };
        let filter = (thresholds.0.is_some() || thresholds.1.is_some()).then(|| {
            [
                threshold(thresholds.0, wanted.embeddings),
                threshold(thresholds.1, wanted.classifier || wanted.bias),
            ]
        });
        logits(
            &gpu,
            operands,
            &rows,
            &row_max,
            &row_log_sum,
            packed.address,
            filter,
        )
    })?;
    let mean = u32::from(settings.reduction == Reduction::Mean);
    let params = LossParams {
        packed: packed.address,
        count: rows.count.address,
        positions: n as u32,
        mean,
    };
    gpu.launch(launch::ROWS, "reduce_loss", (1, 1), ONE_BLOCK, 0, &params)?;
    Ok(op::Forward {
        packed: packed.finish(&gpu),
        backward: Box::new(Saved {
            gpu,
            rows,
            row_max,
            row_log_sum,
            keep,
            settings: settings.clone(),
            kept: kept.clone(),
        }),
    })
}

/// lse and nll of every row, group of rows by group, and the tiles that a filter with these thresholds (of the
/// gradient of the embeddings, of the classifier) keeps.
fn logits(
    gpu: &Gpu,
    operands: Operands,
    rows: &Rows,
    row_max: &Buffer,
    row_log_sum: &Buffer,
    packed: u64,
    filter: Option<[f32; 2]>,
) -> Result<Option<Buffer>> {
    let kind = operands.kind;
    let class_tiles = operands.class_tiles();
    let all_rows = rows.positions.next_multiple_of(TILE);
    let mut group_rows = PANEL_BYTES / (operands.hidden * kind.size);
    if filter.is_some() {
        group_rows = group_rows.min(MAXIMA_BYTES / (class_tiles * 2));
    }
    let group_rows = (group_rows / TILE * TILE).clamp(TILE, all_rows);
    let row_tiles = group_rows / TILE;
    let splits = (WAVES * gpu.multiprocessors()? / row_tiles)
        .clamp(1, operands.vocab.div_ceil(kind.columns));

    let target_logit = gpu.buffer(rows.positions * 4)?;
    let partials = gpu.buffer(splits * group_rows * 8)?;
    let filtering = match filter {
        None => None,
        Some(thresholds) => Some((
            thresholds,
            gpu.buffer(class_tiles * group_rows * 2)?,
            gpu.buffer(all_rows / TILE * class_tiles)?,
        )),
    };
    for first_row in (0..all_rows).step_by(group_rows) {
        let params = ForwardParams {
            embeddings: operands.embeddings,
            classifier: operands.classifier,
            bias: operands.bias,
            row_embedding: rows.embedding.address,
            row_target: rows.target.address,
            count: rows.count.address,
            partials: partials.address,
            target_logit: target_logit.address,
            maxima: filtering
                .as_ref()
                .map_or(0, |(_, maxima, _)| maxima.address),
            hidden: operands.hidden as i64,
            vocab: operands.vocab as i64,
            first_row: first_row as u32,
            group_rows: group_rows as u32,
            splits: splits as u32,
            softcap: operands.softcap,
            aligned: operands.aligned.into(),
        };
        let shared = Kind::stages(kind.columns) + 4 * TILE * 4 + TILE * 4;
        gpu.launch(
            launch::FORWARD_SM80,
            &kind.kernel("forward_sm80"),
            (row_tiles * splits, 1),
            THREADS,
            shared,
            &params,
        )?;
        let params = MergeParams {
            partials: partials.address,
            target_logit: target_logit.address,
            row_position: rows.position.address,
            row_target: rows.target.address,
            count: rows.count.address,
            row_max: row_max.address,
            row_log_sum: row_log_sum.address,
            packed,
            first_row: first_row as u32,
            group_rows: group_rows as u32,
            splits: splits as u32,
            positions: rows.positions as u32,
        };
        let blocks = (row_tiles, 1);
        gpu.launch(
            launch::ROWS,
            "merge_partials",
            blocks,
            TILE as u32,
            0,
            &params,
        )?;
        if let Some((thresholds, maxima, keep)) = &filtering {
            let params = KeepParams {
                maxima: maxima.address,
                row_max: row_max.address,
                row_log_sum: row_log_sum.address,
                row_target: rows.target.address,
                count: rows.count.address,
                keep: keep.address,
                first_row: first_row as u32,
                group_rows: group_rows as u32,
                class_tiles: class_tiles as u32,
                embeddings_threshold: thresholds[0],
                classifier_threshold: thresholds[1],
            };
            // The last group may reach beyond the rows that `keep` has room for.
            let row_tiles = row_tiles.min((all_rows - first_row) / TILE);
            let blocks = (class_tiles, row_tiles);
            gpu.launch(launch::ROWS, "keep_tiles", blocks, TILE as u32, 0, &params)?;
        }
    }
    Ok(filtering.map(|(_, _, keep)| keep))
}

impl op::Backward for Saved {
    fn backward(
        &self,
        matrices: Matrices<'_>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        let gpu = &self.gpu;
        let dtype = matrices.classifier.dtype();
        let (vocab, hidden) = matrices.classifier.dims2()?;
        // Rows that do not count are never written.
        let de = match wanted.embeddings {
            true => Some(gpu.unfinished(dtype, matrices.embeddings.shape(), true)?),
            false => None,
        };
        let dc = match wanted.classifier {
            true => Some(gpu.unfinished(dtype, (vocab, hidden), false)?),
            false => None,
        };
        let db = match wanted.bias {
            true => Some(gpu.unfinished(dtype, vocab, false)?),
            false => None,
        };
        let n = self.rows.positions;
        let scales = Scales {
            p: gpu.buffer(n * 4)?,
            target: gpu.buffer(n * 4)?,
            result: gpu.buffer(4)?,
        };
        gpu.read(upstream, |upstream| {
            let params = ScaleParams {
                upstream,
                row_position: self.rows.position.address,
                count: self.rows.count.address,
                p_scale: scales.p.address,
                target_scale: scales.target.address,
                scale: scales.result.address,
                positions: n as u32,
                mean: u32::from(self.settings.reduction == Reduction::Mean),
            };
            gpu.launch(
                launch::ROWS,
                "upstream_scales",
                (1, 1),
                ONE_BLOCK,
                0,
                &params,
            )
        })?;
        let address = |grad: &Option<launch::Unfinished>| grad.as_ref().map_or(0, |g| g.address);
        let results = Results {
            embeddings: address(&de),
            classifier: address(&dc),
            bias: address(&db),
        };
        Operands::read(gpu, matrices, &self.settings, |operands| {
            for sweep in Sweep::plan(n, operands, results, self.settings.workspace) {
                self.sweep(operands, &scales, &sweep)?;
            }
            self.count_kept(operands)
        })?;
        let finish = |grad: Option<launch::Unfinished>| grad.map(|g| g.finish(gpu));
        Ok(Gradients {
            embeddings: finish(de),
            classifier: finish(dc),
            bias: finish(db),
        })
    }
}

/// Upstream gradients, per row and on the results.
struct Scales {
    p: Buffer,
    target: Buffer,
    result: Buffer,
}

/// Addresses of the gradients, 0 for one that is not wanted.
#[derive(Debug, Clone, Copy)]
struct Results {
    embeddings: u64,
    classifier: u64,
    bias: u64,
}

/// A pass over all classes for some rows, `range` classes at a time.
#[derive(Debug, Clone, Copy)]
struct Sweep {
    first_row: usize,
    rows: usize,
    range: usize,
    results: Results,
}

impl Sweep {
    /// One sweep, if the sums of dE in f32 and the gradient of the logits for a range of classes fit the
    /// workspace; otherwise dE chunk of rows by chunk, then dC and db, which computes the logits once more.
    fn plan(n: usize, operands: Operands, results: Results, workspace: Option<usize>) -> Vec<Self> {
        let workspace = workspace.unwrap_or(DEFAULT_WORKSPACE);
        let all_rows = n.next_multiple_of(TILE);
        let (hidden, vocab, size) = (operands.hidden, operands.vocab, operands.kind.size);
        let columns = 2 * TILE;
        // Whole blocks, and ranges of about the same length.
        let range = |bytes: usize, rows: usize| {
            let most = (bytes / (rows * size) / columns * columns).max(columns);
            vocab
                .div_ceil(vocab.div_ceil(most))
                .next_multiple_of(columns)
        };
        let sums = |rows: usize| match results.embeddings {
            0 => 0,
            _ => rows * hidden * 4,
        };
        if sums(all_rows) <= workspace / 2 {
            return vec![Self {
                first_row: 0,
                rows: all_rows,
                range: range(workspace - sums(all_rows), all_rows),
                results,
            }];
        }
        let chunk = workspace / (hidden * 4 + 8 * columns * size);
        let chunk = (chunk / TILE * TILE).clamp(TILE, all_rows);
        let mut sweeps: Vec<_> = (0..all_rows)
            .step_by(chunk)
            .map(|first_row| Self {
                first_row,
                rows: chunk.min(all_rows - first_row),
                range: range(workspace.saturating_sub(sums(chunk)), chunk),
                results: Results {
                    classifier: 0,
                    bias: 0,
                    ..results
                },
            })
            .collect();
        if results.classifier != 0 || results.bias != 0 {
            sweeps.push(Self {
                first_row: 0,
                rows: all_rows,
                range: range(workspace, all_rows),
                results: Results {
                    embeddings: 0,
                    ..results
                },
            });
        }
        sweeps
    }
}

impl Saved {
    fn sweep(&self, operands: Operands, scales: &Scales, sweep: &Sweep) -> Result<()> {
        let gpu = &self.gpu;
        let Operands {
            hidden,
            vocab,
            kind,
            ..
        } = operands;
        let Sweep {
            first_row,
            rows,
            range,
            results,
        } = *sweep;
        let class_tiles = operands.class_tiles() as u32;
        let keep = self.keep.as_ref().map_or(0, |keep| keep.address);
        let count = self.rows.count.address;
        let gradient = gpu.buffer(rows * range * kind.size)?;
        let sums = match results.embeddings {
            0 => None,
            _ => Some(gpu.buffer(rows * hidden * 4)?),
        };
        for first_class in (0..vocab).step_by(range) {
            let (name, columns) = match keep {
                0 => ("gradient_sm80", kind.columns),
                _ => ("gradient_narrow_sm80", TILE),
            };
            let params = GradientParams {
                embeddings: operands.embeddings,
                classifier: operands.classifier,
                bias: operands.bias,
                row_embedding: self.rows.embedding.address,
                row_target: self.rows.target.address,
                count,
                row_max: self.row_max.address,
                row_log_sum: self.row_log_sum.address,
                p_scale: scales.p.address,
                target_scale: scales.target.address,
                keep,
                gradient: gradient.address,
                hidden: hidden as i64,
                vocab: vocab as i64,
                first_class: first_class as i64,
                range: range as i64,
                first_row: first_row as u32,
                class_tiles,
                softcap: operands.softcap,
                aligned: operands.aligned.into(),
            };
            let shared = Kind::stages(columns).max(TILE * columns * kind.size);
            let grid = (rows / TILE, range / columns);
            gpu.launch(
                launch::GRADIENT_SM80,
                &kind.kernel(name),
                grid,
                THREADS,
                shared,
                &params,
            )?;

            let product = ProductParams {
                gradient: gradient.address,
                row_embedding: self.rows.embedding.address,
                count,
                keep,
                scale: scales.result.address,
                hidden: hidden as i64,
                vocab: vocab as i64,
                first_class: first_class as i64,
                range: range as i64,
                first_row: first_row as u32,
                rows: rows as u32,
                class_tiles,
                accumulate: u32::from(first_class > 0),
                aligned: operands.aligned.into(),
                ..Default::default()
            };
            // The lists of kept tiles: numbers of 16 bits, and a count a warp.
            let shared = Kind::stages(kind.columns) + 2048 * 2 + 8 * 4;
            let columns = hidden.div_ceil(kind.columns);
            let multiply = |name: &str, grid, params: &ProductParams| {
                let kernel = kind.kernel(name);
                gpu.launch(
                    launch::PRODUCTS_SM80,
                    &kernel,
                    grid,
                    THREADS,
                    shared,
                    params,
                )
            };
            if let Some(sums) = &sums {
                let params = ProductParams {
                    operand: operands.classifier,
                    result: sums.address,
                    ..product
                };
                multiply("embeddings_product_sm80", (columns, rows / TILE), &params)?;
            }
            if results.classifier != 0 {
                let params = ProductParams {
                    operand: operands.embeddings,
                    result: results.classifier,
                    ..product
                };
                multiply("classifier_product_sm80", (columns, range / TILE), &params)?;
            }
            if results.bias != 0 {
                let params = BiasParams {
                    gradient: gradient.address,
                    count,
                    keep,
                    scale: scales.result.address,
                    bias_grad: results.bias,
                    vocab: vocab as i64,
                    first_class: first_class as i64,
                    range: range as i64,
                    class_tiles,
                };
                let kernel = kind.kernel("bias_gradient");
                gpu.launch(
                    launch::ROWS,
                    &kernel,
                    (range.div_ceil(32), 1),
                    THREADS,
                    0,
                    &params,
                )?;
            }
        }
        if let Some(sums) = sums {
            let params = FinishParams {
                sums: sums.address,
                row_embedding: self.rows.embedding.address,
                count,
                scale: scales.result.address,
                embeddings_grad: results.embeddings,
                hidden: hidden as i64,
                first_row: first_row as u32,
            };
            let kernel = kind.kernel("finish_embeddings");
            gpu.launch(launch::ROWS, &kernel, (rows, 1), THREADS, 0, &params)?;
        }
        Ok(())
    }

    fn count_kept(&self, operands: Operands) -> Result<()> {
        let kept = self.gpu.unfinished(DType::F32, 2, false)?;
        let params = CountParams {
            keep: self.keep.as_ref().map_or(0, |keep| keep.address),
            count: self.rows.count.address,
            kept: kept.address,
            class_tiles: operands.class_tiles() as u32,
        };
        self.gpu
            .launch(launch::ROWS, "count_kept", (1, 1), ONE_BLOCK, 0, &params)?;
        self.kept.set(kept.finish(&self.gpu));
        Ok(())
    }
}
