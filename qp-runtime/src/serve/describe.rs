//! What the page shows of a model: the quantizer and bits of each layer, and memory by kind.

use serde_json::{Value, json};

use crate::model::{Linear, Weight, Weights};

/// Bytes of a layer's matrix and of the tables that its quantizer decodes with.
fn bytes(layer: &Linear) -> (u64, u64) {
    match &layer.weight {
        Weight::Dense(tensor) => (tensor.bytes().len() as u64, 0),
        Weight::Quantized { quantizer, matrix } => {
            let size = u64::from(quantizer.value().bytes());
            let tables: u64 =
                quantizer.codes.iter().flat_map(|c| &c.tables).map(|t| t.values.len() as u64 * size).sum();
            (4 * matrix.words.len() as u64 + 2 * matrix.scales.len() as u64, tables)
        }
    }
}

/// The layers of a model: name, shape, quantizer (`null` where there is none), bits a weight, bytes.
pub fn layers(weights: &Weights) -> Vec<Value> {
    let all = weights.layers();
    let one = |(i, layer): (usize, &Linear)| {
        let spec = match &layer.weight {
            Weight::Dense(_) => None,
            Weight::Quantized { quantizer, .. } => Some(quantizer.name.clone()),
        };
        let shared = all[..i].iter().find(|other| other.weight.is(&layer.weight)).map(|other| other.name.clone());
        let size = bytes(layer).0;
        let bits = size as f64 * 8.0 / (layer.rows as f64 * layer.cols as f64);
        json!({
            "name": layer.name, "rows": layer.rows, "cols": layer.cols, "spec": spec,
            "bits": (bits * 1000.0).round() / 1000.0, "bytes": if shared.is_some() { 0 } else { size }, "shared_with": shared,
        })
    };
    all.iter().enumerate().map(one).collect()
}

/// Bytes by kind: what quantized matrices, their tables and unquantized matrices take.
pub fn memory(weights: &Weights) -> Vec<(&'static str, u64)> {
    let (mut packed, mut tables, mut dense) = (0, 0, 0);
    let (all, mut quantizers) = (weights.layers(), Vec::new());
    for (i, layer) in all.iter().enumerate() {
        if all[..i].iter().any(|other| other.weight.is(&layer.weight)) {
            continue;
        }
        let (matrix, table) = bytes(layer);
        match &layer.weight {
            Weight::Dense(_) => dense += matrix,
            Weight::Quantized { quantizer, .. } => {
                packed += matrix;
                if !quantizers.contains(&&quantizer.name) {
                    quantizers.push(&quantizer.name);
                    tables += table;
                }
            }
        }
    }
    vec![("quantized weights", packed), ("tables", tables), ("unquantized weights", dense)]
}
