//! `qp-codegen lsp`: the language server protocol, spoken to the program.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

/// A server and the conversation with it.
struct Server {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    id: i64,
    /// The diagnostics that came last, with their text's URI.
    told: Vec<(String, Value)>,
}

impl Server {
    fn start() -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_qp-codegen"))
            .args(["lsp", "--stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Server { child, input, output, id: 0, told: Vec::new() }
    }

    fn begun() -> Server {
        let mut server = Server::start();
        let answer = server.ask("initialize", json!({"processId": null, "rootUri": null, "capabilities": {}}));
        assert_eq!(answer["serverInfo"]["name"], "qp-codegen");
        for provider in ["hoverProvider", "definitionProvider", "documentFormattingProvider", "codeActionProvider"] {
            assert_eq!(answer["capabilities"][provider], true, "{provider}");
        }
        server.tell("initialized", json!({}));
        server
    }

    fn send(&mut self, message: Value) {
        let text = message.to_string();
        write!(self.input, "Content-Length: {}\r\n\r\n{text}", text.len()).unwrap();
        self.input.flush().unwrap();
    }

    fn tell(&mut self, method: &str, params: Value) {
        self.send(json!({"jsonrpc": "2.0", "method": method, "params": params}));
    }

    /// The next message.
    fn receive(&mut self) -> Value {
        let mut length = 0;
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the server ended");
            match line.trim_end().strip_prefix("Content-Length: ") {
                Some(n) => length = n.parse().unwrap(),
                None if line == "\r\n" => break,
                None => panic!("{line}"),
            }
        }
        let mut bytes = vec![0; length];
        self.output.read_exact(&mut bytes).unwrap();
        let message: Value = serde_json::from_slice(&bytes).unwrap();
        if message["method"] == "textDocument/publishDiagnostics" {
            let uri = message["params"]["uri"].as_str().unwrap().to_string();
            self.told.push((uri, message["params"]["diagnostics"].clone()));
        }
        message
    }

    /// The whole answer to a request.
    fn answer(&mut self, method: &str, params: Value) -> Value {
        self.id += 1;
        self.send(json!({"jsonrpc": "2.0", "id": self.id, "method": method, "params": params}));
        loop {
            let message = self.receive();
            if message["id"] == self.id {
                return message;
            }
        }
    }

    fn ask(&mut self, method: &str, params: Value) -> Value {
        let answer = self.answer(method, params);
        assert!(answer.get("error").is_none(), "{answer}");
        answer["result"].clone()
    }

    /// Opens a text; its diagnostics.
    fn open(&mut self, uri: &str, text: &str) -> Vec<Value> {
        let document = json!({"uri": uri, "languageId": "qspec", "version": 1, "text": text});
        self.tell("textDocument/didOpen", json!({"textDocument": document}));
        self.diagnostics(uri)
    }

    fn change(&mut self, uri: &str, text: &str) {
        let document = json!({"uri": uri, "version": 2});
        self.tell("textDocument/didChange", json!({"textDocument": document, "contentChanges": [{"text": text}]}));
    }

    /// The next diagnostics of a text.
    fn diagnostics(&mut self, uri: &str) -> Vec<Value> {
        self.told.clear();
        loop {
            self.receive();
            if let Some((_, list)) = self.told.iter().find(|t| t.0 == uri) {
                return list.as_array().unwrap().clone();
            }
        }
    }

    /// What is asked of the place of `what` in `text`, `behind` letters after its beginning.
    fn at(&mut self, method: &str, uri: &str, text: &str, what: &str, behind: usize) -> Value {
        let byte = text.find(what).unwrap_or_else(|| panic!("{what}")) + behind;
        let line = text[..byte].matches('\n').count();
        let start = text[..byte].rfind('\n').map_or(0, |n| n + 1);
        let character = text[start..byte].encode_utf16().count();
        let position = json!({"line": line, "character": character});
        self.ask(method, json!({"textDocument": {"uri": uri}, "position": position}))
    }

    fn hover(&mut self, uri: &str, text: &str, what: &str) -> String {
        self.at("textDocument/hover", uri, text, what, 0)["contents"]["value"].as_str().unwrap_or("").to_string()
    }

    fn labels(&mut self, uri: &str, text: &str, what: &str, behind: usize) -> Vec<String> {
        let list = self.at("textDocument/completion", uri, text, what, behind);
        list.as_array().unwrap().iter().map(|i| i["label"].as_str().unwrap().to_string()).collect()
    }

    /// Exit code and standard error after the end of the input.
    fn end(self) -> (i32, String) {
        let Server { mut child, input, .. } = self;
        drop(input);
        let mut told = String::new();
        child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        (child.wait().unwrap().code().unwrap_or(-1), told)
    }
}

/// What `range` of the diagnostic or edit says, of lines in units of UTF-16.
fn slice(text: &str, range: &Value) -> String {
    let at = |p: &Value| {
        let line = text.split('\n').nth(p["line"].as_u64().unwrap() as usize).unwrap();
        (p["line"].clone(), line.encode_utf16().collect::<Vec<_>>(), p["character"].as_u64().unwrap() as usize)
    };
    let ((first, line, start), (last, _, end)) = (at(&range["start"]), at(&range["end"]));
    assert_eq!(first, last, "of one line");
    String::from_utf16(&line[start..end]).unwrap()
}

const TEXT: &str = "/// Größer 𝛌: drei Fälle.
function flip(h, n) {
    h ^ n
}
/// A family.
family f(n) {
    let size = 2 ** n
    bits   n
    block  2 x 128
    values i8
    unit   1/4
    table  t[size] = [-3, -1, 1, 3]
    decode w {
        let h = flip(w, 1)
        t[h]
    }
    scale  row
    rotate none
}
quantizer a = f(2)
";

#[test]
fn errors_are_told_with_their_cures_in_units_of_utf_16() {
    let mut server = Server::begun();
    let uri = "untitled:a.qspec";
    assert_eq!(server.open(uri, TEXT), Vec::<Value>::new());
    let bad = TEXT.replace("    scale  row", "    // 𝛌ö\n    scale roww");
    server.change(uri, &bad);
    let found = server.diagnostics(uri);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(slice(&bad, &found[0]["range"]), "roww");
    assert_eq!(found[0]["severity"], 1);
    assert_eq!(found[0]["message"], "there is no scale `roww`\ndid you mean `row`?");
    let member = &found[0]["relatedInformation"][0];
    assert_eq!(slice(&bad, &member["location"]["range"]), "a");
    assert_eq!(member["message"], "in `a`, where n = 2");
    let range = found[0]["range"].clone();
    let context = json!({"diagnostics": found});
    let asked = json!({"textDocument": {"uri": uri}, "range": range, "context": context});
    let actions = server.ask("textDocument/codeAction", asked);
    assert_eq!(actions[0]["title"], "Write `row`");
    let edit = &actions[0]["edit"]["changes"][uri][0];
    assert_eq!((slice(&bad, &edit["range"]), &edit["newText"]), ("roww".to_string(), &json!("row")));
    // Behind letters of two units, on one line.
    let one = bad.replace("= [-3, -1, 1, 3]", "from \"𝛌𝛌\" scale rom").replace("    scale roww\n", "");
    server.change(uri, &one);
    let found = server.diagnostics(uri);
    assert!(found.iter().any(|d| slice(&one, &d["range"]) == "rom"), "{found:?}");
    // What is closed has no diagnostics.
    server.tell("textDocument/didClose", json!({"textDocument": {"uri": uri}}));
    assert!(server.diagnostics(uri).is_empty());
}

#[test]
fn places_say_what_they_mean_and_where_it_is_defined() {
    let mut server = Server::begun();
    let (uri, text) = ("untitled:a.qspec", TEXT);
    server.open(uri, text);
    let hover = server.hover(uri, text, "size = ");
    assert!(hover.contains("let size = 2 ** n") && hover.ends_with("constant `size`: 4"), "{hover}");
    assert!(server.hover(uri, text, "n) {\n    let").ends_with("parameter `n`: 2"));
    let hover = server.hover(uri, text, "a = f");
    assert!(hover.contains("`a`: 2 bits a weight, 4.20 MB for 4096 x 4096"), "{hover}");
    assert!(hover.contains("window 0 of `a` gives [-1]"), "{hover}");
    assert!(server.hover(uri, text, "f(2)").contains("A family.\n\n* `a`: 2 bits"));
    assert!(server.hover(uri, text, "rotate").contains("Rotation along the columns"));
    assert!(server.hover(uri, text, "flip(w").contains("Größer 𝛌: drei Fälle."));
    assert!(server.hover(uri, text, "flip(w").contains("h ^ n"));
    assert!(server.hover(uri, text, "h]").contains("constant `h`: a word"));
    assert!(server.hover(uri, text, "w {").contains("window 0 of `a`"));
    assert_eq!(server.at("textDocument/hover", uri, text, "{", 0), Value::Null);
    for (place, defined, line) in
        [("f(2)", "f", 5), ("flip(w", "flip", 1), ("t[h]", "t", 11), ("h]", "h", 13), ("n\n    block", "n", 5)]
    {
        let found = server.at("textDocument/definition", uri, text, place, 0);
        assert_eq!(
            (slice(text, &found["range"]).as_str(), &found["range"]["start"]["line"]),
            (defined, &json!(line)),
            "{place}"
        );
    }
    let symbols = server.ask("textDocument/documentSymbol", json!({"textDocument": {"uri": uri}}));
    let names: Vec<&str> = symbols.as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["flip", "f", "a"]);
    let parts: Vec<&str> =
        symbols[1]["children"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(parts, ["n", "size", "t"]);
}

#[test]
fn what_may_be_written_is_offered() {
    let mut server = Server::begun();
    let uri = "untitled:a.qspec";
    let text = TEXT.replace("    scale  row\n", "    \n");
    server.open(uri, &text);
    let labels = server.labels(uri, &text, "    \n    rotate", 4);
    assert!(labels.contains(&"scale".to_string()) && labels.contains(&"table".to_string()), "{labels:?}");
    for given in ["window", "bits", "rotate", "values", "weight"] {
        assert!(!labels.contains(&given.to_string()), "{given} {labels:?}");
    }
    assert_eq!(server.labels(uri, &text, "i8", 0), ["i8", "i16", "i24", "i32"]);
    assert_eq!(server.labels(uri, &text, "f(2)", 0), ["f", "mix"]);
    let labels = server.labels(uri, &text, "h]", 0);
    for known in ["h", "w", "t", "n", "size", "flip", "signs", "max"] {
        assert!(labels.contains(&known.to_string()), "{known} {labels:?}");
    }
    assert!(server.labels(uri, &text, "Größer", 2).is_empty());
    // In a text that is being written.
    let text = "quantizer q {\n    scale \n    field s : \n    decode w {\n        let a = w\n        \n";
    server.change(uri, text);
    assert_eq!(server.labels(uri, text, "scale ", 6), ["row", "matrix"]);
    assert!(server.labels(uri, text, "s : ", 4).contains(&"e8m0".to_string()));
    let labels = server.labels(uri, text, "        \n", 8);
    assert!(labels.contains(&"a".to_string()) && labels.contains(&"let".to_string()), "{labels:?}");
    server.change(uri, "q");
    assert!(server.labels(uri, "q", "q", 1).contains(&"quantizer".to_string()));
}

#[test]
fn texts_are_laid_out_as_by_fmt() {
    let mut server = Server::begun();
    let uri = "untitled:a.qspec";
    let text = TEXT;
    server.open(uri, &text.replace("    scale  row", "  scale row // 𝛌"));
    let asked = json!({"textDocument": {"uri": uri}, "options": {"tabSize": 4, "insertSpaces": true}});
    let edits = server.ask("textDocument/formatting", asked.clone());
    assert_eq!(edits[0]["newText"], text.replace("    scale  row", "    scale  row // 𝛌").as_str());
    assert_eq!(edits[0]["range"]["start"], json!({"line": 0, "character": 0}));
    server.change(uri, text);
    assert_eq!(server.ask("textDocument/formatting", asked.clone()), json!([]));
    server.change(uri, "quantizer q {");
    let answer = server.answer("textDocument/formatting", asked);
    assert!(answer["error"]["message"].as_str().unwrap().contains("is never closed"), "{answer}");
}

#[test]
fn texts_of_the_editor_win_over_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let uri = |name: &str| format!("file://{}/{name}", folder.path().display());
    let text = TEXT;
    fs::write(folder.path().join("family.qspec"), text).unwrap();
    let user = "use \"family.qspec\"\nquantizer b = f(2)\n";
    let mut server = Server::begun();
    assert!(server.open(&uri("user.qspec"), user).is_empty());
    let found = server.at("textDocument/definition", &uri("user.qspec"), user, "f(2)", 0);
    assert_eq!((&found["uri"], &found["range"]["start"]["line"]), (&json!(uri("family.qspec")), &json!(5)));
    let found = server.at("textDocument/definition", &uri("user.qspec"), user, "family", 0);
    assert_eq!(found["uri"], uri("family.qspec"));
    assert!(server.hover(&uri("user.qspec"), user, "f(2)").contains("`b`: 2 bits a weight"));
    // The editor's text has another family, and then one with an error.
    server.open(&uri("family.qspec"), &text.replace("f(", "g("));
    server.change(&uri("family.qspec"), &text.replace("f(", "g("));
    let found = server.diagnostics(&uri("user.qspec"));
    assert!(found[0]["message"].as_str().unwrap().starts_with("there is no family `f`"), "{found:?}");
    server.change(&uri("family.qspec"), &text.replace("scale  row", "scale  roww"));
    let found = server.diagnostics(&uri("user.qspec"));
    assert_eq!(slice(user, &found[0]["range"]), "\"family.qspec\"", "{found:?}");
    assert_eq!(found[0]["relatedInformation"][0]["location"]["uri"], uri("family.qspec"));
    // Closed again, the disk's text counts.
    server.tell("textDocument/didClose", json!({"textDocument": {"uri": uri("family.qspec")}}));
    assert!(server.diagnostics(&uri("user.qspec")).is_empty());
}

#[test]
fn all_built_in_specs_have_answers_everywhere() {
    let mut server = Server::begun();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../specs").canonicalize().unwrap();
    for name in ["tcq.qspec", "formats/q4_k.qspec", "formats/bitsandbytes.qspec"] {
        let path = folder.join(name);
        let (uri, text) = (format!("file://{}", path.display()), fs::read_to_string(&path).unwrap());
        assert!(server.open(&uri, &text).is_empty(), "{name}");
        for (number, line) in text.lines().enumerate() {
            for character in (0..line.len()).step_by(5) {
                let position = json!({"line": number, "character": character});
                let place = json!({"textDocument": {"uri": uri}, "position": position});
                for method in ["hover", "completion", "definition"] {
                    server.ask(&format!("textDocument/{method}"), place.clone());
                }
            }
        }
    }
}

#[test]
fn a_conversation_has_an_order() {
    let mut server = Server::start();
    let answer = server.answer("textDocument/hover", json!({}));
    assert_eq!(answer["error"]["code"], -32002);
    server.tell("textDocument/didOpen", json!({"textDocument": 3}));
    server.ask("initialize", json!({"capabilities": {}}));
    assert_eq!(server.answer("textDocument/sing", json!({}))["error"]["code"], -32601);
    assert_eq!(server.answer("textDocument/hover", json!({"textDocument": 3}))["error"]["code"], -32602);
    let nowhere = json!({"textDocument": {"uri": "file:///nowhere"}, "position": {"line": 0, "character": 0}});
    assert_eq!(server.answer("textDocument/hover", nowhere)["error"]["code"], -32602);
    server.tell("textDocument/didChange", json!({"textDocument": 3}));
    // A place far outside of the text.
    server.open("untitled:a", "quantizer");
    let outside =
        json!({"textDocument": {"uri": "untitled:a"}, "position": {"line": 4_000_000_000u32, "character": 7}});
    for method in ["hover", "completion", "definition"] {
        server.ask(&format!("textDocument/{method}"), outside.clone());
    }
    assert_eq!(server.ask("shutdown", Value::Null), Value::Null);
    assert_eq!(server.answer("shutdown", Value::Null)["error"]["code"], -32600);
    server.tell("exit", Value::Null);
    assert_eq!(server.end(), (0, String::new()));
}

#[test]
fn what_is_no_message_is_refused_and_the_conversation_goes_on() {
    let long = vec![b'x'; 1 << 16];
    let bad: [(&[u8], i32, &str); 12] = [
        (b"hello\r\n\r\n", -32700, "`hello` is no header"),
        (b"Content-Type: x\r\n\r\n", -32700, "a header without `Content-Length`"),
        (b"Content-Type: x\r\n\r\n{}", -32700, "a header without `Content-Length`"),
        (b"Content-Length: 99999999999\r\n\r\n", -32700, "is no length"),
        (b"Content-Length: -1\r\n\r\n{\n}", -32700, "is no length"),
        (b"Content-Length: 1\r\n\r\n{}", -32700, "a message that is no JSON"),
        (b"Content-Length: 2\r\n\r\n[]", -32600, "no message of the protocol"),
        (b"Content-Length: 1\r\n\r\n7", -32600, "no message of the protocol"),
        (b"Content-Length: 22\r\n\r\n{\"id\": 7, \"method\": 3}", -32600, "no message of the protocol"),
        (b"Content-Length: 4\r\n\r\n\xff\xfe{}", -32700, "a message that is no JSON"),
        (b"Content-Length: 3\r\n\r\n{]}", -32700, "a message that is no JSON"),
        (&long, -32700, "a header that does not end"),
    ];
    for (bytes, code, why) in bad {
        for mut server in [Server::start(), Server::begun()] {
            server.input.write_all(bytes).unwrap();
            let said = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
            // A header that does not end, ends some time.
            if bytes.len() > 4096 {
                server.input.write_all(b"\r\n\r\n").unwrap();
            }
            server.input.flush().unwrap();
            let answer = server.receive();
            assert_eq!(answer["error"]["code"], code, "{said}: {answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains(why), "{said}: {answer}");
            assert_eq!(answer["id"], if said.contains("\"id\"") { json!(7) } else { Value::Null });
            // The next message counts, whatever was before it.
            let next = server.answer("textDocument/sing", json!({}));
            assert!([-32601, -32002].contains(&next["error"]["code"].as_i64().unwrap()), "{said}: {next}");
        }
    }
    // A message cut short takes the beginning of the next with it, and no more.
    let mut server = Server::begun();
    server.input.write_all(b"Content-Length: 40\r\n\r\n{\"jsonrpc\": \"2.0\"}").unwrap();
    server.tell("textDocument/didSave", json!({}));
    assert_eq!(server.receive()["error"]["code"], -32700);
    assert_eq!(server.answer("textDocument/sing", json!({}))["error"]["code"], -32601);
    assert_eq!(server.ask("shutdown", Value::Null), Value::Null);
    server.tell("exit", Value::Null);
    assert_eq!(server.end(), (0, String::new()));
}

#[test]
fn an_end_without_a_goodbye_is_an_error() {
    let early = "error: the input ended without `exit`\n".to_string();
    for bytes in [&b"Content-Length: 5\r\n\r\n{}"[..], b"Content-Le"] {
        let mut server = Server::start();
        server.input.write_all(bytes).unwrap();
        assert_eq!(server.end(), (1, early.clone()));
    }
    assert_eq!(Server::begun().end(), (1, early));
    let mut server = Server::begun();
    server.tell("exit", Value::Null);
    assert_eq!(server.end(), (1, "error: `exit` came without `shutdown`\n".to_string()));
}
