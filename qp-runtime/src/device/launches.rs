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

/// Of [`qp_codegen::kernels::argmax`].
#[derive(LaunchArgs)]
pub struct Argmax<'a> {
    /// Rows × columns.
    pub logits: &'a Buffer<f32>,
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
