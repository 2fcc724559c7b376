//! GGUF files, read as if they were a model directory: the same small files, the same names of tensors.
//!
//! * `container`: header and directory, as <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> defines them.
//! * `types`: element types by number; blocks are formats, read as their specs say.
//! * `values`: keys by name and type.
//! * `config`, `tokenizer`: `config.json` and `tokenizer.json` made from the header's keys.
//!
//! Tensors are mapped; a tensor's blocks become `f32` when it is read.

mod config;
mod container;
#[cfg(test)]
mod tests;
mod tokenizer;
mod types;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

pub use container::Part;
use container::{Container, Value};

use super::Error;
use super::config::MOST;
use super::tensors::{Bytes, Entry, Kind, TensorDir};

/// Architectures that are read: as GGUF and as Hugging Face name them, and whether rows of q and k are interleaved.
///
/// For architectures whose rope turns neighbouring elements, llama.cpp's converter interleaves the two halves of each
/// head of q and k.
const ARCHITECTURES: [(&str, &str, bool); 3] =
    [("llama", "LlamaForCausalLM", true), ("qwen2", "Qwen2ForCausalLM", false), ("qwen3", "Qwen3ForCausalLM", false)];

/// Tensors outside of blocks.
const OUTER: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Tensors of a block.
const INNER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The embedding, whose rows are the tokens known.
const EMBEDDING: &str = "token_embd.weight";
/// Linear layers of a block's attention, and how many rows they have.
const ATTENTION: [&str; 4] = ["attn_q", "attn_k", "attn_v", "attn_output"];
/// Linear layers of a block's feed-forward part.
const FEED_FORWARD: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down"];

/// Factors of rotary frequencies, which `config.json` describes by a rule.
const FACTORS: &str = "rope_freqs.weight";

/// An opened GGUF file of a supported architecture.
#[derive(Debug)]
pub struct Gguf {
    file: Container,
    /// Prefix of the keys.
    prefix: &'static str,
    /// Hugging Face's name of the architecture.
    architecture: &'static str,
    interleaved: bool,
    /// Keys that were asked for.
    asked: Mutex<BTreeSet<String>>,
}

impl Gguf {
    /// Opens the file `path`.
    ///
    /// # Errors
    /// If it cannot be read, is damaged or cut short, or its architecture or the type of a tensor is not supported.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::of(Container::open(path)?)
    }

    /// What the headers of a model's files say, without their data.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn of_headers(paths: impl Iterator<Item = PathBuf>) -> Result<Self, Error> {
        Self::of(Container::open_headers(paths)?)
    }

    fn of(file: Container) -> Result<Self, Error> {
        let path = &file.path;
        let name = match file.values.get("general.architecture") {
            Some(Value::Text(name)) => name.clone(),
            _ => return Err(Error::file(path, "has no key 'general.architecture': convert the model again")),
        };
        let Some(&(prefix, architecture, interleaved)) = ARCHITECTURES.iter().find(|(p, ..)| *p == name) else {
            let supported = ARCHITECTURES.map(|(p, ..)| p).join(", ");
            return Err(Error::Unsupported { path: path.clone(), what: format!("architecture {name}"), supported });
        };
        Ok(Gguf { file, prefix, architecture, interleaved, asked: Mutex::default() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The files, in order.
    pub fn parts(&self) -> &[Part] {
        &self.file.parts
    }

    /// Tensors that no engine reads, with their bytes.
    pub fn left_out(&self) -> Vec<(String, Bytes)> {
        let of = |(name, place): (&String, &container::Place)| (name.clone(), place.bytes.clone());
        self.file.tensors.iter().filter(|(n, _)| *n == FACTORS).map(of).collect()
    }

    /// How a checkpoint keeps the tensor `name`; nothing if no engine reads it.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn kept_as(&self, name: &str) -> Result<Option<Kept>, Error> {
        if name == FACTORS {
            return Ok(None);
        }
        let missing = || Error::MissingTensor { name: name.to_owned(), path: self.path().to_owned() };
        let place = self.file.tensors.get(name).ok_or_else(missing)?;
        let (translated, inner) = translate(name).ok_or_else(missing)?;
        let name = match &place.kind {
            Kind::Plain(_) => translated,
            Kind::Format(reader) => {
                format!("{}.{}", translated.strip_suffix(".weight").unwrap_or(&translated), reader.tensors()[0].name)
            }
        };
        let heads = match inner {
            Some((_, "attn_q")) if self.interleaved => Some(self.heads()?),
            Some((_, "attn_k")) if self.interleaved => Some(self.kv_heads()?),
            _ => None,
        };
        Ok(Some(Kept { name, rows: place.shape[0], heads }))
    }

    /// The small file `name` of the directory that this file stands for; `None` if it has none of that name.
    ///
    /// # Errors
    /// If keys are missing or say something unsupported.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        Ok(match name {
            "config.json" => Some(self.config()?.to_string().into_bytes()),
            "tokenizer.json" => Some(self.tokenizer()?.to_string().into_bytes()),
            "tokenizer_config.json" => Some(self.tokenizer_config()?.to_string().into_bytes()),
            "chat_template.jinja" => self.text("tokenizer.chat_template")?.map(|t| t.as_bytes().to_vec()),
            _ => None,
        })
    }

    /// Keys that were asked for.
    fn asked(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks of the model, at least 1.
    fn blocks(&self) -> Result<usize, Error> {
        self.size("block_count")
    }

    /// True if one of `layers` has a bias in some block.
    fn has_biases(&self, layers: &[&str]) -> bool {
        let biased = |name: &String| {
            let inner = name.strip_prefix("blk.").and_then(|n| n.split_once('.')).map(|(_, inner)| inner);
            inner.and_then(|i| i.strip_suffix(".bias")).is_some_and(|i| layers.contains(&i))
        };
        self.file.tensors.keys().any(biased)
    }

    /// The tensors, by Hugging Face's names. Where some layers have biases and others of their kind have none, these
    /// have zeros: the format may leave out each bias by itself, Hugging Face's configuration only all of a kind.
    ///
    /// # Errors
    /// If there is a tensor that no engine here would use.
    pub fn tensors(&self) -> Result<TensorDir, Error> {
        let heads = [("attn_q", self.heads()?), ("attn_k", self.kv_heads()?)];
        let blocks = self.blocks()?;
        let mut entries = BTreeMap::new();
        for (name, place) in self.file.tensors.iter().filter(|(n, _)| *n != FACTORS) {
            let Some((translated, inner)) = translate(name) else {
                return Err(Error::Unsupported {
                    path: self.path().to_owned(),
                    what: format!("tensor '{name}'"),
                    supported: format!("the tensors of {}", self.architecture),
                });
            };
            if let Some((block, _)) = inner.filter(|(block, _)| *block >= blocks) {
                let what = format!(
                    "tensor '{name}' is of block {block}, but {}.block_count is {blocks}: convert the model again",
                    self.prefix
                );
                return Err(Error::file(self.path(), what));
            }
            let heads = heads.iter().find(|(n, _)| self.interleaved && inner.is_some_and(|(_, i)| i == *n));
            let heads = heads.map(|(_, heads)| *heads);
            if let Some(heads) = heads
                && !place.shape[0].is_multiple_of(2 * heads)
            {
                let what = format!("tensor '{name}' has {} rows, which {heads} heads cannot share", place.shape[0]);
                return Err(Error::file(self.path(), what));
            }
            let mut entry = Entry::new(place.kind.clone(), place.shape.clone(), place.bytes.clone());
            entry.interleaved = heads;
            entries.insert(translated, entry);
        }
        let always: &[&str] = if self.prefix == "qwen2" { &ATTENTION[..3] } else { &[] };
        let kinds = [&ATTENTION[..], &FEED_FORWARD].into_iter();
        let biased = kinds.filter(|l| self.prefix == "llama" && self.has_biases(l));
        let biased: Vec<&str> = biased.flatten().chain(always).copied().collect();
        for (name, weight) in &self.file.tensors {
            let Some((_, Some((_, inner)))) = translate(name) else { continue };
            let Some(bias) = name.strip_suffix(".weight").map(|n| format!("{n}.bias")) else { continue };
            if !biased.contains(&inner) || self.file.tensors.contains_key(&bias) {
                continue;
            }
            let (name, _) = translate(&bias).expect("the name of a layer");
            let (kind, rows) = (Kind::Plain(safetensors::Dtype::F32), weight.shape[0]);
            if rows > MOST {
                return Err(Error::file(self.path(), format!("tensor '{bias}' would have {rows} values")));
            }
            entries.insert(name, Entry::new(kind, vec![rows], Bytes::from(vec![0; 4 * rows])));
        }
        let mut dir = TensorDir::new(PathBuf::from(self.path()), entries);
        self.config()?;
        dir.notes = self.unused_keys();
        Ok(dir)
    }
}

/// A tensor in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its name there.
    pub name: String,
    /// Its rows.
    pub rows: usize,
    /// Heads whose halves the file interleaves, if it does.
    pub heads: Option<usize>,
}

/// Hugging Face's name of a tensor; and its block, if it is in one, with its GGUF name there.
fn translate(name: &str) -> Option<(String, Option<(usize, &str)>)> {
    let (stem, part) = name.rsplit_once('.').filter(|(_, part)| matches!(*part, "weight" | "bias"))?;
    let find = |names: &[(&str, &str)], stem: &str| names.iter().find(|(n, _)| *n == stem).map(|(_, t)| t.to_string());
    if let Some(outer) = find(&OUTER, stem) {
        return Some((format!("{outer}.{part}"), None));
    }
    let (block, stem) = stem.strip_prefix("blk.")?.split_once('.')?;
    let block: usize = block.parse().ok()?;
    Some((format!("model.layers.{block}.{}.{part}", find(&INNER, stem)?), Some((block, stem))))
}
