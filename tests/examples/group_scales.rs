//! Whether a trellis gains by scales for groups of 128 columns, at equal bits: errors with one scale a row, and with scales
//! of 16 and of 8 bits (e4m3, under the row's) for each group; prints a table in Markdown.
//!
//!     cargo run --release -p qp-tests --example group_scales [MODEL_DIR]
//!
//! Sources are Gaussian weights and the linear layers of a model, rotated as the quantizer says. A group is encoded as a row of
//! 128 columns, which is what a field for 128 columns would be to the trellis.

use std::path::PathBuf;

use qp_codegen::reference::Rotator;
use qp_codegen::spec::format::Number;
use qp_codegen::spec::{Quantizer, Rotation, ScaleKind, Shape, resolve};
use qp_runtime::codec::{Decoder, Encoder, Gaussian};
use qp_runtime::model::TensorDir;
use qp_runtime::quantize::relative_error;

/// Columns of a group.
const GROUP: usize = 128;
/// Columns of the Gaussian matrix and its rows.
const GAUSSIAN: (usize, usize) = (4096, 256);

/// Weights of several matrices, row-major.
type Source = Vec<(usize, Vec<f32>)>;

fn rms(weights: &[f32]) -> f64 {
    (weights.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / weights.len() as f64).sqrt()
}

/// Sum of squared errors of `weights` as rows of `cols` columns.
fn squared(q: &Quantizer, cols: usize, weights: &[f32]) -> f64 {
    let shape = Shape { rows: (weights.len() / cols) as u32, cols: cols as u32 };
    let packed = Encoder::new(q).encode(shape, weights, &|_| ()).expect("finite weights");
    relative_error(&Decoder::new(q), &packed, weights) * rms(weights).powi(2) * weights.len() as f64
}

/// The same with a scale of 8 bits for each group: the nearest e4m3 number to the group's root mean square over the row's.
fn squared_by_bytes(q: &Quantizer, cols: usize, weights: &[f32]) -> f64 {
    let fixed = Quantizer { scale: ScaleKind::Matrix, ..q.clone() };
    let mut scales = Vec::new();
    let scaled: Vec<f32> = weights
        .chunks_exact(cols)
        .flat_map(|row| {
            let of_row = rms(row);
            row.chunks_exact(GROUP)
                .flat_map(|group| {
                    let scale = f64::from(Number::E4m3.value(Number::E4m3.nearest(rms(group) / of_row))) * of_row;
                    scales.push(scale);
                    group.iter().map(move |w| (f64::from(*w) / scale.max(1e-30)) as f32).collect::<Vec<f32>>()
                })
                .collect::<Vec<f32>>()
        })
        .collect();
    let groups = Shape { rows: scales.len() as u32, cols: GROUP as u32 };
    let packed = Encoder::new(&fixed).encode(groups, &scaled, &|_| ()).expect("finite weights");
    let decoded = qp_runtime::codec::decode_matrix(&fixed, &packed);
    let errors = decoded.chunks_exact(GROUP).zip(scaled.chunks_exact(GROUP)).zip(&scales);
    errors.map(|((a, b), s)| a.iter().zip(b).map(|(a, b)| (f64::from(a - b) * s).powi(2)).sum::<f64>()).sum()
}

fn main() {
    let model = std::env::args()
        .nth(1)
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/kjv-llama")), PathBuf::from);
    let (cols, rows) = GAUSSIAN;
    let gaussian: Source = vec![(cols, Gaussian::new(7).samples(rows * cols))];
    let dir = TensorDir::open(&model).expect("a model");
    let layers = |rotation: Rotation| -> Source {
        let names = dir.names().filter(|n| n.contains("layers.") && n.contains("_proj.weight"));
        names
            .map(|name| {
                let tensor = dir.tensor(name).expect("a tensor");
                let cols = tensor.shape[1];
                let mut weights = tensor.to_f32();
                let rotator = Rotator::new(rotation, cols as u32);
                weights.chunks_exact_mut(cols).for_each(|row| rotator.apply(row));
                (cols, weights)
            })
            .collect()
    };
    println!("| weights | quantizer | scales | bits | error | lost, bits |\n|---|---|---|---|---|---|");
    for name in ["tcq_2", "tcq_3", "tcq_4"] {
        let q = resolve(name).expect("of the palette");
        for (what, source) in [("Gaussian", &gaussian), ("model", &layers(q.rotation))] {
            let count: usize = source.iter().map(|m| m.1.len()).sum();
            let power: f64 = source.iter().map(|(_, w)| rms(w).powi(2) * w.len() as f64).sum();
            let of_rows: f64 =
                source.iter().map(|(cols, w)| 16.0 * (w.len() / cols) as f64).sum::<f64>() / count as f64;
            type Measure<'a> = &'a dyn Fn(usize, &[f32]) -> f64;
            let ways: [(&str, f64, Measure); 3] = [
                ("16 bits a row", of_rows, &|cols, w| squared(&q, cols, w)),
                ("16 bits a group", 16.0 / GROUP as f64, &|_, w| squared(&q, GROUP, w)),
                ("8 bits a group, 16 a row", of_rows + 8.0 / GROUP as f64, &|cols, w| squared_by_bytes(&q, cols, w)),
            ];
            for (scales, bits, measure) in ways {
                let error = source.iter().map(|(cols, w)| measure(*cols, w)).sum::<f64>() / power;
                let bits = q.rate() + bits;
                let lost = bits + 0.5 * error.log2();
                println!("| {what} | `{name}` | {scales} | {bits:.3} | {error:.5} | {lost:.3} |");
            }
        }
    }
}
