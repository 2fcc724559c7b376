//! The parameters of a kernel as a Rust struct.
//!
//! [`LaunchArgs`] is derived: each field is a parameter, in order, by name. `&Buffer<T>` is a buffer that the kernel
//! reads, `&mut Buffer<T>` one that it writes, and `i32`, `u32` or `f32` a scalar.
//!
//! ```
//! use qp_runtime::device::{Buffer, LaunchArgs};
//!
//! #[derive(LaunchArgs)]
//! struct Scale<'a> {
//!     input: &'a Buffer<f32>,
//!     output: &'a mut Buffer<f32>,
//!     factor: f32,
//! }
//! assert_eq!(Scale::PARAMS.len(), 3);
//! assert_eq!(Scale::PARAMS[1].name, "output");
//! ```
//!
//! A field of another type does not compile:
//!
//! ```compile_fail,E0277
//! # use qp_runtime::device::{Buffer, LaunchArgs};
//! #[derive(LaunchArgs)]
//! struct Scale<'a> {
//!     input: &'a Buffer<f32>,
//!     factor: f64,
//! }
//! ```
//!
//! Nor does a launch that reads and writes one buffer:
//!
//! ```compile_fail,E0502
//! # use qp_runtime::device::{Buffer, LaunchArgs};
//! # #[derive(LaunchArgs)]
//! # struct Scale<'a> {
//! #     input: &'a Buffer<f32>,
//! #     output: &'a mut Buffer<f32>,
//! # }
//! fn twice(buffer: &mut Buffer<f32>) {
//!     let _ = Scale { input: buffer, output: buffer }.args();
//! }
//! ```
//!
//! Where a kernel meets a struct, [`check`] compares names, order, element types and who writes.

use std::fmt;

use qp_codegen::ir::{Elem, Param, ParamKind, Scalar};

use super::executor::{Buffer, RawBuffer};

/// A type that a buffer's elements have in Rust.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no element type of kernels",
    note = "they are i8, u8, i16, u16, i32, u32, half::f16, half::bf16 and f32"
)]
pub trait Element: bytemuck::Pod + Send + Sync {
    /// Its name in kernels.
    const ELEM: Elem;
}

macro_rules! elements {
    ($($ty:ty = $elem:ident),*) => { $(
        impl Element for $ty {
            const ELEM: Elem = Elem::$elem;
        }
    )* };
}

elements!(i8 = I8, u8 = U8, i16 = I16, u16 = U16, i32 = I32, u32 = U32, half::f16 = F16, half::bf16 = BF16, f32 = F32);

/// One parameter, as a struct declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamDecl {
    /// The field's name.
    pub name: &'static str,
    /// Buffer or scalar.
    pub kind: ParamKind,
}

/// One argument of a launch.
#[derive(Clone)]
pub enum Arg {
    /// A buffer.
    Buffer(RawBuffer),
    /// `I32`.
    I32(i32),
    /// `U32`.
    U32(u32),
    /// `F32`.
    F32(f32),
}

/// A type that a field of a [`LaunchArgs`] struct may have.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a parameter of a kernel",
    note = "a field is `&Buffer<T>` (read), `&mut Buffer<T>` (written), `i32`, `u32` or `f32`"
)]
pub trait ArgField {
    /// What it declares.
    const KIND: ParamKind;
    /// What it passes.
    fn arg(self) -> Arg;
}

impl<T: Element> ArgField for &Buffer<T> {
    const KIND: ParamKind = ParamKind::Buffer { elem: T::ELEM, writable: false };
    fn arg(self) -> Arg {
        Arg::Buffer(self.raw().clone())
    }
}

impl<T: Element> ArgField for &mut Buffer<T> {
    const KIND: ParamKind = ParamKind::Buffer { elem: T::ELEM, writable: true };
    fn arg(self) -> Arg {
        Arg::Buffer(self.raw().clone())
    }
}

macro_rules! scalars {
    ($($ty:ty = $scalar:ident),*) => { $(
        impl ArgField for $ty {
            const KIND: ParamKind = ParamKind::Scalar(Scalar::$scalar);
            fn arg(self) -> Arg {
                Arg::$scalar(self)
            }
        }
    )* };
}

scalars!(i32 = I32, u32 = U32, f32 = F32);

/// A struct whose fields are the parameters of a kernel. Derive it.
pub trait LaunchArgs {
    /// The parameters in order.
    const PARAMS: &'static [ParamDecl];
    /// The arguments in order.
    fn args(self) -> Vec<Arg>;
}

/// The first difference between a kernel's parameters and a struct.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "kernel `{kernel}` does not take what is passed: parameter {position} is {}, but the launch struct has {}",
    Shown(kernel_has),
    Shown(struct_has)
)]
pub struct Mismatch {
    /// The kernel's name.
    pub kernel: String,
    /// Position of the parameter, from 0.
    pub position: usize,
    /// The kernel's parameter there, if any.
    pub kernel_has: Option<(String, ParamKind)>,
    /// The struct's field there, if any.
    pub struct_has: Option<(String, ParamKind)>,
}

struct Shown<'a>(&'a Option<(String, ParamKind)>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("absent"),
            Some((name, ParamKind::Buffer { elem, writable })) => {
                write!(f, "`{name}` ({} buffer of {elem:?})", if *writable { "written" } else { "read" })
            }
            Some((name, ParamKind::Scalar(s))) => write!(f, "`{name}` (scalar {s:?})"),
        }
    }
}

/// Compares a kernel's parameters with a struct's.
///
/// # Errors
/// The first difference.
pub fn check(kernel: &str, params: &[Param], fields: &[ParamDecl]) -> Result<(), Mismatch> {
    for position in 0..params.len().max(fields.len()) {
        let kernel_has = params.get(position).map(|p| (p.name.clone(), p.kind));
        let struct_has = fields.get(position).map(|p| (p.name.to_owned(), p.kind));
        if kernel_has != struct_has {
            return Err(Mismatch { kernel: kernel.into(), position, kernel_has, struct_has });
        }
    }
    Ok(())
}
