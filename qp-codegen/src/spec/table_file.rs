//! Table files: text, comment lines that begin with `#`, then one entry a line of V integers.
//!
//! ```text
//! # tcq_2 t
//! # trained seed = 1, rounds = 8, samples = 1048576
//! # mean squared error 0.0701
//! -12 30
//! 5 -7
//! ```

use std::fmt::Write;

use super::{Table, TableSource, Training, Value};

/// What is wrong with a table file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A line has not V integers.
    #[error("line {line}: expected {vector} integers, found `{text}`")]
    Line {
        /// Line, from 1.
        line: usize,
        /// V.
        vector: u32,
        /// The line.
        text: String,
    },
    /// A value outside the entry type.
    #[error("line {line}: {value} is outside {min}..={max}")]
    Range {
        /// Line, from 1.
        line: usize,
        /// The value.
        value: i32,
        /// Smallest.
        min: i32,
        /// Largest.
        max: i32,
    },
    /// A wrong number of entries.
    #[error("expected {expected} entries, found {found}")]
    Entries {
        /// By the spec.
        expected: u32,
        /// In the file.
        found: usize,
    },
}

/// Reads `entries × vector` values of type `value`, entry-major.
///
/// # Errors
/// The first thing that is wrong.
pub fn read(text: &str, entries: u32, vector: u32, value: Value) -> Result<Vec<i16>, Error> {
    Ok(read_within(text, entries, vector, value.range())?.into_iter().map(|v| v as i16).collect())
}

/// Reads `entries × vector` values between the two of `range`, entry-major.
///
/// # Errors
/// The first thing that is wrong.
pub fn read_within(text: &str, entries: u32, vector: u32, (min, max): (i32, i32)) -> Result<Vec<i32>, Error> {
    let mut out = Vec::new();
    let mut found = 0;
    for (i, line) in text.lines().enumerate() {
        let content = line.split('#').next().unwrap_or("").trim();
        if content.is_empty() {
            continue;
        }
        found += 1;
        let bad = || Error::Line { line: i + 1, vector, text: content.chars().take(40).collect() };
        let before = out.len();
        for word in content.split_whitespace() {
            let v: i32 = word.parse().map_err(|_| bad())?;
            if v < min || v > max {
                return Err(Error::Range { line: i + 1, value: v, min, max });
            }
            out.push(v);
        }
        if out.len() - before != vector as usize {
            return Err(bad());
        }
    }
    if found != entries as usize {
        return Err(Error::Entries { expected: entries, found });
    }
    Ok(out)
}

/// How a table was trained, as its file says it.
fn about(t: &Training) -> String {
    format!("trained seed = {}, rounds = {}, samples = {}", t.seed, t.rounds, t.samples)
}

/// What the file of a trained table says of its training, if that is another one than `training`.
pub fn other_training<'a>(text: &'a str, training: &Training) -> Option<&'a str> {
    let comments = text.lines().map_while(|line| line.strip_prefix('#'));
    comments.map(str::trim).find(|line| line.starts_with("trained ")).filter(|line| *line != about(training))
}

/// The text of a table file for `table` of the quantizer `quantizer`; `notes` become further comment lines.
pub fn write(quantizer: &str, table: &Table, vector: u32, notes: &[String]) -> String {
    let mut out = format!("# {quantizer} {}\n", table.name);
    if let TableSource::Trained { training: t, .. } = &table.source {
        let _ = writeln!(out, "# {}", about(t));
    }
    for note in notes {
        let _ = writeln!(out, "# {}", note.replace('\n', " "));
    }
    for entry in table.values.chunks_exact(vector as usize) {
        let words: Vec<String> = entry.iter().map(i16::to_string).collect();
        let _ = writeln!(out, "{}", words.join(" "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let table = Table { name: "t".into(), entries: 2, values: vec![-128, 127, 0, 5], source: TableSource::Inline };
        let text = write("q", &table, 2, &["mean squared error 0.1".into()]);
        assert_eq!(text, "# q t\n# mean squared error 0.1\n-128 127\n0 5\n");
        assert_eq!(read(&text, 2, 2, Value::I8), Ok(table.values));
    }

    #[test]
    fn a_file_tells_its_training() {
        let training = Training { seed: 1, rounds: 8, samples: 1024 };
        let source = TableSource::Trained { file: "t".into(), training };
        let text = write("q", &Table { name: "t".into(), entries: 1, values: vec![3], source }, 1, &[]);
        assert_eq!(text, "# q t\n# trained seed = 1, rounds = 8, samples = 1024\n3\n");
        assert_eq!(other_training(&text, &training), None);
        assert_eq!(other_training("# made by hand\n3\n", &training), None);
        for other in [
            Training { seed: 2, ..training },
            Training { rounds: 7, ..training },
            Training { samples: 1023, ..training },
        ] {
            assert_eq!(other_training(&text, &other), Some("trained seed = 1, rounds = 8, samples = 1024"));
        }
    }

    #[test]
    fn bad_files_are_refused_with_the_line() {
        assert_eq!(
            read("1 2\n3\n", 2, 2, Value::I8).unwrap_err().to_string(),
            "line 2: expected 2 integers, found `3`"
        );
        assert_eq!(read("# x\n200\n", 1, 1, Value::I8).unwrap_err().to_string(), "line 2: 200 is outside -128..=127");
        assert_eq!(read("1\n", 2, 1, Value::I16).unwrap_err().to_string(), "expected 2 entries, found 1");
        assert_eq!(read("x\n", 1, 1, Value::I16).unwrap_err().to_string(), "line 1: expected 1 integers, found `x`");
    }
}
