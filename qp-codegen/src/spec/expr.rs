//! The decode expression of a code: from the window's bits to V small integers.
//!
//! A [`Decode`] is a list of nodes in evaluation order; a node refers only to earlier nodes. Each node has a
//! [`Type`]: a **word** (`u32`, wrapping arithmetic), a **bit**, or a **vector** of V entries (packed, entry 0 in
//! the lowest bits). Shifts by 32 or more give 0. The last node, [`Decode::result`], is a vector.
//!
//! The CPU decoder ([`Decode::eval`]), the lowering to kernel IR (`kernels::decode`) and the formatter are its
//! readers; each matches every node without a wildcard.

use super::{Table, Value};

/// Index of a node in its [`Decode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node(pub u32);

/// Type of a node's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// Unsigned 32-bit, wrapping.
    Word,
    /// One bit of a word.
    Bit,
    /// V packed entries.
    Vector,
}

/// Binary operations on words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WordOp {
    /// Wrapping sum.
    Add,
    /// Wrapping difference.
    Sub,
    /// Wrapping product.
    Mul,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
    /// Shift left; 0 if by 32 or more.
    Shl,
    /// Logical shift right; 0 if by 32 or more.
    Shr,
}

/// Element-wise operations on vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VectorOp {
    /// Bitwise exclusive or; with [`Op::Signs`] a conditional one's complement (`-x - 1`).
    Xor,
    /// Wrapping sum of each entry.
    Add,
}

/// What a node computes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// The window: L bits, zero-extended. Word.
    Window,
    /// A constant. Word.
    Const(u32),
    /// Bitwise complement of a word. Word.
    Not(Node),
    /// `a op b`. Word.
    Binary(WordOp, Node, Node),
    /// Byte `index` (0..4) of a word, zero-extended. Word.
    Byte(Node, u32),
    /// Sum of the four bytes of a word (unsigned). Word.
    ByteSum(Node),
    /// Bit `index` (0..32) of a word. Bit.
    Bit(Node, u32),
    /// Entry `index` of a table; the index is taken modulo the table's entries. Vector.
    Lookup {
        /// Index into the code's tables.
        table: u32,
        /// Word.
        index: Node,
    },
    /// V bits → a vector with all bits of an entry set where its bit is set. Vector.
    Signs(Vec<Node>),
    /// V words → a vector of their low 8 or 16 bits. Vector.
    Pack(Vec<Node>),
    /// Element-wise. Vector.
    Vector(VectorOp, Node, Node),
}

impl Op {
    /// The type of the node.
    pub fn ty(&self) -> Type {
        match self {
            Op::Window | Op::Const(_) | Op::Not(_) | Op::Binary(..) | Op::Byte(..) | Op::ByteSum(_) => Type::Word,
            Op::Bit(..) => Type::Bit,
            Op::Lookup { .. } | Op::Signs(_) | Op::Pack(_) | Op::Vector(..) => Type::Vector,
        }
    }
}

/// A decode expression.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Decode {
    /// Nodes, each after those it uses. The last is the result.
    pub nodes: Vec<Op>,
}

impl Decode {
    /// Appends a node, reusing an equal earlier one.
    pub fn push(&mut self, op: Op) -> Node {
        if let Some(i) = self.nodes.iter().position(|o| *o == op) {
            return Node(i as u32);
        }
        self.nodes.push(op);
        Node(self.nodes.len() as u32 - 1)
    }

    /// The operation of `n`.
    pub fn op(&self, n: Node) -> &Op {
        &self.nodes[n.0 as usize]
    }

    /// The result: a vector.
    pub fn result(&self) -> Node {
        Node(self.nodes.len() as u32 - 1)
    }

    /// Bits of the window that the result depends on, if the window is taken as a 32-bit word in which more may be set.
    ///
    /// Sums, products and left shifts carry nothing downwards, so an expression that uses the low L bits of such words
    /// alone does not need its window cut off above.
    pub fn window_bits(&self, value: Value, tables: &[Table]) -> u32 {
        let needed = self.needed(None, value.bytes() * 8, &|table| tables[table as usize].entries);
        let window = self.nodes.iter().zip(&needed).find(|(op, _)| matches!(op, Op::Window));
        window.map_or(0, |(_, bits)| *bits)
    }

    /// Bits of each word, and the lowest of each bit, that the result depends on, with entries of `width` bits and tables of so many
    /// entries; what follows from the word `given` counts as known.
    pub fn needed(&self, given: Option<Node>, width: u32, entries: &dyn Fn(u32) -> u32) -> Vec<u32> {
        // All bits up to the highest: what a carry reaches them from.
        let below = |bits: u32| u32::MAX.checked_shr(bits.leading_zeros()).unwrap_or(0);
        let low = |bits: u32| u32::MAX.checked_shr(32u32.saturating_sub(bits)).unwrap_or(0);
        let constant = |n: &Node| match self.op(*n) {
            Op::Const(c) => Some(*c),
            _ => None,
        };
        let mut needed = vec![0u32; self.nodes.len()];
        for (i, op) in self.nodes.iter().enumerate().rev() {
            if given == Some(Node(i as u32)) {
                continue;
            }
            let bits = needed[i];
            let mut need = |n: &Node, bits: u32| needed[n.0 as usize] |= bits;
            match op {
                Op::Window | Op::Const(_) | Op::Vector(..) => (),
                Op::Not(a) => need(a, bits),
                Op::Binary(op, a, b) => {
                    let (x, y) = match (op, constant(b)) {
                        (WordOp::And, Some(c)) => (bits & c, 0),
                        (WordOp::Or, Some(c)) => (bits & !c, 0),
                        (WordOp::Mul, Some(c)) => (below(bits).checked_shr(c.trailing_zeros()).unwrap_or(0), 0),
                        (WordOp::Shl, Some(k)) => (bits.checked_shr(k).unwrap_or(0), 0),
                        (WordOp::Shr, Some(k)) => (bits.checked_shl(k).unwrap_or(0), 0),
                        (WordOp::Shl | WordOp::Shr, None) => (u32::MAX, u32::MAX),
                        (WordOp::And | WordOp::Or | WordOp::Xor, _) => (bits, bits),
                        (WordOp::Add | WordOp::Sub | WordOp::Mul, _) => (below(bits), below(bits)),
                    };
                    need(a, x);
                    need(b, y);
                }
                Op::Byte(a, i) => need(a, (bits & 0xff) << (8 * i)),
                Op::ByteSum(a) => need(a, if bits == 0 { 0 } else { u32::MAX }),
                Op::Bit(a, i) => need(a, 1 << i),
                Op::Lookup { table, index } => need(index, entries(*table) - 1),
                Op::Signs(_) => (),
                Op::Pack(words) => words.iter().for_each(|n| need(n, low(width))),
            }
        }
        needed
    }

    /// Products of words with constants: the hashes of a window.
    pub fn multiplications(&self) -> u32 {
        self.nodes.iter().filter(|op| matches!(op, Op::Binary(WordOp::Mul, ..))).count() as u32
    }

    /// No entry that the expression can give is larger than this, in magnitude: by the values of the tables, where they
    /// are filled, and by the entries' type.
    pub fn largest_entry(&self, value: Value, tables: &[Table]) -> i32 {
        let most = -value.range().0;
        // One's complements are larger by one.
        let of_table = |t: &Table| t.values.iter().map(|&x| i32::from(x).abs() + 1).max().unwrap_or(most);
        // A vector of all zeros or all ones turns the other one's entries into their complements at most.
        let is_signs = |n: Node| matches!(self.op(n), Op::Signs(_));
        let mut bounds: Vec<i32> = Vec::with_capacity(self.nodes.len());
        for op in &self.nodes {
            let of = |n: &Node| bounds[n.0 as usize];
            bounds.push(
                match op {
                    Op::Lookup { table, .. } => of_table(&tables[*table as usize]),
                    Op::Signs(_) => 1,
                    Op::Vector(VectorOp::Xor, a, b) if is_signs(*a) || is_signs(*b) => of(a).max(of(b)),
                    Op::Vector(VectorOp::Add, a, b) => of(a) + of(b),
                    Op::Pack(_) | Op::Vector(VectorOp::Xor, ..) => most,
                    Op::Window
                    | Op::Const(_)
                    | Op::Not(_)
                    | Op::Binary(..)
                    | Op::Byte(..)
                    | Op::ByteSum(_)
                    | Op::Bit(..) => 0,
                }
                .min(most),
            );
        }
        bounds.last().copied().unwrap_or(most)
    }

    /// Evaluates the expression for one window, writing V entries to `out`.
    ///
    /// The reference of every other decoder. `tables` must be filled.
    pub fn eval(&self, window: u32, value: Value, vector: u32, tables: &[Table], out: &mut [i16]) {
        let bits = value.bytes() * 8;
        let lane = if bits == 8 { 0xffu64 } else { 0xffff };
        let sext = |x: u64| if bits == 8 { i16::from(x as u8 as i8) } else { x as u16 as i16 };
        let v = vector as usize;
        // Vectors are at most four 16-bit entries: 64 bits.
        let mut vals: Vec<u64> = Vec::with_capacity(self.nodes.len());
        for op in &self.nodes {
            let word = |n: &Node| vals[n.0 as usize] as u32;
            let x = match op {
                Op::Window => u64::from(window),
                Op::Const(c) => u64::from(*c),
                Op::Not(a) => u64::from(!word(a)),
                Op::Binary(op, a, b) => u64::from(op.apply(word(a), word(b))),
                Op::Byte(a, i) => u64::from(word(a) >> (8 * i) & 0xff),
                Op::ByteSum(a) => word(a).to_le_bytes().iter().map(|&b| u64::from(b)).sum(),
                Op::Bit(a, i) => u64::from(word(a) >> i & 1),
                Op::Lookup { table, index } => {
                    let t = &tables[*table as usize];
                    let e = (word(index) % t.entries) as usize;
                    pack(t.values[e * v..(e + 1) * v].iter().map(|&x| x as u16 as u64 & lane), bits)
                }
                Op::Signs(b) => pack(b.iter().map(|n| if vals[n.0 as usize] != 0 { lane } else { 0 }), bits),
                Op::Pack(w) => pack(w.iter().map(|n| vals[n.0 as usize] & lane), bits),
                Op::Vector(VectorOp::Xor, a, b) => vals[a.0 as usize] ^ vals[b.0 as usize],
                Op::Vector(VectorOp::Add, a, b) => {
                    let (a, b) = (vals[a.0 as usize], vals[b.0 as usize]);
                    pack((0..v as u32).map(|i| (a >> (i * bits)).wrapping_add(b >> (i * bits)) & lane), bits)
                }
            };
            vals.push(x);
        }
        let r = vals[vals.len() - 1];
        for (i, o) in out.iter_mut().enumerate().take(v) {
            *o = sext(r >> (i as u32 * bits) & lane);
        }
    }
}

/// Room for the values of a [`Decode`]'s nodes, so that one window after the other is evaluated without allocation.
#[derive(Debug, Default)]
pub struct Room {
    words: Vec<u32>,
    lanes: Vec<i64>,
}

impl Decode {
    /// The value of a word, or a bit, of an expression of words alone.
    pub fn word(&self, code: u32, node: Node, room: &mut Room) -> u32 {
        self.eval_wide(code, 0, &|_, _, _| 0, room, &mut []);
        room.words[node.0 as usize]
    }

    /// As [`Decode::eval`], with entries of 64 bits and any `vector`: what formats use. `table` gives component `k` of
    /// entry `i` (not yet reduced by its length) of a table. `out` gets the entries.
    pub fn eval_wide(
        &self,
        code: u32,
        vector: usize,
        table: &dyn Fn(u32, u32, usize) -> i64,
        room: &mut Room,
        out: &mut [i64],
    ) {
        let Room { words, lanes } = room;
        words.clear();
        lanes.resize(self.nodes.len() * vector, 0);
        for (n, op) in self.nodes.iter().enumerate() {
            let word = |n: &Node| words[n.0 as usize];
            let (before, rest) = lanes.split_at_mut(n * vector);
            let target = &mut rest[..vector];
            let both = |a: &Node, b: &Node| {
                let of = |n: &Node| before[n.0 as usize * vector..][..vector].iter().copied();
                of(a).zip(of(b))
            };
            let value = match op {
                Op::Window => code,
                Op::Const(c) => *c,
                Op::Not(a) => !word(a),
                Op::Binary(op, a, b) => op.apply(word(a), word(b)),
                Op::Byte(a, i) => word(a) >> (8 * i) & 0xff,
                Op::ByteSum(a) => word(a).to_le_bytes().iter().map(|&b| u32::from(b)).sum(),
                Op::Bit(a, i) => word(a) >> i & 1,
                Op::Lookup { table: t, index } => {
                    let i = word(index);
                    target.iter_mut().enumerate().for_each(|(k, x)| *x = table(*t, i, k));
                    0
                }
                Op::Signs(b) => {
                    target.iter_mut().zip(b).for_each(|(x, b)| *x = -i64::from(word(b) & 1));
                    0
                }
                Op::Pack(w) => {
                    target.iter_mut().zip(w).for_each(|(x, w)| *x = i64::from(word(w) as i32));
                    0
                }
                Op::Vector(op, a, b) => {
                    target.iter_mut().zip(both(a, b)).for_each(|(x, (a, b))| {
                        *x = match op {
                            VectorOp::Xor => a ^ b,
                            VectorOp::Add => a.wrapping_add(b),
                        };
                    });
                    0
                }
            };
            words.push(value);
        }
        let last = self.nodes.len().saturating_sub(1) * vector;
        out.copy_from_slice(&lanes[last..last + out.len()]);
    }
}

impl WordOp {
    /// The operation on two words.
    pub fn apply(self, a: u32, b: u32) -> u32 {
        match self {
            WordOp::Add => a.wrapping_add(b),
            WordOp::Sub => a.wrapping_sub(b),
            WordOp::Mul => a.wrapping_mul(b),
            WordOp::And => a & b,
            WordOp::Or => a | b,
            WordOp::Xor => a ^ b,
            WordOp::Shl => a.checked_shl(b).unwrap_or(0),
            WordOp::Shr => a.checked_shr(b).unwrap_or(0),
        }
    }
}

fn pack(lanes: impl Iterator<Item = u64>, bits: u32) -> u64 {
    lanes.enumerate().fold(0, |acc, (i, x)| acc | x << (i as u32 * bits))
}
