//! Preparing activations for a quantized layer: gated unit, norm, rotation, rounding to two planes of signed bytes.
//!
//! One block a token, or a cluster of blocks where columns are many. A lane holds four neighbouring columns of each of its
//! warp's **groups** of 128 in registers from the load to the store. The block meets for the norm, for the largest
//! magnitude, and for butterflies between groups of different warps; see [`super::rotate`].

mod spread;
mod store;

pub use self::spread::Spread;
use self::spread::{Geometry, Groups};
use self::store::Whole;
use super::math::{self, across_lanes};
use super::mean;
use super::rotate::{GROUP, GROUP_LEVELS, LaneSigns, Transforms, flip, flip_word, place};
use super::span::Span;
use crate::cuda::Device;
use crate::ir::{Builder, Cache, Elem, Kernel, Mem, Scalar, Special, V, Var};
use crate::layout::{CELL, COLUMN_PAD};
use crate::reference::{ACTIVATION_MAX, Activation, INFINITY_BITS, Interleave, RmsNorm};
use crate::spec::Rotation;
use crate::spec::terms::Terms;

/// What to compute: of each token the input, gated, normed and rotated, where these are wanted, in this order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prepare {
    /// Values of a token.
    pub columns: u32,
    /// Tokens.
    pub batch: u32,
    /// Where a token's values lie; with a gated unit, its gates.
    pub input: Span,
    /// A gated unit.
    pub gate: Option<Gate>,
    /// Root-mean-square norm.
    pub norm: Option<RmsNorm>,
    /// The rotation of the layer's weights.
    pub rotation: Rotation,
    /// What a format does to its activations. Then the rotation is without signs.
    pub entering: Option<Entering>,
}

/// What a format does to its activations, beside a transform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entering {
    /// Whether there is a factor for each column, before the transform.
    pub factors: bool,
    /// The columns of a cell in the order in which they are written, if it is another.
    pub order: Option<[u8; CELL as usize]>,
}

impl Entering {
    /// What is done to the activations of products with a matrix of a format, and the rotation; nothing if they are rounded as they
    /// are.
    pub fn of(terms: &Terms) -> (Rotation, Option<Entering>) {
        let side = terms.sides.input;
        let entering = Entering { factors: side.field.is_some(), order: terms.order() };
        let rotation =
            side.hadamard.map_or(Rotation::None, |block| Rotation::Hadamard { seed: 0, block, interleave: None });
        let some = rotation != Rotation::None || entering != Entering::default();
        (rotation, some.then_some(entering))
    }
}

impl Prepare {
    /// That of rows of activations, nothing before it, for products with a matrix of a format.
    pub fn entering(terms: &Terms, columns: u32, batch: u32) -> Prepare {
        let (rotation, entering) = Entering::of(terms);
        Prepare { columns, batch, input: Span::rows(columns), gate: None, norm: None, rotation, entering }
    }
}

/// A gated unit: `activation(gate) · up`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gate {
    /// Applied to the gates.
    pub activation: Activation,
    /// Where the values lie that they gate.
    pub up: Span,
}

/// What of a preparation a kernel does. Where the columns of a token lie on several devices, all round by the largest magnitude of
/// all: each finds its own, and then rounds by the largest of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// All of it.
    Whole,
    /// Finds the largest magnitude, which goes to `x_scale`; infinite if a value is not finite. Nothing else is written but zeros to
    /// `x_sum`.
    Largest,
    /// Rounds by the larger of a token's own largest magnitude and one that is given: a further parameter behind all others,
    /// `given`: `f32`, one a token.
    Given,
}

impl Prepare {
    /// Groups of 128 columns that a warp takes where a block of `warps` prepares for itself ([`super::product::Launch::ranked_with`]);
    /// `None` if it cannot: of several tokens, of rotations that go through shared memory, of more columns than registers hold.
    pub(super) fn within(&self, warps: u32) -> Option<u32> {
        Geometry::within(self, warps).map(|g| g.per_warp)
    }

    /// Bytes of shared memory that it takes then.
    pub(super) fn shared_within(&self, warps: u32) -> u32 {
        2 * self.columns.next_multiple_of(COLUMN_PAD) + 4 * (Groups::new(self).count + warps + 1)
    }

    /// Words of the buffer `scratch`, at least one.
    pub fn scratch(&self, spread: Spread) -> usize {
        self.scratch_of(&Geometry::new(self, spread))
    }

    fn scratch_of(&self, geometry: &Geometry) -> usize {
        if geometry.blocks == 1 { 1 } else { (self.batch * scratch_of_token(geometry)) as usize }
    }
}

/// The largest magnitude of each warp, then the squares' sum of each group.
fn scratch_of_token(g: &Geometry) -> u32 {
    g.blocks * g.warps + g.groups
}

/// Makes the kernel. Its parameters, in order:
///
/// * `input`: `f32` (or the type asked for), the values or gates;
/// * `up`: as `input` (read with a gated unit only);
/// * `norm`: `f32`, `columns` weights (read with a norm only);
/// * `flips`: 32-bit words, bit `i` set if column `i` is negated; see [`super::rotate::flips`];
/// * `base`: the dense part's signs, if larger than the program may unroll; see [`super::rotate::base`];
/// * `scratch`: 32-bit words, [`Prepare::scratch`] of them, of any contents;
/// * `x`, `x_scale`, `x_sum`: see [`super::gemv::lower`]; the scale of a token whose values are not finite is infinite;
/// * `faults`: `i32`, one a layer of the model: that of `layer` becomes 1 if a token's values are not finite;
/// * `layer`: `i32`, the place in `faults`;
/// * `factors`: `f32`, one a column, if a format has them.
pub fn lower(op: &Prepare, device: &Device) -> Kernel {
    lower_as(op, Spread::choose(op, device))
}

/// As [`lower`], spread in a given way.
pub fn lower_as(op: &Prepare, spread: Spread) -> Kernel {
    lower_reading(op, spread, Elem::F32)
}

/// As [`lower_as`], of inputs (values, gates and what they gate) of type `input`: `F32`, `F16` or `BF16`.
pub fn lower_reading(op: &Prepare, spread: Spread, input: Elem) -> Kernel {
    lower_stage(op, spread, input, Stage::Whole)
}

/// As [`lower_reading`], one stage of it.
pub fn lower_stage(op: &Prepare, spread: Spread, input: Elem, stage: Stage) -> Kernel {
    let g = Geometry::new(op, spread);
    let b = Builder::new(&format!("prepare_{}_b{}", op.columns, op.batch), [op.batch * g.blocks, 1], g.warps * 32);
    b.doc(format!(
        "{} columns of {} token(s){}{}{}, {}.",
        op.columns,
        op.batch,
        if op.gate.is_some() { ", gated" } else { "" },
        if op.norm.is_some() { ", normed" } else { "" },
        if op.rotation == Rotation::None { "" } else { ", rotated" },
        match stage {
            Stage::Whole => "as signed bytes",
            Stage::Largest => "of each the largest magnitude",
            Stage::Given => "as signed bytes, by given magnitudes",
        },
    ));
    b.cluster(g.blocks);
    b.dependent_launch();
    let inputs = Inputs::declare(&b, op, input);
    let emit = Emit::new(&b, op, g, inputs, Output::declare(&b, op, &g, stage), stage);
    let early = emit.early();
    b.grid_wait();
    b.grid_launch();
    emit.late(&early);
    b.finish()
}

/// What a preparation reads: parameters.
pub(super) struct Inputs {
    /// Type of values.
    elem: Elem,
    input: Mem,
    up: Mem,
    weights: Mem,
    flips: Mem,
    base: Mem,
}

impl Inputs {
    pub(super) fn declare(b: &Builder, op: &Prepare, elem: Elem) -> Self {
        Inputs {
            elem,
            input: b.sized("input", elem, false, op.input.len(op.batch, op.columns)),
            // What there is no need of is not read.
            up: b.sized("up", elem, false, op.gate.map_or(0, |g| g.up.len(op.batch, op.columns))),
            weights: b.sized("norm", Elem::F32, false, op.norm.map_or(0, |_| op.columns.into())),
            flips: b.buffer("flips", Elem::U32, false),
            base: b.buffer("base", Elem::U32, false),
        }
    }
}

/// What a preparation writes: parameters, or shared memory of a block that prepares for itself.
struct Output<'b> {
    scratch: Option<Mem>,
    x: Mem,
    /// A block that prepares for itself has its scale in registers.
    x_scale: Option<Mem>,
    /// Not of a block that needs no sum.
    x_sum: Option<Mem>,
    faults: Mem,
    layer: V<'b>,
    /// Of a format.
    factors: Option<Mem>,
    /// Of [`Stage::Given`].
    given: Option<Mem>,
}

impl<'b> Output<'b> {
    fn declare(b: &'b Builder, op: &Prepare, g: &Geometry, stage: Stage) -> Self {
        let (batch, columns) = (u64::from(op.batch), u64::from(op.columns.next_multiple_of(COLUMN_PAD)));
        Output {
            scratch: Some(b.sized("scratch", Elem::U32, true, op.scratch_of(g) as u64)),
            x: b.sized("x", Elem::I8, true, 2 * batch * columns),
            x_scale: Some(b.sized("x_scale", Elem::F32, true, batch)),
            x_sum: Some(b.sized("x_sum", Elem::I32, true, batch)),
            faults: b.buffer("faults", Elem::I32, true),
            layer: b.scalar("layer", Scalar::I32),
            factors: op.entering.filter(|e| e.factors).map(|_| b.sized("factors", Elem::F32, false, op.columns.into())),
            given: (stage == Stage::Given).then(|| b.sized("given", Elem::F32, false, batch)),
        }
    }

    fn within(b: &'b Builder, op: &Prepare, of: Reader) -> Self {
        Output {
            scratch: None,
            x: b.shared("planes", Elem::U32, op.columns.next_multiple_of(COLUMN_PAD) / 2),
            x_scale: None,
            x_sum: (of == Reader::Packed).then(|| b.shared("planes_sum", Elem::I32, 1)),
            faults: b.buffer("faults", Elem::I32, true),
            layer: b.scalar("layer", Scalar::I32),
            factors: match of {
                Reader::Packed => None,
                Reader::Grouped => {
                    let some = op.entering.is_some_and(|e| e.factors);
                    let factors = b.sized("entering", Elem::F32, false, if some { op.columns.into() } else { 0 });
                    some.then_some(factors)
                }
            },
            given: None,
        }
    }
}

/// Which products read what their own blocks prepare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    /// Those with packed weights, which need the activations' sum.
    Packed,
    /// Those with matrices of formats, which may have factors for columns.
    Grouped,
}

/// The preparation of a token by each block of a product for itself: the planes go to shared memory, in the order in which others read
/// them.
pub(super) struct Within<'a, 'b>(Emit<'a, 'b>);

impl<'a, 'b> Within<'a, 'b> {
    /// Declares parameters: `input`, `up`, `norm`, `flips`, `base`, `faults` and `layer`, as [`lower`] has them, and of products with
    /// matrices of formats `entering`, its `factors`.
    pub(super) fn new(b: &'b Builder, op: &'a Prepare, warps: u32, of: Reader) -> Self {
        let g = Geometry::within(op, warps).expect("a block that can prepare for itself");
        let inputs = Inputs::declare(b, op, Elem::F32);
        Within(Emit::new(b, op, g, inputs, Output::within(b, op, of), Stage::Whole))
    }

    /// Planes, and where their sum is, if there is one.
    pub(super) fn planes(&self) -> (Mem, Option<Mem>) {
        (self.0.out.x, self.0.out.x_sum)
    }

    /// Puts on its way what no kernel before writes.
    pub(super) fn early(&self) -> Early {
        self.0.early()
    }

    /// Prepares; gives the scale. A barrier must follow.
    pub(super) fn late(&self, early: &Early) -> V<'b> {
        self.0.late(early).expect("a whole preparation")
    }
}

/// Of each of a warp's groups in registers the norm's weights and the signs.
pub(super) struct Early {
    weights: Vec<[Var; 4]>,
    words: Vec<Var>,
}

/// A group of the present warp.
#[derive(Clone, Copy)]
struct Group<'b> {
    /// Its number among the warp's, where that is known when the kernel is made.
    index: Option<usize>,
    /// Its number among the token's.
    number: V<'b>,
    /// First of this lane's four columns.
    column: V<'b>,
}

struct Emit<'a, 'b> {
    b: &'b Builder,
    op: &'a Prepare,
    g: Geometry,
    transforms: Transforms,
    interleave: Option<Interleave>,
    stage: Stage,
    inputs: Inputs,
    out: Output<'b>,
    lane: V<'b>,
    /// The warp among those of the token.
    warp: V<'b>,
    token: V<'b>,
    /// True for one thread of the token, of a block that prepares for itself for one of the block.
    leader: V<'b>,
    /// This lane's values of each group, unless they lie in shared memory.
    held: Vec<[Var; 4]>,
    /// All values of the token, if the kernel needs them there.
    values: Option<Mem>,
}

impl<'a, 'b> Emit<'a, 'b> {
    fn new(b: &'b Builder, op: &'a Prepare, g: Geometry, inputs: Inputs, out: Output<'b>, stage: Stage) -> Self {
        let (lane, warp) = (b.special(Special::Lane), b.special(Special::Warp));
        let (token, rank) = match (g.blocks, out.scratch) {
            (_, None) => (b.i32(0), b.i32(0)),
            (1, _) => (b.special(Special::BlockX), b.i32(0)),
            _ => (b.special(Special::Cluster), b.special(Special::Rank)),
        };
        let warp = rank * g.warps + warp;
        let leader = (warp * 32 + lane).eq(0);
        let held = match g.in_registers() {
            true => (0..g.per_warp).map(|_| [0; 4].map(|_| b.var(b.f32(0.0)))).collect(),
            false => Vec::new(),
        };
        let transforms = Transforms::of(op.rotation, op.columns);
        let values = (g.across || !g.in_registers()).then(|| b.shared("values", Elem::F32, g.groups * GROUP));
        let interleave = Interleave::of(op.rotation, op.columns);
        Emit { b, op, g, transforms, interleave, stage, inputs, out, lane, warp, token, leader, held, values }
    }

    /// For each group of the warp.
    fn each(&self, f: impl Fn(Group<'b>)) {
        let (b, g) = (self.b, self.g);
        let one = |index: Option<usize>, k: V<'b>| {
            let number = self.warp * g.per_warp + k;
            let run = || f(Group { index, number, column: number * GROUP + self.lane * 4 });
            if g.is_exact() { run() } else { b.if_(number.lt(g.groups), run) }
        };
        if g.in_registers() {
            (0..g.per_warp).for_each(|k| one(Some(k as usize), b.i32(k as i32)));
        } else {
            b.for_(0, g.per_warp, 1, |k| one(None, k));
        }
    }

    /// The `k`-th group of the warp, of those that lie in registers.
    fn group(&self, k: u32) -> Group<'b> {
        let number = self.warp * self.g.per_warp + k;
        Group { index: Some(k as usize), number, column: number * GROUP + self.lane * 4 }
    }

    fn get(&self, group: Group<'b>) -> [V<'b>; 4] {
        match group.index {
            Some(k) => self.held[k].map(|v| self.b.get(v)),
            None => self.shared(group.column),
        }
    }

    fn set(&self, group: Group<'b>, v: [V<'b>; 4]) {
        match group.index {
            Some(k) => self.held[k].iter().zip(v).for_each(|(&var, v)| self.b.set(var, v)),
            None => self.share(group.column, v),
        }
    }

    /// Four values from shared memory.
    fn shared(&self, column: V<'b>) -> [V<'b>; 4] {
        let values = self.values.expect("declared where it is used");
        let v = self.b.load_as(values, column, Elem::F32, 4, Cache::Default);
        [0, 1, 2, 3].map(|j| v.lane(j))
    }

    /// Four values to shared memory.
    fn share(&self, column: V<'b>, v: [V<'b>; 4]) {
        let values = self.values.expect("declared where it is used");
        self.b.store(values, column, self.b.vector(&v), Elem::F32);
    }

    /// Four values of a row that begins at `first`, from `column` on; zero past the last column.
    fn load(&self, (mem, elem): (Mem, Elem), first: V<'b>, aligned: bool, column: V<'b>, cache: Cache) -> [V<'b>; 4] {
        let (b, n) = (self.b, self.op.columns);
        let inside = n == self.g.groups * GROUP;
        if aligned && n.is_multiple_of(4) {
            let load = || {
                let v = b.load_as(mem, first + column, elem, 4, cache);
                [0, 1, 2, 3].map(|j| v.lane(j))
            };
            if inside {
                return load();
            }
            let vars = [0; 4].map(|_| b.var(b.f32(0.0)));
            b.if_(column.lt(n), || vars.iter().zip(load()).for_each(|(&var, v)| b.set(var, v)));
            return vars.map(|v| b.get(v));
        }
        [0, 1, 2, 3].map(|j| {
            let load = || b.load_as(mem, first + column + j, elem, 1, cache);
            if inside {
                return load();
            }
            let var = b.var(b.f32(0.0));
            b.if_((column + j).lt(n), || b.set(var, load()));
            b.get(var)
        })
    }

    fn of_span(&self, mem: Mem, span: Span, column: V<'b>) -> [V<'b>; 4] {
        let aligned = span.first.is_multiple_of(4) && (self.op.batch == 1 || span.stride.is_multiple_of(4));
        let first = if self.op.batch == 1 { self.b.i32(span.first as i32) } else { span.at(self.token) };
        self.load((mem, self.inputs.elem), first, aligned, column, Cache::Default)
    }

    fn norm_weights(&self, column: V<'b>) -> [V<'b>; 4] {
        self.load((self.inputs.weights, Elem::F32), self.b.i32(0), true, column, Cache::ReadOnly)
    }

    /// What no kernel before writes is on its way before these have ended.
    fn early(&self) -> Early {
        let (b, op, g) = (self.b, self.op, self.g);
        let mut early = Early { weights: Vec::new(), words: Vec::new() };
        if g.in_registers() {
            early.weights = (0..g.per_warp).map(|_| [0; 4].map(|_| b.var(b.f32(0.0)))).collect();
            early.words = (0..g.per_warp).map(|_| b.var(b.u32(0))).collect();
            self.each(|group| {
                let k = group.index.expect("in registers");
                if op.norm.is_some() {
                    let v = self.norm_weights(group.column);
                    early.weights[k].iter().zip(v).for_each(|(&var, v)| b.set(var, v));
                }
                if !self.transforms.is_empty() && op.entering.is_none() {
                    b.set(early.words[k], flip_word(b, self.inputs.flips, op.columns, group.column));
                }
            });
        }
        early
    }

    /// All that depends on the input. Gives the scale of a block that prepares for itself.
    fn late(&self, Early { weights, words }: &Early) -> Option<V<'b>> {
        let (b, op, g) = (self.b, self.op, self.g);
        let rotated = !self.transforms.is_empty();
        let sums = op.norm.map(|_| self.meeting("squares", Elem::F32, g.blocks * g.warps, g.groups));
        self.each(|group| {
            let v = self.of_span(self.inputs.input, op.input, group.column);
            let v = match op.gate {
                None => v,
                Some(gate) => {
                    let up = self.of_span(self.inputs.up, gate.up, group.column);
                    let mut up = up.into_iter();
                    v.map(|v| math::activation(b, gate.activation, v) * up.next().expect("four"))
                }
            };
            self.set(group, v);
            if let Some((mem, first)) = sums {
                let [x, y, z, w] = v.map(|v| v * v);
                let sum = across_lanes((x + y) + (z + w), |a, b| a + b);
                b.if_(self.lane.eq(0), || b.store(mem, first + group.number, sum, Elem::F32));
            }
        });
        let inverse = sums.map(|(mem, first)| {
            self.meet();
            inverse_norm(b, mean::of_groups(b, op.columns, mem, first), op.norm.expect("summed for it").eps)
        });

        let signs = LaneSigns::new(b);
        self.each(|group| {
            let mut v = self.get(group);
            if let (Some(inverse), Some(norm)) = (inverse, op.norm) {
                let weights = match group.index {
                    Some(k) => weights[k].map(|w| b.get(w)),
                    None => self.norm_weights(group.column),
                };
                let mut weights = weights.into_iter();
                v = v.map(|v| {
                    let weight = weights.next().expect("four");
                    v * inverse * if norm.add_one { weight + 1.0 } else { weight }
                });
            }
            if let Some(factors) = self.out.factors {
                let mut factors =
                    self.load((factors, Elem::F32), b.i32(0), true, group.column, Cache::ReadOnly).into_iter();
                v = v.map(|v| v * factors.next().expect("four"));
            }
            if rotated && op.entering.is_some() {
                v = self.transforms.in_warp(&signs, group.column, v);
            } else if rotated {
                let word = match group.index {
                    Some(k) => b.get(words[k]),
                    None => flip_word(b, self.inputs.flips, op.columns, group.column),
                };
                v = self.transforms.in_warp(&signs, group.column, flip(word, group.column, v));
            }
            self.set(group, v);
            if g.across && g.in_registers() {
                self.share(group.column, v);
            }
        });
        if g.across {
            b.barrier();
            self.transforms.across_warps(b, self.values.expect("with it"), self.inputs.base, g.warps * 32);
            if g.in_registers() {
                self.each(|group| self.set(group, self.shared(group.column)));
            }
        } else {
            self.between_groups();
        }
        self.round()
    }

    /// Butterflies of stride 128 and more between a thread's own values.
    fn between_groups(&self) {
        let b = self.b;
        for level in GROUP_LEVELS..self.transforms.levels() {
            let bit = 1usize << (level - GROUP_LEVELS);
            for k in (0..self.held.len()).filter(|k| k & bit == 0) {
                let column = (self.warp * self.g.per_warp + k as u32) * GROUP;
                let mix = || {
                    for (&low, &high) in self.held[k].iter().zip(&self.held[k + bit]) {
                        let (u, v) = (b.get(low), b.get(high));
                        b.set(low, u + v);
                        b.set(high, u - v);
                    }
                };
                match self.transforms.mixes(level, column) {
                    None => mix(),
                    Some(mixes) => b.if_(mixes, mix),
                }
            }
        }
    }

    /// A group's values times what makes the rotation orthonormal.
    fn scaled(&self, group: Group<'b>) -> [V<'b>; 4] {
        let v = self.get(group);
        if self.transforms.is_empty() {
            return v;
        }
        let factor = |j: u32| self.transforms.factor(self.b, group.column + j);
        if self.transforms.factor_varies() {
            let mut j = 0;
            return v.map(|v| {
                j += 1;
                v * factor(j - 1)
            });
        }
        let factor = factor(0);
        v.map(|v| v * factor)
    }

    /// Where the warps or groups of a token put a number each that all read: memory, and the first of `len`. In the scratch
    /// buffer of a cluster it lies `skip` behind the token's first.
    fn meeting(&self, name: &str, elem: Elem, skip: u32, len: u32) -> (Mem, V<'b>) {
        match self.out.scratch {
            Some(scratch) if self.g.blocks > 1 => (scratch, self.token * scratch_of_token(&self.g) + skip),
            _ => (self.b.shared(name, elem, len), self.b.i32(0)),
        }
    }

    /// All threads of the token meet.
    fn meet(&self) {
        if self.g.blocks == 1 { self.b.barrier() } else { self.b.cluster_barrier() }
    }

    fn round(&self) -> Option<V<'b>> {
        let out = &self.out;
        let (b, g) = (self.b, self.g);
        b.comment("Largest magnitude: magnitudes are ordered as their bits are.");
        let largest = b.var(b.u32(0));
        self.each(|group| {
            let v = self.scaled(group);
            self.set(group, v);
            let bits = v.map(|v| v.bits(Scalar::U32) & (i32::MAX as u32));
            let most = bits.into_iter().fold(b.get(largest), |m, v| m.max(v));
            b.set(largest, most);
        });
        let of_warp = b.get(largest).max_across();
        let all = g.blocks * g.warps;
        let (mem, first) = self.meeting("largest", Elem::U32, 0, all);
        b.if_(self.lane.eq(0), || b.store(mem, first + self.warp, of_warp, Elem::U32));
        if let Some(x_sum) = out.x_sum {
            b.if_(self.leader, || b.store(x_sum, self.token, b.i32(0), Elem::I32));
        }
        self.meet();
        let each = (0..all.div_ceil(32)).map(|i| {
            let at = self.lane + i * 32;
            b.load(mem, first + if (i + 1) * 32 <= all { at } else { at.min(all - 1) }, Elem::U32)
        });
        let each: Vec<V> = each.collect();
        let most = each.into_iter().reduce(|a, b| a.max(b)).expect("a warp").max_across();
        let most = match out.given {
            Some(given) => most.max(b.load(given, self.token, Elem::F32).bits(Scalar::U32)),
            None => most,
        };
        let magnitude = most.bits(Scalar::F32);
        if self.stage == Stage::Largest {
            let finite = most.lt(INFINITY_BITS).select(magnitude, f32::INFINITY);
            let x_scale = out.x_scale.expect("for other kernels");
            b.if_(self.leader, || b.store(x_scale, self.token, finite, Elem::F32));
            return None;
        }
        let inverse = magnitude.gt(0.0).select(b.f32(ACTIVATION_MAX) / magnitude, 0.0);

        b.comment("Whole numbers.");
        let sum = b.var(b.i32(0));
        let whole = |group: Group<'b>| -> Whole<'b> {
            let q = self.get(group).map(|v| (v * inverse).to(Scalar::I32));
            if out.x_sum.is_some() {
                b.set(sum, b.get(sum) + ((q[0] + q[1]) + (q[2] + q[3])));
            }
            let high = q.map(|q| (q + 64) >> 7);
            // Four quads a cell; the planes of a token are neighbours.
            let cell = place(self.interleave, self.op.columns, group.number * 8 + self.lane / 4);
            let cell = cell * (2 * self.op.batch) + self.token * 2;
            (cell, [high, [0, 1, 2, 3].map(|k| q[k] - (high[k] << 7))])
        };
        self.store(&whole);
        if let Some(x_sum) = out.x_sum {
            let sum = b.get(sum).bits(Scalar::U32).sum_across().bits(Scalar::I32);
            b.if_(self.lane.eq(0), || {
                b.atomic_add(x_sum, self.token, sum);
            });
        }
        let finite = most.lt(INFINITY_BITS);
        let scale = || finite.select(magnitude / ACTIVATION_MAX, f32::INFINITY);
        let Some(x_scale) = out.x_scale else {
            // Each block has its own scale; one of them says what was not finite.
            b.if_(self.leader & b.special(Special::BlockX).eq(0) & !finite, || {
                b.store(out.faults, out.layer, b.i32(1), Elem::I32);
            });
            return Some(scale());
        };
        b.if_(self.leader, || {
            b.store(x_scale, self.token, scale(), Elem::F32);
            b.if_(!finite, || b.store(out.faults, out.layer, b.i32(1), Elem::I32));
        });
        None
    }
}

/// `1 / √(mean(x²) + eps)`.
pub(super) fn inverse_norm<'b>(b: &'b Builder, mean_square: V<'b>, eps: f32) -> V<'b> {
    b.f32(1.0) / (mean_square + eps).sqrt()
}
