//! `qp serve`: an OpenAI-compatible server.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use indicatif::HumanBytes;
use serde_json::json;
use tokio::net::TcpSocket;

use super::device::{Device, context_within, open_model};
use super::drafts::{Drafting, Opened};
use super::{Error, output};
use crate::chat::Chat;
use crate::engine::cuda::Needs;
use crate::engine::cuda::layout::{Form, Layout};
use crate::engine::{PAGE, Precision, Room, SharedWeights};
use crate::memory;
use crate::model::{Files, Model, Weights};
use crate::serve::api::{App, Bounds, Served, key_hash};
use crate::serve::listen::Connections;
use crate::serve::scheduler::{Limits, Scheduler};
use crate::serve::stats::Stats;
use crate::serve::worker::Worker;
use crate::serve::{self, describe};

/// Serve a model to OpenAI's clients, and a page to chat at http://HOST:PORT/.
///
/// A key that clients must send is taken from the environment variable QP_API_KEY or from --api-key-file.
#[derive(Debug, clap::Args)]
pub struct Serve {
    /// Model: a directory in Hugging Face's layout, quantized by `qp quantize` or not, or a GGUF file.
    model: PathBuf,
    /// Address to listen on, or a name of this machine; 0.0.0.0 for all.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS", value_parser = host)]
    host: IpAddr,
    /// Port to listen on; 0 for any that is free.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Name of the model for clients; by default that of its directory or file.
    #[arg(long)]
    name: Option<String>,
    /// Tokens of a prompt with its answer at most. By default the model's, 32768 at most.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Tokens of all sequences together whose keys and values are kept; at least those of one. By default as many as fit
    /// comfortably.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..))]
    cache: Option<u64>,
    /// Bits of a number of keys and values: 8 or 16.
    #[arg(long, default_value_t, value_name = "BITS")]
    cache_bits: Precision,
    /// Sequences computed together.
    #[arg(long, default_value_t = 64, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    sequences: u16,
    /// Requests that may wait; beyond, clients are told to come again later.
    #[arg(long, default_value_t = 256, value_name = "COUNT")]
    queue: u16,
    #[command(flatten)]
    drafting: Drafting,
    /// Tokens of prompts that are read in a step while answers are written: more reads faster and writes less evenly.
    #[arg(long, default_value_t = 512, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,
    /// Connections at once; others wait.
    #[arg(long, default_value_t = 512, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Bytes of a request's body at most.
    #[arg(long, default_value_t = 4 << 20, value_name = "BYTES")]
    body: usize,
    /// Seconds that an answer may take.
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    time: u64,
    /// Seconds that running answers get when the server is asked to stop.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    grace: u64,
    /// Seconds that a client may take to send a request's head, to send its body, or to take what it is sent.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    patience: u64,
    /// File whose first line is the key that clients must send.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Where to run.
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
}

/// Seconds that are as good as for ever: clocks end soon after.
const CENTURY: u64 = 100 * 366 * 24 * 3600;

/// So many seconds.
fn seconds(count: u64) -> Duration {
    Duration::from_secs(count.min(CENTURY))
}

/// The address that a text is, or that it names: of several, one of IPv4.
fn host(text: &str) -> Result<IpAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let found: Vec<IpAddr> = (text, 0).to_socket_addrs().into_iter().flatten().map(|a| a.ip()).collect();
    let first = found.iter().find(|a| a.is_ipv4()).or(found.first()).copied();
    first.ok_or_else(|| "no machine is known by this name: give an address, such as 127.0.0.1".to_owned())
}

/// Bytes of keys and values on a CPU, unless it is said how many.
const CPU_CACHE: u64 = 1 << 30;

impl Serve {
    /// Runs the command until it is interrupted.
    ///
    /// # Errors
    /// If the model cannot be opened, does not fit the device, or the address is in use.
    pub fn run(self) -> Result<(), Error> {
        let key = self.key()?;
        let address = SocketAddr::new(self.host, self.port);
        // Before the model is loaded: an address in use is known at once.
        let socket =
            bound(address).map_err(|e| format!("cannot listen on {address}: {e}; give another --port or --host"))?;
        let address = socket.local_addr()?;
        let (model, executor) = open_model(&self.model, self.device)?;
        let chat = Chat::open(&Files::open(&self.model)?, &model.tokenizer, &model.config.eos)?;
        let Model { config, tokenizer, weights, .. } = model;
        let drafting = self.drafting.open(&tokenizer)?;
        let weights = Arc::new(weights);
        let cached = self.cache.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));
        let context = match self.context {
            Some(context) => context_within(context, config.max_positions)?,
            // A small cache holds short texts.
            None => config
                .max_positions
                .min(32_768)
                .min(cached.map_or(usize::MAX, |c| c.div_ceil(PAGE).saturating_mul(PAGE))),
        };
        let kinds = describe::memory(&weights);
        let cache = self.cache_bits;
        let whole = context.div_ceil(PAGE);
        let most = whole * usize::from(self.sequences);
        let most_room = Room { context, pages: most, cache };
        let needs_of = |weights: &Weights, room: Room| {
            Needs::of(&Layout::new(&weights.program, &Form::of(weights), &[], room.cache), room)
        };
        let needs = needs_of(&weights, most_room);
        let of_draft = drafting.model.as_ref().map(|draft| needs_of(draft, Opened::room(draft, most_room)));
        let fixed = needs.weights + needs.step + of_draft.map_or(0, |n| n.weights + n.step);
        // A draft model has as many pages.
        let page = needs.page + of_draft.map_or(0, |n| n.page);
        let free = match &executor {
            // What is left beside the weights and a step, but for a twentieth.
            Some(on) => on.free_memory()?.map(|(free, _)| (free as u64 / 20 * 19).saturating_sub(fixed)),
            None => Some(memory::available()).filter(|&free| free > 0),
        };
        let page = page.max(1);
        let pages = match cached {
            Some(tokens) if tokens.div_ceil(PAGE) < whole => {
                return Err(format!(
                    "a --cache of {tokens} tokens does not hold one text of --context {context}: give a --cache of {} or \
                     more, or a --context of {} or less",
                    whole * PAGE,
                    tokens.div_ceil(PAGE) * PAGE,
                )
                .into());
            }
            Some(tokens) => tokens.div_ceil(PAGE),
            None => {
                let budget = match &executor {
                    Some(_) => free,
                    None => free.map(|free| (free / 2).min(CPU_CACHE)),
                };
                usize::try_from(budget.unwrap_or(CPU_CACHE) / page).unwrap_or(usize::MAX).clamp(whole, most)
            }
        };
        if executor.is_none() && free.is_some_and(|free| pages as u64 > free / page) || u32::try_from(pages).is_err() {
            let fit = (free.unwrap_or(0) / page).saturating_mul(PAGE as u64);
            return Err(format!(
                "the memory is too small for keys and values of {} tokens: {fit} fit; give a smaller --cache",
                pages.saturating_mul(PAGE)
            )
            .into());
        }
        let room = Room { context, pages, cache };
        let mut engine = SharedWeights::on(executor.as_ref()).open(&weights, room)?;
        if executor.is_some() && self.device != Device::Interpreter {
            output::note("making the kernels of all steps ready: the first start compiles them, later ones do not");
            engine.warm()?;
        }
        let drafts = drafting.drafts(executor.as_ref(), engine.vocab(), room)?;
        let (context, vocab) = (Scheduler::context(engine.as_ref()), engine.vocab());
        let layers = describe::layers(&weights);
        drop(weights);

        let name = match self.name.clone() {
            Some(name) => name,
            None => self.model.canonicalize()?.file_stem().map_or("model".into(), |s| s.to_string_lossy().into_owned()),
        };
        if chat.is_plain() {
            output::note("the model has no chat template: it is given a plain dialogue of 'User:' and 'Assistant:'");
        }
        if key.is_none() && !self.host.is_loopback() {
            output::note("whoever reaches this address can use it: ask for a key by --api-key-file or QP_API_KEY");
        }
        let on = match (&executor, self.device) {
            (None, _) => "CPU",
            (Some(_), Device::Interpreter) => "interpreter",
            (Some(_), _) => "CUDA",
        };
        let cache = page * pages as u64;
        let kinds = kinds.into_iter().chain([("keys and values", cache)]).filter(|(_, bytes)| *bytes > 0);
        let kinds: Vec<_> = kinds.map(|(kind, bytes)| json!({"kind": kind, "bytes": bytes})).collect();
        let description = json!({
            "name": name, "architecture": config.architecture, "device": on, "context": context, "page": PAGE,
            "template": !chat.is_plain(), "needs_key": key.is_some(), "layers": layers, "memory": kinds,
        });
        let stats = Arc::new(Stats::default());
        let limits = Limits { sequences: usize::from(self.sequences), chunk: self.chunk as usize };
        let served = Served {
            name: name.clone(),
            tokenizer: Arc::new(tokenizer),
            chat,
            end: Arc::from(config.eos),
            bos: config.bos,
            context,
            vocab,
            description,
        };
        let places = usize::from(self.queue) + usize::from(self.sequences);
        let patience = seconds(self.patience);
        let bounds = Bounds {
            body: self.body,
            body_time: patience,
            answer_time: seconds(self.time),
            key,
            local: self.host.is_loopback(),
        };
        let app = App::new(served, Worker::start(engine, drafts, limits, stats.clone())?, stats, places, bounds);
        let bounds = Connections { most: usize::from(self.connections), head: patience, write: patience };
        let ready = || {
            output::say(&format!(
                "serving {name} on http://{address} ({on}; context {context} tokens; room for {} tokens, {})\n",
                pages * PAGE,
                HumanBytes(cache),
            ));
        };
        serve::run(app, socket, bounds, seconds(self.grace), ready, interrupted())?;
        Ok(())
    }

    /// The hash of the key that clients must send.
    fn key(&self) -> Result<Option<[u8; 32]>, Error> {
        let text = match &self.api_key_file {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
                text.lines().next().unwrap_or_default().trim().to_owned()
            }
            None => match std::env::var("QP_API_KEY") {
                Ok(key) => key,
                Err(_) => return Ok(None),
            },
        };
        if text.trim().is_empty() {
            return Err("the API key is empty: put one into the file or the variable, or give none".into());
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(
                "the API key has characters that no client can send: use ASCII letters, digits and signs".into()
            );
        }
        Ok(Some(key_hash(&text)))
    }
}

/// A socket of this address, which does not listen yet.
fn bound(address: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A server that ended a moment ago does not keep the address.
    socket.set_reuseaddr(cfg!(unix))?;
    socket.bind(address)?;
    Ok(socket)
}

/// Waits for Ctrl-C or SIGTERM; a second one ends the program at once.
async fn interrupted() {
    signal().await;
    output::say("stopping: running answers may end; once more to stop at once\n");
    tokio::spawn(async {
        signal().await;
        std::process::exit(130);
    });
}

async fn signal() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        tokio::select! {
            _ = interrupt => (),
            _ = terminate.recv() => (),
        }
        return;
    }
    let _ = interrupt.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_addresses_or_names() {
        assert_eq!(host("::1"), Ok("::1".parse().unwrap()));
        assert!(host("localhost").is_ok_and(|a| a.is_loopback()));
        assert!(host("no such name").unwrap_err().contains("such as 127.0.0.1"));
    }
}
