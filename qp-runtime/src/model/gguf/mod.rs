//! GGUF files, read as if they were a model directory: the same small files, the same names of tensors.
//!
//! * `arch`: architectures by llama.cpp's names.
//! * `container`: header and directory, as <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> defines them.
//! * `types`: element types by number; blocks are formats, read as their specs say.
//! * `values`: keys by name and type.
//! * `config`, `tokenizer`: `config.json` and `tokenizer.json` made from the header's keys.
//! * [`describe`], [`vocabulary`], [`write`]: the inverse of these, for files that are written.
//!
//! Tensors are mapped; a tensor's blocks become `f32` when it is read.

mod arch;
mod config;
mod container;
pub mod describe;
#[cfg(test)]
mod tests;
mod tokenizer;
mod types;
mod values;
pub mod vocabulary;
pub mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use arch::Architecture;
pub use container::Part;
use container::{Container, Value};
pub use types::LAYOUT;
use types::Types;

use super::Error;
use super::config::{MOST, MOST_EXPERTS};
use super::tensors::{Bytes, Entry, Kind, TensorDir};

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
/// Factors of rotary frequencies, which `config.json` describes by a rule.
const FACTORS: &str = "rope_freqs.weight";
/// Such factors of long contexts, and of short ones.
const LONG_FACTORS: &str = "rope_factors_long.weight";
const SHORT_FACTORS: &str = "rope_factors_short.weight";

/// Tensors of a block that are no part of a layer or norm.
const ALONE: [(&str, &str); 2] =
    [("attn_sinks.weight", "self_attn.sinks"), ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias")];

/// True of what `config.json` says.
fn is_of_config(name: &str) -> bool {
    [FACTORS, LONG_FACTORS, SHORT_FACTORS].contains(&name)
}

/// An opened GGUF file of a supported architecture.
#[derive(Debug)]
pub struct Gguf {
    file: Container,
    arch: &'static Architecture,
    /// Experts of a layer, as the file says; 0 without.
    experts: usize,
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
        let experts = match file.values.get(&format!("{name}.expert_count")) {
            // More are refused where the key is read.
            Some(Value::Int(n)) => usize::try_from(*n).unwrap_or(0).min(MOST_EXPERTS),
            _ => 0,
        };
        let Some(arch) = arch::find(&name, experts > 0) else {
            let supported = arch::names().join(", ");
            return Err(Error::Unsupported { path: path.clone(), what: format!("architecture {name}"), supported });
        };
        Ok(Gguf { file, arch, experts, asked: Mutex::default() })
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
        self.file.tensors.iter().filter(|(n, _)| is_of_config(n)).map(of).collect()
    }

    /// How a checkpoint keeps the tensor `name`; nothing if no engine reads it.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn kept_as(&self, name: &str) -> Result<Option<Kept>, Error> {
        if is_of_config(name) {
            return Ok(None);
        }
        let missing = || Error::MissingTensor { name: name.to_owned(), path: self.path().to_owned() };
        let place = self.file.tensors.get(name).ok_or_else(missing)?;
        let named = self.translate(name).ok_or_else(missing)?;
        let kept = |translated: String| match &place.kind {
            Kind::Plain(_) => translated,
            Kind::Format(reader) => {
                format!("{}.{}", translated.strip_suffix(".weight").unwrap_or(&translated), reader.tensors()[0].name)
            }
        };
        let heads = self.interleaved_heads(&named)?;
        Ok(Some(Kept { names: named.names.into_iter().map(kept).collect(), rows: place.shape[0], heads }))
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

    /// Heads of whose rows the file has the halves by turns, if it does so with this tensor.
    fn interleaved_heads(&self, named: &Named<'_>) -> Result<Option<usize>, Error> {
        match named.block {
            Some((_, "attn_q")) if self.arch.interleaved => self.heads().map(Some),
            Some((_, "attn_k")) if self.arch.interleaved => self.kv_heads().map(Some),
            _ => Ok(None),
        }
    }

    /// The tensors, by Hugging Face's names. Where some layers have biases and others of their kind have none, these
    /// have zeros: the format may leave out each bias by itself, Hugging Face's configuration only all of a kind.
    ///
    /// # Errors
    /// If there is a tensor that no engine here would use.
    pub fn tensors(&self) -> Result<TensorDir, Error> {
        let blocks = self.blocks()?;
        let mut entries = BTreeMap::new();
        let mut types = Types::default();
        for (name, place) in self.file.tensors.iter().filter(|(n, _)| !is_of_config(n)) {
            let Some(named) = self.translate(name) else {
                return Err(Error::Unsupported {
                    path: self.path().to_owned(),
                    what: format!("tensor '{name}'"),
                    supported: format!("the tensors of {}", self.arch.name),
                });
            };
            if let Some((block, _)) = named.block.filter(|(block, _)| *block >= blocks) {
                let what = format!(
                    "tensor '{name}' is of block {block}, but {} is {blocks}: convert the model again",
                    self.key("block_count")
                );
                return Err(Error::file(self.path(), what));
            }
            if named.stacked {
                for (i, translated) in named.names.into_iter().enumerate() {
                    entries.insert(translated, self.expert(name, place, i, &mut types)?);
                }
                continue;
            }
            let heads = self.interleaved_heads(&named)?;
            if let Some(heads) = heads
                && !place.shape[0].is_multiple_of(2 * heads)
            {
                let what = format!("tensor '{name}' has {} rows, which {heads} heads cannot share", place.shape[0]);
                return Err(Error::file(self.path(), what));
            }
            let mut entry = Entry::new(place.kind.clone(), place.shape.clone(), place.bytes.clone());
            entry.interleaved = heads;
            if let Some(translated) = named.names.into_iter().next() {
                entries.insert(translated, entry);
            }
        }
        let biased: Vec<&str> = (self.arch.biases.iter())
            .filter(|(key, layers)| key.is_none() || self.has_biases(layers))
            .flat_map(|(_, layers)| *layers)
            .copied()
            .collect();
        for (name, weight) in &self.file.tensors {
            let Some((_, inner)) = self.translate(name).and_then(|named| named.block) else { continue };
            let Some(bias) = name.strip_suffix(".weight").map(|n| format!("{n}.bias")) else { continue };
            if !biased.contains(&inner) || self.file.tensors.contains_key(&bias) {
                continue;
            }
            let names = self.translate(&bias).expect("the name of a layer").names;
            let (kind, rows) = (Kind::Plain(safetensors::Dtype::F32), weight.shape[0]);
            if rows > MOST {
                return Err(Error::file(self.path(), format!("tensor '{bias}' would have {rows} values")));
            }
            let zeros = || Entry::new(kind.clone(), vec![rows], Bytes::from(vec![0; 4 * rows]));
            entries.extend(names.into_iter().map(|name| (name, zeros())));
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
    /// Its name there; of experts, which files stack, those of each in order.
    pub names: Vec<String>,
    /// Its rows.
    pub rows: usize,
    /// Heads whose halves the file interleaves, if it does.
    pub heads: Option<usize>,
}

/// A tensor by Hugging Face's names.
struct Named<'a> {
    /// Its name; of experts those of each in order.
    names: Vec<String>,
    /// Its block, if it is in one, and what files call the layer or norm there.
    block: Option<(usize, &'a str)>,
    /// True of experts.
    stacked: bool,
}

impl Gguf {
    /// What Hugging Face calls a tensor; nothing if the architecture has none of its name.
    fn translate<'a>(&self, name: &'a str) -> Option<Named<'a>> {
        let (stem, part) = name.rsplit_once('.').filter(|(_, part)| matches!(*part, "weight" | "bias"))?;
        let find =
            |names: &[(&str, &str)], stem: &str| names.iter().find(|(n, _)| *n == stem).map(|(_, t)| t.to_string());
        if let Some(outer) = find(&OUTER, stem) {
            return Some(Named { names: vec![format!("{outer}.{part}")], block: None, stacked: false });
        }
        let (number, inner) = stem.strip_prefix("blk.")?.split_once('.')?;
        let number: usize = number.parse().ok()?;
        let (prefix, block) = (format!("model.layers.{number}"), Some((number, inner)));
        if let Some(alone) = find(&ALONE, &format!("{inner}.{part}")) {
            return Some(Named { names: vec![format!("{prefix}.{alone}")], block, stacked: false });
        }
        let stacked = arch::STACKED.iter().position(|s| *s == inner);
        if let (Some(at), Some(experts)) = (stacked, self.arch.experts) {
            let (of, layer) = (experts.part, experts.layers[at]);
            let names = (0..self.experts).map(|e| format!("{prefix}.{of}.experts.{e}.{layer}.{part}")).collect();
            return Some(Named { names, block, stacked: true });
        }
        let inner = find(self.arch.names, inner).or_else(|| find(&INNER, inner))?;
        Some(Named { names: vec![format!("{prefix}.{inner}.{part}")], block, stacked: false })
    }

    /// The matrix, or the bias, of an expert.
    fn expert(&self, name: &str, place: &container::Place, i: usize, types: &mut Types) -> Result<Entry, Error> {
        let wrong = || {
            let what = format!("tensor '{name}' of shape {:?} is not of {} experts", place.shape, self.experts);
            Error::file(self.path(), what)
        };
        let [count, shape @ ..] = place.shape.as_slice() else { return Err(wrong()) };
        let size = place.bytes.as_slice().len() / self.experts.max(1);
        if *count != self.experts || shape.is_empty() {
            return Err(wrong());
        }
        let kind = types.kind(place.code, shape).map_err(|_| wrong())?;
        Ok(Entry::new(kind, shape.to_vec(), place.bytes.part(i * size..(i + 1) * size)))
    }
}
