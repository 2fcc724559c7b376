//! An answer as its reader sees it: text instead of tokens, up to the first text that ends it.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::choose::LogProbs;
use super::scheduler::{Event, Reason, Sink};
use super::stats::Stats;
use crate::chat::StopTexts;
use crate::model::{TextStream, Tokenizer};

/// Why an answer ended, as OpenAI names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The text came to its end, or to one of the texts that end it.
    Stop,
    /// There are as many tokens as were asked for.
    Length,
}

impl Finish {
    /// The word in `finish_reason`.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

/// Why an answer could not be finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The engine could not compute it.
    #[error("{0}")]
    Failed(String),
    /// The form that was asked for cannot be kept.
    #[error("response_format: the form is too complex to go on: {0}")]
    Form(String),
    /// The server is stopping.
    #[error("the server is stopping: ask again later")]
    Stopped,
    /// The engine's thread has ended.
    #[error("the engine has ended: the server must be started again")]
    Dead,
}

/// A token with its probabilities, if they were asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The token.
    pub token: u32,
    /// Its probabilities.
    pub logprobs: Option<Box<LogProbs>>,
}

/// What came since the last time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// Text that is certain now.
    pub text: String,
    /// Tokens that came, those included whose text is not certain yet.
    pub pieces: Vec<Piece>,
}

/// The receiving end of a request. Dropping it gives the request up.
pub struct Answer {
    events: UnboundedReceiver<Event>,
    text: Option<TextStream<Arc<Tokenizer>>>,
    stop: StopTexts,
    finish: Option<Finish>,
    /// Tokens generated.
    pub tokens: usize,
    /// Tokens of the prompt that were in the cache.
    pub cached: usize,
    /// Guesses that were right, and that were wrong.
    pub guesses: (usize, usize),
    stats: Arc<Stats>,
    asked: Instant,
    last: Option<Instant>,
    /// The place in the queue.
    _place: OwnedSemaphorePermit,
}

struct Channel(UnboundedSender<Event>);

impl Sink for Channel {
    fn send(&mut self, event: Event) {
        // Nobody may listen any more; `is_closed` says so.
        let _ = self.0.send(event);
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

impl Answer {
    /// An answer to `prompt` and the sink that its events go to.
    pub fn new(
        tokenizer: &Arc<Tokenizer>,
        prompt: &[u32],
        stop: Vec<String>,
        stats: &Arc<Stats>,
        place: OwnedSemaphorePermit,
    ) -> (Answer, Box<dyn Sink>) {
        let (sender, events) = unbounded_channel();
        stats.requests.add(1);
        let answer = Answer {
            events,
            text: Some(TextStream::new(tokenizer.clone(), prompt)),
            stop: StopTexts::new(stop),
            finish: None,
            tokens: 0,
            cached: 0,
            guesses: (0, 0),
            stats: stats.clone(),
            asked: Instant::now(),
            last: None,
            _place: place,
        };
        (answer, Box::new(Channel(sender)))
    }

    /// Why the answer ended, once [`Answer::next`] gave nothing more.
    pub fn finish(&self) -> Finish {
        self.finish.unwrap_or(Finish::Stop)
    }

    /// Waits for more of the answer; `None` at its end.
    ///
    /// # Errors
    /// If the answer cannot be finished.
    pub async fn next(&mut self) -> Result<Option<Delta>, Broken> {
        if self.finish.is_some() {
            return Ok(None);
        }
        let mut delta = Delta::default();
        let mut event = self.events.recv().await.ok_or(Broken::Dead)?;
        loop {
            self.take(event, &mut delta)?;
            if self.finish.is_some() {
                self.stats.completed.add(1);
                self.stats.whole.add(self.asked.elapsed());
                return Ok(Some(delta));
            }
            // What is there already comes together.
            match self.events.try_recv() {
                Ok(next) => event = next,
                Err(_) if delta.text.is_empty() && delta.pieces.is_empty() => {
                    event = self.events.recv().await.ok_or(Broken::Dead)?;
                }
                Err(_) => return Ok(Some(delta)),
            }
        }
    }

    fn take(&mut self, event: Event, delta: &mut Delta) -> Result<(), Broken> {
        match event {
            Event::Started { cached } => self.cached = cached,
            Event::Guessed { right, wrong } => self.guesses = (self.guesses.0 + right, self.guesses.1 + wrong),
            Event::Token { token, logprobs } => {
                let now = Instant::now();
                match self.last.replace(now) {
                    None => self.stats.first_token.add(now - self.asked),
                    Some(last) => self.stats.between_tokens.add(now - last),
                }
                self.tokens += 1;
                delta.pieces.push(Piece { token, logprobs });
                if let Some(stream) = &mut self.text {
                    let text = stream.push(token).map_err(|e| Broken::Failed(e.to_string()))?;
                    let (text, ended) = self.stop.push(&text);
                    delta.text.push_str(&text);
                    if ended {
                        self.finish = Some(Finish::Stop);
                        self.events.close();
                    }
                }
            }
            Event::Done(reason) => {
                let finish = match reason {
                    Reason::End => Finish::Stop,
                    Reason::Count => Finish::Length,
                    Reason::Failed(text) => return Err(Broken::Failed(text)),
                    Reason::Form(what) => return Err(Broken::Form(what)),
                    Reason::Stopped => return Err(Broken::Stopped),
                };
                let rest = self.text.take().map(TextStream::finish).transpose();
                let rest = rest.map_err(|e| Broken::Failed(e.to_string()))?.unwrap_or_default();
                let (text, ended) = self.stop.push(&rest);
                delta.text.push_str(&text);
                if !ended {
                    delta.text.push_str(&self.stop.rest());
                }
                self.finish = Some(if ended { Finish::Stop } else { finish });
            }
        }
        Ok(())
    }
}
