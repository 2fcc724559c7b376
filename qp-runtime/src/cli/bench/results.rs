//! The file that `qp bench kernels --json` writes and `qp bench roofline` reads.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::cli::Error;
use crate::cli::output::write;

/// Measurements of one GPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// Its name.
    pub gpu: String,
    /// Memory bandwidth by its clock.
    pub peak_bytes_per_second: f64,
    /// Memory bandwidth that a kernel reached which only reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bytes_per_second: Option<f64>,
    /// Products with half-precision weights on the same GPU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fp16: Vec<Fp16>,
    /// Products with packed weights.
    pub kernels: Vec<Kernel>,
}

/// A product with half-precision weights, one token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fp16 {
    /// Rows of the matrix.
    pub rows: u32,
    /// Its columns.
    pub cols: u32,
    /// Microseconds of a launch.
    pub us: f64,
}

/// A product with packed weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// Name of the quantizer.
    pub spec: String,
    /// Its bits a weight.
    pub rate: f64,
    /// Rows of the matrix.
    pub rows: u32,
    /// Its columns.
    pub cols: u32,
    /// Tokens.
    pub batch: u32,
    /// Microseconds of a launch.
    pub us: f64,
    /// Packed weights read a second.
    pub gb_per_s: f64,
    /// Microseconds that the cost model expected.
    pub model_us: f64,
    /// Place in the cost model's order, from 0.
    #[serde(default)]
    pub rank: usize,
    /// Whether an engine would launch it so.
    #[serde(default = "yes")]
    pub used: bool,
    /// Registers of a thread; 0 if the compiler did not say.
    pub registers: u32,
    /// How the work is laid over the GPU, by name.
    #[serde(flatten)]
    pub launch: Map<String, Value>,
}

fn yes() -> bool {
    true
}

impl Results {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read or holds something else.
    pub fn read(path: &Path) -> Result<Results, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let wrong = |e| format!("{} is no result of `qp bench kernels --json`: {e}", path.display());
        Ok(serde_json::from_str(&text).map_err(wrong)?)
    }

    /// Writes a file, a line a measurement.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let head = Results { fp16: Vec::new(), kernels: Vec::new(), ..self.clone() };
        let mut text = serde_json::to_string_pretty(&head)?;
        text.truncate(text.find("\n  \"kernels\"").unwrap_or(text.len()));
        if !self.fp16.is_empty() {
            text += &format!("\n  \"fp16\": [\n{}\n  ],", lines(&self.fp16)?);
        }
        text += &format!("\n  \"kernels\": [\n{}\n  ]\n}}\n", lines(&self.kernels)?);
        write(path, &text)
    }

    /// Microseconds of half precision for a matrix.
    pub fn fp16_us(&self, rows: u32, cols: u32) -> Option<f64> {
        self.fp16.iter().find(|f| (f.rows, f.cols) == (rows, cols)).map(|f| f.us)
    }
}

fn lines(of: &[impl Serialize]) -> Result<String, serde_json::Error> {
    let lines = of.iter().map(|x| Ok(format!("    {}", serde_json::to_string(x)?)));
    Ok(lines.collect::<Result<Vec<_>, serde_json::Error>>()?.join(",\n"))
}

impl Fp16 {
    /// Reads what `scripts/fp16-matmul` prints: a line a matrix, as in `4096x14336 31.10 us 3777 GB/s`.
    ///
    /// # Errors
    /// If it cannot be read, or the first line that is not of this kind.
    pub fn read(path: &Path) -> Result<Vec<Fp16>, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let read = |(i, line): (usize, &str)| {
            let wrong = "is no line of scripts/fp16-matmul, as `4096x14336 31.10 us 3777 GB/s`";
            Fp16::parse(line).ok_or_else(|| format!("{}:{}: `{line}` {wrong}", path.display(), i + 1).into())
        };
        lines.map(read).collect()
    }

    fn parse(line: &str) -> Option<Fp16> {
        let mut words = line.split_whitespace();
        let (rows, cols) = words.next()?.split_once('x')?;
        let us: f64 = words.next()?.parse().ok()?;
        let sound = us.is_finite() && us > 0.0 && words.next() == Some("us");
        sound.then_some(Fp16 { rows: rows.parse().ok()?, cols: cols.parse().ok()?, us })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_and_older_ones_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let stored = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/results/kernels-h100.json"));
        let mut results = Results::read(stored).unwrap_or_else(|e| panic!("{e}"));
        assert!(results.kernels.iter().all(|k| (k.used || k.rank == 0) && k.launch["warps"].as_u64() > Some(0)));
        results.read_bytes_per_second = Some(4.2e12);
        results.fp16 = vec![Fp16 { rows: 28672, cols: 4096, us: 55.8 }];
        results.kernels[0].rank = 3;
        let path = dir.path().join("again.json");
        results.write(&path).unwrap();
        let again = Results::read(&path).unwrap();
        assert_eq!(format!("{again:?}"), format!("{results:?}"));
        assert_eq!(again.fp16_us(28672, 4096), Some(55.8));
        assert_eq!(again.fp16_us(4096, 4096), None);
        let old = r#"{"gpu": "it", "peak_bytes_per_second": 1e12, "kernels": [{"spec": "a_2", "rate": 2, "rows": 1,
            "cols": 2, "batch": 1, "us": 3, "gb_per_s": 4, "model_us": 5, "registers": 7, "warps": 6}]}"#;
        std::fs::write(&path, old).unwrap();
        let read = Results::read(&path).unwrap();
        assert!(read.kernels[0].used && read.kernels[0].rank == 0 && read.fp16.is_empty());
        std::fs::write(&path, "{}").unwrap();
        let message = Results::read(&path).unwrap_err().to_string();
        assert!(message.contains("again.json is no result of `qp bench kernels --json`: missing field"), "{message}");
    }

    #[test]
    fn times_of_half_precision_are_read_as_printed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fp16");
        std::fs::write(&path, "   28672x4096    55.80 us    4211 GB/s\n\n1024x4096     7.00 us    1203 GB/s\n")
            .unwrap();
        let read = Fp16::read(&path).unwrap();
        assert_eq!(read[1], Fp16 { rows: 1024, cols: 4096, us: 7.0 });
        for bad in ["4096 7.00 us", "4096x1 seven us", "4096x1 -1 us", "4096x1 7.0 ms", "axb 1 us"] {
            std::fs::write(&path, format!("1x1 1 us\n{bad}\n")).unwrap();
            let message = Fp16::read(&path).unwrap_err().to_string();
            assert!(message.contains("fp16:2: `") && message.contains("scripts/fp16-matmul"), "{message}");
        }
    }
}
