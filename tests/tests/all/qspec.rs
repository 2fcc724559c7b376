//! What `qspec!` and `include_qspec!` give, and what they refuse: where, and in which words.

#[test]
fn values_and_refusals() {
    let cases = trybuild::TestCases::new();
    cases.pass("ui/qspec/pass/*.rs");
    cases.compile_fail("ui/qspec/fail/*.rs");
}
