//! Text to tokens, and tokens to text as they come.
//!
//! `tokenizer.json` says almost everything. As in transformers, tokens that only `tokenizer_config.json` (or, where that
//! lists none, `added_tokens.json` and `special_tokens_map.json`) know are added to it.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::normalizers::Precompiled;

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

/// Whether a `tokenizer.json` is JSON, and its normalizers of precompiled characters are whole: `tokenizers` takes both for granted
/// and panics where they are not.
fn sound(bytes: &[u8]) -> serde_json::Result<()> {
    #[derive(serde::Deserialize)]
    struct Parts {
        normalizer: Option<Value>,
        #[serde(rename = "decoder")]
        _decoder: Option<Value>,
    }
    fn precompiled(part: &Value) -> serde_json::Result<()> {
        match part {
            Value::Object(fields) => {
                if fields.get("type").is_some_and(|t| t == "Precompiled") {
                    // From text, as `tokenizers` does: it borrows from it.
                    serde_json::from_str::<Precompiled>(&serde_json::to_string(part)?)?;
                }
                fields.values().try_for_each(precompiled)
            }
            Value::Array(parts) => parts.iter().try_for_each(precompiled),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Ok(()),
        }
    }
    let parts: Parts = serde_json::from_slice(bytes)?;
    parts.normalizer.as_ref().map_or(Ok(()), precompiled)
}

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
        sound(&bytes).map_err(|e| wrong(e.into()))?;
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

    /// Tokens of a prompt that has its special tokens written out: the tokenizer adds none.
    ///
    /// # Errors
    /// If the tokenizer has no tokens for some part of the text.
    pub fn encode_exact(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The number of the token that is written `text`, a special one for instance.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// All tokens with their numbers.
    pub fn tokens(&self) -> impl Iterator<Item = (String, u32)> {
        self.inner.get_vocab(true).into_iter()
    }

    /// Tokens that are found in a text before it is split.
    pub fn added_tokens(&self) -> impl Iterator<Item = (u32, AddedToken)> {
        self.inner.get_added_tokens_decoder().into_iter()
    }

    /// True if the token marks something and is no text.
    pub fn is_special(&self, token: u32) -> bool {
        self.inner.get_added_tokens_decoder().get(&token).is_some_and(|t| t.special)
    }

    /// Checks that the numbers that both tokenizers know stand for the same tokens, so that what one model says can be read
    /// by the other.
    ///
    /// # Errors
    /// What the first number with different tokens stands for, if there is one.
    pub fn same_tokens(&self, other: &Tokenizer) -> Result<(), String> {
        let differs = |(token, id): (String, u32)| {
            let own = self.inner.id_to_token(id).filter(|own| *own != token)?;
            Some((id, own, token))
        };
        match other.inner.get_vocab(true).into_iter().filter_map(differs).min() {
            None => Ok(()),
            Some((id, own, token)) => Err(format!("token {id} is {token:?} in it, and {own:?} in the model")),
        }
    }

    /// One more than the largest number of a token.
    pub fn size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// The bytes that each token stands for, by its number; a special token's are its name after the byte 255, which no
    /// text has. Numbers without a token have none.
    pub fn all_bytes(&self) -> Vec<Vec<u8>> {
        let decoder = self.inner.get_decoder().and_then(|d| serde_json::to_string(d).ok()).unwrap_or_default();
        let level = decoder.contains("\"ByteLevel\"").then(byte_level);
        let special = self.inner.get_added_tokens_decoder();
        let mut all = vec![Vec::new(); self.size()];
        for (token, id) in self.inner.get_vocab(true) {
            all[id as usize] = match (special.get(&id), &level) {
                (Some(added), _) if added.special => [b"\xff", token.as_bytes()].concat(),
                (Some(_), _) => token.into_bytes(),
                (None, Some(level)) => {
                    let bytes: Option<Vec<u8>> = token.chars().map(|c| level.get(&c).copied()).collect();
                    bytes.unwrap_or_else(|| token.into_bytes())
                }
                (None, None) => match token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')) {
                    Some(hex) if hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok() => {
                        u8::from_str_radix(hex, 16).map(|b| vec![b]).unwrap_or_default()
                    }
                    _ => token.replace('\u{2581}', " ").into_bytes(),
                },
            };
        }
        all
    }

    /// Text of `tokens`, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, Error> {
        self.inner.decode(tokens, true).map_err(|e| Error::Tokenizer(e.to_string()))
    }

    /// Decodes the tokens that follow `prompt` one by one.
    pub fn stream(&self, prompt: &[u32]) -> TextStream<&Tokenizer> {
        TextStream::new(self, prompt)
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

/// The byte that each character of a byte-level token stands for: printable Latin-1 characters stand for themselves,
/// the other bytes for the characters from U+0100 on, in their order.
fn byte_level() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut map = HashMap::new();
    for byte in 0..=u8::MAX {
        let c = if printable(byte) {
            Some(char::from(byte))
        } else {
            next += 1;
            char::from_u32(next - 1)
        };
        map.extend(c.map(|c| (c, byte)));
    }
    map
}

/// Text of tokens as they come. A character whose bytes lie in several tokens comes with the last of them.
///
/// All texts joined are what [`Tokenizer::decode`] makes of all tokens, unless more than [`PENDING`] tokens in a row
/// leave a character open, which no text does.
#[derive(Debug)]
pub struct TextStream<T> {
    tokenizer: T,
    /// Context, then tokens whose text has not come out whole.
    tokens: Vec<u32>,
    /// Length of the context.
    done: usize,
    /// Bytes of the tokens' text after the context that came out already.
    given: usize,
}

/// Tokens that may wait for the end of a character.
const PENDING: usize = 16;

impl<T: Borrow<Tokenizer>> TextStream<T> {
    /// Decodes the tokens that follow `prompt`.
    pub fn new(tokenizer: T, prompt: &[u32]) -> Self {
        // A few tokens of context settle whether a leading space is part of the text.
        let context = &prompt[prompt.len().saturating_sub(6)..];
        TextStream { tokenizer, tokens: context.to_vec(), done: context.len(), given: 0 }
    }

    /// Adds a token; the text that is now certain, which may be empty.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String, Error> {
        self.tokens.push(token);
        let text = self.pending()?;
        // An incomplete character at the end is one U+FFFD.
        let open = text.ends_with(char::REPLACEMENT_CHARACTER) && self.tokens.len() - self.done < PENDING;
        if open || text.is_empty() {
            let certain = text.len() - if open { char::REPLACEMENT_CHARACTER.len_utf8() } else { 0 };
            let new = text.get(self.given..certain).unwrap_or_default().to_owned();
            self.given += new.len();
            return Ok(new);
        }
        let new = text.get(self.given..).unwrap_or_default().to_owned();
        self.tokens.drain(..self.done);
        self.done = self.tokens.len();
        self.given = 0;
        Ok(new)
    }

    /// The text of what is left, incomplete characters as U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(self) -> Result<String, Error> {
        Ok(self.pending()?.get(self.given..).unwrap_or_default().to_owned())
    }

    /// The text after the context's.
    fn pending(&self) -> Result<String, Error> {
        let tokenizer = self.tokenizer.borrow();
        let before = tokenizer.decode(&self.tokens[..self.done])?;
        let all = tokenizer.decode(&self.tokens)?;
        // Usually `before` is a prefix of `all`; a decoder that tidies up spaces may still change its end.
        let same = before.chars().zip(all.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        Ok(all[same..].to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bundled model's byte-level tokenizer.
    fn bundled() -> Tokenizer {
        Tokenizer::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv-llama"))).unwrap()
    }

    fn streamed(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32]) -> (Vec<String>, String) {
        let mut stream = tokenizer.stream(prompt);
        let mut texts: Vec<String> = tokens.iter().map(|&t| stream.push(t).unwrap()).collect();
        texts.push(stream.finish().unwrap());
        let all = texts.concat();
        (texts, all)
    }

    #[test]
    fn files_that_tokenizers_would_panic_at_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let model = r#""model":{"type":"BPE","vocab":{"a":0},"merges":[]}"#;
        for (rest, words) in [
            (r#""decoder":{"type":"ByteLevel","trim"#, "EOF while parsing a string"),
            (r#""decoder":{"type":"ByteLevel" "a":1}}"#, "expected `,` or `}`"),
            (r#""decoder":{"type":"Fuse","a":1e999}}"#, "number out of range"),
            (r#""normalizer":{"type":"Precompiled","precompiled_charsmap":3}}"#, "tokenizer.json"),
            (r#""normalizer":{"type":"Sequence","normalizers":[{"type":"Precompiled"}]}}"#, "precompiled_charsmap"),
        ] {
            std::fs::write(dir.path().join("tokenizer.json"), format!("{{{model},{rest}")).unwrap();
            let e = Tokenizer::read(dir.path()).unwrap_err().to_string();
            assert!(e.contains(words) && e.contains("it is damaged"), "{e}");
        }
    }

    #[test]
    fn a_stream_joins_to_the_whole_text() {
        let tokenizer = bundled();
        // The tokenizer has one token a byte for what its training text has not.
        for text in ["And it came to pass", "naïve café 😀😀 日本語 end", "\u{fffd}\u{fffd}a", "😀"] {
            let tokens = tokenizer.encode_exact(text).unwrap();
            let (texts, all) = streamed(&tokenizer, &[], &tokens);
            assert_eq!(all, text);
            let early = texts.iter().filter(|t| t.contains(char::REPLACEMENT_CHARACTER)).count();
            assert!(early == 0 || text.contains(char::REPLACEMENT_CHARACTER), "{texts:?}");
        }
        // Random tokens: bytes that are no UTF-8 among them, mixed with whole words.
        let mut state = 1u64;
        let mut next = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for _ in 0..300 {
            let tokens: Vec<u32> = (0..12).map(|_| if next(2) == 0 { next(300) } else { next(2048) } as u32).collect();
            let (prompt, tokens) = tokens.split_at(2);
            let (_, all) = streamed(&tokenizer, &[], tokens);
            assert_eq!(all, tokenizer.decode(tokens).unwrap(), "{tokens:?}");
            streamed(&tokenizer, prompt, tokens);
        }
    }

    #[test]
    fn bytes_of_tokens_join_to_the_text() {
        let tokenizer = bundled();
        let all = tokenizer.all_bytes();
        assert_eq!(all.len(), 2048);
        let text = "And God said, naïve 😀\n\tx";
        let bytes: Vec<u8> =
            tokenizer.encode_exact(text).unwrap().iter().flat_map(|&t| all[t as usize].clone()).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
        assert_eq!((all[0].as_slice(), tokenizer.is_special(0)), (&b"\xff<|begin|>"[..], true));
    }

    #[test]
    fn text_before_an_open_character_comes_at_once_and_nothing_waits_for_ever() {
        let tokenizer = bundled();
        let open = tokenizer.encode_exact("😀").unwrap()[0];
        let mut stream = tokenizer.stream(&[]);
        let texts: Vec<String> = (0..40).map(|_| stream.push(open).unwrap()).collect();
        assert!(texts[1..].iter().any(|t| !t.is_empty()), "{texts:?}");
        assert!(stream.tokens.len() <= 2 * PENDING);
    }
}
