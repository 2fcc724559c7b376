//! `qp bench roofline`: measured products under the roof of the memory, as a picture.

use std::path::PathBuf;

use clap::Args;

use super::results::{Kernel, Results};
use crate::cli::Error;
use crate::cli::output::write;
use crate::svg::{self, Picture, escape};

/// Draw what `qp bench kernels --json` measured: packed weights read a second over bits a weight, under the bandwidth of
/// the memory.
#[derive(Args)]
pub struct RooflineBench {
    /// The measurements.
    results: PathBuf,
    /// The picture to write (SVG).
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Products of so many tokens.
    #[arg(long, default_value_t = 1)]
    batch: u32,
}

impl RooflineBench {
    /// Runs it.
    ///
    /// # Errors
    /// Measurements that cannot be read or hold none of that batch, a picture that cannot be written.
    pub fn run(self) -> Result<(), Error> {
        let results = Results::read(&self.results)?;
        let picture = svg(&results, self.batch)
            .ok_or_else(|| format!("{} holds no products of {} token(s)", self.results.display(), self.batch))?;
        write(&self.out, &picture)
    }
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 540.0;
/// The corners of the plot.
const LEFT: f64 = 64.0;
const RIGHT: f64 = WIDTH - 160.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = HEIGHT - 54.0;
/// Half the size of a mark.
const MARK: f64 = 5.0;
/// From the marks of one family to those of the next.
const APART: f64 = 5.0;
/// Bits of a weight in half precision.
const FP16: f64 = 16.0;

/// The plane of the plot, in pixels: bits a weight from left to right, by their logarithm; GB/s upwards.
struct Axes {
    bits: (f64, f64),
    most: f64,
}

impl Axes {
    fn x(&self, bits: f64) -> f64 {
        let (low, high) = self.bits;
        LEFT + (RIGHT - LEFT) * (bits / low).ln() / (high / low).ln()
    }

    fn y(&self, gb_per_s: f64) -> f64 {
        BOTTOM - (BOTTOM - TOP) * gb_per_s / self.most
    }

    /// A line across at a bandwidth, with its name above.
    fn roof(&self, picture: &mut Picture, bytes_per_second: f64, name: &str, dashes: &str) {
        let y = self.y(bytes_per_second / 1e9);
        picture.put(format!(
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{RIGHT}\" y2=\"{y:.1}\" stroke=\"#a00\" stroke-dasharray=\"{dashes}\"/>"
        ));
        picture.put(format!(
            "<text x=\"{}\" y=\"{:.1}\" fill=\"#a00\">{name}: {:.2} TB/s</text>",
            LEFT + 6.0,
            y - 5.0,
            bytes_per_second / 1e12
        ));
    }

    fn draw(&self, picture: &mut Picture) {
        let step = if self.most > 2500.0 { 500.0 } else { 100.0 };
        for i in 0..=(self.most / step) as u32 {
            let (value, y) = (step * f64::from(i), self.y(step * f64::from(i)));
            picture.put(format!(
                "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{RIGHT}\" y2=\"{y:.1}\" stroke=\"{}\"/>",
                if i == 0 { "#555" } else { "#e4e4e4" }
            ));
            let x = LEFT - 6.0;
            picture
                .put(format!("<text x=\"{x}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{value}</text>", y + 4.0));
        }
        let ticks = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, FP16];
        for bits in ticks.into_iter().filter(|b| (self.bits.0..self.bits.1).contains(b)) {
            let x = self.x(bits);
            picture.put(format!("<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{BOTTOM}\" stroke=\"#f0f0f0\"/>"));
            let y = BOTTOM + 16.0;
            picture.put(format!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\" fill=\"#555\">{bits}</text>"));
        }
        let (middle, y) = ((LEFT + RIGHT) / 2.0, BOTTOM + 36.0);
        picture.put(format!("<text x=\"{middle}\" y=\"{y}\" text-anchor=\"middle\">bits a weight</text>"));
        let y = (TOP + BOTTOM) / 2.0;
        picture.put(format!(
            "<text x=\"16\" y=\"{y}\" text-anchor=\"middle\" transform=\"rotate(-90 16 {y})\">GB/s of weights</text>"
        ));
    }
}

/// The picture; `None` if there is no product of `batch` tokens.
fn svg(results: &Results, batch: u32) -> Option<String> {
    let kernels: Vec<&Kernel> = results.kernels.iter().filter(|k| k.batch == batch && k.used).collect();
    let fp16 = if batch == 1 { &results.fp16[..] } else { &[] };
    let lowest = kernels.iter().map(|k| k.rate).reduce(f64::min)?;
    let widest = kernels.iter().map(|k| k.rate).fold(if fp16.is_empty() { 0.0 } else { FP16 }, f64::max);
    let roofs = [Some(results.peak_bytes_per_second), results.read_bytes_per_second];
    let highest = roofs.into_iter().flatten().map(|r| r / 1e9).chain(kernels.iter().map(|k| k.gb_per_s));
    let axes = Axes { bits: (lowest * 0.9, widest * 1.1), most: highest.fold(0.0, f64::max) * 1.06 };
    // Shapes from few weights to many, families in the order of the file.
    let mut shapes: Vec<(u32, u32)> = Vec::new();
    let mut families: Vec<&str> = Vec::new();
    for k in &kernels {
        shapes.push((k.rows, k.cols));
        if !families.contains(&family(k)) {
            families.push(family(k));
        }
    }
    shapes.extend(fp16.iter().map(|f| (f.rows, f.cols)));
    shapes.sort_by_key(|s| (u64::from(s.0) * u64::from(s.1), *s));
    shapes.dedup();
    // The yellow end of the scale is hard to see on white.
    let last = (shapes.len() - 1).max(1) as f64;
    let ink = |shape| svg::colour(0.85 * shapes.iter().position(|s| *s == shape).unwrap_or(0) as f64 / last);

    let tokens = if batch == 1 { "one token".to_owned() } else { format!("{batch} tokens") };
    let title = format!("Products with packed weights, {}, {tokens}", results.gpu);
    let mut picture = Picture::new(WIDTH, HEIGHT, LEFT, &title);
    axes.draw(&mut picture);
    axes.roof(&mut picture, results.peak_bytes_per_second, "memory, by its clock", "6 4");
    if let Some(read) = results.read_bytes_per_second {
        axes.roof(&mut picture, read, "memory, a kernel that only reads", "none");
    }
    for k in &kernels {
        let symbol = families.iter().position(|f| *f == family(k)).unwrap_or(0);
        // Families of one rate stand side by side.
        let aside = APART * (symbol as f64 - (families.len() - 1) as f64 / 2.0);
        let about = format!("{}, {} x {}: {:.1} us, {:.0} GB/s", k.spec, k.rows, k.cols, k.us, k.gb_per_s);
        picture.put(mark(symbol, axes.x(k.rate) + aside, axes.y(k.gb_per_s), &ink((k.rows, k.cols)), &about));
    }
    for f in fp16 {
        let gb_per_s = 2e-3 * f64::from(f.rows) * f64::from(f.cols) / f.us;
        let about = format!("fp16, {} x {}: {:.1} us, {gb_per_s:.0} GB/s", f.rows, f.cols, f.us);
        picture.put(mark(families.len(), axes.x(FP16), axes.y(gb_per_s), &ink((f.rows, f.cols)), &about));
    }

    let (left, mut y) = (RIGHT + 22.0, TOP + 10.0);
    let mut legend = |symbol, ink: &str, text: &str| {
        picture.put(mark(symbol, left, y, ink, text));
        picture.put(format!("<text x=\"{}\" y=\"{:.1}\">{}</text>", left + 14.0, y + 4.0, escape(text)));
        y += 18.0;
    };
    for shape in shapes.iter().rev() {
        legend(0, &ink(*shape), &format!("{} x {}", shape.0, shape.1));
    }
    for (symbol, name) in families.iter().copied().chain((!fp16.is_empty()).then_some("fp16")).enumerate() {
        legend(symbol, "#555", name);
    }
    Some(picture.finish())
}

/// A quantizer's family: its name up to the rate.
fn family(k: &Kernel) -> &str {
    k.spec.rsplit_once('_').map_or(k.spec.as_str(), |(family, _)| family)
}

/// A mark of kind `symbol` about a point.
fn mark(symbol: usize, x: f64, y: f64, ink: &str, about: &str) -> String {
    let around = |corners: &[(f64, f64)]| {
        let corner = |(dx, dy): &(f64, f64)| format!("{:.1},{:.1}", x + dx * MARK, y + dy * MARK);
        format!("<polygon points=\"{}\"/>", corners.iter().map(corner).collect::<Vec<_>>().join(" "))
    };
    let element = match symbol % 6 {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{MARK}\"/>"),
        1 => around(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
        2 => around(&[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)]),
        3 => around(&[(0.0, -1.2), (1.1, 0.9), (-1.1, 0.9)]),
        4 => around(&[(0.0, 1.2), (1.1, -0.9), (-1.1, -0.9)]),
        _ => around(&[(-1.4, -0.4), (1.4, -0.4), (1.4, 0.4), (-1.4, 0.4)]),
    };
    format!("<g fill=\"{ink}\" stroke=\"white\" stroke-width=\"0.7\"><title>{}</title>{element}</g>", escape(about))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_product_is_a_mark_under_the_roof() {
        let stored = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/results/kernels-h100.json");
        let mut results = Results::read(stored.as_ref()).unwrap_or_else(|e| panic!("{e}"));
        let launched = |results: &Results| results.kernels.iter().filter(|k| k.batch == 1 && k.used).count();
        let one = launched(&results);
        let marks = |results: &Results, batch| svg(results, batch).expect("some").matches("<title>").count();
        let named = {
            let text = svg(&results, 1).expect("some");
            assert!(text.contains("weights, NVIDIA H100 80GB HBM3, one token"), "{text}");
            assert!(text.contains("memory, by its clock: 3.35 TB/s") && text.contains("<title>tcq_3, 28672 x 4096: "));
            // Beside the products shapes and families are named.
            marks(&results, 1) - one - results.fp16.len()
        };
        results.read_bytes_per_second = None;
        assert!(!svg(&results, 1).expect("some").contains("only reads"));

        results.read_bytes_per_second = Some(4.3e12);
        let mut used = results.kernels.iter_mut().filter(|k| k.used);
        used.next().expect("some").used = false;
        used.next().expect("some").spec = "a<b_2".to_owned();
        assert_eq!(launched(&results), one - 1);
        let text = svg(&results, 1).expect("some");
        assert!(text.contains("only reads: 4.30 TB/s") && text.contains("<title>a&lt;b_2, "), "{text}");
        // One product is not launched so; a family more.
        assert_eq!(marks(&results, 1), one - 1 + results.fp16.len() + named + 1);
        assert_eq!(svg(&results, 3), None);
    }
}
