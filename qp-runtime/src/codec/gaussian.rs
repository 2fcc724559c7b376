//! Seeded Gaussian samples, for training and for measuring.

/// A stream of independent samples of zero mean and unit variance. Streams of different seeds are independent.
#[derive(Clone, Debug)]
pub struct Gaussian {
    state: u64,
}

impl Gaussian {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        let mut g = Gaussian { state: seed };
        // Seeds that differ by a few bits must not give shifted copies of one stream.
        g.state = g.word() ^ seed.rotate_left(32);
        g
    }

    /// SplitMix64.
    fn word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in 0 < u < 1.
    fn uniform(&mut self) -> f64 {
        ((self.word() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Two samples, by the method of Box and Muller.
    pub fn pair(&mut self) -> [f32; 2] {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        [(radius * cos) as f32, (radius * sin) as f32]
    }

    /// The next `n` samples, rounded up to a pair.
    pub fn samples(&mut self, n: usize) -> Vec<f32> {
        (0..n.div_ceil(2)).flat_map(|_| self.pair()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_a_gaussian() {
        let x = Gaussian::new(1).samples(1 << 18);
        let moment = |k: i32| x.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / x.len() as f64;
        for (k, expect, tolerance) in [(1, 0.0, 0.01), (2, 1.0, 0.012), (3, 0.0, 0.04), (4, 3.0, 0.1)] {
            assert!((moment(k) - expect).abs() < tolerance, "moment {k}: {}", moment(k));
        }
        assert_ne!(x[..16], Gaussian::new(2).samples(16)[..]);
        let lag: f64 = x.windows(2).map(|w| f64::from(w[0]) * f64::from(w[1])).sum::<f64>() / x.len() as f64;
        assert!(lag.abs() < 0.01, "neighbours correlate: {lag}");
    }
}
