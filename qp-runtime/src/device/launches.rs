//! The launch structs of the kernels between a model's matrices, one a lowering of [`qp_codegen::kernels`]; what each
//! field holds is said there.

use super::{Buffer, Element, LaunchArgs};

/// Of [`qp_codegen::kernels::embed`].
#[derive(LaunchArgs)]
pub struct Embed<'a, T: Element> {
    /// One a token.
    pub tokens: &'a Buffer<i32>,
    /// Vocabulary × columns.
    pub table: &'a Buffer<T>,
    /// Rows.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::norm`].
#[derive(LaunchArgs)]
pub struct Norm<'a> {
    /// Inputs.
    pub x: &'a Buffer<f32>,
    /// Weights.
    pub norm: &'a Buffer<f32>,
    /// Outputs.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::map`].
#[derive(LaunchArgs)]
pub struct Map<'a> {
    /// Inputs.
    pub x: &'a Buffer<f32>,
    /// Outputs.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::rows`].
#[derive(LaunchArgs)]
pub struct Rows<'a> {
    /// Which.
    pub rows: &'a Buffer<i32>,
    /// Of what.
    pub x: &'a Buffer<f32>,
    /// Where they go.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::glu`].
#[derive(LaunchArgs)]
pub struct Glu<'a> {
    /// Gates.
    pub gate: &'a Buffer<f32>,
    /// What they gate.
    pub up: &'a Buffer<f32>,
    /// Outputs.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::add`].
#[derive(LaunchArgs)]
pub struct Add<'a> {
    /// What is added.
    pub x: &'a Buffer<f32>,
    /// To what.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::leave`].
#[derive(LaunchArgs)]
pub struct Leave<'a> {
    /// What a product gave.
    pub x: &'a Buffer<f32>,
    /// One a row.
    pub factors: &'a Buffer<f32>,
    /// Outputs.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::dense`].
#[derive(LaunchArgs)]
pub struct Dense<'a, T: Element> {
    /// Rows × columns.
    pub weights: &'a Buffer<T>,
    /// Inputs.
    pub x: &'a Buffer<f32>,
    /// Outputs.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::experts::route`].
#[derive(LaunchArgs)]
pub struct Route<'a> {
    /// The router's, a row a token.
    pub scores: &'a Buffer<f32>,
    /// One an expert.
    pub correction: &'a Buffer<f32>,
    /// One a pair.
    pub experts: &'a mut Buffer<i32>,
    /// One a pair.
    pub weights: &'a mut Buffer<f32>,
    /// One a layer of the model.
    pub faults: &'a mut Buffer<i32>,
    /// The launch's place there.
    pub layer: i32,
}

/// Of [`qp_codegen::kernels::experts::group`].
#[derive(LaunchArgs)]
pub struct Group<'a> {
    /// One a pair.
    pub experts: &'a Buffer<i32>,
    /// Sorted.
    pub pairs: &'a mut Buffer<i32>,
    /// Four numbers each.
    pub units: &'a mut Buffer<i32>,
}

/// Of [`qp_codegen::kernels::dense::lower_for_experts`].
#[derive(LaunchArgs)]
pub struct DenseExperts<'a, T: Element> {
    /// Experts × rows × columns.
    pub weights: &'a Buffer<T>,
    /// Inputs.
    pub x: &'a Buffer<f32>,
    /// Outputs.
    pub y: &'a mut Buffer<f32>,
    /// Units, or the experts of pairs.
    pub units: &'a Buffer<i32>,
    /// Their pairs.
    pub pairs: &'a Buffer<i32>,
    /// Places of the experts' matrices.
    pub places: &'a Buffer<i32>,
}

/// Of [`qp_codegen::kernels::experts::unit`].
#[derive(LaunchArgs)]
pub struct GateExperts<'a> {
    /// Gates.
    pub gate: &'a Buffer<f32>,
    /// What they gate.
    pub up: &'a Buffer<f32>,
    /// Experts × columns.
    pub gate_bias: &'a Buffer<f32>,
    /// Experts × columns.
    pub up_bias: &'a Buffer<f32>,
    /// One a pair.
    pub experts: &'a Buffer<i32>,
    /// Outputs.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::experts::combine`].
#[derive(LaunchArgs)]
pub struct Combine<'a> {
    /// A row a pair.
    pub x: &'a Buffer<f32>,
    /// Experts × columns.
    pub bias: &'a Buffer<f32>,
    /// One a pair.
    pub experts: &'a Buffer<i32>,
    /// One a pair.
    pub weights: &'a Buffer<f32>,
    /// A row a token.
    pub y: &'a mut Buffer<f32>,
}

/// Of [`qp_codegen::kernels::argmax`].
#[derive(LaunchArgs)]
pub struct Argmax<'a> {
    /// Rows × columns.
    pub logits: &'a Buffer<f32>,
    /// Where the blocks of a row meet.
    pub scratch: &'a mut Buffer<u32>,
    /// One a row.
    pub best: &'a mut Buffer<i32>,
}

/// Of [`qp_codegen::kernels::sample`].
#[derive(LaunchArgs)]
pub struct Sample<'a> {
    /// Rows × columns.
    pub logits: &'a Buffer<f32>,
    /// Settings of each row.
    pub settings: &'a Buffer<u32>,
    /// Number of each row's draw.
    pub draws: &'a Buffer<i32>,
    /// Masks of tokens that were seen.
    pub seen: &'a mut Buffer<u32>,
    /// One a row.
    pub tokens: &'a mut Buffer<i32>,
}

/// Of [`qp_codegen::kernels::read`].
#[derive(LaunchArgs)]
pub struct Read<'a> {
    /// What is read.
    pub x: &'a Buffer<u32>,
    /// Sums.
    pub y: &'a mut Buffer<u32>,
}
