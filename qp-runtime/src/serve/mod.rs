//! An OpenAI-compatible server for one model on one device.
//!
//! * [`scheduler`]: which sequences the engine computes, plain code without threads; [`prefix`]: pages that sequences
//!   share; [`choose`]: the next token; [`grammar`]: structured output.
//! * [`worker`]: the thread that the engine lives on.
//! * [`answer`]: tokens as text, on the other side of a channel.
//! * [`api`]: the HTTP interface; [`listen`]: connections; [`stats`]: numbers; [`describe`]: what the page shows.
//!
//! The engine's thread never waits for a client: events go through channels whose length is bounded by what was asked
//! for, and what was asked for by the places in the queue.

pub mod answer;
pub mod api;
pub mod choose;
pub mod describe;
pub mod grammar;
pub mod listen;
pub mod prefix;
pub mod scheduler;
pub mod stats;
pub mod worker;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::TcpSocket;
use tokio::sync::watch;

use api::App;
use listen::Connections;
use stats::Stats;

/// Clients that the system lets wait until they are accepted.
const BACKLOG: u32 = 4096;

/// Serves `app` on `socket`, which has an address, until `stop` comes: then no more requests are taken, those that are there
/// get `grace` to end, and the rest is told that the server stops. `ready` is called once clients can connect.
///
/// # Errors
/// If the system gives no threads or does not listen, or the engine has failed for good.
pub fn run(
    app: App,
    socket: TcpSocket,
    bounds: Connections,
    grace: Duration,
    ready: impl FnOnce(),
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    // Templates, tokenizing and grammars use the cores; more of them at once would only use more memory.
    let blocking = std::thread::available_parallelism().map_or(4, |n| n.get().max(4));
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().thread_name("http").max_blocking_threads(blocking).build()?;
    let app = Arc::new(app);
    runtime.block_on(async {
        let listener = socket.listen(BACKLOG)?;
        ready();
        let (end, ended) = watch::channel(false);
        let server = listen::serve(listener, api::router(app.clone()), bounds, app.stats.clone(), ended);
        let server = tokio::spawn(server);
        let died = tokio::select! {
            () = stop => false,
            () = dead(&app.stats) => true,
        };
        app.stopping.store(true, Ordering::Relaxed);
        let patience = tokio::time::sleep(grace);
        tokio::pin!(patience);
        while app.open_requests() > 0 {
            tokio::select! {
                () = &mut patience => break,
                () = tokio::time::sleep(Duration::from_millis(20)) => (),
            }
        }
        // Whoever still waits is told so; connections end with what they are sending.
        app.worker.stop();
        let _ = end.send(true);
        let _ = tokio::time::timeout(Duration::from_secs(5), server).await;
        // Whoever started the server can start it again.
        if died { Err(io::Error::other("the engine has failed: start the server again")) } else { Ok(()) }
    })
}

/// Waits until the engine's thread has ended by itself.
async fn dead(stats: &Stats) {
    while stats.dead.get() == 0 {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
