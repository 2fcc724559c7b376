//! Answers: whole, and streamed as server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::error::ApiError;
use super::request::{Ask, ChatRequest, CompletionRequest, Prompt};
use super::{App, blocking, now, read};
use crate::chat::{self, Options};
use crate::engine::Sampling;
use crate::serve::answer::{Answer, Delta, Finish, Piece};
use crate::serve::choose::Choosing;
use crate::serve::scheduler::Request as Job;

/// Parts of an answer that may wait for a reader.
const PARTS: usize = 32;

/// `POST /v1/chat/completions`.
pub async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let fields = read(&app, request).await?;
    let ChatRequest { messages, tools, variables, mut ask } = ChatRequest::read(fields, app.serving())?;
    let places = places(&app, ask.n)?;
    let shared = app.clone();
    let tokens = blocking(move || rendered(&shared, &messages, &Options { tools, variables })).await??;
    ask.stop.extend(app.model.chat.stop.iter().cloned());
    let end = Arc::from(app.model.chat.end.as_slice());
    answer(app, Kind::Chat, vec![tokens], ask, end, places).await
}

/// The tokens of messages as the model's template writes them.
///
/// # Errors
/// If a message is malformed, the template fails, or the text is too long.
pub fn rendered(app: &App, messages: &[Value], options: &Options) -> Result<Vec<u32>, ApiError> {
    let wrong = |e: chat::Error| {
        let param = if matches!(e, chat::Error::Template { .. }) { None } else { Some("messages".to_owned()) };
        ApiError { param, ..ApiError::new(StatusCode::BAD_REQUEST, e.to_string()) }
    };
    let chat = &app.model.chat;
    let text = chat.text(messages, options).map_err(wrong)?;
    app.check_length("messages", &text)?;
    chat.tokens(&app.model.tokenizer, &text).map_err(wrong)
}

/// `POST /v1/completions`.
pub async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let fields = read(&app, request).await?;
    let CompletionRequest { prompts, ask } = CompletionRequest::read(fields, app.serving())?;
    let places = places(&app, prompts.len() * ask.n)?;
    let shared = app.clone();
    let encode = move || {
        let tokens = |prompt| {
            let mut tokens = match prompt {
                Prompt::Text(text) => {
                    shared.check_length("prompt", &text)?;
                    let tokens = shared.model.tokenizer.encode(&text);
                    tokens.map_err(|e| ApiError::parameter("prompt", e.to_string()))?
                }
                Prompt::Tokens(tokens) => tokens,
            };
            if tokens.is_empty() {
                tokens.extend(shared.model.bos);
            }
            Ok(tokens)
        };
        prompts.into_iter().map(tokens).collect::<Result<Vec<_>, ApiError>>()
    };
    let prompts = blocking(encode).await??;
    let end = app.model.end.clone();
    answer(app, Kind::Text, prompts, ask, end, places).await
}

/// Places in the queue.
pub fn places(app: &App, n: usize) -> Result<Vec<OwnedSemaphorePermit>, ApiError> {
    if n > app.all_places {
        let message = format!("{n} answers in one request: this server makes {} at most", app.all_places);
        return Err(ApiError::new(StatusCode::BAD_REQUEST, message));
    }
    let Ok(mut all) = app.places.clone().try_acquire_many_owned(n as u32) else {
        app.stats.refused.add(n as u64);
        let message = format!("the queue is full ({} requests): ask again later", app.all_places);
        return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
            .with_code("queue_full")
            .after(app.retry_after()));
    };
    let mut places: Vec<OwnedSemaphorePermit> = (1..n).filter_map(|_| all.split(1)).collect();
    places.push(all);
    Ok(places)
}

/// Which of the two forms an answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Chat,
    Text,
}

/// Tokens of answers.
#[derive(Default)]
struct Used {
    tokens: usize,
    /// Tokens of prompts that were in the cache.
    cached: usize,
    /// Guesses that were right, and that were wrong.
    guesses: (usize, usize),
}

impl Used {
    fn of(answer: &Answer) -> Self {
        Used { tokens: answer.tokens, cached: answer.cached, guesses: answer.guesses }
    }

    fn add(&mut self, more: &Used) {
        self.tokens += more.tokens;
        self.cached += more.cached;
        self.guesses = (self.guesses.0 + more.guesses.0, self.guesses.1 + more.guesses.1);
    }
}

/// What the parts of a response have in common.
struct Envelope {
    app: Arc<App>,
    kind: Kind,
    id: String,
    created: u64,
    prompt_tokens: usize,
    ask: Ask,
}

/// Starts the answers and gives them back as the request wants them.
async fn answer(
    app: Arc<App>,
    kind: Kind,
    prompts: Vec<Vec<u32>>,
    ask: Ask,
    end: Arc<[u32]>,
    places: Vec<OwnedSemaphorePermit>,
) -> Result<Response, ApiError> {
    let deadline = Instant::now() + app.bounds.answer_time;
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let common = Arc::new(Envelope {
        id: format!("{prefix}-{:016x}", app.clock.next()),
        created: now(),
        prompt_tokens: prompts.iter().map(Vec::len).sum(),
        app: app.clone(),
        kind,
        ask,
    });
    let answers = start(&common, &prompts, &end, places).await?;
    if common.ask.stream { Ok(stream(common, answers, deadline)) } else { whole(&common, answers, deadline).await }
}

/// Hands all answers of a request over to the engine.
async fn start(
    common: &Arc<Envelope>,
    prompts: &[Vec<u32>],
    end: &Arc<[u32]>,
    places: Vec<OwnedSemaphorePermit>,
) -> Result<Vec<Answer>, ApiError> {
    let (app, ask) = (&common.app, &common.ask);
    let name = if common.kind == Kind::Chat { "messages" } else { "prompt" };
    for prompt in prompts {
        if prompt.is_empty() {
            let message = match common.kind {
                Kind::Chat => "the messages make a prompt without a token: write something",
                Kind::Text => "the prompt is empty and the model has no first token: give a prompt",
            };
            return Err(ApiError::parameter(name, message));
        }
        if let Some(token) = prompt.iter().find(|&&t| t as usize >= app.model.vocab) {
            let message = format!("token {token} is not among the model's {}", app.model.vocab);
            return Err(ApiError::parameter(name, message));
        }
        let most = ask.most.unwrap_or(1);
        if prompt.len().saturating_add(most.saturating_sub(1)) > app.model.context {
            let message = format!(
                "the prompt has {} tokens and {most} more were asked for: the context holds {}; shorten the prompt or ask \
                 for fewer tokens",
                prompt.len(),
                app.model.context
            );
            return Err(ApiError::parameter(name, message).with_code("context_length_exceeded"));
        }
    }
    if let Some((token, _)) = ask.bias.iter().find(|&&(t, _)| t as usize >= app.model.vocab) {
        let message = format!("logit_bias: token {token} is not among the model's {}", app.model.vocab);
        return Err(ApiError::parameter("logit_bias", message));
    }
    let mut grammars = Vec::new();
    if let Some(form) = ask.form.clone() {
        let (shared, n) = (app.clone(), places.len());
        let compile = move || shared.grammars.compile(&form, n);
        grammars = blocking(compile)
            .await?
            .map_err(|e| ApiError::parameter("response_format", format!("response_format: {e}")))?;
    }
    let mut answers = Vec::new();
    let end: Arc<[u32]> = if ask.endless { Arc::from([]) } else { end.clone() };
    let each = prompts.iter().flat_map(|p| (0..ask.n).map(move |i| (p, i)));
    for ((prompt, i), place) in each.zip(places) {
        let (answer, sink) = Answer::new(&app.model.tokenizer, prompt, ask.stop.clone(), &app.stats, place);
        app.worker.submit(Job {
            prompt: prompt.clone(),
            most: ask.most.unwrap_or(app.model.context - prompt.len() + 1),
            end: end.clone(),
            choosing: Choosing {
                sampling: Sampling { seed: ask.sampling.seed.wrapping_add(i as u64), ..ask.sampling },
                bias: ask.bias.clone(),
                presence: ask.presence,
                frequency: ask.frequency,
                repetition: ask.repetition,
                logprobs: ask.logprobs,
                grammar: grammars.pop(),
            },
            sink,
        });
        answers.push(answer);
    }
    Ok(answers)
}

/// More of an answer, unless the time is over.
async fn next(answer: &mut Answer, deadline: Instant) -> Result<Option<Delta>, ApiError> {
    let late = |_| {
        let message = "the answer took longer than this server allows; ask for fewer tokens";
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, message).with_code("timeout")
    };
    Ok(timeout_at(deadline, answer.next()).await.map_err(late)??)
}

async fn whole(common: &Envelope, answers: Vec<Answer>, deadline: Instant) -> Result<Response, ApiError> {
    let (mut choices, mut used) = (Vec::new(), Used::default());
    for (index, mut answer) in answers.into_iter().enumerate() {
        let mut all = Delta::default();
        while let Some(delta) = next(&mut answer, deadline).await? {
            all.text.push_str(&delta.text);
            all.pieces.extend(delta.pieces);
        }
        used.add(&Used::of(&answer));
        choices.push(common.choice(index, &all, Some(answer.finish()), 0, true));
    }
    let mut body = common.envelope(choices, true);
    body.insert("usage".to_owned(), common.usage(&used));
    Ok(axum::Json(Value::Object(body)).into_response())
}

fn stream(common: Arc<Envelope>, answers: Vec<Answer>, deadline: Instant) -> Response {
    let (parts, body) = channel(PARTS);
    tokio::spawn(async move {
        let mut pumps = JoinSet::new();
        for (index, answer) in answers.into_iter().enumerate() {
            pumps.spawn(pump(common.clone(), index, answer, deadline, parts.clone()));
        }
        let mut used = Used::default();
        while let Some(done) = pumps.join_next().await {
            used.add(&done.unwrap_or_default());
        }
        if common.ask.usage {
            let mut last = common.envelope(Vec::new(), false);
            last.insert("usage".to_owned(), common.usage(&used));
            let _ = parts.send(event(&Value::Object(last))).await;
        }
        // The reader may have gone.
        let _ = parts.send(Bytes::from_static(b"data: [DONE]\n\n")).await;
    });
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    (headers, Body::new(Parts(body))).into_response()
}

/// Sends one answer's parts, and gives the numbers of its tokens.
async fn pump(
    common: Arc<Envelope>,
    index: usize,
    mut answer: Answer,
    deadline: Instant,
    parts: Sender<Bytes>,
) -> Used {
    let mut offset = 0;
    if common.kind == Kind::Chat {
        let first = json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null});
        let _ = parts.send(event(&Value::Object(common.envelope(vec![first], false)))).await;
    }
    loop {
        let delta = tokio::select! {
            // Nobody reads any more: dropping the answer gives it up.
            () = parts.closed() => break,
            delta = next(&mut answer, deadline) => delta,
        };
        let part = match delta {
            Ok(Some(delta)) => {
                let choice = common.choice(index, &delta, None, offset, false);
                offset += delta.text.chars().count();
                common.envelope(vec![choice], false).into()
            }
            Ok(None) => {
                let choice = common.choice(index, &Delta::default(), Some(answer.finish()), offset, false);
                let _ = parts.send(event(&common.envelope(vec![choice], false).into())).await;
                break;
            }
            Err(e) => {
                let _ = parts.send(event(&e.json())).await;
                break;
            }
        };
        if parts.send(event(&part)).await.is_err() {
            break;
        }
    }
    Used::of(&answer)
}

/// A server-sent event.
fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

/// A body of parts that come one after another.
struct Parts(Receiver<Bytes>);

impl HttpBody for Parts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|part| part.map(|bytes| Ok(Frame::data(bytes))))
    }
}

impl Envelope {
    /// What is around the choices.
    fn envelope(&self, choices: Vec<Value>, whole: bool) -> Map<String, Value> {
        let object = match (self.kind, whole) {
            (Kind::Chat, true) => "chat.completion",
            (Kind::Chat, false) => "chat.completion.chunk",
            (Kind::Text, _) => "text_completion",
        };
        let mut out = Map::new();
        out.insert("id".to_owned(), self.id.clone().into());
        out.insert("object".to_owned(), object.into());
        out.insert("created".to_owned(), self.created.into());
        out.insert("model".to_owned(), self.app.model.name.clone().into());
        out.insert("choices".to_owned(), choices.into());
        if !whole && self.ask.usage {
            out.insert("usage".to_owned(), Value::Null);
        }
        out
    }

    fn usage(&self, used: &Used) -> Value {
        let mut usage = json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": used.tokens,
            "total_tokens": self.prompt_tokens + used.tokens,
            "prompt_tokens_details": {"cached_tokens": used.cached},
        });
        if used.guesses != (0, 0) {
            let (right, wrong) = used.guesses;
            usage["completion_tokens_details"] =
                json!({"accepted_prediction_tokens": right, "rejected_prediction_tokens": wrong});
        }
        usage
    }

    /// One choice, whole or a part of it that begins at character `offset` of the answer.
    fn choice(&self, index: usize, delta: &Delta, finish: Option<Finish>, offset: usize, whole: bool) -> Value {
        let logprobs = match (self.ask.logprobs.filter(|_| !delta.pieces.is_empty()), self.kind) {
            (None, _) => Value::Null,
            (Some(_), Kind::Chat) => {
                json!({"content": delta.pieces.iter().map(|p| self.token(p)).collect::<Vec<_>>(), "refusal": null})
            }
            (Some(_), Kind::Text) => self.legacy_tokens(&delta.pieces, offset),
        };
        let finish = finish.map(Finish::name);
        match (self.kind, whole) {
            (Kind::Chat, true) => json!({
                "index": index, "message": {"role": "assistant", "content": delta.text, "refusal": null},
                "logprobs": logprobs, "finish_reason": finish,
            }),
            (Kind::Chat, false) => {
                let content = if finish.is_some() { json!({}) } else { json!({"content": delta.text}) };
                json!({"index": index, "delta": content, "logprobs": logprobs, "finish_reason": finish})
            }
            (Kind::Text, _) => {
                json!({"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": finish})
            }
        }
    }

    /// A token with its probabilities, as chat completions have it.
    fn token(&self, piece: &Piece) -> Value {
        let one = |token: u32, logprob: f32| {
            let (text, bytes) = self.app.piece(token);
            json!({"token": text, "logprob": finite(logprob), "bytes": bytes})
        };
        let Some(report) = &piece.logprobs else { return Value::Null };
        let mut out = one(piece.token, report.chosen);
        out["top_logprobs"] = report.top.iter().map(|t| one(t.token, t.logprob)).collect();
        out
    }

    /// Tokens with their probabilities, as plain completions have them.
    fn legacy_tokens(&self, pieces: &[Piece], mut offset: usize) -> Value {
        let (mut tokens, mut chosen, mut top, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for piece in pieces {
            let text = self.app.piece(piece.token).0;
            offsets.push(offset);
            offset += text.chars().count();
            tokens.push(text);
            let report = piece.logprobs.as_deref();
            chosen.push(report.map(|r| finite(r.chosen)));
            let of = |t: &crate::serve::choose::LogProb| (self.app.piece(t.token).0, json!(finite(t.logprob)));
            top.push(report.map(|r| r.top.iter().map(of).collect::<Map<String, Value>>()));
        }
        json!({"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets})
    }
}

/// JSON has no infinity; OpenAI writes −9999 for it.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
