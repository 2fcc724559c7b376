//! The machine's arithmetic: of words, of long numbers, and what packs several numbers in a word.

use std::mem::take;

use half::f16;

use super::execute::Machine;
use super::mask::Mask;
use super::program::Reg;
use super::{Fault, Stop, float};
use crate::ir::*;

impl Machine<'_, '_> {
    fn word1(&mut self, m: &Mask, [d, a]: [Reg; 2], f: impl Fn(u32) -> u32) {
        let mut out = take(&mut self.words[d as usize]);
        let r = m.lo..m.hi;
        for (o, a) in out[r.clone()].iter_mut().zip(&self.words[a as usize][r]) {
            *o = f(*a);
        }
        self.words[d as usize] = out;
    }

    pub(super) fn word2(&mut self, m: &Mask, [d, a, b]: [Reg; 3], f: impl Fn(u32, u32) -> u32) {
        let mut out = take(&mut self.words[d as usize]);
        let r = m.lo..m.hi;
        let (a, b) = (&self.words[a as usize][r.clone()], &self.words[b as usize][r.clone()]);
        for (o, (a, b)) in out[r].iter_mut().zip(a.iter().zip(b)) {
            *o = f(*a, *b);
        }
        self.words[d as usize] = out;
    }

    pub(super) fn word3(&mut self, m: &Mask, [d, a, b, c]: [Reg; 4], f: impl Fn(u32, u32, u32) -> u32) {
        let mut out = take(&mut self.words[d as usize]);
        let r = m.lo..m.hi;
        let [a, b, c] = [a, b, c].map(|x| &self.words[x as usize][r.clone()]);
        for (o, ((a, b), c)) in out[r].iter_mut().zip(a.iter().zip(b).zip(c)) {
            *o = f(*a, *b, *c);
        }
        self.words[d as usize] = out;
    }

    /// Like `word2` for an operation that can fail: `f` gives the result and whether it is wrong.
    fn checked2(
        &mut self,
        m: &Mask,
        [d, a, b]: [Reg; 3],
        f: impl Fn(u32, u32) -> (u32, bool),
        fault: impl Fn(u32, u32) -> Fault,
    ) -> Result<(), Stop> {
        let mut out = take(&mut self.words[d as usize]);
        let r = m.lo..m.hi;
        let (xs, ys) = (&self.words[a as usize][r.clone()], &self.words[b as usize][r.clone()]);
        let mut bad = 0;
        for ((o, (x, y)), on) in out[r.clone()].iter_mut().zip(xs.iter().zip(ys)).zip(&m.on[r]) {
            let (v, wrong) = f(*x, *y);
            *o = v;
            bad |= u32::from(wrong) & on;
        }
        self.words[d as usize] = out;
        if bad == 0 {
            return Ok(());
        }
        let (x, y) = (&self.words[a as usize], &self.words[b as usize]);
        let t = m.active().find(|t| f(x[*t], y[*t]).1).expect("one was wrong");
        Err(Stop::at(t, fault(x[t], y[t])))
    }

    pub(super) fn checked3(
        &mut self,
        m: &Mask,
        [d, a, b, c]: [Reg; 4],
        f: impl Fn(u32, u32, u32) -> i64,
    ) -> Result<(), Stop> {
        for t in m.active() {
            let [a, b, c] = [a, b, c].map(|r| self.words[r as usize][t]);
            let x = f(a, b, c);
            let Ok(fits) = i32::try_from(x) else {
                return Err(Stop::at(t, Fault::Overflow((c as i32).into(), x - i64::from(c as i32))));
            };
            self.words[d as usize][t] = fits as u32;
        }
        Ok(())
    }

    fn long2(&mut self, m: &Mask, [d, a, b]: [Reg; 3], f: impl Fn(i64, i64) -> Result<i64, Fault>) -> Result<(), Stop> {
        for t in m.active() {
            let (a, b) = (self.longs[a as usize][t], self.longs[b as usize][t]);
            self.longs[d as usize][t] = f(a, b).map_err(|fault| Stop::at(t, fault))?;
        }
        Ok(())
    }

    pub(super) fn unary(&mut self, op: UnaryOp, ty: Scalar, d: Reg, a: Reg, m: &Mask) -> Result<(), Stop> {
        let overflow = |a: u32, _| Fault::Overflow((a as i32).into(), 0);
        match (op, ty) {
            (UnaryOp::Neg, Scalar::F32) => self.word1(m, [d, a], |a| a ^ 1 << 31),
            (UnaryOp::Abs, Scalar::F32) => self.word1(m, [d, a], |a| a & !(1 << 31)),
            (UnaryOp::Sqrt, _) => self.word1(m, [d, a], float::sqrt),
            (UnaryOp::Neg, Scalar::I64) => {
                self.long2(m, [d, a, a], |a, _| a.checked_neg().ok_or(Fault::Overflow(a, 0)))?;
            }
            (UnaryOp::Abs, Scalar::I64) => {
                self.long2(m, [d, a, a], |a, _| a.checked_abs().ok_or(Fault::Overflow(a, 0)))?;
            }
            (UnaryOp::Not, Scalar::I64) => self.long2(m, [d, a, a], |a, _| Ok(!a))?,
            (UnaryOp::Not, Scalar::Bool) => self.word1(m, [d, a], |a| a ^ 1),
            (UnaryOp::Not, _) => self.word1(m, [d, a], |a| !a),
            (UnaryOp::Neg, _) => {
                let f = |a: u32, _| ((a as i32).wrapping_neg() as u32, a == 1 << 31);
                self.checked2(m, [d, a, a], f, overflow)?;
            }
            (UnaryOp::Abs, _) => {
                let f = |a: u32, _| ((a as i32).wrapping_abs() as u32, a == 1 << 31);
                self.checked2(m, [d, a, a], f, overflow)?;
            }
        }
        Ok(())
    }

    pub(super) fn binary(&mut self, op: BinaryOp, ty: Scalar, r: [Reg; 3], m: &Mask) -> Result<(), Stop> {
        match ty {
            Scalar::F32 => self.binary_f32(op, r, m),
            Scalar::U32 | Scalar::Bool => return self.binary_u32(op, r, m),
            Scalar::I32 => return self.binary_i32(op, r, m),
            Scalar::I64 => return self.binary_i64(op, r, m),
        }
        Ok(())
    }

    fn binary_f32(&mut self, op: BinaryOp, r: [Reg; 3], m: &Mask) {
        match op {
            BinaryOp::Add => self.word2(m, r, float::binary(|a, b| a + b)),
            BinaryOp::Sub => self.word2(m, r, float::binary(|a, b| a - b)),
            BinaryOp::Mul => self.word2(m, r, float::binary(|a, b| a * b)),
            BinaryOp::Div => self.word2(m, r, float::binary(|a, b| a / b)),
            BinaryOp::Min => self.word2(m, r, float::binary(float::min)),
            BinaryOp::Max => self.word2(m, r, float::binary(float::max)),
            BinaryOp::Rem | BinaryOp::And | BinaryOp::Or | BinaryOp::Xor | BinaryOp::Shl | BinaryOp::Shr => {
                unreachable!("the validator refuses it on floats")
            }
        }
    }

    fn binary_u32(&mut self, op: BinaryOp, r: [Reg; 3], m: &Mask) -> Result<(), Stop> {
        let division = |a: u32, b: u32| Fault::Division(a.into(), b.into());
        let shift = |_, b: u32| Fault::Shift(b.into());
        match op {
            BinaryOp::Add => self.word2(m, r, u32::wrapping_add),
            BinaryOp::Sub => self.word2(m, r, u32::wrapping_sub),
            BinaryOp::Mul => self.word2(m, r, u32::wrapping_mul),
            BinaryOp::Div => self.checked2(m, r, |a, b| (a / b.max(1), b == 0), division)?,
            BinaryOp::Rem => self.checked2(m, r, |a, b| (a % b.max(1), b == 0), division)?,
            BinaryOp::And => self.word2(m, r, |a, b| a & b),
            BinaryOp::Or => self.word2(m, r, |a, b| a | b),
            BinaryOp::Xor => self.word2(m, r, |a, b| a ^ b),
            BinaryOp::Shl => self.checked2(m, r, |a, b| (a << (b & 31), b > 31), shift)?,
            BinaryOp::Shr => self.checked2(m, r, |a, b| (a >> (b & 31), b > 31), shift)?,
            BinaryOp::Min => self.word2(m, r, u32::min),
            BinaryOp::Max => self.word2(m, r, u32::max),
        }
        Ok(())
    }

    fn binary_i32(&mut self, op: BinaryOp, r: [Reg; 3], m: &Mask) -> Result<(), Stop> {
        let overflow = |a: u32, b: u32| Fault::Overflow((a as i32).into(), (b as i32).into());
        let division = |a: u32, b: u32| Fault::Division((a as i32).into(), (b as i32).into());
        let signed = |f: fn(i32, i32) -> (i32, bool)| {
            move |a: u32, b: u32| {
                let (x, wrong) = f(a as i32, b as i32);
                (x as u32, wrong)
            }
        };
        match op {
            BinaryOp::Add => self.checked2(m, r, |a, b| over((a as i32).overflowing_add(b as i32)), overflow)?,
            BinaryOp::Sub => self.checked2(m, r, |a, b| over((a as i32).overflowing_sub(b as i32)), overflow)?,
            BinaryOp::Mul => self.checked2(
                m,
                r,
                |a, b| {
                    let x = i64::from(a as i32) * i64::from(b as i32);
                    (x as u32, x != i64::from(x as i32))
                },
                overflow,
            )?,
            BinaryOp::Div => {
                let f = |a: i32, b: i32| if b == 0 { (0, true) } else { a.overflowing_div(b) };
                self.checked2(m, r, signed(f), division)?;
            }
            BinaryOp::Rem => {
                let f = |a: i32, b: i32| if b <= 0 || a < 0 { (0, true) } else { (a % b, false) };
                self.checked2(m, r, signed(f), division)?;
            }
            BinaryOp::And => self.word2(m, r, |a, b| a & b),
            BinaryOp::Or => self.word2(m, r, |a, b| a | b),
            BinaryOp::Xor => self.word2(m, r, |a, b| a ^ b),
            BinaryOp::Shl | BinaryOp::Shr => {
                let fault = |a: u32, b: u32| if b > 31 { Fault::Shift((b as i32).into()) } else { overflow(a, b) };
                if op == BinaryOp::Shr {
                    return self.checked2(m, r, |a, b| (((a as i32) >> (b & 31)) as u32, b > 31), fault);
                }
                let f = |a: u32, b: u32| {
                    let x = (a as i32) << (b & 31);
                    (x as u32, b > 31 || x >> (b & 31) != a as i32)
                };
                self.checked2(m, r, f, fault)?;
            }
            BinaryOp::Min => self.word2(m, r, |a, b| (a as i32).min(b as i32) as u32),
            BinaryOp::Max => self.word2(m, r, |a, b| (a as i32).max(b as i32) as u32),
        }
        Ok(())
    }

    fn binary_i64(&mut self, op: BinaryOp, r: [Reg; 3], m: &Mask) -> Result<(), Stop> {
        let fits = |x: Option<i64>, a, b| x.ok_or(Fault::Overflow(a, b));
        let shift = |b: i64| u32::try_from(b).ok().filter(|b| *b < 64).ok_or(Fault::Shift(b));
        self.long2(m, r, |a, b| match op {
            BinaryOp::Add => fits(a.checked_add(b), a, b),
            BinaryOp::Sub => fits(a.checked_sub(b), a, b),
            BinaryOp::Mul => fits(a.checked_mul(b), a, b),
            BinaryOp::Div => a.checked_div(b).ok_or(Fault::Division(a, b)),
            BinaryOp::Rem if a < 0 || b <= 0 => Err(Fault::Division(a, b)),
            BinaryOp::Rem => Ok(a % b),
            BinaryOp::And => Ok(a & b),
            BinaryOp::Or => Ok(a | b),
            BinaryOp::Xor => Ok(a ^ b),
            BinaryOp::Shl => shift(b).and_then(|s| fits(Some(a << s).filter(|x| x >> s == a), a, b)),
            BinaryOp::Shr => shift(b).map(|s| a >> s),
            BinaryOp::Min => Ok(a.min(b)),
            BinaryOp::Max => Ok(a.max(b)),
        })
    }

    pub(super) fn compare(&mut self, op: CompareOp, ty: Scalar, [d, a, b]: [Reg; 3], m: &Mask) {
        fn holds<T: PartialOrd>(op: CompareOp, a: T, b: T) -> u32 {
            u32::from(match op {
                CompareOp::Eq => a == b,
                CompareOp::Ne => a != b,
                CompareOp::Lt => a < b,
                CompareOp::Le => a <= b,
                CompareOp::Gt => a > b,
                CompareOp::Ge => a >= b,
            })
        }
        match ty {
            Scalar::Bool | Scalar::U32 => self.word2(m, [d, a, b], |a, b| holds(op, a, b)),
            Scalar::I32 => self.word2(m, [d, a, b], |a, b| holds(op, a as i32, b as i32)),
            Scalar::F32 => self.word2(m, [d, a, b], |a, b| holds(op, f32::from_bits(a), f32::from_bits(b))),
            Scalar::I64 => {
                for t in m.active() {
                    let (a, b) = (self.longs[a as usize][t], self.longs[b as usize][t]);
                    self.words[d as usize][t] = holds(op, a, b);
                }
            }
        }
    }

    pub(super) fn convert(&mut self, from: Scalar, to: Scalar, d: Reg, a: Reg, m: &Mask) {
        // Casts of `f32` saturate and give 0 for NaN, in Rust as on a GPU.
        let rounded = |a: u32| f32::from_bits(a).round_ties_even();
        match (from, to) {
            (Scalar::F32, Scalar::I32) => self.word1(m, [d, a], |a| rounded(a) as i32 as u32),
            (Scalar::F32, Scalar::U32) => self.word1(m, [d, a], |a| rounded(a) as u32),
            (Scalar::I32, Scalar::F32) => self.word1(m, [d, a], |a| (a as i32 as f32).to_bits()),
            (Scalar::U32 | Scalar::Bool, Scalar::F32) => self.word1(m, [d, a], |a| (a as f32).to_bits()),
            (Scalar::F32, Scalar::I64) => {
                m.active().for_each(|t| self.longs[d as usize][t] = rounded(self.words[a as usize][t]) as i64);
            }
            (Scalar::I32, Scalar::I64) => {
                m.active().for_each(|t| self.longs[d as usize][t] = (self.words[a as usize][t] as i32).into());
            }
            (Scalar::U32 | Scalar::Bool, Scalar::I64) => {
                m.active().for_each(|t| self.longs[d as usize][t] = self.words[a as usize][t].into());
            }
            (Scalar::I64, Scalar::F32) => {
                m.active().for_each(|t| self.words[d as usize][t] = (self.longs[a as usize][t] as f32).to_bits());
            }
            (Scalar::I64, Scalar::I32 | Scalar::U32) => {
                m.active().for_each(|t| self.words[d as usize][t] = self.longs[a as usize][t] as u32);
            }
            (_, Scalar::Bool)
            | (Scalar::F32, Scalar::F32)
            | (Scalar::I64, Scalar::I64)
            | (Scalar::I32 | Scalar::U32 | Scalar::Bool, Scalar::I32 | Scalar::U32) => {
                unreachable!("compiled to a renaming, or refused by the validator")
            }
        }
    }
}

fn over((x, wrong): (i32, bool)) -> (u32, bool) {
    (x as u32, wrong)
}

pub(super) fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    let pick = |i: u32| {
        let nibble = selector >> (4 * i) & 15;
        let byte = bytes[(nibble & 7) as usize];
        if nibble & 8 != 0 { (byte as i8 >> 7) as u8 } else { byte }
    };
    u32::from_le_bytes([pick(0), pick(1), pick(2), pick(3)])
}

/// `f` of the low and of the high halves.
pub(super) fn halves(a: u32, b: u32, c: u32, f: impl Fn(u16, u16, u16) -> u16) -> u32 {
    let of = |shift: u32| u32::from(f((a >> shift) as u16, (b >> shift) as u16, (c >> shift) as u16)) << shift;
    of(0) | of(16)
}

/// A half-precision number; sums and products of two are exact.
pub(super) fn number(bits: u16) -> f64 {
    f16::from_bits(bits).to_f64()
}

pub(super) fn round(x: f64) -> u16 {
    if x.is_nan() { 0x7fff } else { f16::from_f64(x).to_bits() }
}

pub(super) fn dot4(a: u32, b: u32, acc: u32) -> i64 {
    let products =
        a.to_le_bytes().into_iter().zip(b.to_le_bytes()).map(|(a, b)| i64::from(a as i8) * i64::from(b as i8));
    i64::from(acc as i32) + products.sum::<i64>()
}

pub(super) fn dot2(a: u32, b: u32, acc: u32) -> i64 {
    let product = |shift: u32| i64::from((a >> (2 * shift)) as i16) * i64::from((b >> shift) as i8);
    i64::from(acc as i32) + product(0) + product(8)
}
