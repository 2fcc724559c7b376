//! `qp serve` as a process: the interface, load, faults, and other people's clients.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::server::{MODEL, Response, Server, model_with};
use serde_json::{Value, json};

fn message(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// The parameters of a short greedy answer, with others.
fn with(base: Value, more: Value) -> Value {
    let mut all = base;
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

fn text(response: &Response) -> String {
    assert_eq!(response.status, 200, "{}", response.text());
    let choice = &response.json()["choices"][0];
    choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().to_owned()
}

#[test]
fn the_interface() {
    // Times without an end are taken.
    let forever = u64::MAX.to_string();
    let server = Server::start(&["--name", "kjv", "--context", "256", "--time", &forever, "--patience", &forever]);
    let prompt = json!({"prompt": "And it came to pass in those days, that", "max_tokens": 12, "temperature": 0});
    let complete = |more: Value| server.post("/v1/completions", &with(prompt.clone(), more));

    // What the model is known to say, by the reference in its directory.
    let alone = complete(json!({}));
    let known: Value = serde_json::from_str(include_str!("../../../models/kjv-llama/reference.json")).unwrap();
    let said = known.to_string();
    assert!(said.contains(text(&alone).trim()), "{} is not in the reference", text(&alone));
    let usage = &alone.json()["usage"];
    assert_eq!(usage["completion_tokens"], 12);
    assert_eq!(usage["total_tokens"], usage["prompt_tokens"].as_u64().unwrap() + 12);
    assert_eq!(alone.json()["choices"][0]["finish_reason"], "length");
    assert_eq!((&alone.json()["object"], &alone.json()["model"]), (&json!("text_completion"), &json!("kjv")));

    // Streamed, the same.
    let events = server.stream(
        "/v1/completions",
        &with(prompt.clone(), json!({"stream": true, "stream_options": {"include_usage": true}})),
    );
    let streamed: String =
        events.iter().flat_map(|e| e["choices"].as_array().unwrap()).map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(streamed, text(&alone));
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 12);

    // Seeds repeat, and the n-th answer is that of the n-th seed.
    let drawn = |seed: i64, n: i64| {
        let r = complete(json!({"temperature": 1.2, "seed": seed, "n": n}));
        let texts: Vec<String> =
            r.json()["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect();
        texts
    };
    assert_eq!(drawn(7, 3), [drawn(7, 1), drawn(8, 1), drawn(9, 1)].concat());
    assert_ne!(drawn(7, 1), drawn(8, 1));

    // A text that ends the answer is no part of it.
    let whole = text(&alone);
    let word = whole.split_whitespace().nth(3).unwrap();
    let stopped = complete(json!({"stop": [word]}));
    assert_eq!(text(&stopped), whole[..whole.find(word).unwrap()]);
    assert_eq!(stopped.json()["choices"][0]["finish_reason"], "stop");

    // Probabilities, bias, forms.
    let report = complete(json!({"logprobs": 2, "max_tokens": 3}));
    let report = &report.json()["choices"][0]["logprobs"];
    assert_eq!(report["tokens"].as_array().unwrap().len(), 3);
    let chosen = report["token_logprobs"][0].as_f64().unwrap();
    let best =
        report["top_logprobs"][0].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
    assert!(chosen <= 0.0 && (chosen - best).abs() < 1e-6);
    let tokens = server.post("/tokenize", &json!({"text": whole})).json();
    let first = tokens["tokens"].as_array().unwrap().iter().find(|t| t.as_u64().unwrap() > 1).unwrap().to_string();
    assert_ne!(text(&complete(json!({"logit_bias": {first: -100}}))), whole);
    let form = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "object", "properties": {"day": {"type": "integer", "minimum": 1, "maximum": 31}}, "required": ["day"],
        "additionalProperties": false}}});
    let formed = text(&complete(json!({"response_format": form, "max_tokens": 60, "temperature": 1.0, "seed": 3})));
    let day =
        serde_json::from_str::<Value>(&formed).unwrap_or_else(|e| panic!("{formed}: {e}"))["day"].as_i64().unwrap();
    assert!((1..=31).contains(&day));
    let regex = json!({"type": "regex", "regex": "(Adam|Noah) [a-z]{3}"});
    let formed = text(&complete(json!({"response_format": regex, "max_tokens": 30})));
    assert!(formed.len() == 8 && (formed.starts_with("Adam ") || formed.starts_with("Noah ")), "{formed}");

    // Chat: the bundled model's template makes a text of the messages.
    let ask =
        json!({"messages": message("And it came to pass in those days, that"), "max_tokens": 12, "temperature": 0});
    let chat = server.post("/v1/chat/completions", &with(ask.clone(), json!({"logprobs": true, "top_logprobs": 2})));
    assert_eq!(text(&chat), whole);
    let entry = &chat.json()["choices"][0]["logprobs"]["content"][0];
    assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
    let bytes: Vec<u8> = entry["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), entry["token"].as_str().unwrap());
    let events = server.stream("/v1/chat/completions", &with(ask.clone(), json!({"stream": true, "n": 2})));
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    for index in 0..2 {
        let of = |e: &&Value| e["choices"][0]["index"] == index;
        let parts = events.iter().filter(of).filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
        assert_eq!(parts.collect::<String>(), whole);
        assert_eq!(events.iter().rfind(of).unwrap()["choices"][0]["finish_reason"], "length");
    }
    // The second turn finds the first in the cache.
    let long = "In the beginning God created the heaven and the earth. ".repeat(6);
    let turn = |n: u64| {
        let body = json!({"messages": message(&long), "max_tokens": n, "temperature": 0});
        server.post("/v1/chat/completions", &body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(turn(1), 0);
    assert!(turn(2) >= 64);

    // What else there is.
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "kjv");
    assert_eq!(server.get("/v1/models/kjv").status, 200);
    assert_eq!(server.get("/v1/models/other").status, 404);
    assert_eq!(server.get("/health").json()["status"], "ok");
    assert!(server.get("/metrics").text().contains("\nqp_tokens_generated_total "));
    let status = server.get("/status").json();
    assert_eq!((status["layers"].as_array().unwrap().len(), &status["live"]["running"]), (44, &json!(0)));
    assert!(server.get("/").text().contains("<!doctype html>"));

    // Errors have OpenAI's form and name the parameter.
    for (path, body, status, param) in [
        ("/v1/completions", json!({"prompt": "a", "temperature": -1}), 400, json!("temperature")),
        ("/v1/completions", json!({"prompt": "a", "max_tokens": 1000}), 400, json!("prompt")),
        ("/v1/completions", json!({"prompt": [99999]}), 400, json!("prompt")),
        ("/v1/completions", json!({"prompt": "a", "model": "gpt"}), 404, json!("model")),
        (
            "/v1/completions",
            json!({"prompt": "a", "response_format": {"type": "regex", "regex": "("}}),
            400,
            json!("response_format"),
        ),
        ("/v1/chat/completions", json!({"messages": [{"content": "x"}]}), 400, json!("messages")),
        ("/v1/embeddings", json!({"input": "x"}), 400, Value::Null),
        ("/nowhere", json!({}), 404, Value::Null),
        ("/health", json!({}), 405, Value::Null),
    ] {
        let r = server.post(path, &body);
        assert_eq!(r.status, status, "{path} {body}: {}", r.text());
        assert_eq!(r.json()["error"]["param"], param, "{path} {body}: {}", r.text());
        assert!(!r.json()["error"]["message"].as_str().unwrap().is_empty());
    }
    let raw = |head: &str, body: &str| {
        server.raw(&format!("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()))
    };
    assert_eq!(raw("Content-Type: application/json\r\n", "{").status, 400);
    assert_eq!(raw("Content-Type: text/plain\r\n", "{}").status, 415);
    assert_eq!(server.raw("GET /status HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n").status, 403);
    server.assert_idle();
}

#[test]
fn keys_limits_and_queues() {
    let server = Server::start_with(
        &["--sequences", "1", "--queue", "1", "--body", "2000", "--time", "2"],
        &[("QP_API_KEY", "secret")],
    );
    let body = json!({"prompt": "a", "max_tokens": 2}).to_string();
    let post = |key: &str, body: &str| {
        server.raw(&format!("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{key}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()))
    };
    let key = "Authorization: Bearer secret\r\n";
    assert_eq!(post("", &body).status, 401);
    assert_eq!(post("Authorization: Bearer wrong\r\n", &body).status, 401);
    assert_eq!(post(key, &body).status, 200);
    assert_eq!((server.get("/").status, server.get("/health").status, server.get("/status").status), (200, 200, 401));
    let large = json!({"prompt": "a ".repeat(2000)}).to_string();
    assert_eq!(post(key, &large).status, 413);
    // More answers than there are places.
    assert_eq!(post(key, &json!({"prompt": "a", "n": 3}).to_string()).status, 400);

    // Two fill the running and the waiting place; the third is told when to come again, and does. None is lost, though the
    // time for an answer may end it.
    let long = json!({"prompt": "a", "max_tokens": 1000, "ignore_eos": true, "temperature": 0}).to_string();
    let refused = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                loop {
                    let r = post(key, &long);
                    if r.status != 429 {
                        assert!([200, 504].contains(&r.status), "{}", r.status);
                        break;
                    }
                    let after: u64 = r.header("retry-after").unwrap().parse().unwrap();
                    assert!((1..=60).contains(&after) && r.json()["error"]["code"] == "queue_full");
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert!(refused.into_inner() > 0);
    assert_eq!(post(key, &body).status, 200);
}

/// Many clients at once, some of which go away in the middle: every answer is the answer alone.
#[test]
fn answers_under_load_are_those_alone() {
    let server = Server::start(&["--cache", "3000", "--sequences", "12", "--chunk", "32", "--context", "512"]);
    let bodies: Vec<Value> = (0..12)
        .map(|i| {
            let prompt = "And the LORD spake unto Moses, saying, ".repeat(1 + i % 5) + &format!("chapter {i}");
            let temperature = if i % 2 == 0 { 0.0 } else { 0.9 };
            json!({"prompt": prompt, "max_tokens": 5 + 3 * i, "temperature": temperature, "seed": i, "top_p": 0.95})
        })
        .collect();
    let alone: Vec<String> = bodies.iter().map(|b| text(&server.post("/v1/completions", b))).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..24 {
            s.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= 150 {
                        return;
                    }
                    let (body, expected) = (&bodies[n % 12], &alone[n % 12]);
                    if n % 5 == 4 {
                        server.abandon(
                            "/v1/completions",
                            &with(body.clone(), json!({"stream": true, "max_tokens": 200})),
                            n % 3,
                        );
                        continue;
                    }
                    let got = match n % 2 {
                        0 => text(&server.post("/v1/completions", body)),
                        _ => {
                            let events = server.stream("/v1/completions", &with(body.clone(), json!({"stream": true})));
                            events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect()
                        }
                    };
                    assert_eq!(&got, expected, "request {}", n % 12);
                }
            });
        }
    });
    server.assert_idle();
}

#[test]
fn guesses_do_not_change_answers() {
    let bodies: Vec<Value> = (0..6)
        .map(|i| {
            let prompt = "And the LORD spake unto Moses, saying, ".repeat(1 + i % 3) + &format!("chapter {i}");
            let temperature = if i % 2 == 0 { 0.0 } else { 0.9 };
            let body = json!({"prompt": prompt, "max_tokens": 10 + 3 * i, "temperature": temperature, "seed": i});
            with(body, if i == 4 { json!({"frequency_penalty": 0.5, "logprobs": 1}) } else { json!({}) })
        })
        .collect();
    let plain = Server::start(&["--context", "256"]);
    let alone: Vec<String> = bodies.iter().map(|b| text(&plain.post("/v1/completions", b))).collect();
    assert!(plain.post("/v1/completions", &bodies[0]).json()["usage"]["completion_tokens_details"].is_null());
    for (arguments, same) in [(&["--draft-model", MODEL, "--drafts", "3"][..], true), (&["--drafts", "5"], false)] {
        let server = Server::start(&[&["--context", "256", "--sequences", "4"], arguments].concat());
        let guesses = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for (i, (body, expected)) in bodies.iter().zip(&alone).enumerate() {
                let (server, guesses) = (&server, &guesses);
                s.spawn(move || {
                    let got = server.post("/v1/completions", body);
                    assert_eq!(text(&got), *expected, "request {i}");
                    let usage = got.json()["usage"].clone();
                    let of = |name: &str| usage["completion_tokens_details"][name].as_u64().unwrap_or(0);
                    let (right, wrong) = (of("accepted_prediction_tokens"), of("rejected_prediction_tokens"));
                    assert!(right < usage["completion_tokens"].as_u64().unwrap());
                    if same && i != 4 {
                        assert!(right > 0 && wrong == 0, "{usage}");
                    }
                    guesses.fetch_add((right + wrong) as usize, Ordering::Relaxed);
                });
            }
        });
        assert!(guesses.into_inner() > 0);
        server.assert_idle();
        assert!(!server.get("/metrics").text().contains("\nqp_tokens_guessed_total 0\n"));
    }
}

#[test]
fn clients_that_misbehave_do_not_keep_others_waiting() {
    let server = Server::start(&["--patience", "1", "--connections", "40", "--context", "1024"]);
    let ask = json!({"prompt": "a", "max_tokens": 3, "temperature": 0});
    // Heads that never end, bodies that never come, connections that say nothing: more than there are places.
    let mut held = Vec::new();
    for i in 0..120 {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let part = match i % 3 {
            0 => "POST /v1/completions HTTP/1.1\r\nHost: local",
            1 => {
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            }
            _ => "",
        };
        stream.write_all(part.as_bytes()).unwrap();
        held.push(stream);
    }
    assert_eq!(server.post("/v1/completions", &ask).status, 200);
    // Each of them was ended by the server: those that had begun a request got an answer.
    for (i, mut stream) in held.into_iter().enumerate() {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut all = Vec::new();
        // A reset is an end too.
        let _ = stream.read_to_end(&mut all);
        if i % 3 == 1 {
            assert!(all.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&all));
        }
    }
    // A client that never reads loses its connection when nothing more fits what lies between.
    let mut deaf = TcpStream::connect(server.address).unwrap();
    deaf.set_write_timeout(Some(Duration::from_secs(120))).unwrap();
    let ask_for_page = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(100);
    let lost = (0..100_000).any(|_| deaf.write_all(ask_for_page.as_bytes()).is_err());
    assert!(lost, "the server waits for a client that reads nothing");
    assert_eq!(server.post("/v1/completions", &ask).status, 200);
    server.assert_idle();
    // Nonsense.
    for nonsense in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "POST / HTTP/9.9\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.write_all(nonsense.as_bytes()).unwrap();
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        assert!(all.is_empty() || all.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&all));
    }
    assert_eq!(server.post("/v1/completions", &ask).status, 200);
}

/// Requests that no client of good will makes: each is answered at once, in OpenAI's form, and names what is wrong.
#[test]
fn strange_requests_get_errors_in_openais_form() {
    let server = Server::start(&["--name", "kjv", "--context", "256"]);
    let deep = "[".repeat(10_000) + &"]".repeat(10_000);
    let long = "x".repeat(1 << 20);
    let u64_max = u64::MAX;
    // What is sent, and what the message must say.
    let completions = [
        ("", "not JSON"),
        ("null", "no JSON object"),
        ("\u{feff}{}", "not JSON"),
        (&format!(r#"{{"prompt": {deep}}}"#), "recursion"),
        (r#"{"prompt": "a", "max_tokens": NaN}"#, "not JSON"),
        (r#"{"prompt": "a", "temperature": 1e999}"#, "number out of range"),
        (r#"{"prompt": "a\ud800"}"#, "not JSON"),
        (r#"{"prompt": 3}"#, "a list of tokens"),
        (r#"{"prompt": [1, "a"]}"#, "a list of tokens"),
        (r#"{"prompt": [-1]}"#, "a list of tokens"),
        (r#"{"prompt": []}"#, "prompt is an empty list"),
        (r#"{"prompt": [4294967295]}"#, "not among the model's 2048"),
        (r#"{"prompt": "a", "max_tokens": -1}"#, "max_tokens"),
        (r#"{"prompt": "a", "max_tokens": 1.5}"#, "max_tokens"),
        (&format!(r#"{{"prompt": "a", "max_tokens": {u64_max}}}"#), "the context holds 256"),
        (r#"{"prompt": "a", "max_tokens": 18446744073709551616}"#, "max_tokens"),
        (r#"{"prompt": "a", "n": -1}"#, "n: "),
        (r#"{"prompt": "a", "n": 129}"#, "expected 1 to 128"),
        (r#"{"prompt": ["a", "b"], "n": 100}"#, "expected 1 to 128 answers"),
        (r#"{"prompt": "a", "top_p": 2}"#, "expected 0 to 1"),
        (r#"{"prompt": "a", "top_k": -5}"#, "top_k"),
        (r#"{"prompt": "a", "seed": 1e3}"#, "seed"),
        (r#"{"prompt": "a", "presence_penalty": "1"}"#, "presence_penalty"),
        (r#"{"prompt": "a", "logit_bias": {"2048": 1}}"#, "not among the model's 2048"),
        (r#"{"prompt": "a", "logit_bias": {"-1": 1}}"#, "numbers of tokens"),
        (r#"{"prompt": "a", "logit_bias": {"1": 101}}"#, "-100 to 100"),
        (r#"{"prompt": "a", "logit_bias": [1]}"#, "logit_bias"),
        (r#"{"prompt": "a", "logprobs": 21}"#, "expected 0 to 20"),
        (r#"{"prompt": "a", "logprobs": true}"#, "logprobs"),
        (r#"{"prompt": "a", "stop": [1]}"#, "a list of texts"),
        (r#"{"prompt": "a", "stop": ""}"#, "1 to 1000 bytes"),
        (r#"{"prompt": "a", "stream": "yes"}"#, "stream"),
        (r#"{"prompt": "a", "stream_options": {"include_usage": true}}"#, "needs stream"),
        (r#"{"prompt": "a", "stream": true, "stream_options": {"x": 1}}"#, "unknown field"),
        (r#"{"prompt": "a", "suffix": "b"}"#, "'suffix' is not supported"),
        (&format!(r#"{{"prompt": "a", "{long}": 1}}"#), "is not supported"),
        (&format!(r#"{{"prompt": "a", "model": "{long}"}}"#), "is not here"),
        (&format!(r#"{{"prompt": "a", "temperature": "{long}"}}"#), "temperature"),
        (r#"{"prompt": "a", "response_format": 1}"#, "expected text, json_object"),
        (r#"{"prompt": "a", "response_format": {"type": "json_schema"}}"#, "schema is missing"),
        (
            r#"{"prompt": "a", "response_format": {"type": "regex", "regex": "(((a{1,999}){1,999}){1,999}){1,999}"}}"#,
            "response_format",
        ),
    ];
    let messages = r#""messages": [{"role": "user", "content": "a"}]"#;
    let chats = [
        ("{}", "at least one message"),
        (r#"{"messages": []}"#, "at least one message"),
        (r#"{"messages": "a"}"#, "messages"),
        (r#"{"messages": [1]}"#, "message 0: expected an object"),
        (r#"{"messages": [{"role": "user"}]}"#, "'content' is missing"),
        (r#"{"messages": [{"role": 1, "content": "a"}]}"#, "'role' must be a text"),
        (r#"{"messages": [{"role": "alien", "content": "a"}]}"#, "'alien' is not known"),
        (&format!(r#"{{{messages}, "tools": [1]}}"#), "tools"),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}"#,
            "no text",
        ),
        (&format!(r#"{{{messages}, "tools": {{}}}}"#), "tools"),
        (&format!(r#"{{{messages}, "tool_choice": "required"}}"#), "tool_choice"),
        (&format!(r#"{{{messages}, "functions": [{{}}]}}"#), "use 'tools'"),
        (&format!(r#"{{{messages}, "top_logprobs": 2}}"#), "needs logprobs"),
        (&format!(r#"{{{messages}, "logprobs": true, "top_logprobs": 21}}"#), "expected 0 to 20"),
        (&format!(r#"{{{messages}, "chat_template_kwargs": 1}}"#), "chat_template_kwargs"),
        (&format!(r#"{{{messages}, "modalities": ["text", "audio"]}}"#), "text only"),
    ];
    let all =
        completions.iter().map(|c| ("/v1/completions", c)).chain(chats.iter().map(|c| ("/v1/chat/completions", c)));
    let others = [("/tokenize", &("{}", "either 'text' or 'messages'")), ("/v1/embeddings", &("{", "no embeddings"))];
    for (path, (body, message)) in all.chain(others) {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        );
        let r = server.raw(&format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()));
        let said = r.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        let shown: String = body.chars().take(200).collect();
        assert!(matches!(r.status, 400 | 404) && said.contains(message), "{path} {shown}: {}: {said}", r.status);
        assert!(r.body.len() < 10_000, "{path} {shown}: {} bytes", r.body.len());
    }
    let r = server.raw("GET /v1/models/%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert!(r.status == 400 && r.json()["error"]["message"].is_string(), "{}", r.text());

    // What is unusual and yet allowed.
    for body in [
        json!({"prompt": "", "max_tokens": 1}),
        json!({"prompt": "a", "max_tokens": 0}),
        json!({"prompt": [[]], "max_tokens": 1}),
        json!({"prompt": "\u{0}\u{1F600}\u{202E}\u{10FFFF}", "max_tokens": 1}),
        json!({"prompt": "a", "max_tokens": 2, "temperature": 1e-40}),
        json!({"prompt": "a", "max_tokens": 2, "temperature": 100, "top_p": 0, "seed": i64::MIN}),
        json!({"prompt": "a", "max_tokens": 2, "logit_bias": {"5": 100}, "presence_penalty": -2, "frequency_penalty": 2}),
    ] {
        let r = server.post("/v1/completions", &body);
        assert_eq!(r.status, 200, "{body}: {}", r.text());
    }
    server.assert_idle();
}

/// Connections that keep the server waiting lose their places when others want them, however patient it is otherwise.
#[test]
fn silent_connections_make_room() {
    let server = Server::start(&["--patience", "3600", "--connections", "20"]);
    let ask = json!({"prompt": "a", "max_tokens": 3, "temperature": 0});
    let held: Vec<TcpStream> = (0..50)
        .map(|i| {
            let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
            let body = format!("{head}Content-Length: 100\r\n\r\n{{");
            let mut stream = TcpStream::connect(server.address).unwrap();
            stream.write_all(["", head, &body][i % 3].as_bytes()).unwrap();
            stream
        })
        .collect();
    assert_eq!(server.post("/v1/completions", &ask).status, 200);
    drop(held);
    server.assert_idle();
}

/// A client that goes away frees what its request holds, whether or not it was reading a stream.
#[test]
fn closing_a_connection_ends_its_request() {
    let server = Server::start(&["--sequences", "1"]);
    for stream in [false, true] {
        let long = json!({"prompt": "a", "ignore_eos": true, "max_tokens": 500, "stream": stream, "temperature": 0});
        let mut client = TcpStream::connect(server.address).unwrap();
        let body = long.to_string();
        let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
        client.write_all(format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
        server.wait_until_running(1);
        drop(client);
        server.assert_idle();
    }
    let cancelled = |line: &&str| line.starts_with("qp_requests_cancelled_total");
    assert_eq!(server.get("/metrics").text().lines().find(cancelled), Some("qp_requests_cancelled_total 2"));
}

#[test]
fn templates_that_fail_or_loop_are_told_to_the_client() {
    let loops = model_with(
        "chat_template.jinja",
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    );
    let server = Server::of(loops.path(), &[], &[]);
    let r = server.post("/v1/chat/completions", &json!({"messages": message("x")}));
    assert_eq!(r.status, 400);
    assert!(r.text().contains("chat_template.jinja:1") && r.text().contains("does not end"), "{}", r.text());
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 2})).status, 200);
    let refuses = model_with("chat_template.jinja", "{{ raise_exception('never ' + messages[0].role) }}");
    let server = Server::of(refuses.path(), &[], &[]);
    let r = server.post("/v1/chat/completions", &json!({"messages": message("x")}));
    assert!(r.status == 400 && r.text().contains("refuses these messages: never user"), "{}", r.text());
}

#[test]
fn tools_are_for_the_template() {
    let template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{{ messages[-1].content }}";
    let model = model_with("chat_template.jinja", template);
    let server = Server::of(model.path(), &[], &[]);
    let tools = json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
    let pieces = |more: Value| {
        let r = server.post("/tokenize", &with(json!({"messages": message("x")}), more)).json();
        r["pieces"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect::<String>()
    };
    assert_eq!((pieces(json!({})).trim(), pieces(json!({"tools": tools})).trim()), ("x", "weather x"));
    // Tools that are not to be called are not shown to the model.
    let read = |more: Value| {
        let body = with(json!({"messages": message("x"), "max_tokens": 1, "tools": tools}), more);
        server.post("/v1/chat/completions", &body).json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert!(read(json!({"tool_choice": "none"})) < read(json!({"tool_choice": "auto"})));
}

/// What cannot be served is said before anybody connects.
#[test]
fn starts_that_cannot_succeed_say_why() {
    let here = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = here.local_addr().unwrap().port().to_string();
    for (args, key, message) in [
        (&["--cache", "18446744073709551615"][..], "", "give a smaller --cache"),
        (&["--context", "5000"], "", "context ends at 1024: give a --context"),
        (&["--cache", "1", "--context", "512"], "", "give a --cache of 512 or more"),
        (&["--host", "no such name"], "", "give an address, such as 127.0.0.1"),
        (&["--time", "-1"], "", "invalid value '-1' for '--time"),
        (&["--context", "0"], "", "invalid value '0' for '--context"),
        (&["--port", &taken], "", "give another --port or --host"),
        (&[], " ", "the API key is empty"),
        (&[], "a b", "no client can send"),
        (&["--api-key-file", "/nowhere"], "", "cannot read /nowhere"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qp"));
        command.args(["serve", crate::server::MODEL, "--device", "cpu"]).args(args).env_remove("QP_API_KEY");
        if !args.contains(&"--port") {
            command.args(["--port", "0"]);
        }
        if !key.is_empty() {
            command.env("QP_API_KEY", key);
        }
        let out = command.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(message) && !said.contains("panicked"), "{args:?}: {said}");
    }
}

#[test]
fn stopping_lets_answers_end_and_killing_leaves_nothing_behind() {
    let mut server = Server::start(&["--grace", "900"]);
    let long = json!({"prompt": "a", "max_tokens": 60, "stream": true, "ignore_eos": true, "temperature": 0});
    let address = server.address;
    let events = std::thread::scope(|s| {
        let reader = s.spawn(|| server.stream("/v1/completions", &long));
        server.wait_until_running(1);
        server.signal("TERM");
        let refused = loop {
            // Until the signal has arrived.
            match server.try_post("/v1/completions", &json!({"prompt": "a", "max_tokens": 1})) {
                Some(r) if r.status == 200 => continue,
                other => break other,
            }
        };
        assert!(refused.is_none_or(|r| r.status == 503));
        reader.join().unwrap()
    });
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(server.wait().success());
    assert!(TcpStream::connect(address).is_err());

    let mut server = Server::start(&["--port", &address.port().to_string()]);
    server.signal("KILL");
    server.wait();
    let again = Server::start(&["--port", &address.port().to_string()]);
    assert_eq!(again.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 2})).status, 200);
}

/// OpenAI's own package: `QP_PYTHON` may name the Python that has it.
#[test]
fn the_openai_package_is_served() {
    let python = std::env::var("QP_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has = Command::new(&python).args(["-c", "import openai"]).output().is_ok_and(|o| o.status.success());
    if !has {
        qp_codegen::skipped::note("the Python package 'openai' is not here (set QP_PYTHON to a Python that has it)");
        return;
    }
    let server = Server::start(&["--name", "kjv"]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/commands/server/openai_client.py");
    let out = Command::new(&python).arg(script).arg(format!("http://{}/v1", server.address)).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.contains("all as expected"), "{said}");
}

#[test]
fn curl_is_served() {
    if Command::new("curl").arg("--version").output().is_err() {
        qp_codegen::skipped::note("curl is not here");
        return;
    }
    let server = Server::start(&[]);
    let curl = |args: &[&str]| {
        let out = Command::new("curl")
            .args(["--silent", "--show-error", "--fail-with-body", "--max-time", "120"])
            .args(args)
            .output()
            .unwrap();
        (out.status.success(), String::from_utf8(out.stdout).unwrap())
    };
    let url = |path: &str| format!("http://{}{path}", server.address);
    let json = ["--json", r#"{"prompt": "In the beginning", "max_tokens": 4, "temperature": 0}"#];
    let (ok, whole) = curl(&[&url("/v1/completions"), json[0], json[1]]);
    assert!(ok && serde_json::from_str::<Value>(&whole).unwrap()["choices"][0]["text"].is_string(), "{whole}");
    let (ok, events) = curl(&[
        "--no-buffer",
        &url("/v1/completions"),
        "--json",
        r#"{"prompt": "x", "max_tokens": 4, "stream": true}"#,
    ]);
    assert!(ok && events.starts_with("data: {") && events.ends_with("data: [DONE]\n\n"), "{events}");
    let (ok, error) = curl(&[&url("/v1/completions"), "--json", "{}"]);
    assert!(!ok && error.contains("prompt is missing"), "{error}");
}
