//! The choice of experts: of several feed-forward layers, those that a token goes through, and with what weights. And what an
//! expert does between its layers.

use super::{Activation, exp};

/// How a token's experts follow from its scores, one for each expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Experts of a token.
    pub chosen: usize,
    /// What scores become first.
    pub score: Score,
    /// Whether the weights of the chosen are divided by their sum.
    pub normalise: bool,
    /// What weights are multiplied with in the end.
    pub scale: f32,
}

/// What scores become before experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Shares of all experts, which add up to 1.
    Softmax,
    /// `1 / (1 + e^−s)`, each by itself.
    Sigmoid,
}

impl Routing {
    /// The chosen experts of one token in ascending order, with their weights. `correction` is added to what scores become,
    /// for choosing only; of equal ones the first is chosen. All that is computed is `f32`, in this order of operations.
    pub fn choose(&self, scores: &[f32], correction: Option<&[f32]>) -> Vec<(usize, f32)> {
        let values: Vec<f32> = match self.score {
            Score::Softmax => {
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let powers: Vec<f32> = scores.iter().map(|s| exp(s - most)).collect();
                let sum: f32 = powers.iter().sum();
                powers.iter().map(|p| p / sum).collect()
            }
            Score::Sigmoid => scores.iter().map(|s| 1.0 / (1.0 + exp(-s))).collect(),
        };
        let rank = |i: usize| values[i] + correction.map_or(0.0, |c| c[i]);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
        order.truncate(self.chosen);
        order.sort_unstable();
        let sum: f32 = order.iter().map(|&i| values[i]).sum();
        let weight = |i: usize| if self.normalise { values[i] / sum } else { values[i] };
        order.into_iter().map(|i| (i, weight(i) * self.scale)).collect()
    }
}

/// The gated unit of an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unit {
    /// `activation(gate) · up`.
    Plain(Activation),
    /// `g / (1 + e^(−alpha g)) · (u + 1)`, where `g` is the gate, at most `limit`, and `u` what it gates, within ±`limit`.
    Clamped {
        /// Steepness.
        alpha: f32,
        /// Largest magnitude.
        limit: f32,
    },
}

impl Unit {
    /// Its value, which is not a number if the gate or what it gates is none.
    pub fn apply(self, gate: f32, up: f32) -> f32 {
        match self {
            Unit::Plain(activation) => activation.apply(gate) * up,
            Unit::Clamped { alpha, limit } => {
                let gate = if gate > limit { limit } else { gate };
                let up = up.clamp(-limit, limit);
                gate / (1.0 + exp(-alpha * gate)) * (up + 1.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_does_not_hide_what_is_no_number() {
        let unit = Unit::Clamped { alpha: 1.702, limit: 7.0 };
        assert!(unit.apply(f32::NAN, 1.0).is_nan() && unit.apply(1.0, f32::NAN).is_nan());
        assert_eq!((unit.apply(100.0, 100.0), unit.apply(1.0, -100.0)), (unit.apply(7.0, 7.0), unit.apply(1.0, -7.0)));
    }

    #[test]
    fn the_largest_are_chosen_and_their_weights_are_shares() {
        let routing = Routing { chosen: 2, score: Score::Softmax, normalise: true, scale: 1.0 };
        let chosen = routing.choose(&[0.0, 2.0, -1.0, 1.0], None);
        let share = 1.0 / (1.0 + (-1f32).exp());
        assert_eq!((chosen[0].0, chosen[1].0), (1, 3));
        assert!((chosen[0].1 - share).abs() < 1e-6 && (chosen[0].1 + chosen[1].1 - 1.0).abs() < 1e-6, "{chosen:?}");
        // Of equal ones the first.
        assert_eq!(routing.choose(&[1.0; 4], None).iter().map(|c| c.0).collect::<Vec<_>>(), [0, 1]);
        let all = Routing { normalise: false, ..routing }.choose(&[0.0, 2.0, -1.0, 1.0], None);
        let sum: f32 = [0f32, 2.0, -1.0, 1.0].iter().map(|s| s.exp()).sum();
        assert!((all[0].1 - 2f32.exp() / sum).abs() < 1e-6);
    }

    #[test]
    fn corrections_choose_and_do_not_weigh() {
        let routing = Routing { chosen: 1, score: Score::Sigmoid, normalise: false, scale: 2.0 };
        let chosen = routing.choose(&[0.0, 0.5], Some(&[1.0, 0.0]));
        assert_eq!(chosen, [(0, 1.0)]);
    }
}
