use qp_runtime::device::LaunchArgs;

#[derive(LaunchArgs)]
struct Scale(f32, i32);

#[derive(LaunchArgs)]
enum Choice {
    A,
}

#[derive(LaunchArgs)]
struct Nothing;

#[derive(LaunchArgs)]
struct Empty {}

fn main() {}
