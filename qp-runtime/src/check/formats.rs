//! Exact products with matrices of formats, of a device and of the CPU.

use std::collections::HashSet;
use std::sync::Arc;

use qp_codegen::kernels::Span;
use qp_codegen::kernels::grouped::{Launch, Product};
use qp_codegen::kernels::leave::{self, Leave};
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::spec::Shape;
use qp_codegen::spec::format::{Format, Layout};

use super::synthetic::Random;
use super::{Failure, same_floats};
use crate::codec::Lines;
use crate::device::grouped::{GroupedKernel, GroupedMatrix};
use crate::device::launches as args;
use crate::device::ops::{DeviceActivations, Faults, PrepareInputs, PrepareKernel};
use crate::device::{DeviceError, Executor};

/// The format with a layout: its own, or, if it has none, one of codes and fields as they are.
pub fn laid(format: &Format) -> Option<Format> {
    let mut format = format.clone();
    if format.layouts.is_empty() {
        format.layouts.push(Layout::plain(&format)?);
    }
    Some(format)
}

/// The shape next to `wanted` that the format's layout and transforms have: sides rounded up to multiples of powers of two, up
/// to 1024, or to powers of two. That which was wanted if there is none, or no layout.
pub fn fitting(format: &Format, wanted: Shape) -> Shape {
    let Some(format) = laid(format) else { return wanted };
    let layout = format.layouts[0].clone();
    let book = Arc::new(Book::without_entries(format));
    let sides = |side: u32| {
        let mut all = [1, 32, 64, 128, 256, 1024].map(|step| side.next_multiple_of(step)).to_vec();
        all.push(side.next_power_of_two());
        all
    };
    let (rows, cols) = (sides(wanted.rows), sides(wanted.cols));
    let mut all = rows.iter().flat_map(|&rows| cols.iter().map(move |&cols| Shape { rows, cols }));
    all.find(|shape| Reader::new(&book, &layout, *shape).is_ok()).unwrap_or(wanted)
}

/// Compares products with a `shape` matrix of made-up bits, of the launch of each kernel that the cost model likes best, and of the
/// one of all that it likes least; the same of those whose blocks prepare the token themselves. Gives the number of comparisons: none for a format whose products are not exact.
///
/// # Errors
/// The first difference, a shape that the format's layout does not have.
pub fn format(on: &Executor, format: &Format, shape: Shape, batches: &[u32]) -> Result<usize, Failure> {
    let name = format!("{}, {} x {}", format.name, shape.rows, shape.cols);
    let Some(format) = laid(format) else { return Ok(0) };
    let layout = format.layouts[0].clone();
    let reader = Reader::new(&Arc::new(Book::new(format)), &layout, shape).map_err(Failure::of(&name))?;
    let Some(terms) = reader.terms() else { return Ok(0) };
    let tensors = reader.made(u64::from(shape.cols));
    let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
    let matrix = GroupedMatrix::upload(on, terms, &[(&reader, tensors.clone())]).map_err(Failure::of(&name))?;
    let turned = reader.turned(&tensors).expect("products are exact");
    let mut random = Random::of(&name);
    let mut done = 0;
    for &batch in batches {
        let values = random.values((batch * shape.cols) as usize, 3.0);
        let inputs: Vec<_> = values.chunks_exact(shape.cols as usize).map(|x| turned[0].entered(x)).collect();
        let expected = Lines::new(&reader, tensors.clone()).product(&inputs);
        let op = Product { terms, shape, batch, y: Span::rows(shape.rows), accumulate: false };
        let ranked = Launch::ranked(&op, &on.device());
        let last = ranked[ranked.len() - 1].1;
        let mut kernels = HashSet::new();
        let best = ranked.iter().map(|r| r.1).filter(|launch| kernels.insert(launch.fields().0));
        for launch in best.chain([last]) {
            let what = format!("{name}, {batch} token(s), {launch:?}");
            let run = || -> Result<Vec<f32>, DeviceError> {
                let x = prepared(on, &op, &matrix, &values)?;
                let mut y = on.zeroed(expected.len())?;
                GroupedKernel::load(on, &op, &launch)?.launch(on, &matrix, &x, &mut y)?;
                y.to_vec()
            };
            same_floats(&what, &run().map_err(Failure::of(&what))?, &expected)?;
            done += 1;
        }
        let prepare = Prepare::entering(terms, shape.cols, batch);
        let own = Launch::ranked_with(&op, Some(&prepare), &on.device());
        for launch in own.first().into_iter().chain(own.last()).map(|r| r.1) {
            let what = format!("{name}, {batch} token(s), {launch:?}, prepared by each block");
            let run = || -> Result<Vec<f32>, DeviceError> {
                let (values, mut faults, mut y) = (on.upload(&values)?, on.zeroed(1)?, on.zeroed(expected.len())?);
                let faults = Faults { faults: &mut faults, layer: 0 };
                let kernel = GroupedKernel::load_with(on, &op, Some(&prepare), &launch)?;
                kernel.launch_preparing(on, &matrix, PrepareInputs::plain(&values), faults, &mut y)?;
                y.to_vec()
            };
            same_floats(&what, &run().map_err(Failure::of(&what))?, &expected)?;
            done += 1;
        }
        if let Some(leave) = Leave::of(terms, shape.rows, batch) {
            let what = format!("{name}, {batch} token(s), what is done to results");
            let run = || -> Result<Vec<f32>, DeviceError> {
                let (x, mut y) = (on.upload(&expected)?, on.zeroed(expected.len())?);
                let kernel = on.load::<args::Leave<'_>>(leave::lower(&leave))?;
                on.launch(&kernel, args::Leave { x: &x, factors: &matrix.leaving, y: &mut y })?;
                y.to_vec()
            };
            let mut left = expected.clone();
            left.chunks_exact_mut(shape.rows as usize).for_each(|y| turned[1].leave(y));
            same_floats(&what, &run().map_err(Failure::of(&what))?, &left)?;
            done += 1;
        }
    }
    Ok(done)
}

/// Activations as a device prepares them for a product.
fn prepared(
    on: &Executor,
    op: &Product<'_>,
    matrix: &GroupedMatrix,
    values: &[f32],
) -> Result<DeviceActivations, DeviceError> {
    let prepare = Prepare::entering(op.terms, op.shape.cols, op.batch);
    let (values, mut faults) = (on.upload(values)?, on.zeroed(1)?);
    let factors = prepare.entering.filter(|e| e.factors).map(|_| &matrix.entering);
    let inputs = PrepareInputs { factors, ..PrepareInputs::plain(&values) };
    let mut x = DeviceActivations::new(on, op.shape.cols, op.batch)?;
    PrepareKernel::load(on, &prepare)?.launch(on, inputs, &mut x, Faults { faults: &mut faults, layer: 0 })?;
    Ok(x)
}

#[cfg(test)]
mod tests {
    use qp_codegen::cuda::Target;
    use qp_codegen::formats;
    use qp_codegen::ir::interpret::Options;

    use super::*;

    #[test]
    fn products_of_formats_are_those_of_the_cpu() {
        let on = Executor::interpreter();
        for (name, cols) in [
            ("gptq_int4_g64", 576),
            ("q4_k", 1024),
            ("nvfp4", 208),
            ("nf4", 320),
            ("fp8_channel", 300),
            ("exl3_mul1_3", 384),
            ("exl3_mcg_2", 256),
            ("iq1_m", 512),
            ("nf4_double", 320),
            ("aqlm_2x8", 256),
            ("higgs_4", 1024),
            ("e8p", 256),
            ("qtip_hyb_3", 256),
            ("qpalette_tcq_2.5", 128),
        ] {
            let rows = match name {
                _ if name.starts_with("exl3") => 128,
                "e8p" | "qtip_hyb_3" => 256,
                "qpalette_tcq_2.5" => 32,
                _ => 48,
            };
            let done = format(&on, formats::get(name).unwrap(), Shape { rows, cols }, &[1, 6, 11]);
            assert!(done.unwrap_or_else(|e| panic!("{e}")) >= 8, "{name}");
        }
        // A transform of more results than a block has room for.
        assert_eq!(format(&on, formats::get("e8p").unwrap(), Shape { rows: 1 << 15, cols: 64 }, &[1]).unwrap(), 0);
        assert!(format(&on, formats::get("q8_0").unwrap(), Shape { rows: 16, cols: 33 }, &[1]).is_err());
    }

    /// Tables of all windows do not fit the shared memory of a block there.
    #[test]
    fn tables_in_global_memory_give_the_products_of_the_cpu() {
        let shape = Shape { rows: 128, cols: 256 };
        for (target, name) in [(Target::Sm86, "exl3_mcg_3"), (Target::Sm120, "exl3_3inst_2")] {
            let on = Executor::interpreter_of(target, Options::default());
            let done = format(&on, formats::get(name).unwrap(), shape, &[1, 3, 9]);
            assert!(done.unwrap_or_else(|e| panic!("{target}: {e}")) >= 6, "{name}");
        }
    }

    #[test]
    fn shapes_are_those_that_layouts_have() {
        let of = |name: &str| fitting(formats::get(name).unwrap(), Shape { rows: 96, cols: 2304 });
        assert_eq!(of("q4_k"), Shape { rows: 96, cols: 2304 });
        assert_eq!(of("fp8_128"), Shape { rows: 96, cols: 2304 });
        assert_eq!(of("exl3_mul1_3"), Shape { rows: 128, cols: 2304 });
        for name in formats::names() {
            let format = formats::get(name).unwrap();
            let reader = |layout| Reader::new(&Arc::new(Book::without_entries(format.clone())), layout, of(name));
            assert!(format.layouts.first().is_none_or(|layout| reader(layout).is_ok()), "{name}");
        }
    }
}
