//! The tables of docs/formats.md.

use std::fmt::Write;
use std::path::Path;

use qp_codegen::formats;
use qp_codegen::palette;
use qp_codegen::spec::format::Format;
use qp_codegen::spec::terms::Terms;

use super::super::distortion::{figure, lost};
use super::{Stored, speeds};
use crate::cli::Error;

/// Before and behind what is generated.
const MARKS: [&str; 2] = [
    "<!-- museum: what stands from here to the next mark is made by `qp bench museum` -->\n",
    "<!-- museum: end -->\n",
];

/// `page` with `tables` between the marks.
pub fn page(page: &str, tables: &str) -> Result<String, Error> {
    let cut = page.split_once(MARKS[0]).and_then(|(before, rest)| Some((before, rest.split_once(MARKS[1])?.1)));
    let (before, behind) = cut.ok_or("docs/formats.md has not the marks between which its tables belong")?;
    Ok(format!("{before}{}{tables}{}{behind}", MARKS[0], MARKS[1]))
}

/// The quantizer of the palette with the least error at no more bits than these, row scales not counted.
fn best_within(bits: f64) -> Option<(&'static str, f64)> {
    let all = palette::names().into_iter().filter_map(|n| Some((n, palette::get(n)?.rate(), palette::distortion(n)?)));
    let best = all.filter(|q| q.1 <= bits).min_by(|a, b| a.2.total_cmp(&b.2));
    best.map(|(name, _, d)| (name, d))
}

/// How products with a format are computed.
fn products(f: &Format) -> &'static str {
    if Terms::of(f).is_ok() { "exact" } else { "general" }
}

/// The tables, from what is stored.
pub fn tables(root: &Path, stored: &Stored) -> Result<String, Error> {
    let speeds = speeds(root)?;
    let speed = |name: &str| speeds.iter().find(|s| s.0 == name).map(|s| format!("{}", s.1)).unwrap_or_default();
    let mut out = String::new();
    let unquantized = stored.unquantized.map(|p| format!("{p:.3}")).unwrap_or_default();
    let _ = write!(
        out,
        "\n![error and speed over bits a weight](formats.svg)\n\n\
         *Bits* count everything that is stored for a matrix of 4096 columns. *Error* is the mean squared error on Gaussian weights of\n\
         variance 1, *lost* its distance to the bound D(R) = 2^(-2R) in bits a weight. *Palette* is the least error that a quantizer\n\
         of the palette has at no more bits (its row scales, .004 bits, not counted). *Perplexity* is that of the bundled model with all linear\n\
         layers made so, on the first 4,080 tokens of its held-out text ({unquantized} unquantized; differences of some hundredths are\n\
         chance). *Time* is that of a product of one token with 28672 x 4096 weights on an H200, in microseconds, where it was measured\n\
         ([results](../benches/results/formats-h200.md)).\n\n\
         | format | bits | error | lost | palette | perplexity | products | time |\n|---|---|---|---|---|---|---|---|\n"
    );
    for f in &stored.figures {
        let format = formats::get(&f.name);
        let palette = match (format, best_within(f.bits)) {
            (Some(_), Some((name, d))) => format!("{} `{name}`", figure(d)),
            _ => String::new(),
        };
        let products = format.map_or("exact", products);
        let perplexity = f.perplexity.map(|p| format!("{p:.3}")).unwrap_or_default();
        let bits = (f.bits * 1e3).round() / 1e3;
        let (error, lost) = (figure(f.error), lost(f.bits, f.error));
        let (name, time) = (&f.name, speed(&f.name));
        let _ = writeln!(
            out,
            "| `{name}` | {bits} | {error} | {lost:.3} | {palette} | {perplexity} | {products} | {time} |"
        );
    }
    let _ = write!(
        out,
        "\nFormats that are read and not made, with their fields:\n\n| format | bits | products | why |\n|---|---|---|---|\n"
    );
    for name in formats::names() {
        let Some(f) = formats::get(name) else { continue };
        if let Err(why) = f.order() {
            let bits = (f.rate().1 * 1e4).round() / 1e4;
            let _ = writeln!(out, "| `{name}` | {bits} | {} | {why} |", products(f));
        }
    }
    out.push('\n');
    Ok(out)
}
