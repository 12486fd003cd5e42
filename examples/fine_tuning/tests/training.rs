//! What the arguments make of the training: weights, packing, groups, adapters.

use super::*;

/// Records of unlike lengths.
fn records(place: &Place, weights: [f64; 4]) {
    let texts = [
        "The cat sat.",
        "The dog sat on the mat. The dog sat on the log.",
        "The",
        "The mat sat on the cat.",
    ];
    let lines = texts
        .iter()
        .zip(weights)
        .map(|(text, weight)| json!({"text": text, "weight": weight}).to_string());
    place
        .0
        .write("d.jsonl", lines.collect::<Vec<_>>().join("\n"));
}

const RUN: [&str; 8] = [
    "--data",
    "@/d.jsonl",
    "--validation",
    "0",
    "--length",
    "40",
    "--batch",
    "4",
];

#[track_caller]
fn assert_near(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!(
            (got - want).abs() <= tolerance * want.abs(),
            "got {got}, want {want}"
        );
    }
}

#[test]
fn packed_sequences_have_the_same_losses() {
    let place = Place::new("packing");
    records(&place, [1., 1., 1., 0.5]);
    for more in [
        &[] as &[&str],
        &["--gradient-checkpointing"],
        &["--lora", "2"],
    ] {
        let arguments = |own: &[&'static str]| {
            [
                &RUN[..],
                &["--steps", "4", "--learning-rate", "1e-2"],
                more,
                own,
            ]
            .concat()
        };
        place.run(&arguments(&["--output", "@/padded"])).unwrap();
        place
            .run(&arguments(&["--packing", "--output", "@/packed"]))
            .unwrap();
        assert_near(&place.losses("packed"), &place.losses("padded"), 1e-5);
    }
    records(&place, [1.; 4]);
    place
        .run(
            &[
                &RUN[..],
                &["--loss", "baseline", "--packing", "--output", "@/baseline"],
            ]
            .concat(),
        )
        .unwrap();
    place
        .run(&[&RUN[..], &["--loss", "exact", "--output", "@/exact"]].concat())
        .unwrap();
    assert_near(&place.losses("baseline"), &place.losses("exact"), 1e-5);
}

/// Weights that are all alike change nothing, and twice the weight is twice the record.
#[test]
fn the_loss_is_the_mean_by_weight() {
    let place = Place::new("weighted");
    let losses = |name: &str, weights| {
        records(&place, weights);
        let output = format!("@/{name}");
        let own = [
            "--steps",
            "3",
            "--batch",
            "8",
            "--learning-rate",
            "1e-2",
            "--output",
            &output,
        ];
        place.run(&[&RUN[..6], &own].concat()).unwrap();
        place.losses(name)
    };
    let plain = losses("plain", [1.; 4]);
    assert_near(&losses("alike", [0.25; 4]), &plain, 1e-5);
    let doubled = losses("doubled", [2., 1., 1., 1.]);
    assert!(doubled[0] != plain[0]);
    // The same step as of a file that has the first record twice.
    let text = fs::read_to_string(place.path("d.jsonl"))
        .unwrap()
        .replace("2.0", "1.0");
    let first = text.lines().next().unwrap();
    place.0.write("d.jsonl", format!("{first}\n{text}"));
    let own = ["--steps", "1", "--batch", "5", "--output", "@/twice"];
    place.run(&[&RUN[..6], &own].concat()).unwrap();
    let own = ["--steps", "1", "--batch", "4", "--output", "@/once"];
    records(&place, [2., 1., 1., 1.]);
    place.run(&[&RUN[..6], &own].concat()).unwrap();
    assert_near(&place.losses("once"), &place.losses("twice"), 1e-5);
    let error = place.error(&[&RUN[..], &["--loss", "baseline"]].concat());
    assert!(
        error.contains("weights") && error.contains("baseline"),
        "{error}"
    );
}

#[test]
fn groups_have_their_own_learning_rate() {
    let place = Place::new("groups");
    let weights = |folder: &str| {
        let path = place.path(folder).join("model.safetensors");
        candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap()
    };
    place
        .run(&[
            "--learning-rate",
            "1e-2",
            "--group",
            "mlp=0",
            "--group",
            "proj=0.5,0.1",
        ])
        .unwrap();
    let (before, after) = (weights("base"), weights("out/model"));
    for (name, before) in &before {
        let sum = (before - &after[name])
            .unwrap()
            .abs()
            .unwrap()
            .sum_all()
            .unwrap();
        let changed = sum.to_scalar::<f32>().unwrap();
        assert_eq!(
            changed == 0.,
            name.contains("mlp"),
            "{name} changed by {changed}"
        );
    }
    for (group, said) in [
        ("mlp", "NAME=FACTOR"),
        ("mlp=x", "NAME=FACTOR"),
        ("=1", "NAME=FACTOR"),
        ("mlp=1,-1", "NAME=FACTOR"),
        ("router=1", "--group router: none of the trained tensors"),
    ] {
        let error = place.error(&["--group", group]);
        assert!(error.contains(said), "{group}: {error}");
    }
}

#[test]
fn dropout_of_adapters_follows_from_the_seed_and_goes_on_after_an_interruption() {
    let place = Place::new("dropout");
    let with = |more: &[&str]| {
        let usual = [
            "--lora",
            "2",
            "--learning-rate",
            "1e-2",
            "--schedule",
            "constant",
            "--warm-up",
            "1",
        ];
        place.run(&[&usual[..], more].concat()).unwrap();
    };
    let dropout = ["--lora-dropout", "0.3"];
    with(&["--steps", "4", "--output", "@/plain"]);
    with(&[&dropout[..], &["--steps", "4", "--output", "@/whole"]].concat());
    with(
        &[
            &dropout[..],
            &[
                "--steps",
                "4",
                "--output",
                "@/again",
                "--gradient-checkpointing",
            ],
        ]
        .concat(),
    );
    with(&[&dropout[..], &["--steps", "2"]].concat());
    with(&[&dropout[..], &["--steps", "4", "--resume"]].concat());
    assert_eq!(place.losses("out"), place.losses("whole"));
    assert_eq!(place.losses("again"), place.losses("whole"));
    // B begins as 0: the first loss is that of the model.
    let (plain, whole) = (place.losses("plain"), place.losses("whole"));
    assert_eq!(plain[0], whole[0]);
    assert_ne!(plain[3], whole[3]);
    let config = fs::read_to_string(place.path("out/adapter/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["lora_dropout"], 0.3);
    let error = place.error(&["--lora", "2", "--lora-dropout", "1"]);
    assert!(
        error.contains("--lora-dropout must be at least 0"),
        "{error}"
    );
}
