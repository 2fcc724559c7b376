//! From CUDA source to machine code: NVRTC and the cache of what it made.
//!
//! NVRTC is opened at run time ([`Nvrtc::get`]); it needs no GPU. [`compile`] asks the user's [`Cache`] first.

mod cache;
mod find;
mod nvrtc;
mod ptxas;

use std::path::PathBuf;

pub use cache::{Cache, Status as CacheStatus, VARIABLE as CACHE_VARIABLE};
pub use find::VARIABLE as NVRTC_VARIABLE;
pub use nvrtc::Nvrtc;
pub use ptxas::Usage;

use cache::Key;

/// How to compile, beside the target. All of it is part of the cache's key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Keep line numbers for profilers.
    pub line_info: bool,
    /// Further options of NVRTC, as it spells them.
    pub extra: Vec<String>,
}

/// Machine code of one source for one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cubin {
    /// The ELF image that the driver loads.
    pub bytes: Vec<u8>,
    /// Registers, spills, stack and static shared memory; `None` if the compiler did not say.
    pub usage: Option<Usage>,
    /// The compiler's remarks.
    pub log: String,
}

/// Why there is no machine code.
#[derive(Clone, Debug, thiserror::Error)]
pub enum JitError {
    /// No NVRTC.
    #[error("{}", missing(given))]
    Missing {
        /// `QP_NVRTC`, if set.
        given: Option<PathBuf>,
    },
    /// A file that is no usable NVRTC.
    #[error("{} cannot be used as NVRTC: {reason}", path.display())]
    Library {
        /// The file.
        path: PathBuf,
        /// The loader's words.
        reason: String,
    },
    /// A target that this NVRTC does not know.
    #[error(
        "NVRTC {}.{} does not compile for {target}; it supports {}. Install another version (`pip install \
         nvidia-cuda-nvrtc`) and name it in {NVRTC_VARIABLE}",
        version.0, version.1, supported.join(" ")
    )]
    Target {
        /// Asked for.
        target: String,
        /// Of the library.
        version: (u32, u32),
        /// `sm_…` names that would work.
        supported: Vec<String>,
    },
    /// An error in the source.
    #[error("{name} does not compile for {target}{}:\n{log}", place(file))]
    Source {
        /// The kernel.
        name: String,
        /// Asked for.
        target: String,
        /// The compiler's errors.
        log: String,
        /// Where the source was written for inspection.
        file: Option<PathBuf>,
    },
    /// NVRTC failed for another reason.
    #[error("{call}: {reason}{}{log}", if log.is_empty() { "" } else { "\n" })]
    Nvrtc {
        /// The function.
        call: &'static str,
        /// Its error, in words.
        reason: String,
        /// Its log.
        log: String,
    },
    /// Source, name or option with a NUL character.
    #[error("a source, name or option for NVRTC holds a NUL character")]
    Nul,
}

fn missing(given: &Option<PathBuf>) -> String {
    match given {
        Some(path) => format!("no libnvrtc at {NVRTC_VARIABLE}={}", path.display()),
        None => format!(
            "NVRTC (libnvrtc.so), which compiles kernels for the GPU, was not found: `pip install nvidia-cuda-nvrtc`, \
             or set {NVRTC_VARIABLE} to its file or folder"
        ),
    }
}

fn place(file: &Option<PathBuf>) -> String {
    file.as_ref().map(|f| format!(" (source in {})", f.display())).unwrap_or_default()
}

/// Compiles `source` for `target` (`sm_90a`), or takes it from the user's cache. `name` is for messages.
///
/// # Errors
/// No NVRTC, an unknown target, or an error in the source (with its log and the file that holds the source).
pub fn compile(source: &str, name: &str, target: &str, options: &Options) -> Result<Cubin, JitError> {
    compile_in(&Cache::of_user(), source, name, target, options)
}

/// [`compile`] with a cache of the caller's choice.
///
/// # Errors
/// As [`compile`].
pub fn compile_in(cache: &Cache, source: &str, name: &str, target: &str, options: &Options) -> Result<Cubin, JitError> {
    let nvrtc = Nvrtc::get()?;
    check_target(nvrtc, target)?;
    let flags = flags(target, options);
    let version = format!("{}.{}", nvrtc.version().0, nvrtc.version().1);
    let key = Key::new([source, &version].into_iter().chain(flags.iter().map(String::as_str)));
    let (log, bytes) = match cache.get(&key) {
        Some(entry) => entry,
        None => {
            let output = nvrtc.compile(source, name, &flags, false)?;
            let Some(code) = output.code else { return Err(source_error(source, name, target, output.log)) };
            cache.put(&key, &output.log, &code);
            (output.log, code)
        }
    };
    Ok(Cubin { bytes, usage: ptxas::parse(&log), log })
}

/// PTX text of `source` for `target` (`sm_90a`). Not cached: it is for people to read.
///
/// # Errors
/// As [`compile`].
pub fn compile_ptx(source: &str, name: &str, target: &str, options: &Options) -> Result<String, JitError> {
    let nvrtc = Nvrtc::get()?;
    check_target(nvrtc, target)?;
    let flags = flags(&target.replacen("sm_", "compute_", 1), options);
    let output = nvrtc.compile(source, name, &flags, true)?;
    let Some(mut code) = output.code else { return Err(source_error(source, name, target, output.log)) };
    while code.last() == Some(&0) {
        code.pop();
    }
    Ok(String::from_utf8_lossy(&code).into_owned())
}

fn check_target(nvrtc: &Nvrtc, target: &str) -> Result<(), JitError> {
    if target.starts_with("sm_") && nvrtc.supports(target) {
        return Ok(());
    }
    let supported = nvrtc.archs().iter().map(|a| format!("sm_{a}")).collect();
    Err(JitError::Target { target: target.into(), version: nvrtc.version(), supported })
}

fn flags(target: &str, options: &Options) -> Vec<String> {
    // `--fmad=false`: kernels say where they want a fused product, so that all backends give the same bits.
    let fixed = ["--std=c++17", "--fmad=false"];
    let mut out = vec![format!("--gpu-architecture={target}")];
    out.extend(fixed.map(str::to_owned));
    if !target.starts_with("compute_") {
        out.push("--ptxas-options=-v".into());
    }
    if options.line_info {
        out.push("--generate-line-info".into());
    }
    out.extend(options.extra.iter().cloned());
    out
}

fn source_error(source: &str, name: &str, target: &str, log: String) -> JitError {
    use std::io::Write;
    let file = tempfile::Builder::new()
        .prefix(&format!("{name}-"))
        .suffix(".cu")
        .tempfile()
        .and_then(|mut f| {
            f.write_all(source.as_bytes())?;
            f.keep().map_err(|e| e.error)
        })
        .ok()
        .map(|(_, path)| path);
    JitError::Source { name: name.into(), target: target.into(), log, file }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r#"extern "C" __global__ void k(float* x) { x[threadIdx.x] *= 2.0f; }"#;

    /// NVRTC, or a remark that the test did nothing: machines without it must pass.
    fn nvrtc() -> Option<&'static Nvrtc> {
        Nvrtc::get().inspect_err(|e| eprintln!("skipped: {e}")).ok()
    }

    #[test]
    fn compiles_and_takes_from_the_cache() {
        if nvrtc().is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let options = Options::default();
        let first = compile_in(&cache, SOURCE, "k", "sm_80", &options).unwrap();
        assert!(first.bytes.starts_with(b"\x7fELF"));
        let usage = first.usage.unwrap();
        assert!(usage.registers > 0 && usage.spill_stores == 0, "{usage:?}");
        assert_eq!(cache.status().entries, 1);
        assert_eq!(compile_in(&cache, SOURCE, "k", "sm_80", &options).unwrap(), first);
        // A damaged entry is replaced.
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        std::fs::write(&file, b"not a cubin").unwrap();
        assert_eq!(compile_in(&cache, SOURCE, "k", "sm_80", &options).unwrap().bytes, first.bytes);
        assert!(std::fs::read(&file).unwrap().len() > first.bytes.len());
        // Another target or option is another entry.
        compile_in(&cache, SOURCE, "k", "sm_90a", &options).unwrap();
        compile_in(&cache, SOURCE, "k", "sm_80", &Options { line_info: true, ..Options::default() }).unwrap();
        assert_eq!(cache.status().entries, 3);
    }

    #[test]
    fn ptx_is_text() {
        if nvrtc().is_none() {
            return;
        }
        let ptx = compile_ptx(SOURCE, "k", "sm_90a", &Options::default()).unwrap();
        assert!(ptx.contains(".target sm_90a") && ptx.contains(".entry k"), "{ptx}");
    }

    #[test]
    fn errors_carry_log_and_source() {
        if nvrtc().is_none() {
            return;
        }
        let bad = "extern \"C\" __global__ void k() { undeclared = 1; }";
        let e = compile_in(&Cache::none(), bad, "bad_kernel", "sm_80", &Options::default()).unwrap_err();
        let JitError::Source { log, file: Some(file), .. } = &e else { panic!("{e}") };
        assert!(log.contains("undeclared"));
        assert_eq!(std::fs::read_to_string(file).unwrap(), bad);
        assert!(e.to_string().contains(&file.display().to_string()));
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn unknown_targets_are_named_with_those_that_work() {
        if nvrtc().is_none() {
            return;
        }
        for target in ["sm_35", "volta", "compute_80", ""] {
            let e = compile(SOURCE, "k", target, &Options::default()).unwrap_err();
            assert!(matches!(e, JitError::Target { .. }), "{e}");
            assert!(e.to_string().contains("sm_80"), "{e}");
        }
        assert!(matches!(compile("\0", "k", "sm_80", &Options::default()), Err(JitError::Nul)));
    }
}
