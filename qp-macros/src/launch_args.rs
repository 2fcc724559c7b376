//! `#[derive(LaunchArgs)]`: a struct whose fields are a kernel's parameters.

use proc_macro2::TokenStream;
use quote::quote;
use syn::ext::IdentExt;
use syn::{Data, DeriveInput, Error, Fields, Result};

/// The implementation of `qp_runtime::device::LaunchArgs` for the struct in `input`.
///
/// Only names are decided here; what a field's type means is decided by its `ArgField` implementation.
pub fn derive(input: DeriveInput) -> Result<TokenStream> {
    let named = "LaunchArgs needs a struct with named fields: their names and order are the kernel's parameters";
    let fields = match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => &fields.named,
            Fields::Unnamed(fields) => return Err(Error::new_spanned(fields, named)),
            Fields::Unit => return Err(Error::new_spanned(&input.ident, named)),
        },
        Data::Enum(data) => return Err(Error::new_spanned(data.enum_token, named)),
        Data::Union(data) => return Err(Error::new_spanned(data.union_token, named)),
    };
    if fields.is_empty() {
        return Err(Error::new_spanned(&input.ident, "LaunchArgs needs at least one field"));
    }
    let device = quote!(::qp_runtime::device);
    let idents: Vec<_> = fields.iter().filter_map(|f| f.ident.as_ref()).collect();
    let names = idents.iter().map(|i| i.unraw().to_string());
    let types = fields.iter().map(|f| &f.ty);
    let ident = &input.ident;
    let (impl_generics, type_generics, where_clause) = input.generics.split_for_impl();
    Ok(quote! {
        impl #impl_generics #device::LaunchArgs for #ident #type_generics #where_clause {
            const PARAMS: &'static [#device::ParamDecl] = &[
                #(#device::ParamDecl { name: #names, kind: <#types as #device::ArgField>::KIND }),*
            ];
            fn args(self) -> ::std::vec::Vec<#device::Arg> {
                ::std::vec![#(#device::ArgField::arg(self.#idents)),*]
            }
        }
    })
}
