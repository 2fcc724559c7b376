//! Products whose launches are measured on the GPU that is to run them: what [`jit::launches`](crate::jit::launches)
//! needs to know of a device.

use qp_codegen::kernels::Span;
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::kernels::product::Launch;
use rayon::prelude::*;

use super::ops::{DeviceActivations, DeviceMatrix, Faults, GemvKernel, PrepareInputs};
use super::{Buffer, DeviceError, Executor, Recorder};
use crate::check::synthetic;
use crate::jit::launches::{self, Choice, Chosen, Wanted};
use crate::jit::{Cache, Usage};

/// A product to be loaded.
pub struct Product<'a> {
    /// What it computes.
    pub op: Gemv<'a>,
    /// The preparation that its blocks do themselves.
    pub prepare: Option<&'a Prepare>,
    /// Content hash of its quantizer.
    pub hash: &'a str,
    /// Matrices that it will be launched with; one at least.
    pub matrices: Vec<&'a DeviceMatrix>,
}

/// The same without matrices.
#[derive(Clone, Copy)]
struct Wish<'a> {
    op: Gemv<'a>,
    prepare: Option<&'a Prepare>,
    hash: &'a str,
}

impl<'a> From<&Product<'a>> for Wish<'a> {
    fn from(&Product { op, prepare, hash, .. }: &Product<'a>) -> Self {
        Wish { op, prepare, hash }
    }
}

impl Wish<'_> {
    fn load(&self, on: &Executor, launch: &Launch) -> Result<GemvKernel, DeviceError> {
        GemvKernel::load_with(on, &self.op, self.prepare, launch)
    }
}

/// Launches of a timed run, at least.
const LAUNCHES: usize = 24;
/// Runs, of which the fastest counts.
const ROUNDS: usize = 5;
/// Bytes of matrices that launches go through in turn, in sizes of the L2 cache: in a model, too, other matrices come
/// between.
const CACHES: usize = 2;
/// Matrices that launches go through, at most.
const MATRICES: usize = 64;

/// The kernel of each product, with its launch: on a GPU as the user wants it chosen ([`Choice`]), elsewhere the model's.
///
/// Nothing is measured unless the user wants it, so that a first token does not wait for it; see [`measured`].
///
/// # Errors
/// Those of the executor; a wish that is none.
pub fn load(on: &Executor, products: &[Product<'_>]) -> Result<Vec<(Launch, GemvKernel)>, DeviceError> {
    let ops: Vec<_> = products.iter().map(Wish::from).collect();
    let chosen =
        choose(on, Choice::of_user()?, &ops, |i, kernels| in_turn(on, &ops[i], &products[i].matrices, kernels))?;
    Ok(chosen.into_iter().map(|c| (c.launch, c.kernel)).collect())
}

/// As [`load`], but launches that are not known are measured, and remembered for later starts, unless the user wants the
/// model's.
///
/// # Errors
/// As [`load`].
pub fn measured(on: &Executor, products: &[Product<'_>]) -> Result<Vec<(Launch, GemvKernel)>, DeviceError> {
    let ops: Vec<_> = products.iter().map(Wish::from).collect();
    let chosen = choose(on, measuring()?, &ops, |i, kernels| in_turn(on, &ops[i], &products[i].matrices, kernels))?;
    Ok(chosen.into_iter().map(|c| (c.launch, c.kernel)).collect())
}

/// The launch of a product that is not measured now: one that was found to be the best before, or the model's.
///
/// # Errors
/// As [`load`].
pub fn remembered(on: &Executor, op: &Gemv<'_>, hash: &str) -> Result<Launch, DeviceError> {
    let how = match Choice::of_user()? {
        Choice::Remembered | Choice::Measured => Choice::Remembered,
        Choice::Model => Choice::Model,
    };
    let wish = Wish { op: *op, prepare: None, hash };
    let chosen = choose(on, how, &[wish], |_, _| Ok(Vec::new()))?;
    Ok(chosen.first().map_or_else(|| Launch::choose(op, &on.device()), |c| c.launch))
}

/// What the user wants where measuring is no loss of time.
fn measuring() -> Result<Choice, DeviceError> {
    Ok(match Choice::of_user()? {
        Choice::Remembered | Choice::Measured => Choice::Measured,
        Choice::Model => Choice::Model,
    })
}

/// [`load`] for products, launches chosen as `how` says; `time` gives the seconds of a product's candidates.
fn choose(
    on: &Executor,
    how: Choice,
    ops: &[Wish<'_>],
    time: impl FnMut(usize, &mut [(Launch, GemvKernel)]) -> Result<Vec<f64>, DeviceError>,
) -> Result<Vec<Chosen<GemvKernel>>, DeviceError> {
    let (target, device) = (on.target(), on.device());
    let gpu = match on.gpu() {
        Some(gpu) if how != Choice::Model => gpu,
        Some(_) | None => {
            let load = |wish: &Wish<'_>| {
                let launch = Launch::ranked_with(&wish.op, wish.prepare, &device)[0].1;
                Ok(Chosen { launch, kernel: wish.load(on, &launch)?, seconds: None })
            };
            return ops.par_iter().map(load).collect();
        }
    };
    let wanted = ops.par_iter().map(|Wish { op, prepare, hash }| {
        let ranked = Launch::ranked_with(op, *prepare, &device);
        Wanted::new((op, *prepare), hash, target, (&gpu.name, gpu.sms), &ranked)
    });
    let wanted = wanted.collect::<Result<Vec<_>, _>>()?;
    launches::choose(
        &Cache::of_user(),
        &wanted,
        how == Choice::Measured,
        |i, launch| ops[i].load(on, &launch),
        |kernel| kernel.loaded().usage().is_some_and(spills),
        time,
    )
}

fn spills(usage: Usage) -> bool {
    usage.spill_stores > 0 || usage.spill_loads > 0
}

/// Times a product's candidates over its matrices, and copies of them where they are small and few.
fn in_turn(
    on: &Executor,
    wish: &Wish<'_>,
    matrices: &[&DeviceMatrix],
    kernels: &mut [(Launch, GemvKernel)],
) -> Result<Vec<f64>, DeviceError> {
    let bytes = on.device().l2_bytes as usize * CACHES;
    let copies = copies(on, matrices, bytes, MATRICES)?;
    let matrices: Vec<_> = matrices.iter().copied().chain(&copies).take(MATRICES).collect();
    let layout = &matrices[0].layout;
    let mut y = on.zeroed((layout.padded_rows() * wish.op.batch) as usize)?;
    let kernels = kernels.iter_mut().map(|k| &mut k.1);
    let Some(prepare) = wish.prepare else {
        let x = DeviceActivations::new(on, layout.shape.cols, wish.op.batch)?;
        return time(on, kernels, &matrices, &x, &mut y, LAUNCHES, ROUNDS);
    };
    let values = |span: Span| on.zeroed::<f32>(span.len(1, prepare.columns) as usize);
    let (input, norm) = (values(prepare.input)?, values(Span::rows(prepare.columns))?);
    let up = prepare.gate.map(|gate| values(gate.up)).transpose()?;
    let (mut faults, up) = (on.zeroed(1)?, up.as_ref().unwrap_or(&input));
    time_by(on, kernels, &matrices, LAUNCHES, ROUNDS, |kernel, graph, matrix| {
        let inputs = PrepareInputs { input: &input, up, norm: &norm, factors: None };
        kernel.record_preparing(graph, matrix, inputs, Faults { faults: &mut faults, layer: 0 }, &mut y)
    })
}

/// Seconds of each product, with the preparation that it does itself, on random weights of its shape and with the launch that
/// [`measured`] chooses. `done` is called after each.
///
/// # Errors
/// Those of [`measured`].
pub fn seconds(
    on: &Executor,
    products: &[(Gemv<'_>, Option<Prepare>)],
    mut done: impl FnMut(),
) -> Result<Vec<f64>, DeviceError> {
    let hashes: Vec<String> = products.iter().map(|(op, _)| op.quantizer.hash()).collect();
    let products = products.iter().zip(&hashes);
    let ops: Vec<Wish<'_>> = products.map(|((op, own), hash)| Wish { op: *op, prepare: own.as_ref(), hash }).collect();
    let time = |i: usize, kernels: &mut [(Launch, GemvKernel)]| {
        let Gemv { quantizer: q, shape, .. } = ops[i].op;
        let packed = synthetic::matrix(&q.name, q, shape);
        let matrix = DeviceMatrix::upload(on, q, shape.cols, &[(shape.rows, &packed.words, &packed.scales)])?;
        in_turn(on, &ops[i], &[&matrix], kernels)
    };
    let chosen = choose(on, measuring()?, &ops, |i, kernels| {
        let times = time(i, kernels);
        done();
        times
    })?;
    let seconds = chosen.into_iter().enumerate().map(|(i, c)| match c.seconds {
        Some(seconds) => Ok(seconds),
        None => time(i, &mut [(c.launch, c.kernel)]).map(|times| times[0]),
    });
    seconds.collect()
}

/// Copies of `matrices` that together with them take `bytes` or more, but no more than `most` in all.
///
/// # Errors
/// A full GPU.
pub fn copies(
    on: &Executor,
    matrices: &[&DeviceMatrix],
    bytes: usize,
    most: usize,
) -> Result<Vec<DeviceMatrix>, DeviceError> {
    let (mut out, mut all) = (Vec::new(), matrices.iter().map(|m| m.bytes()).sum::<usize>());
    for of in matrices.iter().cycle().take(most.saturating_sub(matrices.len())) {
        if all >= bytes {
            break;
        }
        all += of.bytes();
        out.push(of.copy(on)?);
    }
    Ok(out)
}

/// Seconds of a launch of each kernel: a graph of at least `launches`, going through the matrices in turn, the fastest of
/// `rounds` runs. Runs of the kernels alternate, so that a change of the clock meets all of them.
///
/// # Errors
/// Those of the executor.
pub fn time<'k>(
    on: &Executor,
    kernels: impl Iterator<Item = &'k mut GemvKernel>,
    matrices: &[&DeviceMatrix],
    x: &DeviceActivations,
    y: &mut Buffer<f32>,
    launches: usize,
    rounds: usize,
) -> Result<Vec<f64>, DeviceError> {
    time_by(on, kernels, matrices, launches, rounds, |kernel, graph, matrix| kernel.record(graph, matrix, x, y))
}

/// As [`time`], by what records a launch of a kernel.
fn time_by<'k>(
    on: &Executor,
    kernels: impl Iterator<Item = &'k mut GemvKernel>,
    matrices: &[&DeviceMatrix],
    launches: usize,
    rounds: usize,
    mut record: impl FnMut(&mut GemvKernel, &mut Recorder, &DeviceMatrix) -> Result<(), DeviceError>,
) -> Result<Vec<f64>, DeviceError> {
    let launches = launches.next_multiple_of(matrices.len());
    let mut graphs = Vec::new();
    for kernel in kernels {
        let mut graph = on.record();
        for i in 0..launches {
            record(kernel, &mut graph, matrices[i % matrices.len()])?;
        }
        graphs.push(graph.finish()?);
    }
    let mut best = vec![f64::INFINITY; graphs.len()];
    for _ in 0..rounds {
        for (graph, best) in graphs.iter().zip(&mut best) {
            *best = best.min(on.time(|| graph.launch())? / launches as f64);
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use qp_codegen::spec::Shape;

    use super::*;

    #[test]
    fn on_the_interpreter_the_model_chooses_and_copies_are_alike() {
        let on = Executor::interpreter();
        let q = qp_codegen::palette::get("nuq_3").expect("of the palette");
        let shape = Shape { rows: 40, cols: 320 };
        let packed = synthetic::matrix("tune", &q, shape);
        let upload = || DeviceMatrix::upload(&on, &q, 320, &[(40, &packed.words, &packed.scales)]).unwrap();
        let (a, b) = (upload(), upload());
        let op = Gemv { quantizer: &q, shape, batch: 2, accumulate: false };
        let product = Product { op, prepare: None, hash: &q.hash(), matrices: vec![&a, &b] };
        let mut loaded = load(&on, std::slice::from_ref(&product)).unwrap();
        assert_eq!(loaded[0].0, Launch::choose(&op, &on.device()));
        let times = in_turn(&on, &Wish::from(&product), &product.matrices, &mut loaded).unwrap();
        assert!(times.len() == 1 && times[0] > 0.0, "{times:?}");

        let small = Gemv { shape: Shape { rows: 16, cols: 64 }, batch: 1, ..op };
        let prepare = Prepare {
            columns: 64,
            batch: 1,
            input: Span::rows(64),
            gate: None,
            norm: None,
            rotation: qp_codegen::spec::Rotation::None,
            entering: None,
        };
        let alone = seconds(&on, &[(Gemv { batch: 1, ..op }, None), (small, Some(prepare))], || ()).unwrap();
        assert!(alone.len() == 2 && alone.iter().all(|&s| s > 0.0), "{alone:?}");

        let made = copies(&on, &product.matrices, 5 * a.bytes(), 10).unwrap();
        assert_eq!(made.len(), 3);
        assert_eq!(copies(&on, &product.matrices, usize::MAX, 4).unwrap().len(), 2);
        assert!(copies(&on, &product.matrices, a.bytes(), 10).unwrap().is_empty());
        assert_eq!(made[0].dequantize(&on, &q).unwrap(), a.dequantize(&on, &q).unwrap());
    }
}
