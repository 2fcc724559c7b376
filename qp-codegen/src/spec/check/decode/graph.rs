//! The nodes of a checked decode block: what they are made of, those that are needed, and their tables.

use crate::spec::expr::{Decode, Node, Op, VectorOp, WordOp};

/// True if `result` is made of entries of the tables from `own` on, of a matrix, and of nothing else: sums of them, and the
/// one's complements that are negatives when 1 is added where they were made, as `negate` and `-` do.
pub fn are_numbers(d: &Decode, result: Node, own: usize) -> bool {
    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Other,
        Number,
        Complement,
    }
    let is_const = |n: &Node, c: u32| *d.op(*n) == Op::Const(c);
    // The word that a bit is.
    let is_word_of = |word: &Node, bit: &Node| match (d.op(*bit), d.op(*word)) {
        (Op::Bit(a, 0), Op::Binary(WordOp::And, b, one)) => a == b && is_const(one, 1),
        (Op::Bit(a, 31), Op::Binary(WordOp::Shr, b, by)) => a == b && is_const(by, 31),
        (Op::Bit(a, i), Op::Binary(WordOp::And, shifted, one)) => {
            is_const(one, 1) && matches!(d.op(*shifted), Op::Binary(WordOp::Shr, b, by) if a == b && is_const(by, *i))
        }
        _ => false,
    };
    let adds_up = |complement: &Node, ones: &Node| match (d.op(*complement), d.op(*ones)) {
        (Op::Vector(VectorOp::Xor, _, signs), Op::Pack(words)) => match d.op(*signs) {
            Op::Signs(bits) => bits.iter().zip(words).all(|(bit, word)| is_word_of(word, bit)),
            _ => words.iter().all(|w| is_const(w, 1)),
        },
        _ => false,
    };
    let mut kinds: Vec<Kind> = Vec::new();
    for op in &d.nodes[..=result.0 as usize] {
        let kind = |n: &Node| kinds[n.0 as usize];
        kinds.push(match op {
            Op::Lookup { table, .. } if *table as usize >= own => Kind::Number,
            Op::Vector(VectorOp::Xor, a, signs) if kind(a) == Kind::Number => match d.op(*signs) {
                Op::Signs(_) => Kind::Complement,
                Op::Pack(words) if words.iter().all(|w| is_const(w, u32::MAX)) => Kind::Complement,
                _ => Kind::Other,
            },
            Op::Vector(VectorOp::Add, a, b) => match (kind(a), kind(b)) {
                (Kind::Number, Kind::Number) => Kind::Number,
                (Kind::Complement, Kind::Other) if adds_up(a, b) => Kind::Number,
                _ => Kind::Other,
            },
            Op::Window
            | Op::Const(_)
            | Op::Not(_)
            | Op::Binary(..)
            | Op::Byte(..)
            | Op::ByteSum(_)
            | Op::Bit(..)
            | Op::Lookup { .. }
            | Op::Signs(_)
            | Op::Pack(_)
            | Op::Vector(VectorOp::Xor, ..) => Kind::Other,
        });
    }
    kinds[result.0 as usize] == Kind::Number
}

/// The nodes that `result` needs, each after those it uses, in order of first need; `result` is last.
pub fn normal(d: &Decode, result: Node) -> Decode {
    let mut out = Decode::default();
    let mut new: Vec<Option<Node>> = vec![None; d.nodes.len()];
    let mut stack = vec![(result, false)];
    while let Some((n, children_done)) = stack.pop() {
        if new[n.0 as usize].is_some() {
            continue;
        }
        let op = d.op(n);
        if children_done {
            let moved = map(op, |c| new[c.0 as usize].unwrap_or(c));
            new[n.0 as usize] = Some(out.push(moved));
        } else {
            stack.push((n, true));
            let mut children = Vec::new();
            map(op, |c| {
                children.push((c, false));
                c
            });
            stack.extend(children.into_iter().rev());
        }
    }
    out
}

/// `op` with each node it uses replaced.
fn map(op: &Op, mut f: impl FnMut(Node) -> Node) -> Op {
    match op {
        Op::Window => Op::Window,
        Op::Const(c) => Op::Const(*c),
        Op::Not(a) => Op::Not(f(*a)),
        Op::Binary(op, a, b) => Op::Binary(*op, f(*a), f(*b)),
        Op::Byte(a, i) => Op::Byte(f(*a), *i),
        Op::ByteSum(a) => Op::ByteSum(f(*a)),
        Op::Bit(a, i) => Op::Bit(f(*a), *i),
        Op::Lookup { table, index } => Op::Lookup { table: *table, index: f(*index) },
        Op::Signs(b) => Op::Signs(b.iter().map(|n| f(*n)).collect()),
        Op::Pack(w) => Op::Pack(w.iter().map(|n| f(*n)).collect()),
        Op::Vector(op, a, b) => Op::Vector(*op, f(*a), f(*b)),
    }
}

/// Renumbers tables: `new[i]` is the index of table `i` among those kept.
pub fn renumber(d: &mut Decode, new: &[u32]) {
    for op in &mut d.nodes {
        if let Op::Lookup { table, .. } = op {
            *table = new[*table as usize];
        }
    }
}
