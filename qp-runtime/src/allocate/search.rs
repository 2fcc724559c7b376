//! From the Lagrangian bound to the proven optimum.
//!
//! At the prices of the dual, every option of a unit has a **surplus**: its score above the best option's. A choice
//! within the budgets costs `bound + Σ surplus + price × unused budget`. So all choices that cost at most
//! `bound + g` consist of options with surplus ≤ g, and a dynamic program over the units finds the best of them,
//! keeping only partial choices that are undominated, whose surplus is within g, and that can still meet the budgets
//! closely. If there is none, `bound + g` is a better bound, and g grows. This ends with the optimum: what the last
//! round finds is the cheapest of everything that costs no more.

use super::choice::{Budgets, Infeasible, Item, MEMORY, Pick, RESOURCES, Solution, TIME, Unit, least, total};
use super::dual::{self, Dual};

/// How far to search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// Stop once the relative gap is proven to be at most this.
    pub gap: f64,
    /// Partial choices that one round may keep; beyond, the best known choice is returned with the gap proven so far.
    pub states: usize,
}

impl Default for Effort {
    /// A gap of 1e-9, 20 million states.
    fn default() -> Self {
        Effort { gap: 1e-9, states: 20_000_000 }
    }
}

/// The cheapest choice within the budgets.
///
/// # Errors
/// If there is none: with the smallest budget that would do.
pub fn solve(units: &[Unit], budgets: Budgets, effort: Effort) -> Result<Solution, Infeasible> {
    for (resource, budget) in budgets.iter().enumerate() {
        if let &Some(budget) = budget {
            let smallest = least(units, resource);
            if budget < smallest {
                return Err(Infeasible::Resource { resource, budget, smallest });
            }
        }
    }
    let pruned: Vec<Pruned> = units.iter().map(|u| Pruned::new(u, budgets)).collect();
    let inner: Vec<Unit> = pruned.iter().map(|p| p.unit.clone()).collect();
    let mut dual = dual::maximise(&inner, budgets);
    let mut solution = None;
    if dual.best.is_some() || !dual.unbounded {
        solution = close_gap(&inner, budgets, effort, &dual);
    }
    if solution.is_none() {
        // One budget that the least uses keep is feasible, and climbing its price ends in such a choice. So there are
        // two, and whether they can be met together is a problem of one.
        let (Some(memory), Some(time)) = (budgets[MEMORY], budgets[TIME]) else {
            unreachable!("a single budget was checked above");
        };
        let fastest = fastest(&inner, memory);
        if fastest.uses[TIME] > time {
            return Err(Infeasible::Together { memory, time, smallest: fastest.uses[TIME] });
        }
        let item = total(&inner, &fastest.picks);
        dual.best = Some((fastest.picks, item));
        solution = close_gap(&inner, budgets, effort, &dual);
    }
    let mut solution = solution.unwrap_or_else(|| unreachable!("a choice within the budgets is known"));
    for (pick, p) in solution.picks.iter_mut().zip(&pruned) {
        p.restore(pick);
    }
    let all = total(units, &solution.picks);
    (solution.cost, solution.uses) = (all.cost, all.uses);
    solution.bound = solution.bound.min(solution.cost);
    Ok(solution)
}

/// The choice of least time within a memory budget that is feasible alone.
fn fastest(units: &[Unit], memory: i64) -> Solution {
    let timed = |i: &Item| Item { cost: i.uses[TIME] as f64, uses: i.uses };
    let units: Vec<Unit> = units
        .iter()
        .map(|u| Unit {
            groups: u.groups.iter().map(|g| g.iter().map(timed).collect()).collect(),
            ways: u.ways.clone(),
        })
        .collect();
    match solve(&units, [Some(memory), None], Effort { gap: 0.0, ..Effort::default() }) {
        Ok(s) => s,
        Err(_) => unreachable!("the memory budget is feasible alone"),
    }
}

/// A unit without dominated items, and the way back.
struct Pruned {
    unit: Unit,
    original: Vec<Vec<usize>>,
}

impl Pruned {
    fn new(unit: &Unit, budgets: Budgets) -> Pruned {
        let (mut groups, mut original) = (Vec::new(), Vec::new());
        for items in &unit.groups {
            let keep = |r: usize, i: &Item| if budgets[r].is_some() { i.uses[r] } else { 0 };
            let masked: Vec<Item> =
                items.iter().map(|i| Item { cost: i.cost, uses: [keep(0, i), keep(1, i)] }).collect();
            // Of equal items the first in the order of all uses stays, so that ignored resources break ties.
            let mut order: Vec<usize> = (0..items.len()).collect();
            order.sort_by(|&a, &b| {
                let key = |i: usize| (masked[i].uses, items[i].uses, i);
                masked[a].cost.total_cmp(&masked[b].cost).then(key(a).cmp(&key(b)))
            });
            let mut kept: Vec<usize> = Vec::new();
            for i in order {
                if !kept.iter().any(|&k| masked[k].dominates(&masked[i])) {
                    kept.push(i);
                }
            }
            groups.push(kept.iter().map(|&i| masked[i]).collect());
            original.push(kept);
        }
        Pruned { unit: Unit { groups, ways: unit.ways.clone() }, original }
    }

    fn restore(&self, pick: &mut Pick) {
        for (slot, &g) in pick.items.iter_mut().zip(&self.unit.ways[pick.way]) {
            *slot = self.original[g][*slot];
        }
    }
}

/// An option of a unit whose surplus is small enough.
#[derive(Clone, Debug)]
struct Choice {
    pick: Pick,
    item: Item,
}

/// All undominated options of `unit` with surplus at most `gap`.
fn choices(unit: &Unit, prices: [f64; RESOURCES], gap: f64) -> Vec<Choice> {
    let (_, floor) = dual::best_pick(unit, prices);
    let mut groups: Vec<Vec<(f64, usize)>> = Vec::new();
    for items in &unit.groups {
        let mut scored: Vec<(f64, usize)> = items.iter().enumerate().map(|(i, item)| (item.score(prices), i)).collect();
        scored.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        groups.push(scored);
    }
    let mut all = Vec::new();
    for (w, way) in unit.ways.iter().enumerate() {
        let base: f64 = way.iter().map(|&g| groups[g][0].0).sum();
        expand(&groups, way, base - floor, gap, &mut Vec::new(), &mut |items| {
            let pick = Pick { way: w, items: items.to_vec() };
            all.push(Choice { item: unit.total(&pick), pick });
        });
    }
    all.sort_by(|a, b| a.item.uses.cmp(&b.item.uses).then(a.item.cost.total_cmp(&b.item.cost)));
    let mut stairs = Stairs::default();
    all.retain(|c| stairs.admit(c.item.uses[TIME], c.item.cost));
    all
}

fn expand(
    groups: &[Vec<(f64, usize)>],
    way: &[usize],
    surplus: f64,
    gap: f64,
    picked: &mut Vec<usize>,
    emit: &mut impl FnMut(&[usize]),
) {
    if surplus > gap {
        return;
    }
    let Some(&g) = way.get(picked.len()) else {
        emit(picked);
        return;
    };
    for &(score, item) in &groups[g] {
        let more = surplus + (score - groups[g][0].0);
        if more > gap {
            break;
        }
        picked.push(item);
        expand(groups, way, more, gap, picked, emit);
        picked.pop();
    }
}

/// The undominated (time, cost) pairs of what was admitted; memory ascends from call to call.
#[derive(Default)]
struct Stairs(std::collections::BTreeMap<i64, f64>);

impl Stairs {
    /// False if something admitted is no worse in all.
    fn admit(&mut self, time: i64, cost: f64) -> bool {
        if self.0.range(..=time).next_back().is_some_and(|(_, &c)| c <= cost) {
            return false;
        }
        while let Some((&t, &c)) = self.0.range(time..).next() {
            if c < cost {
                break;
            }
            self.0.remove(&t);
        }
        self.0.insert(time, cost);
        true
    }
}

/// A partial choice.
#[derive(Clone, Copy)]
struct State {
    item: Item,
    /// Index into the trail, of the choice made last.
    trail: u32,
}

const START: u32 = u32::MAX;

fn close_gap(units: &[Unit], budgets: Budgets, effort: Effort, dual: &Dual) -> Option<Solution> {
    let Dual { prices, bound: relaxed, mut best, .. } = dual.clone();
    let mut bound = relaxed;
    let mut states = 0;
    let spread = best.as_ref().map_or(f64::INFINITY, |(_, i)| i.cost - relaxed);
    // Scores are sums of costs and priced uses, compared with their difference: below this it is rounding.
    let dust = 1e-13 * (relaxed.abs() + price_of_all(budgets, prices)).max(1e-300);
    let largest = units.iter().map(|u| most_surplus(u, prices)).sum::<f64>() + price_of_all(budgets, prices);
    let mut gap = (spread / 64.0).min(1e-6 * relaxed.abs()).max(1e-9 * spread.min(largest)).max(4.0 * dust);
    loop {
        let known = best.as_ref().map_or(f64::INFINITY, |(_, i)| i.cost);
        if known.is_finite() && known - bound <= effort.gap * known {
            break;
        }
        // Work grows with a high power of the gap: a round that is nearly the last would cost as much as the last.
        let capped = if gap > 0.8 * (known - relaxed) { known - relaxed } else { gap };
        // Without any choice yet there may be none: then a problem of one budget is quicker to say so.
        let limit = if best.is_some() { effort.states } else { effort.states / 16 };
        let round = Round { units, budgets, prices, relaxed, gap: capped + dust, limit };
        match round.run(&mut states) {
            Outcome::Found(picks) => {
                let item = total(units, &picks);
                let better = item.cost < known;
                if better {
                    best = Some((picks, item));
                }
                // Everything up to `capped` was looked at: nothing cheaper than the best is left.
                bound = best.as_ref().map_or(relaxed + capped, |(_, i)| i.cost.min(relaxed + capped));
            }
            Outcome::Nothing => bound = relaxed + capped,
            Outcome::TooMany => break,
        }
        if capped >= known - relaxed || gap > largest + dust {
            break;
        }
        gap *= 1.5;
    }
    let (picks, item) = best?;
    Some(Solution { picks, cost: item.cost, uses: item.uses, bound, multipliers: prices, relaxed, states })
}

fn most_surplus(unit: &Unit, prices: [f64; RESOURCES]) -> f64 {
    let (_, floor) = dual::best_pick(unit, prices);
    let group = |g: usize| unit.groups[g].iter().map(|i| i.score(prices)).fold(0.0, f64::max);
    unit.ways.iter().map(|w| w.iter().map(|&g| group(g)).sum()).fold(0.0, f64::max) - floor
}

fn price_of_all(budgets: Budgets, prices: [f64; RESOURCES]) -> f64 {
    (0..RESOURCES).filter_map(|r| budgets[r].map(|b| prices[r] * b as f64)).sum()
}

enum Outcome {
    Found(Vec<Pick>),
    Nothing,
    TooMany,
}

/// One pass of the dynamic program, over all choices that cost at most the bound plus `gap`.
struct Round<'a> {
    units: &'a [Unit],
    budgets: Budgets,
    prices: [f64; RESOURCES],
    relaxed: f64,
    gap: f64,
    limit: usize,
}

/// Prices, and at them the least score of the units not yet reached, less the priced budgets.
struct Probe {
    prices: [f64; RESOURCES],
    rest: Vec<f64>,
}

impl Round<'_> {
    fn run(&self, count: &mut usize) -> Outcome {
        let mut options: Vec<(usize, Vec<Choice>)> =
            self.units.iter().map(|u| choices(u, self.prices, self.gap)).enumerate().collect();
        // Units with much choice last: until then there are few states, afterwards the budgets are close.
        options.sort_by_key(|(u, c)| (c.len(), *u));
        let probes = self.probes(&options);
        // What the units not yet reached use at least.
        let mut least = vec![[0i64; RESOURCES]];
        for (_, list) in options.iter().rev() {
            let last = least[least.len() - 1];
            least.push([0, 1].map(|r| last[r] + list.iter().map(|c| c.item.uses[r]).min().unwrap_or(0)));
        }
        least.reverse();
        let cutoff = self.relaxed + self.gap;
        let mut trail: Vec<(u32, u32)> = Vec::new();
        let mut states = vec![State { item: Item::ZERO, trail: START }];
        for (stage, (_, list)) in options.iter().enumerate() {
            let room = [0, 1].map(|r| self.budgets[r].unwrap_or(i64::MAX) - least[stage + 1][r]);
            let mut next: Vec<State> = Vec::with_capacity(states.len() * 2);
            let mut from: Vec<(u32, u32)> = Vec::with_capacity(states.len() * 2);
            // States are in order, and so are they with any one choice added: sorting merges few runs.
            for (i, c) in list.iter().enumerate() {
                for s in &states {
                    let item = s.item.plus(c.item);
                    // Keeps within the budgets with the most frugal rest, and no prices prove it too dear.
                    let hopeful = item.uses[0] <= room[0]
                        && item.uses[1] <= room[1]
                        && probes.iter().all(|p| item.score(p.prices) + p.rest[stage + 1] <= cutoff);
                    if hopeful {
                        next.push(State { item, trail: from.len() as u32 });
                        from.push((s.trail, i as u32));
                    }
                }
            }
            self.undominated(&mut next);
            *count += next.len();
            if trail.len() + next.len() > self.limit {
                return Outcome::TooMany;
            }
            for s in &mut next {
                trail.push(from[s.trail as usize]);
                s.trail = trail.len() as u32 - 1;
            }
            states = next;
        }
        let Some(best) = states.iter().min_by(|a, b| a.item.cost.total_cmp(&b.item.cost)) else {
            return Outcome::Nothing;
        };
        let mut picks = vec![None; self.units.len()];
        let mut at = best.trail;
        for (u, list) in options.iter().rev() {
            let (before, choice) = trail[at as usize];
            picks[*u] = Some(list[choice as usize].pick.clone());
            at = before;
        }
        Outcome::Found(picks.into_iter().flatten().collect())
    }

    /// The dual's prices and others around them. Any prices bound the cost of completing a partial choice; those of
    /// the dual are best at the start, neighbours are better once a partial choice has strayed from the budgets.
    fn probes(&self, options: &[(usize, Vec<Choice>)]) -> Vec<Probe> {
        let active = [0, 1].map(|r| self.budgets[r].is_some() && self.prices[r] > 0.0);
        let steps = |r: usize| if active[r] { vec![0.0, 1.0, -1.0] } else { vec![0.0] };
        let mut probes = Vec::new();
        for a in steps(MEMORY) {
            for b in steps(TIME) {
                let at = |d: f64| [self.prices[0] * (1.0 + a * d), self.prices[1] * (1.0 + b * d)];
                if a == 0.0 && b == 0.0 {
                    probes.push(self.probe(options, at(0.0)));
                    continue;
                }
                // A step by which the bound falls by a fraction of the gap.
                for fraction in [0.05, 0.2, 0.5, 0.9] {
                    let (mut low, mut high) = (0.0, 0.5);
                    for _ in 0..12 {
                        let middle = if low == 0.0 { high / 8.0 } else { 0.5 * (low + high) };
                        if self.relaxed - self.probe(options, at(middle)).rest[0] > fraction * self.gap {
                            high = middle;
                        } else {
                            low = middle;
                        }
                    }
                    probes.push(self.probe(options, at(high)));
                }
            }
        }
        probes
    }

    fn probe(&self, options: &[(usize, Vec<Choice>)], prices: [f64; RESOURCES]) -> Probe {
        let mut sum: f64 = -price_of_all(self.budgets, prices);
        let mut rest = vec![sum];
        for (_, list) in options.iter().rev() {
            sum += list.iter().map(|c| c.item.score(prices)).fold(f64::INFINITY, f64::min);
            rest.push(sum);
        }
        rest.reverse();
        Probe { prices, rest }
    }

    fn undominated(&self, states: &mut Vec<State>) {
        states.sort_by(|a, b| a.item.uses.cmp(&b.item.uses).then(a.item.cost.total_cmp(&b.item.cost)));
        if self.budgets[MEMORY].is_none() || self.budgets[TIME].is_none() {
            // One resource: a running minimum does.
            let mut least = f64::INFINITY;
            states.retain(|s| {
                let keep = s.item.cost < least;
                least = least.min(s.item.cost);
                keep
            });
            return;
        }
        let mut stairs = Stairs::default();
        states.retain(|s| stairs.admit(s.item.uses[TIME], s.item.cost));
    }
}

#[cfg(test)]
mod tests;
