//! From launches to a device: their kernels, loaded, and their buffers.

use std::collections::BTreeMap;

use qp_codegen::ir::Kernel;
use qp_codegen::kernels::grouped;
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::kernels::product;
use rayon::prelude::*;

use super::layout::Layout;
use super::lower::{self, Launch, Op, Slot};
use super::matrix::{Floats, Matrix};
use crate::device::attend::{AppendInputs, AppendKernel, AttendKernel, Queries, Tokens};
use crate::device::grouped::{GroupedExpertsArgs, GroupedKernel};
use crate::device::launches as args;
use crate::device::ops::{
    DeviceActivations, EmbedPackedKernel, ExpertsKernel, Faults, GemvKernel, Pairs, PrepareInputs, PrepareKernel,
};
use crate::device::tune;
use crate::device::{Buffer, DeviceError, Executor, Loaded, Recorder};

/// What launches read that does not change.
pub struct Constants {
    /// By [`Layout::matrices`].
    pub matrices: Vec<Matrix>,
    /// Weights of norms, by [`VectorId`](crate::model::program::VectorId).
    pub vectors: Vec<Buffer<f32>>,
    /// Biases, by layer.
    pub biases: Vec<Option<Buffer<f32>>>,
    /// By node of a mixture, the biases of its experts' gates, of what those gate, and of the way back: experts × rows each.
    pub of_experts: BTreeMap<usize, [Buffer<f32>; 3]>,
    /// By matrix of some experts of a mixture: of each expert, the place of its own, or −1.
    pub expert_places: BTreeMap<usize, Buffer<i32>>,
    /// Cosines and sines, positions × frequencies, by [`RopeId`](crate::model::program::RopeId).
    pub turns: Vec<(Buffer<f32>, Buffer<f32>)>,
    /// Given where a kernel reads nothing.
    pub nothing: Buffer<f32>,
    /// The same of whole numbers.
    pub no_places: Buffer<i32>,
}

/// What launches write, and what says which tokens they are for.
pub struct State {
    /// One a token; afterwards the likeliest tokens of the rows that are wanted, or those drawn: of a step that follows with one
    /// token a row, its tokens.
    pub tokens: Buffer<i32>,
    /// Where each of them belongs.
    pub places: Tokens,
    /// The tokens whose logits are wanted.
    pub rows: Buffer<i32>,
    /// How tokens are drawn.
    pub choices: Choices,
    /// Values.
    pub values: BTreeMap<Slot, Buffer<f32>>,
    /// Activations as integers.
    pub activations: DeviceActivations,
    /// The experts of each token.
    pub routes: Routes,
    /// One a node of the program, not 0 once what it reads was not finite.
    pub faults: Buffer<i32>,
    /// Rounded queries.
    pub queries: Queries,
    /// Keys and values.
    pub caches: Vec<Buffer<u8>>,
}

/// What the choice of tokens reads.
pub struct Choices {
    /// Where the blocks that look for a row's likeliest token meet.
    pub scratch: Buffer<u32>,
    /// Settings of each row.
    pub settings: Buffer<u32>,
    /// Number of each row's draw.
    pub draws: Buffer<i32>,
    /// Tokens that each row may not draw, where it asks for them.
    pub seen: Buffer<u32>,
}

/// Which tokens go through which experts.
pub struct Routes {
    /// The expert of each pair.
    pub experts: Buffer<i32>,
    /// Its weight.
    pub weights: Buffer<f32>,
    /// Pairs, sorted.
    pub pairs: Buffer<i32>,
    /// Units of them.
    pub units: Buffer<i32>,
}

/// A kernel that is ready to be launched, with what belongs to it.
pub enum Ready {
    /// Nothing.
    Plain(Loaded),
    /// Where blocks meet.
    Product(GemvKernel),
    /// The rotation, if it prepares.
    Grouped(GroupedKernel),
    /// Of experts.
    Experts(ExpertsKernel),
    /// Of keys, values and queries.
    Append(AppendKernel),
    /// Where blocks meet.
    Attend(AttendKernel),
    /// The rotation.
    Prepare(PrepareKernel),
    /// The rotation's inverse.
    EmbedPacked(EmbedPackedKernel),
}

/// Kernels by what they compute.
#[derive(Default)]
pub struct Kernels(Vec<(Op, Ready)>);

impl Kernels {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    fn has(&self, op: &Op) -> bool {
        self.0.iter().any(|k| k.0 == *op)
    }

    /// Makes those of `launches` ready, all at once on all cores. Launches of products are chosen as
    /// [`tune::load`] says.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load(
        &mut self,
        on: &Executor,
        layout: &Layout,
        matrices: &[Matrix],
        launches: &[Launch],
    ) -> Result<(), DeviceError> {
        if launches.iter().all(|l| self.has(&l.op)) {
            return Ok(());
        }
        let mut others: Vec<(&Op, &Launch)> = Vec::new();
        let mut products: Vec<(&Op, tune::Product<'_>)> = Vec::new();
        let hashes: Vec<String> = layout.specs.par_iter().map(|q| q.hash()).collect();
        for launch in launches.iter().filter(|l| !self.has(&l.op)) {
            match (&launch.op, launch.matrix.map(|m| &matrices[m])) {
                (Op::Product { spec, .. }, Some(Matrix::Packed(matrix))) => {
                    let i = products.iter().position(|p| *p.0 == launch.op).unwrap_or_else(|| {
                        let op = launch.op.product(layout).expect("a product");
                        let (prepare, hash) = (launch.op.own_preparation(), hashes[*spec].as_str());
                        products.push((&launch.op, tune::Product { op, prepare, hash, matrices: Vec::new() }));
                        products.len() - 1
                    });
                    products[i].1.matrices.push(matrix);
                }
                _ if others.iter().any(|o| *o.0 == launch.op) => (),
                _ => others.push((&launch.op, launch)),
            }
        }
        let (ops, products): (Vec<_>, Vec<_>) = products.into_iter().unzip();
        let load = |(op, launch): (&Op, &Launch)| Ok((op.clone(), ready(on, layout, matrices, launch)?));
        let (others, products) = rayon::join(
            || others.into_par_iter().map(load).collect::<Result<Vec<_>, DeviceError>>(),
            || tune::load(on, &products),
        );
        self.0.extend(others?);
        let products = products?.into_iter().map(|(_, kernel)| Ready::Product(kernel));
        self.0.extend(ops.into_iter().cloned().zip(products));
        Ok(())
    }

    fn get(&mut self, op: &Op) -> &mut Ready {
        let kernel = self.0.iter_mut().find(|k| k.0 == *op);
        &mut kernel.expect("loaded before it is recorded").1
    }
}

/// Makes the kernel of a launch ready, unless it is a product.
fn ready(on: &Executor, layout: &Layout, matrices: &[Matrix], launch: &Launch) -> Result<Ready, DeviceError> {
    let kernel: Kernel = match &launch.op {
        Op::Prepare(op) => return PrepareKernel::load(on, op).map(Ready::Prepare),
        Op::EmbedPacked { .. } => {
            let op = launch.op.embed_packed(layout).expect("an embedding");
            return EmbedPackedKernel::load(on, &op).map(Ready::EmbedPacked);
        }
        Op::Experts { .. } => {
            let (op, experts) = launch.op.product_of_experts(layout).expect("of experts");
            let launch = product::Launch::ranked_for_experts(&op, &experts, &on.device())[0];
            return ExpertsKernel::load(on, &op, &experts, &launch).map(Ready::Experts);
        }
        Op::Append(op) => return AppendKernel::load(on, op).map(Ready::Append),
        Op::AttendFew(op) => return AttendKernel::few(on, op).map(Ready::Attend),
        Op::AttendMany(op) => {
            let tiles = lower::most_tiles(layout, &on.device(), op.tokens);
            return AttendKernel::many(on, op, tiles).map(Ready::Attend);
        }
        Op::Grouped { .. } => {
            let ((op, _), prepare) = (launch.op.grouped().expect("of a format"), launch.op.own_preparation());
            let best = grouped::Launch::ranked_with(&op, prepare, &on.device())[0].1;
            return GroupedKernel::load_with(on, &op, prepare, &best).map(Ready::Grouped);
        }
        op => op.lower(layout, &on.device()),
    };
    let floats =
        launch.matrix.and_then(|m| if let Matrix::Dense(floats) = &matrices[m] { Some(&**floats) } else { None });
    Ok(Ready::Plain(match (&launch.op, floats) {
        (Op::Embed(_), Some(Floats::F16(_))) => on.load::<args::Embed<'_, half::f16>>(kernel)?,
        (Op::Embed(_), Some(Floats::Bf16(_))) => on.load::<args::Embed<'_, half::bf16>>(kernel)?,
        (Op::Embed(_), _) => on.load::<args::Embed<'_, f32>>(kernel)?,
        (Op::Dense(_), Some(Floats::F16(_))) => on.load::<args::Dense<'_, half::f16>>(kernel)?,
        (Op::Dense(_), Some(Floats::Bf16(_))) => on.load::<args::Dense<'_, half::bf16>>(kernel)?,
        (Op::Dense(_), _) => on.load::<args::Dense<'_, f32>>(kernel)?,
        (Op::DenseExperts { .. }, Some(Floats::F16(_))) => on.load::<args::DenseExperts<'_, half::f16>>(kernel)?,
        (Op::DenseExperts { .. }, Some(Floats::Bf16(_))) => on.load::<args::DenseExperts<'_, half::bf16>>(kernel)?,
        (Op::DenseExperts { .. }, _) => on.load::<args::DenseExperts<'_, f32>>(kernel)?,
        (Op::GroupedExperts { .. }, _) => on.load::<GroupedExpertsArgs<'_>>(kernel)?,
        (Op::Route(_), _) => on.load::<args::Route<'_>>(kernel)?,
        (Op::Group(_), _) => on.load::<args::Group<'_>>(kernel)?,
        (Op::GateExperts(_), _) => on.load::<args::GateExperts<'_>>(kernel)?,
        (Op::Combine(_), _) => on.load::<args::Combine<'_>>(kernel)?,
        (Op::Leave(_), _) => on.load::<args::Leave<'_>>(kernel)?,
        (Op::Norm(_), _) => on.load::<args::Norm<'_>>(kernel)?,
        (Op::Add(_), _) => on.load::<args::Add<'_>>(kernel)?,
        (Op::Glu(_), _) => on.load::<args::Glu<'_>>(kernel)?,
        (Op::Map(_), _) => on.load::<args::Map<'_>>(kernel)?,
        (Op::Rows(_), _) => on.load::<args::Rows<'_>>(kernel)?,
        (Op::Argmax(_), _) => on.load::<args::Argmax<'_>>(kernel)?,
        (Op::Sample(_), _) => on.load::<args::Sample<'_>>(kernel)?,
        (
            Op::Prepare(_)
            | Op::EmbedPacked { .. }
            | Op::Product { .. }
            | Op::Grouped { .. }
            | Op::Experts { .. }
            | Op::Append(_)
            | Op::AttendFew(_)
            | Op::AttendMany(_),
            _,
        ) => {
            unreachable!("loaded with what belongs to them")
        }
    }))
}

/// Adds a launch to a graph.
///
/// # Errors
/// A kernel of other parameters.
///
/// # Panics
/// If its kernel is not loaded, or a slot that it needs is not in `state`.
pub fn record(
    launch: &Launch,
    to: &mut Recorder,
    kernels: &mut Kernels,
    state: &mut State,
    constants: &Constants,
) -> Result<(), DeviceError> {
    let kernel = kernels.get(&launch.op);
    let Constants { matrices, vectors, biases, of_experts, expert_places, turns, nothing, no_places } = constants;
    let State { tokens, places, rows, choices, values, activations, routes, faults, queries, caches } = state;
    // The buffer that is written cannot be among those that are read.
    let mut written = launch.write.map(|slot| (slot, values.remove(&slot).expect("a buffer for each slot")));
    let read = |i: usize| &values[&launch.reads[i]];
    let matrix = launch.matrix.map(|m| &matrices[m]);
    let norm_of = |i: usize| launch.vectors.get(i).map_or(nothing, |v| &vectors[v.0]);
    let norm = norm_of(0);
    let layer = launch.node as i32;
    let bias_of = |which: usize| of_experts.get(&launch.node).map_or(nothing, |biases| &biases[which]);
    // Where each pair is a unit, its expert says all of it.
    let pairs_of = |most: u32| Pairs {
        units: if most == 1 { &routes.experts } else { &routes.units },
        pairs: &routes.pairs,
        places: launch.matrix.and_then(|m| expert_places.get(&m)).unwrap_or(no_places),
    };
    let inputs = |op: &Prepare| {
        let up = if op.gate.is_some() { read(1) } else { nothing };
        let factors = match matrix {
            Some(Matrix::Grouped(matrix)) => Some(&matrix.entering),
            _ => None,
        };
        PrepareInputs { input: read(0), up, norm, factors }
    };
    let y = written.as_mut().map(|w| &mut w.1);
    let result = match (&launch.op, kernel, matrix, y) {
        (Op::Prepare(op), Ready::Prepare(kernel), ..) => {
            kernel.record(to, inputs(op), activations, Faults { faults, layer })
        }
        (Op::Product { prepare, .. }, Ready::Product(kernel), Some(Matrix::Packed(matrix)), Some(y)) => {
            match prepare.as_ref() {
                None => kernel.record(to, matrix, activations, y),
                Some(op) => kernel.record_preparing(to, matrix, inputs(op), Faults { faults, layer }, y),
            }
        }
        (Op::Grouped { prepare, .. }, Ready::Grouped(kernel), Some(Matrix::Grouped(matrix)), Some(y)) => {
            match prepare.as_ref() {
                None => kernel.record(to, matrix, activations, y),
                Some(op) => kernel.record_preparing(to, matrix, inputs(op), Faults { faults, layer }, y),
            }
        }
        (Op::GroupedExperts { experts, .. }, Ready::Plain(kernel), Some(Matrix::Grouped(matrix)), Some(y)) => {
            to.launch(kernel, matrix.args_of_experts(activations, pairs_of(experts.most), y))
        }
        (Op::EmbedPacked { .. }, Ready::EmbedPacked(kernel), Some(Matrix::Packed(matrix)), Some(y)) => {
            kernel.record(to, matrix, tokens, y)
        }
        (Op::Embed(_), Ready::Plain(kernel), Some(Matrix::Dense(table)), Some(y)) => match &**table {
            Floats::F16(table) => to.launch(kernel, args::Embed { tokens, table, y }),
            Floats::Bf16(table) => to.launch(kernel, args::Embed { tokens, table, y }),
            Floats::F32(table) => to.launch(kernel, args::Embed { tokens, table, y }),
        },
        (Op::Dense(_), Ready::Plain(kernel), Some(Matrix::Dense(weights)), Some(y)) => match &**weights {
            Floats::F16(weights) => to.launch(kernel, args::Dense { weights, x: read(0), y }),
            Floats::Bf16(weights) => to.launch(kernel, args::Dense { weights, x: read(0), y }),
            Floats::F32(weights) => to.launch(kernel, args::Dense { weights, x: read(0), y }),
        },
        (Op::Route(_), Ready::Plain(kernel), ..) => {
            let Routes { experts, weights, .. } = routes;
            let (scores, correction) = (read(0), norm);
            to.launch(kernel, args::Route { scores, correction, experts, weights, faults, layer })
        }
        (Op::Group(_), Ready::Plain(kernel), ..) => {
            let Routes { experts, pairs, units, .. } = routes;
            to.launch(kernel, args::Group { experts, pairs, units })
        }
        (Op::Experts { experts, .. }, Ready::Experts(kernel), Some(Matrix::Packed(matrix)), Some(y)) => {
            kernel.record(to, matrix, activations, pairs_of(experts.most), y)
        }
        (Op::DenseExperts { experts, .. }, Ready::Plain(kernel), Some(Matrix::Dense(weights)), Some(y)) => {
            let (x, Pairs { units, pairs, places }) = (read(0), pairs_of(experts.most));
            match &**weights {
                Floats::F16(weights) => to.launch(kernel, args::DenseExperts { weights, x, y, units, pairs, places }),
                Floats::Bf16(weights) => to.launch(kernel, args::DenseExperts { weights, x, y, units, pairs, places }),
                Floats::F32(weights) => to.launch(kernel, args::DenseExperts { weights, x, y, units, pairs, places }),
            }
        }
        (Op::GateExperts(_), Ready::Plain(kernel), _, Some(y)) => {
            let (gate_bias, up_bias, experts) = (bias_of(0), bias_of(1), &routes.experts);
            to.launch(kernel, args::GateExperts { gate: read(0), up: read(1), gate_bias, up_bias, experts, y })
        }
        (Op::Combine(_), Ready::Plain(kernel), _, Some(y)) => {
            let Routes { experts, weights, .. } = routes;
            to.launch(kernel, args::Combine { x: read(0), bias: bias_of(2), experts, weights, y })
        }
        (Op::Leave(_), Ready::Plain(kernel), Some(Matrix::Grouped(matrix)), Some(y)) => {
            to.launch(kernel, args::Leave { x: read(0), factors: &matrix.leaving, y })
        }
        (Op::Norm(_), Ready::Plain(kernel), _, Some(y)) => to.launch(kernel, args::Norm { x: read(0), norm, y }),
        (Op::Add(_), Ready::Plain(kernel), _, Some(y)) => {
            let bias = launch.bias.and_then(|id| biases[id.0].as_ref());
            let vector = launch.vectors.first().map(|v| &vectors[v.0]);
            to.launch(kernel, args::Add { x: bias.or(vector).unwrap_or_else(|| read(0)), y })
        }
        (Op::Glu(_), Ready::Plain(kernel), _, Some(y)) => {
            to.launch(kernel, args::Glu { gate: read(0), up: read(1), y })
        }
        (Op::Map(_), Ready::Plain(kernel), _, Some(y)) => to.launch(kernel, args::Map { x: read(0), y }),
        (Op::Rows(_), Ready::Plain(kernel), _, Some(y)) => to.launch(kernel, args::Rows { rows, x: read(0), y }),
        (Op::Append(_), Ready::Append(kernel), ..) => {
            let turns = launch.rope.map_or([nothing, nothing], |id| [&turns[id.0].0, &turns[id.0].1]);
            let norms = [norm_of(0), norm_of(1)];
            let inputs = AppendInputs { q: read(0), k: read(1), v: read(2), norms, turns };
            let cache = &mut caches[launch.cache.expect("a cache").0];
            kernel.record(to, inputs, places, cache, queries, Faults { faults, layer })
        }
        (Op::AttendFew(_) | Op::AttendMany(_), Ready::Attend(kernel), _, Some(y)) => {
            let cache = &caches[launch.cache.expect("a cache").0];
            kernel.record(to, (queries, norm), places, cache, y, Faults { faults, layer })
        }
        (Op::Argmax(_), Ready::Plain(kernel), ..) => {
            let scratch = &mut choices.scratch;
            to.launch(kernel, args::Argmax { logits: read(0), scratch, best: tokens })
        }
        (Op::Sample(_), Ready::Plain(kernel), ..) => {
            let Choices { settings, draws, seen, .. } = choices;
            to.launch(kernel, args::Sample { logits: read(0), settings, draws, seen, tokens })
        }
        _ => unreachable!("a launch has the kernel and the buffers of its operation"),
    };
    values.extend(written);
    result
}
