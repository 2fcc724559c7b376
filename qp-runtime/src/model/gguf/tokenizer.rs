//! `tokenizer.json` and `tokenizer_config.json` of a GGUF file.
//!
//! Byte-level BPE (`gpt2`) is split by a pattern that the file names only; which name has which pattern is llama.cpp's
//! table. SentencePiece's BPE (`llama`) has scores in place of merges: of two neighbours, those are merged first whose
//! union has the highest score.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::Gguf;
use super::container::Value;
use crate::model::Error;

/// How a text is split before its bytes are merged, and what goes with it.
struct Split {
    /// Values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// True if a whole word that is a token is taken as it is.
    whole_words: bool,
    /// True if a text begins with the first token, unless the file says otherwise.
    first: bool,
    /// True if characters are composed first.
    composed: bool,
}

#[derive(Clone, Copy)]
enum Step {
    /// Pieces that match a pattern stand alone, and so does what lies between them.
    Pattern(&'static str),
    /// Every digit stands alone.
    Digits,
    /// GPT-2's pattern.
    Gpt2,
}

/// What Llama 3, Qwen 2 and others have in common but for digits: contractions, words, punctuation, lines, spaces.
macro_rules! words {
    ($letters:literal, $digits:literal) => {
        concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?",
            $letters,
            "+|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}

/// Words that keep capitals and the small letters after them together, with `$end` after each.
macro_rules! cased_words {
    ($end:literal, $digits:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $end,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $end,
            "|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}

const PLAIN: Split = Split { names: &[], steps: &[], whole_words: false, first: false, composed: false };
const THREE_DIGITS: Step = Step::Pattern(words!(r"\p{L}", r"\p{N}{1,3}"));
const ONE_DIGIT: Step = Step::Pattern(words!(r"\p{L}", r"\p{N}"));

const SPLITS: [Split; 12] = [
    Split {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4"],
        steps: &[Step::Gpt2],
        ..PLAIN
    },
    Split {
        names: &["smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b", "mellum2"],
        steps: &[Step::Digits, Step::Gpt2],
        ..PLAIN
    },
    Split {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        steps: &[THREE_DIGITS],
        whole_words: true,
        first: true,
        ..PLAIN
    },
    Split { names: &["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"], steps: &[THREE_DIGITS], ..PLAIN },
    Split { names: &["qwen2"], steps: &[ONE_DIGIT], composed: true, ..PLAIN },
    // Signs and the lines behind them part.
    Split {
        names: &["seed-coder"],
        steps: &[Step::Pattern(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
        ))],
        ..PLAIN
    },
    Split {
        names: &["deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "grok-2", "solar-open", "kormo"],
        steps: &[ONE_DIGIT],
        ..PLAIN
    },
    Split {
        names: &["qwen35"],
        steps: &[Step::Pattern(concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ))],
        composed: true,
        ..PLAIN
    },
    Split {
        names: &["tekken"],
        steps: &[Step::Pattern(cased_words!("", r"\p{N}"))],
        whole_words: true,
        first: true,
        ..PLAIN
    },
    Split {
        names: &["gpt-4o", "llama4", "kanana2", "minimax-m2"],
        steps: &[Step::Pattern(cased_words!("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"))],
        ..PLAIN
    },
    Split {
        names: &["deepseek-coder"],
        steps: &[
            Step::Pattern(r"[\r\n]"),
            Step::Pattern(r"\s?\p{L}+"),
            Step::Pattern(r"\s?\p{P}+"),
            Step::Pattern("[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+"),
            Step::Digits,
        ],
        ..PLAIN
    },
    Split {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        steps: &[
            Step::Pattern(r"\p{N}{1,3}"),
            Step::Pattern("[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"),
            Step::Pattern(concat!(
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
                r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )),
        ],
        ..PLAIN
    },
];

impl Split {
    /// The pre-tokenizers of `tokenizer.json` that do the same.
    fn pre_tokenizers(&self) -> Vec<Json> {
        let level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let one = |step: &Step| match step {
            Step::Pattern(pattern) => {
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
            }
            Step::Digits => json!({"type": "Digits", "individual_digits": true}),
            Step::Gpt2 => level(true),
        };
        let mut steps: Vec<Json> = self.steps.iter().map(one).collect();
        if !self.steps.iter().any(|s| matches!(s, Step::Gpt2)) {
            steps.push(level(false));
        }
        steps
    }
}

/// llama.cpp's name for splitting as the `pre_tokenizer` of a `tokenizer.json` does, if it is one of those known.
pub fn split_of(pre_tokenizer: &Json, whole_words: bool, composed: bool) -> Option<&'static str> {
    let steps = match pre_tokenizer["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![pre_tokenizer],
    };
    // What decides on offsets alone does not count.
    let bare = |step: &Json| {
        let mut step = step.clone();
        if let Some(fields) = step.as_object_mut().filter(|f| f.get("type").is_some_and(|t| t == "ByteLevel")) {
            fields.remove("trim_offsets");
            fields.entry("use_regex").or_insert(json!(true));
        }
        step
    };
    let wanted: Vec<Json> = steps.into_iter().map(bare).collect();
    let same = |split: &&Split| {
        (split.whole_words, split.composed) == (whole_words, composed)
            && split.pre_tokenizers().iter().map(bare).eq(wanted.iter().cloned())
    };
    SPLITS.iter().find(same).map(|split| split.names[0])
}

/// Kinds of tokens, as `tokenizer.ggml.token_type` numbers them.
pub mod kind {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER: i64 = 4;
    pub const UNUSED: i64 = 5;
    pub const BYTE: i64 = 6;
}

/// Most bytes of a token: every way of cutting it is looked at.
const LONGEST: usize = 512;
/// SentencePiece's stand-in for a space.
pub const SPACE: &str = "\u{2581}";

impl Gguf {
    /// `tokenizer_config.json`: the special tokens that chat templates name.
    pub(super) fn tokenizer_config(&self) -> Result<Json, Error> {
        let tokens = self.texts("tokenizer.ggml.tokens")?;
        let mut config = Map::new();
        let names = [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")];
        for (name, key) in names {
            let id = self.integer(&format!("tokenizer.ggml.{key}_token_id"))?;
            if let Some(token) = id.and_then(|id| tokens.get(id as usize)) {
                config.insert(name.to_owned(), json!(token));
            }
        }
        Ok(config.into())
    }

    /// `tokenizer.json`.
    pub(super) fn tokenizer(&self) -> Result<Json, Error> {
        let key = "tokenizer.ggml.model";
        let model = self.need(key, self.text(key)?)?.to_owned();
        let (tokens, kinds) = (self.texts("tokenizer.ggml.tokens")?, self.kinds()?);
        let mut vocab = Map::new();
        for (id, token) in tokens.iter().enumerate() {
            if token.len() > LONGEST {
                let what =
                    format!("token {id} has {} bytes, more than {LONGEST}: convert the model again", token.len());
                return Err(Error::file(self.path(), what));
            }
            if vocab.insert(token.clone(), json!(id)).is_some() {
                let what = format!("token '{token}' is in tokenizer.ggml.tokens twice: convert the model again");
                return Err(Error::file(self.path(), what));
            }
        }
        match model.as_str() {
            "gpt2" => self.byte_level(tokens, &kinds, vocab),
            "llama" => self.sentence_piece(tokens, &kinds, vocab),
            other => {
                let supported = "gpt2 (byte-level BPE), llama (SentencePiece BPE)";
                Err(self.unsupported(format!("tokenizer '{other}'"), supported))
            }
        }
    }

    fn kinds(&self) -> Result<Vec<i64>, Error> {
        let (key, count) = ("tokenizer.ggml.token_type", self.texts("tokenizer.ggml.tokens")?.len());
        match self.numbers(key)? {
            None => Ok(vec![kind::NORMAL; count]),
            Some(kinds) if kinds.len() == count => Ok((0..count).map(|i| kinds.get(i) as i64).collect()),
            Some(kinds) => Err(self.wrong(key, &Value::Numbers(kinds.clone()), &format!("a list of {count}"))),
        }
    }

    fn byte_level(&self, tokens: &[String], kinds: &[i64], vocab: Map<String, Json>) -> Result<Json, Error> {
        let pre = self.text("tokenizer.ggml.pre")?.unwrap_or("default");
        let Some(split) = SPLITS.iter().find(|s| s.names.contains(&pre)) else {
            let supported: Vec<&str> = SPLITS.iter().flat_map(|s| s.names).copied().collect();
            return Err(self.unsupported(format!("tokenizer.ggml.pre '{pre}'"), &supported.join(", ")));
        };
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added(tokens, kinds, |_| true),
            "normalizer": if split.composed { json!({"type": "NFC"}) } else { json!(null) },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": split.pre_tokenizers()},
            "post_processor": self.ends(tokens, split.first, (None, None))?,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": split.whole_words,
                "vocab": vocab,
                "merges": self.texts("tokenizer.ggml.merges")?,
            },
        }))
    }

    fn sentence_piece(&self, tokens: &[String], kinds: &[i64], vocab: Map<String, Json>) -> Result<Json, Error> {
        let key = "tokenizer.ggml.scores";
        let scores = self.need(key, self.numbers(key)?)?;
        if scores.len() != tokens.len() {
            return Err(self.wrong(key, &Value::Numbers(scores.clone()), &format!("a list of {}", tokens.len())));
        }
        let unknown = self.integer("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
        let unknown = self.token(tokens, "unknown", unknown)?;
        let prefix = self.truth("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let normalizer = if prefix {
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]})
        } else {
            spaces
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            // Tokens with stand-ins for spaces are found by merging, since a text has spaces.
            "added_tokens": added(tokens, kinds, |token| !token.contains(SPACE)),
            "normalizer": normalizer,
            "pre_tokenizer": null,
            "post_processor": self.ends(tokens, true, (Some(1), Some(2)))?,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "merges": merges(tokens, kinds, |id| scores.get(id)),
                "vocab": vocab,
            },
        }))
    }

    fn token<'a>(&self, tokens: &'a [String], name: &str, id: u32) -> Result<&'a str, Error> {
        let token = tokens.get(id as usize).map(String::as_str);
        token.ok_or_else(|| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            self.wrong(&key, &Value::Int(id.into()), "the number of a token")
        })
    }

    /// What puts the first and last tokens around a text, if the file wants them; `default` are their ids where the
    /// file does not say.
    fn ends(&self, tokens: &[String], first: bool, default: (Option<u32>, Option<u32>)) -> Result<Json, Error> {
        let wanted = |name: &str, by_default: bool, id: Option<u32>| {
            let wanted = self.truth(&format!("tokenizer.ggml.add_{name}_token"))?.unwrap_or(by_default);
            match self.integer(&format!("tokenizer.ggml.{name}_token_id"))?.or(id).filter(|_| wanted) {
                Some(id) => Ok::<_, Error>(Some((self.token(tokens, name, id)?, id))),
                None => Ok(None),
            }
        };
        let (first, last) = (wanted("bos", first, default.0)?, wanted("eos", false, default.1)?);
        if first.is_none() && last.is_none() {
            return Ok(Json::Null);
        }
        let special = |of: Option<(&str, u32)>, kind: u8| {
            of.map(|(token, _)| json!({"SpecialToken": {"id": token, "type_id": kind}}))
        };
        let one = |id: &str, kind: u8| {
            let text = json!({"Sequence": {"id": id, "type_id": kind}});
            special(first, kind).into_iter().chain([text]).chain(special(last, kind))
        };
        let tokens: Map<String, Json> = [first, last]
            .into_iter()
            .flatten()
            .map(|(token, id)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
            .collect();
        Ok(json!({
            "type": "TemplateProcessing",
            "single": one("A", 0).collect::<Vec<_>>(),
            "pair": one("A", 0).chain(one("B", 1)).collect::<Vec<_>>(),
            "special_tokens": tokens,
        }))
    }
}

/// Control tokens, and those of the user's that `keep` keeps: found in a text as they are.
fn added(tokens: &[String], kinds: &[i64], keep: impl Fn(&str) -> bool) -> Vec<Json> {
    let wanted = tokens.iter().zip(kinds).enumerate().filter(|(_, (token, kind))| match **kind {
        kind::CONTROL => true,
        kind::USER => keep(token),
        _ => false,
    });
    wanted
        .map(|(id, (token, kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind == kind::CONTROL,
            })
        })
        .collect()
}

/// Merges that do what scores do: every way of cutting a token into two, the token of the highest score first.
fn merges(tokens: &[String], kinds: &[i64], score: impl Fn(usize) -> f64) -> Vec<[String; 2]> {
    let plain = |id: &usize| matches!(kinds[*id], kind::NORMAL | kind::USER);
    let known: HashMap<&str, usize> =
        tokens.iter().enumerate().filter(|(id, _)| plain(id)).map(|(id, token)| (token.as_str(), id)).collect();
    let mut cuts = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| plain(id)) {
        for (at, _) in token.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (known.get(&token[..at]), known.get(&token[at..])) {
                cuts.push((score(id), *left, *right));
            }
        }
    }
    // Equal scores: longer parts first, then by number.
    let length = |id: usize| std::cmp::Reverse(tokens[id].chars().count());
    cuts.sort_by(|a, b| {
        let tail = |(_, left, right): &(f64, usize, usize)| (length(*left), length(*right), *left, *right);
        b.0.total_cmp(&a.0).then_with(|| tail(a).cmp(&tail(b)))
    });
    cuts.into_iter().map(|(_, left, right)| [tokens[left].clone(), tokens[right].clone()]).collect()
}
