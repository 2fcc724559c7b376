//! Products and look-ups on the memory and the streams of another program that this library is a guest of, such as PyTorch.
//!
//! Both use the primary context of a GPU, so addresses and streams of one are valid for the other. The host program owns
//! inputs, matrices, results and scratch; what belongs to a kernel (tables, signs) is ours. A launch puts kernels into the
//! host's stream and returns: it neither waits nor allocates, so it can be captured in a graph.
//!
//! On the interpreter addresses are those of the CPU's memory, and streams mean nothing: so an operator is tested without a GPU.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use qp_codegen::ir::Elem;
use qp_codegen::kernels::decode::pack_tables;
use qp_codegen::kernels::embed_packed::{self, EmbedPacked};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::prepare::{self, Prepare, Spread, Stage};
use qp_codegen::kernels::{Span, rotate};
use qp_codegen::layout::{COLUMN_PAD, Packed};
use qp_codegen::spec::{Quantizer, Shape};

use super::ops::or_one;
use super::{Buffer, DeviceError, Executor, Loaded, tune};

/// An argument of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lent {
    /// So many bytes from an address on.
    Memory(u64, usize),
    /// A scalar.
    I32(i32),
}

/// A device that another program works on, too.
pub struct Guest {
    on: Executor,
    /// For each stream of the host, memory in which blocks of a product meet: zeros before and after each launch. It grows,
    /// and is never freed, since launches in flight may use what was there before.
    places: Mutex<HashMap<u64, Vec<Buffer<i32>>>>,
    /// On the interpreter one launch runs at a time.
    alone: Mutex<()>,
}

/// Numbers in a stream's meeting place, at least.
const PLACE: usize = 1 << 18;
/// Parts of the scratch memory begin at multiples of so many bytes.
const ALIGN: usize = 256;

impl Guest {
    /// A guest on `on`.
    pub fn new(on: Executor) -> Arc<Guest> {
        Arc::new(Guest { on, places: Mutex::default(), alone: Mutex::default() })
    }

    /// The address of the zeros that `stream` has for `len` numbers.
    fn place(&self, stream: u64, len: usize) -> Result<u64, DeviceError> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let of_stream = places.entry(stream).or_default();
        if of_stream.last().is_none_or(|place| place.len() < len) {
            of_stream.push(self.on.zeroed(len.next_power_of_two().max(PLACE))?);
            // The zeros come through a stream of ours, which the host's does not wait for.
            self.on.synchronize()?;
        }
        Ok(of_stream.last().map_or(0, Buffer::address))
    }

    /// # Safety
    /// As [`Product::launch`].
    unsafe fn run(&self, stream: u64, kernel: &Loaded, blocks: u32, args: &[Lent]) -> Result<(), DeviceError> {
        let _alone = self.on.gpu().is_none().then(|| self.alone.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: the caller's promise.
        unsafe { kernel.launch_lent(stream, blocks, args) }
    }
}

fn whole(buffer: &Buffer<impl super::Element>) -> Lent {
    Lent::Memory(buffer.address(), buffer.bytes())
}

/// What a product takes from its host: addresses.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The host's stream.
    pub stream: u64,
    /// Tokens, at most [`Product::batch`].
    pub tokens: u32,
    /// Their activations, tokens × columns, of the type that the product was made for; aligned to 16 bytes.
    pub x: u64,
    /// The packed words of the matrix.
    pub words: u64,
    /// Its scales: bfloat16, one for each of [`Product::stride`] rows.
    pub scales: u64,
    /// The results, of the activations' type: [`Product::batch`] × [`Product::stride`]. What lies beyond `tokens` rows has no meaning.
    /// Of a share, totals: twice as many `i32` ([`qp_codegen::kernels::product::Launch::lower_totals`]).
    pub y: u64,
    /// [`Product::scratch_bytes`] of any contents, at a multiple of 256.
    pub scratch: u64,
    /// [`Product::meeting_bytes`] of zeros; 0 to take those that the stream has. Launches that may run at once need places of
    /// their own, so a graph that may run beside its stream must have its own.
    pub meeting: u64,
    /// Of a share: the largest magnitude of each token in all shares, [`Product::batch`] of `f32`.
    pub magnitudes: u64,
}

/// The product of a packed matrix with the activations of some tokens: their preparation, and the product itself.
///
/// A **share** is that of some of the columns of a matrix, whose others are on other devices. Its results are totals,
/// integers whose sum over the shares is the total of the whole matrix if all round activations alike: so each first finds the
/// [largest magnitudes](Product::largest), and all round by the largest of these.
pub struct Product {
    host: Arc<Guest>,
    /// Of a share.
    largest: Option<Loaded>,
    prepare: Loaded,
    product: Loaded,
    tables: Buffer<u32>,
    flips: Buffer<u32>,
    base: Buffer<u32>,
    faults: Buffer<i32>,
    layout: Packed,
    batch: u32,
    /// Type of activations and results.
    elem: Elem,
    /// Blocks that prepare a token.
    blocks: u32,
    /// Bytes of the parts of the scratch memory: planes, scales and sums of the activations, and the preparation's own.
    parts: [usize; 4],
    /// Numbers of both parts of the meeting place.
    meeting: [usize; 2],
    /// Given in place of it where blocks do not meet: to make one could not be done while a stream is captured.
    apart: Option<Buffer<i32>>,
}

/// Whether blocks meet in a place of so many numbers.
fn meet(place: [usize; 2]) -> bool {
    place[1] > 1 || place[0] > ALIGN / 4
}

impl Product {
    /// Makes the kernels for up to `batch` tokens with activations and results of type `elem` (`F32`, `F16` or `BF16`).
    ///
    /// # Errors
    /// Those of the executor.
    pub fn new(host: &Arc<Guest>, q: &Quantizer, shape: Shape, batch: u32, elem: Elem) -> Result<Product, DeviceError> {
        Product::made(host, q, shape, batch, elem, false)
    }

    /// As [`Product::new`], of a share.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn share(
        host: &Arc<Guest>,
        q: &Quantizer,
        shape: Shape,
        batch: u32,
        elem: Elem,
    ) -> Result<Product, DeviceError> {
        Product::made(host, q, shape, batch, elem, true)
    }

    fn made(
        host: &Arc<Guest>,
        q: &Quantizer,
        shape: Shape,
        batch: u32,
        elem: Elem,
        is_share: bool,
    ) -> Result<Product, DeviceError> {
        let on = &host.on;
        let layout = Packed::new(q, shape);
        let op = Gemv { quantizer: q, shape, batch, accumulate: false };
        let launch = tune::remembered(on, &op, &q.hash())?;
        let (norm, gate, rotation) = (None, None, q.rotation);
        let prepare =
            Prepare { columns: shape.cols, batch, input: Span::rows(shape.cols), gate, norm, rotation, entering: None };
        let spread = Spread::choose(&prepare, &on.device());
        let refused =
            || DeviceError::Buffer(format!("activations of type {elem:?}, where F32, F16 and BF16 are taken"));
        let of_results = launch.lower(&op).storing("y", elem).ok_or_else(refused)?;
        let stage = |stage| prepare::lower_stage(&prepare, spread, elem, stage);
        let kernels = if is_share {
            vec![stage(Stage::Given), launch.lower_totals(&op), stage(Stage::Largest)]
        } else {
            vec![stage(Stage::Whole), of_results]
        };
        let mut loaded = on.load_all(kernels)?.into_iter();
        let mut next = || loaded.next().expect("as many as were asked for");
        let tokens = batch as usize;
        let planes = 2 * shape.cols.next_multiple_of(COLUMN_PAD) as usize;
        let (sums, counters) = launch.meeting_place(&op);
        let meeting = [sums.next_multiple_of(ALIGN / 4), counters];
        let apart = if meet(meeting) { None } else { Some(on.zeroed(meeting[0] + meeting[1])?) };
        let product = Product {
            prepare: next(),
            product: next(),
            largest: is_share.then(&mut next),
            tables: on.upload(&or_one(pack_tables(q)))?,
            flips: on.upload(&rotate::flips(rotation, shape.cols))?,
            base: on.upload(&rotate::base(rotation, shape.cols))?,
            faults: on.zeroed(1)?,
            layout,
            batch,
            elem,
            blocks: spread.blocks,
            parts: [planes * tokens, 4 * tokens, 4 * tokens, 4 * prepare.scratch(spread)],
            meeting,
            apart,
            host: host.clone(),
        };
        on.synchronize()?;
        Ok(product)
    }

    /// Most tokens of a launch.
    pub fn batch(&self) -> u32 {
        self.batch
    }

    /// Elements from the results of a token to those of the next: the matrix's rows, padded to whole tiles.
    pub fn stride(&self) -> u32 {
        self.layout.padded_rows()
    }

    /// Bytes of the scratch memory.
    pub fn scratch_bytes(&self) -> usize {
        self.parts.iter().map(|bytes| bytes.next_multiple_of(ALIGN)).sum()
    }

    /// Bytes of the meeting place; 0 if blocks do not meet.
    pub fn meeting_bytes(&self) -> usize {
        if meet(self.meeting) { 4 * (self.meeting[0] + self.meeting[1]) } else { 0 }
    }

    /// Where in the scratch memory, in bytes, a launch leaves the scales of the activations: `f32`, one a token.
    pub fn scales_at(&self) -> usize {
        self.parts[0].next_multiple_of(ALIGN)
    }

    /// The parts of the scratch memory: planes, scales and sums of the activations, and the preparation's own.
    fn scratch(&self, mut at: u64) -> [Lent; 4] {
        self.parts.map(|bytes| {
            let part = Lent::Memory(at, bytes);
            at += bytes.next_multiple_of(ALIGN) as u64;
            part
        })
    }

    fn check(&self, tokens: u32) -> Result<(), DeviceError> {
        if tokens == 0 || tokens > self.batch {
            return Err(DeviceError::Buffer(format!("{tokens} tokens, where 1 to {} are taken", self.batch)));
        }
        Ok(())
    }

    /// The arguments of a preparation whose scales go to `scale`.
    fn preparation(&self, tokens: u32, x: u64, parts: [Lent; 4], scale: Lent) -> Vec<Lent> {
        let [planes, _, sum, own] = parts;
        let input = Lent::Memory(x, (self.elem.bytes() * self.layout.shape.cols * tokens) as usize);
        let nothing = Lent::Memory(self.flips.address(), 0);
        let (flips, base, faults) = (whole(&self.flips), whole(&self.base), whole(&self.faults));
        vec![input, nothing, nothing, flips, base, own, planes, scale, sum, faults, Lent::I32(0)]
    }

    /// Puts the launch into the host's stream that finds the largest magnitudes of a share's activations: `magnitudes` gets them,
    /// [`Product::batch`] of `f32`, infinite where a value is not finite. Of `call` only `stream`, `tokens`, `x` and `scratch` count.
    ///
    /// # Errors
    /// More tokens than the kernels take, a product that is no share, a failing driver.
    ///
    /// # Safety
    /// As [`Product::launch`].
    pub unsafe fn largest(&self, call: Call) -> Result<(), DeviceError> {
        self.check(call.tokens)?;
        let Some(largest) = &self.largest else {
            return Err(DeviceError::Buffer("this product is not one of a share".into()));
        };
        let magnitudes = Lent::Memory(call.magnitudes, 4 * self.batch as usize);
        let args = self.preparation(call.tokens, call.x, self.scratch(call.scratch), magnitudes);
        // SAFETY: the caller's promise; the order is that of the parameters of `prepare::lower`.
        unsafe { self.host.run(call.stream, largest, call.tokens * self.blocks, &args) }
    }

    /// Puts the launches into the host's stream.
    ///
    /// # Errors
    /// More tokens than the kernels take, a failing driver.
    ///
    /// # Safety
    /// Each address must be that of as much memory as [`Call`] says, on this device, alive until the stream has passed the
    /// launches, and written by nobody else meanwhile; `stream` must be one of the device's primary context.
    pub unsafe fn launch(&self, call: Call) -> Result<(), DeviceError> {
        let Call { stream, tokens, x, words, scales, y, scratch, meeting, magnitudes } = call;
        self.check(tokens)?;
        let meeting = match (meeting, &self.apart) {
            (0, Some(apart)) => apart.address(),
            (0, None) => self.host.place(stream, self.meeting[0] + self.meeting[1])?,
            (given, _) => given,
        };
        let parts = self.scratch(scratch);
        let [planes, scale, sum, _] = parts;
        let mut args = self.preparation(tokens, x, parts, scale);
        // A result, or the two numbers of a total.
        let mut of_result = self.elem.bytes() as usize;
        if self.largest.is_some() {
            args.push(Lent::Memory(magnitudes, 4 * self.batch as usize));
            of_result = 8;
        }
        // SAFETY: the caller's promise; the order is that of the parameters of `prepare::lower`.
        unsafe { self.host.run(stream, &self.prepare, tokens * self.blocks, &args)? };
        let rows = self.layout.padded_rows() as usize;
        let args = [
            whole(&self.tables),
            Lent::Memory(words, 4 * self.layout.words()),
            Lent::Memory(scales, 2 * rows),
            planes,
            scale,
            sum,
            Lent::Memory(y, of_result * rows * self.batch as usize),
            Lent::Memory(meeting, 4 * self.meeting[0]),
            Lent::Memory(meeting + 4 * self.meeting[0] as u64, 4 * self.meeting[1]),
        ];
        // SAFETY: as above; the parameters are those of `gemv::lower`.
        unsafe { self.host.run(stream, &self.product, self.product.kernel().grid[0], &args) }
    }
}

/// Rows of a packed matrix, decoded and rotated back: an embedding.
pub struct Lookup {
    host: Arc<Guest>,
    kernel: Loaded,
    tables: Buffer<u32>,
    flips: Buffer<u32>,
    base: Buffer<u32>,
    layout: Packed,
    batch: u32,
}

impl Lookup {
    /// Makes the kernel for up to `batch` tokens.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn new(host: &Arc<Guest>, q: &Quantizer, shape: Shape, batch: u32) -> Result<Lookup, DeviceError> {
        let on = &host.on;
        let op = EmbedPacked { quantizer: q, shape, batch, y: Span::rows(shape.cols) };
        let mut loaded = on.load_all(vec![embed_packed::lower(&op)])?;
        let lookup = Lookup {
            kernel: loaded.pop().expect("one was asked for"),
            tables: on.upload(&or_one(pack_tables(q)))?,
            flips: on.upload(&rotate::flips(q.rotation, shape.cols))?,
            base: on.upload(&rotate::inverse_base(q.rotation, shape.cols))?,
            layout: Packed::new(q, shape),
            batch,
            host: host.clone(),
        };
        on.synchronize()?;
        Ok(lookup)
    }

    /// Most tokens of a launch.
    pub fn batch(&self) -> u32 {
        self.batch
    }

    /// Rows that scales are needed for.
    pub fn stride(&self) -> u32 {
        self.layout.padded_rows()
    }

    /// Puts the launch into the host's stream: `y` (`f32`, tokens × columns) gets the rows `tokens` (`count` of `i32`, each one
    /// of the matrix's rows).
    ///
    /// # Errors
    /// More tokens than the kernel takes, a failing driver.
    ///
    /// # Safety
    /// As [`Product::launch`]; and tokens must be rows that the matrix has.
    pub unsafe fn launch(
        &self,
        stream: u64,
        (tokens, count): (u64, u32),
        words: u64,
        scales: u64,
        y: u64,
    ) -> Result<(), DeviceError> {
        if count == 0 || count > self.batch {
            return Err(DeviceError::Buffer(format!("{count} tokens, where 1 to {} are taken", self.batch)));
        }
        let (count, layout) = (count as usize, &self.layout);
        let args = [
            whole(&self.tables),
            Lent::Memory(words, 4 * layout.words()),
            Lent::Memory(scales, 2 * layout.padded_rows() as usize),
            Lent::Memory(tokens, 4 * count),
            whole(&self.flips),
            whole(&self.base),
            Lent::Memory(y, 4 * count * layout.shape.cols as usize),
        ];
        // SAFETY: the caller's promise; the order is that of the parameters of `embed_packed::lower`.
        unsafe { self.host.run(stream, &self.kernel, count as u32, &args) }
    }
}
