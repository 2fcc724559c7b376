//! Comparing a device with the CPU, on made-up data: what `qp check-gpu` does, and the test suite on the interpreter.
//!
//! Everything is compared to the bit: decoded matrices, rows looked up, prepared activations, products of every batch, encoded windows,
//! and the logits of small models. Products are compared with a sum in double precision too, so that a mistake common to device and CPU
//! shows.

pub mod activations;
pub mod attention;
pub mod experts;
pub mod formats;
pub mod synthetic;

use std::sync::Arc;

use qp_codegen::kernels::Span;
use qp_codegen::kernels::embed_packed::EmbedPacked;
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::kernels::product::Launch;
use qp_codegen::reference::{self, Activations, RmsNorm, Rotator};
use qp_codegen::spec::{Quantizer, Shape};

use crate::codec::viterbi::{Scratch, Trellis};
use crate::codec::{Decoder, Gaussian, PackedMatrix};
use crate::device::ops::{
    DeviceActivations, DeviceMatrix, EmbedPackedKernel, Faults, GemvKernel, PrepareInputs, PrepareKernel,
};
use crate::device::{DeviceError, DeviceTrellis, Executor};
use crate::engine::{CpuEngine, CudaEngine, Logits, Room, Session};
use crate::model::weights::EMBEDDING;

/// Epsilon of the norms that are checked.
const EPS: f32 = 1e-5;
/// Largest error of a product relative to the norms of its factors: one rounding to `f32` after exact sums, and two products.
const PRODUCT_ERROR: f64 = 1e-6;

/// Why a comparison failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Values that differ.
    #[error("{what}: value {index} of {len} is {device} on the device, {cpu} on the CPU")]
    Differs {
        /// What was compared.
        what: String,
        /// The first that differs.
        index: usize,
        /// How many there are.
        len: usize,
        /// On the device.
        device: String,
        /// On the CPU.
        cpu: String,
    },
    /// The device failed.
    #[error("{what}: {source}")]
    Device {
        /// What was to be compared.
        what: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Failure {
    fn of<E: std::error::Error + Send + Sync + 'static>(what: &str) -> impl FnOnce(E) -> Failure + '_ {
        move |e| Failure::Device { what: what.into(), source: Box::new(e) }
    }
}

/// Compares bit for bit, so that zeros of either sign differ.
fn same<T: PartialEq + std::fmt::Display>(
    what: &str,
    device: &[T],
    cpu: &[T],
    bits: impl Fn(&T) -> u32,
) -> Result<(), Failure> {
    if device.len() != cpu.len() {
        let (device, len) = (format!("among {}", device.len()), cpu.len());
        return Err(Failure::Differs { what: what.into(), index: 0, len, device, cpu: format!("among {len}") });
    }
    match device.iter().zip(cpu).position(|(a, b)| bits(a) != bits(b)) {
        None => Ok(()),
        Some(index) => Err(Failure::Differs {
            what: what.into(),
            index,
            len: cpu.len(),
            device: device[index].to_string(),
            cpu: cpu[index].to_string(),
        }),
    }
}

fn same_floats(what: &str, device: &[f32], cpu: &[f32]) -> Result<(), Failure> {
    same(what, device, cpu, |v| v.to_bits())
}

/// Compares what `on` computes with matrices of `q` with what the CPU does: a decoded matrix, rows of it, and for each batch
/// prepared activations and products, of the best launch of each kernel and
/// of one that splits columns, each twice. Gives the number of comparisons.
///
/// # Errors
/// The first difference.
pub fn quantizer(on: &Executor, q: &Quantizer, shape: Shape, batches: &[u32]) -> Result<usize, Failure> {
    let name = format!("{}, {} x {}", q.name, shape.rows, shape.cols);
    let packed = synthetic::matrix(&name, q, shape);
    let decoder = Decoder::new(q);
    let weights = decoder.weights(&packed);

    let what = format!("{name}: decoded matrix");
    let parts = [(shape.rows, packed.words.as_slice(), packed.scales.as_slice())];
    let matrix = DeviceMatrix::upload(on, q, shape.cols, &parts).map_err(Failure::of(&what))?;
    let decoded = matrix.dequantize(on, q).map_err(Failure::of(&what))?;
    same_floats(&what, &decoded, &weights)?;
    same_rows(on, &name, &decoder, &packed, &matrix)?;
    let mut done = 2;
    for &batch in batches {
        done += products(on, &name, &decoder, &packed, &weights, &matrix, batch)?;
    }
    Ok(done)
}

/// Compares rows that are looked up in a matrix, as in an embedding.
fn same_rows(
    on: &Executor,
    name: &str,
    decoder: &Decoder,
    packed: &PackedMatrix,
    matrix: &DeviceMatrix,
) -> Result<(), Failure> {
    let (q, shape) = (decoder.quantizer(), packed.layout.shape);
    let what = format!("{name}: rows looked up");
    let tokens = [shape.rows - 1, 0, shape.rows / 2];
    let mut rows = decoder.rows(packed, &tokens);
    let back = Rotator::inverse(q.rotation, shape.cols);
    rows.chunks_exact_mut(shape.cols as usize).for_each(|row| back.apply(row));
    let run = || {
        let op = EmbedPacked { quantizer: q, shape, batch: tokens.len() as u32, y: Span::rows(shape.cols) };
        let kernel = EmbedPackedKernel::load(on, &op)?;
        let mut y = on.zeroed::<f32>(rows.len())?;
        kernel.launch(on, matrix, &on.upload(&tokens.map(u32::cast_signed))?, &mut y)?;
        y.to_vec()
    };
    same_floats(&what, &run().map_err(Failure::of(&what))?, &rows)
}

/// Compares the windows that `on` finds for Gaussian weights, with outliers and zeros among them, with the CPU's, for
/// each code of `q`. Gives the number of comparisons.
///
/// # Errors
/// The first difference.
pub fn encoder(on: &Executor, q: &Quantizer, blocks: usize) -> Result<usize, Failure> {
    for (i, code) in q.codes.iter().enumerate() {
        let what = format!("{}: windows of code {i}", q.name);
        let trellis = Trellis::new(code);
        let mut weights = Gaussian::new(i as u64).samples(blocks * trellis.block_len());
        weights[0] = 1e30;
        let zeros = trellis.block_len().min(weights.len() / 2);
        weights[zeros..2 * zeros].fill(0.0);
        let mut windows = vec![0; blocks * trellis.steps()];
        let parts = trellis.blocks_at_once();
        windows
            .chunks_mut(parts * trellis.steps())
            .zip(weights.chunks(parts * trellis.block_len()))
            .for_each(|(windows, weights)| trellis.encode(weights, windows, &mut Scratch::default()));
        let run = || DeviceTrellis::new(on, code)?.encode(&weights);
        let (found, _) = run().map_err(Failure::of(&what))?;
        same(&what, &found, &windows, |w| *w)?;
    }
    Ok(q.codes.len())
}

fn products(
    on: &Executor,
    name: &str,
    decoder: &Decoder,
    packed: &PackedMatrix,
    weights: &[f32],
    matrix: &DeviceMatrix,
    batch: u32,
) -> Result<usize, Failure> {
    let (q, shape) = (decoder.quantizer(), packed.layout.shape);
    let columns = shape.cols as usize;
    let what = format!("{name}, {batch} token(s)");
    let mut random = synthetic::Random::of(&what);
    let input = random.values(columns * batch as usize, 3.0);
    let norm = random.values(columns, 2.0);

    let fail = format!("{what}: preparing activations");
    let rms_norm = RmsNorm { eps: EPS, add_one: false };
    let prepare = Prepare {
        columns: shape.cols,
        batch,
        input: Span::rows(shape.cols),
        gate: None,
        norm: Some(rms_norm),
        rotation: q.rotation,
        entering: None,
    };
    let run = || {
        let mut kernel = PrepareKernel::load(on, &prepare)?;
        let mut out = DeviceActivations::new(on, shape.cols, batch)?;
        let (input, norm, mut faults) = (on.upload(&input)?, on.upload(&norm)?, on.zeroed(1)?);
        let inputs = PrepareInputs { norm: &norm, ..PrepareInputs::plain(&input) };
        kernel.launch(on, inputs, &mut out, Faults { faults: &mut faults, layer: 0 })?;
        Ok::<_, DeviceError>(out)
    };
    let activations = run().map_err(Failure::of(&fail))?;
    let rotated = input.chunks_exact(columns).map(|x| {
        let mut x = rms_norm.apply(x, &norm);
        reference::rotate(q.rotation, &mut x);
        x
    });
    let rotated: Vec<Vec<f32>> = rotated.collect();
    let tokens: Vec<Activations> = rotated.iter().map(|x| reference::quantize_activations(x)).collect();
    compare_activations(&fail, &activations, &tokens).map_err(|e| match e {
        Ok(failure) => failure,
        Err(e) => Failure::of(&fail)(e),
    })?;
    let mut done = 1;

    let expected = decoder.linear(packed, &tokens);
    exact_products(&what, weights, columns, &tokens, &expected)?;
    let op = Gemv { quantizer: q, shape, batch, accumulate: false };
    // Of activations that a launch before has prepared, and of those that blocks prepare themselves.
    let mut launches: Vec<(Option<&Prepare>, Launch)> = Vec::new();
    for own in [None, Some(&prepare)] {
        // The best of each way of multiplying, with and without columns split between those whose sums meet.
        for (_, launch) in Launch::ranked_with(&op, own, &on.device()) {
            let alike = |(other, l): &(Option<&Prepare>, Launch)| {
                other.is_some() == own.is_some()
                    && l.way() == launch.way()
                    && l.splits_columns() == launch.splits_columns()
            };
            if !launches.iter().any(alike) {
                launches.push((own, launch));
            }
        }
    }
    let stride = packed.layout.padded_rows() as usize;
    for (own, launch) in launches {
        let what =
            format!("{what}: product with {launch:?}{}", if own.is_some() { ", prepared by each block" } else { "" });
        let run = || {
            let mut kernel = GemvKernel::load_with(on, &op, own, &launch)?;
            let mut y = on.zeroed::<f32>(stride * batch as usize)?;
            let (input, norm, mut faults) = (on.upload(&input)?, on.upload(&norm)?, on.zeroed(1)?);
            // The second run finds what the first left where blocks meet.
            for _ in 0..2 {
                if own.is_some() {
                    let inputs = PrepareInputs { norm: &norm, ..PrepareInputs::plain(&input) };
                    let faults = Faults { faults: &mut faults, layer: 0 };
                    kernel.launch_preparing(on, matrix, inputs, faults, &mut y)?;
                } else {
                    kernel.launch(on, matrix, &activations, &mut y)?;
                }
            }
            y.to_vec()
        };
        let y = run().map_err(Failure::of(&what))?;
        let rows: Vec<f32> = y.chunks_exact(stride).flat_map(|row| &row[..shape.rows as usize]).copied().collect();
        same_floats(&what, &rows, &expected)?;
        done += 1;
    }
    Ok(done)
}

fn compare_activations(
    what: &str,
    device: &DeviceActivations,
    tokens: &[Activations],
) -> Result<(), Result<Failure, DeviceError>> {
    let scales: Vec<f32> = tokens.iter().map(|t| t.scale).collect();
    let sums: Vec<i32> = tokens.iter().map(|t| t.sum as i32).collect();
    same(what, &device.x.to_vec().map_err(Err)?, &reference::activation_cells(tokens), |v| *v as u32).map_err(Ok)?;
    same_floats(what, &device.scale.to_vec().map_err(Err)?, &scales).map_err(Ok)?;
    same(what, &device.sum.to_vec().map_err(Err)?, &sums, |v| v.cast_unsigned()).map_err(Ok)
}

/// Compares products with sums in double precision over the decoded weights.
fn exact_products(
    what: &str,
    weights: &[f32],
    columns: usize,
    tokens: &[Activations],
    products: &[f32],
) -> Result<(), Failure> {
    let rows = weights.len() / columns;
    for (i, y) in products.iter().enumerate() {
        let token = &tokens[i / rows];
        let row = &weights[i % rows * columns..][..columns];
        let x = || token.q.iter().map(|q| f64::from(*q) * f64::from(token.scale));
        let sum: f64 = row.iter().zip(x()).map(|(w, x)| f64::from(*w) * x).sum();
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
        let size = norm(&mut row.iter().map(|w| f64::from(*w))) * norm(&mut x());
        if (f64::from(*y) - sum).abs() > PRODUCT_ERROR * size {
            let what = format!("{what}: product and its sum in double precision");
            return Err(Failure::Differs {
                what,
                index: i,
                len: products.len(),
                device: y.to_string(),
                cpu: sum.to_string(),
            });
        }
    }
    Ok(())
}

/// Runs a small random model on `on` and on the CPU, tokens cut and resumed in several ways, and compares logits, to the
/// bit. Gives the number of comparisons.
///
/// # Errors
/// The first difference.
pub fn model(
    on: &Executor,
    name: &str,
    shapes: &synthetic::Shapes,
    choose: &dyn Fn(&str) -> Option<Quantizer>,
) -> Result<usize, Failure> {
    let (config, weights) = synthetic::model(shapes, choose).map_err(Failure::of(name))?;
    let context = config.max_positions;
    let device = CudaEngine::new(on.clone(), &weights, Room::one(context)).map_err(Failure::of(name))?;
    let cpu = CpuEngine::new(Arc::new(weights), Room::one(context)).map_err(Failure::of(name))?;
    let (mut device, mut other) = (Session::new(Box::new(device)), Session::new(Box::new(cpu)));
    let tokens: Vec<u32> = (0..context as u32).map(|i| i * 17 % shapes.vocab as u32).collect();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let cuts = [
        (0, 13, Logits::All),
        (13, 14, Logits::Last),
        (14, 20, Logits::None),
        (20, 22, Logits::Last),
        (10, 11, Logits::Last),
        (11, context, Logits::All),
    ];
    for (from, to, logits) in cuts {
        let what = format!("{name}: logits of tokens {from}..{to}");
        device.truncate(from);
        other.truncate(from);
        device.forward(&tokens[from..to], logits, &mut a).map_err(Failure::of(&what))?;
        other.forward(&tokens[from..to], logits, &mut b).map_err(Failure::of(&what))?;
        same_floats(&what, &a, &b)?;
    }
    let what = format!("{name}: likeliest tokens");
    device.truncate(7);
    other.truncate(7);
    for cut in [7..8, 8..21] {
        let a = device.greedy(&tokens[cut.clone()]).map_err(Failure::of(&what))?;
        let b = other.greedy(&tokens[cut.clone()]).map_err(Failure::of(&what))?;
        same(&what, &[a], &[b], |v| *v)?;
    }
    Ok(cuts.len() + 2)
}

/// The small models that are worth comparing: every kind of layer, and every width of head.
pub fn shapes() -> Vec<(&'static str, synthetic::Shapes)> {
    let small = synthetic::Shapes {
        hidden: 64,
        inner: 96,
        heads: 4,
        head_dim: 16,
        vocab: 50,
        context: 40,
        biased: false,
        tied: true,
        experts: None,
    };
    let experts = |architecture, count, chosen| synthetic::Shapes {
        experts: Some(synthetic::Mixture { architecture, count, chosen }),
        ..small
    };
    vec![
        ("small model", small),
        ("small model with biases", synthetic::Shapes { biased: true, tied: false, ..small }),
        ("model with heads of 64", synthetic::Shapes { head_dim: 64, heads: 2, hidden: 128, inner: 256, ..small }),
        ("model with heads of 128", synthetic::Shapes { head_dim: 128, heads: 2, context: 300, ..small }),
        ("mixture of experts", experts("Qwen3MoeForCausalLM", 7, 3)),
        ("mixture of experts with limits and biases", experts("GptOssForCausalLM", 4, 2)),
        ("mixture of experts of which one is shared", experts("Glm4MoeForCausalLM", 33, 4)),
    ]
}

/// Which quantizer, if any, the layer of a name gets.
pub type Choose = Box<dyn Fn(&str) -> Option<Quantizer> + Sync>;

/// The quantizers of the small models' layers: none at all, one everywhere, several and none side by side, or one of the
/// embedding, which serves a tied output layer too.
pub fn choices(a: &Quantizer, b: &Quantizer) -> Vec<(&'static str, Choose)> {
    let (one, embedding, a, b) = (a.clone(), a.clone(), a.clone(), b.clone());
    vec![
        ("unquantized", Box::new(|_| None)),
        ("quantized", Box::new(move |_| Some(one.clone()))),
        (
            "mixed",
            Box::new(move |name| {
                let is = |part: &str| name.contains(part);
                if is(".experts.") {
                    // Experts that are alike, one of another quantizer, one that is half of each, one unquantized.
                    return match name {
                        _ if is("experts.0.") => None,
                        _ if is("experts.1.") || is("experts.2.up_proj") => Some(b.clone()),
                        _ => Some(a.clone()),
                    };
                }
                if is("q_proj") || is("v_proj") || is("down_proj") {
                    Some(a.clone())
                } else if is("k_proj") || is("1.mlp.gate_proj") || is("lm_head") {
                    Some(b.clone())
                } else {
                    None
                }
            }),
        ),
        ("quantized embedding", Box::new(move |name| (name == EMBEDDING).then(|| embedding.clone()))),
    ]
}

#[cfg(test)]
mod tests {
    use qp_codegen::ir::interpret::Options;
    use qp_codegen::palette;

    use super::*;

    fn member(name: &str) -> Quantizer {
        synthetic::trained(palette::get(name).expect("in the palette"))
    }

    fn interpreter() -> Executor {
        Executor::interpreter_with(Options { races: true, reverse: true })
    }

    #[test]
    fn small_models_on_the_interpreter() {
        let (a, b) = (member("nuq_3"), member("fast_1.5"));
        for (shape, shapes) in &shapes()[..2] {
            for (kind, choose) in choices(&a, &b) {
                let name = format!("{kind} {shape}");
                model(&interpreter(), &name, shapes, &*choose).unwrap_or_else(|e| panic!("{e}"));
            }
        }
    }

    #[test]
    fn mixtures_of_experts_on_the_interpreter() {
        let (a, b) = (member("nuq_3"), member("fast_1.5"));
        let all = shapes();
        let mixtures: Vec<_> = all.iter().filter(|s| s.1.experts.is_some()).collect();
        assert_eq!(mixtures.len(), 3);
        for (shape, shapes) in mixtures {
            for (kind, choose) in choices(&a, &b) {
                let name = format!("{kind} {shape}");
                model(&interpreter(), &name, shapes, &*choose).unwrap_or_else(|e| panic!("{e}"));
            }
        }
    }

    #[test]
    fn a_refused_call_changes_nothing() {
        use crate::engine::Error;
        let (_, shapes) = &shapes()[0];
        let (_, weights) = synthetic::model(shapes, &|_| None).unwrap();
        let engine = |context| CudaEngine::new(Executor::interpreter(), &weights, Room::one(context));
        assert!(matches!(engine(41), Err(Error::Positions { .. })));
        let (mut session, mut out) = (Session::new(Box::new(engine(8).unwrap())), Vec::new());
        session.forward(&[1, 2, 3], Logits::None, &mut out).unwrap();
        assert!(matches!(session.forward(&[0; 6], Logits::Last, &mut out), Err(Error::Context { .. })));
        assert!(matches!(session.greedy(&[0, 50]), Err(Error::Token { .. })));
        assert_eq!(session.position(), 3);
        session.truncate(9);
        assert_eq!(session.position(), 3);
        session.forward(&[4; 5], Logits::All, &mut out).unwrap();
        assert_eq!((session.position(), out.len()), (8, 5 * 50));
    }

    #[test]
    fn engines_run_on_their_own_weights_and_share_the_rest() {
        use crate::engine::{Engine, SharedWeights};
        use crate::model::{Tensor, Weight};
        let (_, shapes) = &shapes()[0];
        let (_, weights) = synthetic::model(shapes, &|_| None).unwrap();
        let mut changed = weights.clone();
        let o = weights.program.named("model.layers.0.self_attn.o_proj").unwrap();
        let (rows, cols) = (weights[o].rows, weights[o].cols);
        let zeros = Tensor::from_f32(&[rows, cols], &vec![0.0; rows * cols]).unwrap();
        changed.replace(o, Weight::Dense(zeros));
        let logits = |engine: Box<dyn Engine>| {
            let mut out = Vec::new();
            Session::new(engine).forward(&[1, 2, 3], Logits::Last, &mut out).unwrap();
            out
        };
        let on = interpreter();
        let mut family = SharedWeights::on(Some(&on));
        let mut seen = Vec::new();
        for weights in [&weights, &changed, &weights] {
            let weights = Arc::new(weights.clone());
            let shared = logits(family.open(&weights, Room::one(8)).unwrap());
            let alone = CudaEngine::new(on.clone(), &weights, Room::one(8)).unwrap();
            assert_eq!(shared, logits(Box::new(alone)));
            seen.push(shared);
        }
        assert!(seen[0] != seen[1] && seen[0] == seen[2]);
    }

    #[test]
    fn quantizers_on_the_interpreter() {
        for name in ["nuq_3", "fast_1.5"] {
            let shape = Shape { rows: 40, cols: 320 };
            let done = quantizer(&interpreter(), &member(name), shape, &[1, 3]).unwrap_or_else(|e| panic!("{e}"));
            assert!(done >= 5, "{done} comparisons");
        }
    }

    #[test]
    fn a_difference_is_reported_with_its_place() {
        let e = same_floats("it", &[1.0, 0.0], &[1.0, -0.0]).unwrap_err();
        assert_eq!(e.to_string(), "it: value 1 of 2 is 0 on the device, -0 on the CPU");
        assert!(same_floats("it", &[1.0], &[1.0, 2.0]).is_err());
    }

    #[test]
    fn a_wrong_product_is_noticed() {
        let token = Activations { q: vec![100, -200], scale: 0.5, sum: -100 };
        exact_products("it", &[1.0, 2.0], 2, std::slice::from_ref(&token), &[-150.0]).unwrap();
        let e = exact_products("it", &[1.0, 2.0], 2, &[token], &[-149.9]).unwrap_err();
        assert!(e.to_string().contains("double precision"), "{e}");
    }
}
