//! Every combination of the options, each compared with the f64 reference: the same grid for every
//! device and implementation.

use super::reference::{Gradients, Reduced, Reference, Upstream};
use super::{
    auto_threshold, dropped, gradients_close, halving, output_close, tile, weighted, Case,
};
use candle_core::{DType, Device};
use candle_cut_cross_entropy::{
    backward, linear_cross_entropy, Entropy, Filter, Implementation, Options, Preset, Strategy,
};

/// Where and how the grid is computed.
#[derive(Debug)]
pub struct Grid {
    pub device: Device,
    pub implementation: Implementation,
    pub dtypes: Vec<DType>,
    /// Takes every `step`-th of the cases of a problem. Best prime to their number, 3 x 9 x 3.
    pub step: usize,
}

/// A threshold below which a filter drops: the small problems of the grid have entries on both sides.
const DROPPED: f64 = 0.05;

/// What a filter does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Does {
    /// With thresholds for embeddings and classifier; 0 is exact.
    Average(f64, f64),
    Drop(f64),
}

/// Ways to choose the filters. `eps` is a threshold at which some tiles are averaged.
fn filters(dtype: DType, eps: f64) -> Vec<(String, Options, Does)> {
    let auto = auto_threshold(dtype);
    let mut filters: Vec<_> = Preset::ALL
        .into_iter()
        .map(|preset| {
            let does = match preset {
                Preset::Cce | Preset::CceKahan => Does::Average(auto, auto),
                Preset::CceKahanFullC => Does::Average(auto, 0.),
                Preset::CceKahanFullE => Does::Average(0., auto),
                Preset::CceExact | Preset::Native => Does::Average(0., 0.),
            };
            (preset.name().to_owned(), Options::preset(preset), does)
        })
        .collect();
    let mut add = |name: &str, embeddings: Filter, classifier: Filter, does| {
        let options = Options::default().filter_embeddings(embeddings);
        filters.push((name.to_owned(), options.filter_classifier(classifier), does));
    };
    let threshold = Filter::Threshold;
    add(
        "averaged",
        threshold(eps),
        threshold(eps),
        Does::Average(eps, eps),
    );
    add(
        "averaged more in dC",
        threshold(eps / 2.),
        threshold(eps),
        Does::Average(eps / 2., eps),
    );
    add(
        "dropped",
        Filter::Drop(DROPPED),
        Filter::Drop(DROPPED),
        Does::Drop(DROPPED),
    );
    filters
}

const LEADS: [&[usize]; 4] = [&[], &[7], &[3, 5], &[2, 2, 4]];
const STRATEGIES: [Strategy; 3] = [Strategy::Auto, Strategy::Recompute, Strategy::Fused];

/// The problems of the grid: everything but filters, strategies and upstream gradients. The target
/// dtypes, the sizes of the matrices and the options of the loss beyond the first few take turns.
fn problems(dtypes: &[DType]) -> Vec<Case> {
    let mut problems = Vec::new();
    for &dtype in dtypes {
        for lead in LEADS {
            for shift in 0..3 {
                for reduction in [Reduced::Mean, Reduced::Sum, Reduced::None] {
                    for (bias, softcap, ignored) in switches() {
                        if shift > 0 && lead.is_empty() {
                            continue;
                        }
                        let turn = problems.len();
                        let (hidden, vocab) =
                            [(8, 40), (5, 17), (16, 33), (3, 70), (24, 12)][turn % 5];
                        let mut case = Case::random(turn as u64, dtype, lead, hidden, vocab);
                        case.target_dtype = [DType::I64, DType::U32, DType::I32][turn % 3];
                        if case.target_dtype == DType::U32 {
                            case.inputs.ignore_index = u32::MAX as i64;
                        }
                        case.inputs.shift = shift;
                        case.inputs.reduction = reduction;
                        case.inputs.softcap = softcap.then_some(2.5);
                        if bias {
                            case = case.with_bias(turn as u64 + 1);
                        }
                        if ignored {
                            case = case.with_ignored(turn as u64 + 2);
                        }
                        problems.push(case.with_some_options(turn as u64 + 3));
                    }
                }
            }
        }
    }
    problems
}

fn switches() -> impl Iterator<Item = (bool, bool, bool)> {
    (0..8).map(|bits| (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0))
}

/// Problems with several blocks of rows and classes.
fn large_problems(dtypes: &[DType]) -> Vec<Case> {
    let mut problems = Vec::new();
    for &dtype in dtypes {
        for (bias, softcap, ignored) in switches() {
            let seed = problems.len() as u64;
            let mut case = Case::random(seed + 1000, dtype, &[2, 150], 40, 700);
            case.inputs.shift = 1;
            case.inputs.softcap = softcap.then_some(5.);
            case.inputs.reduction = [Reduced::Mean, Reduced::None, Reduced::Sum][seed as usize % 3];
            if bias {
                case = case.with_bias(seed);
            }
            if ignored {
                case = case.with_ignored(seed);
            }
            problems.push(case.with_some_options(seed));
        }
    }
    problems
}

/// Runs the grid and fails with the cases that are wrong. Returns how many were computed.
pub fn run(grid: &Grid) -> usize {
    let mut turn = 0;
    let mut computed = 0;
    let mut wrong = Vec::new();
    for case in problems(&grid.dtypes) {
        run_problem(grid, &case, grid.step, &mut turn, &mut computed, &mut wrong);
    }
    // The reference is slow for these, and so is checking them: a tenth of the combinations, in turns.
    for case in large_problems(&grid.dtypes) {
        run_problem(grid, &case, 10, &mut turn, &mut computed, &mut wrong);
    }
    if !wrong.is_empty() {
        let count = wrong.len();
        wrong.truncate(12);
        panic!(
            "{count} of {computed} cases are wrong, the first are:\n{}",
            wrong.join("\n")
        );
    }
    computed
}

fn run_problem(
    grid: &Grid,
    case: &Case,
    step: usize,
    turn: &mut usize,
    computed: &mut usize,
    wrong: &mut Vec<String>,
) {
    let reference = Reference::new(case.inputs.clone());
    let tile = tile(&grid.device);
    // Tensor operations on another device than the CPU average nothing, and nothing is averaged of the entropy's gradient.
    let averages = (grid.implementation != Implementation::Native || grid.device.is_cpu())
        && !case.differentiates_entropy();
    let eps = halving(&reference, tile).unwrap_or(0.);
    let tiles = reference.largest(tile);
    let kept = tiles.iter().filter(|p| **p >= eps).count() as f64 / tiles.len() as f64;
    let certain = eps > 0. && tiles.iter().all(|p| (p - eps).abs() > 0.02 * eps + 2e-7);
    for (of_loss, of_lse) in [(true, false), (false, true), (true, true)] {
        let upstream = case.upstream(*turn as u64, of_loss, of_lse);
        let mut known: Vec<(Does, Gradients)> = Vec::new();
        for (name, options, does) in filters(case.dtype, eps) {
            let does = if averages {
                does
            } else {
                Does::Average(0., 0.)
            };
            for strategy in STRATEGIES {
                *turn += 1;
                if !turn.is_multiple_of(step) {
                    continue;
                }
                *computed += 1;
                if !known.iter().any(|(of, _)| *of == does) {
                    let gradients = match does {
                        Does::Average(e, c) => reference.averaged(&upstream, (e, c), tile),
                        Does::Drop(eps) => dropped(&reference, &upstream, eps),
                    };
                    known.push((does, gradients));
                }
                let want = &known.iter().find(|(of, _)| *of == does).unwrap().1;
                let options = match name.as_str() {
                    "native" => options.clone(),
                    _ => options.clone().implementation(grid.implementation),
                };
                let options = options.strategy(strategy);
                let attempt = || -> std::result::Result<(), String> {
                    let text = |e: candle_core::Error| e.to_string();
                    let tensors = case.tensors(&grid.device).map_err(text)?;
                    let options = case.options(options, &tensors);
                    let output = linear_cross_entropy(
                        &tensors.embeddings,
                        &tensors.classifier,
                        &tensors.targets,
                        &options,
                    )
                    .map_err(text)?;
                    output_close(&output, case, &reference)?;
                    let loss = weighted(&output, &upstream).map_err(text)?;
                    let grads = match *turn % 2 {
                        0 => loss.backward(),
                        _ => backward(&loss),
                    };
                    let grads = grads.map_err(text)?;
                    let share = output.kept_tiles().map_err(text)?;
                    let close = |want: &Gradients| {
                        gradients_close(&grads, &tensors, want, case.dtype, reference.largest_logit)
                    };
                    let as_wanted = match share {
                        _ if name != "averaged" || !averages || !certain => close(want),
                        share if share == Some(kept) => close(want),
                        share => Err(format!("kept {share:?} of the tiles, want {kept}")),
                    };
                    // Where the gradients of the loss were formed in the forward on a GPU, those of the lse are exact.
                    match (as_wanted, does) {
                        (Err(error), Does::Average(e, c)) if of_lse && !grid.device.is_cpu() => {
                            let loss = Upstream {
                                lse: None,
                                ..upstream.clone()
                            };
                            let lse = Upstream {
                                loss: None,
                                ..upstream.clone()
                            };
                            let exact = reference.gradients(&lse, 0.);
                            let apart = match of_loss {
                                true => exact.plus(&reference.averaged(&loss, (e, c), tile)),
                                false => exact,
                            };
                            close(&apart).map_err(|_| error)
                        }
                        (as_wanted, _) => as_wanted,
                    }
                };
                if let Err(error) = attempt() {
                    wrong.push(format!(
                        "{} {name} {strategy:?} upstream loss {of_loss} lse {of_lse}\n  {error}",
                        describe(case)
                    ));
                }
            }
        }
    }
}

/// One line that says what a case is.
pub fn describe(case: &Case) -> String {
    let inputs = &case.inputs;
    format!(
        "{:?} {:?} D {} V {} targets {:?} bias {} softcap {:?} ignored {} shift {} {:?} scale {} smoothing {} \
         class weights {} token weights {} z-loss {} bonus {} entropy {:?} predicted {}",
        case.dtype,
        case.lead,
        inputs.hidden,
        inputs.vocab,
        case.target_dtype,
        inputs.bias.is_some(),
        inputs.softcap,
        inputs
            .targets
            .iter()
            .filter(|&&t| t == inputs.ignore_index)
            .count(),
        inputs.shift,
        inputs.reduction,
        inputs.logit_scale,
        inputs.label_smoothing,
        inputs.class_weights.is_some(),
        inputs.token_weights.is_some(),
        inputs.z_loss,
        inputs.entropy_bonus,
        case.entropy,
        case.predicted
    )
}
