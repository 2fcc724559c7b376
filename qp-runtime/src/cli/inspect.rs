//! `qp inspect`.

use std::fmt::Write;
use std::path::PathBuf;

use indicatif::{HumanBytes, ProgressBar};
use qp_codegen::layout::Packed;
use qp_codegen::spec::{Format, Quantizer, Shape};
use serde::Serialize;

use super::Error;
use super::output::{out, outln};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::codec::scale_count;

/// Show what a quantized checkpoint holds.
#[derive(clap::Args)]
pub struct Inspect {
    /// Directory of the checkpoint
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Check every byte against its checksum
    #[arg(long)]
    verify: bool,
}

/// A layer's row of the table.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    spec: &'a str,
    rows: u32,
    cols: u32,
    /// Of the packed words and scales, padding included.
    bytes: u64,
    /// Packed words and scales.
    bits_per_weight: f64,
    error: f64,
}

#[derive(Serialize)]
struct SpecRow<'a> {
    name: &'a str,
    hash: &'a str,
    rate: f64,
    layers: usize,
    table_bytes: u64,
}

#[derive(Serialize)]
struct Totals {
    quantized_weights: u64,
    quantized_bytes: u64,
    table_bytes: u64,
    /// Words, scales and tables.
    bits_per_weight: f64,
    /// Mean of the layers' errors, by weights.
    error: f64,
    kept_tensors: usize,
    kept_bytes: u64,
    file_bytes: u64,
}

#[derive(Serialize)]
struct View<'a> {
    format: u32,
    tool: &'a str,
    model: &'a str,
    specs: Vec<SpecRow<'a>>,
    layers: Vec<Row<'a>>,
    groups: &'a [Vec<String>],
    totals: Totals,
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<bool>,
}

impl Inspect {
    /// Runs the command.
    pub fn run(self) -> Result<(), Error> {
        let checkpoint = Checkpoint::open(&self.dir)?;
        if self.verify {
            let bar = ProgressBar::new(checkpoint.verify_bytes());
            let result = checkpoint.verify(&mut |n| bar.inc(n));
            bar.finish_and_clear();
            if let Err(errors) = result {
                let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
                return Err(lines.join("\nerror: ").into());
            }
        }
        let view = view(&checkpoint, self.verify);
        if self.json {
            outln!("{}", serde_json::to_string_pretty(&view)?)?;
        } else {
            out!("{}", table(&view))?;
        }
        Ok(())
    }
}

/// What [`Inspect`] prints as JSON.
///
/// # Errors
/// None that this value can have.
pub fn json(checkpoint: &Checkpoint) -> serde_json::Result<String> {
    serde_json::to_string_pretty(&view(checkpoint, false))
}

fn bytes_of(t: &TensorEntry) -> u64 {
    t.shape.iter().product::<usize>() as u64 * t.dtype.bitsize() as u64 / 8
}

fn table_bytes(q: &Quantizer) -> u64 {
    let size = u64::from(q.value().bytes());
    q.codes.iter().flat_map(|c| &c.tables).map(|t| t.values.len() as u64 * size).sum()
}

fn view(checkpoint: &Checkpoint, verified: bool) -> View<'_> {
    let m = checkpoint.manifest();
    let mut rows = Vec::new();
    for l in &m.layers {
        // Opening has made sure that each spec of the manifest is there; a layer with another has no size.
        let shape = Shape { rows: l.rows, cols: l.cols };
        let of_format = |f: &Format| {
            let layout = f.layout(l.layout.as_deref()?)?;
            let names = layout.tensors.iter().map(|t| format!("{}.{}", l.name, t.name)).collect::<Vec<_>>();
            Some(m.tensors.iter().filter(|t| names.contains(&t.name)).map(bytes_of).sum::<u64>())
        };
        let bytes = match (checkpoint.quantizer(&l.spec), checkpoint.format(&l.spec)) {
            (Some(q), _) => 4 * Packed::new(q, shape).words() as u64 + 2 * scale_count(q, shape) as u64,
            (None, Some(f)) => of_format(f).unwrap_or(0),
            (None, None) => continue,
        };
        let bits_per_weight = bytes as f64 * 8.0 / shape.len() as f64;
        let (name, spec) = (l.name.as_str(), l.spec.as_str());
        rows.push(Row { name, spec, rows: l.rows, cols: l.cols, bytes, bits_per_weight, error: l.error });
    }
    let specs: Vec<SpecRow> = m
        .specs
        .iter()
        .filter_map(|s| match (checkpoint.quantizer(&s.name), checkpoint.format(&s.name)) {
            (Some(q), _) => Some((s, q.rate(), table_bytes(q))),
            // With the fields; its tables are the program's.
            (None, f) => Some((s, f?.rate().1, 0)),
        })
        .map(|(s, rate, table_bytes)| SpecRow {
            name: &s.name,
            hash: &s.hash,
            rate,
            layers: m.layers.iter().filter(|l| l.spec == s.name).count(),
            table_bytes,
        })
        .collect();
    let of_formats: Vec<String> = m
        .layers
        .iter()
        .filter_map(|l| Some((l, checkpoint.format(&l.spec)?.layout(l.layout.as_deref()?)?)))
        .flat_map(|(l, layout)| layout.tensors.iter().map(move |t| format!("{}.{}", l.name, t.name)))
        .collect();
    let is_kept =
        |name: &String| !name.ends_with(".packed") && !name.ends_with(".scales") && !of_formats.contains(name);
    let kept: Vec<u64> = m.tensors.iter().filter(|t| is_kept(&t.name)).map(bytes_of).collect();
    let weights = |r: &Row| u64::from(r.rows) * u64::from(r.cols);
    let quantized_weights: u64 = rows.iter().map(weights).sum();
    let quantized_bytes: u64 = rows.iter().map(|r| r.bytes).sum();
    let table_bytes: u64 = specs.iter().map(|s| s.table_bytes).sum();
    let count = quantized_weights.max(1) as f64;
    let totals = Totals {
        quantized_weights,
        quantized_bytes,
        table_bytes,
        bits_per_weight: (quantized_bytes + table_bytes) as f64 * 8.0 / count,
        error: rows.iter().map(|r| r.error * weights(r) as f64).sum::<f64>() / count,
        kept_tensors: kept.len(),
        kept_bytes: kept.iter().sum(),
        file_bytes: m.files.iter().map(|f| f.bytes).sum(),
    };
    let verified = verified.then_some(true);
    let (format, tool, model, groups) = (m.format, m.tool.as_str(), m.model.sha256.as_str(), m.groups.as_slice());
    View { format, tool, model, specs, layers: rows, groups, totals, verified }
}

fn table(v: &View) -> String {
    let mut out = String::new();
    let name = v.layers.iter().map(|l| l.name.len()).max().unwrap_or(0).max(5);
    let spec = v.layers.iter().map(|l| l.spec.len()).max().unwrap_or(0).max(4);
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "format {}, by {}, model {}",
        v.format,
        v.tool.escape_debug(),
        v.model.get(..16).unwrap_or(v.model)
    );
    let _ = writeln!(
        out,
        "\n{:name$}  {:spec$}  {:>13}  {:>8}  {:>10}  {:>9}",
        "layer", "spec", "rows x cols", "bits/w", "bytes", "error"
    );
    for l in &v.layers {
        let shape = format!("{} x {}", l.rows, l.cols);
        let _ = writeln!(
            out,
            "{:name$}  {:spec$}  {shape:>13}  {:>8.3}  {:>10}  {:>9.6}",
            l.name, l.spec, l.bits_per_weight, l.bytes, l.error
        );
    }
    let _ = writeln!(out);
    for s in &v.specs {
        let _ = writeln!(
            out,
            "{}: {} bits, {} layers, table {} bytes, {}",
            s.name,
            s.rate,
            s.layers,
            s.table_bytes,
            s.hash.get(..16).unwrap_or(s.hash)
        );
    }
    for g in v.groups {
        let _ = writeln!(out, "fused: {}", g.join(" + "));
    }
    let t = &v.totals;
    let _ = writeln!(
        out,
        "{} weights in {} layers: {:.3} bits a weight with scales and tables, mean error {:.6}",
        t.quantized_weights,
        v.layers.len(),
        t.bits_per_weight,
        t.error
    );
    let _ = writeln!(
        out,
        "{} unquantized tensors: {}; all files: {}",
        t.kept_tensors,
        HumanBytes(t.kept_bytes),
        HumanBytes(t.file_bytes)
    );
    if v.verified == Some(true) {
        let _ = writeln!(out, "verified: every byte is as it was written");
    }
    out
}
