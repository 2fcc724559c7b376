//! The thread that an engine lives on.

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use super::scheduler::{Limits, Request, Scheduler};
use super::stats::Stats;
use crate::engine::{Drafts, Engine};

enum Command {
    Submit(Box<Request>),
    /// End all requests and the thread.
    Stop,
}

/// A handle of the engine's thread.
#[derive(Debug)]
pub struct Worker {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread; `drafts` guess tokens. If the engine panics, all its requests lose their sinks and `stats.dead` is set.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(
        engine: Box<dyn Engine>,
        drafts: Option<Drafts>,
        limits: Limits,
        stats: Arc<Stats>,
    ) -> std::io::Result<Worker> {
        let (commands, receiver) = channel();
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let scheduler = Scheduler::new(engine, drafts, limits, stats.clone());
            let ended = catch_unwind(AssertUnwindSafe(|| run(scheduler, &receiver)));
            stats.dead.set(1);
            if ended.is_err() {
                writeln!(io::stderr(), "the engine's thread has failed").unwrap_or_default();
            }
        })?;
        Ok(Worker { commands, thread: Some(thread) })
    }

    /// Hands a request over; its sink is dropped if the engine's thread has ended.
    pub fn submit(&self, request: Request) {
        // The sink is in what comes back with the error, and is dropped with it.
        let _ = self.commands.send(Command::Submit(Box::new(request)));
    }

    /// Ends all requests; the thread ends after the step that it is in.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // It catches its panics.
            let _ = thread.join();
        }
    }
}

fn run(mut scheduler: Scheduler, commands: &Receiver<Command>) {
    loop {
        let command = match scheduler.is_idle() {
            true => commands.recv().map_err(|_| TryRecvError::Disconnected),
            false => commands.try_recv(),
        };
        match command {
            Ok(Command::Submit(request)) => scheduler.submit(*request),
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return scheduler.stop(),
            Err(TryRecvError::Empty) => {
                scheduler.step();
            }
        }
    }
}
