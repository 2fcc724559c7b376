//! `qp train-codebook`: the tables that a spec calls trained.

use std::path::{Path, PathBuf};

use clap::Args;
use qp_codegen::spec::{self, Quantizer, TableSource, table_file};

use super::Error;
use super::device::{Device, open};
use super::output::{outln, say, write};
use crate::codec::{distortion, train};
use crate::device::Executor;

/// Weights on which a new table is measured. They are not those it was trained on.
const CHECK_SAMPLES: u64 = 1 << 20;
const CHECK_SEED: u64 = 1 << 32;

/// Train the tables of quantizers and write their files.
///
/// Tables are trained as the spec says (`trained(seed = .., rounds = .., samples = ..)`) by Lloyd's iteration on the
/// trellis, and written where the spec says, relative to the spec's folder; for the built-in palette that is
/// `specs/tables/` of the current folder.
#[derive(Args)]
pub struct TrainCodebook {
    /// Quantizers: names of the palette, spec files (all that they define), or FILE:NAME.
    #[arg(required = true)]
    spec: Vec<String>,
    /// Write the table here instead (one quantizer with one table).
    #[arg(long)]
    out: Option<PathBuf>,
    /// Leave tables alone that have their file.
    #[arg(long)]
    missing: bool,
    /// Where samples are encoded; the tables are the same.
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
}

impl TrainCodebook {
    /// Runs it.
    pub fn run(self) -> Result<(), Error> {
        if let Some(missing) = self.spec.iter().find(|s| s.ends_with(".qspec") && !Path::new(s).exists()) {
            return Err(format!(
                "cannot read {missing}: there is no such file; the palette's are named without `.qspec`"
            )
            .into());
        }
        let quantizers: Vec<Quantizer> = spec::resolve_all_untrained(&self.spec)?.into_iter().map(|(q, _)| q).collect();
        let tables = quantizers.iter().flat_map(|q| &q.codes).map(|c| c.tables.len()).sum::<usize>();
        if self.out.is_some() && tables != 1 {
            return Err(format!(
                "--out is for one table, but there are {tables}; leave it out to write each where its spec says"
            )
            .into());
        }
        // Codes that several mixes share are trained once.
        let mut written: Vec<PathBuf> = vec![];
        let device = open(self.device)?;
        for q in &quantizers {
            self.train(q, device.as_ref(), &mut written)?;
        }
        Ok(())
    }

    fn train(&self, q: &Quantizer, device: Option<&Executor>, written: &mut Vec<PathBuf>) -> Result<(), Error> {
        for code in &q.codes {
            let files: Vec<(usize, &PathBuf)> = code
                .tables
                .iter()
                .enumerate()
                .filter_map(|(i, t)| match &t.source {
                    TableSource::Trained { file, training: _ } => Some((i, self.out.as_ref().unwrap_or(file))),
                    TableSource::Inline | TableSource::File(_) => None,
                })
                .collect();
            if files.iter().all(|(_, f)| written.contains(f) || self.missing && f.exists()) && !files.is_empty() {
                continue;
            }
            let failed = |e| format!("{}: {e}", q.name);
            let training = train::training(code).ok_or(train::TrainError::NoTable).map_err(failed)?;
            let values = train::train(code, training, device, &mut |round, error| {
                let rounds = training.rounds;
                say(&format!("{}: round {} of {rounds}, mean squared error {error:.6}\n", q.name, round + 1));
            })
            .map_err(failed)?;
            let mut code = code.clone();
            code.tables.iter_mut().zip(values).for_each(|(t, v)| t.values = v);
            let d = distortion::measure_on(device, &code, CHECK_SAMPLES, CHECK_SEED)?;
            let note = format!(
                "mean squared error {:.6} on a Gaussian source (standard error {:.6})",
                d.mean, d.standard_error
            );
            for (i, file) in files {
                write(file, &table_file::write(&q.name, &code.tables[i], code.vector, std::slice::from_ref(&note)))?;
                outln!("{}: {note}: {}", q.name, file.display())?;
                written.push(file.clone());
            }
        }
        Ok(())
    }
}
