//! What the macros refuse: at which tokens, and in which words.

use proc_macro2::TokenStream;

use super::{launch_args, qspec};

type Errors = Vec<(usize, String, String)>;

/// The errors of a macro for the tokens of `text`: the line and the text that each underlines, and its words. Without a place
/// of its own an error is in line 1 and underlines nothing: the compiler shows it at the whole call.
fn refused(call: fn(TokenStream) -> syn::Result<TokenStream>, text: &str) -> Errors {
    let tokens: TokenStream = text.parse().expect("tokens of Rust");
    let errors = call(tokens).expect_err("this is refused");
    let here = env!("CARGO_MANIFEST_DIR");
    let of_one = |e: syn::Error| {
        let (span, message) = (e.span(), e.to_string().replace(here, "$DIR"));
        (span.start().line, span.source_text().unwrap_or_default(), message)
    };
    errors.into_iter().map(of_one).collect()
}

fn same(found: Errors, expected: &[(usize, &str, &str)]) {
    let found: Vec<_> = found.iter().map(|(line, at, words)| (*line, at.as_str(), words.as_str())).collect();
    assert_eq!(found, expected);
}

#[test]
fn errors_of_syntax_are_underlined() {
    let text = "quantizer q {
        windw  16
        step
        block  2, 128
        decode w { let h = }
    }
    fusion f { lunch q }";
    same(
        refused(qspec::inline, text),
        &[
            (2, "windw", "there is no property `windw`\ndid you mean `window`?"),
            (3, "step", "expected an expression, found `block`"),
            (4, ",", "expected `x`, found `,`\na block is written `rows x columns`, as in `2 x 128`"),
            (5, "}", "expected an expression, found `}`"),
            (7, "lunch", "expected `launch` and matrices, as in `launch q + k + v`, found `lunch`"),
        ],
    );
}

#[test]
fn errors_of_meaning_are_underlined() {
    let text = "family tcq(kv) {
        window 25
        vector 2
        step   kv
        block  3 x 128
        values i8 + 1/2
        unit   2 ^ -5
        table  t[8] = [1, 2, 3]
        decode w {
            let h = w * 0x9E3779B1
            t[h >> 29] ^ signs(h[28], g[27])
        }
        scale  row
        rotate hadamrd(seed = 0)
    }
    quantizer tcq_1.5 = tcq(3)
    quantizer htcq_1.75 = mix(tcq_1.5, tcq_2.0)";
    same(
        refused(qspec::inline, text),
        &[
            (2, "25", "the window must be 1 to 24, not 25"),
            (5, "3", "the rows of a block must be even, not 3\na tensor-core operand holds two rows of each block"),
            (7, "2 ^ -5", "`^` is the exclusive or of words, not a power\na power is written `2 ** -5`"),
            (8, "[1, 2, 3]", "`t` needs 16 integers (8 entries of 2), not 3"),
            (11, "g", "there is no name `g`\nthere is h, w, t, kv"),
            (14, "hadamrd", "there is no rotation `hadamrd`\ndid you mean `hadamard`?"),
            (17, "tcq_2.0", "there is no quantizer `tcq_2.0`\ndid you mean `tcq_1.5`?"),
        ],
    );
}

#[test]
fn errors_within_a_literal_name_their_places() {
    let text = "\"quantizer q { window 30 }\"";
    same(
        refused(qspec::inline, text),
        &[
            (
                1,
                text,
                "qspec!:1:11: `q` says no `vector`, `step`, `block`, `values`, `unit`, `decode`, `scale`, `rotate`; add, for \
                 example: vector 2; step 4; block 2 x 128; values i8 + 1/2; unit 1/32; decode w { … }; scale row; rotate \
                 hadamard(seed = 0)",
            ),
            (1, text, "qspec!:1:22: the window must be 1 to 24, not 30"),
        ],
    );
}

#[test]
fn what_is_no_quantizer_is_refused() {
    same(refused(qspec::inline, ""), &[(1, "", "no quantizer is defined here")]);
    let untrained = "quantizer q {
        window 2  vector 1  step 2  block 2 x 128  values i8  unit 1/2
        table t[4] trained(seed = 1, rounds = 8, samples = 2 ** 20) in \"never_trained.table\"
        decode w { t[w] }
        scale row  rotate none
    }";
    let words = "the table `t` of `q` is not trained yet: there is no never_trained.table\nrun: qp train-codebook q";
    same(refused(qspec::inline, untrained), &[(1, "", words)]);
}

#[test]
fn files_that_cannot_be_included_are_named() {
    let codes = "\"../tests/specs/pass/include.qspec:three\"";
    let wrong = "\"../tests/specs/fail/mix.qspec\"";
    same(
        refused(qspec::include, "\"nowhere.qspec\""),
        &[(1, "\"nowhere.qspec\"", "cannot read $DIR/nowhere.qspec: No such file or directory (os error 2)")],
    );
    same(
        refused(qspec::include, codes),
        &[(1, codes, "$DIR/../tests/specs/pass/include.qspec defines no quantizer `three`")],
    );
    let errors = refused(qspec::include, wrong);
    assert!(errors.len() > 1 && errors.iter().all(|(_, at, _)| at == wrong), "{errors:?}");
    assert!(errors[0].2.starts_with("$DIR/../tests/specs/fail/mix.qspec:"), "{errors:?}");
    same(refused(qspec::include, "3"), &[(1, "3", "expected string literal")]);
}

#[test]
fn several_errors_are_one_expression() {
    let tokens: TokenStream = "quantizer q {\n windw 16\n step\n block 2, 128\n}".parse().expect("tokens of Rust");
    let errors = qspec::inline(tokens.clone()).expect_err("this is refused").into_iter().count();
    assert!(errors > 1);
    let expansion = qspec::expression(qspec::inline(tokens));
    let expression: syn::Expr = syn::parse2(expansion).expect("an expression");
    let syn::Expr::Block(block) = expression else { panic!("it is no block") };
    assert_eq!(block.block.stmts.len(), errors);
}

fn derive(input: TokenStream) -> syn::Result<TokenStream> {
    launch_args::derive(syn::parse2(input)?)
}

#[test]
fn launch_args_take_structs_with_named_fields() {
    let named = "LaunchArgs needs a struct with named fields: their names and order are the kernel's parameters";
    same(refused(derive, "struct Scale(f32, i32);"), &[(1, "(f32, i32)", named)]);
    same(refused(derive, "enum Choice { A }"), &[(1, "enum", named)]);
    same(refused(derive, "union Either { a: f32 }"), &[(1, "union", named)]);
    same(refused(derive, "struct Nothing;"), &[(1, "Nothing", named)]);
    same(refused(derive, "struct Empty {}"), &[(1, "Empty", "LaunchArgs needs at least one field")]);
}

#[test]
fn launch_args_are_the_fields_in_order_by_their_plain_names() {
    let input = "struct Scale<'a, T: Element> where T: Copy { r#in: &'a Buffer<T>, factor: f32 }";
    let output = derive(input.parse().expect("tokens of Rust")).expect("this is taken").to_string();
    let (first, second) = (output.find("name : \"in\""), output.find("name : \"factor\""));
    assert!(first.is_some() && first < second, "{output}");
    let header =
        "impl < 'a , T : Element > :: qp_runtime :: device :: LaunchArgs for Scale < 'a , T > where T : Copy {";
    assert!(output.starts_with(header), "{output}");
}
