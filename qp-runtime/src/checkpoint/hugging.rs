//! What lets other programs open a checkpoint, and a checkpoint be made of what they wrote.
//!
//! Transformers and vLLM look for two things: `quantization_config` in `config.json`, whose `quant_method` says who reads the
//! matrices, and `model.safetensors.index.json`, which says where each tensor lies. Neither says anything that `qp.json` does
//! not: they are made from what it is made from.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qp_codegen::layout::Packed;
use qp_codegen::output;
use qp_codegen::spec::{Quantizer, Shape};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::reader::tensor_names;
use super::{
    Error, FORMAT, FileEntry, LayerEntry, MANIFEST, Manifest, ModelId, SpecEntry, TensorEntry, blake3, hash_file,
    sha256,
};
use crate::codec::scale_count;
use crate::input;
use crate::model::{TensorDir, shards};
use crate::quantize::COPIED;

/// The value of `quant_method` in `config.json`'s `quantization_config`.
pub const METHOD: &str = "qp";
/// The file that says which tensor lies where.
pub const INDEX: &str = "model.safetensors.index.json";

/// The text of `config.json` with a `quantization_config` that says that this program quantized the model, in place of any
/// other; as it was if it is no JSON object.
pub fn config(text: &[u8]) -> Vec<u8> {
    let Ok(Value::Object(mut config)) = serde_json::from_slice::<Value>(text) else { return text.to_vec() };
    if let Some(Value::Object(part)) = config.get_mut("text_config") {
        part.shift_remove("quantization_config");
    }
    config.insert("quantization_config".to_owned(), json!({ "quant_method": METHOD }));
    let mut out = serde_json::to_vec_pretty(&config).unwrap_or_else(|_| text.to_vec());
    out.push(b'\n');
    out
}

/// The text of [`INDEX`]: for each tensor its file, and the bytes of all.
pub fn index<'a>(tensors: impl Iterator<Item = (&'a str, &'a str, u64)>) -> Vec<u8> {
    let (mut bytes, mut map) = (0, BTreeMap::new());
    for (name, file, size) in tensors {
        bytes += size;
        map.insert(name, file);
    }
    let map: Map<String, Value> = map.into_iter().map(|(name, file)| (name.to_owned(), file.into())).collect();
    let all = json!({ "metadata": { "total_size": bytes }, "weight_map": map });
    let mut out = serde_json::to_vec_pretty(&all).unwrap_or_default();
    out.push(b'\n');
    out
}

/// A quantized layer of a directory that another program wrote.
#[derive(Clone, Debug)]
pub struct Written {
    /// Name without `.weight`.
    pub name: String,
    /// Its quantizer.
    pub quantizer: Arc<Quantizer>,
    /// Rows × columns.
    pub shape: Shape,
    /// Σ (w − ŵ)² / Σ w².
    pub error: f64,
}

/// Makes a checkpoint of the model directory `dir`, whose weight files hold the two tensors of each of `layers` and the other
/// tensors of the model: writes the specs and the manifest beside them.
///
/// # Errors
/// If a layer's tensors are missing or have not the type and length that its quantizer gives them, two quantizers have one
/// name, or a file cannot be read or written. A manifest that was there stays until the new one is whole.
pub fn seal(dir: &Path, layers: &[Written]) -> Result<Manifest, Error> {
    let values = |e: crate::model::Error| Error::Values { path: dir.to_owned(), message: e.to_string() };
    let (mut tensors, mut sums) = (Vec::new(), Vec::new());
    let mut names: Vec<String> = Vec::new();
    for path in shards::find(dir).map_err(values)?.paths {
        let file = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let shard = TensorDir::from_files(dir, std::slice::from_ref(&path)).map_err(values)?;
        for name in shard.names() {
            let (dtype, shape, bytes) = shard.raw(name).map_err(values)?;
            let bytes = bytes.as_slice();
            let (name, file, shape) = (name.to_owned(), file.clone(), shape.to_vec());
            let sha256 = sha256(bytes);
            sums.push(format!("{name} {dtype:?} {shape:?} {sha256}\n"));
            tensors.push(TensorEntry { name, file, dtype, shape, sha256, blake3: Some(blake3(bytes)) });
        }
        names.push(file);
    }
    let mut specs: BTreeMap<&str, &Arc<Quantizer>> = BTreeMap::new();
    for layer in layers {
        let wrong = |message| Error::Layer { dir: dir.to_owned(), layer: layer.name.clone(), message };
        let q = &layer.quantizer;
        Packed::check(q, layer.shape).map_err(|e| wrong(e.to_string()))?;
        let [packed, scales] = tensor_names(&layer.name);
        let wanted = [
            (packed, Dtype::U32, Packed::new(q, layer.shape).words()),
            (scales, Dtype::BF16, scale_count(q, layer.shape)),
        ];
        for (name, dtype, len) in wanted {
            let found = tensors.iter().find(|t| t.name == name);
            if found.is_none_or(|t| (t.dtype, t.shape.as_slice()) != (dtype, &[len])) {
                let is = found.map_or("is not there".to_owned(), |t| format!("is {:?} {:?}", t.dtype, t.shape));
                return Err(wrong(format!("`{name}` {is}, but its spec makes it {dtype:?} [{len}]")));
            }
        }
        let there = *specs.entry(q.name.as_str()).or_insert(q);
        if there.hash() != q.hash() {
            return Err(wrong(format!(
                "its quantizer has the name of another, `{}`: give one a name of its own",
                q.name
            )));
        }
    }
    let mut entries = Vec::new();
    for (name, q) in specs {
        let file = format!("specs/{name}.qspec");
        let path = dir.join(&file);
        std::fs::create_dir_all(dir.join("specs")).map_err(Error::io("create", &path))?;
        output::write(&path, q.canonical().as_bytes()).map_err(Error::io("write", &path))?;
        entries.push(SpecEntry { name: name.to_owned(), file: file.clone(), hash: q.hash() });
        names.push(file);
    }
    names.extend([INDEX].into_iter().chain(COPIED).filter(|n| dir.join(n).exists()).map(str::to_owned));
    names.sort();
    let files = names.into_iter().map(|name| {
        let (bytes, sha256) = hash_file(&dir.join(&name))?;
        Ok(FileEntry { name, bytes, sha256 })
    });
    let files = files.collect::<Result<_, Error>>()?;
    sums.sort();
    let config = dir.join("config.json");
    let mut id = input::read(&config, input::SMALL).map_err(Error::io("read", &config))?;
    sums.iter().for_each(|s| id.extend_from_slice(s.as_bytes()));
    let entry = |l: &Written| LayerEntry {
        name: l.name.clone(),
        spec: l.quantizer.name.clone(),
        layout: None,
        rows: l.shape.rows,
        cols: l.shape.cols,
        error: super::manifest::six_digits(l.error),
    };
    let manifest = Manifest {
        format: FORMAT,
        tool: format!("qp {}", env!("CARGO_PKG_VERSION")),
        model: ModelId { sha256: sha256(&id) },
        calibration: None,
        source: None,
        specs: entries,
        layers: layers.iter().map(entry).collect(),
        groups: Vec::new(),
        tensors,
        files,
    };
    let path = dir.join(MANIFEST);
    output::write(&path, manifest.to_text().as_bytes()).map_err(Error::io("write", &path))?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_says_who_quantized_the_model_and_keeps_the_rest() {
        let text = br#"{"b": 1, "quantization_config": {"quant_method": "fp8"}, "a": [2.5], "text_config": {"quantization_config": 1, "c": 3}}"#;
        let made: Value = serde_json::from_slice(&config(text)).unwrap();
        let wanted =
            json!({"b": 1, "quantization_config": {"quant_method": "qp"}, "a": [2.5], "text_config": {"c": 3}});
        assert_eq!(made, wanted);
        assert_eq!(config(b"[1]"), b"[1]");
    }

    #[test]
    fn an_index_names_the_file_of_each_tensor() {
        let made: Value = serde_json::from_slice(&index([("b", "1", 3), ("a", "2", 4)].into_iter())).unwrap();
        assert_eq!(made, json!({"metadata": {"total_size": 7}, "weight_map": {"a": "2", "b": "1"}}));
    }
}
