//! What a decode step takes beside its products with packed weights, measured without a model: embedding, norms and
//! rotations, caches, attention, gated units, the choice of the token; and the output layer, left in half precision.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::bf16;
use qp_codegen::layout::Packed;
use qp_codegen::spec::{Quantizer, Shape};

use super::linear::{Floats, Group, Matrix, Part, Product};
use super::step::Step;
use super::{Layer, Network, Wanted};
use crate::codec::scale_count;
use crate::device::ops::{DeviceMatrix, first_rows, stacked};
use crate::device::{DeviceError, Executor};
use crate::model::{Config, Role, arch};

/// Positions of the cache, unless the model has fewer.
const CONTEXT: usize = 512;
/// Runs, of which the fastest counts.
const ROUNDS: usize = 7;

/// Seconds of a decode step of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rest {
    /// All launches but those with matrices of linear layers.
    pub step: f64,
    /// The output layer's product with weights of half precision.
    pub head: f64,
}

/// Measures it for a model of this configuration, whose linear layers have `quantizer`: of that only the rotation
/// matters. Half of a context of 512 positions has been seen.
///
/// # Errors
/// Those of the executor, such as a device that cannot hold the embedding.
pub fn measure(on: &Executor, config: &Config, quantizer: &Arc<Quantizer>) -> Result<Rest, DeviceError> {
    let network = zeroed(on, config, quantizer, CONTEXT.min(config.max_positions))?;
    let mut state = network.state(on)?;
    state.position.write(0, &[(network.context / 2) as i32])?;
    let steps = network.steps(1, Wanted::Best);
    let mut time = |of: &dyn Fn(&Step<'_>) -> bool| -> Result<f64, DeviceError> {
        let (mut kernels, mut recorder) = (BTreeMap::new(), on.record());
        for step in steps.iter().filter(|s| of(s)) {
            let key = step.key();
            if !kernels.contains_key(&key) {
                kernels.insert(key.clone(), step.load(on)?);
            }
            let kernel = kernels.get_mut(&key).expect("loaded");
            step.record(&mut recorder, kernel, &mut state, &network.angles)?;
        }
        let graph = recorder.finish()?;
        on.time_best(ROUNDS, || graph.launch())
    };
    let step = time(&|s| !matches!(s, Step::Gemv { .. } | Step::Dense { .. }))?;
    let head = time(&|s| matches!(s, Step::Dense { .. }))?;
    Ok(Rest { step, head })
}

/// A network of zeros, whose layers share their matrices.
fn zeroed(on: &Executor, config: &Config, quantizer: &Arc<Quantizer>, context: usize) -> Result<Network, DeviceError> {
    let (hidden, vocab) = (config.hidden as u32, config.vocab as u32);
    let norm = || on.zeroed(config.hidden);
    let groups: [&[Role]; 4] = [&[Role::Q, Role::K, Role::V], &[Role::O], &[Role::Gate, Role::Up], &[Role::Down]];
    let matrices = groups.iter().map(|roles| matrix(on, config, quantizer, roles));
    let matrices = matrices.collect::<Result<Vec<_>, _>>()?;
    let mut layers = Vec::with_capacity(config.layers);
    for _ in 0..config.layers {
        let group = |i: usize| group(on, config, quantizer, groups[i], &matrices[i]);
        layers.push(Layer {
            input_norm: norm()?,
            qkv: group(0)?,
            o: group(1)?,
            post_norm: norm()?,
            gate_up: group(2)?,
            down: group(3)?,
        });
    }
    let embed = Matrix::Dense(Arc::new(Floats::F16(on.zeroed(config.vocab * config.hidden)?)));
    let parts = vec![Part { first: 0, rows: vocab, bias: None }];
    let head = Product { matrix: embed.clone(), stride: vocab, parts };
    let head = Group { cols: hidden, products: vec![head], places: vec![(0, 0)] };
    Network::of(on, &arch::program(config), context, embed, layers, norm()?, head)
}

/// The rows of layers of one input, and its columns.
fn rows(config: &Config, roles: &[Role]) -> (Vec<u32>, u32) {
    (roles.iter().map(|r| config.shape(*r).0 as u32).collect(), config.shape(roles[0]).1 as u32)
}

/// The matrix of layers of one input, and the distance from one token's outputs to the next.
fn matrix(on: &Executor, config: &Config, q: &Arc<Quantizer>, roles: &[Role]) -> Result<(Matrix, u32), DeviceError> {
    let (rows, cols) = rows(config, roles);
    let shapes: Vec<Shape> = rows.iter().map(|&rows| Shape { rows, cols }).collect();
    let shape = stacked(q, &shapes);
    let words = vec![0; Packed::new(q, shape).words()];
    let scales = vec![bf16::ONE; scale_count(q, shape)];
    let matrix = DeviceMatrix::upload(on, q, cols, &[(shape.rows, &words, &scales)])?;
    let stride = matrix.layout.padded_rows();
    Ok((Matrix::Quantized { quantizer: q.clone(), hash: q.hash(), matrix: Arc::new(matrix) }, stride))
}

/// A layer's group, of the matrix that all layers share.
fn group(
    on: &Executor,
    config: &Config,
    q: &Quantizer,
    roles: &[Role],
    (matrix, stride): &(Matrix, u32),
) -> Result<Group, DeviceError> {
    let (rows, cols) = rows(config, roles);
    let firsts = first_rows(q, cols, &rows);
    let places = firsts.iter().map(|&first| (0, first)).collect();
    let part = |((first, &rows), role): ((u32, &u32), &Role)| {
        let bias = config.has_bias(*role).then(|| on.zeroed(rows as usize)).transpose()?;
        Ok(Part { first, rows, bias })
    };
    let parts = firsts.into_iter().zip(&rows).zip(roles).map(part).collect::<Result<_, DeviceError>>()?;
    let product = Product { matrix: matrix.clone(), stride: *stride, parts };
    Ok(Group { cols, products: vec![product], places })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{shapes, synthetic};
    use crate::engine::{CudaEngine, Room};

    #[test]
    fn the_launches_are_those_of_an_engine() {
        let q = Arc::new(synthetic::trained(qp_codegen::palette::get("nuq_3").expect("of the palette")));
        let on = Executor::interpreter();
        for (name, shapes) in &shapes()[..2] {
            let choose = |name: &str| (!name.contains("embed") && name != "lm_head").then(|| (*q).clone());
            let (config, weights) = synthetic::model(shapes, &choose).unwrap();
            let context = CONTEXT.min(config.max_positions);
            let mut engine = CudaEngine::new(on.clone(), &weights, Room::one(context)).unwrap();
            let graph = engine.graph(1, Wanted::Best).unwrap();
            let launched = graph.kernels().filter(|k| !k.kernel().name.starts_with("gemv")).count();
            let network = zeroed(&on, &config, &q, context).unwrap();
            let steps = network.steps(1, Wanted::Best);
            let products = steps.iter().filter(|s| matches!(s, Step::Gemv { .. })).count();
            assert_eq!(steps.len() - products, launched, "{name}");
            let rest = measure(&on, &config, &q).unwrap();
            assert!(rest.step > 0.0 && rest.head > 0.0, "{name}: {rest:?}");
        }
    }
}
