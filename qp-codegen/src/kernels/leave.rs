//! What a format does to the results of a product: Hadamard transforms of neighbours, factors of rows.
//!
//! A warp takes a group of 128 results of a token, four a lane. Where transforms mix more, a block takes the results of one, in shared
//! memory. [`crate::reader::Turned::leave`] is the kernel's twin.

use super::operands::divide;
use super::rotate::{GROUP, LaneSigns, Transforms};
use super::span::Span;
use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Special, V};
use crate::spec::Rotation;
use crate::spec::terms::{MOST_MIXED, Terms};

/// What to compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Leave {
    /// Results of a token.
    pub rows: u32,
    /// Tokens.
    pub batch: u32,
    /// Results that a transform mixes.
    pub mixed: Option<u32>,
    /// Whether there is a factor for each.
    pub factors: bool,
    /// What the product gave.
    pub x: Span,
    /// Outputs.
    pub y: Span,
    /// Add to the outputs instead of overwriting them.
    pub accumulate: bool,
}

impl Leave {
    /// What is done to the results of `batch` tokens of a product with a matrix of `rows` of a format, if anything is.
    pub fn of(terms: &Terms, rows: u32, batch: u32) -> Option<Leave> {
        let side = terms.sides.output;
        let mixed = side.hadamard.map(|n| n.unwrap_or(rows)).filter(|&n| n > 1);
        let factors = side.field.is_some();
        let span = Span::rows(rows);
        let op = Leave { rows, batch, mixed, factors, x: span, y: span, accumulate: false };
        (mixed.is_some() || factors).then_some(op)
    }
}

/// Warps of a block.
const WARPS: u32 = 4;
/// Most warps of a block that has the results of a transform in shared memory.
const MOST_WARPS: u32 = 16;

/// Makes the kernel. Its parameters, in order:
///
/// * `x`: `f32`;
/// * `factors`: `f32`, one a row (read if there are factors);
/// * `y`: `f32`.
pub fn lower(op: &Leave) -> Kernel {
    let n = op.rows;
    let wide = op.mixed.filter(|&mixed| mixed > GROUP);
    // A warp's group, or the results of a transform.
    let (of_item, warps) = wide.map_or((GROUP, WARPS), |mixed| (mixed, (mixed / GROUP).min(MOST_WARPS)));
    let groups = n.div_ceil(of_item);
    let items = groups * op.batch;
    let name = format!("leave_{}_b{}", op.rows, op.batch);
    let blocks = if wide.is_some() { items } else { items.div_ceil(WARPS) };
    let b = Builder::new(&name, [blocks, 1], warps * 32);
    b.doc(format!("{} results of {} token(s), transformed and times factors.", op.rows, op.batch));
    b.dependent_launch();
    Emit::new(&b, op).kernel(groups, warps);
    b.finish()
}

/// A lowering in progress.
struct Emit<'a, 'b> {
    b: &'b Builder,
    op: &'a Leave,
    x: Mem,
    factors: Mem,
    y: Mem,
    rotation: Rotation,
}

impl<'a, 'b> Emit<'a, 'b> {
    /// Declares the parameters.
    fn new(b: &'b Builder, op: &'a Leave) -> Self {
        let n = op.rows;
        let rotation = op.mixed.map_or(Rotation::None, |mixed| {
            assert!(mixed <= MOST_MIXED, "a block has the results of a transform");
            Rotation::Hadamard { seed: 0, block: Some(mixed), interleave: None }
        });
        Emit {
            b,
            op,
            x: b.sized("x", Elem::F32, false, op.x.len(op.batch, n)),
            factors: b.sized("factors", Elem::F32, false, if op.factors { n.into() } else { 0 }),
            y: b.sized("y", Elem::F32, true, op.y.len(op.batch, n)),
            rotation,
        }
    }

    fn kernel(&self, groups: u32, warps: u32) {
        let (b, op) = (self.b, self.op);
        b.grid_wait();
        b.grid_launch();
        if let Some(mixed) = op.mixed.filter(|&mixed| mixed > GROUP) {
            let (token, group) = divide(b, b.special(Special::BlockX), groups);
            return self.by_block(token, group * mixed, mixed, warps);
        }
        let items = groups * op.batch;
        let item = b.special(Special::BlockX) * WARPS + b.special(Special::Warp);
        let signs = LaneSigns::new(b);
        let work = || {
            let (token, group) = divide(b, item, groups);
            self.by_warp(token, group * GROUP + b.special(Special::Lane) * 4, &signs);
        };
        if items.is_multiple_of(WARPS) { work() } else { b.if_(item.lt(items), work) }
    }

    /// A warp's results, of which this lane has those from `row` on.
    fn by_warp(&self, token: V<'b>, row: V<'b>, signs: &LaneSigns<'b>) {
        let transforms = Transforms::of(self.rotation, self.op.rows);
        let mut v = self.get(token, row);
        if !transforms.is_empty() {
            v = transforms.in_warp(signs, row, v);
            let mut i = 0;
            v = v.map(|v| {
                i += 1;
                v * transforms.factor(self.b, row + (i - 1))
            });
        }
        self.put(token, row, v);
    }

    /// The results of a transform, `mixed` from `first` on, in shared memory.
    fn by_block(&self, token: V<'b>, first: V<'b>, mixed: u32, warps: u32) {
        let b = self.b;
        let transforms = Transforms::of(self.rotation, mixed);
        let values = b.shared("values", Elem::F32, mixed);
        let thread = b.special(Special::Thread) * 4;
        b.for_(thread, mixed, warps * 128, |at| {
            b.store(values, at, b.vector(&self.get(token, first + at)), Elem::F32);
        });
        b.barrier();
        // Powers of two have no dense part, whose signs would be in memory.
        transforms.transform(b, values, self.factors, warps * 32);
        b.for_(thread, mixed, warps * 128, |at| {
            let v = b.load_as(values, at, Elem::F32, 4, Cache::Default);
            let norm = transforms.factor(b, at);
            self.put(token, first + at, [0, 1, 2, 3].map(|i| v.lane(i) * norm));
        });
    }

    /// Four results of the product.
    fn get(&self, token: V<'b>, row: V<'b>) -> [V<'b>; 4] {
        let x = self.op.x;
        self.load(self.x, x.at(token), row, self.is_aligned(x), Cache::Default)
    }

    /// Multiplies four transformed results with their factors and writes them.
    fn put(&self, token: V<'b>, row: V<'b>, mut v: [V<'b>; 4]) {
        let (b, op, n) = (self.b, self.op, self.op.rows);
        if op.factors {
            let mut f = self.load(self.factors, b.i32(0), row, true, Cache::ReadOnly).into_iter();
            v = v.map(|v| v * f.next().expect("four"));
        }
        let (y, aligned) = (op.y.at(token), self.is_aligned(op.y));
        if op.accumulate {
            let mut before = self.load(self.y, y, row, aligned, Cache::Default).into_iter();
            v = v.map(|v| before.next().expect("four") + v);
        }
        let first = y + row;
        if n.is_multiple_of(GROUP) && aligned {
            b.store(self.y, first, b.vector(&v), Elem::F32);
        } else {
            for (i, v) in (0..).zip(v) {
                b.if_((row + i).lt(n), || b.store(self.y, first + i, v, Elem::F32));
            }
        }
    }

    /// Whether four values of a token that begin at a multiple of four are one access.
    fn is_aligned(&self, span: Span) -> bool {
        span.first.is_multiple_of(4) && (self.op.batch == 1 || span.stride.is_multiple_of(4))
    }

    /// Four values of a row of results that begins at `first`, from `row` on; zero past the last.
    fn load(&self, mem: Mem, first: V<'b>, row: V<'b>, aligned: bool, cache: Cache) -> [V<'b>; 4] {
        let (b, n) = (self.b, self.op.rows);
        if aligned && n.is_multiple_of(GROUP) {
            let v = b.load_as(mem, first + row, Elem::F32, 4, cache);
            return [0, 1, 2, 3].map(|i| v.lane(i));
        }
        [0, 1, 2, 3].map(|i| {
            let var = b.var(b.f32(0.0));
            b.if_((row + i).lt(n), || b.set(var, b.load_as(mem, first + row + i, Elem::F32, 1, cache)));
            b.get(var)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Target;
    use crate::ir::interpret::{Arg, Options, run};
    use crate::kernels::prepare::{self, Entering, Prepare, Spread};
    use crate::reader::Turned;
    use crate::reference::{activation_cells, quantize_activations};

    fn some(n: u32, seed: u32) -> Vec<f32> {
        let mut x = seed;
        let mut value = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 22) as f32 - 2.0
        };
        (0..n).map(|_| value()).collect()
    }

    fn bytes(x: &[f32]) -> Vec<u8> {
        x.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn turned(n: u32, mixed: Option<u32>, factors: bool) -> Turned {
        Turned { factors: if factors { some(n, 7) } else { Vec::new() }, mixed }
    }

    #[test]
    fn results_leave_as_the_reference_has_it() {
        for (rows, batch, mixed, factors, accumulate) in [
            (256, 1, Some(128), true, false),
            (192, 3, Some(64), true, true),
            (300, 2, None, true, false),
            (6, 1, Some(2), false, true),
            (512, 2, Some(256), true, true),
            (4096, 3, Some(4096), true, false),
        ] {
            let side = turned(rows, mixed, factors);
            let (x, y) = (Span { first: 4, stride: rows + 4 }, Span { first: 1, stride: rows + 2 });
            let op = Leave { rows, batch, mixed, factors, x, y, accumulate };
            let (given, before) = (some(4 + batch * x.stride, 1), some(1 + batch * y.stride, 2));
            let mut expected = before.clone();
            for t in 0..batch {
                let mut row = given[(x.first + t * x.stride) as usize..][..rows as usize].to_vec();
                side.leave(&mut row);
                let to = expected[(y.first + t * y.stride) as usize..].iter_mut();
                to.zip(row).for_each(|(to, row)| *to = if accumulate { *to + row } else { row });
            }
            let (given, f, mut out) = (bytes(&given), bytes(&turned(rows, None, true).factors), bytes(&before));
            let mut args = [Arg::ReadOnly(&given), Arg::ReadOnly(&f), Arg::Buffer(&mut out)];
            run(&lower(&op), &mut args, &Options::default()).unwrap_or_else(|e| panic!("{op:?}: {e}"));
            assert_eq!(out, bytes(&expected), "{op:?}");
        }
    }

    #[test]
    fn activations_enter_as_the_reference_has_it() {
        let pairs = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15];
        let single = std::array::from_fn(|i| (i * 5 % 16) as u8);
        for (columns, batch, mixed, factors, order) in [
            (512, 1, Some(128), true, Some(pairs)),
            (320, 3, Some(64), true, Some(single)),
            (256, 2, None, true, None),
            (256, 1, Some(256), false, Some(pairs)),
        ] {
            let side = turned(columns, mixed, factors);
            let input = some(columns * batch, 3);
            let entered = |x: &[f32]| {
                let mut x = x.to_vec();
                side.enter(&mut x);
                quantize_activations(&x)
            };
            let tokens: Vec<_> = input.chunks_exact(columns as usize).map(entered).collect();
            let mut cells: Vec<u8> = activation_cells(&tokens).iter().map(|b| b.cast_unsigned()).collect();
            let as_is = std::array::from_fn(|i| i as u8);
            let order_of = order.unwrap_or(as_is);
            cells.as_chunks_mut::<16>().0.iter_mut().for_each(|c| *c = order_of.map(|i: u8| c[usize::from(i)]));
            let op = Prepare {
                columns,
                batch,
                input: Span::rows(columns),
                gate: None,
                norm: None,
                rotation: mixed.map_or(Rotation::None, |n| Rotation::Hadamard {
                    seed: 0,
                    block: Some(n),
                    interleave: None,
                }),
                entering: Some(Entering { factors, order }),
            };
            for spread in Spread::all(&op, &Target::Sm90a.device()) {
                let (input, f, no) = (bytes(&input), bytes(&turned(columns, None, true).factors), vec![0; 4]);
                let mut scratch = vec![0; 4 * op.scratch(spread)];
                let mut x = vec![0xee; cells.len()];
                let (mut scale, mut sum, mut faults) =
                    (vec![0; 4 * batch as usize], vec![0; 4 * batch as usize], vec![0; 4]);
                let mut args: Vec<Arg> = [&input, &input, &input, &no, &no].map(|b| Arg::ReadOnly(b)).into();
                args.extend([&mut scratch, &mut x, &mut scale, &mut sum, &mut faults].map(|b| Arg::Buffer(b)));
                args.push(Arg::I32(0));
                if factors {
                    args.push(Arg::ReadOnly(&f));
                }
                let kernel = prepare::lower_as(&op, spread);
                run(&kernel, &mut args, &Options::default()).unwrap_or_else(|e| panic!("{op:?}: {e}"));
                assert!(x == cells, "{op:?}, {spread:?}");
            }
        }
    }
}
