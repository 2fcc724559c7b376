//! The messages of one conversation, kept within a context.

use serde_json::{Value, json};

use super::{Chat, Error, Options};
use crate::model::Tokenizer;

/// A conversation: system message, then exchanges.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// What the model is told before everything else.
    pub system: Option<String>,
    messages: Vec<Value>,
}

/// A prompt that fits, and what had to go for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitted {
    /// Tokens of the prompt.
    pub tokens: Vec<u32>,
    /// Oldest messages that were dropped from the conversation.
    pub dropped: usize,
}

impl Conversation {
    /// A conversation that has not begun.
    pub fn new(system: Option<String>) -> Self {
        Conversation { system, messages: Vec::new() }
    }

    /// All messages, the system's first.
    pub fn messages(&self) -> Vec<Value> {
        let system = self.system.iter().map(|s| json!({"role": "system", "content": s}));
        system.chain(self.messages.iter().cloned()).collect()
    }

    /// Appends what the user says.
    pub fn ask(&mut self, text: &str) {
        self.messages.push(json!({"role": "user", "content": text}));
    }

    /// Appends what the model answered.
    pub fn answer(&mut self, text: &str) {
        self.messages.push(json!({"role": "assistant", "content": text}));
    }

    /// Takes back the last question, which could not be answered.
    pub fn take_back(&mut self) {
        self.messages.pop();
    }

    /// Takes back the last answer, so that its question is open again; false if there is none.
    pub fn reopen(&mut self) -> bool {
        let answered = self.messages.last().is_some_and(|m| m["role"] == "assistant");
        if answered {
            self.messages.pop();
        }
        answered
    }

    /// Forgets everything but the system message.
    pub fn reset(&mut self) {
        self.messages.clear();
    }

    /// The prompt for the next answer. Where it has more than `most` tokens, the oldest exchanges are dropped, so that
    /// the system message and the last question always stay; `None` if these alone are too long.
    ///
    /// # Errors
    /// If the template or the tokenizer fails.
    pub fn prompt(&mut self, chat: &Chat, tokenizer: &Tokenizer, most: usize) -> Result<Option<Fitted>, Error> {
        let mut dropped = 0;
        loop {
            let (_, tokens) = chat.prompt(tokenizer, &self.messages(), &Options::default())?;
            if tokens.len() <= most {
                return Ok(Some(Fitted { tokens, dropped }));
            }
            if self.messages.len() < 3 {
                return Ok(None);
            }
            // A question and its answer.
            self.messages.drain(..2);
            dropped += 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::Files;

    #[test]
    fn the_oldest_exchanges_make_room() {
        let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv-llama"));
        let tokenizer = Tokenizer::read(model).unwrap();
        let chat = Chat::open(&Files::open(model).unwrap(), &tokenizer, &[]).unwrap();
        let mut c = Conversation::new(Some("In the beginning".to_owned()));
        for i in 0..10 {
            c.ask(&format!("question {i}"));
            c.answer(&format!("answer {i}"));
        }
        c.ask("the last");
        let whole = c.clone().prompt(&chat, &tokenizer, 10_000).unwrap().unwrap();
        assert_eq!(whole.dropped, 0);
        let most = whole.tokens.len() / 2;
        let part = c.prompt(&chat, &tokenizer, most).unwrap().unwrap();
        assert!(part.tokens.len() <= most && part.dropped >= 8 && part.dropped.is_multiple_of(2), "{part:?}");
        let messages = c.messages();
        assert_eq!(messages[0]["role"], "system");
        assert_eq!(messages[1]["role"], "user");
        assert_eq!(messages.last().unwrap()["content"], "the last");
        assert_eq!(c.prompt(&chat, &tokenizer, 3).unwrap(), None);
        assert!(!c.reopen());
        c.answer("an answer");
        assert!(c.reopen() && c.messages().last().unwrap()["content"] == "the last");
        c.take_back();
        c.reset();
        assert_eq!(c.messages().len(), 1);
    }
}
