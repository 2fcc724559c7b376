//! The canonical text of a quantizer and its hash.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::expr::{Decode, Node, Op, VectorOp, WordOp};
use super::{Code, Quantizer, Rotation, ScaleKind, Value};
use crate::syntax::number::Rational;

/// Integers of a table on one line.
pub const PER_LINE: usize = 32;

/// See [`Quantizer::canonical`].
pub fn text(q: &Quantizer) -> String {
    format!("quantizer {} {}", q.name, body(q))
}

/// See [`Quantizer::hash`].
pub fn hash(q: &Quantizer) -> String {
    Sha256::digest(body(q)).iter().map(|b| format!("{b:02x}")).collect()
}

fn body(q: &Quantizer) -> String {
    let scale = match q.scale {
        ScaleKind::Row => "row",
        ScaleKind::Matrix => "matrix",
    };
    let rotation = match q.rotation {
        Rotation::None => "none".to_string(),
        Rotation::Hadamard { seed, block, interleave } => {
            let of = |name, value: Option<u32>| value.map(|n| format!(", {name} = {n}")).unwrap_or_default();
            format!("hadamard(seed = {seed}{}{})", of("block", block), of("interleave", interleave))
        }
    };
    let mut out = format!("{{\n    scale  {scale}\n    rotate {rotation}\n");
    match &q.codes[..] {
        [c] => code(c, "    ", &mut out),
        many => {
            for c in many {
                out.push_str("    code {\n");
                code(c, "        ", &mut out);
                out.push_str("    }\n");
            }
        }
    }
    out.push_str("}\n");
    out
}

/// Writing to a string cannot fail.
macro_rules! line {
    ($out:expr, $($t:tt)*) => {{ let _ = writeln!($out, $($t)*); }};
}

fn code(c: &Code, indent: &str, out: &mut String) {
    let steps: Vec<String> = c.steps.iter().map(u32::to_string).collect();
    let value = match c.value {
        Value::I8 => "i8",
        Value::I16 => "i16",
    };
    line!(out, "{indent}window {}", c.window);
    line!(out, "{indent}vector {}", c.vector);
    match &steps[..] {
        [k] => line!(out, "{indent}step   {k}"),
        many => line!(out, "{indent}step   [{}]", many.join(", ")),
    }
    line!(out, "{indent}block  {} x {}", c.block.rows, c.block.cols);
    line!(out, "{indent}values {value}{}", if c.half_offset { " + 1/2" } else { "" });
    line!(out, "{indent}unit   {}", unit(c.unit));
    for t in &c.tables {
        line!(out, "{indent}table  {}[{}] = [", t.name, t.entries);
        for row in t.values.chunks(PER_LINE) {
            let row: Vec<String> = row.iter().map(i16::to_string).collect();
            line!(out, "{indent}    {},", row.join(", "));
        }
        line!(out, "{indent}]");
    }
    line!(out, "{indent}decode w {{");
    let tables: Vec<&str> = c.tables.iter().map(|t| t.name.as_str()).collect();
    decode(&tables, &c.decode, &format!("{indent}    "), out);
    line!(out, "{indent}}}");
}

/// The shortest decimal that reads back as `u`, or else the exact fraction.
fn unit(u: f32) -> String {
    let decimal = format!("{u}");
    if Rational::parse_decimal(&decimal).is_some_and(|r| r.to_f32() == u) {
        return decimal;
    }
    let mut numerator = f64::from(u);
    let mut exponent = 0;
    while numerator.fract() != 0.0 {
        numerator *= 2.0;
        exponent += 1;
    }
    format!("{numerator}/2 ** {exponent}")
}

/// The lines of a decode block whose window is called `w`.
pub fn decode(tables: &[&str], d: &Decode, indent: &str, out: &mut String) {
    let mut uses = vec![0u32; d.nodes.len()];
    for op in &d.nodes {
        operands(op, |n| uses[n.0 as usize] += 1);
    }
    let taken = |name: &str| name == "w" || tables.contains(&name);
    let mut names = (0..).map(|i| format!("h{i}")).filter(|n| !taken(n));
    let mut texts: Vec<String> = Vec::new();
    for (i, op) in d.nodes.iter().enumerate() {
        let text = expression(tables, d, op, &texts);
        let named = uses[i] > 1
            && match op {
                Op::Window | Op::Const(_) | Op::Bit(..) => false,
                Op::Not(_)
                | Op::Binary(..)
                | Op::Byte(..)
                | Op::ByteSum(_)
                | Op::Lookup { .. }
                | Op::Signs(_)
                | Op::Pack(_)
                | Op::Vector(..) => true,
            };
        match if named { names.next() } else { None } {
            Some(name) => {
                line!(out, "{indent}let {name} = {}", strip(&text));
                texts.push(name);
            }
            None => texts.push(text),
        }
    }
    if let Some(last) = texts.last() {
        line!(out, "{indent}{}", strip(last));
    }
}

/// Without the parentheses around the whole.
fn strip(text: &str) -> &str {
    let Some(inner) = text.strip_prefix('(').and_then(|t| t.strip_suffix(')')) else { return text };
    let mut depth = 0i32;
    let closes_early = inner.chars().any(|c| {
        depth += match c {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        depth < 0
    });
    if closes_early { text } else { inner }
}

fn operands(op: &Op, mut f: impl FnMut(Node)) {
    match op {
        Op::Window | Op::Const(_) => (),
        Op::Not(a) | Op::Byte(a, _) | Op::ByteSum(a) | Op::Bit(a, _) | Op::Lookup { index: a, .. } => f(*a),
        Op::Binary(_, a, b) | Op::Vector(_, a, b) => {
            f(*a);
            f(*b);
        }
        Op::Signs(l) | Op::Pack(l) => l.iter().for_each(|n| f(*n)),
    }
}

fn expression(tables: &[&str], d: &Decode, op: &Op, texts: &[String]) -> String {
    let t = |n: &Node| texts[n.0 as usize].as_str();
    let list = |l: &[Node]| l.iter().map(|n| strip(t(n))).collect::<Vec<_>>().join(", ");
    match op {
        Op::Window => "w".into(),
        Op::Const(k) if *k < 256 => k.to_string(),
        Op::Const(k) => format!("0x{k:X}"),
        Op::Not(a) => format!("(~{})", t(a)),
        Op::Binary(op, a, b) => format!("({} {} {})", t(a), word_op(*op), t(b)),
        Op::Byte(a, i) => format!("byte({}, {i})", strip(t(a))),
        Op::ByteSum(a) => format!("sum_bytes({})", strip(t(a))),
        // A constant has no bits to index in the language, but a word made of one has.
        Op::Bit(a, i) if matches!(d.op(*a), Op::Const(_)) => format!("({})[{i}]", t(a)),
        Op::Bit(a, i) => format!("{}[{i}]", t(a)),
        Op::Lookup { table, index } => format!("{}[{}]", tables[*table as usize], strip(t(index))),
        Op::Signs(l) => format!("signs({})", list(l)),
        Op::Pack(l) => format!("[{}]", list(l)),
        Op::Vector(VectorOp::Xor, a, b) => format!("({} ^ {})", t(a), t(b)),
        Op::Vector(VectorOp::Add, a, b) => format!("({} + {})", t(a), t(b)),
    }
}

fn word_op(op: WordOp) -> &'static str {
    match op {
        WordOp::Add => "+",
        WordOp::Sub => "-",
        WordOp::Mul => "*",
        WordOp::And => "&",
        WordOp::Or => "|",
        WordOp::Xor => "^",
        WordOp::Shl => "<<",
        WordOp::Shr => ">>",
    }
}
