//! A model of random bits, made on the device or as a checkpoint: every pattern of bits is a matrix.

use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use qp_codegen::ir::Elem;
use qp_codegen::layout::Packed;
use qp_codegen::spec::{Quantizer, Shape};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::check::synthetic::Random;
use crate::checkpoint::weights::{Planned, SHARD_BYTES};
use crate::checkpoint::{self, Begin, Draft, Head, LayerEntry, Manifest, ModelId, SpecEntry, reader::tensor_names};
use crate::cli::Error;
use crate::codec::scale_count;
use crate::device::ops::DeviceMatrix;
use crate::device::{DeviceError, Executor};
use crate::engine::cuda::layout::{Form, Layout, Stored};
use crate::engine::cuda::matrix::{Floats, Matrix};

/// Random words, of which matrices repeat parts.
pub struct Noise {
    words: Vec<u32>,
    /// Floats of small magnitude, as `bf16`.
    floats: Vec<bf16>,
}

/// Words of noise. A prime, so that rows of a matrix do not repeat each other.
const WORDS: usize = 4_194_301;
/// Floats of noise.
const FLOATS: usize = 1_048_573;

impl Noise {
    /// Always the same.
    pub fn new() -> Noise {
        let mut random = Random::of("noise");
        let words = (0..WORDS).map(|_| random.word()).collect();
        let floats = (0..FLOATS).map(|_| bf16::from_f32(random.value() * 0.05)).collect();
        Noise { words, floats }
    }

    /// A matrix of a layout.
    ///
    /// # Errors
    /// A full GPU.
    pub fn matrix(&self, on: &Executor, layout: &Layout, stored: &Stored) -> Result<Matrix, DeviceError> {
        let len = stored.shape.len() as usize;
        Ok(match &stored.form {
            Form::Packed(_) | Form::Shared => {
                let q = &layout.specs[stored.spec];
                let matrix = DeviceMatrix::repeating(on, q, stored.shape, &self.words, scale(stored.shape))?;
                Matrix::Packed(Arc::new(matrix))
            }
            Form::Grouped(_) => Matrix::zeroed(on, layout, stored)?,
            Form::Dense(elem) => Matrix::Dense(Arc::new(match elem {
                Elem::F16 => {
                    let halves: Vec<f16> = self.floats.iter().map(|v| f16::from_f32(v.to_f32())).collect();
                    Floats::F16(on.repeating(&halves, len)?)
                }
                Elem::BF16 => Floats::Bf16(on.repeating(&self.floats, len)?),
                _ => {
                    let floats: Vec<f32> = self.floats.iter().map(|v| v.to_f32()).collect();
                    Floats::F32(on.repeating(&floats, len)?)
                }
            })),
        })
    }

    /// Writes a checkpoint of a model with these `config.json` and layout.
    ///
    /// # Errors
    /// A folder that exists, a full disk.
    pub fn save(&self, dir: &Path, config: &str, layout: &Layout) -> Result<(), Error> {
        let program = &layout.program;
        let (mut items, mut entries, mut plan) = (Vec::new(), Vec::new(), Vec::new());
        let mut specs: Vec<Arc<Quantizer>> = Vec::new();
        for id in program.ids() {
            let layer = program.layer(id);
            let stored = &layout.matrices[layout.matrix_of[id.0]];
            // A layer that shares another's matrix has none of its own.
            if !stored.layers.contains(&id) {
                continue;
            }
            let shape = Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
            match &stored.form {
                Form::Packed(q) => {
                    let [packed, scales] = tensor_names(&layer.name);
                    let words = Packed::new(q, shape).words();
                    items.push((
                        layer.name.clone(),
                        vec![
                            Planned { name: packed, dtype: Dtype::U32, shape: vec![words] },
                            Planned { name: scales, dtype: Dtype::BF16, shape: vec![scale_count(q, shape)] },
                        ],
                    ));
                    plan.push((layer.name.clone(), format!("{} {}", q.name, q.hash())));
                    let (name, spec) = (layer.name.clone(), q.name.clone());
                    entries.push(LayerEntry {
                        name,
                        spec,
                        layout: None,
                        rows: shape.rows,
                        cols: shape.cols,
                        error: 0.0,
                    });
                    if !specs.iter().any(|s| s.name == q.name) {
                        specs.push(q.clone());
                    }
                }
                Form::Grouped(_) | Form::Dense(_) | Form::Shared => {
                    let name = format!("{}.weight", layer.name);
                    let shape = vec![layer.rows, layer.cols];
                    items.push((name.clone(), vec![Planned { name, dtype: Dtype::BF16, shape }]));
                }
            }
            if layer.bias {
                let name = format!("{}.bias", layer.name);
                items.push((name.clone(), vec![Planned { name, dtype: Dtype::BF16, shape: vec![layer.rows] }]));
            }
        }
        for v in &program.vectors {
            let planned = Planned { name: v.tensor.clone(), dtype: Dtype::BF16, shape: vec![v.len] };
            items.push((v.tensor.clone(), vec![planned]));
        }
        let model = checkpoint::sha256(config.as_bytes());
        let head = Head::new(model.clone(), SHARD_BYTES, plan, Vec::new());
        let mut draft = Draft::begin(dir, &head, items.clone(), Begin::default())?;
        for (name, tensors) in &items {
            let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| self.bytes(t)).collect();
            let parts: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
            draft.put(name, &parts, None)?;
        }
        let mut written = Vec::new();
        for q in &specs {
            let file = format!("specs/{}.qspec", q.name);
            draft.put_file(&file, q.canonical().as_bytes())?;
            written.push(SpecEntry { name: q.name.clone(), file, hash: q.hash() });
        }
        draft.put_file("config.json", config.as_bytes())?;
        draft.put_file("tokenizer.json", tokenizer(program.vocab).as_bytes())?;
        draft.finish(Manifest {
            format: head.format,
            tool: head.tool,
            model: ModelId { sha256: model },
            source: None,
            calibration: None,
            specs: written,
            layers: entries,
            groups: Vec::new(),
            tensors: Vec::new(),
            files: Vec::new(),
        })?;
        Ok(())
    }

    /// The bytes of a tensor: noise, but for scales, norms and biases.
    fn bytes(&self, tensor: &Planned) -> Vec<u8> {
        let len: usize = tensor.shape.iter().product();
        let repeated = |of: &[u8], bytes: usize| of.iter().copied().cycle().take(bytes).collect();
        match (tensor.dtype, tensor.shape.len()) {
            (Dtype::U32, _) => repeated(bytemuck::cast_slice(&self.words), 4 * len),
            (_, 2) => repeated(bytemuck::cast_slice(&self.floats), 2 * len),
            _ => {
                let value = if tensor.name.ends_with(".scales") { SCALE } else { bf16::ONE };
                repeated(&value.to_le_bytes(), 2 * len)
            }
        }
    }
}

/// A `tokenizer.json` of so many tokens: one a byte, and names that no text is cut into. With it a saved model can be served,
/// and a prompt has as many tokens as bytes.
fn tokenizer(tokens: usize) -> String {
    let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    bytes.sort_unstable();
    let names = bytes.into_iter().map(String::from).chain((256..).map(|i| format!("<{i}>")));
    let vocab: Map<String, Value> = names.take(tokens).enumerate().map(|(i, name)| (name, i.into())).collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
    .to_string()
}

/// Scale of the rows of a saved matrix.
const SCALE: bf16 = bf16::from_f32_const(0.015_625);

/// One that keeps products about as large as what they are made of.
fn scale(shape: Shape) -> bf16 {
    bf16::from_f32(1.0 / (shape.cols as f32).sqrt())
}
