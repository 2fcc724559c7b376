//! The engine of GPUs: every step is one graph of launches, from tokens to logits.
//!
//! It runs on an [`Executor`], so on the interpreter too, launch by launch: that is how it is tested without a GPU
//! ([`crate::check`]).
//! A step takes its tokens, their positions and pages from buffers, so one graph serves all steps of one number of tokens.
//! Numbers of tokens are padded to few sizes. A quantized model gives the same bits as on the CPU, however its tokens are
//! cut and whatever else is in the step.
//!
//! * [`ahead`]: the next step, launched before it is asked for.
//! * [`layout`]: which layers are one matrix.
//! * [`lower`]: from a program to launches, without a device.
//! * [`matrix`]: matrices on the device.
//! * [`memory`]: what all of it takes.
//! * [`record`]: kernels and buffers of launches.
//! * [`rest`]: times of all but the products, without a model.

mod ahead;
pub mod layout;
pub mod lower;
pub mod matrix;
mod memory;
mod record;
pub mod rest;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use qp_codegen::kernels::argmax::Argmax;
use qp_codegen::kernels::attend::many::Run;
use qp_codegen::kernels::product::MAX_BATCH;
use qp_codegen::kernels::sample::mask_words;
use qp_codegen::kernels::{Span, attend};
use qp_codegen::layout::COLUMN_PAD;

use qp_codegen::reference::sampling::{MOST_TOKENS as MOST_VOCAB, Sampling, WORDS};

use self::ahead::{Ahead, is_decoding};
use self::layout::{Form, Layout, Stored, mixture};
use self::lower::{Launch, Pick, Slot, Wanted};
use self::matrix::Matrix;
pub use self::matrix::Uploads;
pub use self::memory::Needs;
use self::record::{Choices, Constants, Kernels, Routes, State, record};
use super::{
    Choice, Chunk, Engine, Error, Logits, PAGE, Room, Wish, attention_ops, check_chunks, check_pages, cut, penalty,
};
use crate::device::attend::{Queries, Tokens};
use crate::device::ops::DeviceActivations;
use crate::device::{Buffer, DeviceError, Executor, Graph};
use crate::model::program::{CacheId, Expert, Node, Norm, VectorId};
use crate::model::{LayerId, Program, Weights, rope_tables};

/// Numbers of tokens that steps are made for: others are padded.
const SIZES: [u32; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];
/// Most tokens of a step.
const MOST_TOKENS: u32 = SIZES[SIZES.len() - 1];
/// Most rows of logits of a step.
const MOST_ROWS: u32 = super::MOST_ROWS as u32;
const _: () = assert!(MOST_TOKENS <= MAX_BATCH);

/// A model on a device, with the keys and values of many sequences.
pub struct CudaEngine {
    executor: Executor,
    layout: Layout,
    room: Room,
    /// Most tokens of a step.
    most_tokens: u32,
    constants: Constants,
    state: State,
    /// The settings that lie in the state.
    settings: Vec<[u32; WORDS]>,
    /// What lies in the state's table.
    table: Vec<i32>,
    /// Each token's row of the table, as it was written last.
    sequence: Vec<i32>,
    kernels: Kernels,
    ahead: Ahead,
    /// By tokens and what is wanted of them.
    graphs: BTreeMap<(u32, Wanted), Recorded>,
    /// What gives further rows of a step's logits, by the step's tokens and the number of rows.
    heads: BTreeMap<(u32, u32), Recorded>,
}

/// A step's graph.
struct Recorded {
    graph: Graph,
    /// Where the logits lie: slot, first value, distance from row to row.
    logits: Option<(Slot, usize, usize)>,
}

impl CudaEngine {
    /// An engine on `executor` with room for sequences.
    ///
    /// # Errors
    /// If the model has fewer positions or does not fit the device.
    pub fn new(executor: Executor, weights: &Weights, room: Room) -> Result<Self, Error> {
        Self::sharing(executor, weights, room, &mut Uploads::default())
    }

    /// As [`CudaEngine::new`], with the matrices that are there already.
    ///
    /// # Errors
    /// As [`CudaEngine::new`].
    pub fn sharing(executor: Executor, weights: &Weights, room: Room, uploads: &mut Uploads) -> Result<Self, Error> {
        if room.context > weights.program.context {
            return Err(Error::Positions { wanted: room.context, max: weights.program.context });
        }
        let layout = Layout::new(&weights.program, &Form::of(weights), &weights.groups, room.cache);
        if let Some((free, _)) = executor.free_memory()? {
            Needs::of(&layout, room).check(free as u64)?;
        }
        let matrix = |stored: &Stored| Matrix::upload(&executor, &layout, stored, weights, uploads);
        let matrices = layout.matrices.iter().map(matrix).collect::<Result<_, DeviceError>>()?;
        uploads.done();
        let count = weights.program.vectors.len();
        let heads: Vec<Norm> = weights.program.nodes.iter().flat_map(Node::head_norms).collect();
        let vectors = (0..count).map(|i| match heads.iter().find(|n| n.weight == VectorId(i)) {
            Some(norm) => executor.upload(&weights.of_heads(norm)),
            None => executor.upload(&weights[VectorId(i)]),
        });
        let vectors = vectors.collect::<Result<_, DeviceError>>()?;
        let bias = |id: LayerId| weights[id].bias.clone().unwrap_or_default();
        let biases = Biases::upload(&executor, &weights.program, bias)?;
        Ok(Self::of(executor, layout, room, matrices, vectors, biases)?)
    }

    /// An engine of matrices that `matrix` makes, with norms' weights of 1 and biases of 0: for measuring times.
    ///
    /// # Errors
    /// Those of `matrix`, a full GPU.
    pub fn made(
        executor: Executor,
        layout: Layout,
        room: Room,
        mut matrix: impl FnMut(&Layout, &Stored) -> Result<Matrix, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let matrices = layout.matrices.iter().map(|m| matrix(&layout, m)).collect::<Result<_, _>>()?;
        let vectors = layout.program.vectors.iter().map(|v| executor.upload(&vec![1.0; v.len]));
        let vectors = vectors.collect::<Result<_, _>>()?;
        let biases = Biases::upload(&executor, &layout.program, |id| vec![0.0; layout.program.layer(id).rows])?;
        Self::of(executor, layout, room, matrices, vectors, biases)
    }

    /// An engine of matrices, weights of norms and biases that are there.
    fn of(
        executor: Executor,
        layout: Layout,
        room: Room,
        matrices: Vec<Matrix>,
        vectors: Vec<Buffer<f32>>,
        biases: Biases,
    ) -> Result<Self, DeviceError> {
        let on = &executor;
        let turns = |rope| {
            let tables = rope_tables(rope, room.context);
            Ok::<_, DeviceError>((on.upload(&tables.cos)?, on.upload(&tables.sin)?))
        };
        let turns = layout.program.ropes.iter().map(turns).collect::<Result<_, _>>()?;
        let mut expert_places = BTreeMap::new();
        for (node, mixed) in &layout.mixtures {
            let Node::Mix(mixture) = &layout.program.nodes[*node] else { continue };
            let count = mixture.experts.len();
            for stack in mixed.stacks().filter(|stack| stack.experts.len() < count) {
                expert_places.insert(stack.matrix, on.upload(&stack.places(count))?);
            }
        }
        let (nothing, no_places) = (on.zeroed(1)?, on.zeroed(1)?);
        let Biases { of_layers: biases, of_experts } = biases;
        let constants = Constants { matrices, vectors, biases, of_experts, expert_places, turns, nothing, no_places };
        let columns = layout.matrices.iter().map(|m| m.shape.cols).max().unwrap_or(1);
        let most_tokens = most_tokens(&layout.program, room);
        let mixtures = mixture::Room::of(&layout.program, sizes(most_tokens));
        let planes = 2 * columns.next_multiple_of(COLUMN_PAD) as usize * most_tokens as usize;
        let most = most_tokens as usize;
        let stride = room.context.div_ceil(PAGE).max(1);
        let sequences = most.min(room.pages.max(1));
        let ids = || (0..layout.program.caches.len()).map(CacheId);
        let cache = |id| on.zeroed(room.pages * layout.cache_of(id).page_bytes() as usize);
        let (mut queries, mut heads) = (0, 0);
        for node in &layout.program.nodes {
            let Node::Attend(attention) = node else { continue };
            let (_, op) = attention_ops(&layout.program, attention, room.cache, most_tokens, [Span::rows(0); 3]);
            heads = heads.max(op.heads);
            queries = queries.max(2 * op.heads * op.cache.columns());
        }
        let tiles = 2 * lower::most_tiles(&layout, &on.device(), most_tokens) as usize;
        let places = Tokens {
            positions: on.zeroed(most)?,
            sequence: on.zeroed(most)?,
            slots: on.zeroed(most)?,
            table: on.zeroed(sequences * stride)?,
            tiles: on.zeroed(tiles)?,
            stride: stride as i32,
        };
        let vocab = layout.program.vocab as u32;
        let best = Argmax { columns: vocab, batch: MOST_ROWS, logits: Span::rows(vocab) };
        let state = State {
            tokens: on.zeroed(most.max(MOST_ROWS as usize))?,
            places,
            rows: on.zeroed(MOST_ROWS as usize)?,
            choices: Choices {
                scratch: on.zeroed(best.scratch(&on.device()))?,
                settings: on.zeroed(MOST_ROWS as usize * WORDS)?,
                draws: on.zeroed(MOST_ROWS as usize)?,
                seen: on.zeroed(MOST_ROWS as usize * mask_words(layout.program.vocab as u32) as usize)?,
            },
            values: BTreeMap::new(),
            activations: DeviceActivations::of(on, planes.max(mixtures.activations), most.max(mixtures.pairs))?,
            routes: Routes {
                experts: on.zeroed(mixtures.pairs)?,
                weights: on.zeroed(mixtures.pairs)?,
                pairs: on.zeroed(mixtures.pairs)?,
                units: on.zeroed(4 * mixtures.units)?,
            },
            faults: on.zeroed(layout.program.nodes.len())?,
            queries: Queries { planes: on.zeroed(most * queries as usize)?, scale: on.zeroed(most * heads as usize)? },
            caches: ids().map(cache).collect::<Result<_, DeviceError>>()?,
        };
        let (kernels, graphs, table) = (Kernels::default(), BTreeMap::new(), vec![0; sequences * stride]);
        let ahead = Ahead::new(on, layout.program.nodes.len())?;
        let settings = Vec::new();
        Ok(CudaEngine {
            executor,
            settings,
            layout,
            room,
            most_tokens,
            ahead,
            constants,
            state,
            table,
            sequence: Vec::new(),
            kernels,
            graphs,
            heads: BTreeMap::new(),
        })
    }

    /// Kernels that are loaded.
    pub fn kernels(&self) -> usize {
        self.kernels.count()
    }

    /// Makes kernels and buffers of launches ready.
    fn load(&mut self, launches: &[Launch]) -> Result<(), DeviceError> {
        let CudaEngine { executor, layout, most_tokens, constants, state, kernels, .. } = self;
        for slot in launches.iter().flat_map(|l| l.reads.iter().copied().chain(l.write)) {
            if let Entry::Vacant(place) = state.values.entry(slot) {
                let rows = if slot.wanted { MOST_ROWS } else { *most_tokens };
                place.insert(executor.zeroed(rows as usize * slot.stride as usize)?);
            }
        }
        kernels.load(executor, layout, &constants.matrices, launches)
    }

    /// Makes the graph of a step of `tokens` tokens ready.
    fn prepare(&mut self, tokens: u32, wanted: Wanted) -> Result<(), DeviceError> {
        if self.graphs.contains_key(&(tokens, wanted)) {
            return Ok(());
        }
        let device = self.executor.device();
        let step = lower::step(&self.layout, &device, tokens, wanted);
        let mut launches = step.launches.clone();
        if self.graphs.is_empty() {
            // The first step's kernels are compiled together with those of the tokens that will follow.
            launches.extend(lower::step(&self.layout, &device, 1, Wanted { rows: 1, pick: Pick::Best }).launches);
        }
        self.load(&launches)?;
        let recorded = self.record(&step)?;
        self.graphs.insert((tokens, wanted), recorded);
        Ok(())
    }

    /// Records a step whose kernels are loaded.
    fn record(&mut self, step: &lower::Step) -> Result<Recorded, DeviceError> {
        let CudaEngine { executor, constants, state, kernels, .. } = self;
        let mut recorder = executor.record();
        for launch in &step.launches {
            record(launch, &mut recorder, kernels, state, constants)?;
        }
        let logits = step.logits.map(|(slot, span)| (slot, span.first as usize, span.stride as usize));
        Ok(Recorded { graph: recorder.finish()?, logits })
    }

    /// Seconds of the launches that `of` chooses of a step of `tokens` tokens that want their likeliest next tokens, each
    /// at position `position` of the same sequence: the fastest of `rounds` runs, one launch after the other.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn seconds(
        &mut self,
        tokens: u32,
        position: usize,
        rounds: usize,
        of: &dyn Fn(&Launch) -> bool,
    ) -> Result<f64, DeviceError> {
        let wanted = Wanted { rows: tokens.min(MOST_ROWS), pick: Pick::Best };
        let mut launches = lower::step(&self.layout, &self.executor.device(), tokens, wanted).launches;
        launches.retain(of);
        self.load(&launches)?;
        let CudaEngine { executor, room, constants, state, kernels, .. } = self;
        state.places.positions.write(0, &vec![position as i32; tokens as usize])?;
        let places: Vec<i32> = (0..tokens as i32).map(|i| i % (room.pages * PAGE) as i32).collect();
        state.places.slots.write(0, &places)?;
        let mut recorder = executor.record();
        for launch in &launches {
            record(launch, &mut recorder, kernels, state, constants)?;
        }
        let graph = recorder.finish()?;
        executor.time_best(rounds, || graph.launch())
    }

    /// Launches a step that needs no cutting. Gives the graph's key and, of each wanted row of logits, its row there. If it
    /// is `fed`, its tokens are the likeliest of the step before, in their order, a row each, whatever `chunks` say.
    fn run(&mut self, chunks: &[Chunk<'_>], how: How<'_>, fed: bool) -> Result<((u32, Wanted), Vec<usize>), Error> {
        let count: usize = chunks.iter().map(|c| c.tokens.len()).sum();
        let size = padded(count as u32);
        let (mut tokens, mut positions) = (Vec::with_capacity(size as usize), Vec::with_capacity(size as usize));
        let (mut slots, mut sequence) = (Vec::with_capacity(size as usize), Vec::with_capacity(size as usize));
        let wanted = wanted_rows(chunks);
        let stride = self.state.places.stride as usize;
        for (row, chunk) in chunks.iter().enumerate() {
            let n = chunk.tokens.len();
            for (i, token) in chunk.tokens.iter().enumerate() {
                let position = chunk.position + i;
                tokens.push(token.cast_signed());
                positions.push(position as i32);
                slots.push((chunk.pages[position / PAGE] as usize * PAGE + position % PAGE) as i32);
                sequence.push(row as i32);
            }
            let pages = &chunk.pages[..(chunk.position + n).div_ceil(PAGE)];
            let mirror = &mut self.table[row * stride..][..pages.len()];
            let same = mirror.iter().zip(pages).take_while(|(a, b)| **a == b.cast_signed()).count();
            if same < pages.len() {
                mirror.iter_mut().zip(pages).for_each(|(a, b)| *a = b.cast_signed());
                self.state.places.table.write(row * stride + same, &mirror[same..])?;
            }
        }
        tokens.resize(size as usize, 0);
        positions.resize(size as usize, 0);
        slots.resize(size as usize, -1);
        sequence.resize(size as usize, 0);
        // Rows of all tokens need no choosing.
        let rows = if wanted.is_empty() { 0 } else { padded(wanted.len() as u32) };
        let rows_of: Vec<usize> = if rows == size { wanted.clone() } else { (0..wanted.len()).collect() };
        // Those of a step that is fed lie there.
        if !fed {
            self.state.tokens.write(0, &tokens)?;
        }
        self.state.places.positions.write(0, &positions)?;
        self.state.places.slots.write(0, &slots)?;
        if !self.sequence.starts_with(&sequence) {
            self.state.places.sequence.write(0, &sequence)?;
            self.sequence = sequence;
        }
        if lower::is_many(size) {
            let mut first = 0;
            let runs: Vec<Run> = chunks
                .iter()
                .map(|c| {
                    let run = Run { first, tokens: c.tokens.len() as u32, position: c.position as u32 };
                    first += run.tokens;
                    run
                })
                .collect();
            let tile = lower::tile_tokens(&self.layout, &self.executor.device());
            let len = size / tile + lower::MOST_CHUNKS.min(size);
            let tiles = attend::many::tiles(&runs, tile, len).expect("chunks are counted when steps are cut");
            self.state.places.tiles.write(0, &tiles)?;
        }
        if rows > 0 && rows < size {
            self.choose_rows(&wanted, rows)?;
        }
        let pick = if rows > 0 { how.pick() } else { Pick::Logits };
        if let (Pick::Drawn, How::Drawn(wishes)) = (pick, how) {
            self.write_choices(rows as usize, rows_of.iter().copied().zip(wishes))?;
        }
        let key = (size, Wanted { rows, pick });
        self.prepare(key.0, key.1)?;
        self.graphs[&key].graph.launch()?;
        Ok((key, rows_of))
    }

    /// Says how tokens are drawn for some of the rows; what comes of the others is not looked at.
    fn write_choices<'w>(
        &mut self,
        rows: usize,
        wishes: impl Iterator<Item = (usize, &'w Wish<'w>)>,
    ) -> Result<(), DeviceError> {
        let mut settings = vec![Sampling::default().words(1.0, 0); rows];
        let mut draws = vec![0; rows];
        let words = mask_words(self.layout.program.vocab as u32) as usize;
        for (row, wish) in wishes {
            let Wish::Token(Choice { sampling, draw }, mask) = wish else { continue };
            settings[row] = sampling.words(penalty(mask), row as u32);
            draws[row] = draw.cast_signed();
            if !mask.is_empty() {
                self.state.choices.seen.write(row * words, &mask[..words])?;
            }
        }
        if self.settings != settings {
            self.state.choices.settings.write(0, settings.as_flattened())?;
            self.settings = settings;
        }
        self.state.choices.draws.write(0, &draws)
    }

    /// The next tokens of the rows that are wanted, and the logits of those that are read.
    fn pick(
        &mut self,
        chunks: &[Chunk<'_>],
        how: How<'_>,
        out: &mut Vec<u32>,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        check_chunks(self, chunks)?;
        out.clear();
        logits.clear();
        if is_decoding(chunks) && how.is_free() {
            return self.decode(chunks, how, out);
        }
        self.forget()?;
        let mut done = 0;
        for step in self.cut(chunks, MOST_ROWS as usize) {
            let rest = how.after(done);
            let (key, rows) = self.run(&step, rest, false)?;
            if rows.is_empty() {
                continue;
            }
            let mut best = vec![0; key.1.rows as usize];
            self.state.tokens.read(0, &mut best)?;
            for (i, row) in rows.iter().enumerate() {
                if rest.reads(i) {
                    self.read_logits(self.graphs[&key].logits, *row, logits)?;
                    continue;
                }
                match u32::try_from(best[*row]) {
                    Ok(token) => out.push(token),
                    Err(_) => return Err(self.check_fault().err().unwrap_or(Error::NotANumber)),
                }
            }
            done += rows.len();
        }
        self.check_fault()
    }

    /// A step that needs no cutting but wants more rows of logits than there is room for: once through the decoder blocks, then
    /// the output layer for some rows after the other.
    fn step_of_many_rows(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
        let blocks: Vec<Chunk<'_>> = chunks.iter().map(|c| Chunk { logits: Logits::None, ..*c }).collect();
        let ((size, _), _) = self.run(&blocks, How::Logits, false)?;
        for rows in wanted_rows(chunks).chunks(MOST_ROWS as usize) {
            let key = (size, padded(rows.len() as u32));
            self.choose_rows(rows, key.1)?;
            if !self.heads.contains_key(&key) {
                let wanted = Wanted { rows: key.1, pick: Pick::Logits };
                let head = lower::head(&self.layout, &self.executor.device(), size, wanted);
                self.load(&head.launches)?;
                let recorded = self.record(&head)?;
                self.heads.insert(key, recorded);
            }
            let head = &self.heads[&key];
            head.graph.launch()?;
            for row in 0..rows.len() {
                self.read_logits(head.logits, row, out)?;
            }
        }
        Ok(())
    }

    /// Says which rows' logits a step gives, `count` of them with padding.
    fn choose_rows(&mut self, rows: &[usize], count: u32) -> Result<(), DeviceError> {
        let mut chosen: Vec<i32> = rows.iter().map(|r| *r as i32).collect();
        chosen.resize(count as usize, 0);
        self.state.rows.write(0, &chosen)
    }

    /// Appends a row of logits, which lie where the graph of the last step says.
    fn read_logits(
        &self,
        logits: Option<(Slot, usize, usize)>,
        row: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        let Some((slot, first, stride)) = logits else { return Ok(()) };
        let at = out.len();
        out.resize(at + self.layout.program.vocab, 0.0);
        self.state.values[&slot].read(first + row * stride, &mut out[at..])
    }

    /// Names what was not finite, if something was.
    fn check_fault(&mut self) -> Result<(), Error> {
        let faults = self.state.faults.to_vec()?;
        let Some(error) = self.fault_of(&faults) else { return Ok(()) };
        self.clear_faults()?;
        Err(error)
    }

    fn fault_of(&self, faults: &[i32]) -> Option<Error> {
        let node = faults.iter().position(|f| *f != 0)?;
        Some(Error::NotFinite { layer: self.layout.program.describe(node) })
    }

    fn clear_faults(&mut self) -> Result<(), DeviceError> {
        let none = vec![0; self.state.faults.len()];
        self.state.faults.write(0, &none)
    }

    /// Cuts chunks into steps that want at most `rows` rows of logits.
    fn cut<'a>(&self, chunks: &[Chunk<'a>], rows: usize) -> Vec<Vec<Chunk<'a>>> {
        let sequences = (self.table.len() / self.state.places.stride as usize).min(lower::MOST_CHUNKS as usize);
        cut(chunks, &|left| taken(left, self.most_tokens), rows, sequences)
    }
}

/// What is made of logits.
#[derive(Clone, Copy)]
enum How<'a> {
    /// They are read.
    Logits,
    /// The likeliest tokens are.
    Best,
    /// Of each wanted row what these say.
    Drawn(&'a [Wish<'a>]),
}

impl<'a> How<'a> {
    fn pick(self) -> Pick {
        match self {
            How::Logits => Pick::Logits,
            How::Best => Pick::Best,
            How::Drawn(_) => Pick::Drawn,
        }
    }

    /// True if every row is given a token, of all tokens.
    fn is_free(self) -> bool {
        match self {
            How::Logits => false,
            How::Best => true,
            How::Drawn(wishes) => wishes.iter().all(|w| matches!(w, Wish::Token(_, []))),
        }
    }

    /// True if the logits of wanted row `row` are read.
    fn reads(self, row: usize) -> bool {
        matches!(self, How::Drawn(wishes) if wishes.get(row) == Some(&Wish::Logits))
    }

    /// Without the first `rows` rows.
    fn after(self, rows: usize) -> How<'a> {
        match self {
            How::Drawn(wishes) => How::Drawn(wishes.get(rows..).unwrap_or(&[])),
            other => other,
        }
    }
}

/// Biases of layers, on a device.
struct Biases {
    /// By layer, but for experts'.
    of_layers: Vec<Option<Buffer<f32>>>,
    /// See [`Constants::of_experts`].
    of_experts: BTreeMap<usize, [Buffer<f32>; 3]>,
}

impl Biases {
    /// Those of the layers that have some; `bias` gives their values.
    fn upload(on: &Executor, program: &Program, bias: impl Fn(LayerId) -> Vec<f32>) -> Result<Self, DeviceError> {
        let mut of_layers: Vec<Option<Buffer<f32>>> = program.layers.iter().map(|_| None).collect();
        let mut of_experts = BTreeMap::new();
        for (at, node) in program.nodes.iter().enumerate() {
            match node {
                Node::Mix(m) => {
                    let has = |id: LayerId| program.layer(id).bias;
                    if m.experts.iter().any(|e| has(e.gate) || has(e.up) || has(e.down)) {
                        let all = |part: fn(&Expert) -> LayerId| {
                            on.upload(&m.experts.iter().flat_map(|e| bias(part(e))).collect::<Vec<f32>>())
                        };
                        of_experts.insert(at, [all(|e| e.gate)?, all(|e| e.up)?, all(|e| e.down)?]);
                    }
                }
                node => {
                    for id in node.groups().into_iter().flatten().filter(|id| program.layer(*id).bias) {
                        of_layers[id.0] = Some(on.upload(&bias(id))?);
                    }
                }
            }
        }
        Ok(Biases { of_layers, of_experts })
    }
}

/// Those of a step's tokens whose logits are wanted.
fn wanted_rows(chunks: &[Chunk<'_>]) -> Vec<usize> {
    let mut end = 0;
    let of_chunk = |c: &Chunk<'_>| {
        end += c.tokens.len();
        end - c.logits.rows(c.tokens.len())..end
    };
    chunks.iter().flat_map(of_chunk).collect()
}

/// Most tokens of a step: no more than what all pages hold, and as many as kernels can count the values of.
fn most_tokens(program: &Program, room: Room) -> u32 {
    let held = padded((room.pages * PAGE).min(MOST_TOKENS as usize) as u32);
    sizes(held).filter(|tokens| mixture::can_take(program, *tokens)).last().unwrap_or(1)
}

/// Numbers of tokens of steps up to `most`.
fn sizes(most: u32) -> impl Iterator<Item = u32> + Clone {
    SIZES.into_iter().filter(move |size| *size <= most)
}

/// The smallest size that holds `tokens`, of which there are at most [`MOST_TOKENS`].
fn padded(tokens: u32) -> u32 {
    SIZES.into_iter().find(|s| *s >= tokens).unwrap_or(MOST_TOKENS)
}

/// How many of `left` tokens the next step takes: all, unless much of it would be padding.
fn taken(left: usize, most: u32) -> usize {
    let Some(up) = SIZES.into_iter().filter(|s| *s <= most).map(|s| s as usize).find(|s| *s >= left) else {
        return most as usize;
    };
    if up <= 64 || (up - left) * 4 <= up { left } else { up / 2 }
}

impl Engine for CudaEngine {
    fn vocab(&self) -> usize {
        self.layout.program.vocab
    }

    fn context(&self) -> usize {
        self.room.context
    }

    fn pages(&self) -> usize {
        self.room.pages
    }

    fn most_tokens(&self) -> usize {
        self.most_tokens as usize
    }

    fn step(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<f32>) -> Result<(), Error> {
        check_chunks(self, chunks)?;
        out.clear();
        self.forget()?;
        for step in self.cut(chunks, usize::MAX) {
            let wanted: usize = step.iter().map(|c| c.logits.rows(c.tokens.len())).sum();
            if wanted > MOST_ROWS as usize {
                self.step_of_many_rows(&step, out)?;
                continue;
            }
            let (key, rows) = self.run(&step, How::Logits, false)?;
            for row in rows {
                self.read_logits(self.graphs[&key].logits, row, out)?;
            }
        }
        self.check_fault()
    }

    fn best(&mut self, chunks: &[Chunk<'_>], out: &mut Vec<u32>) -> Result<(), Error> {
        self.pick(chunks, How::Best, out, &mut Vec::new())
    }

    fn answer(
        &mut self,
        chunks: &[Chunk<'_>],
        wishes: &[Wish<'_>],
        tokens: &mut Vec<u32>,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let is_likeliest = |w: &Wish<'_>| matches!(w, Wish::Token(c, []) if c.sampling.is_greedy());
        if wishes.iter().all(is_likeliest) {
            return self.pick(chunks, How::Best, tokens, logits);
        }
        let all_are_read = wishes.iter().all(|w| *w == Wish::Logits);
        if all_are_read || self.layout.program.vocab > MOST_VOCAB {
            // Nothing is to be drawn, or of more tokens than the kernel sums exactly.
            self.step(chunks, logits)?;
            return super::answer_from(logits, self.vocab(), wishes, tokens);
        }
        self.pick(chunks, How::Drawn(wishes), tokens, logits)
    }

    fn warm(&mut self) -> Result<(), Error> {
        let sizes = || SIZES.into_iter().filter(|s| *s <= self.most_tokens);
        let all = sizes().map(|tokens| (tokens, Wanted { rows: tokens.min(MOST_ROWS), pick: Pick::Best }));
        // What comes after the decoder blocks depends on the rows alone.
        let wanted = |rows| [Pick::Best, Pick::Drawn].map(|pick| (self.most_tokens, Wanted { rows, pick }));
        let chosen = sizes().filter(|rows| *rows <= MOST_ROWS).flat_map(wanted);
        let device = self.executor.device();
        let step = |(tokens, wanted)| lower::step(&self.layout, &device, tokens, wanted).launches;
        let steps = all.chain(chosen).flat_map(step);
        let mut launches: Vec<Launch> = Vec::new();
        for launch in steps {
            if launches.iter().all(|l| (&l.op, l.matrix) != (&launch.op, launch.matrix)) {
                launches.push(launch);
            }
        }
        Ok(self.load(&launches)?)
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<(), Error> {
        check_pages(self, &[from, to])?;
        for cache in &mut self.state.caches {
            let len = cache.len() / self.room.pages;
            cache.copy_within(from as usize * len, to as usize * len, len)?;
        }
        Ok(())
    }
}

impl From<DeviceError> for Error {
    fn from(e: DeviceError) -> Self {
        Error::Device(Box::new(e))
    }
}
