//! What there is to do: the layers of a model, and the list of items in the order of work.

use std::collections::BTreeSet;

use qp_codegen::layout::Packed;
use qp_codegen::spec::Shape;
use safetensors::Dtype;

use crate::checkpoint::reader::tensor_names;
use crate::checkpoint::weights::Planned;
use crate::codec::scale_count;
use crate::model::weights::{EMBEDDING, HEAD};
use crate::model::{Config, Error, Role, TensorDir};
use crate::plan::{Layer, Resolved};

/// A layer and the tensor that holds its weights.
pub struct Place {
    /// As the plan sees it.
    pub layer: Layer,
    /// Name of the tensor, rows × columns.
    pub tensor: String,
}

/// What is written together.
pub struct Item {
    /// Name of the layer, or of the tensor that is copied.
    pub name: String,
    /// What is done.
    pub work: Work,
    /// Tensors of the checkpoint.
    pub tensors: Vec<Planned>,
}

/// What is done for an item.
pub enum Work {
    /// The tensor of that name is copied.
    Copy,
    /// A layer is encoded.
    Encode {
        /// Index of the layer.
        layer: usize,
        /// Name of the model's tensor.
        tensor: String,
    },
}

/// All linear layers of a model in the order of execution, then the embedding. The output layer and the embedding are not
/// covered by a plan's default. If they are tied, both are made from the embedding's tensor.
pub fn layers(config: &Config) -> Vec<Place> {
    let place = |name: String, tensor: String, (rows, cols): (usize, usize), by_default| Place {
        layer: Layer { name, shape: Shape { rows: rows as u32, cols: cols as u32 }, by_default },
        tensor,
    };
    let blocks = (0..config.layers).flat_map(|i| Role::ALL.map(|role| (i, role)));
    let mut all: Vec<Place> = blocks
        .map(|(i, role)| {
            let name = config.linear_name(i, role);
            let tensor = format!("{name}.weight");
            place(name, tensor, config.shape(role), true)
        })
        .collect();
    for (name, tensor) in [(HEAD, if config.tied { EMBEDDING } else { HEAD }), (EMBEDDING, EMBEDDING)] {
        all.push(place(name.to_owned(), format!("{tensor}.weight"), (config.vocab, config.hidden), false));
    }
    all
}

/// If the output layer is tied to the embedding and `plan` gives both the same quantizer, one matrix serves both: only
/// the embedding is left to encode.
pub fn join_tied(config: &Config, plan: &mut Resolved) {
    let [.., head, embedding] = &mut plan.layers[..] else { return };
    let fused = plan.groups.iter().flatten().any(|l| *l == config.layers * Role::ALL.len());
    if config.tied && *head == *embedding && !fused {
        *head = None;
    }
}

/// The items of a checkpoint: every tensor of the model, a quantized layer's weight replaced by its packed form.
pub fn items(source: &TensorDir, layers: &[Place], plan: &Resolved) -> Result<Vec<Item>, Error> {
    let mut encoded = Vec::new();
    let mut replaced = BTreeSet::new();
    for (i, (place, spec)) in layers.iter().zip(&plan.layers).enumerate() {
        let Some(spec) = spec else { continue };
        let (q, name) = (&plan.specs[*spec], place.layer.name.clone());
        let [packed, scales] = tensor_names(&name);
        let words = Packed::new(q, place.layer.shape).words();
        let tensors = vec![
            Planned { name: packed, dtype: Dtype::U32, shape: vec![words] },
            Planned { name: scales, dtype: Dtype::BF16, shape: vec![scale_count(q, place.layer.shape)] },
        ];
        replaced.insert(format!("{name}.weight"));
        encoded.push(Item { name, work: Work::Encode { layer: i, tensor: place.tensor.clone() }, tensors });
    }
    // Copies come first: they are quick, and show at once whether the disk can be written.
    let mut items = Vec::new();
    for name in source.names().filter(|n| !replaced.contains(*n)) {
        let (dtype, shape) = source.layout(name)?;
        let tensors = vec![Planned { name: name.to_owned(), dtype, shape: shape.to_vec() }];
        items.push(Item { name: name.to_owned(), work: Work::Copy, tensors });
    }
    items.append(&mut encoded);
    Ok(items)
}
