//! `qp bench formats`: the speed of exact products with matrices of others' formats.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use qp_codegen::kernels::Span;
use qp_codegen::kernels::grouped::{Launch, Product};
use qp_codegen::kernels::leave::{self, Leave};
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::kernels::product;
use qp_codegen::reader::{Book, Reader};
use qp_codegen::reference::Activations;
use qp_codegen::spec::format::Format;
use qp_codegen::spec::{self, Definition, Shape};
use rayon::prelude::*;
use serde::Serialize;

use super::kernels::bandwidth;
use super::{COPIES, ROTATE, rounded, shape};
use crate::check::{self, synthetic::Random};
use crate::cli::Error;
use crate::cli::output::{outln, write};
use crate::codec;
use crate::device::grouped::{GroupedKernel, GroupedMatrix};
use crate::device::launches as args;
use crate::device::ops::{DeviceActivations, Faults, PrepareInputs, PrepareKernel};
use crate::device::{DeviceError, Executor};

/// Time exact products with matrices of others' formats on a GPU.
///
/// Each kernel is first compared with the CPU, to the bit. Then a graph of launches rotates over copies of the matrix that
/// together exceed the L2 cache; the time is that of the graph over its launches, the best of several runs. A whole layer is the
/// preparation of the activations (what the format does to them, rounding), the product, and what the format does to results, each
/// a launch. Where the blocks of a product of one token can prepare it themselves, such products are timed, too: then a layer is a
/// launch less. "Used" is what an engine runs.
#[derive(Args)]
pub struct FormatBench {
    /// Formats, whose products must be exact: their names, `file.qspec:name`, or `file.qspec` for all of a file.
    #[arg(long, value_delimiter = ',', default_value = "gptq_int4_g128")]
    format: Vec<String>,
    /// Matrices, rows x columns.
    #[arg(long, value_delimiter = ',', value_parser = shape, default_value = "28672x4096,14336x4096,4096x14336,4096x4096")]
    shape: Vec<Shape>,
    /// Tokens at once (1 to 2048).
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=2048))]
    batch: Vec<u32>,
    /// Try this many launches of each kernel, the best by the cost model first; 1: only the best of all.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    launches: u16,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Also write the results as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Launches of a graph, at least.
const LAUNCHES: usize = 256;
/// Runs of a graph, of which the fastest counts.
const ROUNDS: usize = 7;

/// What was measured.
#[derive(Debug, Serialize)]
struct Row {
    format: String,
    rows: u32,
    cols: u32,
    batch: u32,
    /// Bits a weight on the device, fields included.
    bits: f64,
    /// Microseconds of a launch; with the preparation of the activations where its blocks do that.
    us: f64,
    /// Microseconds of a whole layer, with the preparation of the activations.
    layer_us: f64,
    /// Whether the blocks of the product prepare the activations.
    prepares: bool,
    /// Whether an engine would run the layer so.
    used: bool,
    gb_per_s: f64,
    /// What the cost model expects.
    model_us: f64,
    /// Which kernel.
    way: &'static str,
    /// How it was laid over the GPU.
    launch: BTreeMap<&'static str, u32>,
    registers: u32,
    /// Bytes of registers that did not fit, a thread.
    spilled: u32,
}

impl FormatBench {
    /// The formats that are named.
    fn formats(&self) -> Result<Vec<Format>, Error> {
        let each = spec::resolve_each(&self.format)?.into_iter().map(|(definition, _)| match definition {
            Definition::Format(f) => Ok(f),
            Definition::Quantizer(q) => Err(format!("`{}` is no format: `qp bench kernels` times it", q.name).into()),
        });
        each.collect()
    }

    /// Runs it.
    pub(super) fn run(self) -> Result<(), Error> {
        let formats = self.formats()?;
        let on = Executor::cuda(self.gpu)?;
        let gpu = on.gpu().ok_or("no GPU")?;
        let read = bandwidth(&on, ROTATE)?;
        outln!("{} ({} SMs); memory: {:.2} TB/s reading alone", gpu.name, gpu.sms, read / 1e12)?;
        outln!(
            "{:>16} {:>13} {:>5} {:>6} {:>9} {:>9} {:>8} {:>8} {:>9}  launch",
            "format",
            "shape",
            "b",
            "bits",
            "us",
            "layer us",
            "GB/s",
            "reading",
            "expected"
        )?;
        let mut all = Vec::new();
        for format in &formats {
            for &shape in &self.shape {
                let matrix = Made::new(&on, format, shape)?;
                for &batch in &self.batch {
                    for row in matrix.measure(&on, batch, self.launches.into())? {
                        print(&row, read)?;
                        all.push(row);
                    }
                }
            }
        }
        if let Some(path) = &self.json {
            write(path, &(serde_json::to_string_pretty(&all)? + "\n"))?;
        }
        Ok(())
    }
}

fn print(row: &Row, read: f64) -> Result<(), Error> {
    let launch: Vec<String> = row.launch.iter().map(|(name, value)| format!("{name} {value}")).collect();
    outln!(
        "{:>16} {:>13} {:>5} {:>6.3} {:>9.2} {:>9.2} {:>8.0} {:>7.0}% {:>9.2}  {}: {}, registers {}{}{}{}",
        row.format,
        format!("{}x{}", row.rows, row.cols),
        row.batch,
        row.bits,
        row.us,
        row.layer_us,
        row.gb_per_s,
        row.gb_per_s * 1e9 / read * 100.0,
        row.model_us,
        row.way,
        launch.join(", "),
        row.registers,
        if row.spilled > 0 { ", spills" } else { "" },
        if row.prepares { ", prepares" } else { "" },
        if row.used { ", used" } else { "" },
    )
}

/// A matrix of made-up bits, in enough copies.
struct Made {
    reader: Reader,
    tensors: Vec<Vec<u8>>,
    copies: Vec<GroupedMatrix>,
}

impl Made {
    fn new(on: &Executor, format: &Format, shape: Shape) -> Result<Made, Error> {
        let format = check::formats::laid(format).ok_or("a format that no layout can be made for")?;
        let (name, layout) = (format.name.clone(), format.layouts[0].clone());
        let reader = Reader::new(&Arc::new(Book::new(format)), &layout, shape)?;
        let Some(terms) = reader.terms() else {
            return Err(format!("products of {name} are not exact; `qp-codegen explain` says why").into());
        };
        let tensors = reader.made(1);
        let slices = tensors.iter().map(Vec::as_slice).collect();
        let mut copies = vec![GroupedMatrix::upload(on, terms, &[(&reader, slices)])?];
        while copies.len() < COPIES && copies.len() * copies[0].bytes() < ROTATE && on.gpu().is_some() {
            copies.push(copies[0].copy(on)?);
        }
        Ok(Made { reader, tensors, copies })
    }

    /// Times the model's first launches.
    ///
    /// # Errors
    /// Those of the executor, or a result that differs from the CPU's.
    fn measure(&self, on: &Executor, batch: u32, tried: usize) -> Result<Vec<Row>, Error> {
        let (name, shape) = (&self.reader.format().name, self.reader.shape());
        let terms = self.reader.terms().ok_or("a format without terms")?;
        let mut random = Random::of(name);
        let values = random.values(shape.cols as usize * batch as usize, 1.0);
        let slices: Vec<&[u8]> = self.tensors.iter().map(Vec::as_slice).collect();
        let [enter, leave] = self.reader.turned(&slices).ok_or("a format without terms")?;
        let inputs: Vec<Activations> = values.chunks_exact(shape.cols as usize).map(|x| enter.entered(x)).collect();
        let expected = codec::Lines::new(&self.reader, slices).product(&inputs);
        let mut left = expected.clone();
        left.chunks_exact_mut(shape.rows as usize).for_each(|y| leave.leave(y));
        let preparation = Prepare::entering(terms, shape.cols, batch);
        let entering = preparation.entering;
        let mut prepare = PrepareKernel::load(on, &preparation)?;
        let (values, mut faults) = (on.upload(&values)?, on.zeroed(1)?);
        let mut x = DeviceActivations::new(on, shape.cols, batch)?;
        let leave = Leave::of(terms, shape.rows, batch);
        let leave = leave.map(|op| on.load::<args::Leave<'_>>(leave::lower(&op))).transpose()?;
        let factors = |matrix: usize| entering.filter(|e| e.factors).map(|_| &self.copies[matrix].entering);
        let of = |matrix: usize| PrepareInputs { factors: factors(matrix), ..PrepareInputs::plain(&values) };
        prepare.launch(on, of(0), &mut x, Faults { faults: &mut faults, layer: 0 })?;
        let mut out_of_layer = on.zeroed(expected.len())?;
        let mut y = on.zeroed(expected.len())?;
        let op = Product { terms, shape, batch, y: Span::rows(shape.rows), accumulate: false };
        let mut ranked = Launch::ranked(&op, &on.device());
        let mut of_way = BTreeMap::new();
        ranked.retain(|(_, launch)| {
            let count = of_way.entry(launch.fields().0).or_insert(0);
            *count += 1;
            *count <= tried
        });
        if tried == 1 {
            ranked.truncate(1);
        }
        let mut own = Launch::ranked_with(&op, Some(&preparation), &on.device());
        own.truncate(tried);
        let themselves =
            !own.is_empty() && product::prepares(&[Launch::expected(&op, &preparation, &on.device())], &preparation);
        let used = if themselves { own[0].1 } else { ranked[0].1 };
        let all = ranked.into_iter().map(|r| (r, None)).chain(own.into_iter().map(|r| (r, Some(&preparation))));
        let all: Vec<((f64, Launch), Option<&Prepare>)> = all.collect();
        let load = |&(ranked, own): &((f64, Launch), Option<&Prepare>)| {
            Ok((ranked, own.is_some(), GroupedKernel::load_with(on, &op, own, &ranked.1)?))
        };
        let kernels = all.par_iter().map(load).collect::<Result<Vec<_>, DeviceError>>()?;
        let mut out = Vec::new();
        for ((model, launch), prepares, kernel) in kernels {
            if prepares {
                y = on.zeroed(expected.len())?;
                let faults = Faults { faults: &mut faults, layer: 0 };
                kernel.launch_preparing(on, &self.copies[0], of(0), faults, &mut y)?;
            } else {
                kernel.launch(on, &self.copies[0], &x, &mut y)?;
            }
            let found = y.to_vec()?;
            if let Some(i) = (0..expected.len()).find(|&i| found[i].to_bits() != expected[i].to_bits()) {
                let (row, token) = (i % shape.rows as usize, i / shape.rows as usize);
                let (got, must) = (found[i], expected[i]);
                return Err(format!("{name}, {launch:?}: row {row}, token {token} is {got}, but must be {must}").into());
            }
            if let Some(kernel) = &leave {
                on.launch(kernel, args::Leave { x: &y, factors: &self.copies[0].leaving, y: &mut out_of_layer })?;
                let found = out_of_layer.to_vec()?;
                if found.iter().zip(&left).any(|(found, left)| found.to_bits() != left.to_bits()) {
                    return Err(format!("{name}: what is done to results differs from the CPU's").into());
                }
            }
            let launches = LAUNCHES.next_multiple_of(self.copies.len());
            let mut graph = on.record();
            for i in 0..launches {
                let (matrix, faults) = (i % self.copies.len(), Faults { faults: &mut faults, layer: 0 });
                if prepares {
                    kernel.record_preparing(&mut graph, &self.copies[matrix], of(matrix), faults, &mut y)?;
                } else {
                    kernel.record(&mut graph, &self.copies[matrix], &x, &mut y)?;
                }
            }
            let graph = graph.finish()?;
            let rounds = if on.gpu().is_some() { ROUNDS } else { 0 };
            let seconds = on.time_best(rounds, || graph.launch())? / launches as f64;
            let mut layers = on.record();
            for i in 0..launches {
                let (matrix, faults) = (i % self.copies.len(), Faults { faults: &mut faults, layer: 0 });
                if prepares {
                    kernel.record_preparing(&mut layers, &self.copies[matrix], of(matrix), faults, &mut y)?;
                } else {
                    prepare.record(&mut layers, of(matrix), &mut x, faults)?;
                    kernel.record(&mut layers, &self.copies[matrix], &x, &mut y)?;
                }
                if let Some(kernel) = &leave {
                    let factors = &self.copies[matrix].leaving;
                    layers.launch(kernel, args::Leave { x: &y, factors, y: &mut out_of_layer })?;
                }
            }
            let layers = layers.finish()?;
            let layer = on.time_best(rounds, || layers.launch())? / launches as f64;
            let bytes = self.copies[0].bytes() as f64;
            let (way, fields) = launch.fields();
            let usage = kernel.loaded().usage();
            out.push(Row {
                format: name.clone(),
                rows: shape.rows,
                cols: shape.cols,
                batch,
                bits: rounded(bytes * 8.0 / shape.len() as f64, 1e3),
                us: rounded(seconds * 1e6, 1e3),
                layer_us: rounded(layer * 1e6, 1e3),
                prepares,
                used: prepares == themselves && launch == used,
                gb_per_s: rounded(bytes / seconds / 1e9, 10.0),
                model_us: rounded(model * 1e6, 1e3),
                way,
                launch: fields.into_iter().collect(),
                registers: usage.as_ref().map_or(0, |u| u.registers),
                spilled: usage.as_ref().map_or(0, |u| u.spill_loads),
            });
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use qp_codegen::formats;

    use super::*;

    #[test]
    fn what_is_measured_is_compared_with_the_cpu() {
        let on = Executor::interpreter();
        for name in ["exl3_mul1_3", "exl3_mcg_2"] {
            let made = Made::new(&on, formats::get(name).expect("of the formats"), Shape { rows: 128, cols: 256 });
            made.and_then(|made| made.measure(&on, 2, 1)).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let shape = Shape { rows: 24, cols: 256 };
        let mut made = Made::new(&on, formats::get("q4_0").expect("of the formats"), shape).unwrap();
        let rows = made.measure(&on, 2, 2).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(rows.iter().map(|r| (r.rows, r.cols, r.batch)).collect::<Vec<_>>(), [(24, 256, 2); 2]);
        made.tensors[0][0] ^= 1;
        let message = made.measure(&on, 1, 1).expect_err("another matrix").to_string();
        assert!(message.contains("row 0, token 0 is") && message.contains("but must be"), "{message}");
        // A transform of more results than a block has room for.
        let shape = Shape { rows: 1 << 15, cols: 64 };
        let error = Made::new(&on, formats::get("e8p").expect("of the formats"), shape).err().expect("not exact");
        assert!(error.to_string().contains("are not exact"), "{error}");
    }
}
