//! `qspec!` and `include_qspec!`: Rust tokens → the text they were → the checker of `qp-codegen` → its canonical text
//! as a constant, or errors at the tokens that they are about.

use std::ops::Range;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, Ident, Span, TokenStream, TokenTree};
use qp_codegen::spec::{self, Library, Quantizer};
use qp_codegen::syntax::{Diagnostic, Diagnostics, Severity};
use quote::quote;

/// Name of the text in diagnostics.
const NAME: &str = "qspec!";

/// The expansion as an expression, with errors in braces: several would not be one expression.
pub fn expression(expansion: syn::Result<TokenStream>) -> TokenStream {
    expansion.unwrap_or_else(|e| {
        let errors = e.into_compile_error();
        quote!({ #errors })
    })
}

/// The macro `qspec!`.
pub fn inline(input: TokenStream) -> syn::Result<TokenStream> {
    if let Ok(literal) = syn::parse2::<syn::LitStr>(input.clone()) {
        // Places within a literal cannot be underlined by a stable compiler: the message names them.
        let library = spec::load_str(NAME, &literal.value()).map_err(|d| whole(&d, literal.span()))?;
        return last(&library, literal.span());
    }
    let text = Text::new(input);
    match spec::load_str(NAME, &text.text) {
        Ok(library) => last(&library, Span::call_site()),
        Err(d) => Err(combined(d.list.iter().filter(|d| d.severity == Severity::Error).map(|e| text.error(e)))),
    }
}

/// The macro `include_qspec!`.
pub fn include(input: TokenStream) -> syn::Result<TokenStream> {
    let literal: syn::LitStr = syn::parse2(input)?;
    let value = literal.value();
    let (file, member) = match value.rsplit_once(':').filter(|(file, _)| file.ends_with(".qspec")) {
        Some((file, member)) => (file.to_string(), Some(member.to_string())),
        None => (value, None),
    };
    let path = folder(literal.span()).join(file);
    let library = spec::load_file(&path).map_err(|d| whole(&d, literal.span()))?;
    let value = match member {
        None => last(&library, literal.span())?,
        Some(name) => {
            let message = || format!("{} defines no quantizer `{name}`", path.display());
            let q = library.get(&name).ok_or_else(|| syn::Error::new(literal.span(), message()))?;
            constant(q, literal.span())?
        }
    };
    // The compiler must look again when a file changes.
    let files = library.files.iter().filter_map(|f| f.canonicalize().ok());
    let files: Vec<String> = files.map(|f| f.display().to_string()).collect();
    Ok(quote!({
        #(const _: &[u8] = ::core::include_bytes!(#files);)*
        #value
    }))
}

/// The folder of the file that holds `span`, or of the package.
fn folder(span: Span) -> PathBuf {
    let file = span.local_file();
    let folder = file.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    folder.or_else(|| std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from)).unwrap_or_default()
}

/// The last quantizer of `library` as an expression.
fn last(library: &Library, span: Span) -> syn::Result<TokenStream> {
    match library.quantizers.last() {
        Some(q) => constant(q, span),
        None => Err(syn::Error::new(span, "no quantizer is defined here")),
    }
}

/// `q` as an expression.
fn constant(q: &Quantizer, span: Span) -> syn::Result<TokenStream> {
    if let Some(d) = spec::untrained(q, &q.name) {
        return Err(syn::Error::new(span, message(&d)));
    }
    let text = q.canonical();
    Ok(quote!(::qp_codegen::spec::from_canonical(#text)))
}

fn message(d: &Diagnostic) -> String {
    d.hint.as_ref().map_or_else(|| d.message.clone(), |hint| format!("{}\n{hint}", d.message))
}

/// All errors at one place, each with its place in the text.
fn whole(d: &Diagnostics, span: Span) -> syn::Error {
    let errors = d.list.iter().filter(|e| e.severity == Severity::Error);
    combined(errors.map(|e| {
        let one = Diagnostics { sources: d.sources.clone(), list: vec![e.clone()] };
        let text = one.to_string();
        // The compiler says "error" itself.
        let text = text.strip_prefix("error: ").map_or_else(|| text.replacen(": error: ", ": ", 1), str::to_string);
        syn::Error::new(span, text)
    }))
}

fn combined(errors: impl Iterator<Item = syn::Error>) -> syn::Error {
    let all = errors.reduce(|mut all, e| {
        all.combine(e);
        all
    });
    all.unwrap_or_else(|| syn::Error::new(Span::call_site(), "the spec has errors"))
}

/// The text of tokens, laid out as in the source, and where each token is in it.
#[derive(Default)]
struct Text {
    text: String,
    tokens: Vec<(Range<usize>, Span)>,
    /// Line and column after the last token.
    at: Option<(usize, usize)>,
}

impl Text {
    fn new(input: TokenStream) -> Self {
        let mut out = Text::default();
        out.stream(input);
        out
    }

    fn stream(&mut self, input: TokenStream) {
        let mut tokens = input.into_iter().peekable();
        while let Some(t) = tokens.next() {
            match t {
                TokenTree::Group(g) => {
                    let (open, close) = match g.delimiter() {
                        Delimiter::Brace => ("{", "}"),
                        Delimiter::Parenthesis => ("(", ")"),
                        Delimiter::Bracket => ("[", "]"),
                        Delimiter::None => ("", ""),
                    };
                    self.token(open, g.span_open());
                    self.stream(g.stream());
                    self.token(close, g.span_close());
                }
                // A comment `/// text` arrives as `#[doc = "text"]`.
                TokenTree::Punct(p) if p.as_char() == '#' && matches!(tokens.peek(), Some(TokenTree::Group(_))) => {
                    tokens.next();
                }
                TokenTree::Ident(_) | TokenTree::Punct(_) | TokenTree::Literal(_) => {
                    self.token(&t.to_string(), t.span());
                }
            }
        }
    }

    fn token(&mut self, text: &str, span: Span) {
        let (start, end) = (span.start(), span.end());
        if let Some((line, column)) = self.at {
            if start.line > line {
                self.text.extend(std::iter::repeat_n('\n', start.line - line));
                self.text.extend(std::iter::repeat_n(' ', start.column));
            } else if start.line == line && start.column >= column {
                self.text.extend(std::iter::repeat_n(' ', start.column - column));
            } else if !matches!(text, "(" | "[") {
                // Tokens from elsewhere (another macro) have no order: any space will do, but an index must touch.
                self.text.push(' ');
            }
        }
        let from = self.text.len();
        self.text.push_str(text);
        self.tokens.push((from..self.text.len(), span));
        self.at = Some((end.line, end.column));
    }

    /// An error at the tokens of the diagnostic's first label.
    fn error(&self, d: &Diagnostic) -> syn::Error {
        let range = d.labels.first().map(|l| l.0.range()).unwrap_or_default();
        let touched = |t: &&(Range<usize>, Span)| t.0.start < range.end.max(range.start + 1) && range.start < t.0.end;
        let mut inside = self.tokens.iter().filter(touched);
        let Some(first) = inside.next().or(self.tokens.last()) else {
            return syn::Error::new(Span::call_site(), message(d));
        };
        let last = inside.next_back().unwrap_or(first);
        let ends = [first, last].map(|t| Ident::new("_here", t.1));
        let [a, b] = ends;
        syn::Error::new_spanned(quote!(#a #b), message(d))
    }
}
