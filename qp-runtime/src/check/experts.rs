//! Comparing products of experts with the CPU: by every kernel that computes them, in steps of few and of many tokens.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use qp_codegen::kernels::experts::group::{self, Group};
use qp_codegen::kernels::experts::{Experts, most_pairs};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::{Span, grouped, product};
use qp_codegen::layout::Packed;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::reference::{Activations, quantize_activations};
use qp_codegen::spec::format::Format;
use qp_codegen::spec::terms::Terms;
use qp_codegen::spec::{Quantizer, Shape};

use super::synthetic::{self, Random};
use super::{Failure, formats, same_floats};
use crate::codec::{Decoder, Lines, PackedMatrix};
use crate::device::grouped::{GroupedExpertsArgs, GroupedMatrix};
use crate::device::ops::{DeviceActivations, DeviceMatrix, ExpertsKernel, Pairs};
use crate::device::{Buffer, DeviceError, Executor, Recorder, launches};

/// Experts, and how many a token goes through.
const COUNT: u32 = 6;
const CHOSEN: u32 = 2;
/// The expert that has no matrix here.
const ABSENT: i32 = 2;
/// What stands where no product is written.
const UNTOUCHED: f32 = 0.25;

/// Matrices of some experts, of a quantizer or a format.
trait Matrices {
    /// How a product of theirs is laid over a GPU.
    type Launch: Debug;
    /// They, on a device.
    type Stored;

    /// Rows × columns of each.
    fn shape(&self) -> Shape;

    /// Rows of outputs that a product writes, padding included.
    fn rows_written(&self) -> u32;

    /// The CPU's products of the matrix of an expert that is in place `place`, a row of outputs for each of `x`.
    fn product(&self, place: usize, x: &[Activations]) -> Vec<f32>;

    /// The best launch of each kernel.
    fn launches(&self, on: &Executor, e: &Experts) -> Vec<Self::Launch>;

    fn upload(&self, on: &Executor) -> Result<Self::Stored, DeviceError>;

    /// Adds the launch of the products to `to`.
    fn record(
        &self,
        on: &Executor,
        to: &mut Recorder,
        launch: (&Self::Launch, &Experts),
        stored: &Self::Stored,
        inputs: (&DeviceActivations, Pairs<'_>),
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError>;
}

/// Quantized ones.
struct Quantized<'q> {
    quantizer: &'q Quantizer,
    shape: Shape,
    decoder: Decoder,
    matrices: Vec<PackedMatrix>,
}

impl Quantized<'_> {
    fn op(&self, e: &Experts) -> Gemv<'_> {
        Gemv { quantizer: self.quantizer, shape: self.shape, batch: e.most, accumulate: false }
    }
}

impl Matrices for Quantized<'_> {
    type Launch = product::Launch;
    type Stored = DeviceMatrix;

    fn shape(&self) -> Shape {
        self.shape
    }

    fn rows_written(&self) -> u32 {
        Packed::new(self.quantizer, self.shape).padded_rows()
    }

    fn product(&self, place: usize, x: &[Activations]) -> Vec<f32> {
        self.decoder.linear(&self.matrices[place], x)
    }

    fn launches(&self, on: &Executor, e: &Experts) -> Vec<product::Launch> {
        let mut tried: Vec<product::Launch> = Vec::new();
        for launch in product::Launch::ranked_for_experts(&self.op(e), e, &on.device()) {
            if !tried.iter().any(|l| l.way() == launch.way()) {
                tried.push(launch);
            }
        }
        tried
    }

    fn upload(&self, on: &Executor) -> Result<DeviceMatrix, DeviceError> {
        let parts: Vec<_> =
            self.matrices.iter().map(|m| (self.shape.rows, m.words.as_slice(), m.scales.as_slice())).collect();
        DeviceMatrix::upload(on, self.quantizer, self.shape.cols, &parts)
    }

    fn record(
        &self,
        on: &Executor,
        to: &mut Recorder,
        (launch, e): (&product::Launch, &Experts),
        stored: &DeviceMatrix,
        (x, pairs): (&DeviceActivations, Pairs<'_>),
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        ExpertsKernel::load(on, &self.op(e), e, launch)?.record(to, stored, x, pairs, y)
    }
}

/// Those of a format.
struct OfFormat<'r> {
    reader: &'r Reader,
    terms: &'r Terms,
    tensors: Vec<Vec<Vec<u8>>>,
}

impl OfFormat<'_> {
    fn op(&self, e: &Experts) -> grouped::Product<'_> {
        let y = Span::rows(e.stride);
        grouped::Product { terms: self.terms, shape: self.reader.shape(), batch: e.most, y, accumulate: false }
    }

    fn slices(&self, place: usize) -> Vec<&[u8]> {
        self.tensors[place].iter().map(Vec::as_slice).collect()
    }
}

impl Matrices for OfFormat<'_> {
    type Launch = grouped::Launch;
    type Stored = GroupedMatrix;

    fn shape(&self) -> Shape {
        self.reader.shape()
    }

    fn rows_written(&self) -> u32 {
        self.reader.shape().rows
    }

    fn product(&self, place: usize, x: &[Activations]) -> Vec<f32> {
        Lines::new(self.reader, self.slices(place)).product(x)
    }

    fn launches(&self, on: &Executor, e: &Experts) -> Vec<grouped::Launch> {
        let mut kernels = HashSet::new();
        let ranked = grouped::Launch::ranked_for_experts(&self.op(e), e, &on.device()).into_iter().map(|r| r.1);
        ranked.filter(|launch| kernels.insert(launch.fields().0)).collect()
    }

    fn upload(&self, on: &Executor) -> Result<GroupedMatrix, DeviceError> {
        let parts: Vec<_> = (0..self.tensors.len()).map(|place| (self.reader, self.slices(place))).collect();
        GroupedMatrix::upload(on, self.terms, &parts)
    }

    fn record(
        &self,
        on: &Executor,
        to: &mut Recorder,
        (launch, e): (&grouped::Launch, &Experts),
        stored: &GroupedMatrix,
        (x, pairs): (&DeviceActivations, Pairs<'_>),
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        let kernel = on.load::<GroupedExpertsArgs<'_>>(grouped::lower_for_experts(&self.op(e), launch, e))?;
        to.launch(&kernel, stored.args_of_experts(x, pairs, y))
    }
}

/// Compares what `on` computes for experts with matrices of `q` with the CPU's products, small ones alone if `small`: of pairs that
/// share their token's activations and of pairs with their own. Gives the number of comparisons.
///
/// # Errors
/// The first difference.
pub fn products(on: &Executor, q: &Quantizer, small: bool) -> Result<usize, Failure> {
    let shape = if small { Shape { rows: 40, cols: 320 } } else { Shape { rows: 400, cols: 1100 } };
    let name = format!("experts of {}, {} x {}", q.name, shape.rows, shape.cols);
    let matrices = (0..COUNT - 1).map(|e| synthetic::matrix(&format!("{name} {e}"), q, shape)).collect();
    compare(on, &name, &Quantized { quantizer: q, shape, decoder: Decoder::new(q), matrices }, small)
}

/// The same for experts with matrices of a format: no comparisons of one whose products are not exact, or that does something to
/// activations or results, as experts of such formats are floats.
///
/// # Errors
/// The first difference.
pub fn products_of_format(on: &Executor, format: &Format, small: bool) -> Result<usize, Failure> {
    let wanted = if small { Shape { rows: 48, cols: 320 } } else { Shape { rows: 400, cols: 1088 } };
    let shape = formats::fitting(format, wanted);
    let name = format!("experts of {}, {} x {}", format.name, shape.rows, shape.cols);
    let Some(format) = formats::laid(format) else { return Ok(0) };
    let layout = format.layouts[0].clone();
    let reader = Reader::new(&Arc::new(Book::new(format)), &layout, shape).map_err(Failure::of(&name))?;
    let Some(terms) = reader.terms().filter(|terms| !terms.is_apart()) else { return Ok(0) };
    let tensors = (0..COUNT - 1).map(|e| reader.made(e.into())).collect();
    compare(on, &name, &OfFormat { reader: &reader, terms, tensors }, small)
}

fn compare<M: Matrices>(on: &Executor, name: &str, matrices: &M, small: bool) -> Result<usize, Failure> {
    let (shape, steps): (_, &[u32]) = (matrices.shape(), if small { &[1, 5, 40] } else { &[1, 3, 8, 64, 700] });
    let places: Vec<i32> = (0..COUNT as i32)
        .map(|e| match e.cmp(&ABSENT) {
            std::cmp::Ordering::Less => e,
            std::cmp::Ordering::Equal => -1,
            std::cmp::Ordering::Greater => e - 1,
        })
        .collect();
    let mut done = 0;
    for &tokens in steps {
        for shared in [true, false] {
            let what = format!("{name}, {tokens} token(s)");
            let pairs = tokens * CHOSEN;
            let rows = if shared { tokens } else { pairs };
            let mut random = Random::of(&what);
            let values = random.values((rows * shape.cols) as usize, 3.0);
            let inputs: Vec<Activations> = values.chunks_exact(shape.cols as usize).map(quantize_activations).collect();
            // The last expert has no pairs, the first has many.
            let of_pair = |p: u32| if p.is_multiple_of(3) { 0 } else { (p * 7 + p / 5) % (COUNT - 1) };
            let expert_of: Vec<i32> = (0..pairs).map(|p| of_pair(p) as i32).collect();
            let most = most_pairs(tokens, CHOSEN, COUNT);
            let stride = matrices.rows_written() + 16;
            let e = Experts { count: COUNT, matrices: COUNT - 1, rows, pairs, most, stride };
            let mut expected = vec![UNTOUCHED; (pairs * stride) as usize];
            for place in 0..COUNT as usize - 1 {
                let own: Vec<usize> =
                    (0..pairs as usize).filter(|p| places[expert_of[*p] as usize] == place as i32).collect();
                let x: Vec<Activations> = own.iter().map(|p| inputs[p / (pairs / rows) as usize].clone()).collect();
                let y = matrices.product(place, &x);
                for (p, y) in own.iter().zip(y.chunks_exact(shape.rows as usize)) {
                    expected[p * stride as usize..][..shape.rows as usize].copy_from_slice(y);
                }
            }
            for launch in matrices.launches(on, &e) {
                let what = format!("{what}: product with {launch:?}");
                let run = || {
                    let stored = matrices.upload(on)?;
                    let x = DeviceActivations::upload(on, &inputs)?;
                    let (experts, places) = (on.upload(&expert_of)?, on.upload(&places)?);
                    let (mut sorted, mut units) = (on.zeroed(pairs as usize)?, on.zeroed(4 * e.units() as usize)?);
                    let mut y = on.upload(&vec![UNTOUCHED; expected.len()])?;
                    let mut recorder = on.record();
                    if most > 1 {
                        let kernel = group::lower(&Group { count: COUNT, pairs, most });
                        let kernel = on.load::<launches::Group<'_>>(kernel)?;
                        let args = launches::Group { experts: &experts, pairs: &mut sorted, units: &mut units };
                        recorder.launch(&kernel, args)?;
                    }
                    let units = if most > 1 { &units } else { &experts };
                    let lists = Pairs { units, pairs: &sorted, places: &places };
                    matrices.record(on, &mut recorder, (&launch, &e), &stored, (&x, lists), &mut y)?;
                    recorder.finish()?.launch()?;
                    y.to_vec()
                };
                let y = run().map_err(Failure::of::<DeviceError>(&what))?;
                // Rows of padding are nobody's.
                let real = |y: &[f32]| -> Vec<f32> {
                    y.chunks_exact(stride as usize).flat_map(|row| &row[..shape.rows as usize]).copied().collect()
                };
                same_floats(&what, &real(&y), &real(&expected))?;
                done += 1;
            }
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use qp_codegen::cuda::Target;
    use qp_codegen::ir::interpret::Options;

    use super::*;

    #[test]
    fn the_interpreter_multiplies_experts_as_the_cpu() {
        // Products of warp groups are for many tokens on Hopper alone.
        for (target, name, comparisons) in [(Target::Sm90a, "nuq_3", 14), (Target::Sm80, "fast_1.5", 12)] {
            let on = Executor::interpreter_of(target, Options::default());
            let q = synthetic::trained(qp_codegen::palette::get(name).expect("in the palette"));
            assert_eq!(products(&on, &q, true).unwrap_or_else(|e| panic!("{e}")), comparisons);
        }
        let on = Executor::interpreter_of(Target::Sm90a, Options::default());
        let of_format = |name| products_of_format(&on, qp_codegen::formats::get(name).expect("built in"), true);
        assert_eq!(of_format("gptq_int4_g32").unwrap_or_else(|e| panic!("{e}")), 10);
        // What is done to activations is a matrix's own.
        assert_eq!(of_format("exl3_mul1_3").unwrap_or_else(|e| panic!("{e}")), 0);
    }
}
