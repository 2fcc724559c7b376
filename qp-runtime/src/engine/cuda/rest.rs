//! What a decode step takes beside its products with packed weights, measured without a model: embedding, norms and
//! rotations, caches, attention, gated units, the choice of the token; and the output layer, left in half precision.

use std::collections::BTreeMap;
use std::sync::Arc;

use qp_codegen::ir::Elem;
use qp_codegen::spec::Quantizer;

use super::CudaEngine;
use super::layout::{Form, Layout};
use super::lower::Launch;
use super::matrix::Matrix;
use crate::device::{DeviceError, Executor};
use crate::engine::Room;
use crate::model::Program;

/// Position of the token.
const POSITION: usize = 256;
/// Runs, of which the fastest counts.
const ROUNDS: usize = 7;

/// Seconds of a decode step of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rest {
    /// All launches but products.
    pub step: f64,
    /// The output layer's product with weights of half precision.
    pub head: f64,
}

/// The forms of a program's layers if those of decoder blocks are packed by `quantizer` and all else is left in half
/// precision.
pub fn forms(program: &Program, quantizer: &Arc<Quantizer>) -> Vec<Form> {
    let form = |id| match (program.in_block(id), program.layer(id).shares) {
        (true, _) => Form::Packed(quantizer.clone()),
        (false, Some(_)) => Form::Shared,
        (false, None) => Form::Dense(Elem::F16),
    };
    program.ids().map(form).collect()
}

/// Measures it for a model of this program, whose linear layers have `quantizer`: of that only the rotation matters. A
/// quarter of a thousand positions has been seen.
///
/// # Errors
/// Those of the executor, such as a device that cannot hold the embedding.
pub fn measure(on: &Executor, program: &Arc<Program>, quantizer: &Arc<Quantizer>) -> Result<Rest, DeviceError> {
    let position = POSITION.min(program.context - 1);
    let room = Room::one(position + 1);
    let layout = Layout::new(program, &forms(program, quantizer), &[], room.cache);
    // Equal matrices are one: products are not what is measured here.
    let mut zeros: BTreeMap<(u32, u32, bool), Matrix> = BTreeMap::new();
    let mut engine = CudaEngine::made(on.clone(), layout, room, |layout, stored| {
        let key = (stored.shape.rows, stored.shape.cols, matches!(stored.form, Form::Dense(_)));
        if let Some(matrix) = zeros.get(&key) {
            return Ok(matrix.clone());
        }
        let matrix = Matrix::zeroed(on, layout, stored)?;
        zeros.insert(key, matrix.clone());
        Ok(matrix)
    })?;
    let head = program.nodes.len() - 1;
    let mut time = |of: &dyn Fn(&Launch) -> bool| engine.seconds(1, position, ROUNDS, of);
    Ok(Rest { step: time(&|l| !l.op.is_product())?, head: time(&|l| l.op.is_product() && l.node == head)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{shapes, synthetic};

    #[test]
    fn it_takes_time() {
        let q = Arc::new(synthetic::trained(qp_codegen::palette::get("nuq_3").expect("of the palette")));
        for (name, shapes) in
            shapes().iter().filter(|s| ["small model with biases", "mixture of experts"].contains(&s.0))
        {
            let (_, weights) = synthetic::model(shapes, &|_| None).unwrap();
            let rest = measure(&Executor::interpreter(), &weights.program, &q).unwrap();
            assert!(rest.step > 0.0 && rest.head > 0.0, "{name}: {rest:?}");
        }
    }
}
