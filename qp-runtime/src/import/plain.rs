//! A checkpoint's weights written out: a model directory that any program of Hugging Face's reads.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use qp_codegen::output::{self, Whole};
use qp_codegen::reference::Rotator;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::Value;

use super::export::check_kind;
use super::{Error, Progress, no_checkpoint};
use crate::checkpoint::reader::tensor_names;
use crate::checkpoint::weights::{Planned, SHARD_BYTES, layout};
use crate::checkpoint::{Checkpoint, hugging};
use crate::codec::Decoder;
use crate::model::weights::{EMBEDDING, HEAD, Source};
use crate::model::{self, tensors::Bytes};
use crate::quantize::COPIED;

/// The type of weights that are written out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Float {
    /// bfloat16
    Bf16,
    /// 16-bit IEEE float
    F16,
    /// 32-bit float: every bit that the checkpoint's weights have
    F32,
}

impl Float {
    fn dtype(self) -> Dtype {
        match self {
            Float::Bf16 => Dtype::BF16,
            Float::F16 => Dtype::F16,
            Float::F32 => Dtype::F32,
        }
    }

    /// Its name in `config.json`.
    fn name(self) -> &'static str {
        match self {
            Float::Bf16 => "bfloat16",
            Float::F16 => "float16",
            Float::F32 => "float32",
        }
    }

    /// The nearest numbers of the type.
    ///
    /// # Errors
    /// The first number that is beyond the type's largest, or is none.
    fn bytes(self, values: &[f32]) -> Result<Vec<u8>, f32> {
        let bytes = match self {
            Float::Bf16 => values.par_iter().flat_map_iter(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Float::F16 => values.par_iter().flat_map_iter(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Float::F32 => values.par_iter().flat_map_iter(|v| v.to_le_bytes()).collect(),
        };
        let is_finite = |v: f32| match self {
            Float::Bf16 => bf16::from_f32(v).is_finite(),
            Float::F16 => f16::from_f32(v).is_finite(),
            Float::F32 => v.is_finite(),
        };
        values.par_iter().find_first(|v| !is_finite(**v)).map_or(Ok(bytes), |v| Err(*v))
    }
}

/// Writes the model of the checkpoint `dir` into the folder `out`, the weights of its layers as floats of `ty`, all else as it
/// is. Returns the paths of the weight files. `config.json` comes last: without it the folder is no model yet.
///
/// # Errors
/// If the checkpoint is damaged, a file exists and `force` is not given or cannot be written, or a weight is beyond the
/// type's largest number.
pub fn write_out(
    dir: &Path,
    out: &Path,
    ty: Float,
    force: bool,
    progress: &mut Progress<'_>,
) -> Result<Vec<PathBuf>, Error> {
    no_checkpoint(out)?;
    check_kind(out, false)?;
    let checkpoint = Checkpoint::open(dir)?;
    let items = items(&checkpoint, ty)?;
    let planned: Vec<Vec<Planned>> = items.iter().map(|i| vec![i.1.clone()]).collect();
    let shards = layout(&planned, SHARD_BYTES);
    let count = shards.len();
    let file = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    let mut files: Vec<String> = (0..count).map(file).collect();
    files.extend((count > 1).then(|| hugging::INDEX.to_owned()));
    let copied: Vec<&str> = COPIED.into_iter().filter(|name| dir.join(name).exists()).collect();
    let all = || files.iter().map(String::as_str).chain(copied.iter().copied()).map(|name| out.join(name));
    if let Some(there) = all().find(|path| path.exists() && !force) {
        return Err(Error::refused(&there, "exists; --force replaces it"));
    }
    let failed = |path: &Path, source| Error::Write { path: path.to_owned(), source };
    let (mut done, total) = (0, items.len());
    let mut paths = Vec::new();
    for (shard, name) in shards.iter().zip(&files) {
        let path = out.join(name);
        let mut whole = Whole::create(&path).map_err(|e| failed(&path, e))?;
        let mut to = BufWriter::with_capacity(1 << 20, whole.file());
        to.write_all(&shard.header).map_err(|e| failed(&path, e))?;
        for (tensor, _) in &shard.tensors {
            progress(&tensor.name, done, total);
            done += 1;
            let (source, _) = &items[items.partition_point(|i| i.1.name < tensor.name)];
            let bytes = read(&checkpoint, source, &tensor.name, ty)?;
            to.write_all(bytes.as_slice()).map_err(|e| failed(&path, e))?;
        }
        to.flush().map_err(|e| failed(&path, e))?;
        drop(to);
        whole.keep().map_err(|e| failed(&path, e))?;
        paths.push(path);
    }
    let put = |name: &str, bytes: &[u8]| output::write(&out.join(name), bytes).map_err(|e| failed(&out.join(name), e));
    if count > 1 {
        let of = |(shard, file)| {
            let tensors: &Vec<(Planned, u64)> = shard;
            tensors.iter().map(move |(t, _)| (t.name.as_str(), file, t.bytes()))
        };
        let files = files.iter().map(String::as_str);
        put(hugging::INDEX, &hugging::index(shards.iter().map(|s| &s.tensors).zip(files).flat_map(of)))?;
    }
    for name in copied.iter().rev() {
        let path = dir.join(name);
        let text = std::fs::read(&path).map_err(|e| model::Error::io(&path, e))?;
        put(name, &if *name == "config.json" { config(&text, &checkpoint, ty) } else { text })?;
    }
    Ok(paths)
}

/// Where a tensor's numbers come from.
enum Origin {
    /// The layer, without `.weight`.
    Layer(String),
    /// The tensor as it is.
    Tensor,
}

/// All tensors that are written, by name.
fn items(checkpoint: &Checkpoint, ty: Float) -> Result<Vec<(Origin, Planned)>, Error> {
    let mut items = Vec::new();
    let mut inside: Vec<String> = Vec::new();
    for layer in &checkpoint.manifest().layers {
        inside.extend(checkpoint.tensors_of(&layer.name).into_iter().chain(tensor_names(&layer.name)));
        let shape = vec![layer.rows as usize, layer.cols as usize];
        let planned = Planned { name: format!("{}.weight", layer.name), dtype: ty.dtype(), shape };
        items.push((Origin::Layer(layer.name.clone()), planned));
    }
    inside.sort_unstable();
    for tensor in &checkpoint.manifest().tensors {
        if inside.binary_search(&tensor.name).is_err() {
            let planned = Planned { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() };
            items.push((Origin::Tensor, planned));
        }
    }
    items.sort_by(|a, b| a.1.name.cmp(&b.1.name));
    Ok(items)
}

/// The bytes of a tensor.
fn read(checkpoint: &Checkpoint, from: &Origin, tensor: &str, ty: Float) -> Result<Bytes, Error> {
    let Origin::Layer(name) = from else { return Ok(checkpoint.bytes(tensor)?) };
    let weights = match checkpoint.of_format(name)? {
        Some(matrix) => matrix.to_f32(),
        None => {
            let (q, matrix) = checkpoint.linear(name)?;
            let mut weights = Decoder::new(&q).weights(&matrix);
            let columns = matrix.layout.shape.cols;
            let back = Rotator::inverse(q.rotation, columns);
            weights.par_chunks_exact_mut(columns as usize).for_each(|row| back.apply(row));
            weights
        }
    };
    let bytes = ty.bytes(&weights).map_err(|value| {
        let why = format!("layer '{name}' has the weight {value}, which is beyond {}: choose another type", ty.name());
        Error::refused(checkpoint.dir(), why)
    })?;
    Ok(bytes.into())
}

/// The text of `config.json` of a model that is not quantized; as it was if it is no JSON object.
fn config(text: &[u8], checkpoint: &Checkpoint, ty: Float) -> Vec<u8> {
    let Ok(Value::Object(mut config)) = serde_json::from_slice::<Value>(text) else { return text.to_vec() };
    config.shift_remove("quantization_config");
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(key.to_owned(), ty.name().into());
    if let Some(Value::Object(part)) = config.get_mut("text_config") {
        part.shift_remove("quantization_config");
    }
    // An output layer of its own is the model's, whatever it was before.
    let has = |layer: &str| checkpoint.layer(layer).is_some() || checkpoint.contains(&format!("{layer}.weight"));
    if has(HEAD) && has(EMBEDDING) {
        config.insert("tie_word_embeddings".to_owned(), false.into());
    }
    let mut out = serde_json::to_vec_pretty(&config).unwrap_or_else(|_| text.to_vec());
    out.push(b'\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_a_type_are_named() {
        assert_eq!(Float::F16.bytes(&[1.0, 7e4]), Err(7e4));
        assert_eq!(Float::Bf16.bytes(&[1.0]), Ok(vec![0x80, 0x3f]));
        assert_eq!(Float::F32.bytes(&[f32::MAX]), Ok(f32::MAX.to_le_bytes().to_vec()));
    }
}
