//! Formulas of fields: how an encoder finds the numbers beside the codes.
//!
//! A formula says the number of a field from the weights that it covers and from fields that cover as much or more. It
//! changes nothing of what bits mean, so it is no part of a format's identity; with a formula for every field a format
//! can be made, without it can only be imported. Values are computed in double precision by operations that are the
//! same on every machine.

use super::format::{Arithmetic, Format};
use crate::syntax::number::Rational;

/// A number made of all weights that a field's number covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// The largest.
    Max,
    /// The smallest.
    Min,
    /// The largest magnitude.
    AbsMax,
    /// The mean magnitude.
    AbsMean,
    /// The mean.
    Mean,
    /// The root mean square.
    Rms,
}

impl Reduction {
    /// All of them.
    pub const ALL: [Reduction; 6] =
        [Reduction::Max, Reduction::Min, Reduction::AbsMax, Reduction::AbsMean, Reduction::Mean, Reduction::Rms];

    /// As written.
    pub fn name(self) -> &'static str {
        match self {
            Reduction::Max => "max",
            Reduction::Min => "min",
            Reduction::AbsMax => "absmax",
            Reduction::AbsMean => "absmean",
            Reduction::Mean => "mean",
            Reduction::Rms => "rms",
        }
    }
}

/// Sums and extremes of weights, from which every [`Reduction`] follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Covered {
    count: f64,
    sum: f64,
    magnitudes: f64,
    squares: f64,
    max: f64,
    min: f64,
}

impl Default for Covered {
    fn default() -> Self {
        let (max, min) = (f64::NEG_INFINITY, f64::INFINITY);
        Covered { count: 0.0, sum: 0.0, magnitudes: 0.0, squares: 0.0, max, min }
    }
}

impl Covered {
    /// Adds weights.
    pub fn add(&mut self, weights: &[f32]) {
        for &w in weights {
            let w = f64::from(w);
            self.sum += w;
            self.magnitudes += w.abs();
            self.squares += w * w;
            self.max = self.max.max(w);
            self.min = self.min.min(w);
        }
        self.count += weights.len() as f64;
    }

    /// Adds what `other` has seen.
    pub fn join(&mut self, other: &Covered) {
        self.count += other.count;
        self.sum += other.sum;
        self.magnitudes += other.magnitudes;
        self.squares += other.squares;
        self.max = self.max.max(other.max);
        self.min = self.min.min(other.min);
    }

    /// One number of the weights.
    pub fn value(&self, of: Reduction) -> f64 {
        match of {
            Reduction::Max => self.max,
            Reduction::Min => self.min,
            Reduction::AbsMax => self.max.max(-self.min),
            Reduction::AbsMean => self.magnitudes / self.count,
            Reduction::Mean => self.sum / self.count,
            Reduction::Rms => (self.squares / self.count).sqrt(),
        }
    }
}

/// A node of a formula; nodes refer to earlier ones.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FormulaOp {
    /// A constant.
    Const(Rational),
    /// A number of the weights covered.
    Of(Reduction),
    /// The number of another field that covers these weights.
    Field(usize),
    /// The negative of a node.
    Neg(usize),
    /// An operation on two nodes.
    Binary(Arithmetic, usize, usize),
    /// The larger of two nodes.
    Max(usize, usize),
    /// The smaller of two nodes.
    Min(usize, usize),
    /// The nearest whole number, halves away from 0.
    Round(usize),
    /// The next whole number below.
    Floor(usize),
    /// The logarithm to base 2.
    Log2(usize),
    /// 2 to the power of a node.
    Exp2(usize),
    /// The third node if the first is less than the second, else the fourth.
    Select([usize; 4]),
}

impl FormulaOp {
    /// The node with other indices of the nodes that it uses, visited in order.
    fn map(&self, f: &mut dyn FnMut(usize) -> usize) -> FormulaOp {
        match *self {
            FormulaOp::Const(_) | FormulaOp::Of(_) | FormulaOp::Field(_) => self.clone(),
            FormulaOp::Neg(a) => FormulaOp::Neg(f(a)),
            FormulaOp::Round(a) => FormulaOp::Round(f(a)),
            FormulaOp::Floor(a) => FormulaOp::Floor(f(a)),
            FormulaOp::Log2(a) => FormulaOp::Log2(f(a)),
            FormulaOp::Exp2(a) => FormulaOp::Exp2(f(a)),
            FormulaOp::Binary(op, a, b) => {
                let a = f(a);
                FormulaOp::Binary(op, a, f(b))
            }
            FormulaOp::Max(a, b) => {
                let a = f(a);
                FormulaOp::Max(a, f(b))
            }
            FormulaOp::Min(a, b) => {
                let a = f(a);
                FormulaOp::Min(a, f(b))
            }
            FormulaOp::Select(n) => FormulaOp::Select(n.map(f)),
        }
    }
}

/// How a field's number follows from the weights that it covers; the last node is the result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Formula {
    /// Nodes, each after those it uses.
    pub ops: Vec<FormulaOp>,
}

impl Formula {
    /// The formula whose result is node `last` of `ops`: nodes that it needs, in the order of first need.
    pub fn of(ops: &[FormulaOp], last: usize) -> Formula {
        fn visit(ops: &[FormulaOp], n: usize, new: &mut [Option<usize>], out: &mut Vec<FormulaOp>) -> usize {
            if let Some(at) = new[n] {
                return at;
            }
            let op = ops[n].map(&mut |a| visit(ops, a, new, out));
            out.push(op);
            new[n] = Some(out.len() - 1);
            out.len() - 1
        }
        let mut out = Vec::new();
        visit(ops, last, &mut vec![None; ops.len()], &mut out);
        Formula { ops: out }
    }

    /// The fields that it names.
    pub fn fields(&self) -> impl Iterator<Item = usize> {
        self.ops.iter().filter_map(|op| match op {
            FormulaOp::Field(f) => Some(*f),
            _ => None,
        })
    }

    /// The number for weights of which `covered` tells, `field` being the numbers of other fields there. An operation whose
    /// result is no number, as the quotient of two zeros, gives 0; another quotient by 0 is infinite, with the sign of what
    /// is divided.
    pub fn value(&self, covered: &Covered, field: &dyn Fn(usize) -> f64) -> f64 {
        let mut nodes: Vec<f64> = Vec::with_capacity(self.ops.len());
        for op in &self.ops {
            let x = match *op {
                FormulaOp::Const(c) => {
                    let (n, d) = c.parts();
                    n as f64 / d as f64
                }
                FormulaOp::Of(r) => covered.value(r),
                FormulaOp::Field(f) => field(f),
                FormulaOp::Neg(a) => -nodes[a],
                FormulaOp::Binary(op, a, b) => match op {
                    Arithmetic::Add => nodes[a] + nodes[b],
                    Arithmetic::Sub => nodes[a] - nodes[b],
                    Arithmetic::Mul => nodes[a] * nodes[b],
                    // Of zeros there is one.
                    Arithmetic::Div => nodes[a] / if nodes[b] == 0.0 { 0.0 } else { nodes[b] },
                },
                FormulaOp::Max(a, b) => nodes[a].max(nodes[b]),
                FormulaOp::Min(a, b) => nodes[a].min(nodes[b]),
                FormulaOp::Round(a) => nodes[a].round(),
                FormulaOp::Floor(a) => nodes[a].floor(),
                FormulaOp::Log2(a) => log2(nodes[a]),
                FormulaOp::Exp2(a) => exp2(nodes[a]),
                FormulaOp::Select([a, b, x, y]) => nodes[if nodes[a] < nodes[b] { x } else { y }],
            };
            nodes.push(if x.is_nan() { 0.0 } else { x });
        }
        nodes.last().copied().unwrap_or(0.0)
    }

    /// As written, with the names of the format's fields.
    pub fn text(&self, format: &Format) -> String {
        /// How tightly the outermost operation binds: of a choice, a sum, a product, a power, an atom.
        const CHOICE: u32 = 0;
        const SUM: u32 = 1;
        const PRODUCT: u32 = 2;
        const POWER: u32 = 3;
        const ATOM: u32 = 4;
        let mut texts: Vec<(String, u32)> = Vec::new();
        for op in &self.ops {
            let at = |n: usize, least: u32| match &texts[n] {
                (text, binds) if *binds >= least => text.clone(),
                (text, _) => format!("({text})"),
            };
            let call = |name: &str, args: &[usize]| {
                let args: Vec<String> = args.iter().map(|a| at(*a, CHOICE)).collect();
                (format!("{name}({})", args.join(", ")), ATOM)
            };
            let text = match *op {
                FormulaOp::Const(c) if c.integer().is_some_and(|i| i >= 0) => (c.to_string(), ATOM),
                FormulaOp::Const(c) => (c.to_string(), CHOICE),
                FormulaOp::Of(r) => (format!("{}(w)", r.name()), ATOM),
                FormulaOp::Field(f) => (format.fields[f].name.clone(), ATOM),
                FormulaOp::Neg(a) => (format!("-{}", at(a, ATOM)), POWER),
                FormulaOp::Binary(op, a, b) => {
                    let binds = if matches!(op, Arithmetic::Add | Arithmetic::Sub) { SUM } else { PRODUCT };
                    (format!("{} {} {}", at(a, binds), op.text(), at(b, binds + 1)), binds)
                }
                FormulaOp::Max(a, b) => call("max", &[a, b]),
                FormulaOp::Min(a, b) => call("min", &[a, b]),
                FormulaOp::Round(a) => call("round", &[a]),
                FormulaOp::Floor(a) => call("floor", &[a]),
                FormulaOp::Log2(a) => call("log2", &[a]),
                FormulaOp::Exp2(a) => (format!("2 ** {}", at(a, ATOM)), POWER),
                FormulaOp::Select([a, b, x, y]) => {
                    let (a, b, x, y) = (at(a, SUM), at(b, SUM), at(x, SUM), at(y, CHOICE));
                    (format!("if {a} < {b} then {x} else {y}"), CHOICE)
                }
            };
            texts.push(text);
        }
        texts.pop().map(|t| t.0).unwrap_or_default()
    }
}

/// The logarithm to base 2, of powers of two exactly; computed from sums and products, so that machines agree.
fn log2(x: f64) -> f64 {
    if x <= 0.0 || !x.is_finite() {
        return if x == 0.0 { f64::NEG_INFINITY } else { x.ln() };
    }
    // Subnormal numbers are made normal.
    let (x, below) = if x < f64::MIN_POSITIVE { (x * 2f64.powi(64), 64.0) } else { (x, 0.0) };
    let bits = x.to_bits();
    let exponent = (bits >> 52) as i64 - 1023;
    let mantissa = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    // ln m = 2 artanh((m - 1) / (m + 1)), a series in the square of at most 1/9.
    let z = (mantissa - 1.0) / (mantissa + 1.0);
    let series = (0..20).rev().fold(0.0, |sum, k| sum * z * z + 1.0 / f64::from(2 * k + 1));
    exponent as f64 - below + 2.0 * z * series / std::f64::consts::LN_2
}

/// 2 to the power of x, of whole numbers exactly; computed from sums and products, so that machines agree.
fn exp2(x: f64) -> f64 {
    if x.is_nan() || x > 1100.0 {
        return x;
    }
    let whole = x.floor().max(-1100.0);
    let y = (x.max(-1100.0) - whole) * std::f64::consts::LN_2;
    let fraction = (1..20).rev().fold(1.0, |sum, k| 1.0 + sum * y / f64::from(k));
    // In two steps, since the power alone may lie beyond all numbers.
    let half = (whole / 2.0).floor();
    fraction * 2f64.powi(half as i32) * 2f64.powi((whole - half) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_and_powers_are_those_of_the_library() {
        for x in [1e-310, 1e-30, 0.1, 0.5, 1.0, 1.5, 2.0, 3.7, 6.0, 1e30] {
            assert!((log2(x) - x.log2()).abs() < 1e-12 * x.log2().abs().max(1.0), "{x}");
            assert!((exp2(log2(x)) / x - 1.0).abs() < 1e-12, "{x}");
        }
        for n in -1022..1024 {
            assert_eq!((exp2(f64::from(n)), log2(2f64.powi(n))), (2f64.powi(n), f64::from(n)));
        }
        assert_eq!((log2(0.0), exp2(f64::NEG_INFINITY)), (f64::NEG_INFINITY, 0.0));
        assert!(log2(-1.0).is_nan());
    }

    #[test]
    fn weights_are_reduced_alike_in_one_part_or_in_several() {
        let weights = [0.5f32, -2.0, 1.0, 0.25];
        let mut all = Covered::default();
        all.add(&weights);
        let mut parts = Covered::default();
        for part in weights.chunks(3) {
            let mut one = Covered::default();
            one.add(part);
            parts.join(&one);
        }
        assert_eq!(parts, all);
        let of = Reduction::ALL.map(|r| all.value(r));
        assert_eq!(of, [1.0, -2.0, 2.0, 0.9375, -0.0625, (5.3125f64 / 4.0).sqrt()]);
    }
}
