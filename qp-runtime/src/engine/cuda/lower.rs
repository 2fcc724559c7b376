//! From a program to the launches of a step: which kernels, on which buffers, in which order.
//!
//! Nothing here needs a device, weights or a model at hand. The engine records these launches, `qp profile` times them,
//! `qp bench jit` compiles their kernels.
//!
//! Norms and gated units before packed layers are part of the preparation of their activations. A layer whose output is
//! added to the residual stream adds it itself. Values lie in [`Slot`]s, which serve again once nothing reads them.

mod mixture;
mod op;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use qp_codegen::cuda::Device;
use qp_codegen::kernels::Span;
use qp_codegen::kernels::add::Add;
use qp_codegen::kernels::argmax::Argmax;
use qp_codegen::kernels::attend::many;
use qp_codegen::kernels::dense::Dense;
use qp_codegen::kernels::embed::Embed;
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::glu::Glu;
use qp_codegen::kernels::grouped;
use qp_codegen::kernels::leave::Leave;
use qp_codegen::kernels::map::Map;
use qp_codegen::kernels::norm::Norm;
use qp_codegen::kernels::prepare::{Entering, Gate, Prepare};
use qp_codegen::kernels::product;
use qp_codegen::kernels::rows::Rows;
use qp_codegen::kernels::sample::Sample;
use qp_codegen::spec::terms::Terms;
use qp_codegen::spec::{Rotation, Shape};

pub use self::op::Op;
use super::layout::{Form, Layout};
use crate::engine::attention_ops;
use crate::model::LayerId;
use crate::model::program::{self, CacheId, Node, Program, RopeId, Value, VectorId};

/// Most tokens whose attention is computed for each token by itself.
const FEW: u32 = 64;
/// Most sequences of a step of more tokens.
pub const MOST_CHUNKS: u32 = 128;

/// A buffer of `f32` that launches pass on, a row of `stride` values a token. Slots of one stride are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot {
    /// Values of a row.
    pub stride: u32,
    /// True if only tokens whose logits are wanted have rows.
    pub wanted: bool,
    /// Which of those.
    pub number: usize,
}

/// A launch: an operation and what it works on. Which of these an operation has, and what they are to it, follows from its
/// kernel's parameters.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What is computed.
    pub op: Op,
    /// The program's node that it is part of.
    pub node: usize,
    /// Slots that it reads, in the order of the kernel's parameters.
    pub reads: Vec<Slot>,
    /// The slot that it writes, or adds to.
    pub write: Option<Slot>,
    /// Index of a matrix.
    pub matrix: Option<usize>,
    /// Weights of norms, what is added to each row, or sinks.
    pub vectors: Vec<VectorId>,
    /// The layer whose bias is added.
    pub bias: Option<LayerId>,
    /// Keys and values.
    pub cache: Option<CacheId>,
    /// How queries and keys turn.
    pub rope: Option<RopeId>,
}

/// Which rows a step gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wanted {
    /// Rows of logits; as many as tokens: those of all tokens, in their order.
    pub rows: u32,
    /// What is made of the logits.
    pub pick: Pick,
}

/// What a step makes of logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pick {
    /// They are read as they are.
    Logits,
    /// The likeliest token of each row.
    Best,
    /// A token of each row, drawn.
    Drawn,
}

/// Where a value lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    slot: Slot,
    span: Span,
    columns: u32,
}

/// A value that is computed where it is read.
#[derive(Clone, Copy, Debug)]
enum Pending {
    Norm { x: Value, norm: program::Norm },
    Gate { gate: Value, up: Value, activation: qp_codegen::reference::Activation },
}

/// How activations are prepared for packed layers: once for all that want the same.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Preparation {
    rotation: Rotation,
    entering: Option<Entering>,
    /// Index of the matrix whose factors are taken.
    matrix: Option<usize>,
}

impl Preparation {
    /// That for products with matrix number `at`, of which `form` is the form; `None` for dense ones.
    fn of(form: &Form, at: usize) -> Option<Preparation> {
        match form {
            Form::Packed(q) => Some(Preparation { rotation: q.rotation, entering: None, matrix: None }),
            Form::Grouped(terms) => {
                let (rotation, entering) = Entering::of(terms);
                Some(Preparation { rotation, entering, matrix: entering.filter(|e| e.factors).map(|_| at) })
            }
            Form::Dense(_) | Form::Shared => None,
        }
    }
}

/// The launches of a step, and where its logits lie.
#[derive(Clone, Debug)]
pub struct Step {
    /// In order.
    pub launches: Vec<Launch>,
    /// Slot and first value of a row's logits.
    pub logits: Option<(Slot, Span)>,
}

/// The launches of a step of `tokens` tokens on `device`.
pub fn step(layout: &Layout, device: &Device, tokens: u32, wanted: Wanted) -> Step {
    let mut lowering = Lowering::new(layout, device, tokens, wanted);
    let program = &*layout.program;
    let end = if wanted.rows > 0 { program.nodes.len() } else { program.behind_blocks() };
    for node in 0..end {
        lowering.node(node);
    }
    let logits = lowering.places[program.logits().0].map(|p| (p.slot, p.span));
    if let Some(Place { slot, span: logits, columns }) = lowering.places[program.logits().0] {
        let batch = wanted.rows;
        match wanted.pick {
            Pick::Logits => (),
            Pick::Best => {
                lowering.launch(Op::Argmax(Argmax { columns, batch, logits }), &[slot], None);
            }
            Pick::Drawn => {
                lowering.launch(Op::Sample(Sample { columns, batch, logits }), &[slot], None);
            }
        }
    }
    Step { launches: lowering.launches, logits }
}

/// The preparation that the product `op` of a layer (or of several that read the same) does itself in a step of one token on
/// `device`; `None` if a launch before does it.
pub fn own_preparation(program: &Program, id: LayerId, op: &Gemv, device: &Device) -> Option<Prepare> {
    let Node::Linear { x, .. } = &program.nodes[program.node_of(id)?] else { return None };
    let columns = op.shape.cols;
    let (mut norm, mut gate) = (None, None);
    for node in &program.nodes {
        match node {
            Node::Norm { norm: before, y, .. } if y == x => norm = Some(before.norm),
            Node::Gate { activation, y, .. } if y == x => {
                gate = Some(Gate { activation: *activation, up: Span::rows(columns) });
            }
            _ => (),
        }
    }
    let input = Span::rows(columns);
    let prepare = Prepare { columns, batch: 1, input, gate, norm, rotation: op.quantizer.rotation, entering: None };
    product::prepares(&[product::Launch::expected(op, &prepare, device)], &prepare).then_some(prepare)
}

/// The part of a step behind its decoder blocks. What the blocks gave lies where a step of as many tokens leaves it, whether
/// rows are wanted of that or not.
pub fn head(layout: &Layout, device: &Device, tokens: u32, wanted: Wanted) -> Step {
    let mut step = step(layout, device, tokens, wanted);
    step.launches.retain(|launch| launch.node >= layout.program.behind_blocks());
    step
}

/// Most tokens of a tile of the attention of many tokens: what suits every attention of the program.
pub fn tile_tokens(layout: &Layout, device: &Device) -> u32 {
    let tile = |node: &Node| match node {
        Node::Attend(attention) => {
            let spans = [Span::rows(0); 3];
            let (_, op) = attention_ops(&layout.program, attention, layout.cache, FEW + 1, spans);
            Some(many::Launch::choose(&op, device).tile_tokens(&op))
        }
        _ => None,
    };
    layout.program.nodes.iter().filter_map(tile).min().unwrap_or(1)
}

/// Tiles of a step of `tokens` tokens, at most.
pub fn most_tiles(layout: &Layout, device: &Device, tokens: u32) -> u32 {
    tokens / tile_tokens(layout, device) + MOST_CHUNKS.min(tokens)
}

/// Whether the attention of a step of `tokens` tokens is computed in tiles.
pub fn is_many(tokens: u32) -> bool {
    tokens > FEW
}

/// Products of a step with the preparation of what they read: whether they do that themselves.
type Decided = (Vec<Multiplied>, Prepare, bool);

/// What a product multiplies with.
#[derive(Clone, PartialEq)]
enum Multiplied {
    /// A matrix of a quantizer, which is among [`Layout::specs`].
    Packed(usize, Shape),
    /// A matrix of a format.
    Grouped(Arc<Terms>, Shape),
}

struct Lowering<'l> {
    layout: &'l Layout,
    device: &'l Device,
    /// Rows of values now: tokens, after [`Node::Rows`] those that are wanted.
    batch: u32,
    wanted: Wanted,
    after_rows: bool,
    at: usize,
    launches: Vec<Launch>,
    places: Vec<Option<Place>>,
    pending: Vec<Option<Pending>>,
    /// Reads of each value that are to come.
    left: Vec<usize>,
    /// Values in each slot that is in use.
    used: BTreeMap<Slot, usize>,
    /// Stride of the residual stream.
    stream: u32,
    /// Of products, by quantizer and shape, whether they do a preparation themselves: layers of a model are mostly alike.
    decided: Vec<Decided>,
}

impl<'l> Lowering<'l> {
    fn new(layout: &'l Layout, device: &'l Device, tokens: u32, wanted: Wanted) -> Self {
        let program = &*layout.program;
        let values = program.widths.len();
        let mut out = Lowering {
            layout,
            device,
            batch: tokens,
            wanted,
            after_rows: false,
            at: 0,
            launches: Vec::new(),
            places: vec![None; values],
            pending: vec![None; values],
            left: vec![0; values],
            used: BTreeMap::new(),
            stream: program.widths[0] as u32,
            decided: Vec::new(),
        };
        for node in &program.nodes {
            match *node {
                Node::Norm { x, norm, y } => out.pending[y.0] = Some(Pending::Norm { x, norm }),
                Node::Gate { gate, up, activation, y } => {
                    out.pending[y.0] = Some(Pending::Gate { gate, up, activation });
                }
                Node::Embed { .. }
                | Node::Linear { .. }
                | Node::Attend(_)
                | Node::Mix(_)
                | Node::Add { .. }
                | Node::Map { .. }
                | Node::Shift { .. }
                | Node::Part { .. }
                | Node::Rows { .. } => {}
            }
        }
        for node in 0..program.nodes.len() {
            for value in out.reads(node) {
                out.left[value.0] += 1;
            }
        }
        // Wide enough that products can add their outputs to it, padding included.
        for node in &program.nodes {
            if let Node::Add { z, .. } = node {
                let writer = program.nodes.iter().find_map(|n| match n {
                    Node::Linear { layers, .. } => layers.iter().find(|l| l.1 == *z),
                    _ => None,
                });
                if let Some((id, _)) = writer {
                    out.stream = out.stream.max(layout.matrices[layout.matrix_of[id.0]].stride);
                }
            }
        }
        out
    }

    /// The values that a node reads, what it computes first included.
    fn reads(&self, node: usize) -> Vec<Value> {
        let node = &self.layout.program.nodes[node];
        if matches!(node, Node::Norm { .. } | Node::Gate { .. }) {
            return Vec::new();
        }
        let mut open = node.reads();
        let mut out = Vec::new();
        while let Some(value) = open.pop() {
            match self.pending[value.0] {
                None => out.push(value),
                Some(Pending::Norm { x, .. }) => open.push(x),
                Some(Pending::Gate { gate, up, .. }) => open.extend([gate, up]),
            }
        }
        out
    }

    fn take(&mut self, stride: u32) -> Slot {
        let slot = |number| Slot { stride, wanted: self.after_rows, number };
        let free = (0..).map(slot).find(|s| !self.used.contains_key(s)).expect("there are always more");
        self.used.insert(free, 0);
        free
    }

    fn put(&mut self, value: Value, slot: Slot, span: Span) {
        let columns = self.layout.program.widths[value.0] as u32;
        self.places[value.0] = Some(Place { slot, span, columns });
        *self.used.entry(slot).or_insert(0) += 1;
    }

    /// A slot of its own for a value.
    fn own(&mut self, value: Value) -> (Slot, Span) {
        self.own_of(value, self.layout.program.widths[value.0] as u32)
    }

    /// The same, of `stride` values a row.
    fn own_of(&mut self, value: Value, stride: u32) -> (Slot, Span) {
        let slot = self.take(stride);
        self.put(value, slot, Span::rows(stride));
        (slot, Span::rows(stride))
    }

    fn place(&self, value: Value) -> Place {
        self.places[value.0].expect("written before it is read")
    }

    fn release(&mut self, value: Value) {
        let Some(place) = self.places[value.0].take() else { return };
        if let Some(users) = self.used.get_mut(&place.slot) {
            *users -= 1;
            if *users == 0 {
                self.used.remove(&place.slot);
            }
        }
    }

    fn launch(&mut self, op: Op, reads: &[Slot], write: Option<Slot>) -> &mut Launch {
        self.launches.push(Launch {
            op,
            node: self.at,
            reads: reads.to_vec(),
            write,
            matrix: None,
            vectors: Vec::new(),
            bias: None,
            cache: None,
            rope: None,
        });
        self.launches.last_mut().expect("just pushed")
    }

    fn node(&mut self, at: usize) {
        self.at = at;
        let program = self.layout.program.clone();
        match &program.nodes[at] {
            Node::Norm { .. } | Node::Gate { .. } => return,
            Node::Embed { layer, y } => self.embed(*layer, *y),
            Node::Linear { x, layers } => self.linear(*x, layers),
            Node::Attend(attention) => self.attend(attention),
            Node::Mix(mixture) => self.mix(mixture),
            Node::Add { x, z, y } => {
                // A product has added its output itself otherwise.
                if self.places[y.0].is_none() {
                    self.materialise(*x);
                    self.materialise(*z);
                    assert_eq!(self.left[x.0], 1, "the first input of a sum is read by nothing after it");
                    let (x, z) = (self.place(*x), self.place(*z));
                    let op = Add { columns: x.columns, batch: self.batch, x: z.span, y: x.span };
                    self.launch(Op::Add(op), &[z.slot], Some(x.slot));
                    self.put(*y, x.slot, x.span);
                }
            }
            Node::Map { x, map, y } => {
                self.materialise(*x);
                let (x, width) = (self.place(*x), program.widths[y.0] as u32);
                // It may be the residual stream, to which products add their outputs.
                let stride = if width == program.widths[0] as u32 { self.stream } else { width };
                let (slot, span) = self.own_of(*y, stride);
                let op = Map { columns: width, batch: self.batch, x: x.span, y: span, function: *map };
                self.launch(Op::Map(op), &[x.slot], Some(slot));
            }
            Node::Shift { x, by, y } => {
                self.materialise(*x);
                assert!(self.pending[x.0].is_some() || self.left[x.0] == 1, "nothing else reads what is shifted");
                let x = self.place(*x);
                let op = Add { columns: x.columns, batch: self.batch, x: Span::rows(0), y: x.span };
                self.launch(Op::Add(op), &[], Some(x.slot)).vectors = vec![*by];
                self.put(*y, x.slot, x.span);
            }
            Node::Part { x, first, y } => {
                self.materialise(*x);
                let x = self.place(*x);
                self.put(*y, x.slot, Span { first: x.span.first + *first as u32, ..x.span });
            }
            Node::Rows { x, y } => {
                let from = self.place(*x);
                self.after_rows = true;
                if self.wanted.rows == self.batch {
                    self.put(*y, from.slot, from.span);
                } else {
                    self.batch = self.wanted.rows;
                    let (slot, span) = self.own(*y);
                    let op = Rows { columns: from.columns, batch: self.batch, x: from.span, y: span };
                    self.launch(Op::Rows(op), &[from.slot], Some(slot));
                }
            }
        }
        for value in self.reads(at) {
            self.left[value.0] -= 1;
            if self.left[value.0] == 0 {
                self.release(value);
            }
        }
        // What was pending was computed for this node alone.
        for value in program.nodes[at].reads() {
            if self.pending[value.0].is_some() {
                self.release(value);
            }
        }
    }

    fn embed(&mut self, layer: LayerId, y: Value) {
        let slot = self.take(self.stream);
        let span = Span::rows(self.stream);
        self.put(y, slot, span);
        let matrix = self.layout.matrix_of[layer.0];
        let stored = &self.layout.matrices[matrix];
        let (batch, shape) = (self.batch, stored.shape);
        let op = match &stored.form {
            Form::Dense(elem) => Op::Embed(Embed { columns: shape.cols, elem: *elem, batch, y: span }),
            Form::Packed(_) => Op::EmbedPacked { spec: stored.spec, shape, batch, y: span },
            Form::Grouped(_) | Form::Shared => unreachable!("an embedding's rows lie as they are, or packed"),
        };
        self.launch(op, &[], Some(slot)).matrix = Some(matrix);
    }

    /// Computes a pending value into a slot of its own.
    fn materialise(&mut self, value: Value) {
        if self.places[value.0].is_some() {
            return;
        }
        let (batch, width) = (self.batch, self.layout.program.widths[value.0] as u32);
        match self.pending[value.0].expect("written before it is read") {
            Pending::Norm { x, norm } => {
                self.materialise(x);
                let x = self.place(x);
                let (slot, _) = self.own(value);
                let op = Norm { columns: width, batch, x: x.span, norm: norm.norm };
                self.launch(Op::Norm(op), &[x.slot], Some(slot)).vectors = vec![norm.weight];
            }
            Pending::Gate { gate, up, activation } => {
                let (gate, up) = (self.place(gate), self.place(up));
                let (slot, _) = self.own(value);
                let op = Glu { columns: width, batch, activation, gate: gate.span, up: up.span };
                self.launch(Op::Glu(op), &[gate.slot, up.slot], Some(slot));
            }
        }
    }

    /// The preparation of a value for packed layers of `rotation`: what, of which slots, with the weights of which norm.
    fn preparation(&mut self, value: Value, rotation: Rotation) -> (Prepare, Vec<Slot>, Vec<VectorId>) {
        let (batch, columns) = (self.batch, self.layout.program.widths[value.0] as u32);
        let pending = self.pending[value.0].filter(|_| self.places[value.0].is_none());
        let (input, gate, norm) = match pending {
            None => (value, None, None),
            Some(Pending::Norm { x, norm }) => (x, None, Some(norm)),
            Some(Pending::Gate { gate, up, activation }) => (gate, Some((up, activation)), None),
        };
        self.materialise(input);
        let input = self.place(input);
        let up = gate.map(|(up, activation)| (self.place(up), activation));
        let op = Prepare {
            columns,
            batch,
            input: input.span,
            gate: up.map(|(up, activation)| Gate { activation, up: up.span }),
            norm: norm.map(|n| n.norm),
            rotation,
            entering: None,
        };
        let reads: Vec<Slot> = [input.slot].into_iter().chain(up.map(|u| u.0.slot)).collect();
        (op, reads, norm.map(|n| n.weight).into_iter().collect())
    }

    /// A launch that prepares a value for packed layers.
    fn prepare(&mut self, value: Value, Preparation { rotation, entering, matrix }: Preparation) {
        let (op, reads, vectors) = self.preparation(value, rotation);
        let launch = self.launch(Op::Prepare(Prepare { entering, ..op }), &reads, None);
        (launch.vectors, launch.matrix) = (vectors, matrix);
    }

    /// The preparation of what `layers` read, if their products take less time when their blocks do that themselves.
    fn own_preparation(
        &mut self,
        value: Value,
        layers: &[(LayerId, Value)],
    ) -> Option<(Prepare, Vec<Slot>, Vec<VectorId>)> {
        let layout = self.layout;
        if self.batch > 1 {
            return None;
        }
        let matrices: BTreeSet<usize> = layers.iter().map(|l| layout.matrix_of[l.0.0]).collect();
        let product = |matrix: usize| {
            let stored = &layout.matrices[matrix];
            let of = match &stored.form {
                Form::Packed(_) => Multiplied::Packed(stored.spec, stored.shape),
                Form::Grouped(terms) => Multiplied::Grouped(terms.clone(), stored.shape),
                Form::Dense(_) | Form::Shared => return None,
            };
            Some((of, Preparation::of(&stored.form, matrix)?))
        };
        let (products, wanted): (Vec<Multiplied>, Vec<Preparation>) =
            matrices.into_iter().map(product).collect::<Option<Vec<_>>>()?.into_iter().unzip();
        if wanted.iter().any(|other| *other != wanted[0]) {
            return None;
        }
        let mut own = self.preparation(value, wanted[0].rotation);
        own.0.entering = wanted[0].entering;
        // A single token has no next one: steps of any stride have the kernel in common.
        let columns = own.0.columns;
        let alone = |span: Span| Span { stride: columns, ..span };
        own.0.input = alone(own.0.input);
        own.0.gate = own.0.gate.map(|gate| Gate { up: alone(gate.up), ..gate });
        // No block may write what others read.
        let added = |&(id, y): &(LayerId, Value)| self.stream_of(id, y).is_some_and(|(at, _)| own.1.contains(&at.slot));
        if layers.iter().any(added) {
            return None;
        }
        let known = self.decided.iter().find(|d| d.0 == products && d.1 == own.0).map(|d| d.2);
        let decide = || {
            let (batch, accumulate) = (1, false);
            let expected = |of: &Multiplied| match *of {
                Multiplied::Packed(spec, shape) => {
                    let op = Gemv { quantizer: &layout.specs[spec], shape, batch, accumulate };
                    product::Launch::expected(&op, &own.0, self.device)
                }
                Multiplied::Grouped(ref terms, shape) => {
                    let op = grouped::Product { terms, shape, batch, y: Span::rows(shape.rows), accumulate };
                    grouped::Launch::expected(&op, &own.0, self.device)
                }
            };
            product::prepares(&products.iter().map(expected).collect::<Vec<_>>(), &own.0)
        };
        let themselves = known.unwrap_or_else(decide);
        if known.is_none() {
            self.decided.push((products, own.0, themselves));
        }
        themselves.then_some(own)
    }

    /// The residual stream onto which the present node's output is added next, and their sum, if it may add itself.
    fn sum_of(&self, y: Value) -> Option<(Place, Value)> {
        let (x, sum) = match self.layout.program.nodes.get(self.at + 1)? {
            Node::Add { x, z, y: sum } if *z == y => (*x, *sum),
            _ => return None,
        };
        let here = self.reads(self.at).iter().filter(|v| **v == x).count();
        let alone = self.left[y.0] == 1 && self.left[x.0] == here + 1;
        self.places[x.0].filter(|_| alone).map(|place| (place, sum))
    }

    /// The residual stream onto which a layer's output is added, if a launch of that layer alone may do so.
    fn stream_of(&self, id: LayerId, y: Value) -> Option<(Place, Value)> {
        let (place, sum) = self.sum_of(y).filter(|_| !self.layout.program.layer(id).bias)?;
        let stored = &self.layout.matrices[self.layout.matrix_of[id.0]];
        let fits = match stored.form {
            // Its outputs lie at a distance of its own.
            Form::Packed(_) => stored.stride == place.slot.stride && stored.layers.len() == 1,
            Form::Grouped(_) => stored.layers.len() == 1,
            Form::Dense(_) | Form::Shared => true,
        };
        fits.then_some((place, sum))
    }

    fn linear(&mut self, x: Value, layers: &[(LayerId, Value)]) {
        let layout = self.layout;
        let mut done: Vec<usize> = Vec::new();
        let own_preparation = self.own_preparation(x, layers);
        let mut prepared = None;
        for &(id, _) in layers {
            let matrix = layout.matrix_of[id.0];
            if done.contains(&matrix) {
                continue;
            }
            done.push(matrix);
            let stored = &layout.matrices[matrix];
            let own: Vec<(LayerId, Value)> =
                layers.iter().copied().filter(|l| layout.matrix_of[l.0.0] == matrix).collect();
            let stream = self.stream_of(own[0].0, own[0].1);
            let accumulate = stream.is_some();
            let wanted = Preparation::of(&stored.form, matrix);
            if let Some(wanted) = wanted
                && prepared != Some(wanted)
                && own_preparation.is_none()
            {
                prepared = Some(wanted);
                self.prepare(x, wanted);
            }
            let input = wanted.is_none().then(|| {
                self.materialise(x);
                self.place(x)
            });
            let (slot, span) = match stream {
                Some((place, sum)) => {
                    self.put(sum, place.slot, place.span);
                    (place.slot, place.span)
                }
                None => {
                    let slot = self.take(stored.stride);
                    for &(id, y) in &own {
                        self.put(y, slot, Span { first: layout.place(id).1, stride: stored.stride });
                    }
                    (slot, Span::rows(stored.stride))
                }
            };
            let (batch, shape) = (self.batch, stored.shape);
            // Results that are transformed lie in a slot of their own before.
            let leave = match &stored.form {
                Form::Grouped(terms) => Leave::of(terms, shape.rows, batch),
                Form::Packed(_) | Form::Dense(_) | Form::Shared => None,
            };
            let (to, of_product, accumulate) = match leave {
                Some(_) => (self.take(stored.stride), Span::rows(stored.stride), false),
                None => (slot, span, accumulate),
            };
            let prepare = own_preparation.as_ref().map(|own| own.0);
            let op = match (&stored.form, input) {
                (Form::Dense(elem), Some(input)) => Op::Dense(Dense {
                    rows: shape.rows,
                    cols: shape.cols,
                    elem: *elem,
                    batch,
                    x: input.span,
                    y: of_product,
                    accumulate,
                }),
                (Form::Grouped(terms), _) => {
                    Op::Grouped { terms: terms.clone(), shape, batch, y: of_product, accumulate, prepare }
                }
                _ => Op::Product { spec: stored.spec, shape, batch, accumulate, prepare },
            };
            let (reads, vectors) = match (&own_preparation, input) {
                (Some((_, slots, vectors)), _) => (slots.clone(), vectors.clone()),
                (None, input) => (input.map(|i| i.slot).into_iter().collect(), Vec::new()),
            };
            let launch = self.launch(op, &reads, Some(to));
            (launch.matrix, launch.vectors) = (Some(matrix), vectors);
            if let Some(leave) = leave {
                let op = Leave { x: of_product, y: span, accumulate: stream.is_some(), ..leave };
                self.launch(Op::Leave(op), &[to], Some(slot)).matrix = Some(matrix);
                self.used.remove(&to);
            }
            for &(id, y) in own.iter().filter(|l| layout.program.layer(l.0).bias) {
                let place = self.place(y);
                let op = Add { columns: place.columns, batch, x: Span::rows(0), y: place.span };
                self.launch(Op::Add(op), &[], Some(place.slot)).bias = Some(id);
            }
        }
    }

    fn attend(&mut self, attention: &program::Attention) {
        let program::Attention { cache, q, k, v, y, .. } = *attention;
        for value in [q, k, v] {
            self.materialise(value);
        }
        let places = [q, k, v].map(|value| self.place(value));
        let spans = places.map(|p| p.span);
        let layout = self.layout;
        let (append, op) = attention_ops(&layout.program, attention, layout.cache, self.batch, spans);
        let launch = self.launch(Op::Append(append), &places.map(|p| p.slot), None);
        (launch.cache, launch.rope) = (Some(cache), attention.rope);
        launch.vectors = attention.q_norm.iter().chain(&attention.k_norm).map(|n| n.weight).collect();
        let (slot, _) = self.own(y);
        let op = if is_many(self.batch) { Op::AttendMany(op) } else { Op::AttendFew(op) };
        let launch = self.launch(op, &[], Some(slot));
        launch.cache = Some(cache);
        launch.vectors = attention.sinks.into_iter().collect();
    }
}
