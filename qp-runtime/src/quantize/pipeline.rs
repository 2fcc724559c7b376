//! Encoding as a pipeline: while one layer is encoded, the next are loaded and rotated, and the ones before are compared,
//! written and recorded. Every device takes layers as it becomes free.
//!
//! ```text
//! load, rotate ──▶ encode, two threads a device (one prepares and packs while the device works for the other) ──▶ write
//! ```
//!
//! What is in flight is bounded ([`IN_FLIGHT`]). A layer's bytes depend on nothing but the layer, so the order in which
//! layers are finished, and the number of devices, change nothing in the checkpoint.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use bytemuck::cast_slice;
use qp_codegen::reader::Reader;
use qp_codegen::reference::{self, Rotator};
use qp_codegen::spec::{Rotation, Shape};
use rayon::prelude::*;

use super::calibrate::Calibration;
use super::items::{Item, Place, Work};
use super::{Error, Progress};
use crate::checkpoint::manifest::six_digits;
use crate::checkpoint::{Draft, LayerEntry};
use crate::codec::feedback::Feedback;
use crate::codec::{Decoder, Encoder, PackedMatrix};
use crate::device::{DeviceError, Executor};
use crate::model::{LayerId, Program, TensorDir};
use crate::plan::{Resolved, Spec};

/// Bytes of unpacked weights that may be in flight; a layer that is larger goes alone.
const IN_FLIGHT: u64 = 1536 << 20;
/// Threads that encode on a device: while it works for one, the other prepares.
const OF_A_DEVICE: usize = 2;
/// Layers that wait between two stages.
const WAITING: usize = 1;

/// Runs work on chosen threads, or on all cores.
pub struct Pool(pub Option<rayon::ThreadPool>);

impl Pool {
    /// Does `work`, whose parallel parts run on the pool's threads.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.0 {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

/// What there is to encode, and with what.
pub struct Pipeline<'a> {
    /// The model.
    pub source: &'a TensorDir,
    /// What it computes.
    pub program: &'a Program,
    /// Its layers.
    pub layers: &'a [Place],
    /// The quantizer of each.
    pub plan: &'a Resolved,
    /// What is to be done.
    pub items: &'a [Item],
    /// Where windows are searched for; none: on the CPU.
    pub devices: &'a [Executor],
    /// Where the CPU's part is done.
    pub pool: &'a Pool,
    /// Is told how it goes.
    pub progress: &'a dyn Progress,
}

/// Room for a layer's weights, given back when dropped.
struct Permit<'b> {
    budget: &'b Budget,
    bytes: u64,
}

/// Bytes of weights in flight.
#[derive(Default)]
struct Budget {
    used: Mutex<u64>,
    freed: Condvar,
}

impl Budget {
    /// Waits until `bytes` more fit, or nothing else is in flight.
    fn take(&self, bytes: u64) -> Permit<'_> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |used: &mut u64| *used > 0 && *used + bytes > IN_FLIGHT;
        let mut used = self.freed.wait_while(used, full).unwrap_or_else(PoisonError::into_inner);
        *used += bytes;
        Permit { budget: self, bytes }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        *self.budget.used.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.budget.freed.notify_all();
    }
}

/// A layer on its way.
struct Loaded<'b> {
    /// Number of its item.
    item: usize,
    /// Number of its layer.
    layer: usize,
    /// Number of its quantizer.
    spec: usize,
    /// Rotated.
    weights: Vec<f32>,
    feedback: Option<Arc<Feedback>>,
    permit: Permit<'b>,
}

/// What a layer's weights became.
enum Encoded {
    Packed(PackedMatrix),
    /// The tensors of a format.
    Stored(Vec<Vec<u8>>),
}

/// An item's number and why it failed.
type Failed = (usize, Error);

/// The encoders of one device, or of the CPU: each is made when first used, since a resumed run may need none.
struct Encoders<'a> {
    device: Option<&'a Executor>,
    specs: &'a [Spec],
    made: Mutex<BTreeMap<usize, Arc<Encoder>>>,
}

impl Encoders<'_> {
    fn get(&self, spec: usize) -> Result<Arc<Encoder>, DeviceError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(encoder) = made.get(&spec) {
            return Ok(encoder.clone());
        }
        let Spec::Quantizer(q) = &self.specs[spec] else { unreachable!("formats have encoders of their own") };
        let encoder = Arc::new(match self.device {
            None => Encoder::new(q),
            Some(on) => Encoder::on(on, q)?,
        });
        made.insert(spec, encoder.clone());
        Ok(encoder)
    }
}

impl Pipeline<'_> {
    /// Does what `draft` has no record of. Returns what the manifest says of each encoded layer, in the order of the
    /// items.
    ///
    /// # Errors
    /// Of the items that failed the first one's; those before it are finished. [`Error::Stopped`] if `progress` asks for it.
    pub fn run(&self, draft: &mut Draft, calibration: Option<Calibration>) -> Result<Vec<LayerEntry>, Error> {
        let mut entries = BTreeMap::new();
        let (mut left, mut copies) = (Vec::new(), Vec::new());
        for (i, item) in self.items.iter().enumerate() {
            match (&item.work, draft.record(&item.name)) {
                (Work::Copy, None) => copies.push(item),
                (Work::Copy, Some(_)) => {}
                (Work::Encode { layer, .. }, None) => left.push((i, *layer)),
                (Work::Encode { layer, .. }, Some(record)) => {
                    entries.insert(i, self.entry(i, *layer, record.error.unwrap_or(0.0)));
                }
            }
        }
        let budget = Budget::default();
        let stop = AtomicBool::new(false);
        let devices: Vec<Option<&Executor>> =
            if self.devices.is_empty() { vec![None] } else { self.devices.iter().map(Some).collect() };
        let encoders: Vec<Encoders> = devices
            .into_iter()
            .map(|device| Encoders { device, specs: &self.plan.specs, made: Mutex::default() })
            .collect();
        let result = std::thread::scope(|scope| {
            let (to_encode, loaded) = sync_channel(WAITING);
            let (to_write, encoded) = sync_channel(WAITING);
            let loaded = Arc::new(Mutex::new(loaded));
            let (left, budget, stop) = (&left, &budget, &stop);
            scope.spawn(move || self.load_all(left, calibration, budget, stop, &to_encode));
            for encoders in &encoders {
                for _ in 0..if encoders.device.is_some() { OF_A_DEVICE } else { 1 } {
                    let (loaded, to_write) = (loaded.clone(), to_write.clone());
                    scope.spawn(move || self.encode_all(encoders, &loaded, &to_write));
                }
            }
            // Those of the threads are to be the only ones: a channel ends with the last of its users.
            drop((loaded, to_write));
            let done = self.write_all(draft, &copies, encoded, &mut entries);
            stop.store(true, Ordering::Relaxed);
            done
        });
        result.map(|()| entries.into_values().collect())
    }

    fn entry(&self, item: usize, layer: usize, error: f64) -> LayerEntry {
        let Shape { rows, cols } = self.layers[layer].layer.shape;
        let (name, spec) = (self.items[item].name.clone(), self.spec(layer).1);
        let layout = match spec {
            Spec::Quantizer(_) => None,
            Spec::Format(f) => Some(f.layout().to_owned()),
        };
        LayerEntry { name, spec: spec.name().to_owned(), layout, rows, cols, error }
    }

    /// Number and quantizer of a layer that has one.
    fn spec(&self, layer: usize) -> (usize, &Spec) {
        let spec = self.plan.layers[layer].expect("items follow the plan");
        (spec, &self.plan.specs[spec])
    }

    /// Loads the layers `left`, number of item and of layer, in order.
    fn load_all<'b>(
        &self,
        left: &[(usize, usize)],
        mut calibration: Option<Calibration>,
        budget: &'b Budget,
        stop: &AtomicBool,
        to: &SyncSender<Result<Loaded<'b>, Failed>>,
    ) {
        // Nothing enters an embedding. If its matrix is the output layer's too, what a fit to that would gain there is
        // lost here.
        let has_inputs = |layer: usize| !self.program.is_embedding(LayerId(layer));
        // What is still to be encoded, by which rotation.
        let mut rotations: Vec<Option<Rotation>> = vec![None; self.layers.len()];
        for &(_, layer) in left.iter().filter(|l| has_inputs(l.1)) {
            rotations[layer] = Some(self.spec(layer).1.rotation());
        }
        for &(item, layer) in left {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let (spec, by) = self.spec(layer);
            let name = &self.items[item].name;
            let shape = self.layers[layer].layer.shape;
            let permit = budget.take(4 * u64::from(shape.rows) * u64::from(shape.cols));
            self.progress.layer(name, by.name());
            let work = || {
                let weights = load(self.source, &self.layers[layer].tensor, name, by.rotation(), shape)?;
                let feedback = match &mut calibration {
                    Some(c) if has_inputs(layer) => c.feedback(LayerId(layer), name, by, &rotations)?,
                    Some(_) | None => None,
                };
                Ok((weights, feedback))
            };
            let sent = match self.pool.run(work) {
                Ok((weights, feedback)) => Ok(Loaded { item, layer, spec, weights, feedback, permit }),
                Err(e) => Err((item, e)),
            };
            let failed = sent.is_err();
            if to.send(sent).is_err() || failed {
                return;
            }
        }
    }

    /// Encodes layers until there are no more, or nobody wants them.
    fn encode_all<'b>(
        &self,
        encoders: &Encoders,
        from: &Mutex<Receiver<Result<Loaded<'b>, Failed>>>,
        to: &SyncSender<Result<(Loaded<'b>, Encoded), Failed>>,
    ) {
        loop {
            let next = from.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(next) = next else { return };
            let encoded = next.and_then(|layer| {
                let item = layer.item;
                let packed = self.pool.run(|| self.encode(encoders, &layer)).map_err(|e| (item, e))?;
                Ok((layer, packed))
            });
            if to.send(encoded).is_err() {
                return;
            }
        }
    }

    fn encode(&self, encoders: &Encoders, layer: &Loaded) -> Result<Encoded, Error> {
        let shape = self.layers[layer.layer].layer.shape;
        let advance = |n| self.progress.advance(n);
        let encoded = match (&self.plan.specs[layer.spec], &layer.feedback) {
            (Spec::Format(f), None) => {
                f.encode(&self.reader(layer.layer), &layer.weights, &advance).map(Encoded::Stored)
            }
            (Spec::Format(f), Some(feedback)) => {
                f.encode_for(&self.reader(layer.layer), &layer.weights, feedback, &advance).map(Encoded::Stored)
            }
            (Spec::Quantizer(_), None) => {
                encoders.get(layer.spec)?.encode(shape, &layer.weights, &advance).map(Encoded::Packed)
            }
            (Spec::Quantizer(_), Some(feedback)) => {
                let encoder = encoders.get(layer.spec)?;
                encoder.encode_for(shape, &layer.weights, feedback, &advance).map(Encoded::Packed)
            }
        };
        encoded.map_err(|source| Error::Encode { layer: self.items[layer.item].name.clone(), source })
    }

    /// The reader of a layer that has a format.
    fn reader(&self, layer: usize) -> Reader {
        let (_, Spec::Format(f)) = self.spec(layer) else { unreachable!("asked of formats alone") };
        f.reader(self.layers[layer].layer.shape).expect("as planned")
    }

    /// Copies what is copied, then writes and records layers as they come.
    fn write_all(
        &self,
        draft: &mut Draft,
        copies: &[&Item],
        encoded: Receiver<Result<(Loaded, Encoded), Failed>>,
        entries: &mut BTreeMap<usize, LayerEntry>,
    ) -> Result<(), Error> {
        for item in copies {
            let (_, _, bytes) = self.source.raw(&item.name)?;
            draft.put(&item.name, &[bytes.as_slice()], None)?;
        }
        let mut decoders: Vec<Option<Decoder>> = self.plan.specs.iter().map(|_| None).collect();
        let mut first: Option<Failed> = None;
        for next in encoded {
            let (layer, made) = match next {
                Ok(done) => done,
                Err(failed) => {
                    if first.as_ref().is_none_or(|f| failed.0 < f.0) {
                        first = Some(failed);
                    }
                    continue;
                }
            };
            if first.as_ref().is_some_and(|f| f.0 < layer.item) {
                continue;
            }
            let Loaded { item, layer, spec, weights, feedback: _, permit } = layer;
            let (error, tensors): (f64, Vec<&[u8]>) = match (&made, &self.plan.specs[spec]) {
                (Encoded::Packed(packed), Spec::Quantizer(q)) => {
                    let decoder = decoders[spec].get_or_insert_with(|| Decoder::new(q));
                    let error = self.pool.run(|| relative_error(decoder, packed, &weights));
                    (error, vec![cast_slice(&packed.words), cast_slice(&packed.scales)])
                }
                (made, _) => {
                    let Encoded::Stored(tensors) = made else { unreachable!("a matrix of a format") };
                    let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
                    let error = self.pool.run(|| relative_error_of_format(&self.reader(layer), &tensors, &weights));
                    (error, tensors)
                }
            };
            drop((weights, permit));
            draft.put(&self.items[item].name, &tensors, Some(error))?;
            entries.insert(item, self.entry(item, layer, error));
            if self.progress.finished(&entries[&item]).is_break() {
                return Err(Error::Stopped { draft: draft.dir().to_owned() });
            }
        }
        first.map_or(Ok(()), |(_, e)| Err(e))
    }
}

/// The weights of a layer as `f32`, rotated along the columns.
fn load(source: &TensorDir, tensor: &str, layer: &str, rotation: Rotation, shape: Shape) -> Result<Vec<f32>, Error> {
    let stored = source.tensor(tensor)?;
    let cols = shape.cols as usize;
    let mut w = vec![0f32; stored.len()];
    let rotator = Rotator::new(rotation, shape.cols);
    let rows = w.par_chunks_exact_mut(cols).enumerate().map(|(r, row)| {
        stored.read(r * cols, row);
        rotator.apply(row);
        row.iter().all(|v| v.is_finite())
    });
    // What is stored is finite.
    let rows: Vec<bool> = rows.collect();
    match rows.iter().position(|finite| !finite) {
        Some(row) => Err(Error::Overflow { layer: layer.to_owned(), row }),
        None => Ok(w),
    }
}

/// Σ (w − ŵ)² / Σ w², six digits, ŵ being what `packed` decodes to. Sums are by row, so that the result does not depend on
/// the number of threads; of decoded weights there is a row tile a thread at a time.
pub fn relative_error(decoder: &Decoder, packed: &PackedMatrix, weights: &[f32]) -> f64 {
    let (cols, tile) = (packed.layout.shape.cols as usize, packed.layout.tile.rows as usize);
    let stride = packed.layout.padded_cols() as usize;
    let code = &decoder.quantizer().codes[0];
    let rows: Vec<Vec<(f64, f64)>> = weights
        .par_chunks(tile * cols)
        .enumerate()
        .map_init(
            || vec![0i16; tile * stride],
            |entries, (rt, weights)| {
                decoder.row_tile(packed, rt as u32, entries);
                let rows = weights.chunks_exact(cols).zip(entries.chunks_exact(stride)).enumerate();
                rows.map(|(i, (weights, entries))| {
                    let scale = packed.scale(rt * tile + i);
                    weights.iter().zip(entries).fold((0.0, 0.0), |(e, s), (x, &entry)| {
                        let (x, y) = (f64::from(*x), f64::from(reference::weight(code, entry, scale)));
                        (e + (x - y) * (x - y), s + x * x)
                    })
                })
                .collect()
            },
        )
        .collect();
    relative(rows.iter().flatten())
}

/// As [`relative_error`], of a matrix of a format.
pub fn relative_error_of_format(reader: &Reader, tensors: &[&[u8]], weights: &[f32]) -> f64 {
    let cols = reader.shape().cols as usize;
    let rows = (0u32..).zip(weights.chunks_exact(cols)).collect::<Vec<_>>();
    let of_row = |decoded: &mut Vec<f32>, (row, weights): (u32, &[f32])| {
        reader.read(tensors, row, 0, decoded);
        weights.iter().zip(decoded).fold((0.0, 0.0), |(e, s), (x, y)| {
            let (x, y) = (f64::from(*x), f64::from(*y));
            (e + (x - y) * (x - y), s + x * x)
        })
    };
    let rows: Vec<(f64, f64)> = rows.into_par_iter().map_init(|| vec![0.0; cols], of_row).collect();
    relative(rows.iter())
}

/// The sum of squared errors over that of squared weights, six digits.
fn relative<'a>(rows: impl Iterator<Item = &'a (f64, f64)>) -> f64 {
    let (error, power) = rows.fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    if power > 0.0 { six_digits(error / power) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_budget_lets_in_what_fits_and_a_large_one_alone() {
        let budget = Budget::default();
        let first = budget.take(IN_FLIGHT - 1);
        std::thread::scope(|scope| {
            let (to, from) = channel();
            scope.spawn(|| {
                let large = budget.take(2 * IN_FLIGHT);
                to.send(*budget.used.lock().unwrap()).unwrap();
                drop(large);
                drop(to);
            });
            assert!(from.try_recv().is_err(), "it has to wait");
            let second = budget.take(1);
            drop((first, second));
            assert_eq!(from.recv(), Ok(2 * IN_FLIGHT));
        });
        assert_eq!(*budget.used.lock().unwrap(), 0);
    }
}
