//! Places of a layout as bit addresses.

use super::{CHUNK, Misfit, Stored};
use crate::spec::format::{Format, Layout, Place, Target, TensorSpec};
use crate::spec::index::{Index, IndexOp, Var};
use crate::spec::{Shape, mask};

/// Longest table of addresses of a place.
const MOST_ADDRESSES: i64 = 1 << 18;

/// Bits of a code or field that lie side by side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// First bit in the tensor, of the first period.
    pub(super) at: i64,
    /// First bit in the value.
    pub(super) to: u32,
    /// How many.
    pub(super) len: u32,
}

/// Codes of neighbouring columns in neighbouring bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strip {
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) byte: i64,
    pub(super) shift: u32,
}

/// What a whole element says of the target, by index and element.
#[derive(Clone, Debug)]
pub(super) struct Translation {
    periods: [i64; 2],
    bits: u32,
    values: Vec<u32>,
}

/// A place, ready to be read.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) tensor: usize,
    /// Periods along both indices, cut to what the target has.
    pub(super) periods: [i64; 2],
    /// Bits that a period adds.
    pub(super) strides: [i64; 2],
    /// For each member of a period, where its runs begin in `runs`, and the end.
    pub(super) starts: Vec<u32>,
    pub(super) runs: Vec<Run>,
    pub(super) less: u32,
    /// Bits of the whole target.
    pub(super) bits: u32,
    pub(super) translation: Option<Translation>,
    /// For each row of a period, if all codes lie within bytes of a regular order.
    pub(super) strips: Option<Vec<Vec<Strip>>>,
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
    pub(super) fn address(&self, i: i64, j: i64) -> (usize, i64) {
        let [p, q] = self.periods;
        let member = (i % p * q + j % q) as usize;
        (member, i / p * self.strides[0] + j / q * self.strides[1])
    }

    /// The bits of the place in the value of the target's number (i, j).
    pub(super) fn read(&self, bytes: &[u8], i: i64, j: i64) -> u32 {
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

    /// The stream of block (i, j), lowest bit first.
    pub(super) fn stream(&self, bytes: &[u8], i: i64, j: i64, words: &mut [u32]) {
        let (member, base) = self.address(i, j);
        words.fill(0);
        for r in &self.runs[self.starts[member] as usize..self.starts[member + 1] as usize] {
            let bits = u64::from(bits_at(bytes, base + r.at, r.len)) << (r.to % 32);
            let word = (r.to / 32) as usize;
            words[word] |= bits as u32;
            if bits >> 32 != 0 {
                words[word + 1] |= (bits >> 32) as u32;
            }
        }
    }
}

/// Reads the target's number (i, j) from all of its places.
pub(super) fn read(parts: &[Part], tensors: &[&[u8]], i: i64, j: i64) -> u32 {
    parts.iter().fold(0, |v, p| v | p.read(tensors[p.tensor], i, j))
}

/// The tensors of `layout` for a `shape` matrix.
pub(super) fn stored(layout: &Layout, shape: Shape) -> Result<Vec<Stored>, Misfit> {
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
pub(super) fn extent(format: &Format, target: Target, shape: Shape) -> [i64; 2] {
    match target {
        Target::Code => [i64::from(shape.rows), i64::from(shape.cols / format.vector)],
        Target::Stream => {
            let block = format.trellis.as_ref().map_or(Shape { rows: 1, cols: 1 }, |t| t.block);
            [i64::from(shape.rows / block.rows), i64::from(shape.cols / block.cols)]
        }
        Target::Field(f) => match (&format.fields[f], format.fields[f].cover) {
            (field, _) if field.entries.is_some() => [field.entries.unwrap_or(1).into(), field.width.into()],
            (_, cover) => cover.grid(shape).map(|n| n as i64),
        },
    }
}

/// Name and bits of a target.
fn describe(format: &Format, target: Target) -> (&str, u32) {
    match target {
        Target::Code => ("code", format.window),
        Target::Stream => ("stream", format.trellis.as_ref().map_or(0, |t| t.bits(format.vector))),
        Target::Field(f) => (&format.fields[f].name, format.fields[f].ty.bits()),
    }
}

/// The bit address of bit `b` of a place, as an expression of the target's indices.
fn address(place: &Place, spec: &TensorSpec, dims: &[u64], shape: Shape, b: i64) -> Index {
    let known = |v: Var| match v {
        Var::Rows => Some(i64::from(shape.rows)),
        Var::Cols => Some(i64::from(shape.cols)),
        Var::First | Var::Second | Var::Bit | Var::Stored => None,
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
    pub(super) fn new(
        format: &Format,
        layout: &Layout,
        tensors: &[Stored],
        place: &Place,
        shape: Shape,
    ) -> Result<Self, Misfit> {
        let (name, bits) = describe(format, place.target);
        let (spec, stored) = (&layout.tensors[place.tensor], &tensors[place.tensor]);
        let aperiodic = || Misfit::Aperiodic { target: name.to_string() };
        let extent = extent(format, place.target, shape);
        let element = spec.members[place.member].1.bits();
        let (lo, len) = match place.read {
            Some(_) => (0, element),
            None => (place.bits.0, place.bits.1 - place.bits.0),
        };
        let is_stream = place.target == Target::Stream;
        let each = is_stream || place.indices.iter().any(Option::is_none);
        let count = if each { len } else { 1 };
        let one = |b: u32| match is_stream {
            true => address(place, spec, &stored.dims, shape, 0).with(&|v| (v == Var::Bit).then_some(b.into())),
            false => address(place, spec, &stored.dims, shape, b.into()),
        };
        let whole = address(place, spec, &stored.dims, shape, 0);
        let expressions: Vec<Index> = (0..count).map(one).collect();
        let mut periods = [1, 1];
        let mut strides = [0, 0];
        for (k, v) in [Var::First, Var::Second].into_iter().enumerate() {
            let p = whole.period(v).ok_or_else(aperiodic)?;
            periods[k] = p.period.min(extent[k]);
            strides[k] = p.stride;
        }
        let members =
            periods[0].checked_mul(periods[1]).and_then(|n| n.checked_mul(if is_stream { len.into() } else { 1 }));
        if members.is_none_or(|n| n > MOST_ADDRESSES) {
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
                    let width = if each { 1 } else { len };
                    match runs[begin..].last_mut() {
                        Some(last) if last.at + i64::from(last.len) == at && last.len < 32 => last.len += width,
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
            Var::First | Var::Second | Var::Bit | Var::Stored => None,
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
