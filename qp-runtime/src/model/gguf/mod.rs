//! GGUF files, read as if they were a model directory: the same small files, the same names of tensors.
//!
//! * `container`: header and directory, as <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> defines them.
//! * [`blocks`]: the block types, weights in small groups with scales of their own.
//! * `files`: `config.json` and `tokenizer.json` made from the header's keys.
//!
//! Tensors are mapped; a tensor's blocks become `f32` when it is read.

pub mod blocks;
mod container;
mod files;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use blocks::Block;
use container::{Container, Value};

use super::Error;
use super::tensors::{Bytes, Entry, TensorDir};

/// Architectures that are read: as GGUF and as Hugging Face name them, and whether rows of q and k are interleaved.
///
/// For architectures whose rope turns neighbouring elements, llama.cpp's converter interleaves the two halves of each
/// head of q and k.
const ARCHITECTURES: [(&str, &str, bool); 2] =
    [("llama", "LlamaForCausalLM", true), ("qwen2", "Qwen2ForCausalLM", false)];

/// Tensors outside of blocks.
const OUTER: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Tensors of a block.
const INNER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

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
}

impl Gguf {
    /// Opens the file `path`.
    ///
    /// # Errors
    /// If it cannot be read, is damaged or cut short, or its architecture or the type of a tensor is not supported.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = Container::open(path)?;
        let name = match file.values.get("general.architecture") {
            Some(Value::Text(name)) => name.clone(),
            _ => return Err(Error::file(path, "has no key 'general.architecture': convert the model again")),
        };
        let Some(&(prefix, architecture, interleaved)) = ARCHITECTURES.iter().find(|(p, ..)| *p == name) else {
            let supported = ARCHITECTURES.map(|(p, ..)| p).join(", ");
            return Err(Error::Unsupported { path: path.to_owned(), what: format!("architecture {name}"), supported });
        };
        Ok(Gguf { file, prefix, architecture, interleaved })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The small file `name` of the directory that this file stands for; `None` if it has none of that name.
    ///
    /// # Errors
    /// If keys are missing or say something unsupported.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        Ok(match name {
            "config.json" => Some(self.config()?.to_string().into_bytes()),
            "tokenizer.json" => Some(self.tokenizer()?.to_string().into_bytes()),
            "chat_template.jinja" => self.text("tokenizer.chat_template")?.map(|t| t.as_bytes().to_vec()),
            _ => None,
        })
    }

    /// The tensors, by Hugging Face's names.
    ///
    /// # Errors
    /// If there is a tensor that no engine here would use.
    pub fn tensors(&self) -> Result<TensorDir, Error> {
        let heads = [("attn_q", self.heads()?), ("attn_k", self.kv_heads()?)];
        let mut entries = BTreeMap::new();
        for (name, place) in self.file.tensors.iter().filter(|(n, _)| *n != FACTORS) {
            let Some((translated, inner)) = translate(name) else {
                return Err(Error::Unsupported {
                    path: self.path().to_owned(),
                    what: format!("tensor '{name}'"),
                    supported: format!("the tensors of {}", self.architecture),
                });
            };
            let heads = heads.iter().find(|(n, _)| self.interleaved && Some(*n) == inner).map(|(_, heads)| *heads);
            if let Some(heads) = heads
                && !place.shape[0].is_multiple_of(2 * heads)
            {
                let what = format!("tensor '{name}' has {} rows, which {heads} heads cannot share", place.shape[0]);
                return Err(Error::file(self.path(), what));
            }
            let bytes = Bytes::mapped(self.file.map.clone(), place.range.clone());
            let entry = Entry { kind: place.kind, shape: place.shape.clone(), bytes, interleaved: heads };
            entries.insert(translated, entry);
        }
        Ok(TensorDir::new(PathBuf::from(self.path()), entries))
    }
}

/// Hugging Face's name of a tensor, and its GGUF name within a block.
fn translate(name: &str) -> Option<(String, Option<&str>)> {
    let (stem, part) = name.rsplit_once('.').filter(|(_, part)| matches!(*part, "weight" | "bias"))?;
    let find = |names: &[(&str, &str)], stem: &str| names.iter().find(|(n, _)| *n == stem).map(|(_, t)| t.to_string());
    if let Some(outer) = find(&OUTER, stem) {
        return Some((format!("{outer}.{part}"), None));
    }
    let (block, stem) = stem.strip_prefix("blk.")?.split_once('.')?;
    let block: usize = block.parse().ok()?;
    Some((format!("model.layers.{block}.{}.{part}", find(&INNER, stem)?), Some(stem)))
}
