//! Records, special tokens, and chat templates.

use super::*;

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
    // Without an end token (null: an absent one is the family's), and with a normalizer that leaves nothing of spaces.
    let config = place.path("base/config.json");
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    value["eos_token_id"] = Value::Null;
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
