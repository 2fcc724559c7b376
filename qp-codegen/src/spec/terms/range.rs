//! Which integers a format's codes give.

use super::Inexact;
use crate::spec::expr::{Node, Op, Room, VectorOp, WordOp};
use crate::spec::format::Format;
use crate::spec::mask;

/// Most bits of a code whose integers are written out where they depend on the matrix.
const WRITTEN: u32 = 16;
/// Bits that the integers of a matrix's own tables are rounded to.
const OWN: u32 = 16;

/// The least and the greatest integer of a format's entries, or bounds of them where codes are too many to look at each.
pub(super) fn of(format: &Format) -> Result<(i32, i32), Inexact> {
    if !format.numbers.is_empty() {
        let half = 1 << (OWN - 1);
        return if format.window <= WRITTEN { Ok((-half, half - 1)) } else { Err(Inexact::Long(format.window)) };
    }
    if !format.has_book() {
        return Ok(bounds(format));
    }
    let (mut integers, mut room) = (vec![0; format.vector as usize], Room::default());
    let (mut low, mut high) = (i32::MAX, i32::MIN);
    for code in 0..1u32 << format.window {
        format.integers(code, &[], &mut room, &mut integers);
        for &i in &integers {
            // The integers of a checked format are of its entries' type.
            (low, high) = (low.min(i as i32), high.max(i as i32));
        }
    }
    Ok((low, high))
}

/// Bounds by the operations of the decode expression.
fn bounds(format: &Format) -> (i32, i32) {
    let half = 1i64 << (format.entry_bits - 1);
    let v = format.vector as usize;
    // Of each node, as a word or as each entry of a vector.
    let mut nodes: Vec<Vec<(i64, i64)>> = Vec::with_capacity(format.decode.nodes.len());
    let any = (0, i64::from(u32::MAX));
    // Words of the highest bit are negative integers.
    let signed =
        |(low, high): (i64, i64)| if high > i32::MAX.into() { (i32::MIN.into(), i32::MAX.into()) } else { (low, high) };
    let complement = |(low, high): (i64, i64)| (low.min(-high - 1), high.max(-low - 1));
    for op in &format.decode.nodes {
        let of = |n: &Node| nodes[n.0 as usize][0];
        let both = |a: &Node, b: &Node, f: &dyn Fn((i64, i64), (i64, i64)) -> (i64, i64)| {
            let (a, b) = (&nodes[a.0 as usize], &nodes[b.0 as usize]);
            a.iter().zip(b).map(|(a, b)| f(*a, *b)).collect()
        };
        nodes.push(match op {
            Op::Window => vec![(0, mask(format.window).into())],
            Op::Const(c) => vec![(i64::from(*c), i64::from(*c))],
            Op::Not(_) => vec![any],
            Op::Binary(op, a, b) => vec![match (op, of(a), of(b)) {
                (WordOp::And, a, b) => (0, a.1.min(b.1)),
                (WordOp::Shr, a, (from, to)) if from == to && from < 32 => (a.0 >> from, a.1 >> from),
                _ => any,
            }],
            Op::Byte(..) => vec![(0, u8::MAX.into())],
            Op::ByteSum(_) => vec![(0, 4 * i64::from(u8::MAX))],
            Op::Bit(..) => vec![(0, 1)],
            Op::Lookup { table, .. } => {
                let values = format.tables.get(*table as usize).map(|t| &t.values[..]).unwrap_or_default();
                let of = |k: usize| values.iter().skip(k).step_by(v).map(|&x| i64::from(x));
                (0..v).map(|k| of(k).fold((i64::MAX, i64::MIN), |(l, h), x| (l.min(x), h.max(x)))).collect()
            }
            Op::Signs(_) => vec![(-1, 0); v],
            Op::Pack(words) => words.iter().map(|n| signed(of(n))).collect(),
            Op::Vector(VectorOp::Add, a, b) => both(a, b, &|a, b| (a.0 + b.0, a.1 + b.1)),
            Op::Vector(VectorOp::Xor, a, b) => both(a, b, &|a, b| match (a, b) {
                (x, (-1, 0)) | ((-1, 0), x) => complement(x),
                _ => (-half, half - 1),
            }),
        });
    }
    let last = nodes.last().map(|n| &n[..]).unwrap_or_default();
    let (low, high) = last.iter().fold((0, 0), |(l, h), x| (x.0.min(l), x.1.max(h)));
    // The integers of a checked format are of its entries' type.
    (low.max(-half) as i32, high.min(half - 1) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats;

    #[test]
    fn bounds_hold_all_integers_and_little_more() {
        for name in ["iq2_xxs", "iq3_s", "iq1_s", "e8p", "q4_0", "iq4_nl", "exl3_mul1_3"] {
            let format = formats::get(name).unwrap();
            let (found, all) = (bounds(format), of(format).unwrap());
            assert!(found.0 <= all.0 && found.1 >= all.1, "{name}: {found:?} {all:?}");
        }
        for (name, wanted) in [("iq2_xxs", (-44, 44)), ("iq3_xxs", (-63, 63)), ("iq1_s", (-1, 1))] {
            assert_eq!(bounds(formats::get(name).unwrap()), wanted, "{name}");
        }
        assert_eq!(of(formats::get("aqlm_2x8").unwrap()), Ok((-32_768, 32_767)));
    }
}
