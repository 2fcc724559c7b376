//! What products with packed weights have in common, however they are laid over the GPU: the parameters of their kernels,
//! words on their way, tensor-core products, and how sums become results.

use std::cell::OnceCell;
use std::ops::Range;

use super::decode::{Decoder, Register, load_words};
use super::experts::{Experts, Tokens};
use super::prepare::{Prepare, Within};
use crate::ir::{Builder, Cache, Elem, Mem, Scalar, V, Var};
use crate::layout::{self, Packed};
use crate::spec::{Code, Quantizer, Shape, Value};

/// A product to compute.
#[derive(Clone, Copy, Debug)]
pub struct Gemv<'q> {
    /// The quantizer of the weights.
    pub quantizer: &'q Quantizer,
    /// Rows × columns; rows of a fused group are those of all its matrices, each padded to whole tiles.
    pub shape: Shape,
    /// Tokens, 1..=[`super::product::MAX_BATCH`].
    pub batch: u32,
    /// Add to `y` instead of overwriting it (a residual stream).
    pub accumulate: bool,
}

/// What a product's kernel computes with its matrix, or its matrices.
#[derive(Clone, Copy)]
pub(super) enum Form<'a> {
    /// Results.
    Results,
    /// Totals, the integers that become results ([`Operands::total`]).
    Totals,
    /// Results of experts.
    Experts(&'a Experts),
    /// Results for a token that each block prepares itself.
    Preparing(&'a Prepare),
}

impl<'a> Form<'a> {
    pub(super) fn experts(self) -> Option<&'a Experts> {
        match self {
            Form::Results | Form::Totals | Form::Preparing(_) => None,
            Form::Experts(experts) => Some(experts),
        }
    }

    pub(super) fn prepares(self) -> Option<&'a Prepare> {
        match self {
            Form::Results | Form::Totals | Form::Experts(_) => None,
            Form::Preparing(prepare) => Some(prepare),
        }
    }

    /// What a kernel's head says of a preparation.
    pub(super) fn by_each_block(self) -> &'static str {
        match self.prepares() {
            Some(Prepare { norm: Some(_), .. }) => ", normed and prepared by each block",
            Some(_) => ", prepared by each block",
            None => "",
        }
    }
}

/// Lowest bits of a total, which [`Form::Totals`] stores apart from the others.
pub const TOTAL_BITS: u32 = 24;

/// Tensor-core products of a register of weights: 2 for 16-bit entries.
pub(super) fn products(q: &Quantizer) -> u32 {
    match q.value() {
        Value::I8 => 1,
        Value::I16 => 2,
    }
}

/// What the kernel's head says.
pub(super) fn doc(op: &Gemv, form: Form) -> String {
    let q = op.quantizer;
    if let Some(Experts { count, pairs, most, .. }) = form.experts() {
        return format!(
            "y[pair, row] = W[expert, row, :] . x[pair, :] with W {} x {} in {} ({:.2} bits a weight), {pairs} pairs of tokens \
             with {count} experts, in units of up to {most}.",
            op.shape.rows,
            op.shape.cols,
            q.name,
            q.rate(),
        );
    }
    format!(
        "y[token, row] {}= W[row, :] . x[token, :] with W {} x {} in {} ({:.2} bits a weight), {} token{}{}{}.",
        if op.accumulate { "+" } else { "" },
        op.shape.rows,
        op.shape.cols,
        q.name,
        q.rate(),
        op.batch,
        if op.batch == 1 { "" } else { "s" },
        if matches!(form, Form::Totals) { ", as integers" } else { "" },
        form.by_each_block(),
    )
}

/// Registers for the words of a group of tiles: by tile, by chunk.
pub(super) type Words = Vec<Vec<Var>>;

/// The parameters of a product's kernel, and what is done with them.
pub(super) struct Operands<'b, 'a> {
    pub(super) b: &'b Builder,
    op: &'a Gemv<'a>,
    layout: &'a Packed,
    pub(super) decoder: Decoder<'b, 'a>,
    pub(super) weights: Mem,
    scales: Mem,
    /// Planes.
    pub(super) x: Mem,
    x_scale: Scales<'b>,
    x_sum: Mem,
    y: Mem,
    pub(super) partial: Mem,
    arrived: Mem,
    totals: bool,
    pub(super) tokens: Tokens<'b>,
    /// Distance from one token's results to the next one's.
    stride: u32,
}

/// The scales of tokens.
pub(super) enum Scales<'b> {
    /// In memory.
    Given(Mem),
    /// That of the token, once its block has prepared it.
    Own(OnceCell<V<'b>>),
}

impl<'b> Scales<'b> {
    /// Those of a token that each block prepares itself, which is to come.
    pub(super) fn own() -> Self {
        Scales::Own(OnceCell::new())
    }

    /// How planes and their sums are read.
    pub(super) fn x_cache(&self) -> Cache {
        match self {
            Scales::Given(_) => Cache::ReadOnly,
            Scales::Own(_) => Cache::Default,
        }
    }

    /// That of row `token` of the inputs.
    pub(super) fn of(&self, b: &'b Builder, token: V<'b>) -> V<'b> {
        match self {
            Scales::Given(scales) => b.load_as(*scales, token, Elem::F32, 1, Cache::ReadOnly),
            Scales::Own(scale) => *scale.get().expect("prepared before it is read"),
        }
    }

    /// The token has been prepared by this block, with this scale.
    pub(super) fn prepared(&self, scale: V<'b>) {
        match self {
            Scales::Given(_) => unreachable!("the token was prepared before"),
            Scales::Own(own) => assert!(own.set(scale).is_ok(), "a token is prepared once"),
        }
    }
}

/// What the sums of a token are multiplied with: the scale of its activations and, for codes with an offset, their sum.
pub(super) type TokenScale<'b> = (V<'b>, Option<V<'b>>);

impl<'b, 'a> Operands<'b, 'a> {
    /// Declares the parameters, and the tables in shared memory. `meeting_place`: elements of `partial` and `arrived`. Of
    /// experts, tokens are the pairs of a unit.
    pub(super) fn new(
        b: &'b Builder,
        op: &'a Gemv<'a>,
        layout: &'a Packed,
        table_bytes: u32,
        meeting_place: (usize, usize),
        form: Form<'a>,
        within: Option<&Within<'a, 'b>>,
    ) -> Self {
        let experts = form.experts();
        let totals = matches!(form, Form::Totals);
        assert!(!(totals && op.accumulate), "totals are not added to results");
        let decoder = Decoder::new(b, op.quantizer, table_bytes);
        let rows = u64::from(layout.padded_rows());
        let matrices = experts.map_or(1, |e| u64::from(e.matrices));
        let batch = u64::from(experts.map_or(op.batch, |e| e.rows));
        let outputs = experts.map_or(batch * rows, |e| u64::from(e.pairs - 1) * u64::from(e.stride) + rows);
        let columns = u64::from(op.shape.cols.next_multiple_of(layout::COLUMN_PAD));
        let weights = b.sized("weights", Elem::U32, false, matrices * layout.words() as u64);
        let scales = b.sized("scales", Elem::BF16, false, matrices * rows);
        let (x, x_scale, x_sum) = match within {
            None => {
                let x = b.sized("x", Elem::I8, false, 2 * batch * columns);
                let scale = b.sized("x_scale", Elem::F32, false, batch);
                (x, Scales::Given(scale), b.sized("x_sum", Elem::I32, false, batch))
            }
            Some(within) => {
                let (x, sum) = within.planes();
                (x, Scales::own(), sum.expect("of products with packed weights"))
            }
        };
        let y = match form {
            Form::Totals => b.sized("y", Elem::I32, true, 2 * outputs),
            Form::Results | Form::Experts(_) | Form::Preparing(_) => b.sized("y", Elem::F32, true, outputs),
        };
        let partial = b.sized("partial", Elem::I32, true, meeting_place.0 as u64);
        let arrived = b.sized("arrived", Elem::I32, true, meeting_place.1 as u64);
        let tokens = Tokens::declare(b, op.batch, experts);
        let stride = experts.map_or(layout.padded_rows(), |e| e.stride);
        Operands {
            b,
            op,
            layout,
            decoder,
            weights,
            scales,
            x,
            x_scale,
            x_sum,
            y,
            partial,
            arrived,
            totals,
            tokens,
            stride,
        }
    }

    /// A place of the tokens' matrix in the weights, where that is `at` of the first.
    pub(super) fn word(&self, at: V<'b>) -> V<'b> {
        self.tokens.in_matrix(at, u32::try_from(self.layout.words()).expect("below 2^32 words"))
    }

    /// Where the result of a row and a token lies.
    fn result(&self, row: V<'b>, token: V<'b>) -> V<'b> {
        row + self.tokens.output(token) * self.stride
    }

    fn code(&self) -> &'a Code {
        &self.op.quantizer.codes[0]
    }

    /// Words of a group of tiles, one of each code of the mix.
    pub(super) fn period(&self) -> u32 {
        self.layout.lane_words.iter().sum::<u32>() * 32
    }

    /// Words of a row tile.
    pub(super) fn row_words(&self) -> u32 {
        u32::try_from(self.layout.row_stride()).expect("a row tile is below 2^32 words")
    }

    /// Registers for the words of some `tiles` of a run, which begins with one of the mix's first code.
    pub(super) fn words(&self, tiles: Range<u32>) -> Words {
        let zero = self.b.u32(0);
        let chunk = |&(_, width): &(u32, u32)| {
            self.b.var(if width == 1 { zero } else { self.b.vector(&vec![zero; width as usize]) })
        };
        let lane_words = &self.layout.lane_words;
        tiles.map(|d| layout::chunks(lane_words[d as usize % lane_words.len()]).iter().map(chunk).collect()).collect()
    }

    /// Starts loading the words of a run's tiles from the `tile`th on. The run begins at column tile `col`, the first word
    /// of which is `first`. Tiles beyond the last column are not loaded if `guarded`: any words do, since their
    /// activations are zero.
    pub(super) fn fetch(&self, first: V<'b>, col: V<'b>, tile: u32, words: &[Vec<Var>], guarded: bool, lane: V<'b>) {
        let (b, lane_words) = (self.b, &self.layout.lane_words);
        let (codes, first) = (lane_words.len(), self.word(first));
        for (d, chunks) in (tile as usize..).zip(words) {
            let of_tile = lane_words[d % codes];
            let ahead = (d / codes) as u32 * self.period() + lane_words[..d % codes].iter().sum::<u32>() * 32;
            let load = || {
                for (var, words) in chunks.iter().zip(load_words(b, self.weights, first + ahead, lane, of_tile)) {
                    b.set(*var, words);
                }
            };
            if guarded { b.if_((col + d as u32).lt(self.layout.col_tiles()), load) } else { load() }
        }
    }

    /// The scale of a row.
    pub(super) fn row_scale(&self, row: V<'b>) -> V<'b> {
        let row = self.tokens.in_matrix(row, self.layout.padded_rows());
        self.b.load_as(self.scales, row, Elem::BF16, 1, Cache::ReadOnly)
    }

    /// A word of the planes.
    pub(super) fn x_word(&self, word: V<'b>) -> V<'b> {
        self.b.load_as(self.x, word, Elem::U32, 1, self.x_scale.x_cache())
    }

    /// The scale of a token.
    pub(super) fn token_scale(&self, token: V<'b>) -> TokenScale<'b> {
        let token = self.tokens.input(token);
        let sum = || self.b.load_as(self.x_sum, token, Elem::I32, 1, self.x_scale.x_cache());
        let offset = self.code().half_offset.then(sum);
        (self.x_scale.of(self.b, token), offset)
    }

    /// The token has been prepared by this block, with this scale.
    pub(super) fn prepared(&self, scale: V<'b>) {
        self.x_scale.prepared(scale);
    }

    /// What the result of a row and a token, if it exists, is added to, if to anything.
    pub(super) fn before(&self, row: V<'b>, token: V<'b>, exists: V<'b>) -> Option<V<'b>> {
        let b = self.b;
        self.op.accumulate.then(|| {
            let before = b.var(b.f32(0.0));
            let at = self.result(row, token);
            b.if_(exists, || b.set(before, b.load(self.y, at, Elem::F32)));
            b.get(before)
        })
    }

    /// The integer that becomes a result, of sums as [`Operands::write`] takes them: Σ entry · activation, of codes with an
    /// offset twice that and the sum of the activations.
    fn total(&self, sums: &[V<'b>], x_sum: Option<V<'b>>) -> V<'b> {
        let products = sums.len() / 2;
        let wide = |slot: usize| sums[slot].to(Scalar::I64);
        let plane = |product: usize| wide(product) * 128 + wide(products + product);
        let total = if products == 1 { plane(0) } else { plane(1) * 256 + plane(0) };
        x_sum.map_or(total, |sum| total * 2 + sum.to(Scalar::I64))
    }

    /// Scales and stores the sums of a row and a token: those of the high plane, a product each, then of the low plane.
    pub(super) fn write(
        &self,
        row: V<'b>,
        token: V<'b>,
        sums: &[V<'b>],
        row_scale: V<'b>,
        by: TokenScale<'b>,
        before: Option<V<'b>>,
    ) {
        let (b, code) = (self.b, self.code());
        let unit = if code.half_offset { code.unit * 0.5 } else { code.unit };
        let (x_scale, x_sum) = by;
        let total = self.total(sums, x_sum);
        let at = self.result(row, token);
        if self.totals {
            let high = (total >> TOTAL_BITS).to(Scalar::I32);
            let low = (total & ((1 << TOTAL_BITS) - 1)).to(Scalar::I32);
            b.store(self.y, at * 2, b.vector(&[high, low]), Elem::I32);
            return;
        }
        let value = total.to(Scalar::F32) * row_scale * (x_scale * unit);
        let value = before.map_or(value, |before| before + value);
        b.store(self.y, at, value, Elem::F32);
    }

    /// After a block has added its sums to `partial`: runs `last` in the last of the `split` blocks that meet at `place`.
    /// All threads of the block come here; `thread` is the index of each.
    pub(super) fn when_all_arrived(&self, place: V<'b>, split: u32, thread: V<'b>, last: impl FnOnce()) {
        let b = self.b;
        let is_last = b.shared("last", Elem::I32, 1);
        let zero = b.i32(0);
        b.fence();
        b.barrier();
        b.if_(thread.eq(0), || {
            let before = b.atomic_add(self.arrived, place, b.i32(1));
            b.store(is_last, zero, before.eq(split - 1).select(b.i32(1), 0), Elem::I32);
        });
        b.barrier();
        b.if_(b.load(is_last, zero, Elem::I32).eq(1), || {
            b.fence();
            last();
            b.if_(thread.eq(0), || b.store(self.arrived, place, zero, Elem::I32));
        });
    }
}

/// The operands of tensor-core products that four registers of weights make, and whether their bytes are signed: those
/// of 8-bit entries, or the low bytes of 16-bit entries, which have no sign, and the high.
pub(super) fn operands<'b>(a: &[Register<'b>]) -> Vec<(bool, [V<'b>; 4])> {
    let low = [a[0].low, a[1].low, a[2].low, a[3].low];
    match [a[0].high, a[1].high, a[2].high, a[3].high] {
        [Some(h0), Some(h1), Some(h2), Some(h3)] => vec![(false, low), (true, [h0, h1, h2, h3])],
        _ => vec![(true, low)],
    }
}

/// Multiplies four registers of weights with a group of planes onto `sums`, of which each product has one.
pub(super) fn multiply<'b>(b: &'b Builder, a: &[Register<'b>], x: [V<'b>; 2], sums: &mut [V<'b>]) {
    for ((signed, a), sum) in operands(a).into_iter().zip(sums) {
        *sum = b.mma_i8(signed, a, x, *sum);
    }
}

/// Quotient and remainder by a constant.
pub(super) fn divide<'b>(b: &'b Builder, v: V<'b>, by: u32) -> (V<'b>, V<'b>) {
    if by == 1 { (v, b.i32(0)) } else { (v / by, v % by) }
}
