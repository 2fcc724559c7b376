//! The plan that would be best if every number of bits could be had.
//!
//! With distortion c · 2^(−2b) at b bits, the least Σ aₗ · c · 2^(−2bₗ) for a given Σ nₗ · bₗ (nₗ the weights of layer
//! l) is where every bit saves as much: `bₗ = const + ½ log₂(aₗ / nₗ)`.

use super::problem::Layer;

/// The bits that each layer would get of `total` bits, none fewer than `range.0` or more than `range.1` a weight.
pub fn bits(layers: &[Layer], total: f64, range: (f64, f64)) -> Vec<f64> {
    let shares: Vec<f64> = layers.iter().map(|l| 0.5 * (l.sensitivity / l.weights() as f64).log2()).collect();
    let at = |c: f64| shares.iter().map(move |s| (c + s).clamp(range.0, range.1));
    let sum = |c: f64| at(c).zip(layers).map(|(b, l)| b * l.weights() as f64).sum::<f64>();
    // Layers of no sensitivity have a share of minus infinity and always get the least.
    let finite = || shares.iter().copied().filter(|s| s.is_finite());
    let least = finite().fold(f64::INFINITY, f64::min);
    let most = finite().fold(f64::NEG_INFINITY, f64::max);
    if least > most {
        return at(0.0).collect();
    }
    let (mut low, mut high) = (range.0 - most, range.1 - least);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if sum(middle) < total {
            low = middle;
        } else {
            high = middle;
        }
    }
    at(high).collect()
}

#[cfg(test)]
mod tests {
    use super::super::problem::Role;
    use super::*;
    use qp_codegen::spec::Shape;

    fn layer(rows: u32, sensitivity: f64) -> Layer {
        Layer { name: String::new(), role: Role::Alone, shape: Shape { rows, cols: 1 }, sensitivity }
    }

    #[test]
    fn four_times_the_sensitivity_is_one_bit() {
        let layers = [layer(100, 1.0), layer(100, 4.0), layer(400, 4.0)];
        let b = bits(&layers, 3.0 * 600.0, (0.0, 8.0));
        assert!((b[1] - b[0] - 1.0).abs() < 1e-9 && (b[2] - b[0]).abs() < 1e-9, "{b:?}");
        assert!((100.0 * (b[0] + b[1]) + 400.0 * b[2] - 1800.0).abs() < 1e-6);
        // Held in range, what one cannot take goes to the others.
        let b = bits(&layers, 3.0 * 600.0, (0.0, 3.5));
        assert!((b[1] - 3.5).abs() < 1e-12 && (100.0 * b[0] + 400.0 * b[2] - 1450.0).abs() < 1e-6, "{b:?}");
    }

    #[test]
    fn no_sensitivity_needs_no_bits() {
        let b = bits(&[layer(10, 0.0), layer(10, 1.0)], 60.0, (1.5, 5.0));
        assert!(b[0] == 1.5 && (b[1] - 4.5).abs() < 1e-9, "{b:?}");
        assert_eq!(bits(&[layer(10, 0.0)], 60.0, (1.5, 5.0)), [1.5]);
        assert_eq!(bits(&[layer(10, 1.0)], 1e9, (1.5, 5.0)), [5.0]);
    }
}
