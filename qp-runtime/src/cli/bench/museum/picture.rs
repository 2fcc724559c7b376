//! Error over bits and time over bits, side by side.

use std::path::Path;

use qp_codegen::palette;

use super::super::results::Results;
use super::{Stored, speeds};
use crate::cli::Error;
use crate::svg::{Picture, escape};

const WIDTH: f64 = 1120.0;
const HEIGHT: f64 = 560.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = HEIGHT - 76.0;
/// Bits from the left edge of a panel to the right one.
const BITS: (f64, f64) = (1.0, 9.5);

/// Families by how names begin, and their colours.
const FAMILIES: [(&str, &[&str], &str); 8] = [
    ("llama.cpp", &["q", "iq", "tq"], "#d1495b"),
    ("GPTQ, AWQ", &["gptq", "awq", "packed"], "#e0a030"),
    ("bitsandbytes", &["nf4", "fp4"], "#7b5ea7"),
    ("MX, NVFP4", &["mx", "nvfp4"], "#3a9d5d"),
    ("int8, fp8", &["int8", "fp8"], "#20a0a0"),
    ("BitNet", &["bitnet"], "#8c6d46"),
    ("EXL3, QTIP", &["exl3", "qtip", "qpalette"], "#5b7fa7"),
    ("E8P, AQLM", &["e8p", "aqlm", "higgs"], "#a75b8f"),
];
const PALETTE: &str = "#33638d";
/// Kinds of the palette that are drawn as lines: with the least error, and with fast products.
const KINDS: [(&str, &str); 3] = [("fine", ""), ("tcq", "5 3"), ("nuq", "1 3")];

fn colour(name: &str) -> &'static str {
    let of = FAMILIES.iter().filter(|f| f.1.iter().any(|p| name.starts_with(p)));
    // `q4_0` begins as nothing else does; the longest beginning decides.
    let longest = |f: &&(&str, &[&str], &str)| f.1.iter().filter(|p| name.starts_with(**p)).map(|p| p.len()).max();
    of.max_by_key(longest).map_or("#666666", |f| f.2)
}

/// A panel: a plane of bits from left to right and a logarithmic scale upwards.
struct Panel {
    left: f64,
    right: f64,
    /// Smallest and largest value.
    values: (f64, f64),
    /// Boxes of labels that are there.
    labels: Vec<[f64; 4]>,
}

impl Panel {
    fn x(&self, bits: f64) -> f64 {
        self.left + (bits - BITS.0) / (BITS.1 - BITS.0) * (self.right - self.left)
    }

    fn y(&self, value: f64) -> f64 {
        let (least, most) = self.values;
        BOTTOM - (value / least).ln() / (most / least).ln() * (BOTTOM - TOP)
    }

    fn axes(&self, p: &mut Picture, title: &str, ticks: &[f64]) {
        let (left, right) = (self.left, self.right);
        p.put(format!("<text x=\"{left}\" y=\"{}\" font-size=\"12\">{}</text>", TOP - 12.0, escape(title)));
        for &tick in ticks {
            let y = self.y(tick);
            p.put(format!("<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/>"));
            p.put(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>", left - 6.0, y + 4.0));
        }
        for bits in BITS.0.ceil() as u32..=BITS.1 as u32 {
            let (x, y) = (self.x(bits.into()), BOTTOM + 16.0);
            p.put(format!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{bits}</text>"));
        }
        let (x, y) = ((left + right) / 2.0, BOTTOM + 34.0);
        p.put(format!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">bits a weight</text>"));
    }

    /// A line through points in order of bits.
    fn line(&self, p: &mut Picture, points: &[(f64, f64)], ink: &str, dash: &str) {
        let path: Vec<String> = points.iter().map(|q| format!("{:.1} {:.1}", self.x(q.0), self.y(q.1))).collect();
        let dash = if dash.is_empty() { String::new() } else { format!(" stroke-dasharray=\"{dash}\"") };
        p.put(format!("<path d=\"M{}\" fill=\"none\" stroke=\"{ink}\"{dash}/>", path.join("L")));
    }

    /// A mark with its name, which is moved until it meets no other.
    fn mark(&mut self, p: &mut Picture, name: &str, bits: f64, value: f64) {
        let (x, y, ink) = (self.x(bits), self.y(value), colour(name));
        let shown = format!("{name}: {} bits, {value}", (bits * 1e3).round() / 1e3);
        p.put(format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{ink}\"><title>{}</title></circle>",
            escape(&shown)
        ));
        let (width, height) = (4.4 * name.len() as f64, 8.0);
        let mut places = (0..40).map(|i| {
            let (side, far) = (i % 2, f64::from(i / 2));
            let away = if i / 2 % 2 == 0 { far / 2.0 } else { -(far + 1.0) / 2.0 };
            let x = if side == 0 { x + 5.0 } else { x - 5.0 - width };
            [x, y - 4.0 + away * height, x + width, y + 4.0 + away * height]
        });
        let free = |b: &[f64; 4]| {
            let apart = |o: &[f64; 4]| b[2] < o[0] || o[2] < b[0] || b[3] <= o[1] || o[3] <= b[1];
            b[0] > self.left && b[2] < self.right && b[1] > TOP && b[3] < BOTTOM && self.labels.iter().all(apart)
        };
        if let Some(b) = places.find(free) {
            let (x, y) = (b[0], b[3] - 1.5);
            p.put(format!("<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"8\" fill=\"{ink}\">{}</text>", escape(name)));
            self.labels.push(b);
        }
    }
}

/// The picture.
pub fn svg(root: &Path, stored: &Stored) -> Result<String, Error> {
    let mut p = Picture::new(WIDTH, HEIGHT, 56.0, "Formats beside the palette");
    let mut errors = Panel { left: 56.0, right: 560.0, values: (1e-5, 0.5), labels: Vec::new() };
    errors.axes(&mut p, "mean squared error, Gaussian weights of variance 1", &[1e-5, 1e-4, 1e-3, 1e-2, 1e-1]);
    let bound: Vec<(f64, f64)> = (8..=66).map(|i| f64::from(i) / 8.0).map(|b| (b, 2f64.powf(-2.0 * b))).collect();
    errors.line(&mut p, &bound, "#999", "");
    for (kind, dash) in KINDS {
        let of = palette::names().into_iter().filter(|n| n.split('_').next() == Some(kind));
        let mut points: Vec<(f64, f64)> =
            of.filter_map(|n| Some((palette::get(n)?.rate(), palette::distortion(n)?))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        errors.line(&mut p, &points, PALETTE, dash);
    }
    let formats = || stored.figures.iter().filter(|f| palette::get(&f.name).is_none());
    // Marks first take the room that labels must leave.
    errors.labels = formats().map(|f| around(errors.x(f.bits), errors.y(f.error))).collect();
    for f in formats() {
        errors.mark(&mut p, &f.name, f.bits, f.error);
    }
    let mut times = Panel { left: 620.0, right: WIDTH - 16.0, values: (10.0, 50.0), labels: Vec::new() };
    let title = "microseconds of a product of one token with 28672 x 4096 weights, H200";
    times.axes(&mut p, title, &[10.0, 12.0, 15.0, 20.0, 30.0, 40.0, 50.0]);
    let kernels = Results::read(&root.join("benches/results/kernels-h200.json"))?.kernels;
    for (kind, dash) in KINDS {
        let of = kernels.iter().filter(|k| (k.rows, k.cols, k.batch, k.used) == (28672, 4096, 1, true));
        let mut points: Vec<(f64, f64)> =
            of.filter(|k| k.spec.split('_').next() == Some(kind)).map(|k| (k.rate, k.us)).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        if !points.is_empty() {
            times.line(&mut p, &points, PALETTE, dash);
        }
    }
    let measured: Vec<(String, f64, f64)> =
        speeds(root)?.into_iter().filter_map(|(name, us)| Some((name.clone(), stored.of(&name)?.bits, us))).collect();
    times.labels = measured.iter().map(|m| around(times.x(m.1), times.y(m.2))).collect();
    for (name, bits, us) in &measured {
        times.mark(&mut p, name, *bits, *us);
    }
    legend(&mut p);
    Ok(p.finish())
}

/// The box of a mark.
fn around(x: f64, y: f64) -> [f64; 4] {
    [x - 3.0, y - 3.0, x + 3.0, y + 3.0]
}

fn legend(p: &mut Picture) {
    let y = HEIGHT - 16.0;
    let mut x = 56.0;
    let lines = [("bound D(R)", "#999", "")].into_iter().chain(KINDS.map(|(kind, dash)| (kind, PALETTE, dash)));
    for (name, ink, dash) in lines {
        p.put(format!("<path d=\"M{x} {}h24\" stroke=\"{ink}\" stroke-dasharray=\"{dash}\"/>", y - 4.0));
        p.put(format!("<text x=\"{}\" y=\"{y}\">{name}</text>", x + 30.0));
        x += 44.0 + 6.5 * name.len() as f64;
    }
    for (name, _, ink) in FAMILIES {
        p.put(format!("<circle cx=\"{}\" cy=\"{}\" r=\"3.5\" fill=\"{ink}\"/>", x + 4.0, y - 4.0));
        p.put(format!("<text x=\"{}\" y=\"{y}\">{}</text>", x + 14.0, escape(name)));
        x += 30.0 + 6.5 * name.len() as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_their_colours() {
        let of = |name: &str| FAMILIES.iter().find(|f| f.2 == colour(name)).map(|f| f.0);
        for name in qp_codegen::formats::names() {
            assert!(of(name).is_some(), "{name}");
        }
        assert_eq!(
            ["q4_k", "iq4_nl", "gptq_int3_g128", "nvfp4", "fp4"].map(of),
            ["llama.cpp", "llama.cpp", "GPTQ, AWQ", "MX, NVFP4", "bitsandbytes"].map(Some)
        );
    }
}
