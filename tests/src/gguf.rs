//! Small GGUF files, for tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;
use serde_json::json;

use crate::models::{RandomModel, byte_tokens};

/// A value of the header.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `uint32`.
    U32(u32),
    /// `float32`.
    F32(f32),
    /// Truth.
    Bool(bool),
    /// Text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of `int32`.
    I32s(Vec<i32>),
    /// A list of `float32`.
    F32s(Vec<f32>),
}

/// A file to be written: what a test may change before [`Gguf::bytes`].
#[derive(Clone, Debug)]
pub struct Gguf {
    /// Version of the format.
    pub version: u32,
    /// Keys and values.
    pub values: BTreeMap<String, Value>,
    /// Name → shape, outermost first; number of the element type; bytes.
    pub tensors: BTreeMap<String, (Vec<usize>, u32, Vec<u8>)>,
}

impl Gguf {
    /// The file of a model, of the architecture `prefix`: F32 tensors, and the embedding as Q8_0, whose scales are all
    /// 1/64; see [`snap`]. With `interleave`, rows of q and k are interleaved.
    pub fn of(model: &RandomModel, prefix: &str, interleave: bool) -> Self {
        let c = |name: &str| Value::U32(model.config[name].as_u64().unwrap() as u32);
        let float = |name: &str| Value::F32(model.config[name].as_f64().unwrap() as f32);
        let mut values: BTreeMap<String, Value> = [
            ("block_count", c("num_hidden_layers")),
            ("context_length", c("max_position_embeddings")),
            ("embedding_length", c("hidden_size")),
            ("feed_forward_length", c("intermediate_size")),
            ("attention.head_count", c("num_attention_heads")),
            ("attention.head_count_kv", c("num_key_value_heads")),
            ("attention.key_length", c("head_dim")),
            ("attention.layer_norm_rms_epsilon", float("rms_norm_eps")),
            ("rope.freq_base", float("rope_theta")),
        ]
        .into_iter()
        .map(|(name, value)| (format!("{prefix}.{name}"), value))
        .collect();
        values.extend(byte_vocabulary(prefix));
        let tied = model.config["tie_word_embeddings"] == json!(true);
        let tensors = model.tensors.iter().filter(|(name, _)| !(tied && *name == "lm_head.weight"));
        let tensors = tensors.map(|(name, (shape, weights))| {
            let heads = match name {
                _ if !interleave => None,
                n if n.contains("q_proj") => model.config["num_attention_heads"].as_u64(),
                n if n.contains("k_proj") => model.config["num_key_value_heads"].as_u64(),
                _ => None,
            };
            let weights = match heads {
                Some(heads) => interleaved(weights, shape[0], heads as usize),
                None => weights.clone(),
            };
            let (kind, bytes) = if name == "model.embed_tokens.weight" {
                (8, q8(&weights))
            } else {
                (0, weights.iter().flat_map(|w| w.to_le_bytes()).collect())
            };
            (translated(name), (shape.clone(), kind, bytes))
        });
        Gguf { version: 3, values, tensors: tensors.collect() }
    }

    /// The file of these bytes, whose values are of the kinds of [`Value`] and whose tensors are floats.
    ///
    /// # Panics
    /// If it is no such file.
    pub fn parse(file: &[u8]) -> Self {
        let mut rest = file.strip_prefix(b"GGUF").unwrap();
        let mut read = Read(&mut rest);
        let (version, tensors, values) = (read.u32(), read.u64(), read.u64());
        let values = (0..values).map(|_| (read.text(), read.value())).collect();
        let places: Vec<_> = (0..tensors)
            .map(|_| {
                let name = read.text();
                let sides = read.u32();
                let mut shape: Vec<usize> = (0..sides).map(|_| read.u64() as usize).collect();
                shape.reverse();
                (name, shape, read.u32(), read.u64() as usize)
            })
            .collect();
        let data = (file.len() - rest.len()).next_multiple_of(32);
        let tensor = |(name, shape, kind, offset): (String, Vec<usize>, u32, usize)| {
            assert_eq!(offset % 32, 0, "{name}");
            let size = match kind {
                0 => 4,
                1 | 30 => 2,
                other => panic!("{name} is of the type {other}"),
            };
            let bytes = file[data + offset..][..shape.iter().product::<usize>() * size].to_vec();
            (name, (shape, kind, bytes))
        };
        Gguf { version, values, tensors: places.into_iter().map(tensor).collect() }
    }

    /// The numbers of a tensor of floats.
    ///
    /// # Panics
    /// If there is none of that name.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let (_, kind, bytes) = &self.tensors[name];
        match kind {
            0 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            1 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        }
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        fn put(out: &mut Vec<u8>, text: &str) {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        }
        fn list(out: &mut Vec<u8>, kind: u32, len: usize) {
            out.extend(9u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        }
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            put(&mut out, key);
            let mut scalar = |kind: u32, bytes: &[u8]| {
                out.extend(kind.to_le_bytes());
                out.extend(bytes);
            };
            match value {
                Value::U32(n) => scalar(4, &n.to_le_bytes()),
                Value::F32(n) => scalar(6, &n.to_le_bytes()),
                Value::Bool(b) => scalar(7, &[u8::from(*b)]),
                Value::Text(text) => {
                    scalar(8, &[]);
                    put(&mut out, text);
                }
                Value::Texts(texts) => {
                    list(&mut out, 8, texts.len());
                    texts.iter().for_each(|t| put(&mut out, t));
                }
                Value::I32s(numbers) => {
                    list(&mut out, 5, numbers.len());
                    numbers.iter().for_each(|n| out.extend(n.to_le_bytes()));
                }
                Value::F32s(numbers) => {
                    list(&mut out, 6, numbers.len());
                    numbers.iter().for_each(|n| out.extend(n.to_le_bytes()));
                }
            }
        }
        let mut offset = 0u64;
        for (name, (shape, kind, bytes)) in &self.tensors {
            put(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|n| out.extend((*n as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (bytes.len() as u64).next_multiple_of(32);
        }
        for (_, _, bytes) in self.tensors.values() {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }
}

/// What is left of a file.
struct Read<'a, 'b>(&'a mut &'b [u8]);

impl Read<'_, '_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (bytes, rest) = self.0.split_first_chunk().unwrap();
        *self.0 = rest;
        *bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    fn text(&mut self) -> String {
        let (text, rest) = self.0.split_at(u64::from_le_bytes(*self.0.first_chunk().unwrap()) as usize + 8);
        *self.0 = rest;
        String::from_utf8(text[8..].to_vec()).unwrap()
    }

    fn value(&mut self) -> Value {
        match self.u32() {
            4 => Value::U32(self.u32()),
            6 => Value::F32(f32::from_le_bytes(self.bytes())),
            7 => Value::Bool(self.bytes() == [1]),
            8 => Value::Text(self.text()),
            9 => {
                let (kind, count) = (self.u32(), self.u64());
                match kind {
                    5 => Value::I32s((0..count).map(|_| i32::from_le_bytes(self.bytes())).collect()),
                    6 => Value::F32s((0..count).map(|_| f32::from_le_bytes(self.bytes())).collect()),
                    8 => Value::Texts((0..count).map(|_| self.text()).collect()),
                    other => panic!("a list of values of the kind {other}"),
                }
            }
            other => panic!("a value of the kind {other}"),
        }
    }
}

/// The architecture's key, and those of the tokenizer of bytes.
pub(crate) fn byte_vocabulary(prefix: &str) -> impl Iterator<Item = (String, Value)> {
    let text = |text: &str| Value::Text(text.to_owned());
    let tokens = byte_tokens();
    [
        ("general.architecture", text(prefix)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        ("tokenizer.ggml.token_type", Value::I32s(vec![1; tokens.len()])),
        ("tokenizer.ggml.tokens", Value::Texts(tokens)),
        ("tokenizer.ggml.merges", Value::Texts(Vec::new())),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into_iter()
}

/// Rounds weights below 2 to what Q8_0 blocks of scale 1/64 hold.
pub fn snap(weights: &mut [f32]) {
    weights.iter_mut().for_each(|w| *w = (*w * 64.0).round() / 64.0);
}

/// Blocks of Q8_0 of scale 1/64.
pub fn q8(weights: &[f32]) -> Vec<u8> {
    let block = |w: &[f32]| -> Vec<u8> {
        let bytes = w.iter().map(|w| (w * 64.0) as i8 as u8);
        f16::from_f32(1.0 / 64.0).to_le_bytes().into_iter().chain(bytes).collect()
    };
    weights.chunks(32).flat_map(block).collect()
}

/// Rows of a head's halves by turns: as llama.cpp's converter permutes them.
pub(crate) fn interleaved(weights: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (cols, dim) = (weights.len() / rows, rows / heads);
    let from = |row: usize| row / dim * dim + row % 2 * (dim / 2) + row % dim / 2;
    (0..rows).flat_map(|row| weights[from(row) * cols..][..cols].iter().copied()).collect()
}

fn translated(name: &str) -> String {
    [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]
    .iter()
    .fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Writes `file` into `dir`, and gives its path.
pub fn write(dir: &Path, file: &Gguf) -> PathBuf {
    let path = dir.join("m.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    path
}
