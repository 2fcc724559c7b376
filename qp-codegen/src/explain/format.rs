//! What a format costs and how its bits lie, as text for people.

use std::fmt::Write;

use super::decimal;
use crate::cuda::Device;
use crate::kernels::Span;
use crate::kernels::grouped;
use crate::kernels::grouped::layout::Relaid;
use crate::reader;
use crate::spec::Shape;
use crate::spec::expr::Op;
use crate::spec::format::{Arithmetic, Format, Unmade, Weight, WeightOp};
use crate::spec::terms::{Digits, Near, Origin, Terms};

/// Writing to a string cannot fail.
macro_rules! line {
    ($out:expr, $($t:tt)*) => {{ let _ = writeln!($out, $($t)*); }};
}

/// Everything about a format; `shape` is the matrix whose bits and time on a device are told, rows x columns.
pub fn explain(f: &Format, shape: Shape) -> String {
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
    match &f.trellis {
        None => line!(o, "  codes       {} bits for {} weight{s}, without memory", f.window, f.vector),
        Some(t) => {
            let (n, v, k) = (f.window, f.vector, t.step);
            line!(o, "  codes       windows of {n} bits for {v} weight{s}, {k} bits apart");
            let (rows, cols, bits) = (t.block.rows, t.block.cols, t.bits(f.vector));
            line!(o, "  block       {rows} x {cols} weights in {bits} bits, whose first follows the last");
        }
    }
    let offset = if f.offset == 0.into() { String::new() } else { format!(" + {}", f.offset) };
    let unit = if f.unit == 1.into() { String::new() } else { format!(" x {}", f.unit) };
    match f.numbers.is_empty() {
        true => line!(o, "  entry       integer of {} bits{offset}{unit}", f.entry_bits),
        false => line!(o, "  entry       sum of numbers of tables, rounded once to single precision"),
    }
    line!(o, "  weight      {}; each operation rounded to single precision", weight(f));
    for (name, steps) in [("input ", &f.input), ("output", &f.output)] {
        if !steps.is_empty() {
            line!(o, "  {name}      {}", f.steps_text(steps));
        }
    }
    for field in &f.fields {
        match field.entries {
            Some(n) if field.width > 1 => {
                let (name, ty, v) = (&field.name, field.ty.text(), field.width);
                line!(o, "  table       {name}[{n}]: vectors of {v} {ty} of each matrix");
            }
            Some(n) => line!(o, "  table       {}[{n}]: {} of each matrix", field.name, field.ty.text()),
            None => line!(o, "  field       {}: {} for {}", field.name, field.ty.text(), field.cover.text()),
        }
    }
    products(f, shape, o);
    match f.order() {
        Err(why) => line!(o, "  encode      no: {why}"),
        Ok(_) if f.written().is_none() => line!(o, "  encode      no: {}", Unmade::NoLayout),
        Ok(order) => {
            let s = if order.is_empty() {
                "codes to the nearest"
            } else {
                "fields by formula, codes to the nearest, refined"
            };
            line!(o, "  encode      {s}");
            for field in order.iter().map(|i| &f.fields[*i]) {
                let formula = field.formula.as_ref().map(|e| e.text(f)).unwrap_or_default();
                line!(o, "  formula     {} = {formula}", field.name);
            }
        }
    }
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

/// How products are computed.
fn products(f: &Format, shape: Shape, o: &mut String) {
    let terms = match Terms::of(f) {
        Ok(terms) => terms,
        Err(why) => {
            line!(
                o,
                "  products    weights times activations in single precision, in one order on every device: {why}"
            );
            return;
        }
    };
    let fields = &terms.fields;
    let of_format = |w: &Weight| expression(&w.ops, &|i| f.fields[i].name.clone());
    let formula = |w: &Weight| {
        expression(&w.ops, &|i| match &fields[i] {
            (Origin::Field(_), field) => field.name.clone(),
            // The whole expression.
            (Origin::Value(value), _) => of_format(value),
        })
    };
    let highest = terms.highest();
    let of = if terms.rounded > 0 || terms.own { ", rounded from the entries," } else { "" };
    line!(o, "  products    exact: integers within {} to {highest}{of} times activations of 15 bits", terms.lowest);
    if let Some(Near { times, add }) = &terms.near {
        let add = of_format(add);
        let by = if *times == 1 { String::new() } else { format!("{times} times ") };
        line!(o, "  integer     {by}the entry's, plus {by}{add}");
    }
    match terms.stream.as_ref().map(|s| &s.digits) {
        Some(Digits::Bytes { .. }) => {
            line!(
                o,
                "  digits      the four bytes of a word of each window; an integer is {} times their sum, less",
                terms.times
            );
        }
        Some(Digits::Book(book)) => {
            let windows =
                if book.decode.op(book.word) == &Op::Window { "windows" } else { "what follows from windows" };
            let size = decimal(f64::from(f.vector << book.bits) / 512.0);
            line!(o, "  digits      looked up by {windows}, in a table of {size} KiB, in shared memory where it fits");
        }
        None => (),
    }
    match terms.run {
        None => line!(o, "  slope       {}, of a row, multiplied at the end", formula(&terms.slope)),
        Some(run) => {
            line!(o, "  slope       {}, in runs of {run} columns", formula(&terms.slope));
            if let Some(rest) = &terms.rest {
                line!(o, "  rest        {}, times the sum of a run's activations", formula(rest));
            }
            if let Some(zero) = &terms.zero {
                line!(o, "  zero        {}, added to the integer", formula(zero));
            }
            let bits = terms.precision(shape.cols) - terms.span as i32;
            line!(o, "  sums        of 64 bits; slopes are whole multiples of the row's unit, up to 2^{bits}");
        }
    }
    let Shape { rows, cols } = shape;
    if let Err(why) = reader::possible(f, shape) {
        line!(o, "  on a GPU    {why}; `--shape` names another matrix");
        return;
    }
    if !terms.fits(shape) {
        line!(
            o,
            "  on a GPU    in single precision: results of {rows} x {cols} weights are too many to transform, or runs are cut"
        );
        return;
    }
    let bytes = Relaid::new(&terms, shape).bytes();
    let bits = bytes as f64 * 8.0 / shape.len() as f64;
    line!(o, "  on a GPU    {} bits a weight of {rows} x {cols}, fields included", decimal((bits * 1e3).round() / 1e3));
    let op = grouped::Product { terms: &terms, shape, batch: 1, y: Span::rows(rows), accumulate: false };
    let seconds = |device: &Device| grouped::Launch::ranked(&op, device)[0].0;
    line!(o, "{}", super::time(&seconds, bytes));
}

/// The weight as a formula, `entry` for the entry.
fn weight(f: &Format) -> String {
    expression(&f.weight.ops, &|i| f.fields[i].name.clone())
}

/// An expression as a formula.
fn expression(ops: &[WeightOp], name: &dyn Fn(usize) -> String) -> String {
    let mut texts: Vec<(String, bool)> = Vec::new();
    let atom = |t: &(String, bool)| if t.1 { t.0.clone() } else { format!("({})", t.0) };
    for op in ops {
        let text = match op {
            WeightOp::Entry => ("entry".to_string(), true),
            WeightOp::Const(c) => (c.to_string(), c.integer().is_some()),
            WeightOp::Field(i) => (name(*i), true),
            WeightOp::Lookup(t, i) => (format!("{}[{}]", name(*t), name(*i)), true),
            WeightOp::Neg(a) => (format!("-{}", atom(&texts[*a])), false),
            WeightOp::Binary(op, a, b) => {
                // A product's factors on the left need no parentheses.
                let product = |n: &usize| matches!(ops[*n], WeightOp::Binary(Arithmetic::Mul, ..));
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

#[cfg(test)]
mod tests {
    use super::{Shape, explain};
    use crate::formats;

    const SHAPE: Shape = Shape { rows: 4096, cols: 4096 };

    #[test]
    fn it_says_how_products_are_computed_or_why_not_exactly() {
        let of = |name: &str| explain(formats::get(name).unwrap(), SHAPE);
        let text = of("gptq_int4_g128");
        for line in [
            "  products    exact: integers within 0 to 15 times activations of 15 bits\n",
            "  slope       s, in runs of 128 columns\n",
            "  zero        -z, added to the integer\n",
            "  sums        of 64 bits; slopes are whole multiples of the row's unit, up to 2^26\n",
            "  on a GPU    4.197 bits a weight of 4096 x 4096, fields included\n",
            "  a token     about ",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        for line in [
            "  encode      fields by formula, codes to the nearest, refined\n",
            "  formula     s = (max(max(w), 0) - min(min(w), 0)) / 15\n",
            "  formula     z = round(-min(min(w), 0) / s)\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        let text = of("iq2_xxs");
        assert!(text.contains("  encode      no: no formula for "), "{text}");
        assert!(of("int8_channel").contains("  slope       s, of a row, multiplied at the end\n"));
        assert!(of("fp8_channel").contains("  products    exact: integers within -245760 to 278527 times activations"));
        assert!(
            of("nf4").contains("  products    exact: integers within -16384 to 49151, rounded from the entries, times")
        );
        let text = of("iq1_m");
        for line in [
            "  products    exact: integers within -11 to 20 times activations of 15 bits\n",
            "  integer     8 times the entry's, plus 8 times (1 - 2 * down) / 8\n",
            "  slope       d * (2 * s + 1) * (1/8), in runs of 16 columns\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        assert!(
            of("nf4_double")
                .contains("  slope       (1/16384) * (levels[peak] * span + mean), in runs of 64 columns\n")
        );
        for (name, digits) in [
            ("qtip_hyb_2", "what follows from windows, in a table of 4 KiB"),
            ("aqlm_1x16", "windows, in a table of 1024 KiB"),
        ] {
            let text = of(name);
            assert!(text.contains(&format!("  digits      looked up by {digits}, in shared memory")), "{text}");
        }
        let text = "quantizer q { bits 4 values i8 decode w { [w] } field s : f16 per 1 x 8 weight e { e * s } }";
        let library = crate::spec::load_str("test", text).unwrap_or_else(|e| panic!("{e}"));
        let text = explain(&library.formats[0], SHAPE);
        assert!(text.contains("in one order on every device: `s` is for 1 x 8"), "{text}");
    }

    #[test]
    fn bits_on_a_device_are_those_of_the_shape() {
        let of = |rows, cols| explain(formats::get("q4_0").unwrap(), Shape { rows, cols });
        assert!(of(256, 768).contains("bits a weight of 256 x 768,"), "{}", of(256, 768));
        let none = of(7, 50);
        assert!(none.contains("7 x 50 weights do not fit") && none.contains("--shape"), "{none}");
    }
}
