//! The canonical text of a format and its hash.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::canonical::{PER_LINE, decode};
use super::format::{Arithmetic, Format, Layout, Place, Target, WeightOp};
use super::index::{Index, Var};
use crate::syntax::number::Rational;

/// Writing to a string cannot fail.
macro_rules! line {
    ($out:expr, $($t:tt)*) => {{ let _ = writeln!($out, $($t)*); }};
}

/// See [`Format::canonical`].
pub fn text(f: &Format) -> String {
    let mut out = format!("quantizer {} {}", f.name, body(f, true));
    f.layouts.iter().for_each(|l| layout(f, l, &mut out));
    out
}

/// See [`Format::hash`].
pub fn hash(f: &Format) -> String {
    Sha256::digest(body(f, false)).iter().map(|b| format!("{b:02x}")).collect()
}

/// Everything in braces. Formulas change no meaning of bits, so that a format with them is the same as without.
fn body(f: &Format, formulas: bool) -> String {
    let mut out = "{\n".to_string();
    let o = &mut out;
    match &f.trellis {
        None => {
            let vector = if f.vector == 1 { String::new() } else { format!(" for {}", f.vector) };
            line!(o, "    bits   {}{vector}", f.window);
        }
        Some(t) => {
            line!(o, "    window {}", f.window);
            line!(o, "    vector {}", f.vector);
            line!(o, "    step   {}", t.step);
            line!(o, "    block  {} x {}", t.block.rows, t.block.cols);
            let [row, col] = t.order.each_ref().map(Index::text);
            line!(o, "    order  {} {{ [{row}, {col}] }}", Var::First.name());
        }
    }
    let zero = Rational::from(0);
    let offset = match f.offset.compare(zero) {
        Some(std::cmp::Ordering::Greater) => format!(" + {}", f.offset),
        Some(std::cmp::Ordering::Less) => format!(" {}", f.offset),
        _ => String::new(),
    };
    if f.numbers.is_empty() {
        line!(o, "    values i{}{offset}", f.entry_bits);
    }
    if f.unit != 1.into() {
        line!(o, "    unit   {}", f.unit);
    }
    for t in &f.tables {
        line!(o, "    table  {}[{}] = [", t.name, t.entries);
        for row in t.values.chunks(PER_LINE) {
            let row: Vec<String> = row.iter().map(i32::to_string).collect();
            line!(o, "        {},", row.join(", "));
        }
        line!(o, "    ]");
    }
    line!(o, "    decode w {{");
    let of_matrix = f.numbers.iter().map(|n| f.fields[*n].name.as_str());
    let tables: Vec<&str> = f.tables.iter().map(|t| t.name.as_str()).chain(of_matrix).collect();
    decode(&tables, &f.decode, "        ", o);
    line!(o, "    }}");
    for field in &f.fields {
        match field.entries {
            Some(n) => line!(o, "    table  {}[{n}] : {} per matrix", field.name, field.ty.text()),
            None => {
                let formula = field.formula.as_ref().filter(|_| formulas);
                let formula = formula.map(|e| format!(" = {}", e.text(f))).unwrap_or_default();
                line!(o, "    field  {} : {} per {}{formula}", field.name, field.ty.text(), field.cover.text());
            }
        }
    }
    line!(o, "    weight {} {{", entry_name(f));
    line!(o, "        {}", weight(f));
    line!(o, "    }}");
    for (name, steps) in [("input ", &f.input), ("output", &f.output)] {
        if !steps.is_empty() {
            line!(o, "    {name} {}", f.steps_text(steps));
        }
    }
    line!(o, "}}");
    out
}

/// A name for the entry that no field has.
fn entry_name(f: &Format) -> String {
    let taken = |n: &String| f.fields.iter().any(|field| field.name == *n);
    let mut names = std::iter::once("e".to_string()).chain((1..).map(|i| format!("e{i}")));
    names.find(|n| !taken(n)).unwrap_or_default()
}

fn weight(f: &Format) -> String {
    let mut texts: Vec<String> = Vec::new();
    for op in &f.weight.ops {
        let text = match op {
            WeightOp::Entry => entry_name(f),
            WeightOp::Const(c) if c.integer().is_some_and(|i| i >= 0) => c.to_string(),
            WeightOp::Const(c) => format!("({c})"),
            WeightOp::Field(i) => f.fields[*i].name.clone(),
            WeightOp::Lookup(t, i) => format!("{}[{}]", f.fields[*t].name, f.fields[*i].name),
            WeightOp::Neg(a) => format!("(-{})", texts[*a]),
            WeightOp::Binary(op, a, b) => {
                let op: &Arithmetic = op;
                format!("({} {} {})", texts[*a], op.text(), texts[*b])
            }
        };
        texts.push(text);
    }
    texts.pop().unwrap_or_default()
}

fn layout(f: &Format, l: &Layout, out: &mut String) {
    line!(out, "\nlayout {} of {} {{", l.name, f.name);
    if let Some(ty) = l.ty {
        line!(out, "    type   {ty}");
    }
    for t in &l.tensors {
        let dims: Vec<String> = t.dims.iter().map(Index::text).collect();
        let dims = dims.join(", ");
        if t.record {
            line!(out, "    record {}[{dims}] {{", t.name);
            for (name, ty, count) in &t.members {
                let count = if *count == 1 { String::new() } else { format!("[{count}]") };
                line!(out, "        {name} : {}{count}", ty.text());
            }
            line!(out, "    }}");
        } else {
            line!(out, "    tensor {} : {}[{dims}]", t.name, t.members[0].1.text());
        }
    }
    l.places.iter().for_each(|p| line!(out, "    {}", place(f, l, p)));
    line!(out, "}}");
}

fn place(f: &Format, l: &Layout, p: &Place) -> String {
    let (name, count, width) = match p.target {
        Target::Code => ("code", 2, f.window),
        Target::Stream => ("stream", 2, p.bits.1),
        Target::Field(i) => {
            let field = &f.fields[i];
            (field.name.as_str(), field.indices(), field.ty.bits())
        }
    };
    let vars = [Var::First.name(), Var::Second.name()][..count].join(", ");
    let mut out = format!("{name}({vars})");
    if p.target == Target::Stream {
        let _ = write!(out, "[{}]", Var::Bit.name());
    } else if p.bits != (0, width) {
        let _ = write!(out, "[{}..{}]", p.bits.0, p.bits.1);
    }
    if p.less > 0 {
        let _ = write!(out, " - {}", p.less);
    }
    let t = &l.tensors[p.tensor];
    let indices: Vec<String> = p.indices.iter().map(|i| i.as_ref().map_or("*".into(), Index::text)).collect();
    let _ = write!(out, " in {}[{}]", t.name, indices.join(", "));
    if t.record {
        let (member, _, count) = &t.members[p.member];
        let _ = write!(out, ".{member}");
        if *count > 1 {
            let _ = write!(out, "[{}]", p.element.text());
        }
    }
    if p.bit != Index::Const(0) {
        let _ = write!(out, " bit {}", p.bit.text());
    }
    if let Some(read) = &p.read {
        let _ = write!(out, " read {} {{ {} }}", Var::Stored.name(), read.text());
    }
    out
}
