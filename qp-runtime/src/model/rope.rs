//! Tables of rotary position embedding.

use super::config::{Config, RopeScaling};
use super::program::Rope;

/// Cosines and sines of every position and frequency: `positions × half`, position-major.
///
/// Element `i` of the first half of a head turns with element `i` of the second half, by the angle of frequency `i`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTables {
    /// Half the width of a head: the number of frequencies.
    pub half: usize,
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

impl RopeTables {
    /// Cosines and sines of `position`, `half` of each.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Angles per position, one a frequency: `head_dim / 2`.
pub fn frequencies(config: &Config) -> Vec<f64> {
    let dim = config.head_dim as f64;
    let plain = (0..config.head_dim / 2).map(|i| config.rope_theta.powf(-2.0 * i as f64 / dim));
    match config.rope_scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => plain
            .map(|f| {
                // Turns in the original context: few means a low frequency.
                let turns = original * f / std::f64::consts::TAU;
                let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                keep * f + (1.0 - keep) * f / factor
            })
            .collect(),
    }
}

/// The tables of positions `0..positions`, computed in `f64` and rounded to `f32`: the same for every engine.
pub fn rope_tables(rope: &Rope, positions: usize) -> RopeTables {
    let angles = || (0..positions).flat_map(|p| rope.frequencies.iter().map(move |f| p as f64 * f));
    RopeTables {
        half: rope.frequencies.len(),
        cos: angles().map(|a| a.cos() as f32).collect(),
        sin: angles().map(|a| a.sin() as f32).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(rope: &str) -> Config {
        let text = format!(
            r#"{{"architectures":["LlamaForCausalLM"],"hidden_size":128,"intermediate_size":8,"num_hidden_layers":1,
            "num_attention_heads":1,"vocab_size":8,"max_position_embeddings":131072,"rms_norm_eps":1e-5,
            "rope_theta":500000.0{rope}}}"#
        );
        Config::parse(Path::new("config.json"), &text).unwrap()
    }

    #[test]
    fn tables_hold_unit_turns() {
        let t = rope_tables(&Rope { frequencies: frequencies(&config("")) }, 5);
        assert_eq!((t.half, t.cos.len()), (64, 320));
        assert_eq!(t.at(0), (&[1.0; 64][..], &[0.0; 64][..]));
        let (c, s) = t.at(3);
        assert_eq!((c[0], s[0]), (3f64.cos() as f32, 3f64.sin() as f32));
        assert!(c.iter().zip(s).all(|(c, s)| (c * c + s * s - 1.0).abs() < 1e-6));
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let plain = frequencies(&config(""));
        let scaled = frequencies(&config(
            r#","rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}"#,
        ));
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        // Wavelength 2π/f lies between 8192/4 and 8192 exactly for the frequencies in between.
        for (p, s) in plain.iter().zip(&scaled) {
            let wave = std::f64::consts::TAU / p;
            let between = wave > 2048.0 && wave < 8192.0;
            assert_eq!(between, *s < *p && *s > p / 8.0, "wavelength {wave}");
        }
        assert!(
            frequencies(&config(r#","rope_scaling":{"type":"linear","factor":4.0}"#))
                .iter()
                .zip(&plain)
                .all(|(a, b)| *a == b / 4.0)
        );
    }
}
