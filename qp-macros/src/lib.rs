//! Specs checked at compile time, and launch-parameter structs that match their kernels.

mod launch_args;
mod qspec;
#[cfg(test)]
mod tests;

/// Makes a struct the parameters of a kernel: see `qp_runtime::device::LaunchArgs`.
#[proc_macro_derive(LaunchArgs)]
pub fn launch_args(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = syn::parse_macro_input!(input as syn::DeriveInput);
    launch_args::derive(input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// A quantizer written in the program: checked when the program is compiled, errors underlined where they are.
///
/// Takes `.qspec` items (see `docs/language.md`) as they are, or in one string literal, and gives the last quantizer
/// among them, a `qp_codegen::spec::Quantizer`. Paths of used files and tables are relative to the folder in which the
/// compiler runs.
///
/// ```
/// let q = qp_macros::qspec! {
///     quantizer ternary_like {
///         window 2  vector 1  step 2  block 2 x 128
///         values i8  unit 1/2
///         table t[4] = [-3, -1, 1, 3]
///         decode w { t[w] }
///         scale row  rotate none
///     }
/// };
/// assert_eq!(q.rate(), 2.0);
/// ```
#[proc_macro]
pub fn qspec(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    qspec::expression(qspec::inline(input.into())).into()
}

/// A quantizer of a `.qspec` file, checked when the program is compiled.
///
/// Takes a path relative to the source file, as `include_str!` does, and gives the file's last quantizer, or the one
/// named after a colon: `include_qspec!("codes.qspec:fast_2")`. The program needs no file at run time.
#[proc_macro]
pub fn include_qspec(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    qspec::expression(qspec::include(input.into())).into()
}
