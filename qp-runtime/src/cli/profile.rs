//! `qp profile`: times of every kernel that a plan could use.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use qp_codegen::cuda::{self, Target};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::kernels::product::Launch;
use qp_codegen::palette;
use qp_codegen::spec::{Quantizer, Rotation, Shape};

use super::Error;
use super::output::{self, outln};
use super::plan::choose;
use crate::allocate::problem::{Layer, groups};
use crate::allocate::profile::{FORMAT, KEEP, Kernel, Origin, Profile};
use crate::allocate::{Core, Role};
use crate::device::Executor;
use crate::device::ops::stacked;
use crate::device::tune;
use crate::engine::Precision;
use crate::engine::cuda::layout::Layout;
use crate::engine::cuda::lower::{self, Pick, Wanted};
use crate::engine::cuda::rest::{self, Rest};
use crate::model::weights::HEAD;
use crate::model::{Config, LayerId, Program, arch};

/// Time every kernel that a plan for a model could use, fused launches included.
///
/// On a GPU the matrix-vector products are measured, and the rest of a decode step (norms, rotations, attention to 256
/// tokens). With --target all is predicted, products by the compiler's cost model, and the profile says so.
#[derive(Debug, clap::Args)]
pub struct ProfileCommand {
    /// Model directory; only its config.json is read
    model: PathBuf,
    /// The file to write (JSON)
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Quantizers of the palette; `*` stands for any text
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "*")]
    quantizers: Vec<String>,
    /// Predict for a typical GPU of this target (sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120) in place of measuring
    #[arg(long, value_name = "TARGET", conflicts_with = "gpu")]
    target: Option<Target>,
    /// Which GPU to measure on
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    gpu: usize,
}

/// Of a product that does the preparation itself, whether that has a norm.
type Prepared = Option<bool>;

/// Seconds of a small kernel in a graph of dependent launches.
const SMALL: f64 = 2e-6;
/// Products whose kernels are compiled together, on all cores, before they are timed.
const AT_ONCE: usize = 64;
/// Share of the peak bandwidth that reading reaches.
const BANDWIDTH: f64 = 0.9;

impl ProfileCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the model's configuration cannot be read, there is no GPU to measure on, or the file cannot be written.
    pub fn run(self) -> Result<(), Error> {
        output::check(&self.out)?;
        let config = Config::read(&self.model)?;
        config.notes.iter().for_each(output::note);
        let program = Arc::new(arch::program(&config));
        let layers = layers(&program);
        // A kernel's time does not depend on the values of its tables, so untrained quantizers can be timed too.
        let quantizers: Vec<Quantizer> = choose(&self.quantizers)?.into_iter().filter_map(palette::get).collect();
        let on = match self.target {
            Some(_) => None,
            None => Some(Executor::cuda(self.gpu).map_err(|e| format!("{e}; --target predicts without a GPU"))?),
        };
        let device = match (&on, self.target) {
            (Some(on), _) => on.device(),
            (None, Some(target)) => target.device(),
            (None, None) => unreachable!("without a target there is an executor"),
        };
        let name = on.as_ref().and_then(Executor::gpu).map_or(device.name.to_owned(), |g| g.name.clone());
        let mut wanted: Vec<(Vec<String>, Vec<Shape>, Option<LayerId>)> = Vec::new();
        for group in groups(&layers) {
            let names: Vec<String> = group.iter().map(|&i| layers[i].short().to_owned()).collect();
            let shapes: Vec<Shape> = group.iter().map(|&i| layers[i].shape).collect();
            if !wanted.iter().any(|(n, s, _)| *n == names && *s == shapes) {
                let id = group.first().and_then(|&i| program.named(&layers[i].name));
                wanted.push((names, shapes, id));
            }
        }
        let bar = ProgressBar::new((wanted.len() * quantizers.len()) as u64);
        bar.set_style(
            ProgressStyle::with_template("{msg:30!} [{wide_bar:.cyan/blue}] {pos}/{len} kernels, {eta} left")
                .expect("a valid template"),
        );
        let mut kernels = Vec::new();
        // Launches of different names may have the same shape.
        let mut known: HashMap<(Shape, Prepared, usize), f64> = HashMap::new();
        for &(ref names, ref shapes, id) in &wanted {
            let product = |(i, quantizer): (usize, _)| {
                let op = Gemv { quantizer, shape: stacked(quantizer, shapes), batch: 1, accumulate: false };
                let own = id.and_then(|id| lower::own_preparation(&program, id, &op, &device));
                ((op.shape, own.map(|own| own.norm.is_some()), i), (op, own))
            };
            let all: Vec<_> = quantizers.iter().enumerate().map(product).collect();
            let new: Vec<_> = all.iter().filter(|(key, _)| !known.contains_key(key)).copied().collect();
            for some in new.chunks(AT_ONCE) {
                bar.set_message(format!("{} {}", names.join("+"), some[0].1.0.quantizer.name));
                let products: Vec<_> = some.iter().map(|(_, product)| *product).collect();
                let before = bar.position();
                let times = seconds(on.as_ref(), &device, &products, || bar.inc(1))?;
                bar.set_position(before + some.len() as u64);
                known.extend(some.iter().map(|(key, _)| *key).zip(times));
            }
            bar.inc((quantizers.len() - new.len()) as u64);
            // Experts have launches in common: of one, a step's time is about the share of tokens that go through it.
            let share = id.map_or(1.0, |id| program.share(id));
            kernels.extend(all.iter().map(|(key, (op, _))| Kernel {
                layers: names.clone(),
                rows: shapes.iter().map(|s| s.rows).sum(),
                cols: shapes[0].cols,
                quantizer: op.quantizer.name.clone(),
                core: Core::Tensor,
                seconds: known[key] * share,
            }));
        }
        bar.finish_and_clear();
        let rotating = Arc::new(rotating(&quantizers).clone());
        let rest = match &on {
            Some(on) => rest::measure(on, &program, &rotating)?,
            None => predicted_rest(&config, &program, &rotating, &device),
        };
        let head = layers.iter().find(|l| l.name == HEAD);
        kernels.extend(head.map(|l| Kernel {
            layers: vec![l.name.clone()],
            rows: l.shape.rows,
            cols: l.shape.cols,
            quantizer: KEEP.to_owned(),
            core: Core::Cuda,
            seconds: rest.head,
        }));
        let profile = Profile {
            format: FORMAT,
            device: name,
            origin: if on.is_some() { Origin::Measured } else { Origin::Predicted },
            model: self.model.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
            rest_seconds: rest.step,
            kernels,
        };
        profile.write(&self.out)?;
        outln!("{}: {} kernels, {}", self.out.display(), profile.kernels.len(), profile.device)?;
        Ok(())
    }
}

/// A quantizer that rotates, if one does: the rest of a step depends on nothing else.
fn rotating(quantizers: &[Quantizer]) -> &Quantizer {
    quantizers.iter().find(|q| q.rotation != Rotation::None).unwrap_or(&quantizers[0])
}

/// The rest of a decode step on a typical GPU.
fn predicted_rest(config: &Config, program: &Arc<Program>, quantizer: &Arc<Quantizer>, device: &cuda::Device) -> Rest {
    let bytes = 2.0 * config.vocab as f64 * config.hidden as f64;
    let layout = Layout::new(program, &rest::forms(program, quantizer), &[], Precision::default());
    let step = lower::step(&layout, device, 1, Wanted { rows: 1, pick: Pick::Best });
    Rest {
        step: SMALL * step.launches.iter().filter(|l| !l.op.is_product()).count() as f64,
        head: SMALL + bytes / (device.bandwidth * BANDWIDTH),
    }
}

/// The linear layers of a model, sensitivities unknown.
fn layers(program: &Program) -> Vec<Layer> {
    let layer = |id: LayerId| {
        let of = program.layer(id);
        let shape = Shape { rows: of.rows as u32, cols: of.cols as u32 };
        Layer { role: Role::of(&of.name), name: of.name.clone(), shape, sensitivity: 0.0 }
    };
    program.ids().filter(|id| !program.is_embedding(*id)).map(layer).collect()
}

/// Times of a launch of each product for one token, with the preparation that it does itself; `done` is called after each.
fn seconds(
    on: Option<&Executor>,
    device: &cuda::Device,
    products: &[(Gemv<'_>, Option<Prepare>)],
    done: impl Fn(),
) -> Result<Vec<f64>, Error> {
    if let Some(on) = on {
        return Ok(tune::seconds(on, products, done)?);
    }
    let predicted = |(op, own): &(Gemv<'_>, Option<Prepare>)| {
        let best = Launch::ranked_with(op, own.as_ref(), device).first().map(|(t, _)| *t);
        best.ok_or_else(|| format!("no launch of {} fits {}", op.quantizer.name, device.name).into())
    };
    products.iter().map(predicted).collect()
}
