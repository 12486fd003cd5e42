//! Records and special tokens.

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
        ("{\"text\": null, \"id\": 1}", "it has text, id"),
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
    let binary = place.0.write("d.zst", b"\x28\xb5\x2f\xfd");
    let error = Data::read(Some(&binary)).err().unwrap();
    assert!(
        format!("{error:#}").contains("not a text in UTF-8"),
        "{error:#}"
    );
    let parquet = place.0.write("d.parquet", b"PAR1\xff\xfe");
    let error = Data::read(Some(&parquet)).err().unwrap();
    assert!(format!("{error:#}").contains("d.parquet: "), "{error:#}");
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

/// A Parquet file of two rows, with a list of messages and a nullable weight.
#[test]
fn rows_of_parquet_are_records() {
    use parquet::column::writer::ColumnWriter;
    use parquet::data_type::ByteArray;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    let place = Place::new("parquet");
    let schema = "message schema {
        optional group messages (LIST) { repeated group list { optional group element {
            optional binary content (UTF8); optional binary role (UTF8); } } }
        optional double weight;
    }";
    let schema = std::sync::Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let snappy = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY);
    let path = place.path("d.parquet");
    let file = fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, snappy.build().into()).unwrap();
    let mut rows = writer.next_row_group().unwrap();
    let mut column = 0;
    while let Some(mut writer) = rows.next_column().unwrap() {
        let texts = |texts: [&str; 4]| texts.map(|text| ByteArray::from(text.as_bytes().to_vec()));
        match (column, writer.untyped()) {
            (0, ColumnWriter::ByteArrayColumnWriter(w)) => {
                let values = texts(["sat?", "on", "cat?", "mat"]);
                w.write_batch(&values, Some(&[4; 4]), Some(&[0, 1, 0, 1]))
                    .unwrap();
            }
            (1, ColumnWriter::ByteArrayColumnWriter(w)) => {
                let values = texts(["user", "assistant", "user", "assistant"]);
                w.write_batch(&values, Some(&[4; 4]), Some(&[0, 1, 0, 1]))
                    .unwrap();
            }
            (2, ColumnWriter::DoubleColumnWriter(w)) => {
                w.write_batch(&[0.5], Some(&[0, 1]), None).unwrap();
            }
            _ => panic!("column {column}"),
        }
        column += 1;
        writer.close().unwrap();
    }
    rows.close().unwrap();
    writer.close().unwrap();

    let encoder = place.encoder();
    let template = super::chat::template(super::chat::CHATML);
    let rules = Rules {
        encoder: &encoder,
        template: Some(&template),
        learn: Learn::Answers,
        length: 200,
        strict: true,
    };
    let data = Data::read(Some(&path)).unwrap();
    assert!(
        data.describe().ends_with(": 2 records"),
        "{}",
        data.describe()
    );
    let made = data.sequences(&rules).unwrap().sequences;
    for (sequence, learnt, weight) in [
        (&made[0], "on<|im_end|>", 1.),
        (&made[1], "mat<|im_end|>", 0.5),
    ] {
        assert_eq!(texts(&encoder, sequence).1, learnt);
        assert!(sequence.weights.iter().all(|&w| w == 0. || w == weight));
    }
}

#[test]
fn skipped_records_of_the_validation_are_named_too() {
    let place = Place::new("skipped-validation");
    let data = json!({"text": "The cat sat."}).to_string();
    place.0.write("d.jsonl", [&*data; 3].join("\n"));
    let held_out = [data, json!({"text": ""}).to_string()].join("\n");
    place.0.write("v.jsonl", held_out);
    let arguments = ["--data", "@/d.jsonl", "--validation-data", "@/v.jsonl"];
    let error = place.error(&[&arguments[..], &["--strict"]].concat());
    assert!(error.contains("v.jsonl, line 2"), "{error}");
    let args = place.arguments(&arguments).unwrap();
    let rules = Rules {
        encoder: &place.encoder(),
        template: None,
        learn: Learn::Answers,
        length: 32,
        strict: false,
    };
    let split = Sources::read(&args.run)
        .unwrap()
        .split(&args.run, &rules)
        .unwrap();
    assert_eq!((split.train.len(), split.validation.len()), (3, 1));
    let [skipped] = split.skipped.as_slice() else {
        panic!("{:?}", split.skipped)
    };
    assert!(
        skipped.contains("v.jsonl: 1 records skipped") && skipped.contains("line 2"),
        "{skipped}"
    );
}

#[test]
fn weights_are_of_records_and_of_answers() {
    let place = Place::new("weights-of");
    let encoder = place.encoder();
    let of = |record: Value, learn| {
        let path = place.0.write("d.jsonl", record.to_string());
        let rules = Rules {
            encoder: &encoder,
            template: Some(&super::chat::template(super::chat::CHATML)),
            learn,
            length: 200,
            strict: true,
        };
        let made = Data::read(Some(&path)).and_then(|data| data.sequences(&rules));
        let sequence = made.map(|made| made.sequences.into_iter().next().unwrap());
        sequence.map_err(|e| format!("{e:#}"))
    };
    let distinct = |sequence: &Sequence| {
        let mut weights = sequence.weights.clone();
        weights.dedup();
        weights
    };
    let prompt = json!({"prompt": "The cat", "completion": " sat.", "weight": 0.25});
    assert_eq!(
        distinct(&of(prompt.clone(), Learn::Answers).unwrap()),
        [0., 0.25]
    );
    assert_eq!(distinct(&of(prompt, Learn::All).unwrap()), [0.25]);
    let chat = json!({"weight": 2, "messages": [
        {"role": "user", "content": "sat?"}, {"role": "assistant", "content": "on", "weight": 0},
        {"role": "user", "content": "cat?"}, {"role": "assistant", "content": "mat", "weight": 1.5},
    ]});
    let made = of(chat.clone(), Learn::Answers).unwrap();
    assert_eq!(distinct(&made), [0., 3., 0.]);
    assert_eq!(texts(&encoder, &made).1, "mat<|im_end|>");
    assert_eq!(
        distinct(&of(chat, Learn::All).unwrap()),
        [2., 0., 2., 3., 2.]
    );
    let error = of(json!({"text": "a", "weight": -1}), Learn::All)
        .err()
        .unwrap();
    assert!(error.contains("line 1: `weight` is -1"), "{error}");
    let error = of(json!({"text": "a", "weight": 0}), Learn::All)
        .err()
        .unwrap();
    assert!(error.contains("no token to learn"), "{error}");
}
