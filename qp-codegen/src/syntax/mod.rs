//! `.qspec` text → tokens → tree, with diagnostics; and back, formatted.

pub mod diag;

pub use diag::{Diagnostic, Diagnostics, FileId, Severity, Sources, Span};
