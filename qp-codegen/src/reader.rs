//! Reads the weights of a [`Format`] from the tensors of a [`Layout`].
//!
//! A [`Reader`] is made for one matrix' shape. For each place of the layout it holds the bit addresses of one period of
//! rows and columns and what a period adds, both derived from the layout's expressions ([`crate::spec::index::Index::period`]); all
//! addresses are checked to lie within the tensors when it is made.

use std::sync::Arc;

use crate::spec::format::{Arithmetic, Cover, Format, Layout, Number, Target, WeightOp};
use crate::spec::terms::{Inexact, Terms};
use crate::spec::{Shape, mask};

mod entries;
mod exact;
mod overlap;
mod places;
mod sides;
mod write;

use entries::{Entries, Streams};
pub use exact::Integers;
pub use overlap::{Overlap, overlap, sample_shapes};
use places::{Part, read, stored};
pub use sides::Turned;

/// Columns that are computed together.
const CHUNK: usize = 256;

/// A format with its entries written out: make it once for all matrices.
#[derive(Debug, PartialEq)]
pub struct Book {
    /// The format.
    pub format: Format,
    /// 2^window × vector entries.
    entries: Vec<f32>,
    /// First entry and step, if entries are these exactly: then they are computed and not looked up.
    line: Option<(f32, f32)>,
    /// How products are computed exactly, or why they are not.
    terms: Result<Arc<Terms>, Inexact>,
    /// If they are, the digits of all entries: of each byte of them, code by code; none where they are not a matter of the code alone, or
    /// codes are too many.
    digits: Vec<Vec<u8>>,
}

impl Book {
    /// Writes the entries out.
    pub fn new(format: Format) -> Self {
        let entries = format.book();
        let (first, step) = match entries[..] {
            [first, second, ..] => (first, second - first),
            _ => (0.0, 0.0),
        };
        let is_line = !entries.is_empty()
            && entries.iter().enumerate().all(|(i, e)| (first + i as f32 * step).to_bits() == e.to_bits());
        let terms = Terms::of(&format).map(Arc::new);
        let book = terms.as_ref().map(|terms| (terms.book(&format), terms.planes()));
        let digits = match book {
            Ok((book, n)) if !book.is_empty() => exact::planes(&book, n),
            _ => Vec::new(),
        };
        Book { format, entries, line: is_line.then_some((first, step)), terms, digits }
    }

    /// Without entries: for what looks at places alone.
    pub fn without_entries(format: Format) -> Self {
        let terms = Err(Inexact::NoLine);
        Book { format, entries: Vec::new(), line: None, terms, digits: Vec::new() }
    }
}

/// A tensor that a reader takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its name in the layout.
    pub name: String,
    /// Type of its elements; nothing for records.
    pub ty: Option<Number>,
    /// Sizes, outermost first.
    pub dims: Vec<u64>,
    /// Bytes of all elements.
    pub bytes: u64,
}

/// Makes sure that a matrix of these sides is possible in one of the format's layouts.
///
/// # Errors
/// If it fits none, why not the last.
pub fn possible(format: &Format, shape: Shape) -> Result<(), Misfit> {
    let plain = if format.layouts.is_empty() { Layout::plain(format) } else { None };
    let book = Arc::new(Book::new(format.clone()));
    let readers = format.layouts.iter().chain(&plain).map(|layout| Reader::new(&book, layout, shape).map(|_| ()));
    readers.reduce(Result::or).unwrap_or(Ok(()))
}

/// Why a layout does not fit a matrix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// A tensor's size is no whole number for this shape.
    #[error("{rows} x {cols} weights do not fit: `{tensor}` would have {size} elements along one side, which is no whole number", rows = .shape.rows, cols = .shape.cols)]
    Size {
        /// The matrix.
        shape: Shape,
        /// The tensor.
        tensor: String,
        /// The size as the layout says it.
        size: String,
    },
    /// The columns are no whole vectors.
    #[error("{cols} columns are no whole vectors of {vector}")]
    Vector {
        /// Columns of the matrix.
        cols: u32,
        /// Weights of a code.
        vector: u32,
    },
    /// A side is none for which blocks or transforms exist.
    #[error("{size} {what} are {wanted}")]
    Side {
        /// `rows` or `columns`.
        what: &'static str,
        /// How many there are.
        size: u32,
        /// What is wrong with that.
        wanted: String,
    },
    /// An address does not exist or lies outside of its tensor.
    #[error("`{target}({i}, {j})` would lie outside of `{tensor}`")]
    Outside {
        /// Whose bits.
        target: String,
        /// Its first index.
        i: i64,
        /// Its second index.
        j: i64,
        /// The tensor.
        tensor: String,
    },
    /// An expression does not repeat.
    #[error("the place of `{target}` does not repeat along its indices: use them through + - * / % with constants")]
    Aperiodic {
        /// Whose bits.
        target: String,
    },
}

/// Reads the weights of one matrix.
#[derive(Clone, Debug)]
pub struct Reader {
    book: Arc<Book>,
    layout: String,
    shape: Shape,
    tensors: Vec<Stored>,
    codes: Vec<Part>,
    streams: Option<Streams>,
    fields: Vec<Vec<Part>>,
    /// Rows that cannot be read apart.
    together: u32,
}

impl PartialEq for Reader {
    /// True if both read the same format from the same tensors of the same layout.
    fn eq(&self, other: &Self) -> bool {
        let same = Arc::ptr_eq(&self.book, &other.book) || self.book == other.book;
        same && (self.shape, &self.layout, &self.tensors) == (other.shape, &other.layout, &other.tensors)
    }
}

/// An operand of a chunk: one number for all columns, or the columns of a register.
#[derive(Clone, Copy)]
enum Operand {
    One(f32),
    Each(usize),
}

/// `out = a op b` for each column, one loop an operation, so that vector instructions serve.
fn each_of<'a>(
    op: Arithmetic,
    out: &mut [f32],
    a: impl IntoIterator<Item = &'a f32>,
    b: impl IntoIterator<Item = &'a f32>,
) {
    let all = out.iter_mut().zip(a).zip(b);
    match op {
        Arithmetic::Add => all.for_each(|((o, a), b)| *o = a + b),
        Arithmetic::Sub => all.for_each(|((o, a), b)| *o = a - b),
        Arithmetic::Mul => all.for_each(|((o, a), b)| *o = a * b),
        Arithmetic::Div => all.for_each(|((o, a), b)| *o = a / b),
    }
}

/// Where entries come from: codes, or a row in which they stand.
enum Source<'a, 'b> {
    Codes(&'a mut Entries<'b>),
    Given(&'a [f32]),
}

/// Registers for the columns of a chunk.
struct Scratch {
    codes: Vec<u32>,
    entries: Vec<f32>,
    registers: Vec<Vec<f32>>,
    operands: Vec<Operand>,
}

impl Reader {
    /// A reader of `layout` for a `shape` matrix.
    ///
    /// # Errors
    /// If the matrix' sides are no multiples of what the layout needs, or an address lies outside of its tensor.
    pub fn new(book: &Arc<Book>, layout: &Layout, shape: Shape) -> Result<Self, Misfit> {
        let together = sides::rows_together(&book.format, shape)?;
        Ok(Reader { together, ..Self::of_places(book, layout, shape)? })
    }

    /// A reader of places, for whatever shape has them.
    fn of_places(book: &Arc<Book>, layout: &Layout, shape: Shape) -> Result<Self, Misfit> {
        let format = &book.format;
        if !shape.cols.is_multiple_of(format.vector) {
            return Err(Misfit::Vector { cols: shape.cols, vector: format.vector });
        }
        let tensors = stored(layout, shape)?;
        let of = |target: Target| -> Result<Vec<Part>, Misfit> {
            let places = layout.places.iter().filter(|p| p.target == target);
            places.map(|p| Part::new(format, layout, &tensors, p, shape)).collect()
        };
        let codes = of(Target::Code)?;
        let fields = (0..format.fields.len()).map(|f| of(Target::Field(f))).collect::<Result<_, _>>()?;
        let streams = format.trellis.as_ref().zip(of(Target::Stream)?.pop());
        let streams = streams.map(|(trellis, part)| Streams::new(part, trellis));
        let layout = layout.name.clone();
        Ok(Reader { book: book.clone(), layout, shape, tensors, codes, streams, fields, together: 1 })
    }

    /// The format.
    pub fn format(&self) -> &Format {
        &self.book.format
    }

    /// Name of the layout.
    pub fn layout(&self) -> &str {
        &self.layout
    }

    /// The matrix.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The tensors that are read, in the layout's order.
    pub fn tensors(&self) -> &[Stored] {
        &self.tensors
    }

    /// The code of group `k` of `row`; of a format without memory.
    pub fn code(&self, tensors: &[&[u8]], row: u32, k: u32) -> u32 {
        read(&self.codes, tensors, row.into(), k.into())
    }

    /// The number of field `f` that covers the weight (row, col): its bits and its value.
    pub fn field(&self, tensors: &[&[u8]], f: usize, row: u32, col: u32) -> (u32, f32) {
        let (i, j) = self.covering(f, row, col);
        let raw = read(&self.fields[f], tensors, i, j);
        (raw, self.format().fields[f].ty.value(raw))
    }

    /// Entry `at` of a table of the matrix; the last where there is none.
    fn looked_up(&self, tensors: &[&[u8]], table: usize, at: u32) -> f32 {
        let field = &self.format().fields[table];
        let last = i64::from(field.entries.unwrap_or(1)) - 1;
        field.ty.value(read(&self.fields[table], tensors, i64::from(at).min(last), 0))
    }

    fn covering(&self, f: usize, row: u32, col: u32) -> (i64, i64) {
        let [i, j] = self.format().fields[f].cover.place(self.shape, row, col);
        (i as i64, j as i64)
    }

    /// Columns from `col` on, of `row`, that have the number of field `f` which covers (row, col).
    pub fn run(&self, f: usize, row: u32, col: u32) -> usize {
        self.format().fields[f].cover.run(self.shape, row, col) as usize
    }

    /// The weights of `row` from column `col` on, as many as `out` holds. `tensors` are the bytes of
    /// [`Reader::tensors`].
    ///
    /// # Panics
    /// If the row ends before, or a tensor is shorter than it must be.
    pub fn read(&self, tensors: &[&[u8]], row: u32, col: u32, out: &mut [f32]) {
        assert!(row < self.shape.rows && col as usize + out.len() <= self.shape.cols as usize, "within the matrix");
        if self.is_plain() {
            let mut entries = self.entries(tensors);
            self.row(tensors, row, col, Source::Codes(&mut entries), out, &mut self.scratch());
            return;
        }
        let mut whole = vec![0.0; self.shape.cols as usize];
        self.read_rows(tensors, row, &mut whole);
        out.copy_from_slice(&whole[col as usize..][..out.len()]);
    }

    fn scratch(&self) -> Scratch {
        let ops = self.format().weight.ops.len();
        Scratch {
            codes: vec![0; CHUNK],
            entries: vec![0.0; CHUNK + 2 * 16],
            registers: vec![vec![0.0; CHUNK]; ops],
            operands: Vec::with_capacity(ops),
        }
    }

    /// The weights of `row` from column `col` on, before anything is done to both sides; if entries are given, they are the
    /// row's.
    fn row(
        &self,
        tensors: &[&[u8]],
        row: u32,
        col: u32,
        mut source: Source<'_, '_>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let mut at = col as usize;
        let mut out = out;
        while !out.is_empty() {
            let len = (CHUNK - at % CHUNK).min(out.len());
            let (part, rest) = out.split_at_mut(len);
            self.chunk(tensors, row, at as u32, &mut source, part, scratch);
            at += len;
            out = rest;
        }
    }

    /// Codes of the columns of a chunk, of a format with vectors of 1.
    fn chunk_codes(&self, tensors: &[&[u8]], row: u32, col: u32, codes: &mut [u32]) {
        codes.fill(0);
        for p in &self.codes {
            let bytes = tensors[p.tensor];
            let (row, col, q) = (i64::from(row), i64::from(col), p.periods[1]);
            let whole = col % q == 0 && codes.len() as i64 % q == 0;
            let Some(strips) = p.strips.as_ref().filter(|_| whole) else {
                for (j, code) in (col..).zip(codes.iter_mut()) {
                    *code |= p.read(bytes, row, j);
                }
                continue;
            };
            let run = p.runs[0];
            let mask = mask(run.len);
            let base = row / p.periods[0] * p.strides[0];
            for (codes, n) in codes.chunks_exact_mut(q as usize).zip(col / q..) {
                let base = (base + n * p.strides[1]) / 8;
                for s in &strips[(row % p.periods[0]) as usize] {
                    let from = (base + s.byte) as usize;
                    let bytes = &bytes[from..from + s.count];
                    for (code, byte) in codes[s.first..s.first + s.count].iter_mut().zip(bytes) {
                        *code |= (u32::from(*byte) >> s.shift & mask) << run.to;
                    }
                }
            }
        }
    }

    /// Computes the weights of at most [`CHUNK`] columns.
    fn chunk(
        &self,
        tensors: &[&[u8]],
        row: u32,
        col: u32,
        source: &mut Source<'_, '_>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let format = self.format();
        let (n, v) = (out.len(), format.vector as usize);
        let Scratch { codes, entries, registers, operands } = scratch;
        let entries: &[f32] = match source {
            Source::Given(row) => &row[col as usize..][..n],
            Source::Codes(made) if v == 1 => {
                self.chunk_codes(tensors, row, col, &mut codes[..n]);
                let all = entries.iter_mut().zip(&codes[..n]);
                match self.book.line {
                    // Codes of entries that are written out have at most 21 bits.
                    Some((first, step)) => all.for_each(|(e, &c)| *e = first + c as i32 as f32 * step),
                    None if self.book.entries.is_empty() => {
                        all.for_each(|(e, &c)| made.of(c, std::slice::from_mut(e)));
                    }
                    None => all.for_each(|(e, &c)| *e = self.book.entries[c as usize]),
                }
                &entries[..n]
            }
            Source::Codes(made) => {
                let (first, skip) = (col / format.vector, col as usize % v);
                let groups = (skip + n).div_ceil(v);
                for (k, e) in (first..).zip(entries.chunks_exact_mut(v)).take(groups) {
                    made.of(self.code(tensors, row, k), e);
                }
                &entries[skip..skip + n]
            }
        };
        operands.clear();
        for (k, op) in format.weight.ops.iter().enumerate() {
            let (before, rest) = registers.split_at_mut(k);
            let target = &mut rest[0][..n];
            let each = |o: Operand| match o {
                Operand::One(_) => None,
                Operand::Each(i) => Some(&before[i][..n]),
            };
            let one = |o: Operand| match o {
                Operand::One(x) => x,
                Operand::Each(_) => 0.0,
            };
            let operand = match *op {
                WeightOp::Entry => {
                    target.copy_from_slice(entries);
                    Operand::Each(k)
                }
                WeightOp::Const(c) => Operand::One(c.to_f32()),
                WeightOp::Field(f) => {
                    self.spread(tensors, f, row, col, target, k, &|raw| format.fields[f].ty.value(raw))
                }
                WeightOp::Lookup(table, f) => {
                    self.spread(tensors, f, row, col, target, k, &|raw| self.looked_up(tensors, table, raw))
                }
                WeightOp::Neg(a) => match (each(operands[a]), operands[a]) {
                    (Some(a), _) => {
                        target.iter_mut().zip(a).for_each(|(o, a)| *o = -a);
                        Operand::Each(k)
                    }
                    (None, a) => Operand::One(-one(a)),
                },
                WeightOp::Binary(op, a, b) => {
                    let (a, b) = (operands[a], operands[b]);
                    match (each(a), each(b)) {
                        (None, None) => Operand::One(op.apply(one(a), one(b))),
                        (Some(a), None) => {
                            let b = one(b);
                            each_of(op, target, a, std::iter::repeat(&b));
                            Operand::Each(k)
                        }
                        (None, Some(b)) => {
                            let a = one(a);
                            each_of(op, target, std::iter::repeat(&a), b);
                            Operand::Each(k)
                        }
                        (Some(a), Some(b)) => {
                            each_of(op, target, a, b);
                            Operand::Each(k)
                        }
                    }
                }
            };
            operands.push(operand);
        }
        match operands.last() {
            Some(Operand::One(x)) => out.fill(*x),
            Some(Operand::Each(i)) => out.copy_from_slice(&registers[*i][..n]),
            None => out.copy_from_slice(entries),
        }
    }

    /// The numbers of field `f`, made `value`, for the columns of a chunk: one if they all share it.
    #[expect(clippy::too_many_arguments, reason = "a chunk's place and where its numbers go")]
    fn spread(
        &self,
        tensors: &[&[u8]],
        f: usize,
        row: u32,
        col: u32,
        target: &mut [f32],
        register: usize,
        value: &dyn Fn(u32) -> f32,
    ) -> Operand {
        let mut at = 0;
        loop {
            let c = col + at as u32;
            let len = self.run(f, row, c).min(target.len() - at);
            let (i, j) = self.covering(f, row, c);
            let x = value(read(&self.fields[f], tensors, i, j));
            if len == target.len() {
                return Operand::One(x);
            }
            target[at..at + len].fill(x);
            at += len;
            if at == target.len() {
                return Operand::Each(register);
            }
        }
    }

    /// Whether all numbers that `rows` need are finite, so that all of their weights are.
    pub fn is_finite(&self, tensors: &[&[u8]], rows: std::ops::Range<u32>) -> bool {
        let format = self.format();
        // Products of a few half-precision numbers and integers are far below the largest single-precision one.
        let small = |n: Number| matches!(n, Number::F16 | Number::E4m3 | Number::Unsigned(_) | Number::Signed(_));
        let rectangles = format.fields.iter().all(|f| {
            small(f.ty) && f.entries.is_none() && matches!(f.cover, Cover::Rectangle(_) | Cover::Row | Cover::Matrix)
        });
        let divides = format.weight.ops.iter().any(|op| {
            matches!(op, WeightOp::Binary(Arithmetic::Div, _, b)
                if !matches!(format.weight.ops[*b], WeightOp::Const(_)))
        });
        if rectangles && !divides && self.is_plain() {
            return (0..format.fields.len()).filter(|f| format.fields[*f].ty.may_be_infinite()).all(|f| {
                rows.clone().all(|row| {
                    let mut col = 0;
                    while col < self.shape.cols {
                        if !self.field(tensors, f, row, col).1.is_finite() {
                            return false;
                        }
                        let run = self.run(f, row, col);
                        col = if run >= self.shape.cols as usize { self.shape.cols } else { col + run as u32 };
                    }
                    true
                })
            });
        }
        let cols = self.shape.cols as usize;
        let mut out = vec![0.0; self.band() as usize * cols];
        rows.clone().step_by(self.band() as usize).all(|first| {
            let out = &mut out[..(rows.end - first).min(self.band()) as usize * cols];
            self.read_rows(tensors, first, out);
            let finite = |(row, weights): (u32, &[f32])| {
                weights.iter().all(|w| w.is_finite()) && self.lines_are_finite(tensors, row)
            };
            (first..).zip(out.chunks_exact(cols)).all(finite)
        })
    }
}
