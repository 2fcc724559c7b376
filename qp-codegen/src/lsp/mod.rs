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

/// Most bytes of a message.
const MOST_BYTES: usize = 64 << 20;
/// Most bytes of a message's header.
const MOST_HEADER: u64 = 4096;

/// Serves an editor until it says goodbye.
///
/// # Errors
/// If what comes in is no message, the editor ends without a goodbye, or nothing can be written.
pub fn serve() -> Result<(), String> {
    let (send, messages) = mpsc::channel();
    std::thread::spawn(move || {
        let mut input = BufReader::new(io::stdin());
        loop {
            let read = read(&mut input);
            let last = !matches!(&read, Ok(Some(m)) if !is_exit(m));
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
        let message = received.map_err(|e| format!("standard input: {e}"))?;
        let Some(message) = message else {
            return Err("the input ended without `exit`".into());
        };
        if is_exit(&message) {
            let orderly = server.state == State::Ended;
            return if orderly { Ok(()) } else { Err("`exit` came without `shutdown`".into()) };
        }
        server.message(message).map_err(|e| format!("standard output: {e}"))?;
        next = messages.try_recv().ok();
        if next.is_none() {
            server.publish().map_err(|e| format!("standard output: {e}"))?;
        }
    }
}

fn is_exit(message: &Message) -> bool {
    matches!(message, Message::Notification(n) if n.method == "exit")
}

/// The next message; nothing at the end of the input.
fn read(input: &mut impl BufRead) -> io::Result<Option<Message>> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut length = None;
    let mut header = input.by_ref().take(MOST_HEADER);
    let mut line = Vec::new();
    loop {
        line.clear();
        if header.read_until(b'\n', &mut line)? == 0 && length.is_none() && header.limit() == MOST_HEADER {
            return Ok(None);
        }
        let text = String::from_utf8_lossy(&line);
        if !text.ends_with('\n') {
            return Err(invalid("a header that does not end".into()));
        }
        let text = text.trim_end();
        if text.is_empty() {
            break;
        }
        let (name, value) = text.split_once(':').ok_or_else(|| invalid(format!("`{text}` is no header")))?;
        if name.eq_ignore_ascii_case("content-length") {
            let bytes = value.trim().parse().ok().filter(|n| *n <= MOST_BYTES);
            length = Some(bytes.ok_or_else(|| invalid(format!("`{text}` is no length up to {MOST_BYTES}")))?);
        }
    }
    let length = length.ok_or_else(|| invalid("a header without `Content-Length`".into()))?;
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes)?;
    let message = serde_json::from_slice(&bytes).map_err(|e| invalid(format!("no message of the protocol: {e}")))?;
    Ok(Some(message))
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
