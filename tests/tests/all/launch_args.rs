//! What `#[derive(LaunchArgs)]` refuses, and in which words.

#[test]
fn refusals() {
    trybuild::TestCases::new().compile_fail("ui/launch_args/*.rs");
}
