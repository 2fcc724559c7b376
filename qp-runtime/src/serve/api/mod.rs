//! The HTTP interface: OpenAI's, and what a person or a monitor asks.
//!
//! | | |
//! |---|---|
//! | `GET /` | a page to chat in a browser |
//! | `POST /v1/chat/completions`, `POST /v1/completions` | answers |
//! | `GET /v1/models` | the model that is served |
//! | `POST /tokenize` | the tokens of a text or of messages |
//! | `GET /health`, `GET /metrics`, `GET /status` | for monitors: alive, Prometheus' numbers, what the page shows |
//!
//! * [`request`]: what requests may say.
//! * [`generate`]: answers, whole and streamed.
//! * [`error`]: errors in OpenAI's form.

pub mod error;
pub mod generate;
pub mod request;

use std::future::poll_fn;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::grammar::Grammars;
use super::listen::Turn;
use super::stats::Stats;
use super::worker::Worker;
use crate::chat::{Chat, Options};
use crate::model::Tokenizer;
pub use error::ApiError;
use request::{Fields, Serving};

/// Bounds of what a client may ask.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Bytes of a request's body.
    pub body: usize,
    /// Time for a body to arrive.
    pub body_time: Duration,
    /// Time for an answer.
    pub answer_time: Duration,
    /// Hash of the key that requests must bring, if any.
    pub key: Option<[u8; 32]>,
    /// Whether only names of this machine are answered to, which keeps foreign web pages away.
    pub local: bool,
}

/// The hash of a key, as [`Bounds::key`] has it.
pub fn key_hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// The model that is served.
pub struct Served {
    /// Its name for clients.
    pub name: String,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template.
    pub chat: Chat,
    /// Tokens that end a plain text.
    pub end: Arc<[u32]>,
    /// First token of a text, if the model has one.
    pub bos: Option<u32>,
    /// Tokens of a prompt with its answer.
    pub context: usize,
    /// Tokens that the model knows.
    pub vocab: usize,
    /// What the page shows of it: see [`super::describe`].
    pub description: Value,
}

/// What all handlers share.
pub struct App {
    /// The model.
    pub model: Served,
    /// The engine's thread.
    pub worker: Worker,
    /// Numbers.
    pub stats: Arc<Stats>,
    /// Bounds.
    pub bounds: Bounds,
    /// True once the server takes no more requests.
    pub stopping: AtomicBool,
    grammars: Grammars,
    places: Arc<Semaphore>,
    all_places: usize,
    clock: Clock,
    bytes: OnceLock<Vec<Vec<u8>>>,
}

/// Times and numbers that differ from request to request.
#[derive(Debug)]
pub struct Clock {
    started: u64,
    random: u64,
    requests: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Clock { started: now(), random: RandomState::new().build_hasher().finish(), requests: AtomicU64::new(0) }
    }
}

impl Clock {
    /// A number that no other request of this server has, and that cannot be foreseen.
    fn next(&self) -> u64 {
        let n = self.requests.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random.wrapping_add(n);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl App {
    /// Serves `model`, which `worker` computes, with `places` in the queue, those of running requests included.
    pub fn new(model: Served, worker: Worker, stats: Arc<Stats>, places: usize, bounds: Bounds) -> App {
        let mut end = model.end.to_vec();
        end.extend(model.chat.end.iter().filter(|t| !model.end.contains(t)));
        App {
            grammars: Grammars::new(model.tokenizer.clone(), Arc::from(end)),
            model,
            worker,
            stats,
            bounds,
            stopping: AtomicBool::new(false),
            places: Arc::new(Semaphore::new(places)),
            all_places: places,
            clock: Clock::default(),
            bytes: OnceLock::new(),
        }
    }

    /// Requests that are not finished.
    pub fn open_requests(&self) -> usize {
        self.all_places - self.places.available_permits()
    }

    /// Seconds after which a client that was sent away may find a place: the time that a request takes on average.
    fn retry_after(&self) -> u64 {
        self.stats.request_seconds().ceil().clamp(1.0, 60.0) as u64
    }

    fn serving(&self) -> Serving<'_> {
        Serving { model: &self.model.name, seed: self.clock.next() }
    }

    /// The bytes of each token.
    fn token_bytes(&self) -> &[Vec<u8>] {
        self.bytes.get_or_init(|| self.model.tokenizer.all_bytes())
    }

    /// Refuses a text, of the parameter `name`, that cannot but have more tokens than the context holds, before it is cut into them: that takes about
    /// a hundred bytes of memory each.
    fn check_length(&self, name: &str, text: &str) -> Result<(), ApiError> {
        let longest = self.token_bytes().iter().map(Vec::len).max().unwrap_or(1);
        let context = self.model.context;
        // Some tokenizers drop or join characters first.
        if text.len() / 4 <= longest.saturating_mul(context) {
            return Ok(());
        }
        let message = format!(
            "the prompt has {} bytes, more than any of the {context} tokens that the context holds could be: shorten it",
            text.len()
        );
        Err(ApiError::parameter(name, message).with_code("context_length_exceeded"))
    }

    /// The bytes of a token as text, and themselves.
    fn piece(&self, token: u32) -> (String, &[u8]) {
        let all = self.token_bytes();
        let bytes = all.get(token as usize).map_or(&[][..], Vec::as_slice);
        let bytes = bytes.strip_prefix(b"\xff").unwrap_or(bytes);
        (String::from_utf8_lossy(bytes).into_owned(), bytes)
    }
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/tokenize", post(tokenize))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/embeddings", post(embeddings))
        .fallback(nowhere)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

/// Lets requests through that may pass.
async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match check(&app, &request) {
        Ok(()) => next.run(request).await,
        Err(e) => {
            let close = e.status == StatusCode::SERVICE_UNAVAILABLE;
            let mut response = e.into_response();
            if close {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    }
}

fn check(app: &App, request: &Request) -> Result<(), ApiError> {
    let headers = request.headers();
    if app.bounds.local && !is_local(headers) {
        let message = "this server answers to localhost only; start it with --host to be found under another name";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message));
    }
    let path = request.uri().path();
    let open = ["/", "/health"].contains(&path);
    if let Some(key) = app.bounds.key.as_ref().filter(|_| !open)
        && !has_key(headers, key)
    {
        let message = "a key is needed: send it as 'Authorization: Bearer KEY'";
        return Err(ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key"));
    }
    if app.stopping.load(Ordering::Relaxed) && path.starts_with("/v1/") {
        let message = "the server is stopping: ask again later";
        return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("stopping").after(5));
    }
    Ok(())
}

/// True if the request was sent to a name of this machine. A page of another site that had its own name point here (DNS
/// rebinding) would come under that name.
fn is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST).and_then(|h| h.to_str().ok()) else { return true };
    let name = match host.strip_prefix('[').and_then(|h| h.split_once(']')) {
        Some((v6, _)) => v6,
        None => host.split(':').next().unwrap_or(host),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// True if the request brings the key. Takes the same time wherever a wrong key differs.
fn has_key(headers: &HeaderMap, key: &[u8; 32]) -> bool {
    // The scheme is written in any case (RFC 9110).
    let bearer = headers.get(AUTHORIZATION).and_then(|h| h.to_str().ok()).and_then(|h| h.split_once(' '));
    let bearer = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key);
    let given = key_hash(bearer.unwrap_or_default().trim());
    let difference = given.iter().zip(key).fold(0, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(difference) == 0
}

async fn page() -> Response {
    let policy = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                  img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let headers =
        [(CONTENT_TYPE, "text/html; charset=utf-8"), (CONTENT_SECURITY_POLICY, policy), (CACHE_CONTROL, "no-cache")];
    (headers, include_str!("../page.html")).into_response()
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let (status, word) = match () {
        () if app.stats.dead.get() > 0 => (StatusCode::SERVICE_UNAVAILABLE, "the engine has ended"),
        () if app.stats.failing.get() >= 3 => (StatusCode::SERVICE_UNAVAILABLE, "the engine fails"),
        () if app.stopping.load(Ordering::Relaxed) => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        () => (StatusCode::OK, "ok"),
    };
    (status, axum::Json(json!({"status": word}))).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], app.stats.prometheus()).into_response()
}

async fn status(State(app): State<Arc<App>>) -> Response {
    let s = &app.stats;
    let mut out = app.model.description.clone();
    out["live"] = json!({
        "uptime": now().saturating_sub(app.clock.started),
        "running": s.running.get(), "waiting": s.waiting.get(), "connections": s.connections.get(),
        "generated": s.generated.get(), "guessed": s.guessed.get(), "right": s.right.get(), "computed": s.computed.get(), "steps": s.steps.get(),
        "prompt_tokens": s.prompt_tokens.get(), "cached_tokens": s.cached_tokens.get(),
        "pages": s.pages.get(), "free_pages": s.free_pages.get(), "cached_pages": s.cached_pages.get(),
        "preemptions": s.preemptions.get(), "requests": s.requests.get(),
    });
    ([(CACHE_CONTROL, "no-store")], axum::Json(out)).into_response()
}

fn model_card(app: &App) -> Value {
    json!({"id": app.model.name, "object": "model", "created": app.clock.started, "owned_by": "qp", "max_model_len": app.model.context})
}

async fn models(State(app): State<Arc<App>>) -> Response {
    axum::Json(json!({"object": "list", "data": [model_card(&app)]})).into_response()
}

async fn model(State(app): State<Arc<App>>, name: Result<Path<String>, PathRejection>) -> Response {
    let Ok(Path(name)) = name else {
        return ApiError::new(StatusCode::BAD_REQUEST, "the name of the model is not UTF-8").into_response();
    };
    if name == app.model.name {
        return axum::Json(model_card(&app)).into_response();
    }
    let message = format!("model '{name}' is not here: this server has '{}'", app.model.name);
    ApiError::new(StatusCode::NOT_FOUND, message).with_code("model_not_found").into_response()
}

async fn embeddings() -> Response {
    let message = "this server has no embeddings: its model continues texts; embeddings need a model made for them";
    ApiError::new(StatusCode::BAD_REQUEST, message).with_code("unsupported_endpoint").into_response()
}

async fn nowhere(request: Request) -> Response {
    let message = format!("there is nothing at {} {}", request.method(), request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, message).into_response()
}

async fn wrong_method(request: Request) -> Response {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).into_response()
}

/// `{"text": …}` or `{"messages": […], "tools": […]}` to `{"tokens": […], "count": …}`.
async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let mut fields = read(&app, request).await?;
    let text: Option<String> = fields.take("text")?;
    let messages: Option<Vec<Value>> = fields.take("messages")?;
    let tools = fields.tools()?;
    let special = fields.take("add_special_tokens")?.unwrap_or(true);
    fields.end()?;
    let _place = generate::places(&app, 1)?;
    let work = move || {
        let tokens = match (text, messages) {
            (Some(text), None) => {
                app.check_length("text", &text)?;
                let tokenizer = &app.model.tokenizer;
                let tokens = if special { tokenizer.encode(&text) } else { tokenizer.encode_exact(&text) };
                tokens.map_err(|e| ApiError::parameter("text", e.to_string()))?
            }
            (None, Some(messages)) => generate::rendered(&app, &messages, &Options { tools, ..Options::default() })?,
            _ => return Err(ApiError::new(StatusCode::BAD_REQUEST, "expected either 'text' or 'messages'")),
        };
        let pieces: Vec<String> = tokens.iter().map(|&t| app.piece(t).0).collect();
        Ok(axum::Json(json!({"tokens": tokens, "count": tokens.len(), "pieces": pieces, "context": app.model.context}))
            .into_response())
    };
    blocking(work).await?
}

/// Runs what takes a while on a thread that may wait.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    let failed =
        |_| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the request could not be read: a bug of the server's");
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

/// Reads a request's parameters.
async fn read(app: &App, request: Request) -> Result<Fields, ApiError> {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|h| h.to_str().ok()).unwrap_or_default();
    // Forms and plain texts could come from any web page.
    if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "expected 'Content-Type: application/json'"));
    }
    let turn = request.extensions().get::<Arc<Turn>>().cloned();
    if let Some(turn) = &turn {
        turn.is_clients();
    }
    let body = tokio::time::timeout(app.bounds.body_time, collect(request.into_body(), app.bounds.body)).await;
    if let Some(turn) = &turn {
        turn.is_servers();
    }
    let late = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time");
    Fields::parse(&body.map_err(late)??)
}

/// The bytes of a body of at most `limit`. Some of a longer one is still read, because many clients only look at the
/// answer when they have sent everything.
async fn collect(mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let (mut bytes, mut length) = (Vec::new(), 0);
    let fits = body.size_hint().lower() <= limit as u64;
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, format!("the body broke off: {e}")))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if fits && length <= limit {
            bytes.extend_from_slice(&data);
        } else {
            bytes = Vec::new();
        }
        if length > limit.saturating_mul(8) {
            break;
        }
    }
    if length > limit {
        let message = format!("the body is longer than {limit} bytes");
        return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).with_code("body_too_large"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine() {
        let local = |host: &'static str| is_local(&HeaderMap::from_iter([(HOST, HeaderValue::from_static(host))]));
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "[::1]"] {
            assert!(local(host), "{host}");
        }
        for host in ["example.org", "127.0.0.1.example.org:8000", "192.168.0.1", "[2001:db8::1]:80", "localhost.evil"] {
            assert!(!local(host), "{host}");
        }
        assert!(is_local(&HeaderMap::new()));
    }

    #[test]
    fn keys() {
        let has = |value: &'static str| {
            has_key(&HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static(value))]), &key_hash("secret"))
        };
        assert!(has("Bearer secret") && has("bearer secret"));
        for wrong in ["Bearer secre", "Bearer Secret", "bearer", "Bearersecret", "secret", "Bearer ", "Basic secret"] {
            assert!(!has(wrong), "{wrong}");
        }
        assert!(!has_key(&HeaderMap::new(), &key_hash("secret")));
    }
}
