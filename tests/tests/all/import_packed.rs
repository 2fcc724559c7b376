//! Directories of bitsandbytes, of compressed-tensors' packed integers and of gpt-oss: run, taken as they are, given back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;
use qp_runtime::checkpoint::{Begin, sha256};
use qp_runtime::device::Executor;
use qp_runtime::engine::{self, Logits};
use qp_runtime::import::{export, import};
use qp_runtime::model::Model;
use qp_tests::conformance::Case;
use qp_tests::models::{RandomModel, assert_near, logits};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::import::{Raw, write_both, write_with};

/// NF4's numbers, times 2^28.
const NF4: [i32; 16] = [
    -268435456, -186882832, -140948224, -106009856, -76354152, -49599740, -24441058, 0, 21362174, 43199372, 66065268,
    90708432, 118302144, 151026352, 194067248, 268435456,
];
/// FP4's, times 192.
const FP4: [i32; 16] = [0, 1, 128, 192, 64, 96, 32, 48, 0, -1, -128, -192, -64, -96, -32, -48];

/// Bytes of a linear congruential generator.
struct Random(u32);

impl Random {
    fn byte(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(1_103_515_245).wrapping_add(12345);
        (self.0 >> 16) as u8
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.byte()).collect()
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Directories of a model whose layers are bitsandbytes' `kind`, and of the same model with its weights written out.
pub fn bitsandbytes(dir: &Path, kind: &str, double: bool, change: impl Fn(&mut Value)) -> (PathBuf, PathBuf) {
    let mut model = RandomModel::new("LlamaForCausalLM");
    let (quantized, plain) = (dir.join("quantized"), dir.join("plain"));
    let (table, unit) = if kind == "nf4" { (NF4, 2f32.powi(28)) } else { (FP4, 192.0) };
    let entries = table.map(|i| i as f32 / unit);
    let levels: Vec<f32> = (0..256).map(|i| (i as f32 - 127.0) / 128.0).collect();
    let (mut random, mut tensors) = (Random(3), Vec::<Raw>::new());
    for (name, (shape, weights)) in model.tensors.iter_mut().filter(|t| t.0.contains("_proj")) {
        let n = weights.len();
        let codes = random.bytes(n / 2);
        let offset = 0.0625f32;
        let spans: Vec<f32> = (0..n.div_ceil(16384)).map(|_| f32::from(random.byte()) / 4096.0).collect();
        let peaks = random.bytes(n / 64);
        let magnitudes: Vec<f32> = peaks
            .iter()
            .enumerate()
            .map(|(i, p)| match double {
                true => levels[usize::from(*p)] * spans[i / 256] + offset,
                false => f32::from(*p) / 1024.0,
            })
            .collect();
        for (i, w) in weights.iter_mut().enumerate() {
            let code = codes[i / 2] >> (4 - 4 * (i % 2)) & 15;
            *w = entries[usize::from(code)] * magnitudes[i / 64];
        }
        let mut state = json!({"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": shape});
        if double {
            let more = json!({"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset});
            state.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        }
        change(&mut state);
        let state = state.to_string().into_bytes();
        let mut put = |what: &str, dtype, shape: Vec<usize>, bytes| {
            tensors.push((format!("{name}{what}"), dtype, shape, bytes));
        };
        put("", Dtype::U8, vec![n / 2, 1], codes);
        put(&format!(".quant_state.bitsandbytes__{kind}"), Dtype::U8, vec![state.len()], state);
        put(".quant_map", Dtype::F32, vec![16], floats(&entries));
        if double {
            put(".absmax", Dtype::U8, vec![n / 64], peaks);
            put(".nested_absmax", Dtype::F32, vec![spans.len()], floats(&spans));
            put(".nested_quant_map", Dtype::F32, vec![256], floats(&levels));
        } else {
            put(".absmax", Dtype::F32, vec![n / 64], floats(&magnitudes));
        }
    }
    let config = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "bfloat16",
    });
    write_both(&plain, &quantized, model, config, tensors);
    (quantized, plain)
}

/// Takes the directory as it is, runs it, and gives it back: the manifest's first spec.
fn there_and_back(dir: &Path, quantized: &Path, expected: &[f32]) -> String {
    let out = dir.join("out");
    let manifest = import(quantized, &out, Begin::default(), &mut |_, _, _| ()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(manifest.layers.len(), 14);
    assert_eq!(logits(Model::open(&out).unwrap()), expected);
    let paths = export(&out, &dir.join("back"), false, &mut |_, _, _| ()).unwrap();
    let original = std::fs::read(quantized.join("model.safetensors")).unwrap();
    assert_eq!(sha256(&std::fs::read(&paths[0]).unwrap()), sha256(&original));
    manifest.layers[0].spec.clone()
}

#[test]
fn bitsandbytes_runs_moves_in_and_moves_out() {
    for (kind, double) in [("nf4", false), ("nf4", true), ("fp4", false), ("fp4", true)] {
        let dir = tempfile::tempdir().unwrap();
        let (quantized, plain) = bitsandbytes(dir.path(), kind, double, |_| ());
        let expected = logits(Model::open(&quantized).unwrap());
        // Products of a format are exact, with rounded activations, or those of its weights.
        assert_near(&expected, &logits(Model::open(&plain).unwrap()));
        let spec = there_and_back(dir.path(), &quantized, &expected);
        assert_eq!(spec, format!("{kind}{}", if double { "_double" } else { "" }));
    }
}

#[test]
fn what_bitsandbytes_says_otherwise_is_refused() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let dir = tempfile::tempdir().unwrap();
        let (quantized, _) = bitsandbytes(dir.path(), "nf4", true, change);
        let error = Model::open(&quantized).unwrap_err().to_string();
        assert!(import(&quantized, &dir.path().join("out"), Begin::default(), &mut |_, _, _| ()).is_err());
        error
    };
    let error = refused(&|state| state["blocksize"] = json!(128));
    assert!(error.contains("says that its blocksize is 128, not 64"), "{error}");
    let error = refused(&|state| state["shape"] = json!([1, 2]));
    assert!(error.contains("says that its shape is [1,2], not ["), "{error}");
    let error = refused(&|state| state["nested_offset"] = json!("much"));
    assert!(error.contains("has no number `nested_offset`"), "{error}");
    // Another table of numbers.
    let dir = tempfile::tempdir().unwrap();
    let (quantized, _) = bitsandbytes(dir.path(), "nf4", false, |_| ());
    let path = quantized.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let place = {
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let map = file.tensor("model.layers.0.mlp.up_proj.weight.quant_map").unwrap();
        map.data().as_ptr().addr() - bytes.as_ptr().addr()
    };
    bytes[place] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = Model::open(&quantized).unwrap_err().to_string();
    assert!(error.contains("up_proj.weight.quant_map' holds other numbers than the codes of nf4"), "{error}");
}

/// Directories of a model whose layers are packed integers of 4 bits in groups of 32, and of the same with its weights
/// written out; scales in half precision or in bfloat16.
fn packed(dir: &Path, zeros: bool, in_half: bool) -> (PathBuf, PathBuf) {
    let mut model = RandomModel::new("LlamaForCausalLM");
    let (quantized, plain) = (dir.join("quantized"), dir.join("plain"));
    let (mut random, mut tensors) = (Random(5), Vec::<Raw>::new());
    for (name, (shape, weights)) in model.tensors.iter_mut().filter(|t| t.0.contains("_proj")) {
        let (rows, cols) = (shape[0], shape[1]);
        let groups = cols / 32;
        let (codes, stored_zeros) = (random.bytes(rows * cols / 2), random.bytes(rows * groups / 2));
        // Powers of two, which both types hold.
        let scales: Vec<f32> = (0..rows * groups).map(|_| 2f32.powi(-5 - i32::from(random.byte() % 4))).collect();
        let word = |b: &[u8], i: usize| u32::from_le_bytes(b[4 * i..4 * i + 4].try_into().unwrap());
        for (i, w) in weights.iter_mut().enumerate() {
            let (r, c) = (i / cols, i % cols);
            let code = word(&codes, r * cols / 8 + c / 8) >> (4 * (c % 8)) & 15;
            let zero = match zeros {
                true => word(&stored_zeros, r / 8 * groups + c / 32) >> (4 * (r % 8)) & 15,
                false => 8,
            };
            *w = (code as f32 - zero as f32) * scales[r * groups + c / 32];
        }
        let layer = name.trim_end_matches(".weight");
        let (dtype, scales): (_, Vec<u8>) = match in_half {
            true => (Dtype::F16, scales.iter().flat_map(|s| half::f16::from_f32(*s).to_le_bytes()).collect()),
            false => (Dtype::BF16, scales.iter().flat_map(|s| bf16::from_f32(*s).to_le_bytes()).collect()),
        };
        let sides = [rows, cols].iter().flat_map(|n| (*n as i64).to_le_bytes()).collect();
        tensors.push((format!("{layer}.weight_packed"), Dtype::I32, vec![rows, cols / 8], codes));
        tensors.push((format!("{layer}.weight_scale"), dtype, vec![rows, groups], scales));
        tensors.push((format!("{layer}.weight_shape"), Dtype::I64, vec![2], sides));
        if zeros {
            tensors.push((format!("{layer}.weight_zero_point"), Dtype::I32, vec![rows / 8, groups], stored_zeros));
        }
    }
    let weights = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": !zeros});
    let config = json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}}, "ignore": ["lm_head"],
    });
    write_both(&plain, &quantized, model, config, tensors);
    (quantized, plain)
}

#[test]
fn packed_integers_run_move_in_and_move_out() {
    for (zeros, in_half, name) in [
        (false, false, "packed_int4_g32"),
        (false, true, "packed_int4_g32_f16"),
        (true, false, "packed_zeros_int4_g32"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (quantized, plain) = packed(dir.path(), zeros, in_half);
        // Activations are rounded before exact products, and are not where weights are floats.
        let expected = logits(Model::open(&quantized).unwrap());
        let size = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (exact, plain) in expected.iter().zip(logits(Model::open(&plain).unwrap())) {
            assert!((exact - plain).abs() < 2e-3 * size, "{name}: {exact}, with plain weights {plain}");
        }
        assert_eq!(there_and_back(dir.path(), &quantized, &expected), name);
    }
}

#[test]
fn stacked_experts_in_mxfp4_move_in_and_out() {
    let dir = tempfile::tempdir().unwrap();
    let Case { mut model, prompt, .. } = Case::named("gpt-oss");
    let mut random = Random(9);
    let mut tensors = Vec::<Raw>::new();
    model.tensors.retain(|name, (shape, _)| {
        if !name.ends_with("experts.gate_up_proj") && !name.ends_with("experts.down_proj") {
            return true;
        }
        // Experts x columns x rows becomes experts x rows x groups of 32 columns.
        let (experts, rows, groups) = (shape[0], shape[2], shape[1] / 32);
        let blocks = random.bytes(experts * rows * groups * 16);
        let scales = (0..experts * rows * groups).map(|_| 118 + random.byte() % 4).collect();
        tensors.push((format!("{name}_blocks"), Dtype::U8, vec![experts, rows, groups, 16], blocks));
        tensors.push((format!("{name}_scales"), Dtype::U8, vec![experts, rows, groups], scales));
        false
    });
    let config = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    let quantized = dir.path().join("quantized");
    write_with(&quantized, model, config, tensors);
    let logits_on = |device: Option<&Executor>, path: &Path| {
        let model = Model::open(path).unwrap_or_else(|e| panic!("{e}"));
        let mut session = engine::open(device, &Arc::new(model.weights.clone()), prompt.len()).unwrap();
        let mut out = Vec::new();
        session.forward(&prompt, Logits::All, &mut out).unwrap();
        out
    };
    let logits = |path: &Path| logits_on(None, path);
    assert_eq!(logits_on(Some(&Executor::interpreter()), &quantized), logits(&quantized));
    let out = dir.path().join("out");
    let manifest = import(&quantized, &out, Begin::default(), &mut |_, _, _| ()).unwrap_or_else(|e| panic!("{e}"));
    // Three blocks of six experts with three matrices.
    assert_eq!((manifest.layers.len(), manifest.layers[0].spec.as_str()), (54, "mxfp4"));
    assert_eq!(logits(&out), logits(&quantized));
    let paths = export(&out, &dir.path().join("back"), false, &mut |_, _, _| ()).unwrap_or_else(|e| panic!("{e}"));
    let original = std::fs::read(quantized.join("model.safetensors")).unwrap();
    assert_eq!(sha256(&std::fs::read(&paths[0]).unwrap()), sha256(&original));
}
