//! Formats: quantizers with fields and a weight of their own, as others store them.
//!
//! # The model
//!
//! A [`Format`] is a quantizer whose weights are more than a scale times an entry. Each group of
//! `vector` weights of a row has a **code** of `window` bits; the decode expression turns it into integers, and
//! `(integer + offset) × unit`, rounded once to single precision, is the **entry**. Beside the codes stand **fields**:
//! numbers that the weights of a [`Cover`] share. The [`Weight`] is an expression of the entry and the fields, each of
//! whose operations is rounded to single precision.
//!
//! A format may have memory: then the codes are the windows of a block's stream, as a quantizer's are, and the
//! [`Trellis`] says where in the block each weight of the stream lies.
//!
//! Tables that a matrix has of its own may be looked up by codes. The entry is then the sum of their numbers, exact, and
//! rounded once to single precision.
//!
//! A format may have **sides**: what is done to activations before the product, and to results after it ([`Step`]). The
//! matrix is then the weights with both applied to them: first the steps of the input, from the last to the first, to each
//! row; then those of the output, from the first to the last, to each column; each operation rounded to single precision.
//!
//! What codes and fields mean is one thing, where a file keeps their bits is another: a [`Layout`] names the tensors of
//! a file and, for codes and fields, the place of each bit. [`crate::reader`] reads weights by a layout.

use super::Shape;
use super::expr::{Decode, Room};
use super::formula::Formula;
use super::index::{Index, IndexOp, Var};
use crate::syntax::number::Rational;
use half::{bf16, f16};

/// Type of a number that is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Number {
    /// Unsigned, of 1 to 32 bits.
    Unsigned(u32),
    /// Signed, two's complement, of 2 to 32 bits.
    Signed(u32),
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
    /// A power of two: 2^(x - 127); 255 is no number.
    E8m0,
    /// 8-bit float of 4 exponent and 3 mantissa bits, without infinities.
    E4m3,
    /// 8-bit float of 5 exponent and 2 mantissa bits.
    E5m2,
}

impl Number {
    /// Bits of a number.
    pub fn bits(self) -> u32 {
        match self {
            Number::Unsigned(n) | Number::Signed(n) => n,
            Number::F16 | Number::Bf16 => 16,
            Number::F32 => 32,
            Number::E8m0 | Number::E4m3 | Number::E5m2 => 8,
        }
    }

    /// As written.
    pub fn text(self) -> String {
        match self {
            Number::Unsigned(n) => format!("u{n}"),
            Number::Signed(n) => format!("i{n}"),
            Number::F16 => "f16".into(),
            Number::Bf16 => "bf16".into(),
            Number::F32 => "f32".into(),
            Number::E8m0 => "e8m0".into(),
            Number::E4m3 => "e4m3".into(),
            Number::E5m2 => "e5m2".into(),
        }
    }

    /// The number whose bits are `raw`, rounded to single precision (only integers of more than 24 bits are).
    pub fn value(self, raw: u32) -> f32 {
        match self {
            Number::Unsigned(_) => raw as f32,
            Number::Signed(n) => ((raw << (32 - n)) as i32 >> (32 - n)) as f32,
            Number::F16 => f16::from_bits(raw as u16).to_f32(),
            Number::Bf16 => bf16::from_bits(raw as u16).to_f32(),
            Number::F32 => f32::from_bits(raw),
            Number::E8m0 => match raw & 0xff {
                255 => f32::NAN,
                0 => f32::from_bits(1 << 22),
                e => f32::from_bits(e << 23),
            },
            Number::E4m3 => small_float(raw, 4, 3, |size| size == 0x7f),
            Number::E5m2 => match raw & 0x7f {
                0x7c => f32::INFINITY.copysign(if raw & 0x80 != 0 { -1.0 } else { 1.0 }),
                _ => small_float(raw, 5, 2, |size| size > 0x7c),
            },
        }
    }

    /// The bits of the number nearest to `x`, of the largest where `x` is beyond it. What is no number counts as 0.
    pub fn nearest(self, x: f64) -> u32 {
        let x = if x.is_nan() { 0.0 } else { x };
        match self {
            Number::Unsigned(n) => x.round().clamp(0.0, ((1u64 << n) - 1) as f64) as u32,
            Number::Signed(n) => {
                let most = (1i64 << (n - 1)) as f64;
                x.round().clamp(-most, most - 1.0) as i64 as u32 & super::mask(n)
            }
            // Through single precision, since machines differ in how they convert from double.
            Number::F16 => f16::from_f32((x as f32).clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_bits().into(),
            Number::Bf16 => bf16::from_f32((x as f32).clamp(bf16::MIN.to_f32(), bf16::MAX.to_f32())).to_bits().into(),
            Number::F32 => (x as f32).clamp(f32::MIN, f32::MAX).to_bits(),
            Number::E8m0 | Number::E4m3 | Number::E5m2 => {
                // Magnitudes are in the order of their bits.
                let (last, sign) = match self {
                    Number::E8m0 => (254, 0),
                    Number::E4m3 => (0x7e, 0x80),
                    _ => (0x7b, 0x80),
                };
                let size = if sign == 0 { x.max(0.0) } else { x.abs() };
                let value = |raw: u32| f64::from(self.value(raw));
                let (mut below, mut above) = (0, last);
                while above - below > 1 {
                    let middle = (below + above) / 2;
                    if value(middle) <= size { below = middle } else { above = middle }
                }
                let (under, over) = (size - value(below), value(above) - size);
                let raw = if over < under || (over == under && below % 2 == 1) { above } else { below };
                if x < 0.0 { raw | sign } else { raw }
            }
        }
    }

    /// The bits of the next numbers above and below in magnitude, of integers in value.
    pub fn neighbours(self, raw: u32) -> impl Iterator<Item = u32> {
        let (size, sign, first, last) = match self {
            Number::Unsigned(n) => (i64::from(raw), 0, 0, (1i64 << n) - 1),
            Number::Signed(n) => {
                let half = 1i64 << (n - 1);
                (i64::from((raw << (32 - n)) as i32 >> (32 - n)), 0, -half, half - 1)
            }
            Number::F16 => (i64::from(raw & 0x7fff), raw & 0x8000, 0, 0x7bff),
            Number::Bf16 => (i64::from(raw & 0x7fff), raw & 0x8000, 0, 0x7f7f),
            Number::F32 => (i64::from(raw & 0x7fff_ffff), raw & 0x8000_0000, 0, 0x7f7f_ffff),
            Number::E8m0 => (i64::from(raw), 0, 0, 254),
            Number::E4m3 => (i64::from(raw & 0x7f), raw & 0x80, 0, 0x7e),
            Number::E5m2 => (i64::from(raw & 0x7f), raw & 0x80, 0, 0x7b),
        };
        let inside = move |n: &i64| (first..=last).contains(n);
        [size + 1, size - 1].into_iter().filter(inside).map(move |n| n as u32 & super::mask(self.bits()) | sign)
    }

    /// True if some bits of the type are no finite number.
    pub fn may_be_infinite(self) -> bool {
        match self {
            Number::Unsigned(_) | Number::Signed(_) => false,
            Number::F16 | Number::Bf16 | Number::F32 | Number::E8m0 | Number::E4m3 | Number::E5m2 => true,
        }
    }
}

/// A float of 8 bits with `e` exponent and `m` mantissa bits; `nan` says which magnitudes are no numbers.
fn small_float(raw: u32, e: u32, m: u32, nan: impl Fn(u32) -> bool) -> f32 {
    let size = raw & 0x7f;
    if nan(size) {
        return f32::NAN;
    }
    let (exponent, mantissa) = (size >> m, size & ((1 << m) - 1));
    let bias = (1 << (e - 1)) - 1;
    let lowest = 1 - bias - m as i32;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let value = match exponent {
        0 => mantissa as f32 * power(lowest),
        _ => (mantissa + (1 << m)) as f32 * power(exponent as i32 - 1 + lowest),
    };
    if raw & 0x80 != 0 { -value } else { value }
}

/// Which weights share a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cover {
    /// All of a matrix.
    Matrix,
    /// A row.
    Row,
    /// A column.
    Column,
    /// Rows x columns, on a grid from the upper left.
    Rectangle(Shape),
    /// So many, counted row by row through the matrix.
    Flat(u32),
}

impl Cover {
    /// As written.
    pub fn text(self) -> String {
        match self {
            Cover::Matrix => "matrix".into(),
            Cover::Row => "row".into(),
            Cover::Column => "column".into(),
            Cover::Rectangle(s) => format!("{} x {}", s.rows, s.cols),
            Cover::Flat(n) => format!("flat {n}"),
        }
    }

    /// Indices of a number in a layout.
    pub fn indices(self) -> usize {
        match self {
            Cover::Matrix => 0,
            Cover::Row | Cover::Column | Cover::Flat(_) => 1,
            Cover::Rectangle(_) => 2,
        }
    }

    /// How many numbers a `shape` matrix has along each index (1 for an index that the cover has not).
    pub fn grid(self, shape: Shape) -> [u64; 2] {
        let (rows, cols) = (u64::from(shape.rows), u64::from(shape.cols));
        match self {
            Cover::Matrix => [1, 1],
            Cover::Row => [rows, 1],
            Cover::Column => [cols, 1],
            Cover::Rectangle(s) => [rows.div_ceil(s.rows.into()), cols.div_ceil(s.cols.into())],
            Cover::Flat(n) => [(rows * cols).div_ceil(n.into()), 1],
        }
    }

    /// Where on [`Cover::grid`] the number lies that covers the weight (row, col).
    pub fn place(self, shape: Shape, row: u32, col: u32) -> [u64; 2] {
        match self {
            Cover::Matrix => [0, 0],
            Cover::Row => [row.into(), 0],
            Cover::Column => [col.into(), 0],
            Cover::Rectangle(s) => [(row / s.rows).into(), (col / s.cols).into()],
            Cover::Flat(n) => [(u64::from(row) * u64::from(shape.cols) + u64::from(col)) / u64::from(n), 0],
        }
    }

    /// Columns from `col` on, of `row`, that share their number; may lead beyond the row.
    pub fn run(self, shape: Shape, row: u32, col: u32) -> u32 {
        match self {
            Cover::Matrix | Cover::Row => u32::MAX,
            Cover::Column => 1,
            Cover::Rectangle(s) => s.cols - col % s.cols,
            Cover::Flat(n) => {
                let at = (u64::from(row) * u64::from(shape.cols) + u64::from(col)) % u64::from(n);
                n - at as u32
            }
        }
    }

    /// Whether all weights that share a number of `part` share one of this, for every matrix.
    pub fn holds(self, part: Cover) -> bool {
        match (self, part) {
            (Cover::Matrix, _) => true,
            (Cover::Row, Cover::Row) | (Cover::Column, Cover::Column) => true,
            (Cover::Row, Cover::Rectangle(s)) => s.rows == 1,
            (Cover::Column, Cover::Rectangle(s)) => s.cols == 1,
            (Cover::Rectangle(a), Cover::Rectangle(b)) => {
                a.rows.is_multiple_of(b.rows) && a.cols.is_multiple_of(b.cols)
            }
            (Cover::Flat(a), Cover::Flat(b)) => a.is_multiple_of(b),
            _ => false,
        }
    }

    /// Weights that share a number, if that does not depend on the matrix.
    pub fn weights(self) -> Option<u64> {
        match self {
            Cover::Matrix | Cover::Row | Cover::Column => None,
            Cover::Rectangle(s) => Some(s.len()),
            Cover::Flat(n) => Some(n.into()),
        }
    }
}

/// Numbers beside the codes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// Type of its numbers.
    pub ty: Number,
    /// Which weights share one.
    pub cover: Cover,
    /// For a table that each matrix has of its own, its entries.
    pub entries: Option<u32>,
    /// Numbers of an entry: the format's `vector` for a table that codes look up, else 1.
    pub width: u32,
    /// How an encoder finds its numbers; no part of the format's identity.
    pub formula: Option<Formula>,
}

impl Field {
    /// Indices of a number in a layout.
    pub fn indices(&self) -> usize {
        match self.entries {
            Some(_) => 1 + usize::from(self.width > 1),
            None => self.cover.indices(),
        }
    }
}

/// A table of a format's codes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WideTable {
    /// Its name.
    pub name: String,
    /// Number of entries, a power of two.
    pub entries: u32,
    /// `entries × vector` values, entry-major.
    pub values: Vec<i32>,
}

/// Operations of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Quotient.
    Div,
}

impl Arithmetic {
    /// The operator as written.
    pub fn text(self) -> &'static str {
        match self {
            Arithmetic::Add => "+",
            Arithmetic::Sub => "-",
            Arithmetic::Mul => "*",
            Arithmetic::Div => "/",
        }
    }

    /// The result, rounded to single precision.
    pub fn apply(self, a: f32, b: f32) -> f32 {
        match self {
            Arithmetic::Add => a + b,
            Arithmetic::Sub => a - b,
            Arithmetic::Mul => a * b,
            Arithmetic::Div => a / b,
        }
    }
}

/// A node of a weight's expression; nodes refer to earlier ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WeightOp {
    /// The entry.
    Entry,
    /// A constant, rounded to single precision.
    Const(Rational),
    /// A field's number.
    Field(usize),
    /// An entry of a matrix's table, by a field of unsigned integers.
    Lookup(usize, usize),
    /// The negative of a node.
    Neg(usize),
    /// An operation on two nodes.
    Binary(Arithmetic, usize, usize),
}

/// A weight as an expression of entry and fields; the last node is the result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Weight {
    /// Nodes, each after those it uses.
    pub ops: Vec<WeightOp>,
}

/// How the codes of a format with memory lie in a block's stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Trellis {
    /// Bits that the window moves forward.
    pub step: u32,
    /// Shape of a block.
    pub block: Shape,
    /// Row and column in the block of weight number [`Var::First`](super::index::Var::First) of the stream.
    pub order: [Index; 2],
}

impl Trellis {
    /// Bits of a block's stream, with so many weights a step.
    pub fn bits(&self, vector: u32) -> u32 {
        self.block.len() as u32 / vector * self.step
    }

    /// Row and column of each weight of the stream; where one lies outside of the block or two lie at one place, the
    /// number of the weight.
    pub fn places(&self) -> Result<Vec<(u32, u32)>, u32> {
        let (rows, cols) = (i64::from(self.block.rows), i64::from(self.block.cols));
        let mut taken = vec![false; self.block.len() as usize];
        let place = |p: u32| {
            let of = |side: usize, most: i64| {
                self.order[side].eval(&|_| p.into()).filter(|x| (0..most).contains(x)).ok_or(p)
            };
            let (row, col) = (of(0, rows)?, of(1, cols)?);
            match std::mem::replace(&mut taken[(row * cols + col) as usize], true) {
                true => Err(p),
                false => Ok((row as u32, col as u32)),
            }
        };
        (0..self.block.len() as u32).map(place).collect()
    }
}

/// What is done to activations before a product, or to results after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// A product with the numbers of a field, one for each column (of activations) or row (of results).
    Field(usize),
    /// Orthonormal Hadamard transforms of so many neighbours, a power of two; of all without it.
    Hadamard(Option<u32>),
    /// The random signs of a seed: see [`crate::layout::signs`].
    Signs(u64),
    /// Number `i` of the result is number `p[i]` of what there was, `p` a field.
    Permute(usize),
}

/// A tensor of a layout.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// True if its elements are records.
    pub record: bool,
    /// Sizes, outermost first, of `rows` and `cols`.
    pub dims: Vec<Index>,
    /// Members of an element: name, type and how many. A plain tensor has one, without a name.
    pub members: Vec<(String, Number, u32)>,
}

impl TensorSpec {
    /// Bits of an element.
    pub fn element_bits(&self) -> u64 {
        self.members.iter().map(|(_, ty, n)| u64::from(ty.bits()) * u64::from(*n)).sum()
    }

    /// First bit of member `m` in an element.
    pub fn member_at(&self, m: usize) -> u64 {
        self.members[..m].iter().map(|(_, ty, n)| u64::from(ty.bits()) * u64::from(*n)).sum()
    }
}

/// What a place holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Codes, by row and group of `vector` columns.
    Code,
    /// The stream of a block, by row and column of blocks.
    Stream,
    /// A field.
    Field(usize),
}

/// Where bits of a target lie.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Whose bits.
    pub target: Target,
    /// Which of them: from and up to.
    pub bits: (u32, u32),
    /// What is stored is less by this, modulo 2 to the target's bits.
    pub less: u32,
    /// Index of the tensor.
    pub tensor: usize,
    /// Its indices; nothing where bits run on along it.
    pub indices: Vec<Option<Index>>,
    /// Index of the member.
    pub member: usize,
    /// Which element of the member.
    pub element: Index,
    /// First bit in the element, or along the running index.
    pub bit: Index,
    /// What a whole element says of the target; such a place can be read only.
    pub read: Option<Index>,
}

/// Where a file keeps the bits of a format.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Its name.
    pub name: String,
    /// The number by which a container calls it.
    pub ty: Option<u32>,
    /// Tensors.
    pub tensors: Vec<TensorSpec>,
    /// Places of all bits.
    pub places: Vec<Place>,
}

impl Layout {
    /// A layout of codes one behind the other and a tensor for each field, for formats of which no file is known. There is
    /// none for a single number of broken bytes.
    pub fn plain(format: &Format) -> Option<Layout> {
        if format.trellis.is_some() || format.fields.iter().any(|f| f.width > 1) {
            return None;
        }
        let (first, second, c) = (Index::Var(Var::First), Index::Var(Var::Second), |n: u32| Index::Const(n.into()));
        let op = |op, a: &Index, b: Index| Index::binary(op, a.clone(), b);
        let mut out = Layout { name: "plain".into(), ty: None, tensors: Vec::new(), places: Vec::new() };
        // So many numbers of `bits` bits fill whole bytes.
        let filling = |bits: u32| 8 >> bits.trailing_zeros().min(3);
        let mut put = |name: &str, target: Target, ty: Number, sides: Vec<(Index, u32)>| {
            let most = filling(ty.bits());
            if sides.is_empty() && most > 1 {
                return None;
            }
            let last = sides.len().saturating_sub(1);
            let (mut dims, mut indices, mut element) = (Vec::new(), Vec::new(), c(0));
            for (k, (side, n)) in sides.into_iter().enumerate() {
                let (index, most) = (if k == 0 { &first } else { &second }, if k == last { most } else { 1 });
                dims.push(match n.checked_mul(most)? {
                    1 => side,
                    n => op(IndexOp::Div, &side, c(n)),
                });
                indices.push(Some(if most == 1 { index.clone() } else { op(IndexOp::Div, index, c(most)) }));
                if most > 1 {
                    element = op(IndexOp::Rem, index, c(most));
                }
            }
            if dims.is_empty() {
                dims.push(c(1));
                indices.push(Some(c(0)));
            }
            let members = vec![("n".into(), ty, most)];
            out.tensors.push(TensorSpec { name: name.to_owned(), record: true, dims, members });
            let (tensor, bits) = (out.tensors.len() - 1, (0, ty.bits()));
            let (less, member, bit, read) = (0, 0, c(0), None);
            out.places.push(Place { target, bits, less, tensor, indices, member, element, bit, read });
            Some(())
        };
        let (rows, cols) = (Index::Var(Var::Rows), Index::Var(Var::Cols));
        let code = Number::Unsigned(format.window);
        put("code", Target::Code, code, vec![(rows.clone(), 1), (cols.clone(), format.vector)])?;
        for (f, field) in format.fields.iter().enumerate() {
            if field.entries.is_some() {
                return None;
            }
            let sides = match field.cover {
                Cover::Matrix => vec![],
                Cover::Row => vec![(rows.clone(), 1)],
                Cover::Column => vec![(cols.clone(), 1)],
                Cover::Rectangle(s) => vec![(rows.clone(), s.rows), (cols.clone(), s.cols)],
                Cover::Flat(n) => vec![(op(IndexOp::Mul, &rows, cols.clone()), n)],
            };
            put(&field.name, Target::Field(f), field.ty, sides)?;
        }
        Some(out)
    }
}

/// Why a format cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unmade {
    /// Fields whose numbers nothing tells.
    #[error("no formula for {}: import only", .0.join(", "))]
    NoFormula(Vec<String>),
    /// Weights of a code that do not share their numbers.
    #[error("a code is for {vector} weights, and `{field}` for {cover}: weights of a code must share their fields")]
    Split {
        /// The field.
        field: String,
        /// What it covers.
        cover: String,
        /// Weights of a code.
        vector: u32,
    },
    /// What no encoder here searches.
    #[error("{0}: import only")]
    NoEncoder(&'static str),
    /// No place where its bits could be kept.
    #[error("it has no layout that can be written: add one")]
    NoLayout,
}

/// A format.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// Name, not part of the content hash.
    pub name: String,
    /// Bits of a code, 1..=24.
    pub window: u32,
    /// Weights of a code, 1..=16.
    pub vector: u32,
    /// Bits of an entry's integer: 8, 16, 24 or 32.
    pub entry_bits: u32,
    /// Added to integers.
    pub offset: Rational,
    /// Spacing of entries.
    pub unit: Rational,
    /// Tables that the decode expression looks up.
    pub tables: Vec<WideTable>,
    /// Code to integers.
    pub decode: Decode,
    /// Numbers beside the codes.
    pub fields: Vec<Field>,
    /// What a weight is.
    pub weight: Weight,
    /// Where files keep the bits.
    pub layouts: Vec<Layout>,
    /// How windows overlap, if codes have memory.
    pub trellis: Option<Trellis>,
    /// Tables of the matrix that the decode expression looks up, which come after [`Format::tables`]: their fields.
    pub numbers: Vec<usize>,
    /// What is done to activations.
    pub input: Vec<Step>,
    /// What is done to results.
    pub output: Vec<Step>,
}

/// Numbers of a matrix's tables are multiples of 2 to the power of minus this, of which half precision has no smaller.
pub(super) const FRACTION: u32 = 24;

/// Most entries that are written out.
const MOST_ENTRIES: u64 = 1 << 21;

impl Format {
    /// The integers of `code`: `vector` of them. `numbers` has what [`Format::numbers`] hold, entry-major, as
    /// [`number`] makes it.
    pub fn integers(&self, code: u32, numbers: &[Vec<i64>], room: &mut Room, out: &mut [i64]) {
        let (kept, v) = (self.tables.len(), self.vector as usize);
        let table = |t: u32, i: u32, k: usize| match self.tables.get(t as usize) {
            Some(t) => t.values[(i % t.entries) as usize * v + k].into(),
            None => {
                let t = &numbers[t as usize - kept];
                t[i as usize % (t.len() / v) * v + k]
            }
        };
        self.decode.eval_wide(code, v, &table, room, out);
    }

    /// The entry that `integer` makes: `(integer + offset) × unit`, rounded once.
    pub fn entry(&self, integer: i64) -> f32 {
        if !self.numbers.is_empty() {
            // Sums of a few numbers of half precision have fewer bits than double precision.
            return (integer as f64 / f64::from(1 << FRACTION)) as f32;
        }
        if self.offset == 0.into() && self.unit == 1.into() {
            return integer as f32;
        }
        let exact = Rational::from(integer).checked_add(self.offset).and_then(|n| n.checked_mul(self.unit));
        exact.map_or(f32::NAN, Rational::to_f32)
    }

    /// Whether something is done to activations or results.
    pub fn has_sides(&self) -> bool {
        !self.input.is_empty() || !self.output.is_empty()
    }

    /// Whether all entries are known without a matrix, and few enough to be written out.
    pub fn has_book(&self) -> bool {
        self.numbers.is_empty() && u64::from(self.vector) << self.window <= MOST_ENTRIES
    }

    /// All entries, code-major: 2^window × vector. None unless [`Format::has_book`].
    pub fn book(&self) -> Vec<f32> {
        if !self.has_book() {
            return Vec::new();
        }
        let v = self.vector as usize;
        let (mut integers, mut room) = (vec![0; v], Room::default());
        let mut out = Vec::with_capacity(v << self.window);
        for code in 0..1u32 << self.window {
            self.integers(code, &[], &mut room, &mut integers);
            out.extend(integers.iter().map(|&i| self.entry(i)));
        }
        out
    }

    /// Bits a weight: of the codes, and with the fields whose share does not depend on the matrix.
    pub fn rate(&self) -> (f64, f64) {
        let step = self.trellis.as_ref().map_or(self.window, |t| t.step);
        let codes = f64::from(step) / f64::from(self.vector);
        let of = |f: &Field| f.cover.weights().map(|n| f64::from(f.ty.bits()) / n as f64);
        (codes, codes + self.fields.iter().filter_map(of).sum::<f64>())
    }

    /// The layout called `name`.
    pub fn layout(&self, name: &str) -> Option<&Layout> {
        self.layouts.iter().find(|l| l.name == name)
    }

    /// Steps of input or output as they are written.
    pub fn steps_text(&self, steps: &[Step]) -> String {
        let one = |s: &Step| match *s {
            Step::Field(i) => self.fields[i].name.clone(),
            Step::Hadamard(None) => "hadamard".into(),
            Step::Hadamard(Some(n)) => format!("hadamard({n})"),
            Step::Signs(seed) => format!("signs(seed = {seed})"),
            Step::Permute(i) => format!("permute({})", self.fields[i].name),
        };
        steps.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// Fields in the order in which an encoder finds their numbers, each behind those that its formula names, those that
    /// cover more first.
    ///
    /// # Errors
    /// Why the format cannot be made.
    pub fn order(&self) -> Result<Vec<usize>, Unmade> {
        if self.trellis.is_some() {
            return Err(Unmade::NoEncoder("its codes have memory"));
        }
        if !self.input.is_empty() || !self.output.is_empty() {
            return Err(Unmade::NoEncoder("it transforms activations or results"));
        }
        if !self.numbers.is_empty() {
            return Err(Unmade::NoEncoder("its codes look up tables of the matrix"));
        }
        let name = |f: &Field| f.name.clone();
        let without: Vec<String> = self.fields.iter().filter(|f| f.formula.is_none()).map(name).collect();
        if !without.is_empty() {
            return Err(Unmade::NoFormula(without));
        }
        let fits = |c: Cover| match c {
            Cover::Matrix | Cover::Row => true,
            Cover::Column => self.vector == 1,
            Cover::Rectangle(s) => s.cols.is_multiple_of(self.vector),
            Cover::Flat(n) => n.is_multiple_of(self.vector),
        };
        if let Some(f) = self.fields.iter().find(|f| !fits(f.cover)) {
            return Err(Unmade::Split { field: f.name.clone(), cover: f.cover.text(), vector: self.vector });
        }
        let mut order: Vec<usize> = Vec::new();
        while order.len() < self.fields.len() {
            let left = (0..self.fields.len()).filter(|f| !order.contains(f));
            let named =
                |f: &usize| self.fields[*f].formula.iter().flat_map(Formula::fields).all(|g| order.contains(&g));
            let ready: Vec<usize> = left.filter(named).collect();
            let narrower = |f: &usize, g: &usize| {
                let (f, g) = (self.fields[*f].cover, self.fields[*g].cover);
                g.holds(f) && !f.holds(g)
            };
            let next = ready.iter().find(|f| !ready.iter().any(|g| narrower(f, g)));
            // The checker refuses formulas that need each other.
            order.push(*next.ok_or_else(|| Unmade::NoFormula(Vec::new()))?);
        }
        Ok(order)
    }

    /// The layout by which the format is written: the first that can be written, or [`Layout::plain`].
    pub fn written(&self) -> Option<Layout> {
        let own = self.layouts.iter().find(|l| l.places.iter().all(|p| p.read.is_none()));
        own.cloned().or_else(|| Layout::plain(self))
    }

    /// Self-contained text: the quantizer with everything evaluated, and its layouts. Reads back as an equal format.
    pub fn canonical(&self) -> String {
        super::canonical_format::text(self)
    }

    /// SHA-256, in hexadecimal, of the canonical text without name, layouts and formulas.
    pub fn hash(&self) -> String {
        super::canonical_format::hash(self)
    }
}

/// A number of a matrix's table that codes look up, as a multiple of a power of two; nothing if it is none, or infinite.
pub fn number(value: f32) -> Option<i64> {
    value.is_finite().then(|| (f64::from(value) * f64::from(1 << FRACTION)) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_numbers_are_what_their_formats_say() {
        let of = |n: Number, raw: &[u32]| raw.iter().map(|&r| n.value(r)).collect::<Vec<_>>();
        assert_eq!(of(Number::E4m3, &[0, 1, 8, 0x38, 0x7e, 0xfe]), [0.0, 0.001953125, 0.015625, 1.0, 448.0, -448.0]);
        assert!(Number::E4m3.value(0x7f).is_nan());
        assert_eq!(of(Number::E5m2, &[1, 0x3c, 0x7b, 0xbc]), [2f32.powi(-16), 1.0, 57344.0, -1.0]);
        assert_eq!(of(Number::E8m0, &[0, 1, 127, 254]), [2f32.powi(-127), 2f32.powi(-126), 1.0, 2f32.powi(127)]);
        assert_eq!(of(Number::Signed(6), &[0, 31, 32, 63]), [0.0, 31.0, -32.0, -1.0]);
        assert_eq!(of(Number::Signed(32), &[u32::MAX]), [-1.0]);
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest_of_their_type() {
        let of = |n: Number, x: f64| n.value(n.nearest(x));
        for n in [Number::E4m3, Number::E5m2, Number::F16, Number::Signed(6), Number::E8m0, Number::Unsigned(5)] {
            for raw in 0..1u32 << n.bits() {
                let x = n.value(raw);
                if x.is_finite() && !(x == 0.0 && raw != 0) {
                    assert_eq!(n.nearest(x.into()), raw, "{n:?} {x}");
                    assert!(n.neighbours(raw).all(|r| n.value(r) != x && n.value(r).is_finite()), "{n:?} {raw}");
                }
            }
            assert!([f64::INFINITY, f64::NEG_INFINITY, f64::NAN].iter().all(|x| of(n, *x).is_finite()), "{n:?}");
        }
        assert_eq!(
            (of(Number::E4m3, 1e9), of(Number::E4m3, -17.1), of(Number::E8m0, -3.0)),
            (448.0, -18.0, 2f32.powi(-127))
        );
        assert_eq!((of(Number::E8m0, 6.1), of(Number::E8m0, 5.9), of(Number::Unsigned(4), 99.0)), (8.0, 4.0, 15.0));
        assert_eq!((of(Number::Signed(4), -9.0), of(Number::Bf16, 1e39)), (-8.0, f32::from_bits(0x7f7f_0000)));
    }
}
