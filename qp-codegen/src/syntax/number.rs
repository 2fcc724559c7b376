//! Exact constants: rational numbers of 128-bit parts. Every operation says if it left that range.

use std::cmp::Ordering;
use std::fmt;

/// A rational number, reduced, with positive denominator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rational {
    num: i128,
    den: i128,
}

fn gcd(a: i128, b: i128) -> i128 {
    let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    i128::try_from(a).unwrap_or(1)
}

impl From<i64> for Rational {
    fn from(x: i64) -> Self {
        Rational { num: x.into(), den: 1 }
    }
}

impl Rational {
    /// `num / den`; nothing if `den` is 0.
    pub fn new(num: i128, den: i128) -> Option<Self> {
        if den == 0 {
            return None;
        }
        let g = gcd(num, den).max(1);
        let (num, den) = (num / g, den / g);
        if den < 0 {
            Some(Rational { num: num.checked_neg()?, den: den.checked_neg()? })
        } else {
            Some(Rational { num, den })
        }
    }

    /// The value if it is an integer.
    pub fn integer(self) -> Option<i128> {
        (self.den == 1).then_some(self.num)
    }

    /// Numerator and denominator.
    pub fn parts(self) -> (i128, i128) {
        (self.num, self.den)
    }

    /// Sum.
    pub fn checked_add(self, o: Self) -> Option<Self> {
        let n = self.num.checked_mul(o.den)?.checked_add(o.num.checked_mul(self.den)?)?;
        Self::new(n, self.den.checked_mul(o.den)?)
    }

    /// Negation.
    pub fn checked_neg(self) -> Option<Self> {
        Some(Rational { num: self.num.checked_neg()?, den: self.den })
    }

    /// Difference.
    pub fn checked_sub(self, o: Self) -> Option<Self> {
        self.checked_add(o.checked_neg()?)
    }

    /// Product.
    pub fn checked_mul(self, o: Self) -> Option<Self> {
        Self::new(self.num.checked_mul(o.num)?, self.den.checked_mul(o.den)?)
    }

    /// Quotient; nothing for a divisor 0.
    pub fn checked_div(self, o: Self) -> Option<Self> {
        Self::new(self.num.checked_mul(o.den)?, self.den.checked_mul(o.num)?)
    }

    /// Power with an integer exponent.
    pub fn pow(self, exponent: i128) -> Option<Self> {
        let e = u32::try_from(exponent.unsigned_abs()).ok().filter(|e| *e <= 127)?;
        let p = Rational { num: self.num.checked_pow(e)?, den: self.den.checked_pow(e)? };
        if exponent < 0 { Self::new(p.den, p.num) } else { Some(p) }
    }

    /// Order.
    pub fn compare(self, o: Self) -> Option<Ordering> {
        Some(self.num.checked_mul(o.den)?.cmp(&o.num.checked_mul(self.den)?))
    }

    /// The nearest single-precision number, by way of double precision.
    pub fn to_f32(self) -> f32 {
        (self.num as f64 / self.den as f64) as f32
    }

    /// Reads a decimal literal with digits, at most one point and `_` between digits.
    pub fn parse_decimal(text: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let mut num: i128 = 0;
        let mut den: i128 = 1;
        for (c, after_point) in whole.chars().map(|c| (c, false)).chain(fraction.chars().map(|c| (c, true))) {
            if c == '_' {
                continue;
            }
            num = num.checked_mul(10)?.checked_add(c.to_digit(10)?.into())?;
            if after_point {
                den = den.checked_mul(10)?;
            }
        }
        Self::new(num, den)
    }
}

impl fmt::Display for Rational {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.den == 1 { write!(f, "{}", self.num) } else { write!(f, "{}/{}", self.num, self.den) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_is_exact_and_checked() {
        let r = |n, d| Rational::new(n, d).unwrap();
        assert_eq!(r(1, 3).checked_add(r(1, 6)), Some(r(1, 2)));
        assert_eq!(r(2, 1).pow(-5), Some(r(1, 32)));
        assert_eq!(r(0, 1).pow(-1), None);
        assert_eq!(r(1, 2).checked_div(r(0, 1)), None);
        assert_eq!(r(2, 1).pow(127), None);
        assert_eq!(Rational::parse_decimal("0.031_25"), Some(r(1, 32)));
        assert_eq!(Rational::parse_decimal("9".repeat(60).as_str()), None);
        assert_eq!(r(-6, -4).to_string(), "3/2");
        assert_eq!(Rational::new(i128::MIN, -1), None);
    }
}
