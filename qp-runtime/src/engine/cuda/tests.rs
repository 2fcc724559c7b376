//! The engine on the interpreter against the engine on the CPU.

use std::path::Path;
use std::sync::Arc;

use half::bf16;
use qp_codegen::ir::interpret::Options;
use qp_codegen::layout::Packed;
use qp_codegen::palette;
use qp_codegen::spec::{Quantizer, Shape};

use super::*;
use crate::codec::{PackedMatrix, scale_count};
use crate::engine::CpuEngine;
use crate::model::{Source, Tensor};

const VOCAB: usize = 50;

fn config(biased: bool, tied: bool) -> Config {
    let text = format!(
        r#"{{"architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,"vocab_size":{VOCAB},"rms_norm_eps":1e-5,
        "max_position_embeddings":64,"rope_theta":10000.0,"attention_bias":{biased},"mlp_bias":{biased},
        "tie_word_embeddings":{tied}}}"#
    );
    Config::parse(Path::new("config.json"), &text).unwrap()
}

/// Random tensors, and layers quantized by what the function says.
struct Random<F>(F);

/// `n` values in −1..1, by name.
fn values(name: &str, n: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(7u64, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

impl<F: Fn(&str) -> Option<Quantizer>> Source for Random<F> {
    fn tensor(&self, name: &str) -> Result<Tensor, crate::model::Error> {
        let (hidden, inner) = (64, 96);
        let shape = match name {
            _ if name.ends_with("norm.weight") => vec![hidden],
            _ if name.ends_with("embed_tokens.weight") => vec![VOCAB, hidden],
            _ if name.ends_with("gate_proj.bias") || name.ends_with("up_proj.bias") => vec![inner],
            _ if name.ends_with("k_proj.bias") || name.ends_with("v_proj.bias") => vec![32],
            _ => vec![hidden],
        };
        let values = values(name, shape.iter().product());
        Ok(Tensor::from_f32(&shape, &values).unwrap())
    }

    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, crate::model::Error> {
        let Some(quantizer) = self.0(name) else {
            let values: Vec<f32> = values(name, rows * cols).iter().map(|v| v * 0.2).collect();
            return Ok(Weight::Dense(Tensor::from_f32(&[rows, cols], &values).unwrap()));
        };
        // Any words are a matrix.
        let shape = Shape { rows: rows as u32, cols: cols as u32 };
        let words = Packed::new(&quantizer, shape).words();
        let words = values(name, words).iter().map(|v| v.to_bits().wrapping_mul(0x9E37_79B1)).collect();
        let scales = values(name, scale_count(&quantizer, shape)).iter().map(|v| bf16::from_f32(v * 0.2)).collect();
        let matrix = PackedMatrix::from_parts(&quantizer, shape, words, scales).unwrap();
        Ok(Weight::Quantized { quantizer: Arc::new(quantizer), matrix: Arc::new(matrix) })
    }
}

/// Runs both engines over the same tokens, cut and resumed in the same ways, and gives the largest difference of a logit.
fn compare(config: &Config, source: &dyn Source, exact: bool) {
    let weights = Arc::new(Weights::load(config, source).unwrap());
    let on = Executor::interpreter_with(Options { races: true, reverse: true });
    let mut device = CudaEngine::new(on, config, &weights, 40).unwrap();
    let mut cpu = CpuEngine::new(config, weights, 40).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| i * 17 % VOCAB as u32).collect();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let plan = [(0, 13, Logits::All), (13, 14, Logits::Last), (14, 20, Logits::None), (20, 22, Logits::Last)];
    let resumed = [(10, 11, Logits::Last), (11, 40, Logits::Last)];
    for (from, to, logits) in plan.into_iter().chain(resumed) {
        device.truncate(from);
        cpu.truncate(from);
        device.forward(&tokens[from..to], logits, &mut a).unwrap();
        cpu.forward(&tokens[from..to], logits, &mut b).unwrap();
        assert_eq!(a.len(), b.len());
        assert_eq!(device.position(), to);
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            let near = if exact { a == b } else { (a - b).abs() < 2e-3 };
            assert!(near && b.is_finite(), "tokens {from}..{to}, logit {i}: {a} on the device, {b} on the CPU");
        }
    }
    assert!(matches!(device.forward(&[0], Logits::None, &mut a), Err(Error::Context { .. })));
    device.truncate(3);
    assert!(matches!(device.forward(&[99], Logits::None, &mut a), Err(Error::Token { .. })));
    assert_eq!(device.position(), 3);
}

#[test]
fn an_unquantized_model() {
    compare(&config(false, true), &Random(|_: &str| None), false);
}

#[test]
fn an_unquantized_model_with_biases_and_a_head_of_its_own() {
    compare(&config(true, false), &Random(|_: &str| None), false);
}

/// A quantizer of the palette with random tables: what they hold does not matter here.
fn member(name: &str) -> Option<Quantizer> {
    let mut quantizer = palette::get(name).unwrap_or_else(|| panic!("{name} is in the palette"));
    for code in &mut quantizer.codes {
        let (_, most) = code.value.range();
        for table in &mut code.tables {
            let n = (table.entries * code.vector) as usize;
            table.values = values(name, n).iter().map(|v| (v * most as f32) as i16).collect();
        }
    }
    Some(quantizer)
}

#[test]
fn a_quantized_model() {
    compare(&config(false, true), &Random(|_: &str| member("nuq_3")), false);
}

#[test]
fn a_mixed_model() {
    // Layers of one input with one quantizer, with several, and with none; a quantized head.
    let quantizer = |name: &str| match name {
        _ if name.ends_with("q_proj") || name.ends_with("v_proj") || name.ends_with("down_proj") => member("nuq_3"),
        _ if name.ends_with("k_proj") || name.contains("1.mlp.gate_proj") || name == "lm_head" => member("fast_2"),
        _ => None,
    };
    compare(&config(true, false), &Random(quantizer), false);
}
