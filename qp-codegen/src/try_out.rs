//! `qp-codegen try`: what a spec makes of some bits.

use std::fmt::Write;
use std::num::IntErrorKind;
use std::sync::Arc;

use qp_codegen::reader::{Book, Reader};
use qp_codegen::reference;
use qp_codegen::spec::expr::Room;
use qp_codegen::spec::format::{Format, Layout};
use qp_codegen::spec::{Definition, Quantizer, Shape, mask};

/// Writing to a string cannot fail.
macro_rules! line {
    ($out:expr, $($t:tt)*) => {{ let _ = writeln!($out, $($t)*); }};
}

/// A number in decimal, in hexadecimal after `0x`, or in binary after `0b`, as in a spec.
pub fn number(text: &str) -> Result<u32, String> {
    let digits = text.replace('_', "");
    let parsed = match (digits.strip_prefix("0x"), digits.strip_prefix("0b")) {
        (Some(hex), _) => u32::from_str_radix(hex, 16),
        (_, Some(binary)) => u32::from_str_radix(binary, 2),
        (None, None) => digits.parse(),
    };
    parsed.map_err(|e| match e.kind() {
        IntErrorKind::PosOverflow => format!("`{text}` has more than 32 bits: a window or a code has at most 24"),
        _ => format!("`{text}` is no word: write it in decimal, or as in 0x1234 or 0b1010"),
    })
}

/// Bytes in hexadecimal, white space between them ignored.
pub fn bytes(text: &str) -> Result<Vec<u8>, String> {
    let digits: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
    if !digits.len().is_multiple_of(2) {
        return Err("bytes have two hexadecimal digits each".into());
    }
    let byte = |pair: &[char]| {
        let text: String = pair.iter().collect();
        u8::from_str_radix(&text, 16).map_err(|_| format!("`{text}` is no byte in hexadecimal"))
    };
    digits.chunks_exact(2).map(byte).collect()
}

/// What windows (or codes) decode to.
pub fn windows(definition: &Definition, windows: &[u32]) -> Result<String, String> {
    let mut out = String::new();
    for &w in windows {
        match definition {
            Definition::Quantizer(q) => of_quantizer(q, w, &mut out)?,
            Definition::Format(f) => of_format(f, w, &mut out)?,
        }
    }
    Ok(out)
}

fn list<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    values.into_iter().map(|v| v.to_string()).collect::<Vec<_>>().join(" ")
}

fn fits(window: u32, bits: u32) -> Result<(), String> {
    if window <= mask(bits) { Ok(()) } else { Err(format!("{window:#x} has more than the window's {bits} bits")) }
}

fn of_quantizer(q: &Quantizer, window: u32, out: &mut String) -> Result<(), String> {
    for (i, code) in q.codes.iter().enumerate() {
        fits(window, code.window)?;
        let mut entries = vec![0; code.vector as usize];
        code.entry(window, &mut entries);
        let which = if q.codes.len() > 1 { format!(" code {i}") } else { String::new() };
        let weights = entries.iter().map(|&e| reference::weight(code, e, 1.0));
        line!(out, "window {window:#x}{which}: entries {}; weights at scale 1: {}", list(&entries), list(weights));
    }
    Ok(())
}

fn of_format(f: &Format, code: u32, out: &mut String) -> Result<(), String> {
    fits(code, f.window)?;
    if let Some(table) = f.numbers.first() {
        let table = &f.fields[*table].name;
        return Err(format!("`{}` looks up `{table}`, a table of the matrix: give a layout and tensors", f.name));
    }
    let mut integers = vec![0; f.vector as usize];
    f.integers(code, &[], &mut Room::default(), &mut integers);
    let entries = integers.iter().map(|&i| f.entry(i));
    line!(out, "code {code:#x}: integers {}; entries {}", list(&integers), list(entries));
    Ok(())
}

/// The fields and weights of a matrix whose tensors, in the layout's order, are `tensors`.
pub fn matrix(f: &Format, layout: &str, shape: Shape, tensors: &[Vec<u8>]) -> Result<String, String> {
    // That by which an encoder writes a format without one.
    let plain = if f.layouts.is_empty() { Layout::plain(f) } else { None };
    let all = || f.layouts.iter().chain(&plain);
    let known = || all().map(|l| l.name.as_str()).collect::<Vec<_>>().join(", ");
    let found = all().find(|l| l.name == layout);
    let layout = found.ok_or_else(|| format!("`{}` has no layout `{layout}`; it has {}", f.name, known()))?;
    let reader = Reader::new(&Arc::new(Book::new(f.clone())), layout, shape).map_err(|e| e.to_string())?;
    let wanted: Vec<String> = reader.tensors().iter().map(|t| format!("{} of {} bytes", t.name, t.bytes)).collect();
    let found: Vec<String> =
        reader.tensors().iter().zip(tensors).map(|(t, b)| format!("{} of {} bytes", t.name, b.len())).collect();
    if found != wanted || tensors.len() != wanted.len() {
        let (n, m) = (tensors.len(), wanted.len());
        let given = if n == m { found.join(", ") } else { format!("{n} tensors") };
        return Err(format!("{} x {} weights need {}, not {given}", shape.rows, shape.cols, wanted.join(", ")));
    }
    let bytes: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
    let mut out = String::new();
    for row in 0..shape.rows {
        for (i, field) in f.fields.iter().enumerate().filter(|(_, field)| field.entries.is_none()) {
            let mut numbers: Vec<String> = Vec::new();
            let mut col = 0;
            while col < shape.cols {
                numbers.push(reader.field(&bytes, i, row, col).1.to_string());
                col = col.saturating_add(reader.run(i, row, col).try_into().unwrap_or(u32::MAX));
            }
            line!(out, "row {row}  {:<8} {}", field.name, numbers.join(" "));
        }
        if f.trellis.is_none() {
            let codes = (0..shape.cols / f.vector).map(|k| reader.code(&bytes, row, k));
            line!(out, "row {row}  {:<8} {}", "codes", list(codes));
        }
        let mut weights = vec![0.0; shape.cols as usize];
        reader.read(&bytes, row, 0, &mut weights);
        line!(out, "row {row}  {:<8} {}", "weights", list(weights));
    }
    Ok(out)
}
