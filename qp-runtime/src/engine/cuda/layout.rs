//! How a program's matrices lie on a device: which layers are one below the other, so that one launch computes them.

pub mod mixture;

use std::collections::BTreeMap;
use std::sync::Arc;

use qp_codegen::ir::Elem;
use qp_codegen::kernels::attend;
use qp_codegen::layout::Packed;
use qp_codegen::spec::terms::Terms;
use qp_codegen::spec::{Quantizer, Shape};

use self::mixture::Mixed;
use crate::device::grouped;
use crate::device::ops::{first_rows, stacked};
use crate::engine::Precision;
use crate::model::program::{CacheId, Node};
use crate::model::{Dtype, LayerId, Program, Weight, Weights};

/// What a layer's matrix is stored as.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// Floats: `F16`, `BF16` or `F32`.
    Dense(Elem),
    /// Packed by a quantizer.
    Packed(Arc<Quantizer>),
    /// Of a format whose products are exact: packed, its fields beside.
    Grouped(Arc<Terms>),
    /// The matrix of another layer, which this one shares.
    Shared,
}

impl Form {
    /// The forms of a model's layers, in the order of its program.
    pub fn of(weights: &Weights) -> Vec<Form> {
        // Rows of an embedding are looked up, so that one which is the output layer too lies there twice.
        let terms = |id: LayerId, weight: &Weight| {
            let tensor = weight.dense().filter(|_| !weights.program.is_embedding(id))?;
            tensor.exact().and_then(|(reader, _)| reader.terms().cloned())
        };
        let form = |id: LayerId| match (&weights[id].weight, terms(id, &weights[id].weight)) {
            (_, Some(terms)) => Form::Grouped(terms),
            (weight, None) if shared(weights, id, weight) => Form::Shared,
            (Weight::Quantized { quantizer, .. }, None) => Form::Packed(quantizer.clone()),
            (Weight::Dense(tensor), None) => Form::Dense(match tensor.dtype {
                Dtype::F16 => Elem::F16,
                Dtype::Bf16 => Elem::BF16,
                Dtype::F32 | Dtype::Format(_) => Elem::F32,
            }),
        };
        weights.program.ids().map(form).collect()
    }
}

fn shared(weights: &Weights, id: LayerId, weight: &Weight) -> bool {
    weights.program.layer(id).shares.is_some_and(|of| weight.is(&weights[of].weight))
}

/// The layers of one input that a launch computes together, as indices into `layers`: of those with equal quantizers, those
/// of one group of `fused` and no others, or all of them if no group has any of the layers. What is not packed has a
/// launch of its own.
///
/// The allocator, the profile and the engine all ask this.
pub fn launches(layers: &[LayerId], forms: &[Form], fused: &[Vec<LayerId>]) -> Vec<Vec<usize>> {
    let group_of = |id: LayerId| fused.iter().position(|g| g.contains(&id));
    let planned = layers.iter().any(|l| group_of(*l).is_some());
    let together = |a: LayerId, b: LayerId| match (&forms[a.0], &forms[b.0]) {
        (Form::Packed(p), Form::Packed(q)) => {
            p == q && (!planned || group_of(a).is_some_and(|g| group_of(b) == Some(g)))
        }
        (Form::Grouped(p), Form::Grouped(q)) => {
            p == q && !p.is_apart() && (!planned || group_of(a).is_some_and(|g| group_of(b) == Some(g)))
        }
        (Form::Packed(_) | Form::Grouped(_) | Form::Dense(_) | Form::Shared, _) => false,
    };
    let mut out: Vec<Vec<usize>> = Vec::new();
    for (i, &layer) in layers.iter().enumerate() {
        match out.iter_mut().find(|launch| together(layers[launch[0]], layer)) {
            Some(launch) => launch.push(i),
            None => out.push(vec![i]),
        }
    }
    out
}

/// A matrix on a device: that of one layer, or of several one below the other.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its layers.
    pub layers: Vec<LayerId>,
    /// The first row of each.
    pub firsts: Vec<u32>,
    /// Packed or dense.
    pub form: Form,
    /// Rows × columns; of several layers, each is padded to whole tiles.
    pub shape: Shape,
    /// Distance from one token's outputs to the next: the rows, padding included.
    pub stride: u32,
    /// Of a packed matrix, its quantizer's place among [`Layout::specs`].
    pub spec: usize,
}

/// All matrices of a program.
#[derive(Clone, Debug)]
pub struct Layout {
    /// What is computed with them.
    pub program: Arc<Program>,
    /// The matrices.
    pub matrices: Vec<Stored>,
    /// The different quantizers.
    pub specs: Vec<Arc<Quantizer>>,
    /// The matrix of each layer.
    pub matrix_of: Vec<usize>,
    /// The matrices of mixtures, by node of the program.
    pub mixtures: BTreeMap<usize, Mixed>,
    /// How precisely keys and values are kept.
    pub cache: Precision,
}

impl Layout {
    /// Lays out the layers of a program, whose forms are `forms`; those of a group of `fused` are launched together. Of experts
    /// all that have one form are, whatever the groups say.
    pub fn new(program: &Arc<Program>, forms: &[Form], fused: &[Vec<LayerId>], cache: Precision) -> Layout {
        let mut out = Layout {
            program: program.clone(),
            matrices: Vec::new(),
            specs: Vec::new(),
            matrix_of: vec![usize::MAX; program.layers.len()],
            mixtures: BTreeMap::new(),
            cache,
        };
        let mut groups: Vec<Vec<LayerId>> = Vec::new();
        for (at, node) in program.nodes.iter().enumerate() {
            if let Node::Mix(mixture) = node {
                let mixed = Mixed::store(&mut out, mixture, forms);
                out.mixtures.insert(at, mixed);
            } else {
                groups.extend(node.groups());
            }
        }
        let embeddings = program.ids().filter(|id| program.is_embedding(*id)).map(|id| vec![id]);
        for group in groups.into_iter().chain(embeddings) {
            for launch in launches(&group, forms, fused) {
                let layers: Vec<LayerId> = launch.iter().map(|&i| group[i]).collect();
                if forms[layers[0].0] != Form::Shared {
                    out.store(layers, &forms[group[launch[0]].0]);
                }
            }
        }
        for id in program.ids() {
            if let (Form::Shared, Some(of)) = (&forms[id.0], program.layer(id).shares) {
                out.matrix_of[id.0] = out.matrix_of[of.0];
            }
        }
        out
    }

    fn store(&mut self, layers: Vec<LayerId>, form: &Form) {
        let shapes: Vec<Shape> = layers.iter().map(|id| self.shape_of(*id)).collect();
        let rows: Vec<u32> = shapes.iter().map(|shape| shape.rows).collect();
        let cols = shapes[0].cols;
        let (shape, firsts, stride, spec) = match form {
            Form::Packed(q) => {
                let shape = stacked(q, &shapes);
                let spec = self.specs.iter().position(|s| s == q).unwrap_or_else(|| {
                    self.specs.push(q.clone());
                    self.specs.len() - 1
                });
                (shape, first_rows(q, cols, &rows), Packed::new(q, shape).padded_rows(), spec)
            }
            Form::Grouped(_) => {
                let shapes: Vec<Shape> = rows.iter().map(|&rows| Shape { rows, cols }).collect();
                let shape = grouped::stacked(&shapes);
                (shape, grouped::first_rows(&rows), shape.rows, usize::MAX)
            }
            Form::Dense(_) | Form::Shared => {
                let all = rows.iter().sum();
                let firsts = rows.iter().scan(0, |next, rows| Some(std::mem::replace(next, *next + rows)));
                (Shape { rows: all, cols }, firsts.collect(), all, usize::MAX)
            }
        };
        for id in &layers {
            self.matrix_of[id.0] = self.matrices.len();
        }
        self.matrices.push(Stored { layers, firsts, form: form.clone(), shape, stride, spec });
    }

    /// Rows × columns of a layer.
    fn shape_of(&self, id: LayerId) -> Shape {
        let layer = self.program.layer(id);
        Shape { rows: layer.rows as u32, cols: layer.cols as u32 }
    }

    /// How the keys and values of an attention lie in memory.
    pub fn cache_of(&self, id: CacheId) -> attend::Cache {
        let shape = self.program.caches[id.0];
        let (kv_heads, head_dim) = (shape.heads as u32, shape.head_dim as u32);
        attend::Cache { kv_heads, head_dim, planes: self.cache.planes() }
    }

    /// The matrix of a layer, and the first of its rows.
    pub fn place(&self, id: LayerId) -> (usize, u32) {
        let matrix = self.matrix_of[id.0];
        let stored = &self.matrices[matrix];
        // A layer that shares a matrix begins where that one does.
        let first = stored.layers.iter().position(|l| *l == id).map_or(stored.firsts[0], |i| stored.firsts[i]);
        (matrix, first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plans_groups_are_what_is_launched() {
        let packed = |name: &str| Form::Packed(Arc::new(qp_codegen::palette::get(name).expect("of the palette")));
        let ids = |ids: &[usize]| ids.iter().copied().map(LayerId).collect::<Vec<_>>();
        let forms = [packed("nuq_3"), packed("nuq_3"), packed("nuq_3"), packed("nuq_4"), Form::Dense(Elem::F32)];
        let (all, qkv) = (ids(&[0, 1, 2, 3, 4]), ids(&[0, 1, 2]));
        assert_eq!(launches(&all, &forms, &[]), [vec![0, 1, 2], vec![3], vec![4]]);
        assert_eq!(launches(&qkv, &forms, &[ids(&[1, 2])]), [vec![0], vec![1, 2]]);
        assert_eq!(launches(&qkv, &forms, &[ids(&[0]), ids(&[1]), ids(&[2])]), [vec![0], vec![1], vec![2]]);
        // Groups of other layers do not matter.
        assert_eq!(launches(&qkv, &forms, &[ids(&[3, 4])]), [vec![0, 1, 2]]);
    }
}
