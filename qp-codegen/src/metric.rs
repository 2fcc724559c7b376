//! The integers that every encoder compares: distances from weights to entries.
//!
//! An encoder looks for the windows that lie closest to a block of weights. What it adds up and compares are 32-bit
//! integers, so the CPU's vector instructions, the interpreter and every GPU choose the same windows; among equal ones
//! the smallest wins (`docs/decisions/encoder.md`).
//!
//! A weight x, in units of the source, becomes a point `p = x / unit - offset` among the entries, rounded to a grid of
//! `2^-(f + 1)` and kept as the 16-bit number `n = -2^(f + 1) p`. The metric of an entry c of V components is then
//!
//! ```text
//! (2^f |c|² + Σ n_i c_i) >> shift   =   2^(f - shift) (|c - p|² - |p|²),   rounded down.
//! ```

use crate::spec::{Code, Value};

/// No sum of metrics along a path is larger than this, in magnitude.
pub const LARGEST_COST: i32 = 1 << 29;

/// More than the cost of any path, and small enough that a path's cost may be added to it.
pub const UNREACHABLE: i32 = 1 << 30;

/// How a code's weights and entries become metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    /// f: a point's grid has 2^(f + 1) steps between two entries. Never negative for 8-bit entries.
    pub fraction: i32,
    /// Bits by which metrics are shifted right.
    pub shift: u32,
    unit: f32,
    offset: f32,
    /// Points are kept within this distance of 0: twice the largest entry, or what 16 bits allow.
    reach: f32,
}

impl Metric {
    /// For paths of `steps` steps of `code`. Of its tables, only the largest value of 16-bit ones matters.
    pub fn new(code: &Code, steps: u32) -> Metric {
        let (least, largest) = match code.value {
            Value::I8 => (0, -f64::from(code.value.range().0)),
            Value::I16 => (-24, f64::from(code.decode.largest_entry(code.value, &code.tables))),
        };
        let reach = (2.0 * largest).min(f64::from(i16::MAX));
        let vector = f64::from(code.vector);
        // Of a branch, for f = 0: |c|² + 2 |p||c|.
        let branch = vector * largest * (largest + 2.0 * reach);
        // A 1024th of the source's deviation is fine enough for codes whose metrics add up, see the decision; nearest
        // entries alone can afford more.
        let wanted = if code.is_memoryless() { 4096.0 } else { 1024.0 };
        let fits = |f: i32| {
            reach * f64::from(f + 1).exp2() <= f64::from(i16::MAX)
                && branch * f64::from(f).exp2() <= f64::from(UNREACHABLE)
        };
        let most = (wanted * f64::from(code.unit) / 2.0).log2().floor() as i32;
        let fraction = (least + 1..=most).rev().find(|&f| fits(f)).unwrap_or(least);
        let branch = branch * f64::from(fraction).exp2() + 1.0;
        let total = branch * f64::from(steps);
        let shift = (total / f64::from(LARGEST_COST)).log2().ceil().max(0.0) as u32;
        let shift = if code.is_memoryless() { 0 } else { shift };
        let offset = if code.half_offset { 0.5 } else { 0.0 };
        Metric { fraction, shift, unit: code.unit, offset, reach: reach as f32 }
    }

    /// n of a finite weight `x`.
    pub fn weight(&self, x: f32) -> i16 {
        let p = (x / self.unit - self.offset).clamp(-self.reach, self.reach);
        (p * -(self.fraction as f32 + 1.0).exp2()).round_ties_even() as i16
    }

    /// 2^f |c|², rounded to nearest.
    pub fn energy(&self, entry: &[i16]) -> i32 {
        let square: i64 = entry.iter().map(|&c| i64::from(c) * i64::from(c)).sum();
        let scaled = match u32::try_from(-self.fraction) {
            Ok(down @ 1..) => (square + (1 << (down - 1))) >> down,
            Ok(0) | Err(_) => square << self.fraction,
        };
        scaled as i32
    }

    /// The metric of `entry`, whose [`Metric::energy`] is `energy`, for the weights that became `n`.
    pub fn branch(&self, n: &[i16], entry: &[i16], energy: i32) -> i32 {
        let product: i32 = n.iter().zip(entry).map(|(&n, &c)| i32::from(n) * i32::from(c)).sum();
        (energy + product) >> self.shift
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{palette, spec};

    /// Codes of both entry types and several shapes, some with the largest entries that their types have.
    fn codes() -> Vec<Code> {
        let mut codes: Vec<Code> = palette::names()
            .into_iter()
            .map(|n| palette::get(n).expect("a name of the palette"))
            .flat_map(|q| q.codes)
            .collect();
        let mut wide = codes.iter().find(|c| !c.is_memoryless()).expect("a trellis code").clone();
        (wide.value, wide.half_offset, wide.unit) = (Value::I16, false, 1.0 / 4096.0);
        wide.tables.iter_mut().for_each(|t| t.values.clear());
        let mut sparse = wide.clone();
        sparse.unit = 1.0 / 32.0;
        sparse.tables.iter_mut().for_each(|t| t.values = vec![-150; (t.entries * sparse.vector) as usize]);
        assert_eq!(Metric::new(&sparse, 128).fraction, 4);
        let mut coarse = wide.clone();
        (coarse.value, coarse.unit) = (Value::I8, 1.0);
        codes.extend([wide, coarse, sparse]);
        codes
    }

    #[test]
    fn no_path_overflows_and_no_weight_is_cut() {
        for code in codes() {
            let (low, high) = code.value.range();
            let most = match code.value {
                Value::I8 => -low,
                Value::I16 => code.decode.largest_entry(code.value, &code.tables),
            };
            for steps in [1, 128, 1024, 65536] {
                for largest in [1, most / 3, -most] {
                    let m = Metric::new(&code, steps);
                    for x in [f32::MAX, -f32::MAX, f32::from(largest as i16) * code.unit, 0.0] {
                        let n = vec![m.weight(x); code.vector as usize];
                        assert!(n[0] > i16::MIN);
                        for c in [largest, (-largest).clamp(low, high), 0] {
                            let entry = vec![c as i16; code.vector as usize];
                            let square = entry.iter().map(|&c| i64::from(c) * i64::from(c)).sum::<i64>();
                            let energy = m.energy(&entry);
                            let exact = square as f64 * f64::from(m.fraction).exp2();
                            assert!((f64::from(energy) - exact).abs() <= 0.5, "{energy} is not {exact}");
                            let branch = i64::from(m.branch(&n, &entry, energy)).abs();
                            let paths = if code.is_memoryless() { 1 } else { i64::from(steps) };
                            let bound = if code.is_memoryless() { i32::MAX } else { LARGEST_COST };
                            assert!(branch * paths <= i64::from(bound), "{:?} {steps} {branch}", m);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn metrics_are_squared_distances() {
        let q = spec::resolve("tcq_3").expect("of the palette");
        let code = &q.codes[0];
        let m = Metric::new(code, code.steps_per_block());
        assert_eq!((m.fraction, m.shift), (4, 0));
        let (x, entry) = ([0.37f32, -1.21], [14i16, -60]);
        let n = x.map(|x| m.weight(x));
        let distance =
            |c: [f64; 2]| x.iter().zip(c).map(|(&x, c)| (f64::from(x) * 32.0 - 0.5 - c).powi(2)).sum::<f64>();
        let exact = (distance(entry.map(f64::from)) - distance([0.0; 2])) * 16.0;
        let metric = f64::from(m.branch(&n, &entry, m.energy(&entry)));
        assert!((metric - exact).abs() <= 0.5 * (14.0 + 60.0), "{metric} {exact}");
    }
}
