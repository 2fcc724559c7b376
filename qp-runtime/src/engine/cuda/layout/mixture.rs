//! How the matrices of a mixture's experts lie on a device: those of one form one below the other, so that a launch computes the
//! products of all of them and an expert is a distance.

use qp_codegen::kernels::experts::{most_pairs, units};
use qp_codegen::kernels::grouped::layout::Relaid;
use qp_codegen::layout::{COLUMN_PAD, Packed};
use qp_codegen::spec::Shape;

use super::{Form, Layout};
use crate::device::grouped;
use crate::device::ops::{first_rows, stacked};
use crate::model::program::{Expert, Mixture, Node};
use crate::model::{LayerId, Program};

/// Matrices of some of a mixture's experts, one below the other.
#[derive(Clone, Debug)]
pub struct Stack {
    /// Its place among [`Layout::matrices`].
    pub matrix: usize,
    /// Rows × columns of each expert's.
    pub member: Shape,
    /// The experts, in order.
    pub experts: Vec<usize>,
}

impl Stack {
    /// For each of `count` experts the place of its matrix in the stack, or −1.
    pub fn places(&self, count: usize) -> Vec<i32> {
        let place = |e| self.experts.iter().position(|other| *other == e).map_or(-1, |place| place as i32);
        (0..count).map(place).collect()
    }
}

/// Products whose results lie in one buffer, a row a pair of a token and an expert.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// One for each form that experts have; several of one form if they would be too large together.
    pub stacks: Vec<Stack>,
    /// Distance from one pair's results to the next one's.
    pub stride: u32,
}

/// The matrices of a mixture.
#[derive(Clone, Debug)]
pub struct Mixed {
    /// Gates, and behind them what they gate if `ups` is none.
    pub gates: Outputs,
    /// What gates gate, if that is computed by launches of its own.
    pub ups: Option<Outputs>,
    /// Where in a row of its buffer what gates gate begins.
    pub up: u32,
    /// The way back.
    pub downs: Outputs,
}

impl Mixed {
    /// Stores a mixture's matrices in `out`. Gates and what they gate are computed together where each expert has one quantizer, or
    /// one format, for both.
    pub(super) fn store(out: &mut Layout, mixture: &Mixture, forms: &[Form]) -> Mixed {
        let each = |part: fn(&Expert) -> LayerId| mixture.experts.iter().map(|e| vec![part(e)]).collect::<Vec<_>>();
        let (gates, ups) = (each(|e| e.gate), each(|e| e.up));
        let gate = out.program.layer(gates[0][0]);
        let (rows, cols) = (gate.rows as u32, gate.cols as u32);
        // Where what is gated begins, if it can lie behind the gates.
        let up = |pair: (&Vec<LayerId>, &Vec<LayerId>)| match (&forms[pair.0[0].0], &forms[pair.1[0].0]) {
            (Form::Packed(p), Form::Packed(q)) if p == q => Some(first_rows(q, cols, &[rows, rows])[1]),
            (Form::Grouped(p), Form::Grouped(q)) if p == q => Some(grouped::first_rows(&[rows, rows])[1]),
            (Form::Packed(_) | Form::Dense(_) | Form::Grouped(_) | Form::Shared, _) => None,
        };
        let first = up((&gates[0], &ups[0]));
        let downs = Outputs::store(out, each(|e| e.down), forms);
        match first.filter(|_| gates.iter().zip(&ups).all(|pair| up(pair) == first)) {
            Some(up) => {
                let both = gates.into_iter().zip(ups).map(|(gate, up)| [gate, up].concat()).collect();
                Mixed { gates: Outputs::store(out, both, forms), ups: None, up, downs }
            }
            None => Mixed {
                gates: Outputs::store(out, gates, forms),
                ups: Some(Outputs::store(out, ups, forms)),
                up: 0,
                downs,
            },
        }
    }

    /// All stacks.
    pub fn stacks(&self) -> impl Iterator<Item = &Stack> {
        [Some(&self.gates), self.ups.as_ref(), Some(&self.downs)].into_iter().flatten().flat_map(|o| &o.stacks)
    }
}

impl Outputs {
    /// Stores the layers of each expert, which have one form.
    fn store(out: &mut Layout, layers: Vec<Vec<LayerId>>, forms: &[Form]) -> Outputs {
        let form = |expert: usize| &forms[layers[expert][0].0];
        let mut kinds: Vec<Vec<usize>> = Vec::new();
        for expert in 0..layers.len() {
            match kinds.iter_mut().find(|kind| form(kind[0]) == form(expert)) {
                Some(kind) => kind.push(expert),
                None => kinds.push(vec![expert]),
            }
        }
        let (mut stacks, mut stride) = (Vec::new(), 0);
        for kind in kinds {
            let shapes: Vec<Shape> = layers[kind[0]].iter().map(|id| out.shape_of(*id)).collect();
            let (member, elements, padded) = match form(kind[0]) {
                Form::Packed(q) => {
                    let member = stacked(q, &shapes);
                    let packed = Packed::new(q, member);
                    (member, packed.words() as u64, packed.padded_rows())
                }
                Form::Grouped(terms) => {
                    let member = grouped::stacked(&shapes);
                    (member, Relaid::new(terms, member).elements(), member.rows)
                }
                Form::Dense(_) | Form::Shared => (shapes[0], shapes[0].len(), shapes[0].rows),
            };
            // Kernels count a buffer's elements in 31 bits.
            let most = (i32::MAX as u64 / elements.max(1)).max(1) as usize;
            for experts in kind.chunks(most) {
                let all = experts.iter().flat_map(|&e| layers[e].iter().copied()).collect();
                out.store(all, form(kind[0]));
                stacks.push(Stack { matrix: out.matrices.len() - 1, member, experts: experts.to_vec() });
            }
            stride = padded.max(stride);
        }
        Outputs { stacks, stride }
    }
}

/// What mixtures take of a step's buffers beside values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Pairs of a token and an expert.
    pub pairs: usize,
    /// Units of pairs.
    pub units: usize,
    /// Bytes of prepared activations.
    pub activations: usize,
}

impl Room {
    /// That of steps of the numbers of tokens `sizes`.
    pub fn of(program: &Program, sizes: impl Iterator<Item = u32> + Clone) -> Room {
        let mut room = Room::default();
        for (mixture, tokens) in mixtures(program).flat_map(|m| sizes.clone().map(move |tokens| (m, tokens))) {
            let (count, chosen) = (mixture.experts.len() as u32, mixture.routing.chosen as u32);
            let (pairs, most) = (tokens * chosen, most_pairs(tokens, chosen, count));
            let inner = program.layer(mixture.experts[0].down).cols;
            room.pairs = room.pairs.max(pairs as usize);
            room.units = room.units.max(units(count, pairs, most) as usize);
            room.activations = room.activations.max(2 * inner.next_multiple_of(COLUMN_PAD as usize) * pairs as usize);
        }
        room
    }
}

/// The mixtures of a program.
pub fn mixtures(program: &Program) -> impl Iterator<Item = &Mixture> {
    program.nodes.iter().filter_map(|node| if let Node::Mix(mixture) = node { Some(mixture) } else { None })
}

/// True if kernels can count what the mixtures of a step of `tokens` tokens compute.
pub fn can_take(program: &Program, tokens: u32) -> bool {
    // Rows are padded to whole tiles, of less than this.
    const PADDING: u64 = 1 << 12;
    mixtures(program).all(|m| {
        let down = program.layer(m.experts[0].down);
        let widest = (2 * down.cols).max(down.rows) as u64 + PADDING;
        u64::from(tokens) * m.routing.chosen as u64 * widest <= i32::MAX as u64
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use qp_codegen::cuda::Target;
    use qp_codegen::ir::Elem;
    use qp_codegen::spec::terms::Terms;

    use super::*;
    use crate::check::{shapes, synthetic};
    use crate::engine::Precision;
    use crate::engine::cuda::lower::{self, Op, Pick, Wanted};

    /// The layout of a mixture of 7 experts if `form` says the form of each layer.
    fn layout(form: impl Fn(&str) -> Form) -> Layout {
        let shapes = shapes().into_iter().find(|s| s.0 == "mixture of experts").expect("one of them").1;
        let (_, weights) = synthetic::model(&shapes, &|_| None).expect("a model");
        let program = &weights.program;
        let forms: Vec<Form> = program.ids().map(|id| form(&program.layer(id).name)).collect();
        Layout::new(program, &forms, &[], Precision::default())
    }

    fn packed(name: &str) -> Form {
        Form::Packed(Arc::new(qp_codegen::palette::get(name).expect("of the palette")))
    }

    /// The kinds of the launches of the first mixture, in a step of `tokens` tokens.
    fn kinds(layout: &Layout, tokens: u32) -> Vec<&'static str> {
        let step = lower::step(layout, &Target::Sm80.device(), tokens, Wanted { rows: 1, pick: Pick::Best });
        let node = layout.mixtures.keys().next().copied();
        step.launches.iter().filter(|l| Some(l.node) == node).map(|l| l.op.kind()).collect()
    }

    #[test]
    fn experts_of_one_quantizer_are_one_launch() {
        let layout = layout(|name| if name.contains("experts") { packed("nuq_3") } else { Form::Dense(Elem::F32) });
        let mixed = layout.mixtures.values().next().expect("a mixture");
        assert!(mixed.ups.is_none() && mixed.stacks().count() == 2);
        let all = mixed.stacks().next().expect("a stack");
        assert_eq!((all.places(7), layout.matrices[all.matrix].layers.len()), ((0..7).collect(), 14));
        let product = "product of experts";
        assert_eq!(kinds(&layout, 1), ["routing", "prepare", product, "prepare", product, "sum of experts"]);
        assert_eq!(kinds(&layout, 64)[..3], ["routing", "routing", "prepare"]);
        assert_eq!(kinds(&layout, 64).len(), 7);
    }

    #[test]
    fn experts_of_one_format_are_one_launch() {
        let terms = Arc::new(Terms::of(qp_codegen::formats::get("q8_0").expect("a format")).expect("exact products"));
        let form = Form::Grouped(terms.clone());
        let layout = layout(|name| if name.contains("experts") { form.clone() } else { Form::Dense(Elem::F32) });
        let mixed = layout.mixtures.values().next().expect("a mixture");
        assert!(mixed.ups.is_none() && mixed.stacks().count() == 2);
        let product = "product of experts";
        assert_eq!(kinds(&layout, 1), ["routing", "prepare", product, "prepare", product, "sum of experts"]);
        assert_eq!(kinds(&layout, 64).len(), 7);
        // All experts together take what each alone takes, padded to whole tiles.
        for stack in mixed.stacks() {
            let stored = &layout.matrices[stack.matrix];
            let [all, one] = [stored.shape, stack.member].map(|shape| Relaid::new(&terms, shape));
            assert_eq!((all.row_tiles(), all.words()), (7 * one.row_tiles(), 7 * one.words()));
        }
    }

    #[test]
    fn experts_of_several_quantizers_are_several_launches() {
        let layout = layout(|name| match name {
            _ if name.contains("experts.3.") => Form::Dense(Elem::F16),
            _ if name.contains("experts.5.down") => packed("tcq_3"),
            _ if name.contains("experts") => packed("nuq_3"),
            _ => Form::Dense(Elem::F32),
        });
        let mixed = layout.mixtures.values().next().expect("a mixture");
        let stacks = |outputs: &Outputs| outputs.stacks.iter().map(|s| s.experts.clone()).collect::<Vec<_>>();
        assert_eq!(stacks(&mixed.gates), [vec![0, 1, 2, 4, 5, 6], vec![3]]);
        assert_eq!(stacks(mixed.ups.as_ref().expect("of its own")), [vec![0, 1, 2, 4, 5, 6], vec![3]]);
        assert_eq!(stacks(&mixed.downs), [vec![0, 1, 2, 4, 6], vec![3], vec![5]]);
        assert_eq!(mixed.gates.stacks[0].places(7), [0, 1, 2, -1, 3, 4, 5]);
        let step = lower::step(&layout, &Target::Sm80.device(), 2, Wanted { rows: 1, pick: Pick::Best });
        let products = step.launches.iter().filter(|l| matches!(l.op, Op::Experts { .. } | Op::DenseExperts { .. }));
        assert_eq!(products.count(), 2 * 7);
    }

    #[test]
    fn steps_are_no_larger_than_kernels_count() {
        let program = layout(|_| Form::Dense(Elem::F32)).program;
        assert!(can_take(&program, 2048));
        let mut large = (*program).clone();
        let downs: Vec<LayerId> = mixtures(&program).flat_map(|m| m.experts.iter().map(|e| e.down)).collect();
        downs.iter().for_each(|id| large.layers[id.0].cols = 1 << 18);
        assert!(can_take(&large, 1024) && !can_take(&large, 2048));
    }
}
