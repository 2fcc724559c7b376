//! `qp check-gpu`: the kernels of quantizers, and small models, on a GPU, compared with the CPU.

use std::time::Instant;

use clap::Args;
use qp_codegen::kernels::product::MAX_BATCH;
use qp_codegen::spec::format::Format;
use qp_codegen::spec::terms::Terms;
use qp_codegen::spec::{self, Definition, Quantizer, Shape};
use qp_codegen::{formats, palette};
use rayon::prelude::*;

use super::Error;
use super::output::{note, outln};
use crate::check::{self, Failure, synthetic};
use crate::device::Executor;

/// Compare what a GPU computes with the CPU, for every quantizer of the palette or for chosen ones.
#[derive(Args)]
pub struct CheckGpu {
    /// Quantizers to check: names of the palette or of formats, `file.qspec:name`, or `file.qspec` for all of a file
    /// [default: the palette and all formats].
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    members: Vec<String>,
    /// Numbers of tokens of the products to check.
    #[arg(long, value_delimiter = ',', default_values_t = (1..=8).chain([16, 33, 64, 300]),
          value_parser = clap::value_parser!(u32).range(1..=MAX_BATCH as i64))]
    batches: Vec<u32>,
    /// Check attention alone.
    #[arg(long, conflicts_with_all = ["members", "no_models"])]
    attention: bool,
    /// Do not run the small models.
    #[arg(long)]
    no_models: bool,
    /// Check the interpreter instead of a GPU (slow).
    #[arg(long)]
    interpreter: bool,
}

/// Rows × columns of the matrices: of whole tiles, and of neither whole row tiles nor whole column tiles.
const SHAPES: [Shape; 2] = [Shape { rows: 256, cols: 1024 }, Shape { rows: 40, cols: 1376 }];

/// The same of formats, whose files hold whole groups of columns and words of rows.
const FORMAT_SHAPES: [Shape; 2] = [Shape { rows: 256, cols: 1024 }, Shape { rows: 96, cols: 2304 }];

/// Blocks of weights to encode.
const ENCODED_BLOCKS: usize = 50;

/// Quantizers, and formats, of which products of experts are compared, at most.
const MIXED: usize = 8;

/// One thing to compare.
enum Task {
    Quantizer(Box<Quantizer>, Shape),
    Encoder(Box<Quantizer>),
    Format(Box<Format>, Shape),
    Attention(check::attention::Shape),
    Experts(Box<Quantizer>),
    ExpertsOfFormat(Box<Format>),
    Preparing,
    Choosing,
    /// Index of shapes and of choice.
    Model(usize, usize),
}

impl CheckGpu {
    /// What to check: quantizers, with random tables where one is untrained, and formats.
    fn chosen(&self) -> Result<(Vec<Quantizer>, Vec<Format>), Error> {
        if self.members.is_empty() {
            let quantizers = palette::library().quantizers.iter().cloned().map(synthetic::trained).collect();
            return Ok((quantizers, formats::names().into_iter().filter_map(formats::get).cloned().collect()));
        }
        let (mut quantizers, mut formats) = (Vec::new(), Vec::new());
        for (definition, _) in spec::resolve_each(&self.members)? {
            match definition {
                Definition::Quantizer(q) => quantizers.push(synthetic::trained(q)),
                Definition::Format(f) => {
                    if let Err(why) = Terms::of(&f) {
                        note(format_args!("`{}` has no kernels to compare: {why}", f.name));
                    }
                    formats.push(f);
                }
            }
        }
        Ok((quantizers, formats))
    }

    /// Runs the command.
    ///
    /// # Errors
    /// No GPU, an unknown quantizer, or any difference.
    pub fn run(self) -> Result<(), Error> {
        let on = if self.interpreter { Executor::interpreter() } else { Executor::cuda(0)? };
        let (members, formats) = self.chosen()?;
        let what = format!("{} quantizers, {} formats", members.len(), formats.len());
        match on.gpu() {
            Some(gpu) => outln!("{} ({}), {what}", gpu.name, on.target())?,
            None => outln!("interpreter, {what}")?,
        }
        // Models are of the quantizers.
        let choices = members.first().zip(members.last()).map(|(first, last)| check::choices(first, last));
        let (shapes, choices) = (check::shapes(), choices.unwrap_or_default());
        let mut tasks: Vec<Task> =
            members.iter().flat_map(|q| SHAPES.map(|s| Task::Quantizer(Box::new(q.clone()), s))).collect();
        // Those of a mix are members themselves. The interpreter would take minutes over large windows.
        let large = |q: &Quantizer| self.interpreter && q.codes[0].window > 12;
        let alone = members.iter().filter(|q| q.codes.len() == 1 && !large(q));
        tasks.extend(alone.map(|q| Task::Encoder(Box::new(q.clone()))));
        let some = members.iter().step_by(members.len().div_ceil(MIXED).max(1));
        tasks.extend(some.map(|q| Task::Experts(Box::new(q.clone()))));
        let some = formats.iter().step_by(formats.len().div_ceil(MIXED).max(1));
        tasks.extend(some.map(|f| Task::ExpertsOfFormat(Box::new(f.clone()))));
        tasks.extend(formats.iter().flat_map(|f| FORMAT_SHAPES.map(|s| Task::Format(Box::new(f.clone()), s))));
        tasks.extend([Task::Preparing, Task::Choosing]);
        tasks.extend(check::attention::shapes(self.interpreter).into_iter().map(Task::Attention));
        if self.attention {
            tasks.retain(|task| matches!(task, Task::Attention(_)));
        } else if !self.no_models {
            tasks.extend((0..shapes.len()).flat_map(|i| (0..choices.len()).map(move |j| Task::Model(i, j))));
        }
        let start = Instant::now();
        let run = |task: &Task| -> Result<usize, Failure> {
            match task {
                Task::Quantizer(q, shape) => check::quantizer(&on, q, *shape, &self.batches),
                Task::Encoder(q) => check::encoder(&on, q, ENCODED_BLOCKS),
                Task::Experts(q) => check::experts::products(&on, q, self.interpreter),
                Task::ExpertsOfFormat(f) => check::experts::products_of_format(&on, f, self.interpreter),
                Task::Format(format, shape) => {
                    check::formats::format(&on, format, check::formats::fitting(format, *shape), &self.batches)
                }
                Task::Preparing => check::activations::preparing(&on, self.interpreter),
                Task::Choosing => check::activations::choosing(&on, self.interpreter),
                Task::Attention(shape) => check::attention::attention(&on, *shape),
                Task::Model(i, j) => {
                    let ((shape, shapes), (kind, choose)) = (&shapes[*i], &choices[*j]);
                    let name = format!("{kind} {shape}");
                    check::model(&on, &name, shapes, &**choose)
                }
            }
        };
        let results: Vec<Result<usize, Failure>> = tasks.par_iter().map(run).collect();
        let done: usize = results.iter().filter_map(|r| r.as_ref().ok()).sum();
        let failures: Vec<&Failure> = results.iter().filter_map(|r| r.as_ref().err()).collect();
        for failure in &failures {
            outln!("FAILED {failure}")?;
        }
        outln!("{done} comparisons equal, {} failed, {:.1} s", failures.len(), start.elapsed().as_secs_f64())?;
        match failures.len() {
            0 => Ok(()),
            n => Err(format!("{n} of {} checks failed", tasks.len()).into()),
        }
    }
}
