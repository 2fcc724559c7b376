//! From layers, candidate quantizers and kernel times to the abstract problem, and back to a plan.

use std::fmt;

use qp_codegen::spec::{Matrix, Shape};
use serde::{Deserialize, Serialize};

use super::choice::{Budgets, Infeasible, Item, MEMORY, Pick, Solution, TIME, Unit};
use super::search::{Effort, solve};

/// What a linear layer is for: which others it may share a launch with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// A matrix of transformer block `block`.
    Block {
        /// Index of the block.
        block: u32,
        /// Which of its matrices.
        matrix: Matrix,
    },
    /// Any other linear layer, which shares no launch: the output head, an expert's, one that is several in one.
    Alone,
}

impl Role {
    /// Reads the role off a layer's name: `model.layers.3.self_attn.q_proj` and the like.
    pub fn of(name: &str) -> Role {
        if name.split('.').any(|part| part.contains("experts")) {
            return Role::Alone;
        }
        let mut block = None;
        for part in name.split('.') {
            if let Ok(b) = part.parse() {
                block = Some(b);
            }
        }
        let last = name.rsplit('.').next().unwrap_or(name);
        let matrix = Matrix::ALL.into_iter().find(|m| last == format!("{}_proj", m.name()));
        match (block, matrix) {
            (Some(block), Some(matrix)) => Role::Block { block, matrix },
            (Some(_) | None, None) | (None, Some(_)) => Role::Alone,
        }
    }
}

/// A linear layer to be planned for.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Name without `.weight`, e.g. `model.layers.0.mlp.down_proj`.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Rows × columns = out × in features.
    pub shape: Shape,
    /// a, predicted loss for each unit of relative mean squared error.
    pub sensitivity: f64,
}

impl Layer {
    /// Number of weights.
    pub fn weights(&self) -> u64 {
        u64::from(self.shape.rows) * u64::from(self.shape.cols)
    }

    /// Name in a launch: `q`, `gate`, …, or the layer's own.
    pub fn short(&self) -> &str {
        match self.role {
            Role::Block { block: _, matrix } => matrix.name(),
            Role::Alone => &self.name,
        }
    }
}

/// A quantizer that a layer may get.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Bits a weight, without scales and tables.
    pub bits: f64,
    /// Mean squared error relative to the weights' mean square.
    pub distortion: f64,
}

/// Which arithmetic units a kernel multiplies with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Core {
    /// Tensor cores.
    Tensor,
    /// CUDA cores.
    Cuda,
}

impl fmt::Display for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Core::Tensor => "tensor",
            Core::Cuda => "cuda",
        })
    }
}

/// Which launches a plan may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freedom {
    /// Whether matrices may share a launch.
    pub fusion: bool,
    /// Whether CUDA-core kernels may be used beside tensor-core kernels.
    pub cores: bool,
}

/// Time of a kernel for `layers` (one, or a fused group in the order of the block), in femtoseconds; `None` if there
/// is no such kernel. Arguments: layers, index of the candidate, core.
pub type Times<'a> = &'a dyn Fn(&[&Layer], usize, Core) -> Option<i64>;

/// Bytes of a layer under a candidate; `None` if its sides do not fit.
pub type Bytes<'a> = &'a dyn Fn(&Layer, usize) -> Option<i64>;

/// A kernel launch that a plan uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Indices of the layers, ascending.
    pub layers: Vec<usize>,
    /// Index of the candidate.
    pub candidate: usize,
    /// Which kernel; `None` if no times were given.
    pub core: Option<Core>,
}

/// An item's meaning.
#[derive(Clone, Copy, Debug)]
struct Meaning {
    candidate: usize,
    core: Option<Core>,
}

/// Layers, candidates, and every launch that is possible.
pub struct Problem {
    /// The layers.
    pub layers: Vec<Layer>,
    /// The candidates.
    pub candidates: Vec<Candidate>,
    /// Time of all that is not a linear layer, in femtoseconds.
    pub constant: i64,
    units: Vec<Unit>,
    /// Layers of each unit's groups.
    members: Vec<Vec<Vec<usize>>>,
    meanings: Vec<Vec<Vec<Meaning>>>,
}

/// A plan: launches and the proof that no other is better.
#[derive(Clone, Debug)]
pub struct Allocation {
    /// The launches, in the order of the layers. Every layer is in exactly one.
    pub launches: Vec<Launch>,
    /// Cost, uses and bound. Time is without [`Problem::constant`].
    pub solution: Solution,
}

impl Allocation {
    /// The candidate of each layer.
    pub fn candidates(&self) -> Vec<usize> {
        let mut out = vec![0; self.launches.iter().map(|l| l.layers.len()).sum()];
        for launch in &self.launches {
            for &l in &launch.layers {
                out[l] = launch.candidate;
            }
        }
        out
    }

    /// Time of a decode step, in femtoseconds.
    pub fn time(&self, problem: &Problem) -> i64 {
        problem.constant + self.solution.uses[TIME]
    }
}

impl Problem {
    /// Collects every launch that `freedom` and `times` allow. Without `times` there are no fused launches, since they
    /// would change nothing.
    ///
    /// # Errors
    /// If a layer has no kernel at all, or there is nothing to choose from.
    pub fn new(
        layers: Vec<Layer>,
        candidates: Vec<Candidate>,
        freedom: Freedom,
        constant: i64,
        bytes: Bytes<'_>,
        times: Option<Times<'_>>,
    ) -> Result<Problem, Unusable> {
        if candidates.is_empty() {
            return Err(Unusable::NoCandidates);
        }
        let mut p =
            Problem { units: Vec::new(), members: Vec::new(), meanings: Vec::new(), layers, candidates, constant };
        for unit in together(&p.layers, freedom.fusion && times.is_some()) {
            p.add_unit(&unit, freedom, bytes, times)?;
        }
        Ok(p)
    }

    fn add_unit(
        &mut self,
        unit: &[usize],
        freedom: Freedom,
        bytes: Bytes<'_>,
        times: Option<Times<'_>>,
    ) -> Result<(), Unusable> {
        let cores: &[Core] = if freedom.cores { &[Core::Tensor, Core::Cuda] } else { &[Core::Tensor] };
        let (mut members, mut groups, mut meanings) = (Vec::new(), Vec::new(), Vec::new());
        // Every non-empty subset is a possible launch.
        let mut index = vec![None; 1 << unit.len()];
        for (subset, place) in index.iter_mut().enumerate().skip(1) {
            let group: Vec<usize> = (0..unit.len()).filter(|i| subset >> i & 1 == 1).map(|i| unit[i]).collect();
            let layers: Vec<&Layer> = group.iter().map(|&l| &self.layers[l]).collect();
            let (mut items, mut means) = (Vec::new(), Vec::new());
            for (c, candidate) in self.candidates.iter().enumerate() {
                let cost = layers.iter().map(|l| l.sensitivity * candidate.distortion).sum();
                let Some(memory) = layers.iter().map(|l| bytes(l, c)).sum::<Option<i64>>() else { continue };
                match times {
                    None => {
                        items.push(Item { cost, uses: [memory, 0] });
                        means.push(Meaning { candidate: c, core: None });
                    }
                    Some(times) => {
                        for &core in cores {
                            if let Some(time) = times(&layers, c, core) {
                                items.push(Item { cost, uses: [memory, time] });
                                means.push(Meaning { candidate: c, core: Some(core) });
                            }
                        }
                    }
                }
            }
            if items.is_empty() {
                if let [layer] = layers[..] {
                    let layer = layer.name.clone();
                    return Err(if times.is_some() { Unusable::NoKernel { layer } } else { Unusable::NoFit { layer } });
                }
                continue;
            }
            *place = Some(groups.len());
            groups.push(items);
            members.push(group);
            meanings.push(means);
        }
        let ways = partitions((1 << unit.len()) - 1)
            .into_iter()
            .filter_map(|p| p.into_iter().map(|s| index[s]).collect())
            .collect();
        self.units.push(Unit { groups, ways });
        self.members.push(members);
        self.meanings.push(meanings);
        Ok(())
    }

    /// The units of choice.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// Bytes of the layers at 16 bits a weight.
    pub fn full_bytes(&self) -> i64 {
        self.layers.iter().map(|l| 2 * l.weights() as i64).sum()
    }

    /// The best plan within `memory` bytes and `time` femtoseconds a step (which includes [`Problem::constant`]).
    ///
    /// # Errors
    /// If there is none, with the smallest budget that would do; times in the error include the constant.
    pub fn solve(&self, memory: Option<i64>, time: Option<i64>, effort: Effort) -> Result<Allocation, Infeasible> {
        let budgets: Budgets = [memory, time.map(|t| t - self.constant)];
        let solution = solve(&self.units, budgets, effort).map_err(|e| match e {
            Infeasible::Resource { resource: TIME, budget, smallest } => Infeasible::Resource {
                resource: TIME,
                budget: budget + self.constant,
                smallest: smallest + self.constant,
            },
            Infeasible::Together { memory, time, smallest } => {
                Infeasible::Together { memory, time: time + self.constant, smallest: smallest + self.constant }
            }
            Infeasible::Resource { .. } => e,
        })?;
        Ok(self.allocation(solution))
    }

    /// The smallest memory that any plan needs.
    pub fn least_memory(&self) -> i64 {
        super::choice::least(&self.units, MEMORY)
    }

    /// The shortest step of any plan, in femtoseconds.
    pub fn least_time(&self) -> i64 {
        self.constant + super::choice::least(&self.units, TIME)
    }

    fn allocation(&self, mut solution: Solution) -> Allocation {
        let mut launches = Vec::new();
        for (u, pick) in solution.picks.iter_mut().enumerate() {
            self.hasten(u, pick);
            for (&g, &i) in self.units[u].ways[pick.way].iter().zip(&pick.items) {
                let Meaning { candidate, core } = self.meanings[u][g][i];
                launches.push(Launch { layers: self.members[u][g].clone(), candidate, core });
            }
        }
        solution.uses = super::choice::total(&self.units, &solution.picks).uses;
        launches.sort_by(|a, b| a.layers.cmp(&b.layers));
        Allocation { launches, solution }
    }

    /// Turns a pick into the fastest one with the same quantizers: a memory budget alone leaves that open.
    fn hasten(&self, u: usize, pick: &mut Pick) {
        let unit = &self.units[u];
        let mut wanted: Vec<(usize, usize)> = Vec::new();
        for (&g, &i) in unit.ways[pick.way].iter().zip(&pick.items) {
            wanted.extend(self.members[u][g].iter().map(|&l| (l, self.meanings[u][g][i].candidate)));
        }
        let candidate = |layer: usize| wanted.iter().find(|w| w.0 == layer).map(|w| w.1);
        let mut fastest = unit.total(pick).uses[TIME];
        for (way, groups) in unit.ways.iter().enumerate() {
            let items: Option<Vec<usize>> = groups
                .iter()
                .map(|&g| {
                    let c = candidate(self.members[u][g][0]);
                    if self.members[u][g].iter().any(|&l| candidate(l) != c) {
                        return None;
                    }
                    (0..unit.groups[g].len())
                        .filter(|&i| Some(self.meanings[u][g][i].candidate) == c)
                        .min_by_key(|&i| unit.groups[g][i].uses[TIME])
                })
                .collect();
            let Some(items) = items else { continue };
            let other = Pick { way, items };
            let time = unit.total(&other).uses[TIME];
            if time < fastest {
                fastest = time;
                *pick = other;
            }
        }
    }
}

/// Why a problem cannot be posed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Nothing to choose from.
    #[error("no quantizer to choose from: name at least one")]
    NoCandidates,
    /// The sides of a layer fit no candidate.
    #[error("the sides of `{layer}` fit none of the quantizers: name others beside them")]
    NoFit {
        /// The layer.
        layer: String,
    },
    /// The profile has no kernel for a layer under any candidate.
    #[error("the latency profile has no kernel for `{layer}` under any of the quantizers: profile them first")]
    NoKernel {
        /// The layer.
        layer: String,
    },
}

/// The units: layers that may share a launch, if `fusion`; else each by itself.
fn together(layers: &[Layer], fusion: bool) -> Vec<Vec<usize>> {
    let key = |layer: &Layer| match layer.role {
        Role::Block { block, matrix } if fusion => Some((block, matrix.input(), layer.shape.cols)),
        Role::Block { .. } | Role::Alone => None,
    };
    let mut out: Vec<Vec<usize>> = Vec::new();
    for (i, layer) in layers.iter().enumerate() {
        // A block's layers stand near each other.
        let mates = |unit: &&mut Vec<usize>| key(layer).is_some() && key(&layers[unit[0]]) == key(layer);
        match out.iter_mut().rev().take(Matrix::ALL.len()).find(mates) {
            Some(unit) => unit.push(i),
            None => out.push(vec![i]),
        }
    }
    out
}

/// Every launch that could be: all non-empty subsets of layers that share an input.
pub fn groups(layers: &[Layer]) -> Vec<Vec<usize>> {
    let subsets = |unit: Vec<usize>| {
        let all = 1..1usize << unit.len();
        all.map(move |s| (0..unit.len()).filter(|i| s >> i & 1 == 1).map(|i| unit[i]).collect())
    };
    together(layers, true).into_iter().flat_map(subsets).collect()
}

/// All partitions of the set of bits `set` into non-empty subsets.
fn partitions(set: usize) -> Vec<Vec<usize>> {
    if set == 0 {
        return vec![Vec::new()];
    }
    let first = set & set.wrapping_neg();
    let rest = set & !first;
    let mut out = Vec::new();
    // Subsets of the rest that join the first element, the empty one first.
    let mut sub = 0;
    loop {
        for mut p in partitions(rest & !sub) {
            p.insert(0, first | sub);
            out.push(p);
        }
        if sub == rest {
            return out;
        }
        sub = (sub.wrapping_sub(rest)) & rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles() {
        let role = |block, matrix| Role::Block { block, matrix };
        assert_eq!(Role::of("model.layers.3.self_attn.q_proj"), role(3, Matrix::Q));
        assert_eq!(Role::of("model.layers.31.mlp.gate_proj"), role(31, Matrix::Gate));
        assert_eq!(Role::of("0_self_attn.q_proj"), Role::Alone);
        assert_eq!(Role::of("lm_head"), Role::Alone);
        for alone in ["mlp.experts.7.gate_proj", "mlp.shared_experts.up_proj", "self_attn.qkv_proj", "mlp.gate"] {
            assert_eq!(Role::of(&format!("model.layers.3.{alone}")), Role::Alone, "{alone}");
        }
    }

    #[test]
    fn partitions_are_all_and_distinct() {
        assert_eq!(partitions(0b111).len(), 5);
        assert_eq!(partitions(0b11), vec![vec![0b01, 0b10], vec![0b11]]);
    }
}
