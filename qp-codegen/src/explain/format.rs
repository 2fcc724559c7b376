//! What a format costs and how its bits lie, as text for people.

use std::fmt::Write;

use super::decimal;
use crate::spec::format::{Arithmetic, Format, WeightOp};

/// Writing to a string cannot fail.
macro_rules! line {
    ($out:expr, $($t:tt)*) => {{ let _ = writeln!($out, $($t)*); }};
}

/// Everything about a format.
pub fn explain(f: &Format) -> String {
    let mut out = String::new();
    let o = &mut out;
    line!(o, "{}", f.name);
    let (codes, all) = f.rate();
    let of_fields: Vec<String> = f
        .fields
        .iter()
        .map(|field| match field.cover.weights() {
            Some(n) => format!("{} {}", field.name, decimal(f64::from(field.ty.bits()) / n as f64)),
            None => format!("{} by the matrix", field.name),
        })
        .collect();
    let fields = if of_fields.is_empty() { String::new() } else { format!(" ({})", of_fields.join(", ")) };
    line!(o, "  rate        {} bits a weight, {} with fields{fields}", decimal(codes), decimal(all));
    let s = if f.vector == 1 { "" } else { "s" };
    line!(o, "  codes       {} bits for {} weight{s}, without memory", f.window, f.vector);
    let offset = if f.offset == 0.into() { String::new() } else { format!(" + {}", f.offset) };
    let unit = if f.unit == 1.into() { String::new() } else { format!(" x {}", f.unit) };
    line!(o, "  entry       integer of {} bits{offset}{unit}", f.entry_bits);
    line!(o, "  weight      {}; each operation rounded to single precision", weight(f));
    for field in &f.fields {
        match field.entries {
            Some(n) => line!(o, "  table       {}[{n}]: {} of each matrix", field.name, field.ty.text()),
            None => line!(o, "  field       {}: {} for {}", field.name, field.ty.text(), field.cover.text()),
        }
    }
    line!(o, "  sums        weights times activations in single precision, in one order on every device");
    line!(o, "  encode      no: a format is imported, `qp import`, and not made");
    line!(o, "  hash        {}", f.hash());
    for l in &f.layouts {
        let both = if l.places.iter().all(|p| p.read.is_none()) { "every bit has one place" } else { "read only" };
        let ty = l.ty.map(|n| format!(", type {n}")).unwrap_or_default();
        let tensors: Vec<String> = l
            .tensors
            .iter()
            .map(|t| {
                let bits = t.element_bits();
                let size = if bits.is_multiple_of(8) { format!("{} bytes", bits / 8) } else { format!("{bits} bits") };
                let dims: Vec<String> = t.dims.iter().map(|d| d.text()).collect();
                format!("{}[{}] of {size}", t.name, dims.join(", "))
            })
            .collect();
        line!(o, "  layout      {}{ty}: {}; {both}", l.name, tensors.join(", "));
    }
    out
}

/// The weight as a formula, `e` for the entry.
fn weight(f: &Format) -> String {
    let mut texts: Vec<(String, bool)> = Vec::new();
    let atom = |t: &(String, bool)| if t.1 { t.0.clone() } else { format!("({})", t.0) };
    for op in &f.weight.ops {
        let text = match op {
            WeightOp::Entry => ("entry".to_string(), true),
            WeightOp::Const(c) => (c.to_string(), c.integer().is_some()),
            WeightOp::Field(i) => (f.fields[*i].name.clone(), true),
            WeightOp::Lookup(t, i) => (format!("{}[{}]", f.fields[*t].name, f.fields[*i].name), true),
            WeightOp::Neg(a) => (format!("-{}", atom(&texts[*a])), false),
            WeightOp::Binary(op, a, b) => {
                // A product's factors on the left need no parentheses.
                let product = |n: &usize| matches!(f.weight.ops[*n], WeightOp::Binary(Arithmetic::Mul, ..));
                let sum = matches!(op, Arithmetic::Add | Arithmetic::Sub);
                let left = if product(a) || (sum && texts[*a].1) { texts[*a].0.clone() } else { atom(&texts[*a]) };
                let right = if sum && product(b) { texts[*b].0.clone() } else { atom(&texts[*b]) };
                (format!("{left} {} {right}", op.text()), false)
            }
        };
        texts.push(text);
    }
    texts.pop().map(|t| t.0).unwrap_or_default()
}
