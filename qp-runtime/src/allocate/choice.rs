//! The abstract problem behind a plan: pick one option of every unit, at least cost, within budgets.
//!
//! A **unit** is a set of layers that are decided together (for example q, k and v of one block) and independently
//! of all other units. A unit offers **ways** (partitions into launches); a way consists of **groups** (launches);
//! of each group of the chosen way one **item** (quantizer and kernel) is picked. An item has a cost (predicted loss)
//! and uses of each **resource** (bytes, femtoseconds). Uses and budgets are integers, so what is feasible is exact.
//!
//! A unit's options need not be written out: with multipliers on the resources, the best option is the best way's
//! best items, group by group.

/// Number of resources: [`MEMORY`] and [`TIME`].
pub const RESOURCES: usize = 2;
/// Index of the bytes of the packed layers.
pub const MEMORY: usize = 0;
/// Index of the time of a decode step, in femtoseconds.
pub const TIME: usize = 1;

/// One number a resource.
pub type Uses = [i64; RESOURCES];

/// One way to run a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    /// Predicted loss, at least 0 and finite.
    pub cost: f64,
    /// What it uses of each resource, at least 0.
    pub uses: Uses,
}

/// Layers that are decided together.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// The items of each group; no group is empty.
    pub groups: Vec<Vec<Item>>,
    /// Indices of the groups of each way; neither this nor any way is empty.
    pub ways: Vec<Vec<usize>>,
}

/// At most how much of each resource; `None` is no limit.
pub type Budgets = [Option<i64>; RESOURCES];

/// What is picked in one unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Index of the way.
    pub way: usize,
    /// Index of the item of each group of the way.
    pub items: Vec<usize>,
}

/// A choice for every unit, with its proof.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// What is picked, in the order of the units.
    pub picks: Vec<Pick>,
    /// Total cost.
    pub cost: f64,
    /// Total use of each resource.
    pub uses: Uses,
    /// No choice within the budgets costs less than this.
    pub bound: f64,
    /// The Lagrange multipliers: what one more unit of a resource would save, if options could be mixed.
    pub multipliers: [f64; RESOURCES],
    /// The Lagrangian bound, before the search raised it to `bound`.
    pub relaxed: f64,
    /// Partial choices that the search kept, over all rounds.
    pub states: usize,
}

impl Solution {
    /// Relative distance of the cost from the proven bound.
    pub fn gap(&self) -> f64 {
        if self.cost <= self.bound { 0.0 } else { (self.cost - self.bound) / self.cost }
    }
}

/// Why there is no solution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Infeasible {
    /// A budget is below what the cheapest items use.
    #[error("resource {resource} has budget {budget}, but at least {smallest} is needed")]
    Resource {
        /// Index of the resource.
        resource: usize,
        /// The budget asked for.
        budget: i64,
        /// The smallest budget of this resource that is feasible alone.
        smallest: i64,
    },
    /// Each budget could be met alone, but not together.
    #[error("with memory {memory}, at least {smallest} of time is needed; the budget is {time}")]
    Together {
        /// The memory budget.
        memory: i64,
        /// The time budget asked for.
        time: i64,
        /// The smallest feasible time within the memory budget.
        smallest: i64,
    },
}

impl Unit {
    /// A unit of one group.
    pub fn single(items: Vec<Item>) -> Unit {
        Unit { groups: vec![items], ways: vec![vec![0]] }
    }

    /// Cost and uses of a pick.
    pub fn total(&self, pick: &Pick) -> Item {
        self.ways[pick.way].iter().zip(&pick.items).map(|(&g, &i)| self.groups[g][i]).fold(Item::ZERO, Item::plus)
    }
}

impl Item {
    /// Costs and uses nothing.
    pub const ZERO: Item = Item { cost: 0.0, uses: [0; RESOURCES] };

    /// The sum of two items.
    pub fn plus(self, other: Item) -> Item {
        Item { cost: self.cost + other.cost, uses: [0, 1].map(|r| self.uses[r] + other.uses[r]) }
    }

    /// Cost with every use priced.
    pub fn score(&self, prices: [f64; RESOURCES]) -> f64 {
        self.cost + prices[0] * self.uses[0] as f64 + prices[1] * self.uses[1] as f64
    }

    /// True if this item is at least as good in everything.
    pub fn dominates(&self, other: &Item) -> bool {
        self.cost <= other.cost && self.uses[0] <= other.uses[0] && self.uses[1] <= other.uses[1]
    }
}

/// Cost and uses of a whole choice.
pub fn total(units: &[Unit], picks: &[Pick]) -> Item {
    units.iter().zip(picks).map(|(u, p)| u.total(p)).fold(Item::ZERO, Item::plus)
}

/// The least that a choice can use of `resource`.
pub fn least(units: &[Unit], resource: usize) -> i64 {
    let group = |items: &Vec<Item>| items.iter().map(|i| i.uses[resource]).min().unwrap_or(0);
    units
        .iter()
        .map(|u| u.ways.iter().map(|w| w.iter().map(|&g| group(&u.groups[g])).sum::<i64>()).min().unwrap_or(0))
        .sum()
}
