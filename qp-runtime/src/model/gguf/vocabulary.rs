//! What a GGUF file says of a tokenizer that comes from a directory. The inverse of [`super::tokenizer`].
//!
//! Merges, pieces and kinds of tokens are written; how a text is split before is only named. What is written is read again, and
//! must give the same tokens for [`SAMPLES`].

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use super::tokenizer::{SPACE, kind, split_of};
use super::write::{Put, Values};
use crate::model::config::Config;
use crate::model::{Error, Files, Tokenizer};

/// Texts of all that splitting and merging decides on.
const SAMPLES: [&str; 6] = [
    "In the beginning\n\n  was \t the Word, and 1234567 words; I'll say: 'It's 3.14'!!\r\n",
    "   leading, trailing   \n \n\n\t",
    "Größe, naïve café, İstanbul; e\u{301} cafe\u{301}",
    "日本語のテキスト、한국어 텍스트, русский текст, नमस्ते, العربية",
    "🙂👩\u{200d}👩\u{200d}👧 = ½ × ∑ → ∞",
    "fn main() { let x = a[0] ^ 0x1F; } // CamelCase snake_case DON'T WE'RE",
];

/// What is wrong with a tokenizer, in words that go on after its name.
type Refused = String;

/// The keys of the tokenizer of `files`, whose model has this configuration.
///
/// # Errors
/// If a file cannot be read. In the second place: what a GGUF file cannot say.
pub fn values(files: &Files, config: &Config, tokenizer: &Tokenizer) -> Result<Result<Values, Refused>, Error> {
    let path = files.path("tokenizer.json");
    let parse = |name: &str| {
        let parsed = files.text(name)?.map(|text| serde_json::from_str::<Json>(&text)).transpose();
        parsed.map_err(|e| Error::file(&files.path(name), e.to_string()))
    };
    let json = parse("tokenizer.json")?.ok_or_else(|| Error::file(&path, "not found"))?;
    let named = parse("tokenizer_config.json")?.unwrap_or(Json::Null);
    Ok(Vocabulary { json: &json, named: &named, config, tokenizer }.values())
}

/// What the tokenizer that was `read` from a file does otherwise than the `model`'s, if anything.
pub fn difference(model: &Tokenizer, read: &Tokenizer) -> Option<String> {
    if let Err(why) = model.same_tokens(read) {
        return Some(why);
    }
    let differs = |text: &&&str| {
        let of = |t: &Tokenizer| (t.encode(text).ok(), t.encode_exact(text).ok());
        of(model) != of(read)
    };
    SAMPLES.iter().find(differs).map(|text| format!("{text:?} has other tokens in it"))
}

struct Vocabulary<'a> {
    json: &'a Json,
    /// `tokenizer_config.json`.
    named: &'a Json,
    config: &'a Config,
    tokenizer: &'a Tokenizer,
}

impl Vocabulary<'_> {
    fn values(&self) -> Result<Values, Refused> {
        let model = &self.json["model"];
        let kind = model["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" {
            return Err(format!("is of the kind {kind}: GGUF files here have BPE"));
        }
        let mut out = match model["byte_fallback"] == true {
            true => self.pieces(model)?,
            false => self.bytes(model)?,
        };
        let (first, last) = self.ends()?;
        let id = |key: &str| self.tokenizer.id(self.token(key)?);
        let mut put = |key: &str, value: Put| out.push((format!("tokenizer.ggml.{key}"), value));
        if let Some(bos) = first.or(self.config.bos) {
            put("bos_token_id", Put::U32(bos));
        }
        let mut eos: Vec<u32> = last.into_iter().collect();
        eos.extend(id("eos_token").filter(|id| self.config.eos.contains(id)));
        eos.extend(&self.config.eos);
        let mut seen = Vec::new();
        eos.retain(|id| {
            !seen.contains(id) && {
                seen.push(*id);
                true
            }
        });
        for (key, id) in ["eos", "eot", "eom"].iter().zip(eos) {
            put(&format!("{key}_token_id"), Put::U32(id));
        }
        for (key, name) in [("unknown", "unk_token"), ("padding", "pad_token")] {
            if let Some(id) = id(name) {
                put(&format!("{key}_token_id"), Put::U32(id));
            }
        }
        put("add_bos_token", Put::Bool(first.is_some()));
        put("add_eos_token", Put::Bool(last.is_some()));
        Ok(out)
    }

    /// The token that `tokenizer_config.json` names by `key`.
    fn token(&self, key: &str) -> Option<&str> {
        let token = self.named.get(key)?;
        token.as_str().or_else(|| token.get("content")?.as_str())
    }

    /// Tokens by number, and what kind each is.
    fn tokens(&self) -> Result<(Vec<String>, Vec<i32>), Refused> {
        let count = self.config.vocab;
        let mut tokens: Vec<Option<String>> = vec![None; count];
        for (token, id) in self.tokenizer.tokens() {
            let place = tokens.get_mut(id as usize);
            let place = place.ok_or_else(|| format!("has the token {id} ({token:?}), beyond vocab_size {count}"))?;
            *place = Some(token);
        }
        let mut kinds: Vec<i32> =
            tokens.iter().map(|t| if t.is_some() { kind::NORMAL } else { kind::UNUSED } as i32).collect();
        for (id, token) in self.tokenizer.added_tokens() {
            // llama.cpp finds such tokens in a text as they are.
            if token.single_word || token.lstrip || token.rstrip {
                let what = format!("has the token {:?} that takes spaces beside it, or stands alone", token.content);
                return Err(what + ", which a GGUF file does not say");
            }
            kinds[id as usize] = if token.special { kind::CONTROL } else { kind::USER } as i32;
        }
        let filled = |(id, token): (usize, Option<String>)| token.unwrap_or_else(|| format!("[PAD{id}]"));
        Ok((tokens.into_iter().enumerate().map(filled).collect(), kinds))
    }

    /// Byte-level BPE.
    fn bytes(&self, model: &Json) -> Result<Values, Refused> {
        let composed = match self.json["normalizer"]["type"].as_str() {
            None => false,
            Some("NFC") => true,
            Some(other) => return Err(format!("has the normalizer {other}: GGUF files here have NFC or none")),
        };
        let name = split_of(&self.json["pre_tokenizer"], model["ignore_merges"] == true, composed)
            .ok_or("splits texts (pre_tokenizer) in a way for which llama.cpp has no name that is known here")?;
        let (tokens, kinds) = self.tokens()?;
        let merge = |m: &Json| match m {
            Json::String(both) => Some(both.clone()),
            Json::Array(two) => Some(format!("{} {}", two.first()?.as_str()?, two.get(1)?.as_str()?)),
            _ => None,
        };
        let merges = model["merges"].as_array().into_iter().flatten().map(merge).collect::<Option<Vec<_>>>();
        let merges = merges.ok_or("has merges that are no pairs")?;
        Ok(vec![
            ("tokenizer.ggml.model".to_owned(), Put::Text("gpt2".to_owned())),
            ("tokenizer.ggml.pre".to_owned(), Put::Text(name.to_owned())),
            ("tokenizer.ggml.tokens".to_owned(), Put::Texts(tokens)),
            ("tokenizer.ggml.token_type".to_owned(), Put::I32s(kinds)),
            ("tokenizer.ggml.merges".to_owned(), Put::Texts(merges)),
        ])
    }

    /// SentencePiece's BPE: in place of merges, each piece has a score, and what is merged first has the highest.
    fn pieces(&self, model: &Json) -> Result<Values, Refused> {
        let (normalizer, before) = (&self.json["normalizer"], &self.json["pre_tokenizer"]);
        let steps: Vec<&Json> = match normalizer["normalizers"].as_array() {
            Some(steps) => steps.iter().collect(),
            None => Some(normalizer).filter(|n| !n.is_null()).into_iter().collect(),
        };
        let is = |step: &Json, ty: &str| step["type"] == ty;
        let (mut prefix, mut spaces) = (false, false);
        for step in steps {
            match step {
                s if is(s, "Prepend") && s["prepend"] == SPACE => prefix = true,
                s if is(s, "Replace") && s["pattern"]["String"] == " " && s["content"] == SPACE => spaces = true,
                s => return Err(format!("has the normalizer {}, which a GGUF file does not say", s["type"])),
            }
        }
        match before["type"].as_str() {
            None => (),
            Some("Metaspace") if !spaces => {
                prefix |= before["prepend_scheme"] != "never" && before["add_prefix_space"] != false;
                spaces = true;
            }
            Some(other) => return Err(format!("has the pre_tokenizer {other} beside pieces")),
        }
        if !spaces {
            return Err(format!("does not write spaces as {SPACE:?}, as pieces of a GGUF file do"));
        }
        let (tokens, mut kinds) = self.tokens()?;
        let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, t)| (t.as_str(), id)).collect();
        for (token, kind) in tokens.iter().zip(&mut kinds) {
            let byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            if byte && *kind == kind::NORMAL as i32 {
                *kind = kind::BYTE as i32;
            }
        }
        if let Some(&id) = model["unk_token"].as_str().and_then(|t| ids.get(t)) {
            kinds[id] = kind::UNKNOWN as i32;
        }
        // What is not merged has the lowest.
        let merges = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
        let lowest = -(merges.len() as f32) - 1.0;
        let mut scores = vec![lowest; tokens.len()];
        let (mut known, mut last) = (HashSet::new(), None);
        for (rank, merge) in merges.iter().enumerate() {
            let (left, right) = match merge {
                Json::String(both) => both.split_once(' '),
                Json::Array(two) => two.first().and_then(Json::as_str).zip(two.get(1).and_then(Json::as_str)),
                _ => None,
            }
            .ok_or("has merges that are no pairs")?;
            let whole = format!("{left}{right}");
            let id = *ids.get(whole.as_str()).ok_or_else(|| format!("merges to {whole:?}, which is no token"))?;
            if last != Some(id) && scores[id] != lowest {
                return Err(format!("merges to {whole:?} at several ranks, where a GGUF file has one score"));
            }
            if last != Some(id) {
                scores[id] = -(rank as f32);
            }
            last = Some(id);
            known.insert((id, left.len()));
        }
        // A score is for all ways to make a piece.
        let plain = |part: &str| ids.get(part).is_some_and(|&id| kinds[id] == kind::NORMAL as i32);
        for (id, token) in tokens.iter().enumerate().filter(|(_, token)| plain(token)) {
            let missing =
                |&(at, _): &(usize, char)| plain(&token[..at]) && plain(&token[at..]) && !known.contains(&(id, at));
            if let Some((at, _)) = token.char_indices().skip(1).find(missing) {
                let (left, right) = token.split_at(at);
                return Err(format!("does not merge {left:?} and {right:?} to {token:?}, as a GGUF file would"));
            }
        }
        let mut out = vec![
            ("tokenizer.ggml.model".to_owned(), Put::Text("llama".to_owned())),
            ("tokenizer.ggml.pre".to_owned(), Put::Text("default".to_owned())),
            ("tokenizer.ggml.tokens".to_owned(), Put::Texts(tokens)),
            ("tokenizer.ggml.scores".to_owned(), Put::F32s(scores)),
            ("tokenizer.ggml.token_type".to_owned(), Put::I32s(kinds)),
        ];
        out.push(("tokenizer.ggml.add_space_prefix".to_owned(), Put::Bool(prefix)));
        Ok(out)
    }

    /// The tokens that are put before a text, and behind it.
    fn ends(&self) -> Result<(Option<u32>, Option<u32>), Refused> {
        let mut found = (None, None);
        let post = &self.json["post_processor"];
        let all = match post["processors"].as_array() {
            Some(all) => all.iter().collect(),
            None => vec![post],
        };
        for one in all {
            match one["type"].as_str() {
                None | Some("ByteLevel") => continue,
                Some("TemplateProcessing") => (),
                Some(other) => return Err(format!("has the post_processor {other}, which a GGUF file does not say")),
            }
            let mut text = false;
            for piece in one["single"].as_array().into_iter().flatten() {
                let Some(special) = piece.get("SpecialToken") else {
                    text = true;
                    continue;
                };
                let name = special["id"].as_str().unwrap_or_default();
                let ids = one["special_tokens"][name]["ids"].as_array().map_or(&[][..], Vec::as_slice);
                let place = if text { &mut found.1 } else { &mut found.0 };
                match (ids, &place) {
                    ([id], None) => *place = id.as_u64().and_then(|id| u32::try_from(id).ok()),
                    _ => {
                        return Err(
                            "puts several tokens before or behind a text, which a GGUF file does not say".into()
                        );
                    }
                }
            }
        }
        Ok(found)
    }
}
