//! `.qspec` text → tokens → tree, with diagnostics; and back, formatted. The language is described in
//! `docs/language.md`.
//!
//! 1. [`lexer`]: text → tokens and comments.
//! 2. [`parser`]: tokens → [`ast`], recovering from errors.
//! 3. [`format()`]: text → the same text, laid out in one way.
//!
//! What the tree means is the business of [`crate::spec`].

pub mod ast;
pub mod diag;
mod format;
pub mod lexer;
pub mod number;
pub mod parser;

pub use diag::{Diagnostic, Diagnostics, FileId, Severity, Sources, Span};
pub use format::format;
pub use parser::parse;
