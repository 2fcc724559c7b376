//! What is found out about a code by looking at its windows and its expression: bits that decide nothing, entries that lose bits,
//! tables that cannot be trained.

use super::Sink;
use crate::spec::expr::{self, Op, Room, VectorOp};
use crate::spec::{Code, Table, TableSource, Value};
use crate::syntax::ast::{BinaryOp, Decode, Expr, ExprKind};
use crate::syntax::diag::Diagnostic;

/// Windows that are tried first: nearly always they show what a bit decides.
const TRIED: u32 = 256;
/// Most windows that are looked at for entries that leave their type.
const MOST: u32 = 1 << 16;

/// Warns of what the code, which the block `d` decodes, stores in vain or loses.
pub fn warn(code: &Code, d: &Decode, sink: &mut Sink) {
    losses(code, d, sink);
    let trained = code.tables.iter().find(|t| matches!(t.source, TableSource::Trained { .. }));
    if let Some(t) = trained.filter(|_| !can_be_trained(&code.decode, code.decode.result())) {
        let message = format!("the table `{}` cannot be trained in this expression", t.name);
        let cure = "only entries and their complements can, `t[…]` and `t[…] ^ signs(…)`: change it, or take the table from a file";
        sink.push(Diagnostic::warning(d.result.span, message, "").hint(cure));
    }
    let mut code = code.clone();
    let value = code.value;
    code.tables.iter_mut().for_each(|t| fill(t, value));
    let used = deciding(&code, sink);
    // A bit of the stream is in the windows of several steps, each time lower: of the step that brings it and those before.
    let steps = code.steps.len() as u32;
    let rounds = code.window.div_ceil(code.step_offset(steps)) * steps;
    let unused = |step: u32, bit: u32| {
        let at = code.step_offset(rounds + step) + bit;
        let mut positions = (0..=rounds + step).map(|s| at - code.step_offset(s)).filter(|p| *p < code.window);
        !positions.any(|p| used >> p & 1 == 1)
    };
    let first = (0..steps).find_map(|s| {
        let bits = code.step_bits(s);
        (0..bits).find(|b| unused(s, *b)).map(|b| (s, b, bits))
    });
    let highest = 32 - used.leading_zeros();
    if let Some((step, bit, bits)) = first {
        let which = if steps > 1 { format!("step {step} of the pattern") } else { "a step".to_string() };
        let message = format!("no entry depends on bit {bit} of the {bits} bits of {which}");
        let cure = match binds_more_tightly(d) {
            Some((outer, inner)) => format!(
                "such bits are stored in vain; `{inner}` binds more tightly than `{outer}`: write `(a {outer} b) {inner} c` if that is meant"
            ),
            None => "such bits are stored in vain".to_string(),
        };
        sink.push(Diagnostic::warning(d.result.span, message, "").hint(cure));
    } else if highest < code.window && used != 0 {
        let message = format!("no entry depends on bit {highest} of the window or a higher one");
        let cure = format!("`window {highest}` means the same, and takes an encoder less");
        sink.push(Diagnostic::warning(d.result.span, message, "").hint(cure));
    }
}

/// True if each result is an entry of a table, or its complement.
fn can_be_trained(d: &expr::Decode, result: expr::Node) -> bool {
    let signs = |n: expr::Node| matches!(d.op(n), Op::Signs(_));
    match *d.op(result) {
        Op::Lookup { .. } => true,
        Op::Vector(VectorOp::Xor, a, b) if signs(b) => can_be_trained(d, a),
        Op::Vector(VectorOp::Xor, a, b) if signs(a) => can_be_trained(d, b),
        _ => false,
    }
}

/// Fills a table that is not trained yet: nothing is known of its entries but that they differ.
fn fill(t: &mut Table, value: Value) {
    if t.values.is_empty() {
        let (min, max) = value.range();
        let random = |i: u32| (i.wrapping_mul(0x9E37_79B1) >> 8) as i32 % (max - min) + min;
        // As many as any vector needs.
        t.values = (0..t.entries * 4).map(|i| random(i) as i16).collect();
    }
}

/// The windows' bits on which entries depend; all, if it would take too long to look.
fn deciding(code: &Code, sink: &mut Sink) -> u32 {
    let v = code.vector as usize;
    let entry = |w: u32| {
        let mut out = [0i16; 4];
        code.entry(w, &mut out[..v]);
        out
    };
    let last = u32::MAX >> (32 - code.window);
    let operations = code.decode.nodes.len() as u64;
    if !sink.may_look(operations * u64::from(2 * TRIED * code.window)) {
        return last;
    }
    let tried = || (0..TRIED).map(|i| i.wrapping_mul(0x9E37_79B1).rotate_left(i) & last);
    let mut used =
        (0..code.window).filter(|b| tried().any(|w| entry(w) != entry(w ^ 1 << b))).fold(0, |m, b| m | 1 << b);
    if used != last && sink.may_look(operations << code.window) {
        let all = code.codebook();
        for bit in 0..code.window {
            let half = v << bit;
            if all.chunks_exact(2 * half).any(|pair| pair[..half] != pair[half..]) {
                used |= 1 << bit;
            }
        }
        return used;
    }
    // What other windows would show is not known.
    last
}

/// Warns of an entry that has more bits than its type: as a signed number, and as one without sign.
fn losses(code: &Code, d: &Decode, sink: &mut Sink) {
    // Entries of tables, complemented or not, stay within their type; of tables that are not trained yet nothing is known.
    if code.tables.iter().any(|t| t.values.is_empty())
        || !code.decode.nodes.iter().any(|op| matches!(op, Op::Pack(_) | Op::Vector(VectorOp::Add, ..)))
    {
        return;
    }
    let v = code.vector as usize;
    let (min, max) = code.value.range();
    let bits = code.value.bytes() * 8;
    let table = |t: u32, i: u32, k: usize| {
        let t = &code.tables[t as usize];
        i64::from(t.values[(i % t.entries) as usize * v + k])
    };
    let (min, max, mut room) = (i64::from(min), i64::from(max), Room::default());
    let last = u32::MAX >> (32 - code.window);
    let count = MOST.min(last.saturating_add(1));
    if !sink.may_look(u64::from(count) * code.decode.nodes.len() as u64) {
        return;
    }
    for i in 0..count {
        // All windows, or so many that lie anywhere.
        let window = if last < MOST { i } else { i.wrapping_mul(0x9E37_79B1) & last };
        let mut wide = [0i64; 4];
        code.decode.eval_wide(window, v, &table, &mut room, &mut wide[..v]);
        if let Some(bad) = wide[..v].iter().find(|x| !(min..=2 * max + 1).contains(*x)) {
            let kept = if bits == 8 { i64::from(*bad as i8) } else { i64::from(*bad as i16) };
            let message = format!("window {window:#x} gives {bad}, of which an entry of {bits} bits is {kept}");
            let cure =
                format!("entries lie within {min} and {max}: choose another type or expression, if that is not meant");
            sink.push(Diagnostic::warning(d.result.span, message, "").hint(cure));
            return;
        }
    }
}

/// Operators of bits whose right side is a sum of numbers without parentheses: `w & 15 - 8`.
fn binds_more_tightly(d: &Decode) -> Option<(&'static str, &'static str)> {
    fn within(e: &Expr) -> Option<(&'static str, &'static str)> {
        match &e.kind {
            ExprKind::Number(_) | ExprKind::Name(_) => None,
            ExprKind::Binary(outer, a, b) => {
                if let (BinaryOp::And | BinaryOp::Or | BinaryOp::Shr | BinaryOp::Shl, ExprKind::Binary(inner, x, y)) =
                    (outer, &b.kind)
                    && matches!(inner, BinaryOp::Add | BinaryOp::Sub)
                    && [x, y].iter().all(|n| matches!(n.kind, ExprKind::Number(_)))
                    // Parentheses belong to the span of what they hold.
                    && b.span == x.span.to(y.span)
                {
                    return Some((outer.text(), inner.text()));
                }
                within(a).or_else(|| within(b))
            }
            ExprKind::Unary(_, a) => within(a),
            ExprKind::Index(a, b) => within(a).or_else(|| within(b)),
            ExprKind::Call(_, l) | ExprKind::List(l) => l.iter().find_map(within),
            ExprKind::Range(a, b, c) | ExprKind::If(a, b, c) => [a, b, c].into_iter().find_map(|e| within(e)),
        }
    }
    d.lets.iter().map(|l| &l.1).chain([&d.result]).find_map(within)
}
