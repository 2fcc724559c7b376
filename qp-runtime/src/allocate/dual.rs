//! The Lagrangian dual: prices on the resources, and the bound that they prove.
//!
//! With prices p ≥ 0, `L(p) = Σ_units min (cost + p·uses) − p·budget` is at most the cost of any choice within the
//! budgets. L is concave and piecewise linear; its maximum is found exactly, by intersecting the linear pieces on
//! both sides of it until they meet on the graph. For two resources the same is done on `g(p₁) = max over p₀ of L`,
//! whose slope at p₁ is that of the mixture of the two inner pieces.

use super::choice::{Budgets, Item, MEMORY, Pick, RESOURCES, TIME, Unit};

/// Prices and what they prove.
#[derive(Clone, Debug)]
pub struct Dual {
    /// The prices.
    pub prices: [f64; RESOURCES],
    /// L at the prices.
    pub bound: f64,
    /// Choices met on the way that keep within the budgets: the cheapest, if any.
    pub best: Option<(Vec<Pick>, Item)>,
    /// True if the prices grew without end: no mixture of choices keeps within the budgets.
    pub unbounded: bool,
}

/// Maximises L.
pub fn maximise(units: &[Unit], budgets: Budgets) -> Dual {
    // No choice costs more, so a larger bound means that there is none.
    let ceiling = 1.0 + units.iter().map(dearest).sum::<f64>();
    let mut m = Maximiser { units, budgets, ceiling, best: None };
    let (prices, bound, unbounded) = match budgets {
        [None, None] => ([0.0; 2], m.at([0.0; 2]).cost, false),
        [Some(_), None] => m.along(MEMORY, 0.0).0,
        [None, Some(_)] => m.along(TIME, 0.0).0,
        [Some(_), Some(_)] => m.both(),
    };
    Dual { prices, bound, best: m.best, unbounded }
}

fn dearest(unit: &Unit) -> f64 {
    let group = |g: usize| unit.groups[g].iter().map(|i| i.cost).fold(0.0, f64::max);
    unit.ways.iter().map(|w| w.iter().map(|&g| group(g)).sum()).fold(0.0, f64::max)
}

/// The best pick of a unit at the given prices.
pub fn best_pick(unit: &Unit, prices: [f64; RESOURCES]) -> (Pick, f64) {
    let groups: Vec<(usize, f64)> = unit.groups.iter().map(|items| best_item(items, prices)).collect();
    let score = |way: &Vec<usize>| way.iter().map(|&g| groups[g].1).sum::<f64>();
    let (mut way, mut least) = (0, f64::INFINITY);
    for (w, groups) in unit.ways.iter().enumerate() {
        let s = score(groups);
        if s < least {
            (way, least) = (w, s);
        }
    }
    (Pick { way, items: unit.ways[way].iter().map(|&g| groups[g].0).collect() }, least)
}

fn best_item(items: &[Item], prices: [f64; RESOURCES]) -> (usize, f64) {
    let (mut at, mut least) = (0, f64::INFINITY);
    for (i, item) in items.iter().enumerate() {
        let s = item.score(prices);
        if s < least {
            (at, least) = (i, s);
        }
    }
    (at, least)
}

/// A linear piece along one price: `cost + price × excess`.
#[derive(Clone, Copy, Debug)]
struct Piece {
    cost: f64,
    excess: f64,
}

impl Piece {
    fn at(self, price: f64) -> f64 {
        self.cost + price * self.excess
    }
}

struct Maximiser<'a> {
    units: &'a [Unit],
    budgets: Budgets,
    ceiling: f64,
    best: Option<(Vec<Pick>, Item)>,
}

type Outcome = ([f64; RESOURCES], f64, bool);

impl Maximiser<'_> {
    /// The best choice at the prices: its cost and by how much it exceeds each budget.
    fn at(&mut self, prices: [f64; RESOURCES]) -> Excess {
        let picks: Vec<Pick> = self.units.iter().map(|u| best_pick(u, prices).0).collect();
        let total = super::choice::total(self.units, &picks);
        let over = |r: usize| self.budgets[r].map_or(0, |b| total.uses[r] - b);
        let excess = [over(0), over(1)];
        if excess[0] <= 0 && excess[1] <= 0 && self.best.as_ref().is_none_or(|(_, b)| total.cost < b.cost) {
            self.best = Some((picks, total));
        }
        Excess { cost: total.cost, excess: excess.map(|e| e as f64) }
    }

    /// Maximises along the price of `resource`, the price of the other being `other`. Also gives the mixture of
    /// choices at the maximum: its cost and excess of the other resource; `resource` is met exactly or has price 0.
    fn along(&mut self, resource: usize, other: f64) -> (Outcome, Piece) {
        let prices = |p: f64| if resource == MEMORY { [p, other] } else { [other, p] };
        let mut far = [Piece { cost: 0.0, excess: 0.0 }; 2];
        let mut seen: Vec<(Piece, f64)> = Vec::new();
        let start = self.scale(resource);
        let (price, value, unbounded) = climb(self.ceiling, start, |p| {
            let e = self.at(prices(p));
            let piece = Piece { cost: e.cost + other * e.excess[1 - resource], excess: e.excess[resource] };
            seen.push((piece, e.excess[1 - resource]));
            far = [piece, far[0]];
            piece
        });
        // The pieces that meet at the maximum: the highest negative and lowest positive slopes through it.
        let near = |p: &Piece| (p.at(price) - value).abs() <= 1e-9 * value.abs().max(f64::MIN_POSITIVE);
        let up = seen.iter().filter(|(p, _)| p.excess > 0.0).min_by(|a, b| (a.0.at(price)).total_cmp(&b.0.at(price)));
        let down =
            seen.iter().filter(|(p, _)| p.excess <= 0.0).min_by(|a, b| (a.0.at(price)).total_cmp(&b.0.at(price)));
        let plain = |(p, o): &(Piece, f64)| Piece { cost: p.cost - other * o, excess: *o };
        let mixture = match (up, down) {
            (Some(u), Some(d)) if price > 0.0 && near(&u.0) && near(&d.0) => {
                let w = -d.0.excess / (u.0.excess - d.0.excess);
                let (u, d) = (plain(u), plain(d));
                Piece { cost: w * u.cost + (1.0 - w) * d.cost, excess: w * u.excess + (1.0 - w) * d.excess }
            }
            (_, Some(d)) => plain(d),
            (Some(u), None) => plain(u),
            (None, None) => Piece { cost: value, excess: 0.0 },
        };
        ((prices(price), value, unbounded), mixture)
    }

    fn both(&mut self) -> Outcome {
        let mut best = ([0.0; 2], f64::NEG_INFINITY, false);
        let start = self.scale(TIME);
        let (_, _, unbounded) = climb(self.ceiling, start, |p| {
            let (outcome, mixture) = self.along(MEMORY, p);
            if outcome.1 > best.1 {
                best = outcome;
            }
            mixture
        });
        (best.0, best.1, best.2 || unbounded)
    }

    /// A price to begin with: cost of the dearest choice over the budget.
    fn scale(&self, resource: usize) -> f64 {
        1e-3 * self.ceiling / self.budgets[resource].unwrap_or(1).max(1) as f64
    }
}

struct Excess {
    cost: f64,
    excess: [f64; RESOURCES],
}

/// Maximises a concave piecewise linear function of a price ≥ 0, given the piece at any price. Returns the price, the
/// value there and whether the value passed `ceiling` (it has no end).
fn climb(ceiling: f64, start: f64, mut piece: impl FnMut(f64) -> Piece) -> (f64, f64, bool) {
    let mut up = piece(0.0);
    let mut best = (0.0, up.at(0.0));
    if up.excess <= 0.0 {
        return (best.0, best.1, false);
    }
    let mut price = start;
    let mut down = loop {
        let p = piece(price);
        if p.at(price) > best.1 {
            best = (price, p.at(price));
        }
        if p.excess <= 0.0 {
            break p;
        }
        if p.at(price) > ceiling || price > 1e300 {
            return (best.0, best.1, true);
        }
        up = p;
        price *= 8.0;
    };
    // Finite: each round adds a new piece. The limit guards against rounding.
    for _ in 0..200 {
        let meet = (down.cost - up.cost) / (up.excess - down.excess);
        let p = piece(meet);
        let value = p.at(meet);
        if value > best.1 {
            best = (meet, value);
        }
        if value >= up.at(meet) - 1e-13 * value.abs() {
            break;
        }
        if p.excess > 0.0 {
            up = p;
        } else {
            down = p;
        }
    }
    (best.0, best.1, false)
}
