//! Inputs, outputs, and numbers.

use super::*;

#[test]
fn a_run_leaves_what_it_promises() {
    let place = Place::new("leaves");
    place.run(&["--prompt", "The cat"]).unwrap();
    for name in [
        "model/model.safetensors",
        "model/tokenizer.json",
        "loss.svg",
        "step-2/state.json",
    ] {
        assert!(place.path("out").join(name).is_file(), "{name}");
    }
    let steps: Vec<Value> = place.metrics("out");
    let steps: Vec<&Value> = steps.iter().filter(|line| line["loss"].is_f64()).collect();
    assert_eq!(steps.len(), 2);
    for name in [
        "loss",
        "gradient_norm",
        "learning_rate",
        "tokens",
        "learnt_tokens",
        "seconds",
    ] {
        assert!(steps.iter().all(|line| line[name].is_number()), "{name}");
    }
}

#[test]
fn inputs_are_never_written_over() {
    let place = Place::new("inputs");
    fs::create_dir_all(place.path("out")).unwrap();
    fs::rename(place.path("base"), place.path("out/model")).unwrap();
    let before = all_files(&place.path("out/model"));
    let model = &["--checkpoint", "@/out/model"];
    assert!(place.error(model).contains("would be written over"));
    let spelled = &["--checkpoint", "@/out/../out/./model/"];
    assert!(place.error(spelled).contains("would be written over"));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(place.path("out/model"), place.path("link")).unwrap();
        let linked = &["--checkpoint", "@/link"];
        assert!(place.error(linked).contains("would be written over"));
        std::os::unix::fs::symlink(place.path("out"), place.path("other")).unwrap();
        let output = &["--checkpoint", "@/out/model", "--output", "@/other"];
        assert!(place.error(output).contains("would be written over"));
    }
    assert_eq!(before, all_files(&place.path("out/model")));

    let data = place
        .0
        .write("out/metrics.jsonl", r#"{"text": "The cat sat."}"#);
    let base = ["--checkpoint", "@/out/model", "--output"];
    let error = place.error(&[&base[..], &["@/fresh", "--data", "@/fresh/loss.svg"]].concat());
    assert!(error.contains("loss.svg"), "{error}");
    fs::rename(place.path("out/model"), place.path("base")).unwrap();
    let error = place.error(&["--data", "@/out/metrics.jsonl"]);
    assert!(error.contains("would be written over"), "{error}");
    assert!(fs::read_to_string(data).unwrap().contains("The cat"));
}

#[test]
#[cfg(unix)]
fn links_in_the_output_are_replaced_not_followed() {
    use std::os::unix::fs::{symlink, PermissionsExt};
    let place = Place::new("links");
    let tokenizer = place.path("base/tokenizer.json");
    fs::create_dir_all(place.path("out/model")).unwrap();
    symlink(&tokenizer, place.path("out/model/tokenizer.json")).unwrap();
    fs::hard_link(place.path("text.txt"), place.path("out/loss.svg")).unwrap();
    fs::set_permissions(&tokenizer, fs::Permissions::from_mode(0o444)).unwrap();
    let before = all_files(&place.path("base"));
    place.run(&[]).unwrap();
    assert_eq!(before, all_files(&place.path("base")));
    assert_eq!(
        fs::read_to_string(place.path("text.txt")).unwrap(),
        TEXT.repeat(8)
    );
    let copy = fs::symlink_metadata(place.path("out/model/tokenizer.json")).unwrap();
    assert!(copy.is_file());
    assert_ne!(
        copy.permissions().mode() & 0o200,
        0,
        "the copy is read-only"
    );
    assert_eq!(
        fs::read(&tokenizer).unwrap(),
        fs::read(place.path("out/model/tokenizer.json")).unwrap()
    );
}

#[test]
fn an_output_that_cannot_be_written_is_found_before_the_first_step() {
    for name in ["out", "out/model", "out/adapter"] {
        let place = Place::new("unwritable");
        place.0.write(name, "a file");
        let error = place.error(&["--lora", "2"]);
        assert!(
            (error.contains("cannot write") || error.contains("Not a directory"))
                && error.contains(name),
            "{error}"
        );
        assert!(!place.path("out/metrics.jsonl").exists());
    }
    for name in ["out/loss.svg", "out/metrics.jsonl"] {
        let place = Place::new("unwritable");
        fs::create_dir_all(place.path(name)).unwrap();
        let error = place.error(&[]);
        assert!(
            error.contains("is a folder") && error.contains(name),
            "{error}"
        );
    }
}

#[test]
fn a_run_that_is_resumed_is_that_without_the_interruption() {
    let place = Place::new("resume");
    let constant = [
        "--schedule",
        "constant",
        "--warm-up",
        "1",
        "--learning-rate",
        "1e-2",
    ];
    let with = |more: &[&str]| place.run(&[&constant[..], more].concat());
    for lora in [&[] as &[&str], &["--lora", "2"]] {
        let _ = fs::remove_dir_all(place.path("out"));
        let _ = fs::remove_dir_all(place.path("whole"));
        with(&[lora, &["--steps", "4", "--output", "@/whole"]].concat()).unwrap();
        with(&[lora, &["--steps", "2"]].concat()).unwrap();
        // The same file by another spelling.
        let spelled = ["--steps", "4", "--resume", "--checkpoint", "@/out/../base/"];
        with(&[lora, &spelled].concat()).unwrap();
        assert_eq!(place.losses("out"), place.losses("whole"));
        let weights =
            |name: &str| fs::read(place.path(name).join("model/model.safetensors")).unwrap();
        let whole = weights("whole");
        assert!(weights("out") == whole, "the weights differ");
        // Once more after the end changes nothing: an adapter is merged once.
        with(&[lora, &spelled].concat()).unwrap();
        assert!(weights("out") == whole, "the weights differ after the end");
    }
    let error = format!(
        "{:#}",
        with(&["--steps", "3", "--resume", "--lora", "2"]).unwrap_err()
    );
    assert!(error.contains("4 steps done"), "{error}");
    let error = format!(
        "{:#}",
        with(&["--steps", "4", "--resume", "--lora", "3"]).unwrap_err()
    );
    assert!(error.contains("--lora is 3, but 2"), "{error}");
}

#[test]
fn a_run_does_not_go_on_from_other_weights() {
    let place = Place::new("other-weights");
    place.run(&["--lora", "2"]).unwrap();
    fs::copy(
        place.path("out/model/model.safetensors"),
        place.path("base/model.safetensors"),
    )
    .unwrap();
    let error = place.error(&["--lora", "2", "--steps", "4", "--resume"]);
    assert!(
        error.contains("weights in") && error.contains("others"),
        "{error}"
    );
}

#[test]
fn missing_weights_are_not_replaced_by_random_ones() {
    let place = Place::new("weights");
    let weights = place.path("base/model.safetensors");
    for (name, said) in [
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002"),
    ] {
        fs::rename(&weights, place.path("base").join(name)).unwrap();
        let error = place.error(&[]);
        assert!(error.contains("neither model.safetensors nor"), "{error}");
        assert!(
            error.contains(said) && error.contains("--random-weights"),
            "{error}"
        );
        fs::rename(place.path("base").join(name), &weights).unwrap();
    }
    fs::remove_file(&weights).unwrap();
    assert!(place.error(&[]).contains("no weights at all"));
    assert!(!place.path("out/initial").exists());
    place.run(&["--random-weights"]).unwrap();
    assert!(place.path("out/initial/model.safetensors").is_file());
    fs::remove_file(place.path("base/tokenizer.json")).unwrap();
    assert!(place
        .error(&["--random-weights"])
        .contains("no tokenizer.json"));
}

#[test]
fn a_git_lfs_pointer_has_its_name() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    for name in [
        "base/model.safetensors",
        "base/tokenizer.json",
        "base/config.json",
        "text.txt",
    ] {
        let place = Place::new("lfs");
        place.0.write(name, pointer);
        let error = place.error(&[]);
        assert!(
            error.contains("git-lfs pointer") && error.contains(name),
            "{error}"
        );
    }
}

#[test]
fn numbers_that_no_run_can_have_are_errors() {
    let place = Place::new("numbers");
    for (arguments, said) in [
        (
            ["--learning-rate", "nan"],
            "--learning-rate must be positive and finite, got NaN",
        ),
        (["--learning-rate", "inf"], "--learning-rate"),
        (["--clip", "nan"], "--clip"),
        (["--validation", "nan"], "--validation"),
        (["--validation", "1"], "--validation"),
        (["--weight-decay", "nan"], "--weight-decay"),
        (["--beta2", "1"], "--beta2"),
        (["--epochs", "nan"], "--epochs"),
        (
            ["--warm-up", "2"],
            "--warm-up must be less than the steps, 2",
        ),
        (["--lora", "0"], "--lora"),
        (["--accumulate", "18446744073709551615"], "--accumulate"),
        (
            ["--length", "65"],
            "--length 65 is more than the model's max_position_embeddings, 64",
        ),
    ] {
        let error = place.error(&arguments);
        assert!(error.contains(said), "{arguments:?}: {error}");
    }
    let error = place.error(&["--learning-rate", "1e30", "--clip", "1e30", "--steps", "5"]);
    assert!(error.contains("lower --learning-rate"), "{error}");
}
