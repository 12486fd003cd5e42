//! Chat templates.

use super::*;
use crate::fine_tuning::records::{self, Chat, Content, Example};

pub const CHATML: &str = "\
{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nBe kind<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'].strip() + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}";

pub fn template(source: &str) -> Template {
    let special = Map::from_iter([("bos_token".into(), "<s>".into())]);
    Template::new(source, special).unwrap()
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
    let chat = Chat {
        tools: json!([{"b": 1, "a": [1, "é<"]}]),
        ..Chat::default()
    };
    let render = |source: &str| {
        Ok::<_, anyhow::Error>(template(source).render(&messages, &chat, true)?.text)
    };
    assert_eq!(
        render("{{ bos_token }}{{ messages[0].content }}").unwrap(),
        "<s>a"
    );
    assert_eq!(
        render("{{ tools[0] | tojson }}").unwrap(),
        r#"{"b": 1, "a": [1, "é<"]}"#
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

/// What transformers writes (chat.json by tests/golden/chat.py), token by token.
#[test]
fn conversations_are_those_of_transformers() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/");
    let read = |name: &str| fs::read_to_string(format!("{golden}{name}")).unwrap();
    let place = Place::new("golden");
    place
        .0
        .write("chat/tokenizer.json", read("chat-tokenizer.json"));
    let config = json!({"model_type": "llama", "vocab_size": 320, "eos_token_id": 1});
    let config = Config::from_json(&config.to_string()).unwrap();
    let encoder = Encoder::load(&place.path("chat"), &config).unwrap();
    let all: Map<String, Value> = serde_json::from_str(&read("chat.json")).unwrap();
    assert_eq!(all.len(), 6);
    for (name, of) in &all {
        let special = of["special"].as_object().unwrap().clone();
        let template = Template::new(of["template"].as_str().unwrap(), special).unwrap();
        for (i, case) in of["cases"].as_array().unwrap().iter().enumerate() {
            let record = json!({
                "messages": case["messages"], "tools": case["tools"], "chat_template_kwargs": case["kwargs"],
            });
            let path = place.0.write("d.jsonl", record.to_string());
            let Content::Records(records) = records::read(&path).unwrap() else {
                panic!("{name} {i}: no record")
            };
            let Example::Chat { chat, .. } = &records.records[0].example else {
                panic!("{name} {i}: no conversation")
            };
            let rendered = template.render(&chat.messages, chat, case["answer"] == true);
            if let Some(error) = case["error"].as_str() {
                assert_eq!(rendered.err().unwrap().to_string(), error, "{name} {i}");
                continue;
            }
            let rendered = rendered.unwrap();
            assert_eq!(rendered.text, case["text"], "{name} {i}");
            let tokens = encoder.encode_spans(&rendered.text).unwrap();
            let ids: Vec<String> = tokens.iter().map(|(id, _)| id.to_string()).collect();
            assert_eq!(ids.join(" "), case["ids"], "{name} {i}");
            if let Some(answers) = case["answers"].as_str().filter(|_| case["answer"] != true) {
                let path = place.0.write("d.jsonl", record.to_string());
                let rules = Rules {
                    encoder: &encoder,
                    template: Some(&template),
                    learn: Learn::Answers,
                    length: 2000,
                    strict: true,
                };
                let made = Data::read(Some(&path)).unwrap().sequences(&rules).unwrap();
                let weights = made.sequences[0].weights.iter();
                let learnt: String = weights.map(|w| if *w > 0. { '1' } else { '0' }).collect();
                assert_eq!(learnt, answers, "{name} {i}");
            }
        }
    }
}

#[test]
fn generation_marks_what_is_learnt() {
    let source = "\
{% for m in messages %}
{%- if m.role == 'assistant' -%}
    <a>
    {% generation %}
    {{ m.content }}</a>
    {%- endgeneration -%}
{% else %}<u>{{ m.content }}{% endif %}
{% endfor %}";
    let message = |role, content| json!({"role": role, "content": content});
    let chat = Chat {
        messages: vec![
            message("user", "a"),
            message("assistant", "b"),
            message("assistant", "c"),
        ],
        ..Chat::default()
    };
    let (text, answers) = template(source).answers(&chat).unwrap();
    assert_eq!(text, "<u>a<a>\n    b</a><a>\n    c</a>");
    let answers: Vec<&str> = answers.into_iter().map(|answer| &text[answer]).collect();
    assert_eq!(answers, ["    b</a>", "    c</a>"]);
}

#[test]
fn values_are_written_as_python_does() {
    let render = |source: &str| {
        let kwargs = json!({"x": {
            "z": [1e-7, 1e16, 0.0001, 2.5, -0.0, 123456789.0, 1e22, 3], "a": "é\u{7f}\n😀", "e": {}, "l": []
        }});
        let chat = Chat {
            kwargs: kwargs.as_object().unwrap().clone(),
            ..Chat::default()
        };
        template(source).render(&[], &chat, false).unwrap().text
    };
    // By Python 3.13: json.dumps(x, ensure_ascii=..), str(x).
    for (source, want) in [
        ("{{ x | tojson }}", r#"{"z": [1e-07, 1e+16, 0.0001, 2.5, -0.0, 123456789.0, 1e+22, 3], "a": "é\n😀", "e": {}, "l": []}"#.replace("\\u007f", "\u{7f}")),
        ("{{ x.a | tojson(ensure_ascii=true) }}", r#""\u00e9\u007f\n\ud83d\ude00""#.to_owned()),
        ("{{ {'b': [1, []], 'a': {}} | tojson(indent=2) }}", "{\n  \"b\": [\n    1,\n    []\n  ],\n  \"a\": {}\n}".to_owned()),
        ("{{ {'b': 1, 'a': [1, 2]} | tojson(sort_keys=true, separators=(',', ':')) }}", r#"{"a":[1,2],"b":1}"#.to_owned()),
        ("{{ true }} {{ none }} {{ 1 }} {{ 'a' }} {{ 2.5 }} {{ absent }}", "True None 1 a 2.5 ".to_owned()),
    ] {
        assert_eq!(render(source), want, "{source}");
    }
    let today = chrono::Local::now().format("%d %b %Y").to_string();
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}"), today);
    assert!(
        today.ends_with(|c: char| c.is_ascii_digit()) && today.len() == 11,
        "{today}"
    );
}
