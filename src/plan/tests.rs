use super::hopper::{longest_range, most_work, TILES};
use super::{
    divergence, forward, fused, gradient_stride, mixed_strips, shares_outputs, sweeps, wide_strips,
    Forming, Path, Rounds, Side, Sizes, Workspace, STRIP, TILE,
};
use crate::op::contract::Wanted;

const ALL: Wanted = Wanted {
    embeddings: true,
    classifier: true,
    bias: true,
};

const DEFAULT: Workspace = Workspace {
    given: None,
    halvings: 0,
};

fn given(bytes: usize) -> Workspace {
    Workspace {
        given: Some(bytes),
        halvings: 0,
    }
}

fn half(hidden: usize, vocab: usize) -> Sizes {
    Sizes {
        hidden,
        vocab,
        rank: 0,
        number: 2,
        softcap: false,
        multiprocessors: 132,
    }
}

/// Heads of models and small ones; numbers of rows.
fn heads() -> impl Iterator<Item = (Sizes, usize)> {
    let heads = [
        (64, 300),
        (576, 49_152),
        (896, 151_936),
        (2304, 256_000),
        (4096, 128_256),
    ];
    heads.into_iter().flat_map(|(hidden, vocab)| {
        let rows = [1, 128, 1200, 8192, 65_536, 262_144];
        rows.into_iter()
            .map(move |rows| (half(hidden, vocab), rows))
    })
}

#[test]
fn sweeps_form_each_gradient_of_each_row_once() {
    for (sizes, rows) in heads() {
        for path in [Path::Portable, Path::Hopper] {
            for workspace in [DEFAULT, given(32 << 20), given(512 << 20), given(0)] {
                for averaging in [false, true] {
                    let what = format!("{sizes:?} {rows} rows {path:?} {workspace:?} {averaging}");
                    let sweeps = sweeps(path, sizes, rows, ALL, workspace, averaging);
                    let wants: [fn(Wanted) -> bool; 3] =
                        [|w| w.embeddings, |w| w.classifier, |w| w.bias];
                    for wants in wants {
                        let mut next = 0;
                        for sweep in sweeps.iter().filter(|sweep| wants(sweep.wanted)) {
                            assert_eq!(sweep.first_row, next, "{what}");
                            assert!(
                                sweep.range > 0 && sweep.range.is_multiple_of(2 * TILE),
                                "{what}"
                            );
                            next += sweep.rows;
                        }
                        assert_eq!(next, rows.next_multiple_of(TILE), "{what}");
                    }
                    let listed = |sweep: &super::Sweep| {
                        sweep.path == Path::Portable
                            || sweep.range <= longest_range(sizes, sweep.rows)
                    };
                    assert!(sweeps.iter().all(listed), "{what}");
                }
            }
        }
    }
}

/// What a sweep on Hopper holds: sums of dE and gathered rows, and the gradient of the logits of a range.
#[test]
fn sweeps_stay_within_the_workspace() {
    for (sizes, rows) in heads() {
        for mebibytes in [128, 512, 2048] {
            let workspace = mebibytes << 20;
            for sweep in sweeps(Path::Hopper, sizes, rows, ALL, given(workspace), false) {
                let between = match sweep.rows < rows {
                    true => sizes.exponent_bytes(),
                    false => 0,
                };
                let held = sweep.rows * (sizes.hidden * 6 + sweep.range * 2) + between;
                let fits = held <= workspace || sweep.path == Path::Portable;
                assert!(fits, "{sizes:?}: {sweep:?} holds {held} of {workspace}");
            }
        }
    }
}

#[test]
fn halved_workspaces_are_smaller() {
    let (sizes, rows) = (half(2304, 256_000), 8192);
    let held = |halvings| {
        let workspace = Workspace {
            given: None,
            halvings,
        };
        let sweeps = sweeps(Path::Hopper, sizes, rows, ALL, workspace, false);
        sweeps[0].rows * (sizes.hidden * 6 + sweeps[0].range * 2)
    };
    assert!(held(1) < held(0) && held(2) < held(1));
}

#[test]
fn fused_gradients_go_through_chunks_that_fit() {
    for (sizes, rows) in heads() {
        for workspace in [128 << 20, 512 << 20, 3 << 29, 8 << 30] {
            let asked = Forming {
                asked: true,
                ..Forming::default()
            };
            let Some(chunks) = fused(sizes, rows, asked, given(workspace)) else {
                continue;
            };
            let between = match chunks.rows < rows {
                true => sizes.exponent_bytes(),
                false => 0,
            };
            let held = chunks.rows * (sizes.vocab * 2 + sizes.hidden * 6) + between;
            assert!(held <= workspace, "{sizes:?} {rows} rows hold {held}");
            assert!(chunks.range <= longest_range(sizes, chunks.rows));
        }
    }
    // The logits of 8192 rows take 3.9 GiB: at least three chunks of the default.
    let chunks = fused(half(2304, 256_000), 8192, Forming::default(), DEFAULT);
    assert!(chunks.is_some_and(|chunks| (2048..4096).contains(&chunks.rows)));
    assert!(fused(half(4096, 128_256), 65_536, Forming::default(), DEFAULT).is_some());
}

#[test]
fn forwards_cover_all_classes_within_their_bytes() {
    for (sizes, rows) in heads() {
        for path in [Path::Portable, Path::Hopper] {
            for filtering in [false, true] {
                let all_rows = rows.next_multiple_of(TILE);
                let groups = forward(path, sizes, all_rows, filtering);
                let what = format!("{sizes:?} {rows} rows {path:?} {filtering}: {groups:?}");
                assert!(
                    groups.rows > 0 && groups.rows.is_multiple_of(TILE),
                    "{what}"
                );
                assert!(groups.splits > 0, "{what}");
                if path == Path::Hopper {
                    let classes = groups.splits * groups.tiles_per_split * 192;
                    assert!(classes >= sizes.vocab, "{what}");
                    assert!(groups.rows <= 8192, "{what}");
                }
            }
        }
    }
}

#[test]
fn ranges_fit_the_kernels_lists() {
    for rows in [128, 256, 1280, 8192, 65_536, 262_144] {
        let range = longest_range(half(576, 49_152), rows);
        let (row_tiles, class_tiles) = (rows / TILE, range / TILE);
        assert!(
            class_tiles > 0 && class_tiles <= TILES,
            "{rows} rows: {range}"
        );
        // Words of 32 tiles that all outputs of either product are summed over.
        assert!(
            row_tiles * class_tiles.div_ceil(32) <= 4096,
            "{rows} rows: {range}"
        );
        assert!(
            class_tiles * row_tiles.div_ceil(32) <= 4096,
            "{rows} rows: {range}"
        );
    }
}

#[test]
fn rounds_of_a_divergence_fit_the_workspace() {
    for (sizes, rows) in heads() {
        for wanted in [[true, false], [true, true], [false, false]] {
            let sides = wanted.map(|wanted| Side { sizes, wanted });
            let all_rows = rows.next_multiple_of(TILE);
            for workspace in [DEFAULT, given(64 << 20), given(3 << 30), given(0)] {
                let what = format!("{sizes:?} {rows} rows {wanted:?} {workspace:?}");
                let Some(Rounds { chunk, block }) = divergence(sides, rows, workspace) else {
                    assert!(workspace.given.is_some(), "{what}");
                    continue;
                };
                assert!(
                    chunk % TILE == 0 && block % TILE == 0,
                    "{what}: {chunk} {block}"
                );
                assert!(
                    0 < block && block <= chunk && chunk <= all_rows,
                    "{what}: {chunk} {block}"
                );
                let gradients = wanted.iter().filter(|wanted| **wanted).count();
                let logits = block * gradient_stride(sizes) * 8;
                let bytes = logits + gradients * chunk * gradient_stride(sizes) * 2;
                assert!(bytes <= workspace.or(5 << 29), "{what}: {bytes}");
            }
        }
    }
}

/// Gemma-2-2B's and Llama-3-8B's heads of both sides, the student's gradients: the fewest clusters are idle in dE.
#[test]
fn usual_rounds_of_a_divergence() {
    for (sizes, want) in [
        (half(2304, 256_000), (2816, 512)),
        (half(4096, 128_256), (4096, 512)),
    ] {
        let sides = [true, false].map(|wanted| Side { sizes, wanted });
        let Rounds { chunk, block } = divergence(sides, 8192, DEFAULT).unwrap();
        assert_eq!((chunk, block), want);
    }
}

#[test]
fn strips_hold_the_columns() {
    for hidden in (8..6000usize).step_by(8) {
        let strips = hidden.div_ceil(STRIP);
        let (wide, narrow) = (wide_strips(hidden), strips - wide_strips(hidden));
        let columns = |narrow: usize| (strips - narrow) * STRIP + narrow * (STRIP / 3 * 2);
        assert!(wide + narrow == strips && narrow <= 2, "{hidden}");
        assert!(columns(narrow) >= hidden, "{hidden}");
        let more = narrow < strips.min(2) && columns(narrow + 1) >= hidden;
        assert!(!more, "{hidden}: {narrow} narrow strips are too few");
    }
    let mixed = |hidden: usize| mixed_strips(half(hidden, 151_936));
    assert!([896, 2048, 3584].map(mixed) == [true; 3]);
    assert!([576, 2056, 2304, 4096].map(mixed) == [false; 4]);
    let rank = Sizes {
        rank: 64,
        ..half(896, 151_936)
    };
    assert!(!mixed_strips(rank));
}

/// Clusters share outputs where many of them would be idle: of 352 outputs for 66, of some narrow ones after wide ones, of few
/// rows; not of two rounds, nor for little.
#[test]
fn outputs_are_shared_where_clusters_would_be_idle() {
    let shared = |hidden, rows| shares_outputs(half(hidden, 128_256), rows, 128_256);
    assert!(shared(4096, 4096) && shared(896, 4096) && shared(4096, 100));
    assert!(!shared(2304, 2816) && !shared(2304, 2560) && !shared(2048, 4096));
    assert!(!shares_outputs(half(4096, 128_256), 4096, 2048));
    let many = Sizes {
        multiprocessors: 200,
        ..half(4096, 128_256)
    };
    assert!(!shares_outputs(many, 4096, 128_256), "no room for parts");
}

/// No cluster has less than its part of the work, and none more than a round of whole strips above it.
#[test]
fn work_is_dealt_out_evenly() {
    for hidden in [64usize, 576, 896, 2048, 2304, 3584, 4096] {
        let sizes = half(hidden, 151_936);
        for row_tiles in 1..200 {
            let most = most_work(sizes, row_tiles);
            let part = row_tiles as f64 / sizes.clusters() as f64;
            let round = 3. / (2 * hidden.div_ceil(STRIP) + wide_strips(hidden)) as f64;
            assert!(
                most >= part - 1e-9 && most <= part + 2. * round,
                "{hidden} columns, {row_tiles} row tiles: {most}, {part}"
            );
        }
    }
    // 32 whole strips and 64 narrow ones for 66 clusters: some have two of the latter.
    let most = most_work(half(896, 151_936), 32) * 7.;
    assert!((most - 4.).abs() < 1e-9, "{most}");
}
