use qp_runtime::device::{Buffer, LaunchArgs};

#[derive(LaunchArgs)]
struct Scale<'a> {
    input: &'a Buffer<f32>,
    output: &'a mut Buffer<f32>,
}

fn twice(buffer: &mut Buffer<f32>) {
    let _ = Scale { input: buffer, output: buffer }.args();
}

fn main() {}
