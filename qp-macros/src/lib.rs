//! Specs checked at compile time, and launch-parameter structs that match their kernels.

mod launch_args;

/// Makes a struct the parameters of a kernel: see `qp_runtime::device::LaunchArgs`.
#[proc_macro_derive(LaunchArgs)]
pub fn launch_args(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = syn::parse_macro_input!(input as syn::DeriveInput);
    launch_args::derive(input).unwrap_or_else(syn::Error::into_compile_error).into()
}
