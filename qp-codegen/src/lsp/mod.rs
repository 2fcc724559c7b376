//! `qp-codegen lsp`: a server of the language server protocol over standard input and output.
//!
//! 1. This module: messages.
//! 2. [`texts`]: the texts that are open, and what the checker says of them.
//! 3. [`answers`]: what a place means, by [`names`] (what is known where) and [`words`] (what the language's words mean).
//! 4. [`position`]: places and paths as editors write them.
//!
//! Texts are checked when no message waits, so that a server that is behind does not check what has changed again.

mod answers;
mod names;
mod position;
mod texts;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::sync::mpsc;

use lsp_server::{ErrorCode, Message, Notification, Request, RequestId, Response};
use lsp_types::{
    CodeAction, CodeActionKind, CodeActionOrCommand, CodeActionParams, CodeActionProviderCapability, CompletionOptions,
    CompletionParams, DidChangeTextDocumentParams, DidCloseTextDocumentParams, DidOpenTextDocumentParams,
    DocumentFormattingParams, DocumentSymbolParams, GotoDefinitionParams, HoverParams, HoverProviderCapability, OneOf,
    PublishDiagnosticsParams, ServerCapabilities, ServerInfo, TextDocumentSyncCapability, TextDocumentSyncKind, Uri,
    WorkspaceEdit,
};
use serde_json::{Value, json};

use position::path_of;
use texts::{Checked, Text, Texts, plain};

/// The field of a header that says how long a message is.
const LENGTH: &str = "content-length:";
/// Most bytes of a message.
const MOST_BYTES: u64 = 64 << 20;
/// Most bytes of a message's header.
const MOST_HEADER: u64 = 4096;

/// Serves an editor until it says goodbye.
///
/// # Errors
/// If the editor ends without a goodbye, or something cannot be read or written.
pub fn serve() -> Result<(), String> {
    let (send, messages) = mpsc::channel();
    std::thread::spawn(move || {
        let mut input = Input::new(BufReader::new(io::stdin()));
        loop {
            let read = input.next();
            let last = match &read {
                Ok(Some(Incoming::Message(m))) => is_exit(m),
                Ok(Some(Incoming::Wrong { .. })) => false,
                Ok(None) | Err(_) => true,
            };
            // Without a reader nothing is left to do.
            if send.send(read).is_err() || last {
                return;
            }
        }
    });
    let mut server = Server::new(io::stdout().lock());
    let mut next = None;
    loop {
        let received = match next.take() {
            Some(received) => received,
            None => messages.recv().map_err(|_| "the input ended")?,
        };
        let received = received.map_err(|e| format!("standard input: {e}"))?;
        let Some(received) = received else {
            return Err("the input ended without `exit`".into());
        };
        let sent = match received {
            Incoming::Message(message) if is_exit(&message) => {
                let orderly = server.state == State::Ended;
                return if orderly { Ok(()) } else { Err("`exit` came without `shutdown`".into()) };
            }
            Incoming::Message(message) => server.message(message),
            Incoming::Wrong { id, code, why } => server.refuse(&id, code, &why),
        };
        sent.map_err(|e| format!("standard output: {e}"))?;
        next = messages.try_recv().ok();
        if next.is_none() {
            server.publish().map_err(|e| format!("standard output: {e}"))?;
        }
    }
}

fn is_exit(message: &Message) -> bool {
    matches!(message, Message::Notification(n) if n.method == "exit")
}

/// What comes in.
enum Incoming {
    Message(Message),
    /// What is no message: the id of its request if it has one, else null, and what is wrong.
    Wrong {
        id: Value,
        code: ErrorCode,
        why: String,
    },
}

impl Incoming {
    /// The message of these bytes.
    fn of(bytes: &[u8]) -> Incoming {
        let value: Value = match serde_json::from_slice(bytes) {
            Ok(value) => value,
            Err(e) => return Incoming::wrong(ErrorCode::ParseError, format!("a message that is no JSON: {e}")),
        };
        let id = value.get("id").filter(|id| id.is_i64() || id.is_string()).cloned().unwrap_or(Value::Null);
        match serde_json::from_value(value) {
            Ok(message) => Incoming::Message(message),
            Err(e) => {
                Incoming::Wrong { id, code: ErrorCode::InvalidRequest, why: format!("no message of the protocol: {e}") }
            }
        }
    }

    fn wrong(code: ErrorCode, why: String) -> Incoming {
        Incoming::Wrong { id: Value::Null, code, why }
    }
}

/// The messages that come in. Where a header is wrong, it is not known where the next message begins: that is said once, and
/// what comes is passed over up to the next header.
struct Input<R> {
    from: R,
    /// True from a wrong header to the next right one.
    lost: bool,
}

impl<R: BufRead> Input<R> {
    fn new(from: R) -> Self {
        Input { from, lost: false }
    }

    /// The next message; nothing at the end of the input.
    fn next(&mut self) -> io::Result<Option<Incoming>> {
        loop {
            let length = match self.header()? {
                None => return Ok(None),
                Some(Err(_)) if self.lost => continue,
                Some(Err(why)) => {
                    self.lost = true;
                    return Ok(Some(Incoming::wrong(ErrorCode::ParseError, why)));
                }
                Some(Ok(length)) => length,
            };
            self.lost = false;
            let mut bytes = Vec::new();
            if self.from.by_ref().take(length).read_to_end(&mut bytes)? as u64 != length {
                return Ok(None);
            }
            return Ok(Some(Incoming::of(&bytes)));
        }
    }

    /// The length that the next header states, or what is wrong with it; nothing at the end of the input. A length that
    /// stands behind what is no header is one too.
    fn header(&mut self) -> io::Result<Option<Result<u64, String>>> {
        let (mut length, mut line) = (Err("a header without `Content-Length`".to_owned()), Vec::new());
        let mut left = MOST_HEADER;
        loop {
            line.clear();
            if self.from.by_ref().take(left).read_until(b'\n', &mut line)? == 0 {
                return Ok((left == 0).then(|| Err("a header that does not end".into())));
            }
            left -= line.len() as u64;
            let text = String::from_utf8_lossy(&line);
            if !text.ends_with('\n') {
                continue;
            }
            let text = text.trim_end();
            if text.is_empty() {
                return Ok(Some(length));
            }
            if let Some(at) = text.to_ascii_lowercase().rfind(LENGTH) {
                let bytes = text[at + LENGTH.len()..].trim().parse().ok().filter(|n| *n <= MOST_BYTES);
                length = bytes.ok_or_else(|| format!("`{text}` is no length up to {MOST_BYTES}"));
            } else if !text.contains(':') && length.is_err() {
                length = Err(format!("`{text}` is no header"));
            }
        }
    }
}

/// How far the conversation is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Begun,
    Ended,
}

struct Server<W> {
    out: W,
    texts: Texts,
    /// What is known of texts, where it is known.
    checked: BTreeMap<PathBuf, Checked>,
    /// Texts whose diagnostics the editor has.
    told: BTreeSet<PathBuf>,
    state: State,
}

/// An answer, or why there is none.
type Answer = Result<Value, (ErrorCode, String)>;

fn params<P: serde::de::DeserializeOwned>(params: Value) -> Result<P, (ErrorCode, String)> {
    serde_json::from_value(params).map_err(|e| (ErrorCode::InvalidParams, e.to_string()))
}

fn value(answer: impl serde::Serialize) -> Answer {
    serde_json::to_value(answer).map_err(|e| (ErrorCode::InternalError, e.to_string()))
}

impl<W: Write> Server<W> {
    fn new(out: W) -> Self {
        let (texts, checked, told) = (Texts::default(), BTreeMap::new(), BTreeSet::new());
        Server { out, texts, checked, told, state: State::New }
    }

    /// Forgets what is known of texts: any of them may use what is another now.
    fn changed(&mut self) {
        self.checked.clear();
        self.told.clear();
    }

    fn send(&mut self, message: impl Into<Message>) -> io::Result<()> {
        message.into().write(&mut self.out)
    }

    fn message(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Request(Request { id, method, params }) => {
                let answer = match (self.state, method.as_str()) {
                    (State::New, "initialize") => {
                        self.state = State::Begun;
                        value(capabilities())
                    }
                    (State::New, _) => Err((ErrorCode::ServerNotInitialized, "`initialize` comes first".into())),
                    (State::Begun, "shutdown") => {
                        self.state = State::Ended;
                        Ok(Value::Null)
                    }
                    (State::Begun, method) => self.request(method, params),
                    (State::Ended, _) => Err((ErrorCode::InvalidRequest, "the server was shut down".into())),
                };
                self.answer(id, answer)
            }
            Message::Notification(n) if self.state == State::Begun => self.notification(n),
            Message::Notification(_) | Message::Response(_) => Ok(()),
        }
    }

    /// Says that something was no message. Its id, unlike that of a request, may be null.
    fn refuse(&mut self, id: &Value, code: ErrorCode, why: &str) -> io::Result<()> {
        let error = json!({ "code": code as i32, "message": why });
        let text = json!({ "jsonrpc": "2.0", "id": id, "error": error }).to_string();
        write!(self.out, "Content-Length: {}\r\n\r\n{text}", text.len())?;
        self.out.flush()
    }

    fn answer(&mut self, id: RequestId, answer: Answer) -> io::Result<()> {
        self.send(match answer {
            Ok(value) => Response::new_ok(id, value),
            Err((code, why)) => Response::new_err(id, code as i32, why),
        })
    }

    /// What is known of the text of a URI.
    fn checked(&mut self, uri: &Uri) -> Result<&Checked, (ErrorCode, String)> {
        let path = plain(&path_of(uri));
        if !self.texts.open.contains_key(&path) {
            return Err((ErrorCode::InvalidParams, format!("{} is not open", uri.as_str())));
        }
        let texts = &self.texts;
        Ok(self.checked.entry(path).or_insert_with_key(|path| Checked::new(texts, path)))
    }

    fn request(&mut self, method: &str, given: Value) -> Answer {
        match method {
            "textDocument/hover" => {
                let p = params::<HoverParams>(given)?.text_document_position_params;
                value(answers::hover(self.checked(&p.text_document.uri)?, p.position))
            }
            "textDocument/completion" => {
                let p = params::<CompletionParams>(given)?.text_document_position;
                value(answers::completions(self.checked(&p.text_document.uri)?, p.position))
            }
            "textDocument/definition" => {
                let p = params::<GotoDefinitionParams>(given)?.text_document_position_params;
                value(answers::definition(self.checked(&p.text_document.uri)?, p.position))
            }
            "textDocument/documentSymbol" => {
                let p = params::<DocumentSymbolParams>(given)?;
                value(answers::symbols(self.checked(&p.text_document.uri)?))
            }
            "textDocument/formatting" => {
                let p = params::<DocumentFormattingParams>(given)?;
                let edit = self.checked(&p.text_document.uri)?.formatted();
                let edit = edit.map_err(|why| (ErrorCode::RequestFailed, format!("it cannot be formatted: {why}")))?;
                value(edit.into_iter().collect::<Vec<_>>())
            }
            "textDocument/codeAction" => {
                let p = params::<CodeActionParams>(given)?;
                let problems = self.checked(&p.text_document.uri)?.problems();
                let here = |r: &lsp_types::Range| r.start <= p.range.end && p.range.start <= r.end;
                let actions = problems.into_iter().filter(|q| here(&q.shown.range)).filter_map(|problem| {
                    let (title, edit) = problem.cure?;
                    #[expect(clippy::mutable_key_type, reason = "the protocol's type")]
                    let changes = [(p.text_document.uri.clone(), vec![edit])].into();
                    Some(CodeActionOrCommand::CodeAction(CodeAction {
                        title,
                        kind: Some(CodeActionKind::QUICKFIX),
                        diagnostics: Some(vec![problem.shown]),
                        edit: Some(WorkspaceEdit { changes: Some(changes), ..WorkspaceEdit::default() }),
                        is_preferred: Some(true),
                        ..CodeAction::default()
                    }))
                });
                value(actions.collect::<Vec<_>>())
            }
            _ => Err((ErrorCode::MethodNotFound, format!("there is no method `{method}`"))),
        }
    }

    /// What an editor tells. What is no such message is passed over: there is nobody to tell.
    fn notification(&mut self, n: Notification) -> io::Result<()> {
        match n.method.as_str() {
            "textDocument/didOpen" => {
                if let Ok(p) = params::<DidOpenTextDocumentParams>(n.params) {
                    let d = p.text_document;
                    self.set(d.uri, Some(d.version), d.text);
                }
            }
            "textDocument/didChange" => {
                if let Ok(p) = params::<DidChangeTextDocumentParams>(n.params)
                    && let Some(change) = p.content_changes.into_iter().next_back()
                {
                    self.set(p.text_document.uri, Some(p.text_document.version), change.text);
                }
            }
            "textDocument/didClose" => {
                if let Ok(p) = params::<DidCloseTextDocumentParams>(n.params) {
                    self.texts.open.remove(&plain(&path_of(&p.text_document.uri)));
                    self.changed();
                    return self.show(p.text_document.uri, None, Vec::new());
                }
            }
            // Tables and used files may be others now.
            "textDocument/didSave" | "workspace/didChangeWatchedFiles" => self.changed(),
            _ => (),
        }
        Ok(())
    }

    fn set(&mut self, uri: Uri, version: Option<i32>, text: String) {
        let path = plain(&path_of(&uri));
        self.texts.open.insert(path, Text { uri, version, text });
        self.changed();
    }

    /// Checks what is not checked yet, and tells what is wrong.
    fn publish(&mut self) -> io::Result<()> {
        let open = self.texts.open.iter().filter(|(path, _)| !self.told.contains(*path));
        let new: Vec<_> = open.map(|(path, text)| (path.clone(), text.uri.clone(), text.version)).collect();
        for (path, uri, version) in new {
            let found = match self.checked(&uri) {
                Ok(checked) => checked.problems().into_iter().map(|p| p.shown).collect(),
                Err(_) => Vec::new(),
            };
            self.told.insert(path);
            self.show(uri, version, found)?;
        }
        Ok(())
    }

    fn show(&mut self, uri: Uri, version: Option<i32>, diagnostics: Vec<lsp_types::Diagnostic>) -> io::Result<()> {
        let shown = PublishDiagnosticsParams { uri, diagnostics, version };
        self.send(Notification::new("textDocument/publishDiagnostics".to_string(), shown))
    }
}

fn capabilities() -> Value {
    let capabilities = ServerCapabilities {
        text_document_sync: Some(TextDocumentSyncCapability::Kind(TextDocumentSyncKind::FULL)),
        hover_provider: Some(HoverProviderCapability::Simple(true)),
        completion_provider: Some(CompletionOptions::default()),
        definition_provider: Some(OneOf::Left(true)),
        document_symbol_provider: Some(OneOf::Left(true)),
        document_formatting_provider: Some(OneOf::Left(true)),
        code_action_provider: Some(CodeActionProviderCapability::Simple(true)),
        ..ServerCapabilities::default()
    };
    let about = ServerInfo { name: "qp-codegen".into(), version: Some(env!("CARGO_PKG_VERSION").into()) };
    json!({ "capabilities": capabilities, "serverInfo": about })
}
