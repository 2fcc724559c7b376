//! The integers that every encoder compares: distances from weights to entries.
//!
//! An encoder looks for the windows that lie closest to a block of weights. What it adds up and compares are integers, so
//! the CPU's vector instructions, the interpreter and every GPU choose the same windows; among equal ones the smallest wins
//! (`docs/decisions/encoder.md`).
//!
//! Along a trellis they are 16-bit costs, [`Metric`]; where every step is coded alone, 32-bit distances, [`Nearest`]. In both
//! a weight x, in units of the source, is a point `p = x / unit - offset` among the entries.

use half::f16;

use crate::spec::{Code, Value};

/// After each step whose number in the block is a multiple of it, the least cost of a state before the step is taken off.
pub const REBASE: u32 = 4;

/// How weights and entries of a trellis code become costs.
///
/// Points and entries are half-precision numbers in units of 2^-`exponent` entries. The metric of an entry is the sum over
/// its components of the **bits** of their squared distance, rounded to half precision: below 2^-13 these bits are the
/// square's count of 2^-24, above they grow with its logarithm, so no sum of a few steps leaves 16 bits and a far entry
/// still costs less than a farther one. A code's distortion is 4 to 64 such counts, so rounding costs it a few tenths of a
/// percent at most.
///
/// The cost of a state is `min(limit, least over its predecessors of their cost + metric)`, less what [`REBASE`] says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    /// An entry c is `c · 2^exponent` as half-precision number.
    pub exponent: i32,
    /// No cost is larger. That of a state which no path has reached; with a metric added it stays below 2^16.
    pub limit: u16,
    unit: f32,
    offset: f32,
    /// Points are kept within this distance of 0.
    reach: f32,
    /// Points are multiples of it, so that differences are exact in single precision.
    grid: f32,
}

/// Most that a step's metric may be.
const MOST_METRIC: u32 = 45000;

impl Metric {
    /// For a trellis `code`; of its tables, only the largest value of 16-bit ones matters.
    pub fn new(code: &Code) -> Metric {
        let largest = match code.value {
            Value::I8 => -f64::from(code.value.range().0),
            Value::I16 => f64::from(code.decode.largest_entry(code.value, &code.tables)),
        };
        // Beyond the largest entry it should still matter which one is taken.
        let reach = 1.25 * largest;
        let bits: u32 = code.steps.iter().sum();
        let rate = f64::from(bits) / (code.steps.len() as f64 * f64::from(code.vector));
        // log2 of the source's deviation: at the bound, 2^(-2 rate), 2^4 counts of 2^-24; but where these are not
        // proportional any more, from 2^11 on, errors should be rare, so 2^2 will do.
        let deviation = (rate - 10.0).min((rate - 11.0).max(-6.0));
        let wanted = (f64::from(code.unit).log2() + deviation).ceil() as i32;
        // The farthest that a point is from an entry must leave enough of 16 bits to costs.
        let most = |exponent: i32| {
            let far = f16::from_f64((reach + largest) * f64::from(exponent).exp2()).to_f64();
            let bits = f16::from_f64(far * far).to_bits();
            if bits < f16::INFINITY.to_bits() { u32::from(bits) * code.vector } else { u32::MAX }
        };
        // Not below the smallest number, of which entries of 8 bits then are exact multiples.
        let exponent = (-24..=wanted).rev().find(|&e| most(e) <= MOST_METRIC).unwrap_or(-24);
        let limit = (u32::from(u16::MAX) - most(exponent)).min(i16::MAX as u32) as u16;
        let span = (reach + largest) * f64::from(exponent).exp2();
        let grid = (span.log2().ceil() - 24.0).exp2() as f32;
        let offset = if code.half_offset { 0.5 } else { 0.0 };
        Metric { exponent, limit, unit: code.unit, offset, reach: reach as f32, grid }
    }

    /// The point of a finite weight `x`.
    pub fn weight(&self, x: f32) -> f16 {
        let p = (x / self.unit - self.offset).clamp(-self.reach, self.reach);
        f16::from_f32((p * (self.exponent as f32).exp2() / self.grid).round_ties_even() * self.grid)
    }

    /// A component of an entry.
    pub fn entry(&self, c: i16) -> f16 {
        f16::from_f32(f32::from(c) * (self.exponent as f32).exp2())
    }

    /// The metric of one component.
    pub fn component(&self, point: f16, entry: f16) -> u16 {
        // Both are multiples of the grid, and their difference has 24 bits at most: rounded once. So is the square.
        let apart = f16::from_f32(point.to_f32() - entry.to_f32()).to_f32();
        f16::from_f32(apart * apart).to_bits()
    }

    /// The metric of an entry.
    pub fn branch(&self, points: &[f16], entry: &[f16]) -> u16 {
        points.iter().zip(entry).map(|(&p, &c)| self.component(p, c)).sum()
    }
}

/// How weights and entries of a code without memory become distances.
///
/// A point is rounded to a grid of `2^-(f + 1)` and kept as the 16-bit number `n = -2^(f + 1) p`. The distance of an entry c of
/// V components is then
///
/// ```text
/// 2^f |c|² + Σ n_i c_i   =   2^f (|c - p|² - |p|²).
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearest {
    /// f: a point's grid has 2^(f + 1) steps between two entries. Never negative for 8-bit entries.
    pub fraction: i32,
    unit: f32,
    offset: f32,
    /// Points are kept within this distance of 0: twice the largest entry, or what 16 bits allow.
    reach: f32,
}

impl Nearest {
    /// For `code`; of its tables, only the largest value of 16-bit ones matters.
    pub fn new(code: &Code) -> Nearest {
        let (least, largest) = match code.value {
            Value::I8 => (0, -f64::from(code.value.range().0)),
            Value::I16 => (-24, f64::from(code.decode.largest_entry(code.value, &code.tables))),
        };
        let reach = (2.0 * largest).min(f64::from(i16::MAX));
        // Of an entry, for f = 0: |c|² + 2 |p||c|.
        let distance = f64::from(code.vector) * largest * (largest + 2.0 * reach);
        let fits = |f: i32| {
            reach * f64::from(f + 1).exp2() <= f64::from(i16::MAX)
                && distance * f64::from(f).exp2() <= f64::from(1 << 30)
        };
        // A 4096th of the source's deviation is fine enough.
        let most = (4096.0 * f64::from(code.unit) / 2.0).log2().floor() as i32;
        let fraction = (least + 1..=most).rev().find(|&f| fits(f)).unwrap_or(least);
        let offset = if code.half_offset { 0.5 } else { 0.0 };
        Nearest { fraction, unit: code.unit, offset, reach: reach as f32 }
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

    /// The distance of `entry`, whose [`Nearest::energy`] is `energy`, from the weights that became `n`.
    pub fn distance(&self, n: &[i16], entry: &[i16], energy: i32) -> i32 {
        energy + n.iter().zip(entry).map(|(&n, &c)| i32::from(n) * i32::from(c)).sum::<i32>()
    }
}

/// Bytes of costs that a thread of the CPU's encoder keeps unless more is needed (`qp-runtime`'s `codec::viterbi`).
pub const HISTORY_BYTES: u64 = 48 << 20;
/// Blocks of weights that it searches side by side, each with a cost of two bytes a state.
const SIDE_BY_SIDE: u64 = 32;
/// Seconds that a core of some 3 GHz with AVX2 takes to add one of the components of a window to its cost: a rough figure,
/// for warnings.
const SECONDS: f64 = 0.7 / 32.0 / 3e9;

/// What looking for the windows of weights takes on a CPU, roughly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// Windows that are compared for each weight.
    pub windows: f64,
    /// Seconds of one core for each weight.
    pub seconds: f64,
    /// Bytes that each thread keeps.
    pub of_thread: u64,
    /// Bytes that all threads share: the codebook written out.
    pub shared: u64,
}

impl Effort {
    /// That of a code.
    pub fn of(code: &Code) -> Effort {
        let (v, all) = (f64::from(code.vector), 2f64.powi(code.window as i32));
        let shared = u64::from(2 * code.vector + 4) << code.window;
        if code.is_memoryless() {
            let windows = all / v;
            return Effort { windows, seconds: windows * v * SECONDS, of_thread: 0, shared };
        }
        let steps = code.steps_per_block();
        let boundary = (SIDE_BY_SIDE * 2) << (code.window - code.steps.iter().min().expect("a step"));
        let wanted = u64::from(steps) + 1;
        // Where not all boundaries are kept, halves of the path are searched again and again.
        let least = u64::from(steps.max(1).ilog2()) + 3;
        let kept = (HISTORY_BYTES / boundary).max(least).min(wanted);
        let again = 1.0 + (wanted as f64 / kept as f64).log2() / 2.0;
        let seam = (2 * code.reach(steps)).min(steps);
        let windows = all * f64::from(steps + seam) * again / f64::from(code.weights());
        Effort { windows, seconds: windows * (v + 2.0) * SECONDS, of_thread: kept * boundary, shared }
    }

    /// That of a quantizer whose codes take turns: means of what each weight takes, and the memory of the code that needs most.
    pub fn of_all(codes: &[Code]) -> Effort {
        let all: Vec<Effort> = codes.iter().map(Effort::of).collect();
        let mean = |f: fn(&Effort) -> f64| all.iter().map(f).sum::<f64>() / all.len() as f64;
        Effort {
            windows: mean(|e| e.windows),
            seconds: mean(|e| e.seconds),
            of_thread: all.iter().map(|e| e.of_thread).max().unwrap_or(0),
            shared: all.iter().map(|e| e.shared).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_windows_take_gigabytes_and_ordinary_ones_do_not() {
        let mut code = palette::get("tcq_3").expect("of the palette").codes[0].clone();
        let usual = Effort::of(&code);
        assert!(usual.of_thread + usual.shared < 100 << 20, "{usual:?}");
        (code.window, code.steps) = (24, vec![1]);
        let long = Effort::of(&code);
        assert!(long.of_thread > 4 << 30 && long.windows > 1e7, "{long:?}");
    }
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
        assert_eq!(Nearest::new(&sparse).fraction, 5);
        let mut coarse = wide.clone();
        (coarse.value, coarse.unit) = (Value::I8, 1.0);
        let mut fine = wide.clone();
        (fine.steps, fine.vector) = (vec![14], 1);
        let (mut tiny, mut huge) = (coarse.clone(), coarse.clone());
        (tiny.unit, huge.unit) = (1e-30, 1e30);
        codes.extend([wide, coarse, sparse, fine, tiny, huge]);
        codes
    }

    fn largest(code: &Code) -> i32 {
        match code.value {
            Value::I8 => -code.value.range().0,
            Value::I16 => code.decode.largest_entry(code.value, &code.tables),
        }
    }

    #[test]
    fn no_sum_overflows_and_no_weight_is_cut() {
        for code in codes() {
            let most = largest(&code);
            let (low, high) = code.value.range();
            let entries = [most, most / 3, 1, 0, -1, -most].map(|c| c.clamp(low, high) as i16);
            let (m, nearest) = (Metric::new(&code), Nearest::new(&code));
            for x in [f32::MAX, -f32::MAX, most as f32 * code.unit, 0.3, 0.0] {
                let (n, p) = (nearest.weight(x), m.weight(x));
                assert!(n > i16::MIN && p.is_finite(), "{code:?}");
                for c in entries {
                    let v = code.vector as usize;
                    let metric = m.branch(&vec![p; v], &vec![m.entry(c); v]);
                    assert!(u32::from(metric) + u32::from(m.limit) <= 65535, "{m:?}: {metric}");
                    let (n, entry) = (vec![n; v], vec![c; v]);
                    let energy = nearest.energy(&entry);
                    let square = (i64::from(c) * i64::from(c)) as f64 * v as f64;
                    assert!((f64::from(energy) - square * f64::from(nearest.fraction).exp2()).abs() <= 0.5);
                    let product: i64 = n.iter().zip(&entry).map(|(&n, &c)| i64::from(n) * i64::from(c)).sum();
                    assert_eq!(i64::from(nearest.distance(&n, &entry, energy)), i64::from(energy) + product);
                }
            }
            assert!(m.limit > 16384, "{m:?}");
        }
    }

    #[test]
    fn metrics_are_squared_distances() {
        let q = spec::resolve("tcq_3").expect("of the palette");
        let m = Metric::new(&q.codes[0]);
        // 3 bits, entries in 32nds: 2^-12.
        assert_eq!(m.exponent, -12);
        let (x, entry) = ([0.37f32, -1.21], [10i16, -40]);
        let distance: f32 = x.iter().zip(entry).map(|(&x, c)| (x * 32.0 - 0.5 - f32::from(c)).powi(2)).sum();
        // A count is 2^-24 of a square of entries that are multiples of 2^-12: one.
        let metric = m.branch(&x.map(|x| m.weight(x)), &entry.map(|c| m.entry(c)));
        assert!((f32::from(metric) - distance).abs() <= 1.1, "{metric} {distance}");
    }

    #[test]
    fn farther_costs_more() {
        let q = spec::resolve("fine_5").expect("of the palette");
        let m = Metric::new(&q.codes[0]);
        let p = m.weight(4.9);
        let metrics: Vec<u16> = (-128..128).rev().map(|c| m.component(p, m.entry(c))).collect();
        assert!(metrics.is_sorted() && metrics[255] > metrics[200] + 100, "{metrics:?}");
    }

    /// What the hardware does with half-precision numbers, in double precision.
    #[test]
    fn single_precision_rounds_once() {
        for name in ["fine_1.5", "fine_2.5", "fine_5", "fast_3.5"] {
            let code = &spec::resolve(name).expect("of the palette").codes[0];
            let m = Metric::new(code);
            for i in 0..4000u32 {
                let p = m.weight((i.wrapping_mul(0x9E37_79B1) >> 8) as f32 / (1 << 21) as f32 - 4.0);
                let c = m.entry((i % 256) as i16 - 128);
                let apart = f16::from_f64(p.to_f64() - c.to_f64());
                assert_eq!(m.component(p, c), f16::from_f64(apart.to_f64() * apart.to_f64()).to_bits());
            }
        }
    }
}
