//! What there is to do: the layers of a model, and the list of items in the order of work.

use std::collections::BTreeSet;

use qp_codegen::layout::Packed;
use qp_codegen::reader::Stored;
use qp_codegen::spec::Shape;
use qp_codegen::spec::format::Number;
use safetensors::Dtype;

use crate::checkpoint::reader::tensor_names;
use crate::checkpoint::weights::Planned;
use crate::codec::scale_count;
use crate::model::{LayerId, Program, TensorDir};
use crate::plan::{self, Resolved, Spec};

use super::Error;

/// A layer and the tensor that holds its weights.
pub struct Place {
    /// As the plan sees it.
    pub layer: plan::Layer,
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

/// The layers of a model, in the order of its program. Those outside its decoder blocks are not covered by a plan's
/// default. A layer that has another's matrix is made from that one's tensor.
pub fn layers(program: &Program) -> Vec<Place> {
    let place = |id: LayerId| {
        let layer = program.layer(id);
        let shape = Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
        let tensor = &program.layer(layer.shares.unwrap_or(id)).name;
        Place {
            layer: plan::Layer {
                name: layer.name.clone(),
                shape,
                by_default: program.in_block(id),
                input: program.groups().position(|group| group.contains(&id)),
            },
            tensor: format!("{tensor}.weight"),
        }
    };
    program.ids().map(place).collect()
}

/// If a layer has the matrix of another, as a tied output layer has the embedding's, and `plan` gives both the same
/// quantizer, one packed matrix serves both: only the other is left to encode.
pub fn join_tied(program: &Program, plan: &mut Resolved) {
    for id in program.ids() {
        let fused = plan.groups.iter().flatten().any(|l| *l == id.0);
        if program.layer(id).shares.is_some_and(|of| plan.layers[of.0] == plan.layers[id.0]) && !fused {
            plan.layers[id.0] = None;
        }
    }
}

/// The items of a checkpoint: every tensor of the model, a quantized layer's weight replaced by its packed form.
pub fn items(source: &TensorDir, layers: &[Place], plan: &Resolved) -> Result<Vec<Item>, Error> {
    let mut encoded = Vec::new();
    let mut replaced = BTreeSet::new();
    for (i, (place, spec)) in layers.iter().zip(&plan.layers).enumerate() {
        let Some(spec) = spec else { continue };
        let (name, shape) = (place.layer.name.clone(), place.layer.shape);
        let tensors = match &plan.specs[*spec] {
            Spec::Quantizer(q) => {
                let [packed, scales] = tensor_names(&name);
                Packed::check(q, shape).map_err(|source| Error::TooLarge { layer: name.clone(), source })?;
                let words = Packed::new(q, shape).words();
                vec![
                    Planned { name: packed, dtype: Dtype::U32, shape: vec![words] },
                    Planned { name: scales, dtype: Dtype::BF16, shape: vec![scale_count(q, shape)] },
                ]
            }
            Spec::Format(f) => {
                let spec = f.format().name.clone();
                let reader = f.reader(shape).map_err(|source| Error::Misfit { layer: name.clone(), spec, source })?;
                reader.tensors().iter().map(|t| planned(&name, t)).collect()
            }
        };
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

/// A tensor of a format's layout, of the layer `name`.
fn planned(name: &str, t: &Stored) -> Planned {
    let dtype = t.ty.and_then(|ty| {
        Some(match ty {
            Number::F16 => Dtype::F16,
            Number::Bf16 => Dtype::BF16,
            Number::F32 => Dtype::F32,
            Number::E4m3 => Dtype::F8_E4M3,
            Number::E5m2 => Dtype::F8_E5M2,
            Number::E8m0 | Number::Unsigned(8) => Dtype::U8,
            Number::Signed(8) => Dtype::I8,
            Number::Unsigned(16) => Dtype::U16,
            Number::Signed(16) => Dtype::I16,
            Number::Unsigned(32) => Dtype::U32,
            Number::Signed(32) => Dtype::I32,
            Number::Unsigned(_) | Number::Signed(_) => return None,
        })
    });
    let mut shape: Vec<usize> = t.dims.iter().map(|n| *n as usize).collect();
    let name = format!("{name}.{}", t.name);
    let elements: u64 = t.dims.iter().product();
    match dtype {
        Some(dtype) => Planned { name, dtype, shape },
        // Records, as bytes: a side of an element's where each has whole bytes.
        None => {
            match t.bytes.is_multiple_of(elements) {
                true => shape.push((t.bytes / elements) as usize),
                false => shape = vec![t.bytes as usize],
            }
            Planned { name, dtype: Dtype::U8, shape }
        }
    }
}
