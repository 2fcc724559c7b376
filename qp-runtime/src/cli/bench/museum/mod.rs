//! `qp bench museum`: what each format is worth, as tables and a picture.

mod page;
mod picture;

use std::path::{Path, PathBuf};

use clap::Args;
use qp_codegen::formats;
use qp_codegen::spec::{Definition, resolve_any};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::checkpoint::manifest::six_digits;
use crate::cli::Error;
use crate::cli::device::{Device, open_session};
use crate::cli::output::{outln, write};
use crate::codec::FormatEncoder;
use crate::codec::distortion::measure_format;
use crate::eval::perplexity;
use crate::model::Model;
use crate::plan::Plan;
use crate::quantize::{self, Job, Silent};

/// Measure every format that can be made, and write the tables of docs/formats.md and docs/formats.svg.
///
/// Errors are those on a Gaussian matrix; perplexities those of a model whose linear layers are all made with the format. What
/// benches/results/museum.json holds already is measured again only if the format has changed. Speeds are taken from
/// the stored results of `qp bench formats` and `qp bench kernels`. Run it in the project's root.
#[derive(Args)]
pub struct MuseumBench {
    /// The model.
    #[arg(long, default_value = "models/kjv-llama")]
    model: PathBuf,
    /// The text that it is evaluated with.
    #[arg(long, default_value = "models/kjv-llama/valid.txt")]
    text: PathBuf,
    /// Measure everything again.
    #[arg(long)]
    anew: bool,
    /// Measure nothing: only write what is stored.
    #[arg(long, conflicts_with = "anew")]
    stored: bool,
}

/// The project's root, in which the command runs.
const HERE: &str = ".";
/// What was measured.
const STORED: &str = "benches/results/museum.json";
/// The page with the tables.
const PAGE: &str = "docs/formats.md";
/// The picture.
const PICTURE: &str = "docs/formats.svg";
/// Columns and weights of the Gaussian matrix, and its seed.
const SAMPLE: (u32, u64, u64) = (4096, 1 << 20, 0x5eed_0000_0000);
/// Tokens of a window of the text, and how many windows are scored.
const WINDOW: usize = 256;
const WINDOWS: usize = 16;
/// Quantizers of the palette that are shown beside the formats.
const BESIDE: [&str; 5] = ["tcq_2", "tcq_2.5", "tcq_3", "tcq_4", "tcq_5"];

/// What was measured of everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Stored {
    /// Perplexity of the model as it is.
    unquantized: Option<f64>,
    /// Of each format, and of some quantizers of the palette.
    figures: Vec<Figures>,
}

/// What was measured of a format or quantizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Figures {
    name: String,
    /// Hash of its canonical text, formulas included.
    text: String,
    /// Bits a weight of all that is stored for the Gaussian matrix.
    bits: f64,
    /// Mean squared error on it, and its standard error.
    error: f64,
    standard_error: f64,
    /// Perplexity of the model, if its layers' sides fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    perplexity: Option<f64>,
}

impl Stored {
    fn read(root: &Path) -> Result<Stored, Error> {
        let path = root.join(STORED);
        match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()).into()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Stored::default()),
            Err(e) => Err(format!("{}: {e}", path.display()).into()),
        }
    }

    fn of(&self, name: &str) -> Option<&Figures> {
        self.figures.iter().find(|f| f.name == name)
    }
}

impl MuseumBench {
    /// Runs it.
    ///
    /// # Errors
    /// A model or text that cannot be read, a file that cannot be written.
    pub fn run(self) -> Result<(), Error> {
        let root = Path::new(HERE);
        let mut stored = Stored::read(root)?;
        if !self.stored {
            self.measure(root, &mut stored)?;
        }
        let path = root.join(PAGE);
        let cure = "run this in the root of the project";
        let before = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}; {cure}", path.display()))?;
        let page = page::page(&before, &page::tables(root, &stored)?)?;
        write(&root.join(PAGE), &page)?;
        write(&root.join(PICTURE), &picture::svg(root, &stored)?)
    }

    fn measure(&self, root: &Path, stored: &mut Stored) -> Result<(), Error> {
        if self.anew || stored.unquantized.is_none() {
            stored.unquantized = Some(self.perplexity_of(&self.model)?);
        }
        let made = formats::names().into_iter().filter(|n| formats::get(n).is_some_and(|f| f.order().is_ok()));
        for name in made.chain(BESIDE) {
            let definition = resolve_any(name)?;
            let text = match &definition {
                Definition::Quantizer(q) => q.canonical(),
                Definition::Format(f) => f.canonical(),
            };
            let text: String = Sha256::digest(text).iter().take(8).map(|b| format!("{b:02x}")).collect();
            if !self.anew && stored.of(name).is_some_and(|f| f.text == text) {
                continue;
            }
            let (columns, samples, seed) = SAMPLE;
            let (bits, d) = match &definition {
                Definition::Format(f) => measure_format(&FormatEncoder::new(f)?, columns, samples, seed)?,
                // A scale of 16 bits for each row.
                Definition::Quantizer(q) => {
                    let d = crate::codec::distortion::measure(q, samples, seed);
                    (q.rate() + 16.0 / f64::from(columns), d)
                }
            };
            let [error, standard_error] = [d.mean, d.standard_error].map(six_digits);
            let perplexity = self.perplexity(name)?;
            let shown = perplexity.map_or("sides do not fit".into(), |p| format!("{p:.4}"));
            outln!("{name:16} {bits:.4} bits, error {error}, perplexity {shown}")?;
            stored.figures.retain(|f| f.name != name);
            stored.figures.push(Figures {
                name: name.to_owned(),
                text,
                bits: six_digits(bits),
                error,
                standard_error,
                perplexity,
            });
            // So that nothing is lost if the work is cut short.
            stored.figures.sort_by(|a, b| a.bits.total_cmp(&b.bits).then(a.name.cmp(&b.name)));
            write(&root.join(STORED), &(serde_json::to_string_pretty(stored)? + "\n"))?;
        }
        Ok(())
    }

    /// Perplexity of the model with all linear layers of its blocks made with `spec`; nothing if their sides do not fit.
    fn perplexity(&self, spec: &str) -> Result<Option<f64>, Error> {
        let folder = tempfile::tempdir()?;
        let out = folder.path().join("model");
        match Job::new(&self.model, Plan::uniform(spec), &out).run(&Silent) {
            Ok(_) => self.perplexity_of(&out).map(Some),
            Err(quantize::Error::Misfit { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn perplexity_of(&self, model: &Path) -> Result<f64, Error> {
        let text = crate::input::text(&self.text)?;
        let model = Model::open(model)?;
        let mut tokens = model.tokenizer.encode(&text)?;
        tokens.truncate(WINDOWS * WINDOW);
        let mut session = open_session(model, crate::cli::device::open(Device::Cpu)?.as_ref(), WINDOW)?;
        Ok(six_digits(perplexity(&mut session, &tokens, WINDOW, |_| ())?.perplexity()))
    }
}

/// Microseconds of a product of one token with 28672 x 4096 weights on an H200, by format, from the page of results.
fn speeds(root: &Path) -> Result<Vec<(String, f64)>, Error> {
    let path = root.join("benches/results/formats-h200.md");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    // Tables name formats in their lines, or are those of one format at several shapes, which stands in the line before.
    let (mut of, mut out) = (None, Vec::new());
    let quoted = |text: &str| {
        let name = text.trim().strip_prefix('`')?.split('`').next()?;
        formats::get(name).map(|_| name.to_owned())
    };
    for line in text.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let number = |i: usize| cells.get(i).and_then(|c| c.parse::<f64>().ok());
        match (line.starts_with('|'), quoted(cells[0])) {
            (false, name) if !line.is_empty() => of = name,
            (true, Some(name)) => out.extend(number(2).map(|us| (name, us))),
            (true, None) if cells[0] == "28672 x 4096" => out.extend(of.clone().zip(number(1))),
            _ => (),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    #[test]
    fn speeds_are_found_in_the_page_of_results() {
        let speeds = speeds(&root()).unwrap();
        for (name, us) in [("gptq_int4_g128", 15.5), ("q4_k", 25.7), ("int8_channel", 27.7)] {
            assert!(speeds.iter().any(|s| s.0 == name && s.1 > 0.5 * us && s.1 < 1.5 * us), "{name}: {speeds:?}");
        }
    }

    #[test]
    fn page_and_picture_show_what_is_stored() {
        let root = root();
        let stored = Stored::read(&root).unwrap();
        let page = std::fs::read_to_string(root.join(PAGE)).unwrap();
        let how = "run: qp bench museum";
        let tables = page::tables(&root, &stored).unwrap();
        assert!(page::page(&page, &tables).unwrap() == page, "{PAGE} is not current; {how}\n{tables}");
        let picture = std::fs::read_to_string(root.join(PICTURE)).unwrap();
        assert!(picture::svg(&root, &stored).unwrap() == picture, "{PICTURE} is not current; {how}");
        let heights =
            picture.split(" cy=\"").skip(1).map(|rest| rest.split('"').next().unwrap().parse::<f64>().unwrap());
        assert!(
            heights.clone().count() > 40 && heights.into_iter().all(|y| (0.0..560.0).contains(&y)),
            "marks beyond the picture"
        );
    }
}
