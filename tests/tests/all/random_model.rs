//! Architectures and bad directories, on a small random model.

use std::sync::Arc;

use qp_codegen::reference;
use qp_codegen::spec::{Quantizer, Rotation, Shape, load_str};
use qp_runtime::codec::{decode_matrix, encode_matrix};
use qp_runtime::engine::{self, Logits};
use qp_runtime::model::{Model, Tensor, Weight, Weights, rope_tables};
use qp_tests::models::RandomModel;
use serde_json::json;

/// Logits of the last token, written as plainly as possible, in `f64`.
fn plain(m: &RandomModel, rope: &qp_runtime::model::RopeTables, tokens: &[u32]) -> Vec<f64> {
    let vector = |name: &str| -> Vec<f64> { m.tensors[name].1.iter().map(|&v| v.into()).collect() };
    let apply = |name: &str, x: &[f64]| -> Vec<f64> {
        let w = vector(&format!("{name}.weight"));
        let bias = m.tensors.get(&format!("{name}.bias"));
        let y = w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>());
        y.enumerate().map(|(i, y)| y + bias.map_or(0.0, |b| b.1[i].into())).collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        vector(name).iter().zip(x).map(|(w, v)| w * v / (mean + 1e-5).sqrt()).collect()
    };
    let turn = |x: &mut [f64], position: usize| {
        let (cos, sin) = rope.at(position);
        for head in x.chunks_exact_mut(8) {
            for i in 0..4 {
                let (a, b, c, s) = (head[i], head[i + 4], f64::from(cos[i]), f64::from(sin[i]));
                (head[i], head[i + 4]) = (a * c - b * s, a * s + b * c);
            }
        }
    };
    let embed = vector("model.embed_tokens.weight");
    let mut xs: Vec<Vec<f64>> = tokens.iter().map(|&t| embed[t as usize * 64..][..64].to_vec()).collect();
    for layer in 0..2 {
        let name = |n: &str| format!("model.layers.{layer}.{n}");
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (position, x) in xs.iter_mut().enumerate() {
            let h = norm(&name("input_layernorm.weight"), x);
            let mut q = apply(&name("self_attn.q_proj"), &h);
            let mut k = apply(&name("self_attn.k_proj"), &h);
            for (x, part) in [(&mut q, "self_attn.q_norm.weight"), (&mut k, "self_attn.k_norm.weight")] {
                if m.tensors.contains_key(&name(part)) {
                    *x = x.chunks_exact(8).flat_map(|head| norm(&name(part), head)).collect();
                }
                turn(x, position);
            }
            keys.push(k);
            values.push(apply(&name("self_attn.v_proj"), &h));
            let mut out = Vec::new();
            for head in 0..4 {
                let at = head / 2 * 8;
                let dot = |k: &Vec<f64>| (0..8).map(|i| q[head * 8 + i] * k[at + i]).sum::<f64>() / 8f64.sqrt();
                let weights: Vec<f64> = keys.iter().map(|k| dot(k).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend(
                    (0..8).map(|i| weights.iter().zip(&values).map(|(w, v)| w * v[at + i]).sum::<f64>() / total),
                );
            }
            let o = apply(&name("self_attn.o_proj"), &out);
            x.iter_mut().zip(o).for_each(|(x, o)| *x += o);
            let h = norm(&name("post_attention_layernorm.weight"), x);
            let (gate, up) = (apply(&name("mlp.gate_proj"), &h), apply(&name("mlp.up_proj"), &h));
            let act: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let down = apply(&name("mlp.down_proj"), &act);
            x.iter_mut().zip(down).for_each(|(x, d)| *x += d);
        }
    }
    let head = if m.config["tie_word_embeddings"] == json!(true) { "model.embed_tokens" } else { "lm_head" };
    apply(head, &norm("model.norm.weight", xs.last().unwrap()))
}

fn open(m: &RandomModel) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    m.write(dir.path());
    Model::open(dir.path()).map_err(|e| e.to_string().replace(&dir.path().display().to_string(), "DIR"))
}

fn check(m: &RandomModel) {
    let model = open(m).unwrap();
    let tokens: Vec<u32> = (0..23u32).map(|i| i * 91 % 256).collect();
    let expect = plain(m, &rope_tables(&model.weights.program.ropes[0], 23), &tokens);
    let mut engine = engine::open(None, &Arc::new(model.weights), 23).unwrap();
    let mut logits = Vec::new();
    // Many tokens, a few, one: each way of multiplying.
    for part in [&tokens[..19], &tokens[19..22], &tokens[22..]] {
        engine.forward(part, Logits::Last, &mut logits).unwrap();
    }
    assert_eq!(logits.len(), expect.len());
    for (i, (a, b)) in logits.iter().zip(&expect).enumerate() {
        assert!((f64::from(*a) - b).abs() < 1e-4, "logit {i}: {a}, expected {b}");
    }
}

#[test]
fn llama() {
    check(&RandomModel::new("LlamaForCausalLM"));
}

#[test]
fn llama_3_with_stretched_frequencies_and_tied_embeddings() {
    let mut m = RandomModel::new("LlamaForCausalLM");
    m.config["rope_scaling"] = json!({ "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64 });
    m.config["tie_word_embeddings"] = json!(true);
    m.tensors.remove("lm_head.weight");
    check(&m);
}

#[test]
fn qwen_2_with_biases() {
    check(&RandomModel::new("Qwen2ForCausalLM"));
}

#[test]
fn qwen_3_with_norms_of_heads() {
    check(&RandomModel::new("Qwen3ForCausalLM"));
}

#[test]
fn bytes_of_a_character_come_out_together() {
    let model = open(&RandomModel::new("LlamaForCausalLM")).unwrap();
    let prompt = model.tokenizer.encode("naïve ").unwrap();
    assert_eq!(prompt, "naïve ".bytes().map(u32::from).collect::<Vec<_>>());
    let mut stream = model.tokenizer.stream(&prompt);
    let parts: Vec<String> = "aé€!".bytes().map(|b| stream.push(b.into()).unwrap()).collect();
    assert_eq!(parts, ["a", "", "é", "", "", "€", "!"]);
    assert_eq!(stream.push(0xE2).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

#[test]
fn bad_directories() {
    let base = RandomModel::new("Qwen2ForCausalLM");
    let message = |change: &dyn Fn(&mut RandomModel)| {
        let mut m = base.clone();
        change(&mut m);
        open(&m).unwrap_err()
    };
    let q = "model.layers.1.self_attn.q_proj.weight";
    assert_eq!(
        message(&|m| drop(m.tensors.remove(q))),
        "tensor 'model.layers.1.self_attn.q_proj.weight' is missing from DIR"
    );
    assert_eq!(
        message(&|m| drop(m.tensors.remove("model.layers.0.self_attn.k_proj.bias"))),
        "tensor 'model.layers.0.self_attn.k_proj.bias' is missing from DIR"
    );
    assert_eq!(
        message(&|m| m.tensors.get_mut(q).unwrap().0 = vec![64, 32]),
        "tensor 'model.layers.1.self_attn.q_proj.weight' has shape [64, 32], but config.json makes it [32, 64]"
    );
    assert!(
        message(&|m| m.config["architectures"] = json!(["OPTForCausalLM"])).starts_with(
            "DIR/config.json: architecture OPTForCausalLM is not supported (supported: LlamaForCausalLM, "
        )
    );
    let dir = tempfile::tempdir().unwrap();
    let error = |path: &std::path::Path| Model::open(path).unwrap_err().to_string();
    assert!(error(&dir.path().join("none")).contains("none: No such file"));
    assert!(error(dir.path()).contains("holds neither model.safetensors nor"));
    base.write(dir.path());
    assert!(error(&dir.path().join("config.json")).contains("is not a directory"));
    std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    assert!(error(dir.path()).contains("tokenizer.json: "));
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(error(dir.path()).contains("tokenizer.json: not found"));
}

/// Replaces every linear layer of a decoder by its quantized form, and by what that form means, unrotated.
fn quantized(weights: &Weights, q: &Arc<Quantizer>) -> (Weights, Weights) {
    let (mut packed, mut plain) = (weights.clone(), weights.clone());
    for id in weights.program.ids().filter(|id| weights.program.in_block(*id)) {
        let layer = &weights[id];
        let mut values = layer.weight.dense().unwrap_or_else(|| panic!("{} is quantized", layer.name)).to_f32();
        values.chunks_exact_mut(layer.cols).for_each(|row| reference::rotate(q.rotation, row));
        let shape = Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
        let matrix = encode_matrix(q, shape, &values, &|_| ()).unwrap();
        let mut decoded = decode_matrix(q, &matrix);
        let error: f32 = decoded.iter().zip(&values).map(|(a, b)| (a - b).powi(2)).sum();
        let power: f32 = values.iter().map(|v| v.powi(2)).sum();
        assert!(error < 1e-3 * power, "{error} of {power}");
        decoded.chunks_exact_mut(layer.cols).for_each(|row| unrotate(q.rotation, row));
        packed[id].weight = Weight::Quantized { quantizer: q.clone(), matrix: Arc::new(matrix) };
        plain[id].weight = Weight::Dense(Tensor::from_f32(&[layer.rows, layer.cols], &decoded).unwrap());
    }
    (packed, plain)
}

/// The transpose of [`reference::rotate`], which is its inverse.
fn unrotate(rotation: Rotation, x: &mut [f32]) {
    let columns: Vec<Vec<f32>> = (0..x.len())
        .map(|i| {
            let mut unit = vec![0.0; x.len()];
            unit[i] = 1.0;
            reference::rotate(rotation, &mut unit);
            unit
        })
        .collect();
    let y = x.to_vec();
    for (x, column) in x.iter_mut().zip(columns) {
        *x = column.iter().zip(&y).map(|(a, b)| a * b).sum();
    }
}

#[test]
fn quantized_layers_compute_what_their_weights_say() {
    let table: Vec<String> = (-128..128).map(|v| v.to_string()).collect();
    for (rotation, values) in [("none", "i8 + 1/2"), ("hadamard(seed = 5)", "i8 + 1/2"), ("hadamard(seed = 5)", "i16")]
    {
        let text = format!(
            "quantizer uniform {{\n window 8\n vector 1\n step 8\n block 2 x 128\n values {values}\n unit 1/32\n \
             table t[256] = [{}]\n decode w {{ t[w] }}\n scale row\n rotate {rotation}\n}}\n",
            table.join(", ")
        );
        let library = load_str("uniform.qspec", &text).unwrap_or_else(|e| panic!("{e}"));
        let q = Arc::new(library.get("uniform").unwrap().clone());
        // With biases, and with columns (32, 64, 96) that fill no block.
        let model = open(&RandomModel::new("Qwen2ForCausalLM")).unwrap();
        let (packed, plain) = quantized(&model.weights, &q);
        let tokens: Vec<u32> = (0..20u32).map(|i| i * 91 % 256).collect();
        let run = |weights: Weights, parts: &[&[u32]]| {
            let mut engine = engine::open(None, &Arc::new(weights), 20).unwrap();
            let mut logits = Vec::new();
            parts.iter().for_each(|part| engine.forward(part, Logits::Last, &mut logits).unwrap());
            logits
        };
        let ours = run(packed.clone(), &[&tokens]);
        let exact = run(plain, &[&tokens]);
        let worst = ours.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let largest = exact.iter().fold(0f32, |m, v| m.max(v.abs()));
        // What is left is the rounding of activations to 15 bits.
        assert!(worst < 2e-3 * largest, "{rotation}: {worst} of {largest}");
        // Products are exact integers: batches change no bit.
        let singles: Vec<&[u32]> = tokens.chunks(1).collect();
        assert_eq!(run(packed, &singles), ours, "{rotation}");
    }
}
