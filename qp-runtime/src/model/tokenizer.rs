//! Text to tokens, and tokens to text as they come.
//!
//! `tokenizer.json` says almost everything. As in transformers, tokens that only `tokenizer_config.json` (or, where that
//! lists none, `added_tokens.json` and `special_tokens_map.json`) know are added to it.

use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use super::config::Config;
use super::files::Files;
use super::keys::Keys;
use super::{Error, keys};

/// Keys that name one token.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Names of special tokens that end a text or a turn, whatever the configuration says.
const ENDS: [&str; 16] = [
    "</s>",
    "<eos>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|call|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|im_end|>",
    "<|return|>",
    "<turn|>",
    "[EOS]",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// The tokenizer of a model.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokens that end a text by the tokenizer's files or by their names.
    ends: Vec<u32>,
    /// What the tokenizer's files say that is not followed.
    notes: Vec<String>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory or GGUF file.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing, or a file is malformed or contradicts it.
    pub fn read(model: &Path) -> Result<Self, Error> {
        Tokenizer::of(&Files::open(model)?)
    }

    /// As [`Tokenizer::read`], of a model that is open.
    ///
    /// # Errors
    /// As [`Tokenizer::read`].
    pub fn of(files: &Files) -> Result<Self, Error> {
        let path = files.path("tokenizer.json");
        let Some(bytes) = files.read("tokenizer.json")? else {
            return Err(Error::file(&path, "not found: save the model's tokenizer in this (fast tokenizers') format"));
        };
        let wrong = |e: tokenizers::Error| {
            Error::file(&path, format!("{e}: it is damaged, or of a kind that is not read; get it again"))
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(wrong)?;
        // Some files ask for truncation or padding, which is meant for training.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(wrong)?;
        let mut tokenizer = Tokenizer { inner, ends: Vec::new(), notes: Vec::new() };
        tokenizer.extend(files)?;
        // What cannot tokenize a line is found now, and not after hours of quantizing.
        tokenizer.inner.encode_fast("A line of text, 1.\n", true).map_err(wrong)?;
        Ok(tokenizer)
    }

    /// Adds the tokens that only other files know.
    fn extend(&mut self, files: &Files) -> Result<(), Error> {
        let read = |name: &str| {
            let text = files.text(name)?;
            text.map(|text| Keys::parse(&files.path(name), &text)).transpose()
        };
        let config = read("tokenizer_config.json")?;
        let mut named = Vec::new();
        let listed = config.as_ref().map_or(Ok(None), |c| c.object("added_tokens_decoder"))?;
        if let Some(listed) = &listed {
            let mut tokens = Vec::new();
            for (id, token) in listed.unasked() {
                let wrong = || Error::file(listed.path(), format!("added_tokens_decoder has the token number '{id}'"));
                tokens.push((id.parse::<u32>().map_err(|_| wrong())?, added(listed, "added_tokens_decoder", token)?));
            }
            tokens.sort_by_key(|(id, _)| *id);
            self.add(listed.path(), tokens.into_iter().map(|(id, token)| (Some(id), token)))?;
        } else {
            if let Some(added) = read("added_tokens.json")? {
                let mut tokens = Vec::new();
                for (token, _) in added.unasked() {
                    let id = added.whole(token)?.and_then(|id| u32::try_from(id).ok());
                    tokens.push((id, AddedToken::from(token, false)));
                }
                tokens.sort_by_key(|(id, _)| *id);
                self.add(added.path(), tokens)?;
            }
            named.extend(read("special_tokens_map.json")?);
        }
        named.extend(config);
        for keys in &named {
            let mut tokens = Vec::new();
            for key in NAMED {
                if let Some(token) = keys.get(key) {
                    tokens.push((None, AddedToken { special: true, ..added(keys, key, token)? }));
                }
            }
            for key in ["additional_special_tokens", "extra_special_tokens"] {
                let several: Vec<&Value> = match keys.get(key) {
                    Some(Value::Array(tokens)) => tokens.iter().collect(),
                    Some(Value::Object(tokens)) => tokens.values().collect(),
                    _ => Vec::new(),
                };
                for token in several {
                    tokens.push((None, AddedToken { special: true, ..added(keys, key, token)? }));
                }
            }
            self.add(keys.path(), tokens)?;
            if let Some(end) = keys.get("eos_token") {
                self.ends.extend(self.inner.token_to_id(&added(keys, "eos_token", end)?.content));
            }
            self.compare_first(keys)?;
        }
        let added = self.inner.get_added_tokens_decoder();
        let mut known: Vec<(u32, &str)> =
            added.iter().filter(|(_, t)| t.special).map(|(id, t)| (*id, t.content.as_str())).collect();
        known.sort_unstable();
        let has = |name: &str| known.iter().any(|(_, n)| *n == name);
        // Where a text ends with <|return|> or <|call|>, <|end|> only parts its messages.
        let messages = has("<|return|>") && has("<|call|>");
        let ends = known.iter().filter(|(_, n)| ENDS.contains(n) && !(messages && *n == "<|end|>"));
        self.ends.extend(ends.map(|(id, _)| *id));
        Ok(())
    }

    /// Adds those of `tokens` that are not known as such; the file at `path` may say which number each has.
    fn add(&mut self, path: &Path, tokens: impl IntoIterator<Item = (Option<u32>, AddedToken)>) -> Result<(), Error> {
        for (id, token) in tokens {
            let content = token.content.clone();
            if content.is_empty() {
                continue;
            }
            self.inner.add_tokens(&[token]);
            let found = self.inner.token_to_id(&content);
            if let (Some(id), Some(found)) = (id, found)
                && id != found
            {
                let what = format!("token '{content}' is number {id}, but by tokenizer.json it is number {found}");
                return Err(Error::file(path, what));
            }
        }
        Ok(())
    }

    /// `add_bos_token` counts only for tokenizers without `tokenizer.json`: says if it says another thing.
    fn compare_first(&mut self, keys: &Keys) -> Result<(), Error> {
        let (Some(wanted), Some(bos)) = (keys.truth("add_bos_token")?, keys.get("bos_token")) else { return Ok(()) };
        let bos = self.inner.token_to_id(&added(keys, "bos_token", bos)?.content);
        let begins = self.encode("")?.first().copied();
        if (begins.is_some() && begins == bos) != wanted {
            let does = if wanted { "puts none" } else { "puts one" };
            self.notes.push(format!(
                "{} says add_bos_token {wanted}, but tokenizer.json {does} before a text and is followed",
                keys.path().display()
            ));
        }
        Ok(())
    }

    /// Completes what `config` says of tokens: the ends of a text that the tokenizer knows are added, and ids that the
    /// model does not have are taken out. Returns what is to be said to the user.
    pub fn settle(&self, config: &mut Config) -> Vec<String> {
        let mut notes = self.notes.clone();
        for &end in &self.ends {
            if !config.eos.contains(&end) {
                config.eos.push(end);
            }
        }
        let vocab = config.vocab;
        let mut unknown: Vec<u32> = config.eos.iter().copied().filter(|&id| id as usize >= vocab).collect();
        config.eos.retain(|&id| (id as usize) < vocab);
        if let Some(bos) = config.bos.filter(|&id| id as usize >= vocab) {
            config.bos = None;
            unknown.push(bos);
        }
        // Tokens that a text can have: texts with these are refused when they come.
        unknown.extend(self.inner.get_vocab(true).into_values().filter(|&id| id as usize >= vocab));
        unknown.sort_unstable();
        unknown.dedup();
        if let [first, ..] = unknown.as_slice() {
            let name = self.inner.id_to_token(*first).map_or(String::new(), |name| format!(" ('{name}')"));
            notes.push(format!(
                "{} tokens are beyond the model's vocab_size {vocab} and cannot be used, the first is {first}{name}",
                unknown.len()
            ));
        }
        notes
    }

    /// Tokens of `text`, with the special tokens that the tokenizer itself adds (such as a first one).
    ///
    /// # Errors
    /// If the tokenizer has no tokens for some part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, true).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `tokens`, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, Error> {
        self.inner.decode(tokens, true).map_err(|e| Error::Tokenizer(e.to_string()))
    }

    /// Decodes the tokens that follow `prompt` one by one.
    pub fn stream(&self, prompt: &[u32]) -> TextStream<'_> {
        // A few tokens of context settle whether a leading space is part of the text.
        let context = &prompt[prompt.len().saturating_sub(6)..];
        TextStream { tokenizer: self, tokens: context.to_vec(), done: context.len() }
    }
}

/// A token of the file of `keys`: its text, or an object with a text and how it is found.
fn added(keys: &Keys, key: &str, value: &Value) -> Result<AddedToken, Error> {
    let content = match value {
        Value::String(text) => Some(text.as_str()),
        other => other.get("content").and_then(Value::as_str),
    };
    let Some(content) = content else {
        let what =
            format!("{key} has the token {}: expected a text, or an object with its content", keys::shown(value));
        return Err(Error::file(keys.path(), what));
    };
    let truth = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = truth("special").unwrap_or(false);
    Ok(AddedToken::from(content, special)
        .single_word(truth("single_word").unwrap_or(false))
        .lstrip(truth("lstrip").unwrap_or(false))
        .rstrip(truth("rstrip").unwrap_or(false))
        .normalized(truth("normalized").unwrap_or(!special)))
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
