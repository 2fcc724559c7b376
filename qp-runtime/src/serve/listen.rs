//! Connections: how many, how long they may be silent, and how they end.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep, sleep};

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

/// How long a connection may keep the server waiting while others wait to be accepted.
const HURRY: Duration = Duration::from_secs(2);

/// Whose turn it is on a connection, as handlers see it among a request's extensions.
pub struct Turn {
    /// Since when the server waits for the client to ask; nothing while it answers.
    client: Mutex<Option<Instant>>,
    /// True while a connection waits for a place.
    crowd: watch::Receiver<bool>,
}

impl Turn {
    fn new(crowd: watch::Receiver<bool>) -> Self {
        Turn { client: Mutex::new(Some(Instant::now())), crowd }
    }

    fn set(&self, client: Option<Instant>) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = client;
    }

    /// Waits until somebody else waits for the place of a client that has kept the server waiting since `since`.
    async fn overdue(&self, since: impl Fn() -> Option<Instant>) {
        let mut crowd = self.crowd.clone();
        loop {
            if crowd.wait_for(|&c| c).await.is_err() {
                // Nobody is accepted any more.
                std::future::pending::<()>().await;
            }
            if since().is_some_and(|since| since.elapsed() >= HURRY) {
                return;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Waits until the client has not asked for long enough that its place is given to somebody else.
    async fn idle(&self) {
        self.overdue(|| *self.client.lock().unwrap_or_else(PoisonError::into_inner)).await;
    }

    /// Waits until the client, a part of whose request is there, has been sending the rest for long enough that its place
    /// is given to somebody else.
    pub async fn slow(&self) {
        let now = Instant::now();
        self.overdue(|| Some(now)).await;
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
        self.turn.set(Some(Instant::now()));
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
    let (crowd, crowded) = watch::channel(false);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(bounds.head).max_buf_size(64 << 10);
    let router = TowerToHyperService::new(router);
    let mut stopped = stop.clone();
    loop {
        let accepted = tokio::select! {
            () = told(&mut stopped) => break,
            accepted = accept(&listener, &places, &crowd) => accepted,
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
        let turn = Arc::new(Turn::new(crowded.clone()));
        let io = TokioIo::new(Prompt { stream, patience: bounds.write, waiting: None });
        let connection = http.serve_connection(io, answering(router.clone(), turn.clone()));
        let (stats, mut stop) = (stats.clone(), stop.clone());
        stats.connections.add(1);
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            tokio::select! {
                _ = connection.as_mut() => (),
                () = turn.idle() => (),
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
        turn.set(None);
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

/// The next connection, and a place for it: where there is none, clients that keep the server waiting are told to hurry.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    crowd: &watch::Sender<bool>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let (stream, _) = listener.accept().await?;
    let place = match places.clone().try_acquire_owned() {
        Ok(place) => place,
        Err(_) => {
            let _ = crowd.send(true);
            let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
            let _ = crowd.send(false);
            place
        }
    };
    Ok((stream, place))
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
