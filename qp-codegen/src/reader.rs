//! Reads the weights of a [`Format`] from the tensors of a [`Layout`].
//!
//! A [`Reader`] is made for one matrix' shape. For each place of the layout it holds the bit addresses of one period of
//! rows and columns and what a period adds, both derived from the layout's expressions ([`Index::period`]); all
//! addresses are checked to lie within the tensors when it is made.

use std::sync::Arc;

use crate::spec::format::{Arithmetic, Cover, Format, Layout, Number, Place, Target, TensorSpec, WeightOp};
use crate::spec::index::{Index, IndexOp, Var};
use crate::spec::terms::{Inexact, Terms};
use crate::spec::{Shape, mask};

mod exact;

/// Columns that are computed together.
const CHUNK: usize = 256;
/// Longest table of addresses of a place.
const MOST_ADDRESSES: i64 = 1 << 18;
/// Most bytes of the tensors of a matrix for which a layout's bits are counted.
const MOST_COUNTED: u64 = 1 << 22;

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
    /// If they are, the digits of all entries: of each byte of them, code by code.
    digits: Vec<Vec<u8>>,
}

impl Book {
    /// Writes the entries out.
    pub fn new(format: Format) -> Self {
        let entries = format.book();
        let (first, step) = (entries[0], entries[1] - entries[0]);
        let is_line = entries.iter().enumerate().all(|(i, e)| (first + i as f32 * step).to_bits() == e.to_bits());
        let terms = Terms::of(&format).map(Arc::new);
        let mut digits = Vec::new();
        if let Ok(terms) = &terms {
            let mut integers = vec![0; format.vector as usize];
            digits = vec![Vec::new(); terms.planes() as usize];
            for code in 0..1u32 << format.window {
                format.integers(code, &mut integers);
                for (plane, digits) in digits.iter_mut().enumerate() {
                    digits.extend(integers.iter().map(|&i| (terms.digits(i) >> (8 * plane)) as u8));
                }
            }
        }
        Book { format, entries, line: is_line.then_some((first, step)), terms, digits }
    }

    /// Without entries: for what looks at places alone.
    pub(crate) fn without_entries(format: Format) -> Self {
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

/// Bits of a code or field that lie side by side.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// First bit in the tensor, of the first period.
    at: i64,
    /// First bit in the value.
    to: u32,
    /// How many.
    len: u32,
}

/// Codes of neighbouring columns in neighbouring bytes.
#[derive(Clone, Copy, Debug)]
struct Strip {
    first: usize,
    count: usize,
    byte: i64,
    shift: u32,
}

/// What a whole element says of the target, by index and element.
#[derive(Clone, Debug)]
struct Translation {
    periods: [i64; 2],
    bits: u32,
    values: Vec<u32>,
}

/// A place, ready to be read.
#[derive(Clone, Debug)]
struct Part {
    tensor: usize,
    /// Periods along both indices, cut to what the target has.
    periods: [i64; 2],
    /// Bits that a period adds.
    strides: [i64; 2],
    /// For each member of a period, where its runs begin in `runs`, and the end.
    starts: Vec<u32>,
    runs: Vec<Run>,
    less: u32,
    /// Bits of the whole target.
    bits: u32,
    translation: Option<Translation>,
    /// For each row of a period, if all codes lie within bytes of a regular order.
    strips: Option<Vec<Vec<Strip>>>,
}

/// Reads the weights of one matrix.
#[derive(Clone, Debug)]
pub struct Reader {
    book: Arc<Book>,
    layout: String,
    shape: Shape,
    tensors: Vec<Stored>,
    codes: Vec<Part>,
    fields: Vec<Vec<Part>>,
}

impl PartialEq for Reader {
    /// True if both read the same format from the same tensors of the same layout.
    fn eq(&self, other: &Self) -> bool {
        let same = Arc::ptr_eq(&self.book, &other.book) || self.book == other.book;
        same && (self.shape, &self.layout, &self.tensors) == (other.shape, &other.layout, &other.tensors)
    }
}

/// Up to 32 bits that begin at bit `at`.
fn bits_at(bytes: &[u8], at: i64, len: u32) -> u32 {
    let (byte, shift) = ((at >> 3) as usize, (at & 7) as u32);
    let word = match bytes.get(byte..byte + 8) {
        Some(b) => u64::from_le_bytes(b.try_into().expect("8 bytes")),
        None => bytes[byte..].iter().rev().fold(0, |w, &b| w << 8 | u64::from(b)),
    };
    (word >> shift) as u32 & mask(len)
}

impl Part {
    fn address(&self, i: i64, j: i64) -> (usize, i64) {
        let [p, q] = self.periods;
        let member = (i % p * q + j % q) as usize;
        (member, i / p * self.strides[0] + j / q * self.strides[1])
    }

    /// The bits of the place in the value of the target's number (i, j).
    fn read(&self, bytes: &[u8], i: i64, j: i64) -> u32 {
        let (member, base) = self.address(i, j);
        let runs = &self.runs[self.starts[member] as usize..self.starts[member + 1] as usize];
        let raw = runs.iter().fold(0, |v, r| v | bits_at(bytes, base + r.at, r.len) << r.to);
        match &self.translation {
            Some(t) => {
                let [p, q] = t.periods;
                t.values[(((i % p * q + j % q) << t.bits) as usize) + raw as usize]
            }
            None if self.less > 0 => raw.wrapping_add(self.less) & mask(self.bits),
            None => raw,
        }
    }
}

/// Reads the target's number (i, j) from all of its places.
fn read(parts: &[Part], tensors: &[&[u8]], i: i64, j: i64) -> u32 {
    parts.iter().fold(0, |v, p| v | p.read(tensors[p.tensor], i, j))
}

/// The tensors of `layout` for a `shape` matrix.
fn stored(layout: &Layout, shape: Shape) -> Result<Vec<Stored>, Misfit> {
    let vars = |v: Var| match v {
        Var::Rows => i64::from(shape.rows),
        _ => i64::from(shape.cols),
    };
    let one = |t: &TensorSpec| {
        let mut dims = Vec::new();
        for d in &t.dims {
            let size = d.eval_exact(&vars).and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
            dims.push(size.ok_or_else(|| Misfit::Size { shape, tensor: t.name.clone(), size: d.text() })?);
        }
        let count = dims.iter().try_fold(1u64, |a, &n| a.checked_mul(n)).filter(|n| *n < 1 << 40);
        let bits = count.and_then(|n| n.checked_mul(t.element_bits())).filter(|n| n % 8 == 0 && *n < 1 << 50);
        let bits = bits.ok_or_else(|| Misfit::Size { shape, tensor: t.name.clone(), size: t.dims[0].text() })?;
        let ty = (!t.record).then(|| t.members[0].1);
        Ok(Stored { name: t.name.clone(), ty, dims, bytes: bits / 8 })
    };
    layout.tensors.iter().map(one).collect()
}

/// How many numbers a target has along both indices.
fn extent(format: &Format, target: Target, shape: Shape) -> [i64; 2] {
    match target {
        Target::Code => [i64::from(shape.rows), i64::from(shape.cols / format.vector)],
        Target::Field(f) => match (&format.fields[f], format.fields[f].cover) {
            (field, _) if field.entries.is_some() => [field.entries.unwrap_or(1).into(), 1],
            (_, cover) => cover.grid(shape).map(|n| n as i64),
        },
    }
}

/// Name and bits of a target.
fn describe(format: &Format, target: Target) -> (&str, u32) {
    match target {
        Target::Code => ("code", format.window),
        Target::Field(f) => (&format.fields[f].name, format.fields[f].ty.bits()),
    }
}

/// The bit address of bit `b` of a place, as an expression of the target's indices.
fn address(place: &Place, spec: &TensorSpec, dims: &[u64], shape: Shape, b: i64) -> Index {
    let known = |v: Var| match v {
        Var::Rows => Some(i64::from(shape.rows)),
        Var::Cols => Some(i64::from(shape.cols)),
        Var::First | Var::Second | Var::Stored => None,
    };
    let op = Index::binary;
    let c = Index::Const;
    let element_bits = spec.element_bits() as i64;
    let bit = op(IndexOp::Add, place.bit.with(&known), c(b));
    let runs = place.indices.iter().any(Option::is_none);
    let mut flat = c(0);
    for (index, &size) in place.indices.iter().zip(dims) {
        let index = match index {
            Some(e) => e.with(&known),
            None => op(IndexOp::Div, bit.clone(), c(element_bits)),
        };
        flat = op(IndexOp::Add, op(IndexOp::Mul, flat, c(size as i64)), index);
    }
    let start = op(IndexOp::Mul, flat, c(element_bits));
    if runs {
        return op(IndexOp::Add, start, op(IndexOp::Rem, bit, c(element_bits)));
    }
    let (_, ty, _) = &spec.members[place.member];
    let element = op(IndexOp::Mul, place.element.with(&known), c(i64::from(ty.bits())));
    let inside = op(IndexOp::Add, c(spec.member_at(place.member) as i64), element);
    op(IndexOp::Add, op(IndexOp::Add, start, inside), bit)
}

impl Part {
    fn new(format: &Format, layout: &Layout, tensors: &[Stored], place: &Place, shape: Shape) -> Result<Self, Misfit> {
        let (name, bits) = describe(format, place.target);
        let (spec, stored) = (&layout.tensors[place.tensor], &tensors[place.tensor]);
        let aperiodic = || Misfit::Aperiodic { target: name.to_string() };
        let extent = extent(format, place.target, shape);
        let element = spec.members[place.member].1.bits();
        let (lo, len) = match place.read {
            Some(_) => (0, element),
            None => (place.bits.0, place.bits.1 - place.bits.0),
        };
        let count = if place.indices.iter().any(Option::is_none) { len } else { 1 };
        let expressions: Vec<Index> = (0..count).map(|b| address(place, spec, &stored.dims, shape, b.into())).collect();
        let mut periods = [1, 1];
        let mut strides = [0, 0];
        for (k, v) in [Var::First, Var::Second].into_iter().enumerate() {
            let p = expressions[0].period(v).ok_or_else(aperiodic)?;
            periods[k] = p.period.min(extent[k]);
            strides[k] = p.stride;
        }
        if periods[0].checked_mul(periods[1]).is_none_or(|n| n > MOST_ADDRESSES) {
            return Err(aperiodic());
        }
        let total = stored.bytes as i64 * 8;
        let (mut starts, mut runs) = (vec![0], Vec::<Run>::new());
        for i in 0..periods[0] {
            for j in 0..periods[1] {
                let outside = || Misfit::Outside { target: name.to_string(), i, j, tensor: spec.name.clone() };
                let vars = |v: Var| if v == Var::First { i } else { j };
                let begin = runs.len();
                for (b, e) in (0..).zip(&expressions) {
                    let at = e.eval(&vars).ok_or_else(outside)?;
                    let width = if count == 1 { len } else { 1 };
                    match runs[begin..].last_mut() {
                        Some(last) if last.at + i64::from(last.len) == at => last.len += width,
                        _ => runs.push(Run { at, to: lo + b, len: width }),
                    }
                }
                // The furthest that whole periods lead.
                let far = |k: usize, x: i64| i128::from((extent[k] - 1 - x) / periods[k]) * i128::from(strides[k]);
                for r in &runs[begin..] {
                    let steps = [0i128, far(0, i)].into_iter().flat_map(|a| [a, a + far(1, j)]);
                    if steps.map(|s| i128::from(r.at) + s).any(|at| at < 0 || at + i128::from(r.len) > total.into()) {
                        return Err(outside());
                    }
                }
                starts.push(runs.len() as u32);
            }
        }
        let translation = match &place.read {
            None => None,
            Some(e) => Some(Translation::new(e, element, extent, shape).ok_or_else(aperiodic)?),
        };
        let less = place.less;
        let mut part =
            Part { tensor: place.tensor, periods, strides, starts, runs, less, bits, translation, strips: None };
        if place.target == Target::Code && format.vector == 1 {
            part.strips = part.find_strips();
        }
        Ok(part)
    }

    /// Strips of the codes of a period, if they are few.
    fn find_strips(&self) -> Option<Vec<Vec<Strip>>> {
        let [p, q] = self.periods;
        let regular = self.translation.is_none() && self.less == 0 && self.strides.iter().all(|s| s % 8 == 0);
        if !regular || self.runs.len() as i64 != p * q || q > CHUNK as i64 || CHUNK as i64 % q != 0 {
            return None;
        }
        let mut all = Vec::new();
        for row in self.runs.chunks_exact(q as usize) {
            let mut strips: Vec<Strip> = Vec::new();
            for (j, r) in row.iter().enumerate() {
                let (byte, shift) = (r.at >> 3, (r.at & 7) as u32);
                if shift + r.len > 8 {
                    return None;
                }
                match strips.last_mut() {
                    Some(s) if s.byte + s.count as i64 == byte && s.shift == shift => s.count += 1,
                    _ => strips.push(Strip { first: j, count: 1, byte, shift }),
                }
            }
            all.push(strips);
        }
        Some(all)
    }
}

impl Translation {
    fn new(e: &Index, bits: u32, extent: [i64; 2], shape: Shape) -> Option<Self> {
        let known = |v: Var| match v {
            Var::Rows => Some(i64::from(shape.rows)),
            Var::Cols => Some(i64::from(shape.cols)),
            Var::First | Var::Second | Var::Stored => None,
        };
        let e = e.with(&known);
        // Whatever is stored, the index must repeat.
        let mut periods = [1, 1];
        for (k, v) in [Var::First, Var::Second].into_iter().enumerate() {
            let p = e.with(&|w| (w == Var::Stored).then_some(1)).period(v).filter(|p| p.stride == 0)?;
            periods[k] = p.period.min(extent[k]);
        }
        let [p, q] = periods;
        if p * q > MOST_ADDRESSES >> bits {
            return None;
        }
        let mut values = Vec::new();
        for i in 0..p {
            for j in 0..q {
                for stored in 0..1i64 << bits {
                    let value = e.eval(&|v| match v {
                        Var::First => i,
                        Var::Second => j,
                        _ => stored,
                    });
                    values.push(value.and_then(|v| u32::try_from(v).ok())?);
                }
            }
        }
        Some(Translation { periods, bits, values })
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
        Ok(Reader { book: book.clone(), layout: layout.name.clone(), shape, tensors, codes, fields })
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

    /// The code of group `k` of `row`.
    pub fn code(&self, tensors: &[&[u8]], row: u32, k: u32) -> u32 {
        read(&self.codes, tensors, row.into(), k.into())
    }

    /// The number of field `f` that covers the weight (row, col): its bits and its value.
    pub fn field(&self, tensors: &[&[u8]], f: usize, row: u32, col: u32) -> (u32, f32) {
        let (i, j) = self.covering(f, row, col);
        let raw = read(&self.fields[f], tensors, i, j);
        (raw, self.format().fields[f].ty.value(raw))
    }

    fn covering(&self, f: usize, row: u32, col: u32) -> (i64, i64) {
        match self.format().fields[f].cover {
            Cover::Matrix => (0, 0),
            Cover::Row => (row.into(), 0),
            Cover::Column => (col.into(), 0),
            Cover::Rectangle(s) => ((row / s.rows).into(), (col / s.cols).into()),
            Cover::Flat(n) => ((i64::from(row) * i64::from(self.shape.cols) + i64::from(col)) / i64::from(n), 0),
        }
    }

    /// Columns from `col` on, of `row`, that have the number of field `f` which covers (row, col).
    pub fn run(&self, f: usize, row: u32, col: u32) -> usize {
        let left = match self.format().fields[f].cover {
            Cover::Matrix | Cover::Row => u32::MAX,
            Cover::Column => 1,
            Cover::Rectangle(s) => s.cols - col % s.cols,
            Cover::Flat(n) => {
                let at = (u64::from(row) * u64::from(self.shape.cols) + u64::from(col)) % u64::from(n);
                n - at as u32
            }
        };
        left as usize
    }

    /// The weights of `row` from column `col` on, as many as `out` holds. `tensors` are the bytes of
    /// [`Reader::tensors`].
    ///
    /// # Panics
    /// If the row ends before, or a tensor is shorter than it must be.
    pub fn read(&self, tensors: &[&[u8]], row: u32, col: u32, out: &mut [f32]) {
        assert!(row < self.shape.rows && col as usize + out.len() <= self.shape.cols as usize, "within the matrix");
        let format = self.format();
        let mut scratch = Scratch {
            codes: vec![0; CHUNK],
            entries: vec![0.0; CHUNK + 2 * 16],
            registers: vec![vec![0.0; CHUNK]; format.weight.ops.len()],
            operands: Vec::with_capacity(format.weight.ops.len()),
        };
        let mut at = col as usize;
        let mut out = out;
        while !out.is_empty() {
            let len = (CHUNK - at % CHUNK).min(out.len());
            let (part, rest) = out.split_at_mut(len);
            self.chunk(tensors, row, at as u32, part, &mut scratch);
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
    fn chunk(&self, tensors: &[&[u8]], row: u32, col: u32, out: &mut [f32], scratch: &mut Scratch) {
        let format = self.format();
        let (n, v) = (out.len(), format.vector as usize);
        let Scratch { codes, entries, registers, operands } = scratch;
        let skip = col as usize % v;
        if v == 1 {
            self.chunk_codes(tensors, row, col, &mut codes[..n]);
            match self.book.line {
                // Codes have at most 18 bits.
                Some((first, step)) => {
                    entries.iter_mut().zip(&codes[..n]).for_each(|(e, &c)| *e = first + c as i32 as f32 * step);
                }
                None => {
                    entries.iter_mut().zip(&codes[..n]).for_each(|(e, &c)| *e = self.book.entries[c as usize]);
                }
            }
        } else {
            let first = col / format.vector;
            let groups = (skip + n).div_ceil(v);
            for (k, e) in (first..).zip(entries.chunks_exact_mut(v)).take(groups) {
                let code = self.code(tensors, row, k) as usize;
                e.copy_from_slice(&self.book.entries[code * v..(code + 1) * v]);
            }
        }
        let entries = &entries[skip..skip + n];
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
                    let field = &format.fields[table];
                    let last = i64::from(field.entries.unwrap_or(1)) - 1;
                    self.spread(tensors, f, row, col, target, k, &|raw| {
                        field.ty.value(read(&self.fields[table], tensors, i64::from(raw).min(last), 0))
                    })
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
        if rectangles && !divides {
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
        let mut out = vec![0.0; self.shape.cols as usize];
        rows.into_iter().all(|row| {
            self.read(tensors, row, 0, &mut out);
            out.iter().all(|w| w.is_finite()) && self.lines_are_finite(tensors, row)
        })
    }
}

/// What is wrong with the bits of a layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The tensor.
    pub tensor: String,
    /// The matrix for which it was counted.
    pub shape: Shape,
    /// Bits that no place names, and the first of them.
    pub unnamed: (u64, u64),
    /// Bits that several places name, and the first of them.
    pub twice: (u64, u64),
}

/// Shapes for which a layout's bits are counted, the smallest that fits first.
pub fn sample_shapes(format: &Format, layout: &Layout) -> Vec<Shape> {
    let sides = |most: u32| (0..=most).map(|k| 1u32 << k);
    let mut shapes: Vec<Shape> = sides(8).flat_map(|rows| sides(15).map(move |cols| Shape { rows, cols })).collect();
    shapes.sort_by_key(|s| (s.len(), s.rows));
    let fits = |s: &Shape| {
        let covered = |f: &crate::spec::format::Field| match f.cover {
            Cover::Rectangle(c) => s.rows.is_multiple_of(c.rows) && s.cols.is_multiple_of(c.cols),
            Cover::Flat(n) => s.len().is_multiple_of(n.into()),
            Cover::Matrix | Cover::Row | Cover::Column => true,
        };
        let small = || stored(layout, *s).is_ok_and(|t| t.iter().map(|t| t.bytes).sum::<u64>() <= MOST_COUNTED);
        s.cols.is_multiple_of(format.vector) && format.fields.iter().all(covered) && small()
    };
    let Some(first) = shapes.into_iter().find(fits) else { return Vec::new() };
    let larger = Shape { rows: 2 * first.rows, cols: 3 * first.cols };
    [first, larger].into_iter().filter(fits).collect()
}

/// Checks that `layout` names every bit of a `shape` matrix' tensors once; bits that a `read` place reads may be read
/// more often.
///
/// # Errors
/// A layout that does not fit the shape.
pub fn overlap(book: &Arc<Book>, layout: &Layout, shape: Shape) -> Result<Option<Overlap>, Misfit> {
    let reader = Reader::new(book, layout, shape)?;
    let mut named: Vec<Vec<u8>> = reader.tensors.iter().map(|t| vec![0; t.bytes as usize * 8]).collect();
    let format = reader.format();
    let targets = [(Target::Code, &reader.codes)]
        .into_iter()
        .chain(reader.fields.iter().enumerate().map(|(f, parts)| (Target::Field(f), parts)));
    for (target, parts) in targets {
        let [n, m] = extent(format, target, shape);
        for p in parts {
            for (i, j) in (0..n).flat_map(|i| (0..m).map(move |j| (i, j))) {
                let (member, base) = p.address(i, j);
                for r in &p.runs[p.starts[member] as usize..p.starts[member + 1] as usize] {
                    for at in base + r.at..base + r.at + i64::from(r.len) {
                        let count = &mut named[p.tensor][at as usize];
                        *count = if p.translation.is_some() { 1 } else { count.saturating_add(1) };
                    }
                }
            }
        }
    }
    for (t, counts) in reader.tensors.iter().zip(&named) {
        let of = |wrong: &dyn Fn(u8) -> bool| {
            let mut bits = (0u64..).zip(counts).filter(|c| wrong(*c.1)).map(|c| c.0);
            let first = bits.next();
            (first.map_or(0, |_| 1 + bits.count() as u64), first.unwrap_or(0))
        };
        let (unnamed, twice) = (of(&|n| n == 0), of(&|n| n > 1));
        if unnamed.0 + twice.0 > 0 {
            return Ok(Some(Overlap { tensor: t.name.clone(), shape, unnamed, twice }));
        }
    }
    Ok(None)
}
