//! Small random model directories.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qp_runtime::engine::{self, Logits};
use qp_runtime::model::Model;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};

/// A model to be written: its `config.json` and tensors, which a test may change before [`RandomModel::write`].
#[derive(Clone, Debug)]
pub struct RandomModel {
    /// `config.json`.
    pub config: Value,
    /// Name → shape and `f32` values.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

/// Tokens of [`RandomModel`]: the bytes, so that its tokenizer is trivial.
pub const VOCAB: usize = 256;

impl RandomModel {
    /// Two layers, hidden 64, feed-forward 96, 4 heads of 8 (so heads · width ≠ hidden), 2 key/value heads, untied;
    /// with biases of q, k and v if the architecture is `Qwen2ForCausalLM`, with norms of heads if `Qwen3ForCausalLM`.
    pub fn new(architecture: &str) -> Self {
        Self::sized(architecture, 64, 96, 8)
    }

    /// As [`RandomModel::new`], with other sizes of hidden, feed-forward and head.
    pub fn sized(architecture: &str, hidden: usize, inner: usize, head: usize) -> Self {
        let config = json!({
            "architectures": [architecture], "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head, "vocab_size": VOCAB,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "hidden_act": "silu",
            "tie_word_embeddings": false,
        });
        let mut model = RandomModel { config, tensors: BTreeMap::new() };
        let mut random = Random(1);
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            model.random(&mut random, name, &[VOCAB, hidden]);
        }
        model.random(&mut random, "model.norm.weight", &[hidden]);
        for i in 0..2 {
            let bias = architecture == "Qwen2ForCausalLM";
            for (name, rows, cols, bias) in [
                ("self_attn.q_proj", 4 * head, hidden, bias),
                ("self_attn.k_proj", 2 * head, hidden, bias),
                ("self_attn.v_proj", 2 * head, hidden, bias),
                ("self_attn.o_proj", hidden, 4 * head, false),
                ("mlp.gate_proj", inner, hidden, false),
                ("mlp.up_proj", inner, hidden, false),
                ("mlp.down_proj", hidden, inner, false),
            ] {
                model.random(&mut random, &format!("model.layers.{i}.{name}.weight"), &[rows, cols]);
                if bias {
                    model.random(&mut random, &format!("model.layers.{i}.{name}.bias"), &[rows]);
                }
            }
            for name in ["input_layernorm", "post_attention_layernorm"] {
                model.random(&mut random, &format!("model.layers.{i}.{name}.weight"), &[hidden]);
            }
            for name in ["q_norm", "k_norm"].iter().filter(|_| architecture == "Qwen3ForCausalLM") {
                model.random(&mut random, &format!("model.layers.{i}.self_attn.{name}.weight"), &[head]);
            }
        }
        model
    }

    /// A Ministral 3 with a context of 128 tokens, stretched from 64, beyond which scores grow.
    pub fn ministral3() -> Self {
        let mut model = Self::sized("Ministral3ForCausalLM", 64, 96, 16);
        model.config["rope_parameters"] = json!({
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        });
        model
    }

    /// Random biases for the layers of `kind`, such as `self_attn.o_proj`, in both blocks.
    pub fn bias(&mut self, kind: &str) {
        for i in 0..2 {
            let name = format!("model.layers.{i}.{kind}");
            let rows = self.tensors[&format!("{name}.weight")].0[0];
            self.random(&mut Random(rows as u64), &format!("{name}.bias"), &[rows]);
        }
    }

    fn random(&mut self, random: &mut Random, name: &str, shape: &[usize]) {
        let values = (0..shape.iter().product()).map(|_| random.next() * 0.4).collect();
        self.tensors.insert(name.to_owned(), (shape.to_vec(), values));
    }

    /// Writes config, tensors and a tokenizer of single bytes to `dir`.
    pub fn write(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(dir.join("tokenizer.json"), byte_tokenizer().to_string()).unwrap();
        let bytes: Vec<Vec<u8>> =
            self.tensors.values().map(|(_, v)| v.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        let views = self.tensors.iter().zip(&bytes).map(|((name, (shape, _)), bytes)| {
            (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    }
}

/// Writes `NAME.qspec` to `dir`: a trellis of 2^6 windows with a table of its own, quick to encode with.
pub fn write_spec(dir: &Path, name: &str, bits: u32) -> PathBuf {
    let text = format!(
        "quantizer {name} {{\n    window 6\n    vector 1\n    step   {bits}\n    block  2 x 128\n    values i8 + 1/2\n    \
         unit   1/8\n    table  t[16] = [-17, -12, -9, -7, -5, -4, -3, -1, 0, 2, 3, 4, 6, 8, 11, 16]\n    \
         decode w {{ t[(w * 37) >> 1] }}\n    scale  row\n    rotate hadamard(seed = 0)\n}}\n"
    );
    let path = dir.join(format!("{name}.qspec"));
    std::fs::write(&path, text).unwrap();
    path
}

/// Byte-level tokenizers' names of the bytes: a printable character itself, else one from U+0100 up.
pub fn byte_tokens() -> Vec<String> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    let name = |b: u32| {
        let code = if printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap().to_string()
    };
    (0..256u32).map(name).collect()
}

/// A `tokenizer.json` whose token `b` is the byte `b`.
fn byte_tokenizer() -> Value {
    let vocab: serde_json::Map<String, Value> =
        byte_tokens().into_iter().enumerate().map(|(b, name)| (name, json!(b))).collect();
    let level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    })
}

/// Uniform in −1..1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        ((self.0 >> 40) as f32) / (1 << 23) as f32 - 1.0
    }
}

/// Logits of a few tokens, one after the other, on the CPU: tokens × vocabulary.
pub fn logits(model: Model) -> Vec<f32> {
    let mut engine = engine::open(None, &Arc::new(model.weights), 16).unwrap();
    let mut out = Vec::new();
    engine.forward(&[3, 200, 77, 5, 5, 130, 9], Logits::All, &mut out).unwrap();
    out
}

/// Panics if logits differ by more than activations rounded to 15 bits account for.
pub fn assert_near(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let off = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(off < 2e-3 * largest, "{off} of {largest}");
}
