//! Text to tokens, and tokens to text as they come.

use std::path::Path;

use super::Error;
use super::files::Files;

/// The tokenizer of a model.
#[derive(Clone, Debug)]
pub struct Tokenizer(tokenizers::Tokenizer);

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory or GGUF file.
    ///
    /// # Errors
    /// If it is missing or malformed.
    pub fn read(model: &Path) -> Result<Self, Error> {
        let files = Files::open(model)?;
        let path = files.path("tokenizer.json");
        let bytes = files.read("tokenizer.json")?.ok_or_else(|| {
            Error::file(&path, "not found: save the model's tokenizer in this (fast tokenizers') format")
        })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::file(&path, e.to_string()))?;
        // Some files ask for truncation or padding, which is meant for training.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(&path, e.to_string()))?;
        Ok(Tokenizer(inner))
    }

    /// Tokens of `text`, with the special tokens that the tokenizer itself adds (such as a first one).
    ///
    /// # Errors
    /// If the tokenizer has no tokens for some part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.0.encode_fast(text, true).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `tokens`, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, Error> {
        self.0.decode(tokens, true).map_err(|e| Error::Tokenizer(e.to_string()))
    }

    /// Decodes the tokens that follow `prompt` one by one.
    pub fn stream(&self, prompt: &[u32]) -> TextStream<'_> {
        // A few tokens of context settle whether a leading space is part of the text.
        let context = &prompt[prompt.len().saturating_sub(6)..];
        TextStream { tokenizer: self, tokens: context.to_vec(), done: context.len() }
    }
}

/// Text of tokens as they come. A character whose bytes lie in several tokens comes with the last of them.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Context, then tokens whose text has not come out yet.
    tokens: Vec<u32>,
    /// Length of the context.
    done: usize,
}

impl TextStream<'_> {
    /// Adds a token; the text that is now certain, which may be empty.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String, Error> {
        self.tokens.push(token);
        let text = self.pending()?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.tokens.drain(..self.done);
        self.done = self.tokens.len();
        Ok(text)
    }

    /// The text of what is left, incomplete characters as U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(self) -> Result<String, Error> {
        self.pending()
    }

    fn pending(&self) -> Result<String, Error> {
        let before = self.tokenizer.decode(&self.tokens[..self.done])?;
        let all = self.tokenizer.decode(&self.tokens)?;
        // Usually `before` is a prefix of `all`; a decoder that tidies up spaces may still change its end.
        let same = before.chars().zip(all.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        Ok(all[same..].to_owned())
    }
}
