use qp_runtime::device::{Buffer, LaunchArgs};

#[derive(LaunchArgs)]
struct Scale<'a> {
    input: &'a Buffer<f32>,
    factor: f64,
}

fn main() {}
