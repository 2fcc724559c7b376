//! The launches of a mixture of experts.

use qp_codegen::kernels::Span;
use qp_codegen::kernels::dense::Dense;
use qp_codegen::kernels::experts::combine::Combine;
use qp_codegen::kernels::experts::group::Group;
use qp_codegen::kernels::experts::route::Route;
use qp_codegen::kernels::experts::unit::GateExperts;
use qp_codegen::kernels::experts::{Experts, most_pairs};
use qp_codegen::kernels::prepare::{Gate, Prepare};
use qp_codegen::reference::Activation;
use qp_codegen::reference::routing::Unit;

use super::{Lowering, Op, Preparation, Slot};
use crate::engine::cuda::layout::Form;
use crate::engine::cuda::layout::mixture::Outputs;
use crate::model::program::{Mixture, Value};

/// What enters products of experts.
#[derive(Clone, Copy)]
enum Input {
    /// Tokens, which their pairs share.
    Tokens(Value),
    /// Pairs, gated as they are prepared.
    Gated { gate: Rows, up: Rows, activation: Activation },
    /// Pairs.
    Pairs(Rows),
}

/// Where pairs' values lie.
#[derive(Clone, Copy)]
struct Rows {
    slot: Slot,
    span: Span,
    columns: u32,
}

impl Lowering<'_> {
    /// A mixture of experts.
    pub(super) fn mix(&mut self, mixture: &Mixture) {
        let (layout, tokens) = (self.layout, self.batch);
        let mixed = &layout.mixtures[&self.at];
        let layer = |id| layout.program.layer(id);
        let expert = mixture.experts[0];
        let (count, chosen) = (mixture.experts.len() as u32, mixture.routing.chosen as u32);
        let (pairs, most) = (tokens * chosen, most_pairs(tokens, chosen, count));
        self.materialise(mixture.scores);
        let scores = self.place(mixture.scores);
        let (routing, corrected) = (mixture.routing, mixture.correction.is_some());
        let op = Route { experts: count, batch: tokens, scores: scores.span, routing, corrected };
        self.launch(Op::Route(op), &[scores.slot], None).vectors = mixture.correction.into_iter().collect();
        if most > 1 {
            self.launch(Op::Group(Group { count, pairs, most }), &[], None);
        }
        let of_tokens = Experts { count, matrices: 0, rows: tokens, pairs, most, stride: 0 };
        let inner = layer(expert.down).cols as u32;
        let rows = |(slot, span): (Slot, Span)| Rows { slot, span, columns: inner };
        let gates = self.products(&mixed.gates, of_tokens, Input::Tokens(mixture.x));
        let gate = rows(gates);
        let up = match &mixed.ups {
            Some(ups) => rows(self.products(ups, of_tokens, Input::Tokens(mixture.x))),
            None => rows((gates.0, Span { first: mixed.up, ..gates.1 })),
        };
        let prepared = |outputs: &Outputs| {
            let is = |at: usize| Preparation::of(&layout.matrices[at].form, at).is_some();
            outputs.stacks.iter().all(|stack| is(stack.matrix))
        };
        let biased = layer(expert.gate).bias;
        let input = match mixture.unit {
            Unit::Plain(activation) if !biased && prepared(&mixed.downs) => Input::Gated { gate, up, activation },
            unit => {
                let slot = self.take(chosen * inner);
                let op = GateExperts { columns: inner, pairs, count, unit, gate: gate.span, up: up.span, biased };
                self.launch(Op::GateExperts(op), &[gate.slot, up.slot], Some(slot));
                Input::Pairs(rows((slot, Span::rows(inner))))
            }
        };
        let (slot, span) = self.products(&mixed.downs, Experts { rows: pairs, ..of_tokens }, input);
        let width = layout.program.widths[mixture.y.0] as u32;
        let (to, y, accumulate) = match self.sum_of(mixture.y) {
            Some((place, sum)) => {
                self.put(sum, place.slot, place.span);
                (place.slot, place.span, true)
            }
            None => {
                let (slot, span) = self.own(mixture.y);
                (slot, span, false)
            }
        };
        let biased = layer(expert.down).bias;
        let op = Combine { columns: width, batch: tokens, chosen, count, x: span, y, biased, accumulate };
        self.launch(Op::Combine(op), &[slot], Some(to));
        let inner = if let Input::Pairs(rows) = input { Some(rows.slot) } else { None };
        for slot in [gate.slot, up.slot, slot].into_iter().chain(inner) {
            self.used.remove(&slot);
        }
    }

    /// Products of all experts, of which `experts` says all that the stacks have in common. Gives where the pairs' results lie.
    fn products(&mut self, outputs: &Outputs, experts: Experts, input: Input) -> (Slot, Span) {
        let (layout, stride) = (self.layout, outputs.stride);
        // A token's pairs lie side by side.
        let slot = self.take(experts.pairs / self.batch * stride);
        let mut prepared = None;
        for stack in &outputs.stacks {
            let stored = &layout.matrices[stack.matrix];
            let experts = Experts { matrices: stack.experts.len() as u32, stride, ..experts };
            if let Some(wanted) = Preparation::of(&stored.form, stack.matrix)
                && prepared != Some(wanted)
            {
                prepared = Some(wanted);
                self.prepare_for(input, experts.rows, wanted);
            }
            let (op, reads) = match &stored.form {
                Form::Packed(_) => (Op::Experts { spec: stored.spec, shape: stack.member, experts }, None),
                Form::Grouped(terms) => {
                    (Op::GroupedExperts { terms: terms.clone(), shape: stack.member, experts }, None)
                }
                Form::Dense(elem) => {
                    let (from, x) = match input {
                        Input::Tokens(x) => {
                            self.materialise(x);
                            let place = self.place(x);
                            (place.slot, place.span)
                        }
                        Input::Pairs(rows) => (rows.slot, rows.span),
                        Input::Gated { .. } => {
                            unreachable!("gated as they are prepared, which dense layers do without")
                        }
                    };
                    let (rows, cols, batch) = (stack.member.rows, stack.member.cols, experts.most);
                    let y = Span::rows(stride);
                    let op = Dense { rows, cols, elem: *elem, batch, x, y, accumulate: false };
                    (Op::DenseExperts { op, experts }, Some(from))
                }
                Form::Shared => unreachable!("experts share no matrices"),
            };
            let reads: Vec<Slot> = reads.into_iter().collect();
            self.launch(op, &reads, Some(slot)).matrix = Some(stack.matrix);
        }
        (slot, Span::rows(stride))
    }

    /// The preparation of `batch` rows, of which `wanted` says the rest.
    fn prepare_for(&mut self, input: Input, batch: u32, wanted: Preparation) {
        let (rows, gate) = match input {
            Input::Tokens(x) => return self.prepare(x, wanted),
            Input::Gated { gate, up, activation } => (gate, Some((up.slot, Gate { activation, up: up.span }))),
            Input::Pairs(rows) => (rows, None),
        };
        let up = gate.map(|(slot, _)| slot);
        let Preparation { rotation, entering, matrix } = wanted;
        let op = Prepare {
            columns: rows.columns,
            batch,
            input: rows.span,
            gate: gate.map(|(_, gate)| gate),
            norm: None,
            rotation,
            entering,
        };
        let reads: Vec<Slot> = [rows.slot].into_iter().chain(up).collect();
        self.launch(Op::Prepare(op), &reads, None).matrix = matrix;
    }
}
