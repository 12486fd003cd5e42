//! The CUDA kernels: which can run, what they are launched on, and their workspace.
//!
//! Nothing here waits for the device. How many rows count, which tiles the filter keeps and what the upstream
//! gradient is stay there; launches are sized for the most there can be, and blocks without work leave at once.
//!
//! The matrix products come in two forms, [`portable`] and [`hopper`]; everything around them is the same.

mod averages;
mod fused;
mod hopper;
mod launch;
#[cfg(feature = "models")]
pub(crate) mod ops;
mod params;
mod plan;
mod portable;
mod shards;

use crate::op::{self, Gradients, KeptTiles, Wanted};
use crate::problem::{Matrices, Problem, Settings};
use crate::{Implementation, Reduction};
use averages::{Averages, Filter, Filtered, Masses};
use candle_core::{bail, DType, Device, Result, Shape, Tensor};
use launch::{Array, Buffer, Gpu, Kernel, Unfinished, ROWS};
use params::*;
use plan::{with_room, Sweep};
use std::sync::Arc;

/// Rows and classes of a tile of the gradient filter.
const TILE: usize = 128;
/// Threads of the kernels that are one block.
const ONE_BLOCK: u32 = 1024;

/// Why the kernels cannot run on this problem, if they cannot.
pub(crate) fn unsupported(problem: &Problem) -> Result<Option<String>> {
    let location = problem.embeddings.device().location();
    let Device::Cuda(device) = problem.embeddings.device() else {
        return Ok(Some(format!("the inputs are on {location:?}")));
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

/// The end of a kernel's name, and the bytes of a number.
#[derive(Debug, Clone, Copy)]
struct Kind {
    dtype: DType,
    suffix: &'static str,
    size: usize,
}

impl Kind {
    fn of(dtype: DType) -> Result<Self> {
        let (suffix, size) = match dtype {
            DType::BF16 => ("bf16", 2),
            DType::F16 => ("f16", 2),
            DType::F32 => ("f32", 4),
            dtype => bail!("no CUDA kernels for {dtype:?}"),
        };
        Ok(Kind {
            dtype,
            suffix,
            size,
        })
    }

    fn kernel(self, name: &str) -> String {
        format!("{name}_{}", self.suffix)
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
    /// 0 for none.
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

/// Which form of the products runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    Portable,
    Hopper,
}

impl Path {
    fn choose(gpu: &Gpu, operands: Operands, rows: usize, settings: &Settings) -> Result<Self> {
        let hopper = settings.implementation != Implementation::CudaPortable
            && gpu.compute_capability()? == (9, 0)
            && hopper::can_run(operands, rows);
        Ok(if hopper { Path::Hopper } else { Path::Portable })
    }
}

/// How a forward goes through the rows and classes.
#[derive(Debug, Clone, Copy)]
struct ForwardPlan {
    /// Rows of a launch, a multiple of 128.
    group_rows: usize,
    /// Parts of the classes that a row's partial results come from.
    splits: usize,
    /// Hopper: tiles of a split.
    tiles_per_split: usize,
}

/// The buffers of a launch of the forward.
#[derive(Debug, Clone, Copy)]
struct Group {
    first_row: usize,
    partials: u64,
    target_logit: u64,
    /// What the filter wants to know, 0 where nothing is filtered.
    statistics: u64,
}

/// What a range of classes of the backward reads and writes.
#[derive(Debug, Clone, Copy, Default)]
struct Range {
    first_class: usize,
    /// Classes, a multiple of 256.
    classes: usize,
    /// From one row of `gradient` to the next.
    stride: usize,
    first_row: usize,
    rows: usize,
    gradient: u64,
    /// `(row tiles, class tiles)` of all rows; 0 where every tile is kept.
    keep: u64,
    /// Sums of the gradient of the embeddings, 0 where not wanted.
    sums: u64,
    /// Whether the sums hold something already.
    add_to_sums: bool,
    /// 0 where not wanted.
    classifier_grad: u64,
    /// Whether the gradient of the classifier holds something already.
    add_to_classifier: bool,
    /// What tiles that are not kept leave in the gradient of the classifier.
    averages: averages::Addresses,
    /// What the gradient of the classifier gets in f32: `(vocab)` of a class 1 + its row of `target_rows`, or 0. 0 for
    /// none at all.
    slots: u64,
    target_rows: u64,
}

fn one_block(name: &str) -> Kernel {
    per_block(name, (1, 1), ONE_BLOCK)
}

fn per_block(name: impl Into<String>, grid: (usize, usize), threads: u32) -> Kernel {
    Kernel {
        module: ROWS,
        name: name.into(),
        grid,
        threads,
        shared_bytes: 0,
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
        let shard = problem.settings.vocab_parallel.as_ref();
        gpu.read(&problem.targets, |targets| {
            let params = PickParams {
                targets,
                row_embedding: rows.embedding.address,
                row_position: rows.position.address,
                row_target: rows.target.address,
                count: rows.count.address,
                packed,
                ignore_index: problem.settings.ignore_index,
                first_class: shard.map_or(0, |shard| shard.start) as i64,
                positions: n as u32,
                time: positions.time as u32,
                shift: positions.shift as u32,
                vocab: problem.vocab() as u32,
            };
            gpu.launch(&one_block(kernel), &params)
        })?;
        // Of a shard, targets are checked once those of the other ranks are known.
        if problem.settings.check_targets && shard.is_none() {
            // Waits for the device.
            let index = gpu.to_host(&rows.count)?[1];
            if index != u32::MAX {
                let target = problem.target(index as usize)?;
                return Err(problem.bad_target(index as usize, target));
            }
        }
        Ok(rows)
    }

    /// Copies these rows of the embeddings, one after the other, zeros where there are fewer.
    fn gather(
        &self,
        gpu: &Gpu,
        operands: Operands,
        first_row: usize,
        rows: usize,
        into: &Buffer,
    ) -> Result<()> {
        let params = GatherParams {
            embeddings: operands.embeddings,
            row_embedding: self.embedding.address,
            count: self.count.address,
            gathered: into.address,
            chunks: (operands.hidden * operands.kind.size / 16) as i64,
            first_row: first_row as u32,
        };
        gpu.launch(&per_block("gather_rows", (rows, 1), 128), &params)
    }
}

struct Saved {
    gpu: Gpu,
    rows: Rows,
    statistics: Statistics,
    /// Where something is filtered.
    filtered: Option<Filtered>,
    settings: Settings,
    kept: Arc<KeptTiles>,
}

/// `lse = row_max + row_log_sum` of every row, in two parts so that large logits keep their digits; and the logit of
/// its target.
struct Statistics {
    target_logit: Buffer,
    row_max: Buffer,
    row_log_sum: Buffer,
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
    let statistics = Statistics {
        target_logit: gpu.buffer(n * 4)?,
        row_max: gpu.buffer(n * 4)?,
        row_log_sum: gpu.buffer(n * 4)?,
    };
    let detached = problem.detached();
    let matrices = detached.matrices();
    let (filtered, formed) = Operands::read(&gpu, matrices, settings, |operands| {
        let path = Path::choose(&gpu, operands, n, settings)?;
        let filter = filter(settings, wanted);
        let fused = with_room(settings.workspace, |workspace| {
            let plan =
                fused::Plan::new(&gpu, path, operands, n, settings, wanted, filter, workspace)?;
            let Some(plan) = plan else {
                return Ok(None);
            };
            let dtype = matrices.classifier.dtype();
            let formed = Outputs::new(&gpu, matrices, wanted, dtype)?;
            let results = formed.results();
            let kept = fused::forward(
                &gpu,
                operands,
                &rows,
                &statistics,
                packed.address,
                settings,
                filter,
                results,
                plan,
            )?;
            Ok(Some((formed, kept)))
        })?;
        if fused.is_some() {
            return Ok((None, fused));
        }
        let filtered = logits(
            &gpu,
            path,
            operands,
            &rows,
            rows.count.address,
            &statistics,
            packed.address,
            settings.z_loss as f32,
            0..n.next_multiple_of(TILE),
            filter,
            settings.vocab_parallel.is_some().then_some(problem),
        )?;
        Ok((filtered, None))
    })?;
    let params = LossParams {
        packed: packed.address,
        count: rows.count.address,
        positions: n as u32,
        mean: u32::from(settings.reduction == Reduction::Mean),
    };
    gpu.launch(&one_block("reduce_loss"), &params)?;
    let packed = packed.finish(&gpu);
    let saved = Arc::new(Saved {
        gpu,
        rows,
        statistics,
        filtered,
        settings: settings.clone(),
        kept: kept.clone(),
    });
    Ok(op::Forward {
        packed,
        loss: formed.map(|(formed, kept)| {
            let fused = fused::Fused::new(saved.clone(), formed, kept);
            let fused: Box<dyn op::Backward> = Box::new(fused);
            fused
        }),
        backward: Box::new(saved),
    })
}

/// What the gradients that are wanted ask of the filter; `None` if neither is filtered.
fn filter(settings: &Settings, wanted: Wanted) -> Option<Filter> {
    let classifier = wanted.classifier || wanted.bias;
    // A gradient that is not wanted must not keep a tile: its threshold is above every gradient.
    let threshold = |filter: Option<f64>, wanted: bool| match (wanted, filter) {
        (false, _) => f32::INFINITY,
        (true, Some(eps)) => eps as f32,
        (true, None) => -1.,
    };
    let thresholds = [
        threshold(settings.filter_embeddings, wanted.embeddings),
        threshold(settings.filter_classifier, classifier),
    ];
    let filters = thresholds.iter().any(|t| (0. ..=1.).contains(t));
    filters.then_some(Filter {
        thresholds,
        drop: settings.drop_filtered,
    })
}

/// lse and nll of these rows, group by group, and what a filter finds. `count` is the
/// address of how many rows there are, from row 0 on. Of a `sharded` problem, over the classes of all ranks.
#[allow(clippy::too_many_arguments)]
fn logits(
    gpu: &Gpu,
    path: Path,
    operands: Operands,
    rows: &Rows,
    count: u64,
    statistics: &Statistics,
    packed: u64,
    z_loss: f32,
    span: std::ops::Range<usize>,
    filter: Option<Filter>,
    sharded: Option<&Problem>,
) -> Result<Option<Filtered>> {
    let class_tiles = operands.class_tiles();
    let all_rows = span.len();
    let multiprocessors = gpu.multiprocessors()?;
    let plan = match path {
        Path::Portable => portable::plan(operands, all_rows, multiprocessors, filter.is_some()),
        Path::Hopper => hopper::plan(operands, all_rows, multiprocessors, filter.is_some()),
    };
    let ForwardPlan {
        group_rows, splits, ..
    } = plan;
    let partials = gpu.buffer(splits * group_rows * 8)?;
    let groups = span.clone().step_by(group_rows);
    // A shard knows what to keep only after the last group: each has statistics of its own.
    let group_bytes = class_tiles * group_rows * averages::statistics_bytes(operands.kind);
    let (stored, apart) = match sharded {
        None => (1, 0),
        Some(_) => (groups.len(), group_bytes),
    };
    let filtering = match filter {
        None => None,
        Some(filter) => Some((
            gpu.buffer(stored * group_bytes)?,
            Filtered::new(gpu, operands, all_rows, filter)?,
        )),
    };
    let gathered = match path {
        Path::Portable => None,
        Path::Hopper => Some(gpu.buffer(group_rows * operands.hidden * operands.kind.size)?),
    };
    let of_tiles = |first_row: usize| match &filtering {
        None => 0,
        Some((of_tiles, _)) => {
            of_tiles.address + ((first_row - span.start) / group_rows * apart) as u64
        }
    };
    // The last group may reach beyond the rows there can be.
    let row_tiles = |first_row: usize| (group_rows / TILE).min((span.end - first_row) / TILE);
    let decide = |first_row: usize| match &filtering {
        None => Ok(()),
        Some((_, filtered)) => {
            let group = (first_row, group_rows, row_tiles(first_row));
            let of_tiles = of_tiles(first_row);
            filtered.decide(gpu, operands, rows, count, statistics, of_tiles, group)
        }
    };
    for first_row in groups.clone() {
        let group = Group {
            first_row,
            partials: partials.address,
            target_logit: statistics.target_logit.address,
            statistics: of_tiles(first_row),
        };
        match &gathered {
            None => portable::forward(gpu, operands, rows, plan, group)?,
            Some(gathered) => {
                rows.gather(gpu, operands, first_row, group_rows, gathered)?;
                hopper::forward(gpu, operands, rows, plan, group, count, gathered)?;
            }
        }
        let params = MergeParams {
            partials: partials.address,
            target_logit: statistics.target_logit.address,
            row_position: rows.position.address,
            row_target: rows.target.address,
            count,
            row_max: statistics.row_max.address,
            row_log_sum: statistics.row_log_sum.address,
            packed,
            first_row: first_row as u32,
            group_rows: group_rows as u32,
            splits: splits as u32,
            positions: rows.positions as u32,
            z_loss,
            sharded: u32::from(sharded.is_some()),
        };
        gpu.launch(
            &per_block("merge_partials", (row_tiles(first_row), 1), TILE as u32),
            &params,
        )?;
        if sharded.is_none() {
            decide(first_row)?;
        }
    }
    if let Some(problem) = sharded {
        shards::merge(gpu, problem, rows, statistics, packed)?;
        groups.clone().try_for_each(decide)?;
    }
    Ok(filtering.map(|(_, filtered)| filtered))
}

impl op::Backward for Saved {
    fn backward(
        &self,
        matrices: Matrices<'_>,
        upstream: &Tensor,
        wanted: Wanted,
    ) -> Result<Gradients> {
        let gpu = &self.gpu;
        // A part of a sum over ranks is not rounded yet.
        let embeddings_grad = match self.settings.vocab_parallel {
            Some(_) => DType::F32,
            None => matrices.classifier.dtype(),
        };
        let outputs = Outputs::new(gpu, matrices, wanted, embeddings_grad)?;
        let results = outputs.results();
        let n = self.rows.positions;
        let scales = Scales {
            p: gpu.buffer(n * 4)?,
            target: gpu.buffer(n * 4)?,
            result: gpu.buffer(4)?,
        };
        gpu.read(upstream, |upstream| {
            let params = ScaleParams {
                upstream,
                row_max: self.statistics.row_max.address,
                row_log_sum: self.statistics.row_log_sum.address,
                row_position: self.rows.position.address,
                count: self.rows.count.address,
                p_scale: scales.p.address,
                target_scale: scales.target.address,
                scale: scales.result.address,
                positions: n as u32,
                mean: u32::from(self.settings.reduction == Reduction::Mean),
                z_loss: self.settings.z_loss as f32,
            };
            gpu.launch(&one_block("upstream_scales"), &params)
        })?;
        Operands::read(gpu, matrices, &self.settings, |operands| {
            let path = Path::choose(gpu, operands, n, &self.settings)?;
            let multiprocessors = gpu.multiprocessors()?;
            let averaging = matches!(&self.filtered, Some(f) if f.masses.is_some());
            with_room(self.settings.workspace, |workspace| {
                let sweeps = Sweep::plan(
                    path,
                    multiprocessors,
                    n,
                    operands,
                    results,
                    workspace,
                    averaging,
                );
                sweeps
                    .iter()
                    .try_for_each(|sweep| self.sweep(operands, &scales, sweep))
            })?;
            let keep = self.keep();
            self.kept
                .set(count_kept(gpu, &self.rows, keep, operands.class_tiles())?);
            Ok(())
        })?;
        Ok(outputs.finish(gpu))
    }
}

/// The gradients that are wanted, to be written.
struct Outputs {
    embeddings: Option<Unfinished>,
    classifier: Option<Unfinished>,
    bias: Option<Unfinished>,
}

impl Outputs {
    /// `embeddings_grad` is the dtype of the gradient of the embeddings.
    fn new(
        gpu: &Gpu,
        matrices: Matrices<'_>,
        wanted: Wanted,
        embeddings_grad: DType,
    ) -> Result<Self> {
        let dtype = matrices.classifier.dtype();
        let (vocab, hidden) = matrices.classifier.dims2()?;
        let allocate = |wanted: bool, dtype: DType, shape: Shape, zeroed| match wanted {
            true => gpu.unfinished(dtype, shape, zeroed).map(Some),
            false => Ok(None),
        };
        Ok(Self {
            // Rows that do not count are never written.
            embeddings: allocate(
                wanted.embeddings,
                embeddings_grad,
                matrices.embeddings.shape().clone(),
                true,
            )?,
            classifier: allocate(wanted.classifier, dtype, (vocab, hidden).into(), false)?,
            bias: allocate(wanted.bias, dtype, vocab.into(), false)?,
        })
    }

    fn iter(&self) -> impl Iterator<Item = &Unfinished> {
        [&self.embeddings, &self.classifier, &self.bias]
            .into_iter()
            .flatten()
    }

    fn results(&self) -> Results {
        let address = |grad: &Option<Unfinished>| grad.as_ref().map_or(0, |g| g.address);
        Results {
            embeddings: address(&self.embeddings),
            classifier: address(&self.classifier),
            bias: address(&self.bias),
        }
    }

    /// Once every kernel that writes them is launched.
    fn finish(self, gpu: &Gpu) -> Gradients {
        let finish = |grad: Option<Unfinished>| grad.map(|g| g.finish(gpu));
        Gradients {
            embeddings: finish(self.embeddings),
            classifier: finish(self.classifier),
            bias: finish(self.bias),
        }
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

impl Saved {
    /// The table of kept tiles, 0 where all are.
    fn keep(&self) -> u64 {
        self.filtered.as_ref().map_or(0, |f| f.keep.address)
    }

    /// What stands in the place of tiles that are not kept, where they are averaged; it begins the sums of dE.
    fn averages(
        &self,
        operands: Operands,
        scales: &Scales,
        sweep: &Sweep,
        gathered: Option<&Buffer>,
        sums: u64,
    ) -> Result<Option<Averages>> {
        let Some(filtered) = &self.filtered else {
            return Ok(None);
        };
        let Some(masses) = &filtered.masses else {
            return Ok(None);
        };
        let masses = Masses {
            gpu: &self.gpu,
            path: sweep.path,
            operands,
            rows: &self.rows,
            filter: filtered.filter,
            masses: masses.address,
            keep: self.keep(),
            first_row: sweep.first_row,
            len: sweep.rows,
            gathered,
            p_scale: scales.p.address,
            row_scale: 0,
        };
        let rows = (sweep.first_row, sweep.rows);
        Averages::new(masses, sweep.results, sums)?
            .with_entries(self, operands, scales, self.keep(), rows)
            .map(Some)
    }

    fn sweep(&self, operands: Operands, scales: &Scales, sweep: &Sweep) -> Result<()> {
        let gpu = &self.gpu;
        let Operands {
            hidden,
            vocab,
            kind,
            ..
        } = operands;
        let Sweep {
            path,
            first_row,
            rows,
            range,
            results,
        } = *sweep;
        let class_tiles = operands.class_tiles() as u32;
        let keep = self.keep();
        let count = self.rows.count.address;
        let sums = match results.embeddings {
            0 => None,
            _ => Some(gpu.buffer(rows * hidden * 4)?),
        };
        let gathered = match path {
            Path::Portable => None,
            Path::Hopper => {
                let gathered = gpu.buffer(rows * hidden * kind.size)?;
                self.rows
                    .gather(gpu, operands, first_row, rows, &gathered)?;
                Some(gathered)
            }
        };
        let of_sums = sums.as_ref().map_or(0, |sums| sums.address);
        let averages = self.averages(operands, scales, sweep, gathered.as_ref(), of_sums)?;
        let of_averages = match &averages {
            None => averages::Addresses::default(),
            Some(averages) => averages.addresses(),
        };
        // What the averages need for a while is given back before this is taken.
        let gradient = gpu.buffer(rows * range * kind.size)?;
        for first_class in (0..vocab).step_by(range) {
            let part = Range {
                first_class,
                classes: range,
                stride: range,
                first_row,
                rows,
                gradient: gradient.address,
                keep,
                sums: of_sums,
                add_to_sums: first_class > 0 || averages.is_some(),
                classifier_grad: results.classifier,
                add_to_classifier: first_row > 0,
                averages: of_averages,
                ..Default::default()
            };
            match &gathered {
                None => portable::backward(self, operands, scales, part)?,
                Some(gathered) => hopper::backward(self, operands, scales, part, gathered)?,
            }
            if results.bias != 0 {
                let params = BiasParams {
                    gradient: gradient.address,
                    count,
                    keep,
                    scale: scales.result.address,
                    slots: of_averages.slots,
                    target_bias: of_averages.target_bias,
                    shares: of_averages.shares,
                    mass_sums: of_averages.mass_sums,
                    bias_grad: results.bias,
                    vocab: vocab as i64,
                    first_class: first_class as i64,
                    range: range as i64,
                    first_row: first_row as u32,
                    rows: rows as u32,
                    class_tiles,
                    overwrite: u32::from(first_row == 0),
                    ..Default::default()
                };
                let grid = (range.div_ceil(32), 1);
                gpu.launch(&per_block(kind.kernel("bias_gradient"), grid, 256), &params)?;
            }
        }
        if let Some(sums) = sums {
            let params = FinishParams {
                sums: sums.address,
                target_part: of_averages.embeddings_entry,
                row_target: self.rows.target.address,
                classifier: operands.classifier,
                row_embedding: self.rows.embedding.address,
                count,
                scale: scales.result.address,
                embeddings_grad: results.embeddings,
                hidden: hidden as i64,
                first_row: first_row as u32,
                ..Default::default()
            };
            let name = match self.settings.vocab_parallel {
                Some(_) => "finish_part",
                None => "finish_embeddings",
            };
            let kernel = per_block(kind.kernel(name), (rows, 1), 256);
            gpu.launch(&kernel, &params)?;
        }
        Ok(())
    }
}

/// Tiles that a table keeps (0: all of them), and tiles there are.
fn count_kept(gpu: &Gpu, rows: &Rows, keep: u64, class_tiles: usize) -> Result<Tensor> {
    let kept = gpu.unfinished(DType::F32, 2, false)?;
    let params = CountParams {
        keep,
        count: rows.count.address,
        kept: kept.address,
        class_tiles: class_tiles as u32,
    };
    gpu.launch(&averages::kernel("count_kept", (1, 1), ONE_BLOCK), &params)?;
    Ok(kept.finish(gpu))
}
