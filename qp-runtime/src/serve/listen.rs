//! Connections: how many, how long they may be silent, and how they end.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use hyper::Request;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, TryAcquireError, watch};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::stats::Stats;

/// Bounds of connections.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    /// Open at once; others wait, and then those that keep the server waiting lose their places.
    pub most: usize,
    /// Time for the head of a request to arrive; also how long a connection may be idle.
    pub head: Duration,
    /// Time for a client to take what it is sent.
    pub write: Duration,
}

/// How long a client has to ask, once it is connected, before its place may be given to somebody else.
const TO_ASK: Duration = Duration::from_millis(200);
/// The same to send the rest of what it asks, to take what it was answered, or to ask again.
const TO_GO_ON: Duration = Duration::from_secs(2);

/// The connections whose clients keep the server waiting. Where all places are taken and another client comes, the one that
/// has done so for the longest time goes.
#[derive(Default)]
struct Silent(Mutex<BTreeMap<(Instant, u64), Arc<Notify>>>);

impl Silent {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Instant, u64), Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection that has been silent for the longest time, if it had its time.
    fn end_one(&self) {
        let mut silent = self.lock();
        if let Some(first) = silent.first_entry().filter(|e| e.key().0 <= Instant::now()) {
            first.remove().notify_one();
        }
    }
}

/// Whose turn it is on a connection. Handlers find it among a request's extensions.
pub struct Turn {
    silent: Arc<Silent>,
    /// Number of the connection.
    number: u64,
    /// Until when the client has time, while it is its turn.
    until: Mutex<Option<Instant>>,
    end: Arc<Notify>,
}

impl Turn {
    fn new(silent: Arc<Silent>, number: u64) -> Self {
        let turn = Turn { silent, number, until: Mutex::new(None), end: Arc::default() };
        turn.set(Some(TO_ASK));
        turn
    }

    fn set(&self, time: Option<Duration>) {
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        let mut silent = self.silent.lock();
        if let Some(until) = until.take() {
            silent.remove(&(until, self.number));
        }
        if let Some(time) = time {
            let time = Instant::now() + time;
            silent.insert((time, self.number), self.end.clone());
            *until = Some(time);
        }
    }

    /// The server waits for the client.
    pub fn is_clients(&self) {
        self.set(Some(TO_GO_ON));
    }

    /// The client waits for the server.
    pub fn is_servers(&self) {
        self.set(None);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.set(None);
    }
}

/// A response's body; when it has been sent, it is the client's turn.
struct Answering {
    body: Body,
    turn: Arc<Turn>,
}

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.turn.is_clients();
    }
}

/// Serves connections until `stop` says so, then waits until all have ended; each ends with the answer it is giving.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    bounds: Connections,
    stats: Arc<Stats>,
    stop: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(bounds.most));
    let silent = Arc::new(Silent::default());
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(bounds.head).max_buf_size(64 << 10);
    let router = TowerToHyperService::new(router);
    let mut stopped = stop.clone();
    for number in 0.. {
        let accepted = tokio::select! {
            () = told(&mut stopped) => break,
            accepted = accept(&listener, &places, &silent) => accepted,
        };
        let (stream, place) = match accepted {
            Ok(accepted) => accepted,
            Err(_) => {
                // Too many open files, or a connection that has gone already.
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Parts of an answer are small and wanted at once.
        let _ = stream.set_nodelay(true);
        let turn = Arc::new(Turn::new(silent.clone(), number));
        let io = TokioIo::new(Prompt { stream, patience: bounds.write, waiting: None });
        let connection = http.serve_connection(io, answering(router.clone(), turn.clone()));
        let (stats, mut stop) = (stats.clone(), stop.clone());
        stats.connections.add(1);
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => (),
                () = turn.end.notified() => (),
                () = told(&mut stop) => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
            stats.connections.sub(1);
            drop(place);
        });
    }
    drop(listener);
    // All places are free when all connections have ended.
    let _ = places.acquire_many(bounds.most as u32).await;
}

/// `router`, noting whose turn it is.
fn answering(
    router: TowerToHyperService<Router>,
    turn: Arc<Turn>,
) -> impl Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send> {
    service_fn(move |mut request: Request<Incoming>| {
        turn.is_servers();
        request.extensions_mut().insert(turn.clone());
        let (answer, turn) = (router.call(request), turn.clone());
        async move { Ok(answer.await?.map(|body| Body::new(Answering { body, turn }))) }
    })
}

/// Waits until the server is to stop.
async fn told(stop: &mut watch::Receiver<bool>) {
    // An error means that whoever could say so has gone.
    let _ = stop.wait_for(|&s| s).await;
}

/// The next connection, and a place for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    silent: &Silent,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let (stream, _) = listener.accept().await?;
    let mut place = places.clone().try_acquire_owned();
    while place.is_err() {
        silent.end_one();
        place = match timeout(Duration::from_millis(20), places.clone().acquire_owned()).await {
            Ok(place) => Ok(place.map_err(io::Error::other)?),
            Err(_) => Err(TryAcquireError::NoPermits),
        };
    }
    Ok((stream, place.map_err(io::Error::other)?))
}

/// A connection that ends if its client does not take what it is sent.
struct Prompt {
    stream: TcpStream,
    patience: Duration,
    /// When patience ends, while the client takes nothing.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Prompt {
    /// Passes `poll` on; an error if it has been pending for too long.
    fn patient<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.waiting = None;
            return poll;
        }
        let until = Instant::now() + self.patience;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        match waiting.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Prompt {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Prompt {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.patient(cx, poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.patient(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
