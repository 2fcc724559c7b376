//! Fields as products take them: numbers of runs of columns.

use super::{Inexact, NARROW, Origin, SHORTEST, TILE};
use crate::spec::Shape;
use crate::spec::format::{Arithmetic, Cover, Field, Format, Number, WeightOp};
use crate::syntax::number::Rational;

/// Columns of the runs whose numbers are stored as they are, where a number covers such; nothing in it for those of whole rows.
pub(super) fn stored(cover: Cover) -> Option<Option<u32>> {
    match cover {
        Cover::Matrix | Cover::Row => Some(None),
        Cover::Column => None,
        Cover::Rectangle(Shape { cols, .. }) | Cover::Flat(cols) => match cols {
            _ if cols.is_multiple_of(TILE) => Some(Some(TILE)),
            _ if (SHORTEST..TILE).contains(&cols) && cols.is_power_of_two() => Some(Some(cols)),
            _ => None,
        },
    }
}

/// The fields that an expression names beside tables.
pub(super) fn fields(ops: &[WeightOp]) -> impl Iterator<Item = usize> {
    ops.iter().filter_map(|op| match *op {
        WeightOp::Field(f) | WeightOp::Lookup(_, f) => Some(f),
        WeightOp::Entry | WeightOp::Const(_) | WeightOp::Neg(_) | WeightOp::Binary(..) => None,
    })
}

/// Whether an expression is computed where it is needed, from fields that are stored as they are.
pub(super) fn is_stored(format: &Format, ops: &[WeightOp]) -> bool {
    let looks_up = ops.iter().any(|op| matches!(op, WeightOp::Lookup(..)));
    !looks_up && fields(ops).all(|f| stored(format.fields[f].cover).is_some())
}

/// The value of an expression as a field of its own, which is stored for the longest runs in which it does not change.
pub(super) fn made(format: &Format, name: &str, ops: Vec<WeightOp>) -> Result<(Origin, Field), Inexact> {
    let (mut run, mut flat) = (None, false);
    for field in fields(&ops).map(|f| &format.fields[f]) {
        let cols = match field.cover {
            Cover::Matrix | Cover::Row => continue,
            Cover::Column => 1,
            Cover::Rectangle(s) => s.cols,
            Cover::Flat(n) => {
                flat = true;
                n
            }
        };
        let part = (1 << cols.trailing_zeros()).min(TILE);
        if part < SHORTEST {
            return Err(Inexact::Cover { field: field.name.clone(), cover: field.cover.text() });
        }
        run = Some(run.unwrap_or(TILE).min(part));
    }
    let cover = match run {
        None => Cover::Row,
        Some(run) if flat => Cover::Flat(run),
        Some(cols) => Cover::Rectangle(Shape { rows: 1, cols }),
    };
    let (name, ty) = (name.to_owned(), Number::F32);
    Ok((Origin::Value(super::Weight { ops }), Field { name, ty, cover, entries: None, width: 1, formula: None }))
}

/// The least and the greatest value of an expression of small integers and fractions, as multiples of one over the third number;
/// `None` if it is none.
pub(super) fn fraction(ops: &[WeightOp], ty: &dyn Fn(usize) -> Number) -> Option<(i64, i64, i64)> {
    let of = |c: Rational| {
        let (n, d) = (i64::try_from(c.parts().0).ok()?, i64::try_from(c.parts().1).ok()?);
        Some((n, n, d))
    };
    let mut nodes: Vec<(i64, i64, i64)> = Vec::new();
    for op in ops {
        let product = |(a, b, m): (i64, i64, i64), (c, d, n): (i64, i64, i64)| {
            let all = [a * c, a * d, b * c, b * d];
            Some((*all.iter().min()?, *all.iter().max()?, m * n))
        };
        let sum = |(a, b, m): (i64, i64, i64), (c, d, n): (i64, i64, i64)| {
            let by = crate::spec::index::gcd(m, n);
            (a * (n / by) + c * (m / by), b * (n / by) + d * (m / by), m / by * n)
        };
        let negative = |(a, b, n): (i64, i64, i64)| (-b, -a, n);
        let (least, most, parts) = match *op {
            WeightOp::Const(c) => of(c)?,
            WeightOp::Field(f) => match ty(f) {
                // A layout may store a number less one.
                Number::Unsigned(n) if n <= 8 => (0, 1 << n, 1),
                Number::Signed(n) if n <= 8 => (-(1 << (n - 1)), 1 << (n - 1), 1),
                _ => return None,
            },
            WeightOp::Neg(a) => negative(nodes[a]),
            WeightOp::Binary(Arithmetic::Add, a, b) => sum(nodes[a], nodes[b]),
            WeightOp::Binary(Arithmetic::Sub, a, b) => sum(nodes[a], negative(nodes[b])),
            WeightOp::Binary(Arithmetic::Mul, a, b) => product(nodes[a], nodes[b])?,
            WeightOp::Binary(Arithmetic::Div, a, b) => match (&ops[b], nodes[b]) {
                (WeightOp::Const(_), (n, _, d)) if n > 0 => product(nodes[a], (d, d, n))?,
                _ => return None,
            },
            WeightOp::Entry | WeightOp::Lookup(..) => return None,
        };
        let most_of = 1 << NARROW;
        if parts > most_of || least < -most_of * parts || most > most_of * parts {
            return None;
        }
        nodes.push((least, most, parts));
    }
    nodes.pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_for_other_columns_than_runs_are_stored_for_parts_of_them() {
        let text = "quantizer q {
            bits 4
            values i8
            decode w { [w] }
            field s : f16 per 1 x 96
            field z : u4 per 1 x 96
            weight e { (e - z) * s }
        }";
        let library = crate::spec::load_str("test", text).unwrap_or_else(|e| panic!("{e}"));
        let terms = crate::spec::terms::Terms::of(&library.formats[0]).unwrap();
        assert_eq!((terms.run, terms.integers(), terms.fields.len()), (Some(32), (-16, 15), 1));
        assert_eq!(terms.near.map(|near| near.times), Some(1));
    }

    #[test]
    fn fractions_have_one_denominator() {
        let c = |n: i64| WeightOp::Const(Rational::from(n));
        // (1 - 2 · x) / 8 with x of a bit.
        let ops = [
            c(1),
            c(2),
            WeightOp::Field(0),
            WeightOp::Binary(Arithmetic::Mul, 1, 2),
            WeightOp::Binary(Arithmetic::Sub, 0, 3),
            c(8),
            WeightOp::Binary(Arithmetic::Div, 4, 5),
        ];
        assert_eq!(fraction(&ops, &|_| Number::Unsigned(1)), Some((-3, 1, 8)));
        assert_eq!(fraction(&ops, &|_| Number::F16), None);
        let ops = [WeightOp::Field(0), c(-3), WeightOp::Binary(Arithmetic::Div, 0, 1)];
        assert_eq!(fraction(&ops, &|_| Number::Unsigned(1)), None);
    }
}
