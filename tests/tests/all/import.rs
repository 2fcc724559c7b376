//! GGUF files taken as they are, run, and given back byte for byte.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use qp_codegen::formats;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::spec::Shape;
use qp_runtime::checkpoint::{Begin, Checkpoint, sha256};
use qp_runtime::device::Executor;
use qp_runtime::engine::{self, CudaEngine, Logits, Room, Session};
use qp_runtime::import::{Float, export, import, write_out};
use qp_runtime::model::{Dtype, Model, Weight};
use qp_runtime::plan::Plan;
use qp_runtime::quantize::{Job, Silent};
use qp_tests::gguf::{Gguf, snap, write};
use qp_tests::models::{RandomModel, assert_near, logits, write_spec};

/// Blocks of a type, with tame scales: random bytes, but for the half-precision numbers.
fn blocks(name: &str, rows: usize, cols: usize, seed: u32) -> Vec<u8> {
    let format = formats::get(name).unwrap();
    let book = Arc::new(Book::new(format.clone()));
    let shape = Shape { rows: rows as u32, cols: cols as u32 };
    let reader = Reader::new(&book, format.layout("gguf").unwrap(), shape).unwrap();
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let mut random = || {
        x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
        (x >> 16) as u8
    };
    let mut bytes: Vec<u8> = (0..reader.tensors()[0].bytes).map(|_| random()).collect();
    let spec = &format.layout("gguf").unwrap().tensors[0];
    for block in bytes.chunks_exact_mut(spec.element_bits() as usize / 8) {
        for (m, (_, ty, _)) in spec.members.iter().enumerate() {
            let at = spec.member_at(m) as usize / 8;
            match ty.text().as_str() {
                "f16" => block[at..at + 2].copy_from_slice(&f16::from_f32(0.003).to_le_bytes()),
                // The power of two of MXFP4.
                _ if name == "mxfp4" && m == 0 => block[at] = 118 + block[at] % 3,
                _ => (),
            }
        }
    }
    bytes
}

/// A file of many types, with a tensor that no engine reads.
fn file() -> Gguf {
    let mut model = RandomModel::new("LlamaForCausalLM");
    snap(&mut model.tensors.get_mut("model.embed_tokens.weight").unwrap().1);
    let mut file = Gguf::of(&model, "llama", true);
    let types = [("q4_0", 2), ("q4_1", 3), ("q5_0", 6), ("q5_1", 7), ("q8_0", 8), ("iq4_nl", 20), ("mxfp4", 39)];
    let names: Vec<String> =
        file.tensors.keys().filter(|n| n.contains("attn_") || n.contains("ffn_")).cloned().collect();
    for (i, name) in names.iter().filter(|n| !n.contains("norm")).enumerate() {
        let (shape, kind, bytes) = file.tensors.get_mut(name).unwrap();
        let (ty, code) = types[i % types.len()];
        (*kind, *bytes) = (code, blocks(ty, shape[0], shape[1], i as u32));
    }
    let factors = (vec![4], 0, [1f32; 4].iter().flat_map(|x| x.to_le_bytes()).collect());
    file.tensors.insert("rope_freqs.weight".to_owned(), factors);
    file
}

#[test]
fn a_file_moves_in_runs_and_moves_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &file());
    let out = dir.path().join("out");
    let manifest = import(&path, &out, Begin::default(), &mut |_, _, _| ()).unwrap();
    // 14 layers of two blocks, and the embedding.
    assert_eq!((manifest.format, manifest.layers.len()), (2, 15));
    assert_eq!(manifest.source.as_ref().unwrap().files[0].name, "m.gguf");
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert!(checkpoint.verify(&mut |_| ()).is_ok());
    let of_format = |w: &Weight| matches!(w, Weight::Dense(t) if matches!(t.dtype, Dtype::Format(_)));
    let model = Model::open(&out).unwrap();
    assert_eq!(model.weights.layers().iter().filter(|l| of_format(&l.weight)).count(), 15);
    assert_eq!(logits(model), logits(Model::open(&path).unwrap()));
    let back = dir.path().join("back");
    let paths = export(&out, &back, false, &mut |_, _, _| ()).unwrap();
    assert_eq!(paths, [back.join("m.gguf")]);
    assert!(std::fs::read(&paths[0]).unwrap() == std::fs::read(&path).unwrap(), "not the same bytes");
    // What is there is not replaced unless that is asked for.
    let error = export(&out, &back, false, &mut |_, _, _| ()).unwrap_err().to_string();
    assert!(error.ends_with("m.gguf: exists; --force replaces it"), "{error}");
    export(&out, &back, true, &mut |_, _, _| ()).unwrap();
    // The same file makes the same checkpoint.
    let again = dir.path().join("again");
    assert_eq!(import(&path, &again, Begin::default(), &mut |_, _, _| ()).unwrap(), manifest);
}

/// `tests/golden/format-2` was made by `qp import` in November 2026 of a file that the PyPI package `gguf` wrote.
#[test]
fn checkpoints_of_the_second_format_still_open() {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/format-2"));
    Checkpoint::open(dir).unwrap().verify(&mut |_| ()).unwrap();
    let model = Model::open(dir).unwrap_or_else(|e| panic!("{e}"));
    let mut decoded = Vec::new();
    for layer in model.weights.layers() {
        let mut floats = vec![0f32; layer.rows * layer.cols];
        let Weight::Dense(tensor) = &layer.weight else { panic!("a layer of a format") };
        tensor.read(0, &mut floats);
        decoded.extend(floats.into_iter().flat_map(f32::to_le_bytes));
    }
    assert_eq!(sha256(&decoded), "f539d2591cfe30e2a3cd15eacbebb2a3004d8298e01e00c40f01cb46afd63003");
    let back = tempfile::tempdir().unwrap();
    let paths = export(dir, back.path(), false, &mut |_, _, _| ()).unwrap();
    let source = std::fs::read(&paths[0]).unwrap();
    assert_eq!(sha256(&source), "5c77ec7eec4f36a3de1e30aa3510e44e197a9e2d64589958146a0f2ea8f5e975");
}

#[test]
fn what_cannot_be_taken_or_given_back_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = |path: &Path| {
        let error = import(path, &out, Begin::default(), &mut |_, _, _| ()).unwrap_err().to_string();
        assert!(!out.exists());
        error.replace(&dir.path().display().to_string(), "DIR")
    };
    let path = write(dir.path(), &file());
    let whole = std::fs::read(&path).unwrap();
    // Bytes of no tensor.
    std::fs::write(&path, [&whole[..], &[0, 0, 7]].concat()).unwrap();
    let error = refused(&path);
    assert!(error.starts_with("DIR/m.gguf: bytes ") && error.ends_with("could not be given back"), "{error}");
    // Zeros are given back.
    let longer = [&whole[..], &[0; 45]].concat();
    std::fs::write(&path, &longer).unwrap();
    import(&path, &out, Begin::default(), &mut |_, _, _| ()).unwrap();
    let paths = export(&out, dir.path(), true, &mut |_, _, _| ()).unwrap();
    assert!(std::fs::read(&paths[0]).unwrap() == longer);
    // A scale that is no number.
    let mut bad = file();
    let (_, _, bytes) = bad.tensors.get_mut("blk.0.attn_k.weight").unwrap();
    bytes[..2].copy_from_slice(&f16::NAN.to_le_bytes());
    let path = write(dir.path(), &bad);
    std::fs::remove_dir_all(&out).unwrap();
    assert!(refused(&path).contains("self_attn.k_proj.weight' has"), "{}", refused(&path));
    // A directory, and what was quantized here.
    let model = RandomModel::new("LlamaForCausalLM");
    let plain = dir.path().join("plain");
    std::fs::create_dir_all(&plain).unwrap();
    model.write(&plain);
    assert!(refused(&plain).contains("is not quantized: GGUF files are imported"));
    let spec = write_spec(dir.path(), "small", 3).display().to_string();
    let quantized = dir.path().join("quantized");
    Job::new(&plain, Plan::uniform(&spec), &quantized).run(&Silent).unwrap();
    assert!(refused(&quantized).contains("is a checkpoint of qp already"));
    let error = export(&quantized, dir.path(), true, &mut |_, _, _| ()).unwrap_err().to_string();
    assert!(error.contains("was not imported"), "{error}");
}

#[test]
fn damage_is_found_before_a_file_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &file());
    let out = dir.path().join("out");
    import(&path, &out, Begin::default(), &mut |_, _, _| ()).unwrap();
    let weights = out.join("weights-00001.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 70;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let back = dir.path().join("back");
    let error = export(&out, &back, false, &mut |_, _, _| ()).unwrap_err().to_string();
    assert!(error.contains("weights-00001.safetensors"), "{error}");
    assert_eq!(std::fs::read_dir(&back).unwrap().count(), 0);
}

/// A model whose layers are GPTQ's int4 with groups of 32 columns, and the same model with their weights written out.
fn gptq(dir: &Path) -> (PathBuf, PathBuf) {
    let mut model = RandomModel::new("LlamaForCausalLM");
    let (quantized, plain) = (dir.join("quantized"), dir.join("plain"));
    let format = formats::get("gptq_int4_g32").unwrap();
    let book = Arc::new(Book::new(format.clone()));
    let (mut x, mut tensors) = (1u32, Vec::new());
    for (name, (shape, weights)) in model.tensors.iter_mut().filter(|t| t.0.contains("_proj")) {
        let (rows, cols) = (shape[0], shape[1]);
        let mut random = |n: usize| -> Vec<u8> {
            let mut next = || {
                x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
                (x >> 16) as u8
            };
            (0..n).map(|_| next()).collect()
        };
        let scales: Vec<u8> =
            random(rows * cols / 32).iter().flat_map(|b| f16::from_f32(f32::from(*b) / 9e3).to_le_bytes()).collect();
        let (words, zeros) = (random(rows * cols / 2), random(rows * cols / 64));
        let reader = Reader::new(&book, format.layout("gptq").unwrap(), Shape { rows: rows as u32, cols: cols as u32 });
        let reader = reader.unwrap();
        for (row, out) in weights.chunks_exact_mut(cols).enumerate() {
            reader.read(&[&words, &zeros, &scales], row as u32, 0, out);
        }
        // By hand, the published way: words of eight codes along columns, zeros less one along rows.
        let word = |b: &[u8], i: usize| u32::from_le_bytes(b[4 * i..4 * i + 4].try_into().unwrap());
        for (r, c) in [(0, 0), (rows - 1, cols - 1), (5, 17)] {
            let q = word(&words, c / 8 * rows + r) >> (4 * (c % 8)) & 15;
            let z = ((word(&zeros, (c / 32 * rows + r) / 8) >> (4 * (r % 8)) & 15) + 1) & 15;
            let at = 2 * (c / 32 * rows + r);
            let s = f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32();
            assert_eq!(weights[r * cols + c], (q as f32 - z as f32) * s);
        }
        let layer = name.trim_end_matches(".weight");
        let groups = (0..cols as u32).flat_map(|c| (c / 32).to_le_bytes()).collect();
        let i32s = safetensors::Dtype::I32;
        tensors.push((format!("{layer}.qweight"), i32s, vec![cols / 8, rows], words));
        tensors.push((format!("{layer}.qzeros"), i32s, vec![cols / 32, rows / 8], zeros));
        tensors.push((format!("{layer}.scales"), safetensors::Dtype::F16, vec![cols / 32, rows], scales));
        tensors.push((format!("{layer}.g_idx"), i32s, vec![cols], groups));
    }
    let config =
        serde_json::json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": false, "sym": false});
    write_both(&plain, &quantized, model, config, tensors);
    (quantized, plain)
}

/// A model whose layers are EXL3's, of several codebooks and rates, and the same model with their weights written out.
fn exl3(dir: &Path) -> (PathBuf, PathBuf) {
    let mut model = RandomModel::sized("LlamaForCausalLM", 128, 256, 64);
    let (quantized, plain) = (dir.join("quantized"), dir.join("plain"));
    let (mut x, mut tensors) = (3u32, Vec::new());
    for (n, (name, (shape, weights))) in model.tensors.iter_mut().filter(|t| t.0.contains("_proj")).enumerate() {
        let (rows, cols, k) = (shape[0], shape[1], 1 + n % 8);
        let (codebook, multiplier) = [("mul1", 0x83DC_D12Du32), ("mcg", 0xCBAC_1FED), ("3inst", 0)][n % 3];
        let format = formats::get(&format!("exl3_{codebook}_{k}")).unwrap();
        let shape = Shape { rows: rows as u32, cols: cols as u32 };
        let book = Arc::new(Book::new(format.clone()));
        let reader = Reader::new(&book, format.layout("exl3").unwrap(), shape).unwrap();
        let mut next = || {
            x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
            (x >> 16) as u8
        };
        let trellis: Vec<u8> = (0..rows * cols * k / 8).map(|_| next()).collect();
        let mut factors = |count: usize, size: f32| -> Vec<u8> {
            let one = |b: u8| f16::from_f32(size * (f32::from(b) - 127.5) / 128.0);
            (0..count).flat_map(|_| one(next()).to_le_bytes()).collect()
        };
        let (su, sv) = (factors(cols, 1.0), factors(rows, 0.2));
        reader.read_rows(&[&trellis, &su, &sv], 0, weights);
        let layer = name.trim_end_matches(".weight");
        let (i16s, f16s) = (safetensors::Dtype::I16, safetensors::Dtype::F16);
        tensors.push((format!("{layer}.trellis"), i16s, vec![cols / 16, rows / 16, 16 * k], trellis));
        tensors.push((format!("{layer}.suh"), f16s, vec![cols], su));
        tensors.push((format!("{layer}.svh"), f16s, vec![rows], sv));
        if multiplier > 0 {
            let mark =
                (format!("{layer}.{codebook}"), safetensors::Dtype::I32, vec![], multiplier.to_le_bytes().to_vec());
            tensors.push(mark);
        }
    }
    let config = serde_json::json!({"quant_method": "exl3", "version": "0.0.1", "bits": 3.0, "head_bits": 6});
    write_both(&plain, &quantized, model, config, tensors);
    (quantized, plain)
}

#[test]
fn a_directory_of_exl3_runs_moves_in_and_moves_out() {
    let dir = tempfile::tempdir().unwrap();
    let (quantized, plain) = exl3(dir.path());
    // Activations are rounded before exact products, and are not where weights are floats.
    let model = Model::open(&quantized).unwrap();
    // The first five tokens are the same.
    let found = on_device(&model).0;
    let expected = logits(model);
    assert_eq!(found, expected[..found.len()]);
    assert_near(&expected, &logits(Model::open(&plain).unwrap()));
    let out = dir.path().join("out");
    let manifest = import(&quantized, &out, Begin::default(), &mut |_, _, _| ()).unwrap();
    let specs: Vec<&str> = manifest.layers.iter().map(|l| l.spec.as_str()).collect();
    assert_eq!((specs.len(), &specs[..4]), (14, &["exl3_mul1_1", "exl3_mcg_2", "exl3_3inst_3", "exl3_mul1_4"][..]));
    assert_eq!(logits(Model::open(&out).unwrap()), expected);
    let paths = export(&out, &dir.path().join("back"), false, &mut |_, _, _| ()).unwrap();
    let path = quantized.join("model.safetensors");
    let mut original = std::fs::read(&path).unwrap();
    assert!(std::fs::read(&paths[0]).unwrap() == original, "not the same bytes");
    // A multiplier that is no codebook's.
    let mark = original.windows(4).rposition(|b| b == 0xCBAC_1FEDu32.to_le_bytes()).unwrap();
    original[mark] ^= 1;
    std::fs::write(&path, original).unwrap();
    let error = Model::open(&quantized).unwrap_err().to_string();
    assert!(error.contains(".mcg' is not 0xcbac1fed"), "{error}");
}

/// A tensor of a file: name, type, shape and bytes.
pub type Raw = (String, safetensors::Dtype, Vec<usize>, Vec<u8>);

/// Writes `model`, and the same with `tensors` in place of its layers, which `config` is about.
pub fn write_both(
    plain: &Path,
    quantized: &Path,
    mut model: RandomModel,
    config: serde_json::Value,
    tensors: Vec<Raw>,
) {
    std::fs::create_dir_all(plain).unwrap();
    model.write(plain);
    model.tensors.retain(|name, _| !name.contains("_proj"));
    write_with(quantized, model, config, tensors);
}

/// Writes `model` with further `tensors`, which `config` is about.
pub fn write_with(quantized: &Path, mut model: RandomModel, config: serde_json::Value, tensors: Vec<Raw>) {
    std::fs::create_dir_all(quantized).unwrap();
    model.config["quantization_config"] = config;
    model.write(quantized);
    // What the model has besides, and the quantized matrices, in one file.
    let path = quantized.join("model.safetensors");
    let old = std::fs::read(&path).unwrap();
    let rest = safetensors::SafeTensors::deserialize(&old).unwrap();
    let views =
        tensors.iter().map(|(n, d, s, b)| (n.clone(), safetensors::tensor::TensorView::new(*d, s.clone(), b).unwrap()));
    let all: Vec<_> = rest.tensors().into_iter().chain(views).collect();
    std::fs::write(&path, safetensors::serialize(all, None).unwrap()).unwrap();
}

/// A model whose layers are FP8 with one scale each, or one for each block that `config` says, called `scale`, and the same model
/// with their weights written out.
fn fp8(dir: &Path, scale: &str, in_half: bool, config: serde_json::Value) -> (PathBuf, PathBuf) {
    let block = config["weight_block_size"].as_array().cloned();
    let block = block.map(|sides| [0, 1].map(|i| sides[i].as_u64().unwrap() as usize));
    let mut model = RandomModel::new("LlamaForCausalLM");
    let (quantized, plain) = (dir.join("quantized"), dir.join("plain"));
    let (mut x, mut tensors) = (7u32, Vec::new());
    for (name, (shape, weights)) in model.tensors.iter_mut().filter(|t| t.0.contains("_proj")) {
        let mut next = || {
            x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
            (x >> 16) as u8
        };
        // All numbers up to 30, but for the two codes that are none.
        let codes: Vec<u8> = weights.iter().map(|_| next() & 0xDF).collect();
        let [r, c] = block.unwrap_or([shape[0], shape[1]]);
        let across = shape[1].div_ceil(c);
        let count = shape[0].div_ceil(r) * across;
        let factors: Vec<_> = (0..count).map(|_| half::bf16::from_f32(f32::from(1 + next() % 7) / 200.0)).collect();
        for (i, (w, code)) in weights.iter_mut().zip(&codes).enumerate() {
            let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
            let size = if exponent == 0 { mantissa / 64.0 } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
            let factor = factors[i / shape[1] / r * across + i % shape[1] / c].to_f32();
            *w = if code & 0x80 == 0 { size } else { -size } * factor;
        }
        let layer = name.trim_end_matches(".weight");
        tensors.push((name.clone(), safetensors::Dtype::F8_E4M3, shape.clone(), codes));
        let (dtype, bytes) = match in_half {
            true => (safetensors::Dtype::BF16, factors.iter().flat_map(|f| f.to_le_bytes()).collect()),
            false => {
                (safetensors::Dtype::F32, factors.iter().flat_map(|f| f.to_f32().to_le_bytes()).collect::<Vec<_>>())
            }
        };
        let sides = match block {
            Some(_) => vec![count / across, across],
            None if in_half => vec![],
            None => vec![1],
        };
        tensors.push((format!("{layer}.{scale}"), dtype, sides, bytes.clone()));
        if block.is_none() {
            tensors.push((format!("{layer}.input_scale"), dtype, vec![], bytes));
        }
    }
    write_both(&plain, &quantized, model, config, tensors);
    (quantized, plain)
}

#[test]
fn fp8_runs_moves_in_and_moves_out() {
    let group = serde_json::json!({"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}});
    let compressed = serde_json::json!({
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group},
    });
    let fine = serde_json::json!({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": null});
    let optimizer = serde_json::json!({"quant_method": "modelopt", "quant_algo": "FP8"});
    let blocks = |sides: [u32; 2]| serde_json::json!({"quant_method": "fp8", "weight_block_size": sides});
    for (config, scale, in_half, spec) in [
        (&compressed, "weight_scale", false, "fp8_tensor"),
        (&compressed, "weight_scale", true, "fp8_tensor_bf16"),
        (&fine, "weight_scale_inv", true, "fp8_tensor_bf16"),
        (&fine, "weight_scale", false, "fp8_tensor"),
        (&optimizer, "weight_scale", false, "fp8_tensor"),
        // The last blocks of rows and columns are smaller.
        (&blocks([40, 48]), "weight_scale_inv", false, "fp8_40_48"),
        (&blocks([24, 32]), "weight_scale_inv", true, "fp8_bf16_24_32"),
        (&blocks([128, 128]), "weight_scale_inv", false, "fp8_128"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (quantized, plain) = fp8(dir.path(), scale, in_half, config.clone());
        let model = Model::open(&quantized).unwrap();
        let beside = model.notes.iter().any(|n| n.contains("14 scales of activations are not used"));
        assert_eq!(beside, spec.starts_with("fp8_tensor"), "{:?}", model.notes);
        let expected = logits(model);
        // Products of a format are exact, with rounded activations.
        assert_near(&expected, &logits(Model::open(&plain).unwrap()));
        let out = dir.path().join("out");
        let manifest = import(&quantized, &out, Begin::default(), &mut |_, _, _| ()).unwrap();
        assert_eq!((manifest.layers.len(), manifest.layers[0].spec.as_str()), (14, spec));
        assert_eq!(logits(Model::open(&out).unwrap()), expected);
        let paths = export(&out, &dir.path().join("back"), false, &mut |_, _, _| ()).unwrap();
        let original = std::fs::read(quantized.join("model.safetensors")).unwrap();
        assert!(std::fs::read(&paths[0]).unwrap() == original, "not the same bytes");
    }
    // A scale that is called otherwise than config.json's method calls it is not ignored.
    let dir = tempfile::tempdir().unwrap();
    let (quantized, _) = fp8(dir.path(), "weight_scale_inv", false, optimizer);
    let error = Model::open(&quantized).unwrap_err().to_string();
    assert!(error.contains("F8_E4M3"), "{error}");
}

#[test]
fn a_directory_of_gptq_runs_moves_in_and_moves_out() {
    let dir = tempfile::tempdir().unwrap();
    let (quantized, plain) = gptq(dir.path());
    // Activations are rounded before exact products, and are not where weights are floats.
    let expected = logits(Model::open(&quantized).unwrap());
    let size = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    for (exact, plain) in expected.iter().zip(logits(Model::open(&plain).unwrap())) {
        assert!((exact - plain).abs() < 2e-3 * size, "{exact}, with plain weights {plain}");
    }
    let out = dir.path().join("out");
    let manifest = import(&quantized, &out, Begin::default(), &mut |_, _, _| ()).unwrap();
    assert_eq!((manifest.layers.len(), manifest.layers[0].spec.as_str()), (14, "gptq_int4_g32"));
    assert_eq!(logits(Model::open(&out).unwrap()), expected);
    let paths = export(&out, &dir.path().join("back"), false, &mut |_, _, _| ()).unwrap();
    let original = std::fs::read(quantized.join("model.safetensors")).unwrap();
    assert!(std::fs::read(&paths[0]).unwrap() == original, "not the same bytes");
}

/// Changes the manifest of a checkpoint and seals it again, as anybody can.
fn forge(dir: &Path, change: impl Fn(&str) -> String) {
    let path = dir.join("qp.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let body = change(text.rsplit_once(",\n  \"seal\"").expect("a seal").0);
    let seal = sha256(body.as_bytes());
    std::fs::write(path, format!("{body},\n  \"seal\": \"{seal}\"\n}}\n")).unwrap();
}

/// All files below a folder.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn nothing_is_read_or_written_elsewhere_whatever_a_manifest_says() {
    let root = tempfile::tempdir().unwrap();
    let (checkpoint, out) = (root.path().join("checkpoint"), root.path().join("out"));
    let absolute = root.path().join("absolute.gguf").display().to_string();
    let model = write(root.path(), &file());
    std::fs::copy(&model, root.path().join("other.header")).unwrap();
    let (name, _) = import(&model, &checkpoint, Begin::default(), &mut |_, _, _| ())
        .map(|m| m.source.unwrap().files.remove(0))
        .map(|f| (f.name, f.header))
        .unwrap();
    let before = std::fs::read_to_string(checkpoint.join("qp.json")).unwrap();
    let there = files_below(root.path());
    for (from, to) in [
        (format!("\"name\": \"{name}\""), "\"name\": \"../evil.gguf\"".to_owned()),
        (format!("\"name\": \"{name}\""), format!("\"name\": \"{absolute}\"")),
        (format!("\"name\": \"{name}\""), "\"name\": \"..\"".to_owned()),
        (format!("\"name\": \"{name}\""), "\"name\": \"a\\u001bb\"".to_owned()),
        ("\"header\": \"source/".to_owned() + &name + ".header\"", "\"header\": \"../other.header\"".to_owned()),
    ] {
        std::fs::write(checkpoint.join("qp.json"), &before).unwrap();
        forge(&checkpoint, |body| body.replace(&from, &to));
        for force in [false, true] {
            let error = export(&checkpoint, &out, force, &mut |_, _, _| ()).unwrap_err().to_string();
            assert!(error.contains("no name of a file in a folder") || error.contains("has no file"), "{to}: {error}");
        }
        assert_eq!(files_below(root.path()), there, "{to}");
    }
}

#[test]
fn files_beside_what_is_written_stay() {
    let root = tempfile::tempdir().unwrap();
    let (checkpoint, out) = (root.path().join("checkpoint"), root.path().join("out"));
    let model = write(root.path(), &file());
    import(&model, &checkpoint, Begin::default(), &mut |_, _, _| ()).unwrap();
    std::fs::create_dir(&out).unwrap();
    let name = model.file_name().unwrap().to_str().unwrap();
    let beside = [format!("{name}.partial"), "model.safetensors.partial".to_owned(), "config.json.partial".to_owned()];
    beside.iter().for_each(|name| std::fs::write(out.join(name), "precious").unwrap());
    export(&checkpoint, &out, false, &mut |_, _, _| ()).unwrap();
    write_out(&checkpoint, &out, Float::F32, false, &mut |_, _, _| ()).unwrap();
    assert!(std::fs::read(out.join(name)).unwrap() == std::fs::read(&model).unwrap());
    assert!(beside.iter().all(|name| std::fs::read(out.join(name)).unwrap() == b"precious"));
}

/// Logits of a model on the interpreter in the place of a GPU, of all tokens at once and then of a few more.
fn on_device(model: &Model) -> (Vec<f32>, Vec<f32>) {
    let engine = CudaEngine::new(Executor::interpreter(), &model.weights, Room::one(16)).unwrap();
    both(&mut Session::new(Box::new(engine)))
}

fn both(session: &mut Session) -> (Vec<f32>, Vec<f32>) {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    session.forward(&[3, 200, 77, 5, 5], Logits::All, &mut first).unwrap();
    session.forward(&[130], Logits::All, &mut second).unwrap();
    (first, second)
}

#[test]
fn a_device_gives_the_bits_of_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let (quantized, _) = gptq(dir.path());
    for path in [write(dir.path(), &file()), quantized] {
        let model = Model::open(&path).unwrap();
        let exact = model.weights.layers().iter().filter(|l| l.weight.dense().is_some_and(|t| t.exact().is_some()));
        assert!(exact.count() >= 14, "{}", path.display());
        let mut cpu = engine::open(None, &Arc::new(model.weights.clone()), 16).unwrap();
        let (expected, found) = (both(&mut cpu), on_device(&model));
        assert_eq!(found.0, expected.0, "{}", path.display());
        assert_eq!(found.1, expected.1, "{}", path.display());
    }
}

#[test]
fn columns_ordered_by_activations_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (quantized, _) = gptq(dir.path());
    let path = quantized.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let place = {
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let groups = file.tensor("model.layers.0.mlp.up_proj.g_idx").unwrap();
        groups.data().as_ptr().addr() - bytes.as_ptr().addr()
    };
    bytes[place] = 1;
    std::fs::write(&path, bytes).unwrap();
    let error = Model::open(&quantized).unwrap_err().to_string();
    assert!(error.contains("g_idx' orders columns by activations"), "{error}");
}
