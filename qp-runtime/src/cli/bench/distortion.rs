//! `qp bench distortion`: how well quantizers reproduce a Gaussian source.

use std::fmt::Write;
use std::path::Path;

use clap::Args;
use qp_codegen::palette;
use qp_codegen::spec::{self, Code, Definition, Quantizer};
use qp_codegen::syntax::Diagnostics;

use super::distortion_plot::{self, Series};
use crate::cli::Error;
use crate::cli::device::{Device, open};
use crate::cli::output::{outln, write};
use crate::codec::FormatEncoder;
use crate::codec::distortion::{self, Distortion};

/// The errors of Q-Palette's quantizers, by the names of the same rates here.
const Q_PALETTE: &str = include_str!("../../../../benches/qpalette_distortion.toml");
/// The errors of EXL3's codes, by bits.
const EXL3: &str = include_str!("../../../../benches/exl3_distortion.toml");

/// Measure the error of quantizers on unit-variance Gaussian samples.
#[derive(Args)]
pub struct DistortionBench {
    /// Quantizers: names of the palette, spec files (all that they define), or FILE:NAME; or formats that can be made.
    #[arg(required_unless_present = "all")]
    spec: Vec<String>,
    /// The whole palette.
    #[arg(long, conflicts_with = "spec")]
    all: bool,
    /// Weights to encode with each code.
    #[arg(long, default_value_t = 1 << 20, value_parser = clap::value_parser!(u64).range(512..=1 << 30))]
    samples: u64,
    /// Columns of the matrix that a format is made of.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 17))]
    columns: u32,
    /// Seed of the samples.
    #[arg(long, default_value_t = 0x5eed_0000_0000)]
    seed: u64,
    /// Write benches/results/distortion.md and distortion.svg and specs/distortion.toml, in the current folder.
    #[arg(long, requires = "all")]
    write: bool,
    /// Where samples are encoded; the figures are the same.
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
}

struct Row<'a> {
    quantizer: &'a Quantizer,
    distortion: Distortion,
    q_palette: Option<f64>,
}

impl DistortionBench {
    /// Runs it.
    pub fn run(self) -> Result<(), Error> {
        let names: Vec<String> =
            if self.all { palette::names().iter().map(|n| n.to_string()).collect() } else { self.spec.clone() };
        let (mut formats, mut quantizers) = (Vec::new(), Vec::new());
        for (definition, arg) in spec::resolve_each(&names)? {
            match definition {
                Definition::Format(f) => {
                    formats.push(FormatEncoder::new(&f).map_err(|why| format!("`{}` cannot be made: {why}", f.name))?);
                }
                Definition::Quantizer(q) => match spec::untrained(&q, &arg) {
                    Some(d) => return Err(Diagnostics { list: vec![d], ..Diagnostics::default() }.into()),
                    None => quantizers.push(q),
                },
            }
        }
        let q_palette: toml::Table = Q_PALETTE.parse()?;
        // Mixes are made of codes that stand alone too: each is measured once.
        let mut known: Vec<(&Code, Distortion)> = vec![];
        let mut rows = vec![];
        let device = open(self.device)?;
        // With the first line, so that a command that fails prints no table.
        let mut header = Some(HEADER);
        let mut show = |line: String| match header.take() {
            Some(header) => outln!("{header}\n{line}"),
            None => outln!("{line}"),
        };
        for quantizer in &quantizers {
            let mut parts: Vec<Distortion> = vec![];
            for code in &quantizer.codes {
                let d = match known.iter().find(|k| k.0 == code) {
                    Some(k) => k.1,
                    None => {
                        let d = distortion::measure_on(device.as_ref(), code, self.samples, self.seed)?;
                        known.push((code, d));
                        d
                    }
                };
                parts.push(d);
            }
            let q_palette = q_palette.get(&quantizer.name).and_then(toml::Value::as_float);
            let row = Row { quantizer, distortion: distortion::combine(&parts), q_palette };
            show(row.line())?;
            rows.push(row);
        }
        for encoder in &formats {
            let (bits, d) = distortion::measure_format(encoder, self.columns, self.samples, self.seed)?;
            show(line(&encoder.format().name, bits, d, None))?;
        }
        if self.write {
            write(Path::new("benches/results/distortion.md"), &self.page(&rows))?;
            write(Path::new("benches/results/distortion.svg"), &plot(&rows)?)?;
            write(Path::new("specs/distortion.toml"), &values(&rows))?;
        }
        Ok(())
    }

    fn page(&self, rows: &[Row]) -> String {
        let mut out = format!(
            "# Distortion\n\n\
             Mean squared error on Gaussian samples of unit variance, {} encoded with each code (seed {}). The bound is\n\
             2^(-2R), what no code of rate R can go below; *lost* is the distance to it in bits a weight. Q-Palette's\n\
             figures are those of its repository for the same rate and kind (`benches/qpalette_distortion.toml`); one\n\
             below 1.000 in the last column is in favour of this project. For codes without memory the samples are drawn from\n\
             a wider Gaussian and weighted, which leaves the mean as it is and lessens its error.\n\n\
             Made by `cargo run --release -- bench distortion --all --samples {} --write`.\n\n\
             ![bits lost over bits a weight](distortion.svg)\n\n{HEADER}\n",
            self.samples, self.seed, self.samples
        );
        for row in rows {
            let _ = writeln!(out, "{}", row.line());
        }
        out
    }
}

const HEADER: &str = "\
| quantizer | bits | bound | mean squared error | ± | lost, bits | Q-Palette | ratio |\n\
|---|---|---|---|---|---|---|---|";

impl Row<'_> {
    fn line(&self) -> String {
        line(&self.quantizer.name, self.quantizer.rate(), self.distortion, self.q_palette)
    }
}

/// A line of the table.
fn line(name: &str, rate: f64, distortion: Distortion, q_palette: Option<f64>) -> String {
    let d = distortion.mean;
    let bound = 2f64.powf(-2.0 * rate);
    let lost = lost(rate, d);
    let (theirs, ratio) = match q_palette {
        Some(q) => (figure(q), format!("{:.3}", d / q)),
        None => Default::default(),
    };
    let error = format!("{:.1} %", 100.0 * distortion.standard_error / d);
    let rate = (rate * 1e4).round() / 1e4;
    format!("| {name} | {rate} | {} | {} | {error} | {lost:.3} | {theirs} | {ratio} |", figure(bound), figure(d))
}

/// Distance of the error `d` to the bound, in bits a weight.
pub(super) fn lost(rate: f64, d: f64) -> f64 {
    0.5 * (d / 2f64.powf(-2.0 * rate)).log2()
}

/// The rows by kind, what a name begins with, each with Q-Palette's of the same kind, and EXL3's.
fn plot(rows: &[Row]) -> Result<String, Error> {
    let kind = |row: &Row| row.quantizer.name.split('_').next().unwrap_or_default().to_owned();
    let mut kinds: Vec<String> = rows.iter().map(kind).collect();
    kinds.dedup();
    let mut series = vec![];
    for name in kinds {
        let of_kind = || rows.iter().filter(|r| kind(r) == name);
        let by_bits = |mut points: Vec<(f64, f64)>| {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points
        };
        let point = |row: &Row, d: f64| (row.quantizer.rate(), lost(row.quantizer.rate(), d));
        let theirs: Vec<_> = of_kind().filter_map(|r| Some(point(r, r.q_palette?))).collect();
        let ours = of_kind().map(|r| point(r, r.distortion.mean)).collect();
        let published = (!theirs.is_empty()).then(|| (format!("{name}, Q-Palette"), theirs));
        series.push(Series { name, points: by_bits(ours), published: false });
        series.extend(published.map(|(name, points)| Series { name, points: by_bits(points), published: true }));
    }
    let exl3: toml::Table = EXL3.parse()?;
    let point = |(bits, d): (&String, &toml::Value)| {
        let bits = bits.parse().ok()?;
        Some((bits, lost(bits, d.as_float()?)))
    };
    series.push(Series { name: "EXL3".into(), points: exl3.iter().filter_map(point).collect(), published: false });
    Ok(distortion_plot::svg(&series))
}

/// Four significant digits.
pub(super) fn figure(x: f64) -> String {
    let digits = 3 - x.log10().floor() as i32;
    format!("{x:.*}", digits.max(0) as usize)
}

/// What `qp-codegen explain` shows.
fn values(rows: &[Row]) -> String {
    let mut out = String::from(
        "# Measured mean squared error on a Gaussian source of unit variance: see benches/results/distortion.md.\n",
    );
    for row in rows {
        let _ = writeln!(out, "\"{}\" = {}", row.quantizer.name, figure(row.distortion.mean));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_four_digits() {
        assert_eq!([0.14033, 0.0625, 1.0, 4.1476e-5].map(figure), ["0.1403", "0.06250", "1.000", "0.00004148"]);
    }

    #[test]
    fn the_palette_is_no_worse_than_q_palette() {
        let theirs: toml::Table = Q_PALETTE.parse().expect("a table");
        for name in palette::names() {
            let d = palette::distortion(name).unwrap_or_else(|| panic!("{name} has not been measured"));
            if let Some(q) = theirs.get(name).and_then(toml::Value::as_float) {
                assert!(d <= 1.01 * q, "{name}: {d} against {q}");
            }
        }
    }

    #[test]
    fn published_figures_are_those_of_the_tables() {
        for name in ["tcq_2", "tcq_3", "tcq_4", "htcq_3.25", "nuq_4", "vq2_2.5", "fast_1.5"] {
            let q = spec::resolve(name).expect("trained");
            let published = palette::distortion(name).expect("measured");
            let d = distortion::measure(&q, 1 << 15, 3);
            let off = (d.mean - published).abs() / d.standard_error;
            assert!(off < 4.5, "{name}: {} ± {}, published {published}", d.mean, d.standard_error);
        }
    }
}
