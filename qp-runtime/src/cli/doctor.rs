//! `qp doctor`: what this machine has for running kernels, and what is missing.

use std::fmt::Write as _;

use clap::Args;
use serde_json::{Value, json};

use super::Error;
use super::output::out;
use crate::device;
use crate::jit::launches::{Choice, VARIABLE as LAUNCHES_VARIABLE};
use crate::jit::{Cache, Nvrtc};

/// Show what was found: CUDA driver, NVRTC, GPUs and the cache of compiled kernels.
#[derive(Args)]
pub struct Doctor {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Remove all compiled kernels and measured launches from the cache.
    #[arg(long)]
    clear_cache: bool,
}

/// One line of the table.
struct Finding {
    what: String,
    found: String,
    /// What to do about it, if something is missing.
    cure: Option<String>,
}

impl Finding {
    fn new(what: impl Into<String>, found: impl Into<String>) -> Self {
        Finding { what: what.into(), found: found.into(), cure: None }
    }
}

impl Doctor {
    /// Runs the command. A machine without a GPU is no error.
    ///
    /// # Errors
    /// A cache that cannot be cleared.
    pub fn run(self) -> Result<(), Error> {
        let cache = Cache::of_user();
        let cleared = if self.clear_cache {
            Some(cache.clear().map_err(|e| format!("clearing the cache of compiled kernels: {e}"))?)
        } else {
            None
        };
        let text = if self.json {
            let mut report = report_json(&cache);
            if let Some(n) = cleared {
                report["cleared"] = n.into();
            }
            format!("{report:#}\n")
        } else {
            let mut text = table(&findings(&cache));
            if let Some(n) = cleared {
                let _ = writeln!(text, "\nremoved {n} compiled kernels and measured launches from the cache");
            }
            text
        };
        out!("{text}")
    }
}

fn findings(cache: &Cache) -> Vec<Finding> {
    let mut out = Vec::new();
    let missing =
        |what: &str, reason: String| Finding { what: what.into(), found: "missing".into(), cure: Some(reason) };
    let gpu = match device::gpus() {
        Ok((version, gpus)) => {
            out.push(Finding::new("driver", format!("supports CUDA {}.{}", version.0, version.1)));
            for g in &gpus {
                let (target, cure) = match g.target {
                    Some(t) => (t.name(), None),
                    None => {
                        ("unsupported", Some("kernels are generated for compute capability 8.0 to 12.x".to_owned()))
                    }
                };
                let found = format!(
                    "{} ({target}, compute capability {}.{}, {} SMs, {:.1} GiB)",
                    g.name,
                    g.capability.0,
                    g.capability.1,
                    g.sms,
                    g.memory as f64 / f64::from(1 << 30)
                );
                out.push(Finding { what: format!("GPU {}", g.index), found, cure });
            }
            gpus.iter().any(|g| g.target.is_some())
        }
        Err(e) => {
            out.push(missing("driver, GPU", e.to_string()));
            false
        }
    };
    let nvrtc = match Nvrtc::get() {
        Ok(n) => {
            out.push(Finding::new("NVRTC", format!("{}.{} from {}", n.version().0, n.version().1, n.path().display())));
            let archs: Vec<String> = n.archs().iter().map(|a| format!("sm_{a}")).collect();
            out.push(Finding::new("compiles for", archs.join(" ")));
            true
        }
        Err(e) => {
            out.push(missing("NVRTC", e.to_string()));
            false
        }
    };
    let status = cache.status();
    let folder = status.folder.as_ref().map_or_else(|| "none".to_owned(), |f| f.display().to_string());
    let problem = status.problem.map(|p| {
        format!("it cannot be written, so kernels are compiled anew each time, and launches not measured: {p}")
    });
    out.push(Finding {
        what: "kernel cache".into(),
        found: format!(
            "{folder} ({} kernels, {} measured launches, {:.1} MiB)",
            status.entries,
            status.launches,
            status.bytes as f64 / f64::from(1 << 20)
        ),
        cure: problem,
    });
    out.push(match Choice::of_user() {
        Ok(Choice::Remembered) => Finding::new("launches", "as measured before, else as the cost model chooses"),
        Ok(Choice::Measured) => {
            Finding::new("launches", format!("measured at first use on a GPU ({LAUNCHES_VARIABLE}=measured)"))
        }
        Ok(Choice::Model) => Finding::new("launches", format!("as the cost model chooses ({LAUNCHES_VARIABLE}=model)")),
        Err(e) => Finding { what: "launches".into(), found: "undecided".into(), cure: Some(e.to_string()) },
    });
    let can = match (gpu, nvrtc) {
        (true, true) => "the CPU and the GPU",
        (true, false) => "the CPU (the GPU awaits NVRTC)",
        (false, true) => "the CPU; kernels can be compiled, but not run on a GPU",
        (false, false) => "the CPU",
    };
    out.push(Finding::new("models run on", can));
    out
}

fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|f| f.what.len()).max().unwrap_or(0);
    let mut text = String::new();
    for f in findings {
        let mark = if f.cure.is_some() { '!' } else { ' ' };
        let _ = writeln!(text, "{mark} {:width$}  {}", f.what, f.found);
        if let Some(cure) = &f.cure {
            let _ = writeln!(text, "  {:width$}  {cure}", "");
        }
    }
    text
}

fn report_json(cache: &Cache) -> Value {
    let status = cache.status();
    let driver = match device::gpus() {
        Ok((version, gpus)) => json!({
            "cuda": format!("{}.{}", version.0, version.1),
            "gpus": gpus.iter().map(|g| json!({
                "index": g.index,
                "name": g.name,
                "capability": format!("{}.{}", g.capability.0, g.capability.1),
                "target": g.target.map(|t| t.name()),
                "sms": g.sms,
                "memory": g.memory,
            })).collect::<Vec<_>>(),
        }),
        Err(e) => json!({ "missing": e.to_string() }),
    };
    let nvrtc = match Nvrtc::get() {
        Ok(n) => json!({
            "version": format!("{}.{}", n.version().0, n.version().1),
            "path": n.path(),
            "targets": n.archs().iter().map(|a| format!("sm_{a}")).collect::<Vec<_>>(),
        }),
        Err(e) => json!({ "missing": e.to_string() }),
    };
    json!({
        "driver": driver,
        "nvrtc": nvrtc,
        "cache": {
            "folder": status.folder,
            "entries": status.entries,
            "launches": status.launches,
            "bytes": status.bytes,
            "problem": status.problem,
        },
    })
}
