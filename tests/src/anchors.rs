//! The published allocation problem of Llama-3.1-8B, from `data/q-palette`.

use std::collections::BTreeMap;
use std::path::Path;

use qp_codegen::spec::{Matrix, Shape};
use qp_runtime::allocate::{Candidate, Core, Freedom, Layer, Problem, Role};

/// Seconds to femtoseconds, rounded up.
pub fn femtoseconds(seconds: f64) -> i64 {
    (seconds * 1e15).ceil() as i64
}

fn read(name: &str) -> BTreeMap<String, f64> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/q-palette").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Bits a weight and bytes of the table, from a quantizer's name.
fn bits_and_table(name: &str) -> (f64, i64) {
    let n: Vec<u32> = name.split('_').filter_map(|x| x.parse().ok()).collect();
    let trellis = |kv: u32| 4i64 << if kv <= 8 { 9 } else { kv + 1 };
    let (a, b) = (n[0], n.get(1).copied().unwrap_or(0));
    match name.split('_').next() {
        Some("tcq") => (f64::from(a) / 2.0, trellis(a)),
        Some("tcomb") => (f64::from(a + b) / 4.0, trellis(b)),
        Some("ldlq") => (f64::from(b) / f64::from(a), (i64::from(a) * 2) << b),
        Some(_) | None => panic!("an unknown quantizer, {name}"),
    }
}

/// Which quantizers may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The 15 TCQ and half-TCQ rates.
    Trellis,
    /// Those, NUQ and VQ2: 32.
    All,
}

fn key(matrix: Matrix) -> String {
    let part = match matrix {
        Matrix::Q | Matrix::K | Matrix::V | Matrix::O => "self_attn",
        Matrix::Gate | Matrix::Up | Matrix::Down => "mlp",
    };
    format!("{part}.{}_proj", matrix.name())
}

/// The layers of Llama-3.1-8B; more than 32 blocks repeat them with sensitivities that grow by 1 %.
pub fn layers(blocks: u32) -> Vec<Layer> {
    let sensitivity = read("llama31_8b_sensitivity.json");
    let mut out = Vec::new();
    for block in 0..blocks {
        for matrix in Matrix::ALL {
            let (rows, cols) = match matrix {
                Matrix::Q | Matrix::O => (4096, 4096),
                Matrix::K | Matrix::V => (1024, 4096),
                Matrix::Gate | Matrix::Up => (14336, 4096),
                Matrix::Down => (4096, 14336),
            };
            let a = sensitivity[&format!("{}_{}", block % 32, key(matrix))];
            out.push(Layer {
                name: format!("model.layers.{block}.{}", key(matrix)),
                role: Role::Block { block, matrix },
                shape: Shape { rows, cols },
                sensitivity: a * (1.0 + 0.01 * f64::from(block / 32)),
            });
        }
    }
    out
}

/// The problem with `blocks` blocks. Beyond the `choice`, `extra` quantizers are made up: each like a published one,
/// with rate, error and times changed a little.
pub fn problem(choice: Choice, freedom: Freedom, timed: bool, blocks: u32, extra: usize) -> Problem {
    let distortion = read("qpalette_distortion.json");
    let seconds = read("llama31_8b_latency_4090.json");
    let mut candidates = Vec::new();
    let mut origin: Vec<(String, f64)> = Vec::new();
    for (name, &error) in &distortion {
        let trellis = name.starts_with("tcq") || name.starts_with("tcomb");
        let bits = bits_and_table(name).0;
        // Their 1-bit and 1.25-bit codes have no kernels.
        if (trellis && bits < 1.5) || (choice == Choice::Trellis && !trellis) {
            continue;
        }
        candidates.push(Candidate { name: name.clone(), bits, distortion: error });
        origin.push((name.clone(), 1.0));
    }
    let published = candidates.len();
    for i in 0..extra {
        // Fractions of multiples of the golden ratio are spread evenly.
        let spread = |k: f64| ((i + 1) as f64 * 0.618_033_988_749_895 * k).fract() - 0.5;
        let mut like = candidates[(i * 7) % published].clone();
        let change = 1.0 + 0.3 * spread(1.0);
        like.distortion *= 4f64.powf(like.bits * (1.0 - change)) * (1.0 + 0.1 * spread(3.0));
        like.bits *= change;
        origin.push((std::mem::take(&mut like.name), change * (1.0 + 0.1 * spread(7.0))));
        like.name = format!("made_up_{i}");
        candidates.push(like);
    }
    let rates: Vec<f64> = candidates.iter().map(|c| c.bits).collect();
    let bytes = |layer: &Layer, c: usize| {
        Some((layer.weights() as f64 * rates[c] / 8.0).ceil() as i64 + bits_and_table(&origin[c].0).1)
    };
    let times = |layers: &[&Layer], c: usize, core: Core| {
        let mut group: String = layers.iter().filter_map(|l| l.short().chars().next()).collect();
        if group == "gu" {
            group = "ug".to_owned();
        }
        let cuda = if core == Core::Cuda { "True" } else { "False" };
        seconds.get(&format!("{group}_{}_{cuda}", origin[c].0)).map(|s| femtoseconds(s * origin[c].1))
    };
    let constant = femtoseconds(seconds["constant"]);
    Problem::new(layers(blocks), candidates, freedom, constant, &bytes, timed.then_some(&times))
        .expect("a usable problem")
}
