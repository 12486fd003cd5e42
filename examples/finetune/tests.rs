//! Whole runs of tiny models, with the arguments that a user writes.

use crate::arguments::{Args, Learn};
use crate::chat::Template;
use crate::common::fixture::{checkpoint, contents, Folder, TEXT};
use crate::common::tokens::{Encoder, Sequence};
use crate::data::{Data, Rules, Sequences};
use crate::run::run;
use anyhow::Result;
use candle_cut_cross_entropy::models::Config;
use clap::Parser;
use serde_json::{json, Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// A folder with a checkpoint and a text, for a run of two steps into `out`.
struct Place(Folder);

impl Place {
    fn new(name: &str) -> Self {
        let folder = Folder::new(name);
        checkpoint(&folder.0.join("base"));
        folder.write("text.txt", TEXT.repeat(8));
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0 .0.join(name)
    }

    /// `@` in an argument is the folder; what is given here comes after, and in place of, the usual.
    fn run(&self, arguments: &[&str]) -> Result<()> {
        let usual = [
            ("--checkpoint", "@/base"),
            ("--data", "@/text.txt"),
            ("--output", "@/out"),
            ("--length", "16"),
            ("--batch", "2"),
        ];
        let usual = usual.iter().filter(|(name, _)| !arguments.contains(name));
        let usual = usual.flat_map(|&(name, value)| [name, value]);
        let steps = ["--steps", "2"];
        let steps = steps
            .iter()
            .filter(|_| !arguments.contains(&"--steps") && !arguments.contains(&"--epochs"));
        let folder = self.0 .0.to_string_lossy();
        let all = ["finetune"].into_iter().chain(usual).chain(steps.copied());
        let all = all.chain(arguments.iter().copied());
        run(&Args::try_parse_from(all.map(|a| a.replace('@', &folder)))?)
    }

    fn error(&self, arguments: &[&str]) -> String {
        format!("{:#}", self.run(arguments).expect_err("an error is due"))
    }

    fn metrics(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(name).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    fn losses(&self, name: &str) -> Vec<f64> {
        let lines = self.metrics(name).into_iter();
        lines.filter_map(|line| line["loss"].as_f64()).collect()
    }

    /// What a file of records becomes.
    fn sequences(&self, name: &str, text: &str, template: Option<&Template>) -> Result<Sequences> {
        let path = self.0.write(name, text);
        let rules = Rules {
            encoder: &self.encoder(),
            template,
            learn: Learn::Answers,
            length: 32,
            strict: false,
        };
        Data::read(Some(&path))?.sequences(&rules)
    }

    fn encoder(&self) -> Encoder {
        let base = self.path("base");
        let config = Config::from_file(base.join("config.json")).unwrap();
        Encoder::load(&base, &config).unwrap()
    }
}

/// The text of a sequence, and that of its learnt tokens, special tokens included.
fn texts(encoder: &Encoder, sequence: &Sequence) -> (String, String) {
    let decode = |ids: &[u32]| encoder.tokenizer.decode(ids, false).unwrap();
    let learnt = sequence.ids.iter().zip(&sequence.learnt);
    let learnt: Vec<u32> = learnt.filter(|(_, &l)| l).map(|(&id, _)| id).collect();
    (decode(&sequence.ids), decode(&learnt))
}

fn all_files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    contents(folder).into_iter().collect()
}

// Files.

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

// Checkpoints.

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

// Data.

#[test]
fn special_tokens_are_there_once() {
    let place = Place::new("special");
    let encoder = place.encoder();
    let of = |record: Value| {
        let made = place
            .sequences("d.jsonl", &record.to_string(), None)
            .unwrap();
        texts(&encoder, &made.sequences[0])
    };
    let learnt = (
        "<s>The cat sat.</s>".to_owned(),
        "<s>The cat sat.</s>".to_owned(),
    );
    assert_eq!(of(json!({"text": "The cat sat."})), learnt);
    assert_eq!(of(json!({"text": "<s>The cat sat.</s>"})), learnt);
    let learnt = ("<s>The cat sat.</s>".to_owned(), " sat.</s>".to_owned());
    assert_eq!(
        of(json!({"prompt": "The cat", "completion": " sat."})),
        learnt
    );
    assert_eq!(
        of(json!({"prompt": "<s>The cat", "completion": " sat.</s>"})),
        learnt
    );
}

#[test]
fn records_are_read_whatever_the_file_is_called() {
    let place = Place::new("names");
    let record = r#"{"instruction": "Sit", "input": null, "output": "The cat sat."}"#;
    let encoder = place.encoder();
    for (name, text) in [
        ("d.jsonl", record.to_owned()),
        ("d.JSONL", format!("\u{feff}{record}\r\n\r\n")),
        ("d.ndjson", record.to_owned()),
        ("d.json", format!("\u{feff} [\n{record}\n]")),
        ("d.txt", record.to_owned()),
        ("d", format!("[{record}]")),
    ] {
        let rules = Rules {
            encoder: &encoder,
            template: None,
            learn: Learn::Answers,
            length: 200,
            strict: true,
        };
        let data = Data::read(Some(&place.0.write(name, text))).unwrap();
        let made = data.sequences(&rules).unwrap();
        assert_eq!(
            texts(&encoder, &made.sequences[0]),
            (
                "<s>### Instruction:\nSit\n\n### Response:\nThe cat sat.</s>".into(),
                "The cat sat.</s>".into()
            ),
            "{name}"
        );
    }
    for (text, said) in [
        (
            "{\"text\": \"a\"}\n{\"text\": 3}",
            "line 2: `text` is 3, a string is wanted",
        ),
        ("{\"text\": \"a\"}\n{\"text\": ", "line 2: EOF"),
        (
            "{\"text\": \"a\"}\n{\"output\": \"a\"}",
            "line 2: `output` without `instruction`",
        ),
        (
            "{\"text\": \"a\"}\n[1]",
            "line 2: a record is a JSON object",
        ),
        ("{\"text\": null, \"id\": 1}", "it has id, text"),
        (
            "[{\"text\": \"a\"}, {\"prompt\": \"a\"}]",
            "record 2: `prompt` without",
        ),
        ("{\n\"data\": []\n}", "one JSON object"),
        ("[]", "no records"),
        ("plain", "line 1: expected value"),
    ] {
        let error = place.sequences("bad.json", text, None).err().unwrap();
        assert!(format!("{error:#}").contains(said), "{text}: {error:#}");
    }
    let parquet = place.0.write("d.parquet", b"PAR1\xff\xfe");
    let error = Data::read(Some(&parquet)).err().unwrap();
    assert!(error.to_string().contains("not a text in UTF-8"), "{error}");
}

#[test]
fn records_that_cannot_be_used_are_skipped_and_named() {
    let place = Place::new("skipped");
    let long = TEXT.repeat(10);
    let records = [
        json!({"prompt": "The cat", "completion": " sat on the mat.", "id": 1}),
        json!({"prompt": long, "completion": " sat."}),
        json!({"prompt": "The dog", "completion": ""}),
        json!({"prompt": "The dog", "completion": " sat on the log."}),
        json!({"prompt": long, "completion": " sat."}),
    ];
    let text = records.map(|record| record.to_string()).join("\n");
    let made = place.sequences("d.jsonl", &text, None).unwrap();
    assert_eq!(made.sequences.len(), 2);
    let skipped = made.describe_skipped().unwrap();
    assert!(skipped.starts_with("3 records skipped: "), "{skipped}");
    assert!(
        skipped.contains("fills --length (line 2, line 5)"),
        "{skipped}"
    );
    assert!(skipped.contains("is empty (line 3)"), "{skipped}");
    let data = Data::read(Some(&place.path("d.jsonl"))).unwrap();
    assert!(data.describe().contains("5 records; `id` of 1 is not read"));

    place
        .run(&["--data", "@/d.jsonl", "--length", "32"])
        .unwrap();
    let error = place.error(&["--data", "@/d.jsonl", "--length", "32", "--strict"]);
    assert!(
        error.contains("line 2") && error.contains("fills --length"),
        "{error}"
    );
}

#[test]
fn an_answer_of_no_token_is_skipped_not_nan() {
    let place = Place::new("no-token");
    // Without an end token, and with a normalizer that leaves nothing of spaces.
    let config = place.path("base/config.json");
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    value.as_object_mut().unwrap().remove("eos_token_id");
    fs::write(&config, value.to_string()).unwrap();
    let tokenizer = place.path("base/tokenizer.json");
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&tokenizer).unwrap()).unwrap();
    value["normalizer"] = json!({"type": "Strip", "strip_left": true, "strip_right": true});
    fs::write(&tokenizer, value.to_string()).unwrap();
    let records = [("The cat", "sat"), ("The dog", " "), ("The mat", "sat")];
    let records = records.map(|(p, c)| json!({"prompt": p, "completion": c}).to_string());
    place.0.write("d.jsonl", records.join("\n"));
    place
        .run(&["--data", "@/d.jsonl", "--steps", "3", "--batch", "1"])
        .unwrap();
    assert!(place.losses("out").iter().all(|loss| loss.is_finite()));
    let made = place
        .sequences("d.jsonl", &records.join("\n"), None)
        .unwrap();
    assert_eq!(
        made.describe_skipped().unwrap(),
        "1 records skipped: no token to learn (line 2)"
    );
}

#[test]
fn epochs_and_validation_are_as_asked() {
    let place = Place::new("epochs");
    let records = (0..6).map(|_| json!({"text": "The cat sat."}).to_string());
    place
        .0
        .write("d.jsonl", records.collect::<Vec<_>>().join("\n"));
    let data = ["--data", "@/d.jsonl", "--batch", "2"];
    place
        .run(&[&data[..], &["--validation", "0", "--epochs", "1.5"]].concat())
        .unwrap();
    // 1.5 times 6 sequences, two a step.
    assert_eq!(place.losses("out").len(), 5);
    let validated = |name| {
        place
            .metrics(name)
            .iter()
            .any(|l| l["validation_loss"].is_f64())
    };
    assert!(!validated("out"));
    let other = ["--validation-data", "@/text.txt", "--output", "@/other"];
    place.run(&[&data[..], &other].concat()).unwrap();
    assert!(validated("other"));
}

// Chat templates.

const CHATML: &str = "\
{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nBe kind<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'].strip() + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}";

fn template(source: &str) -> Template {
    Template::new(
        source.into(),
        Map::from_iter([("bos_token".into(), "<s>".into())]),
    )
    .unwrap()
}

#[test]
fn conversations_are_written_by_the_template_and_the_answers_are_learnt() {
    let place = Place::new("chat");
    let messages = json!({"messages": [
        {"role": "user", "content": "sat?"},
        {"role": "assistant", "content": " on "},
        {"role": "user", "content": "cat?"},
        {"role": "assistant", "content": "mat"},
    ]});
    let rules = Rules {
        encoder: &place.encoder(),
        template: Some(&template(CHATML)),
        learn: Learn::Answers,
        length: 200,
        strict: true,
    };
    let data = place.0.write("d.jsonl", messages.to_string());
    let data = Data::read(Some(&data)).unwrap();
    let made = data.sequences(&rules).unwrap();
    let (whole, learnt) = texts(&place.encoder(), &made.sequences[0]);
    assert_eq!(
        whole,
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nsat?<|im_end|>\n\
         <|im_start|>assistant\non<|im_end|>\n<|im_start|>user\ncat?<|im_end|>\n\
         <|im_start|>assistant\nmat<|im_end|>\n"
    );
    assert_eq!(learnt, "on<|im_end|>mat<|im_end|>");
    let all = data
        .sequences(&Rules {
            learn: Learn::All,
            ..rules
        })
        .unwrap();
    assert_eq!(texts(&place.encoder(), &all.sequences[0]).1, whole);
}

#[test]
fn templates_have_what_transformers_gives_them() {
    let messages = [json!({"role": "user", "content": "a"})];
    let render =
        |source: &str| template(source).render(&messages, &json!([{"b": 1, "a": [1, "é<"]}]), true);
    assert_eq!(
        render("{{ bos_token }}{{ messages[0].content }}").unwrap(),
        "<s>a"
    );
    assert_eq!(
        render("{{ tools[0] | tojson }}").unwrap(),
        r#"{"a": [1, "é<"], "b": 1}"#
    );
    assert_eq!(
        render(
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}"
        )
        .unwrap(),
        "02"
    );
    let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
    assert_eq!(error.to_string(), "roles must alternate");
    assert_eq!(
        render("{{ 'a,b'.split(',')[-1] }}{{ messages[0].get('x', 'y') }}").unwrap(),
        "by"
    );
}

#[test]
fn a_chat_template_is_found_and_used_in_a_run() {
    let place = Place::new("template");
    let chat = json!({"messages": [
        {"role": "user", "content": "sat?"}, {"role": "assistant", "content": "on the mat"},
    ]});
    place
        .0
        .write("d.json", json!([chat, chat, chat]).to_string());
    let chats = ["--data", "@/d.json", "--length", "64"];
    assert!(place.error(&chats).contains("--chat-template"));
    place.0.write("t.jinja", CHATML);
    let named = ["--chat-template", "@/t.jinja", "--prompt", "sat?"];
    place.run(&[&chats[..], &named].concat()).unwrap();
    let config = |value: Value| {
        place
            .0
            .write("base/tokenizer_config.json", value.to_string())
    };
    for template in [
        json!(CHATML),
        json!([{"name": "default", "template": CHATML}]),
    ] {
        config(json!({"chat_template": template}));
        place.run(&chats).unwrap();
        assert!(place.path("out/model/tokenizer_config.json").is_file());
    }
    config(json!({"chat_template": "{% for %}"}));
    assert!(place.error(&chats).contains("cannot be read"));
    place.0.write("base/tokenizer_config.json", "{");
    assert!(place.error(&chats).contains("tokenizer_config.json"));
}
