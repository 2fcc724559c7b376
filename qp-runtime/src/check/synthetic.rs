//! Made-up matrices and models: every pattern of bits is a matrix, so nothing needs to be encoded.

use std::path::Path;
use std::sync::Arc;

use half::bf16;
use qp_codegen::layout::Packed;
use qp_codegen::spec::{Quantizer, Shape};

use crate::codec::{PackedMatrix, scale_count};
use crate::model::weights::EMBEDDING;
use crate::model::{Config, Error, Program, Source, Tensor, Weight, Weights, arch};

/// Pseudo-random numbers (SplitMix64), the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of a name.
    pub fn of(name: &str) -> Random {
        Random(name.bytes().fold(7, |s: u64, b| s.wrapping_mul(0x0100_0000_01B3).wrapping_add(b.into())))
    }

    /// 32 bits.
    pub fn word(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z >> 32) as u32
    }

    /// In −1..1.
    pub fn value(&mut self) -> f32 {
        (self.word() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `n` values in −`most`..`most`.
    pub fn values(&mut self, n: usize, most: f32) -> Vec<f32> {
        (0..n).map(|_| self.value() * most).collect()
    }
}

/// `q` with random tables where it is untrained.
pub fn trained(mut q: Quantizer) -> Quantizer {
    for (i, code) in q.codes.iter_mut().enumerate() {
        let (_, most) = code.value.range();
        for table in code.tables.iter_mut().filter(|t| t.values.is_empty()) {
            let mut random = Random::of(&format!("{} {i} {}", q.name, table.name));
            let values = random.values((table.entries * code.vector) as usize, most as f32);
            table.values = values.iter().map(|v| *v as i16).collect();
        }
    }
    q
}

/// A random `shape` matrix of `q`, whose tables must be filled.
pub fn matrix(name: &str, q: &Quantizer, shape: Shape) -> PackedMatrix {
    let mut random = Random::of(name);
    let words = (0..Packed::new(q, shape).words()).map(|_| random.word()).collect();
    let scales = random.values(scale_count(q, shape), 0.1).iter().map(|v| bf16::from_f32(0.15 + v)).collect();
    PackedMatrix::from_parts(q, shape, words, scales).expect("made to measure")
}

/// A small random model.
#[derive(Clone, Copy, Debug)]
pub struct Shapes {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub inner: usize,
    /// Query heads; half as many of keys and values.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens known.
    pub vocab: usize,
    /// Longest context.
    pub context: usize,
    /// Biases everywhere.
    pub biased: bool,
    /// The head is the embedding.
    pub tied: bool,
    /// Experts in place of the feed-forward layers.
    pub experts: Option<Mixture>,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug)]
pub struct Mixture {
    /// The architecture, by its name in `config.json`.
    pub architecture: &'static str,
    /// Experts.
    pub count: usize,
    /// Those that a token goes through.
    pub chosen: usize,
}

/// Its configuration, and weights quantized by what `choose` gives for the name of each layer.
///
/// # Errors
/// Shapes that no configuration may have.
pub fn model(shapes: &Shapes, choose: &dyn Fn(&str) -> Option<Quantizer>) -> Result<(Config, Weights), Error> {
    let Shapes { hidden, inner, heads, head_dim, vocab, context, biased, tied, experts } = shapes;
    let architecture = experts.map_or("LlamaForCausalLM", |e| e.architecture);
    let experts = experts.map_or_else(String::new, |Mixture { architecture, count, chosen }| {
        let (key, more) = match architecture {
            "Glm4MoeForCausalLM" => ("n_routed_experts", r#""first_k_dense_replace":0,"routed_scaling_factor":1.5,"#),
            "Qwen3MoeForCausalLM" => ("num_experts", r#""norm_topk_prob":true,"#),
            _ => ("num_local_experts", ""),
        };
        let width = if more.is_empty() { String::new() } else { format!(r#""moe_intermediate_size":{inner},"#) };
        format!(r#""{key}":{count},"num_experts_per_tok":{chosen},{more}{width}"#)
    });
    let text = format!(
        r#"{{"architectures":["{architecture}"],{experts}"hidden_size":{hidden},"intermediate_size":{inner},
        "num_hidden_layers":2,"num_attention_heads":{heads},"num_key_value_heads":{},"head_dim":{head_dim},
        "vocab_size":{vocab},"rms_norm_eps":1e-5,"max_position_embeddings":{context},"rope_theta":10000.0,
        "attention_bias":{biased},"mlp_bias":{biased},"tie_word_embeddings":{tied}}}"#,
        heads / 2,
    );
    let config = Config::parse(Path::new("config.json"), &text)?;
    let program = Arc::new(arch::program(&config));
    let weights = Weights::load(&program, &Synthetic { program: &program, choose })?;
    Ok((config, weights))
}

struct Synthetic<'a> {
    program: &'a Program,
    choose: &'a dyn Fn(&str) -> Option<Quantizer>,
}

impl Source for Synthetic<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        let vector = self.program.vectors.iter().find(|v| v.tensor == name).map(|v| v.len);
        let bias = || name.strip_suffix(".bias").and_then(|layer| self.program.named(layer));
        let len = vector.or_else(|| bias().map(|id| self.program.layer(id).rows));
        Ok(tensor(name, &[len.expect("a tensor of the program")], 1.0))
    }

    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, Error> {
        Ok(match (self.choose)(name) {
            None => Weight::Dense(tensor(name, &[rows, cols], if name == EMBEDDING { 1.0 } else { 0.2 })),
            Some(quantizer) => {
                let matrix = matrix(name, &quantizer, Shape { rows: rows as u32, cols: cols as u32 });
                Weight::Quantized { quantizer: Arc::new(quantizer), matrix: Arc::new(matrix) }
            }
        })
    }

    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn is_quantized(&self, name: &str) -> bool {
        (self.choose)(name).is_some()
    }
}

fn tensor(name: &str, shape: &[usize], most: f32) -> Tensor {
    let values = Random::of(name).values(shape.iter().product(), most);
    Tensor::from_f32(shape, &values).expect("as many values as the shape says")
}
