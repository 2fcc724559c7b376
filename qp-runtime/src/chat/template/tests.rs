use serde_json::json;

use super::*;

/// A template of one file with the special tokens `<s>` and `</s>`.
fn template(source: &str) -> Result<Template, Error> {
    let special = BTreeMap::from([("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())]);
    let sources = vec![("default".to_owned(), "chat_template.jinja".to_owned(), source.to_owned())];
    Template::new(sources, special, false)
}

fn render(source: &str) -> Result<String, Error> {
    template(source)?.render(&[json!({"role": "user", "content": "hello"})], &Options::default())
}

/// What Jinja2 makes of templates in the style of well-known families: see `tests/data/chat/expected.py`.
#[test]
fn renders_as_jinja2_does() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/chat");
    let cases: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(format!("{dir}/expected.json")).unwrap()).unwrap();
    assert!(cases.len() >= 96);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let source = std::fs::read_to_string(format!("{dir}/{name}")).unwrap();
        let options = Options {
            tools: (!case["tools"].is_null()).then(|| case["tools"].clone()),
            variables: case["variables"].as_object().unwrap().clone(),
        };
        let got = template(&source).unwrap().render(case["messages"].as_array().unwrap(), &options);
        let place = format!("{name}, {}, {}", case["dialogue"], case["variables"]);
        match (got, case["text"].as_str()) {
            (Ok(text), Some(expected)) => assert_eq!(text, expected, "{place}"),
            (Err(Error::Refused(text)), None) => assert_eq!(text, case["error"], "{place}"),
            (got, expected) => panic!("{place}: {got:?} instead of {expected:?}"),
        }
    }
}

#[test]
fn failures_say_where() {
    let error = |source: &str| render(source).unwrap_err().to_string();
    assert_eq!(
        error("a\n{{ messages[0].x.y }}"),
        "the model's chat template fails: chat_template.jinja:2: undefined value: `messages[0].x` is undefined: \
         {{ messages[0].x.y }}"
    );
    let text = error("a\n\n{% if %}");
    assert!(text.contains("chat_template.jinja:3: syntax error"), "{text}");
    let text = error("{{ nonsense(1) }}");
    assert!(text.contains("chat_template.jinja:1: unknown function"), "{text}");
    let text = error("{{ raise_exception('no ' + messages[0].role) }}");
    assert_eq!(text, "the model's chat template refuses these messages: no user");
    let text = error(&format!("{}{{{{ messages[0].x.y }}}}", "long ".repeat(100)));
    assert!(text.ends_with("`messages[0].x` is undefined: .x.y"), "{text}");
}

#[test]
fn every_template_ends() {
    let long = [
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
    ];
    for source in long {
        assert!(matches!(render(source), Err(Error::Template { .. })), "{source}");
    }
    // A long conversation stays within the budget.
    let chatml = include_str!("../../../../tests/data/chat/thinking.jinja");
    let messages: Vec<Value> = (0..4000)
        .map(|i| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": "word ".repeat(50)}))
        .collect();
    assert!(template(chatml).unwrap().render(&messages, &Options::default()).unwrap().len() > 1_000_000);
}

#[test]
fn time_is_formatted() {
    let text = render("{{ strftime_now('%d %b %Y') }}").unwrap();
    assert_eq!((text.len(), &text[7..9]), (11, "20"), "{text}");
    assert!(render("{{ strftime_now('%!') }}").unwrap_err().to_string().contains("strftime_now"));
}

#[test]
fn files_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        std::fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
        std::fs::write(dir.path().join(name), text).unwrap();
    };
    let read = || Template::read(&Files::open(dir.path()).unwrap());
    let text =
        |options: &Options| read().unwrap().render(&[json!({"role": "user", "content": "hello"})], options).unwrap();
    let (none, tools) = (Options::default(), Options { tools: Some(json!([])), ..Options::default() });

    assert!(read().unwrap().is_plain());
    assert_eq!(text(&none), "User: hello\nAssistant:");
    let dialogue = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")];
    let dialogue: Vec<Value> = dialogue.map(|(role, content)| json!({"role": role, "content": content})).to_vec();
    assert_eq!(
        read().unwrap().render(&dialogue, &none).unwrap(),
        "Be brief.\n\nUser: a\nAssistant: b\nUser: c\nAssistant:"
    );

    write("special_tokens_map.json", r#"{"eos_token": "<map>", "bos_token": "<map>"}"#);
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}1{{ eos_token }}"}"#,
    );
    assert_eq!(text(&none), "<b>1<map>");
    let list = r#"{"chat_template": [{"name": "default", "template": "2"}, {"name": "tool_use", "template": "3"}]}"#;
    write("tokenizer_config.json", list);
    assert_eq!((text(&none), text(&tools)), ("2".to_owned(), "3".to_owned()));
    write("tokenizer_config.json", r#"{"chat_template": [{"name": "rag", "template": "4"}]}"#);
    assert_eq!((text(&none), text(&tools)), ("4".to_owned(), "4".to_owned()));
    write("chat_template.json", r#"{"chat_template": "5"}"#);
    assert_eq!(text(&none), "5");
    write("chat_template.jinja", "6");
    assert_eq!((text(&none), text(&tools)), ("6".to_owned(), "6".to_owned()));
    write("additional_chat_templates/tool_use.jinja", "7");
    assert_eq!((text(&none), text(&tools)), ("6".to_owned(), "7".to_owned()));

    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    std::fs::remove_dir_all(dir.path().join("additional_chat_templates")).unwrap();
    write("chat_template.json", r#"{"chat_template": 3}"#);
    let error = read().unwrap_err().to_string();
    assert!(error.contains("chat_template.json: chat_template: expected a text"), "{error}");
}
