//! Whole-number expressions of layouts: where the bits of a weight begin.
//!
//! Division rounds down and `%` is never negative. Every expression is **quasi-linear** in each of its variables, or it
//! is refused: there is a period p and a stride s with `E(v + p) = E(v) + s` for all v. Both follow from the expression
//! ([`Index::period`]), so that a layout is known for every matrix from the addresses of one period.

use std::fmt::Write;

/// A variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Var {
    /// Rows of the matrix.
    Rows,
    /// Columns of the matrix.
    Cols,
    /// The first index of a target.
    First,
    /// The second index of a target.
    Second,
    /// The bit of a stream.
    Bit,
    /// What is stored, in a `read` block.
    Stored,
}

impl Var {
    /// How canonical text names it.
    pub fn name(self) -> &'static str {
        match self {
            Var::Rows => "rows",
            Var::Cols => "cols",
            Var::First => "i",
            Var::Second => "j",
            Var::Bit => "n",
            Var::Stored => "b",
        }
    }
}

/// Operations of whole numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IndexOp {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
    /// Quotient, rounded down.
    Div,
    /// Remainder, never negative for a positive divisor.
    Rem,
    /// Power.
    Pow,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
    /// Shift left.
    Shl,
    /// Shift right.
    Shr,
    /// 1 if less, else 0.
    Lt,
    /// 1 if equal, else 0.
    Eq,
}

impl IndexOp {
    /// The operator as written.
    pub fn text(self) -> &'static str {
        match self {
            IndexOp::Add => "+",
            IndexOp::Sub => "-",
            IndexOp::Mul => "*",
            IndexOp::Div => "/",
            IndexOp::Rem => "%",
            IndexOp::Pow => "**",
            IndexOp::And => "&",
            IndexOp::Or => "|",
            IndexOp::Xor => "^",
            IndexOp::Shl => "<<",
            IndexOp::Shr => ">>",
            IndexOp::Lt => "<",
            IndexOp::Eq => "==",
        }
    }

    /// The result; nothing where it does not exist or has more than 63 bits.
    pub fn apply(self, a: i64, b: i64) -> Option<i64> {
        let shift = u32::try_from(b).ok().filter(|b| *b < 63);
        match self {
            IndexOp::Add => a.checked_add(b),
            IndexOp::Sub => a.checked_sub(b),
            IndexOp::Mul => a.checked_mul(b),
            IndexOp::Div => (b > 0).then(|| a.div_euclid(b)),
            IndexOp::Rem => (b > 0).then(|| a.rem_euclid(b)),
            IndexOp::Pow => a.checked_pow(u32::try_from(b).ok()?),
            IndexOp::And => Some(a & b),
            IndexOp::Or => Some(a | b),
            IndexOp::Xor => Some(a ^ b),
            IndexOp::Shl => a.checked_mul(1 << shift?),
            IndexOp::Shr => Some(a >> shift?),
            IndexOp::Lt => Some((a < b).into()),
            IndexOp::Eq => Some((a == b).into()),
        }
    }
}

/// A whole-number expression.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Index {
    /// A constant.
    Const(i64),
    /// A variable.
    Var(Var),
    /// An operation.
    Binary(IndexOp, Box<Index>, Box<Index>),
    /// The second if the first is not 0, else the third.
    If(Box<Index>, Box<Index>, Box<Index>),
}

/// How an expression repeats along a variable: `E(v + period) = E(v) + stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period {
    /// At least 1.
    pub period: i64,
    /// What one period adds.
    pub stride: i64,
}

/// Longest period: a table has an address for each of its members.
const LONGEST: i64 = 1 << 20;

impl Period {
    fn new(period: i64, stride: i64) -> Option<Self> {
        (1..=LONGEST).contains(&period).then_some(Period { period, stride })
    }

    /// The same over a multiple of the period.
    fn over(self, period: i64) -> Option<Self> {
        Self::new(period, self.stride.checked_mul(period / self.period)?)
    }

    /// Both over their common period.
    fn common(self, other: Self) -> Option<(Self, Self)> {
        let p = (self.period / gcd(self.period, other.period)).checked_mul(other.period)?;
        Some((self.over(p)?, other.over(p)?))
    }
}

/// Greatest common divisor of magnitudes; that with 0 is the other.
pub fn gcd(a: i64, b: i64) -> i64 {
    let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    i64::try_from(a).unwrap_or(1)
}

impl Index {
    /// `a op b`, computed if both are constants.
    pub fn binary(op: IndexOp, a: Index, b: Index) -> Index {
        match (op, &a, &b) {
            (_, Index::Const(x), Index::Const(y)) => {
                if let Some(v) = op.apply(*x, *y) {
                    return Index::Const(v);
                }
            }
            (IndexOp::Add, Index::Const(0), _) | (IndexOp::Mul, Index::Const(1), _) => return b,
            (IndexOp::Add | IndexOp::Sub, _, Index::Const(0)) => return a,
            (IndexOp::Mul | IndexOp::Div, _, Index::Const(1)) => return a,
            _ => (),
        }
        Index::Binary(op, Box::new(a), Box::new(b))
    }

    /// The value with `vars` for the variables; nothing if some part of it does not exist.
    pub fn eval(&self, vars: &dyn Fn(Var) -> i64) -> Option<i64> {
        match self {
            Index::Const(c) => Some(*c),
            Index::Var(v) => Some(vars(*v)),
            Index::Binary(op, a, b) => op.apply(a.eval(vars)?, b.eval(vars)?),
            Index::If(c, a, b) => {
                if c.eval(vars)? != 0 {
                    a.eval(vars)
                } else {
                    b.eval(vars)
                }
            }
        }
    }

    /// As [`Index::eval`], but nothing where a quotient is not whole.
    pub fn eval_exact(&self, vars: &dyn Fn(Var) -> i64) -> Option<i64> {
        match self {
            Index::Binary(IndexOp::Div, a, b) => {
                let (a, b) = (a.eval_exact(vars)?, b.eval_exact(vars)?);
                (b > 0 && a % b == 0).then(|| a / b)
            }
            Index::Binary(op, a, b) => op.apply(a.eval_exact(vars)?, b.eval_exact(vars)?),
            Index::If(c, a, b) => {
                if c.eval_exact(vars)? != 0 {
                    a.eval_exact(vars)
                } else {
                    b.eval_exact(vars)
                }
            }
            Index::Const(_) | Index::Var(_) => self.eval(vars),
        }
    }

    /// With values for some variables.
    pub fn with(&self, values: &dyn Fn(Var) -> Option<i64>) -> Index {
        match self {
            Index::Const(c) => Index::Const(*c),
            Index::Var(v) => values(*v).map_or(Index::Var(*v), Index::Const),
            Index::Binary(op, a, b) => Index::binary(*op, a.with(values), b.with(values)),
            Index::If(c, a, b) => match c.with(values) {
                Index::Const(0) => b.with(values),
                Index::Const(_) => a.with(values),
                c => Index::If(Box::new(c), Box::new(a.with(values)), Box::new(b.with(values))),
            },
        }
    }

    /// How the expression repeats along `v`, whatever the other variables are; nothing if it does not.
    pub fn period(&self, v: Var) -> Option<Period> {
        match self {
            Index::Const(_) => Period::new(1, 0),
            Index::Var(w) => Period::new(1, i64::from(*w == v)),
            Index::If(c, a, b) => {
                let c = c.period(v).filter(|c| c.stride == 0)?;
                let (a, b) = a.period(v)?.common(b.period(v)?)?;
                let (_, a2) = c.common(a)?;
                let (_, b2) = c.common(b)?;
                (a2 == b2).then_some(a2)
            }
            Index::Binary(op, a, b) => {
                let (x, y) = (a.period(v)?, b.period(v)?);
                let (p, q) = x.common(y)?;
                match op {
                    IndexOp::Add => Period::new(p.period, p.stride.checked_add(q.stride)?),
                    IndexOp::Sub => Period::new(p.period, p.stride.checked_sub(q.stride)?),
                    IndexOp::Mul => match (&**a, &**b) {
                        (_, Index::Const(c)) => Period::new(x.period, x.stride.checked_mul(*c)?),
                        (Index::Const(c), _) => Period::new(y.period, y.stride.checked_mul(*c)?),
                        _ => (p.stride == 0 && q.stride == 0).then_some(p),
                    },
                    IndexOp::Div | IndexOp::Rem => match &**b {
                        Index::Const(c) if *c > 0 => {
                            // After so many periods the dividend has grown by a multiple of the divisor.
                            let times = c / gcd(*c, x.stride);
                            let stride = x.stride.checked_mul(times)? / c;
                            let period = x.period.checked_mul(times)?;
                            Period::new(period, if *op == IndexOp::Div { stride } else { 0 })
                        }
                        _ => (p.stride == 0 && q.stride == 0).then_some(p),
                    },
                    IndexOp::Shl => match &**b {
                        Index::Const(c @ 0..=62) => Period::new(x.period, x.stride.checked_mul(1 << c)?),
                        _ => (p.stride == 0 && q.stride == 0).then_some(p),
                    },
                    IndexOp::Pow
                    | IndexOp::And
                    | IndexOp::Or
                    | IndexOp::Xor
                    | IndexOp::Shr
                    | IndexOp::Lt
                    | IndexOp::Eq => (p.stride == 0 && q.stride == 0).then_some(p),
                }
            }
        }
    }

    /// Whether the expression has the variable `v`.
    pub fn has(&self, v: Var) -> bool {
        match self {
            Index::Const(_) => false,
            Index::Var(w) => *w == v,
            Index::Binary(_, a, b) => a.has(v) || b.has(v),
            Index::If(a, b, c) => a.has(v) || b.has(v) || c.has(v),
        }
    }

    /// Height of the tree.
    pub fn height(&self) -> usize {
        match self {
            Index::Const(_) | Index::Var(_) => 1,
            Index::Binary(_, a, b) => 1 + a.height().max(b.height()),
            Index::If(a, b, c) => 1 + a.height().max(b.height()).max(c.height()),
        }
    }

    /// Nodes of the tree.
    pub fn size(&self) -> usize {
        match self {
            Index::Const(_) | Index::Var(_) => 1,
            Index::Binary(_, a, b) => 1 + a.size() + b.size(),
            Index::If(a, b, c) => 1 + a.size() + b.size() + c.size(),
        }
    }

    /// As canonical text has it: parentheses around every operation.
    pub fn text(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) {
        match self {
            // Writing to a string cannot fail.
            Index::Const(c) => drop(write!(out, "{c}")),
            Index::Var(v) => out.push_str(v.name()),
            Index::Binary(op, a, b) => {
                out.push('(');
                a.write(out);
                let _ = write!(out, " {} ", op.text());
                b.write(out);
                out.push(')');
            }
            Index::If(c, a, b) => {
                out.push_str("(if ");
                c.write(out);
                out.push_str(" then ");
                a.write(out);
                out.push_str(" else ");
                b.write(out);
                out.push(')');
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_one_for_every_value() {
        let c = Index::Const;
        let v = || Index::Var(Var::Second);
        let op = |o, a, b| Index::binary(o, a, b);
        // c / 256 * 144 + (c % 256) / 64 * 32 + c % 32, as of Q4_K; an `if`; a shift along bits.
        let nibble = op(
            IndexOp::Add,
            op(IndexOp::Mul, op(IndexOp::Div, v(), c(256)), c(144)),
            op(
                IndexOp::Add,
                op(IndexOp::Mul, op(IndexOp::Div, op(IndexOp::Rem, v(), c(256)), c(64)), c(32)),
                op(IndexOp::Rem, v(), c(32)),
            ),
        );
        let low = op(IndexOp::Lt, op(IndexOp::Rem, v(), c(8)), c(4));
        let chosen = Index::If(Box::new(low), Box::new(v()), Box::new(op(IndexOp::Add, v(), c(4))));
        let run = op(IndexOp::Div, op(IndexOp::Mul, v(), c(3)), c(32));
        for (e, period, stride) in [(nibble, 256, 144), (chosen, 8, 8), (run, 32, 3)] {
            let p = e.period(Var::Second).unwrap();
            assert_eq!((p.period, p.stride), (period, stride), "{}", e.text());
            for x in 0..1000 {
                let at = |x: i64| e.eval(&|_| x).unwrap();
                assert_eq!(at(x + period), at(x) + stride, "{} at {x}", e.text());
            }
        }
        let square = op(IndexOp::Mul, v(), v());
        assert_eq!(square.period(Var::Second), None);
        assert_eq!(op(IndexOp::Lt, v(), c(9)).period(Var::Second), None);
    }
}
