use super::*;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Coarse numbers, so that ties are frequent.
    fn item(&mut self, coarse: bool) -> Item {
        let top = if coarse { 6 } else { 1_000_000 };
        let cost = self.below(top) as f64 / if coarse { 4.0 } else { 1e6 };
        Item { cost, uses: [self.below(top) as i64, self.below(top) as i64] }
    }

    fn unit(&mut self, coarse: bool) -> Unit {
        let shapes: [(usize, Vec<Vec<usize>>); 3] = [
            (1, vec![vec![0]]),
            (3, vec![vec![0, 1], vec![2]]),
            (4, vec![vec![0, 1], vec![2], vec![3, 1], vec![0, 3]]),
        ];
        let (groups, ways) = shapes[self.below(3) as usize].clone();
        let groups = (0..groups).map(|_| (0..1 + self.below(4)).map(|_| self.item(coarse)).collect()).collect();
        Unit { groups, ways }
    }
}

/// All sums of a unit's options.
fn options(unit: &Unit) -> Vec<Item> {
    let mut out = Vec::new();
    for way in &unit.ways {
        let mut sums = vec![Item::ZERO];
        for &g in way {
            sums = sums.iter().flat_map(|s| unit.groups[g].iter().map(|i| s.plus(*i))).collect();
        }
        out.extend(sums);
    }
    out
}

fn brute(units: &[Unit]) -> Vec<Item> {
    let mut sums = vec![Item::ZERO];
    for unit in units {
        let list = options(unit);
        sums = sums.iter().flat_map(|s| list.iter().map(|i| s.plus(*i))).collect();
    }
    sums
}

fn within(item: &Item, budgets: Budgets) -> bool {
    (0..RESOURCES).all(|r| budgets[r].is_none_or(|b| item.uses[r] <= b))
}

fn check(units: &[Unit], all: &[Item], budgets: Budgets) {
    let feasible = || all.iter().filter(|i| within(i, budgets));
    let expect = feasible().map(|i| i.cost).min_by(f64::total_cmp);
    match (solve(units, budgets, Effort { gap: 0.0, ..Effort::default() }), expect) {
        (Ok(s), Some(cost)) => {
            let sum = total(units, &s.picks);
            assert_eq!(sum.uses, s.uses);
            assert!(within(&sum, budgets));
            assert!((sum.cost - cost).abs() <= 1e-12, "{} instead of {cost}", sum.cost);
            assert!(s.bound <= cost + 1e-12 && s.gap() <= 1e-12, "bound {} of {cost}", s.bound);
        }
        (Err(Infeasible::Resource { resource, budget, smallest }), None) => {
            assert_eq!(budgets[resource], Some(budget));
            assert_eq!(Some(smallest), all.iter().map(|i| i.uses[resource]).min());
        }
        (Err(Infeasible::Together { memory, time, smallest }), None) => {
            assert_eq!(budgets, [Some(memory), Some(time)]);
            let least = all.iter().filter(|i| i.uses[MEMORY] <= memory).map(|i| i.uses[TIME]).min();
            assert_eq!(Some(smallest), least);
        }
        (found, expect) => panic!("{found:?}, but the best costs {expect:?}"),
    }
}

#[test]
fn equals_brute_force() {
    for seed in 0..600 {
        let mut r = Random(seed);
        let coarse = seed % 2 == 0;
        let units: Vec<Unit> = (0..1 + r.below(4)).map(|_| r.unit(coarse)).collect();
        let all = brute(&units);
        // Budgets at, just below and just above what some choice uses, so that edges are met; and loose ones.
        for _ in 0..6 {
            let at = all[r.below(all.len() as u64) as usize].uses;
            let near = [0, 1].map(|i| at[i] + r.below(3) as i64 - 1);
            let other = all[r.below(all.len() as u64) as usize].uses;
            for budgets in [
                [Some(near[0]), None],
                [None, Some(near[1])],
                [Some(near[0]), Some(near[1])],
                [Some(at[0]), Some(other[1])],
                [Some(i64::MAX / 4), Some(at[1])],
                [None, None],
            ] {
                check(&units, &all, budgets);
            }
        }
        let least = [0, 1].map(|r| all.iter().map(|i| i.uses[r]).min().expect("some"));
        check(&units, &all, [Some(least[0]), None]);
        check(&units, &all, [Some(least[0] - 1), None]);
        check(&units, &all, [None, Some(least[1])]);
        check(&units, &all, [Some(least[0]), Some(least[1])]);
    }
}

#[test]
fn a_limit_on_states_leaves_an_honest_gap() {
    let mut r = Random(7);
    let units: Vec<Unit> = (0..40).map(|_| r.unit(false)).collect();
    let budgets = [Some(least(&units, 0) * 3 / 2), Some(least(&units, 1) * 3 / 2)];
    let best = solve(&units, budgets, Effort { gap: 0.0, ..Effort::default() }).expect("feasible");
    let rough = solve(&units, budgets, Effort { gap: 0.0, states: 50 }).expect("feasible");
    assert!(best.gap() == 0.0 && rough.gap() > 0.0);
    assert!(rough.bound <= best.cost + 1e-12 && rough.cost >= best.cost - 1e-12);
}
