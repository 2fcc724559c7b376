//! From CUDA source to machine code, or PTX for people to read: NVIDIA's run-time compiler, opened when it is first
//! needed ([`Nvrtc::get`]). It needs no GPU.

mod library;
mod ptxas;

use std::path::PathBuf;

pub use library::{Nvrtc, VARIABLE};
pub use ptxas::Usage;

/// How to compile, beside the target.
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
pub enum CompileError {
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
         nvidia-cuda-nvrtc`) and name it in {VARIABLE}",
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
        Some(path) => format!("no libnvrtc at {VARIABLE}={}", path.display()),
        None => format!(
            "NVRTC (libnvrtc.so), which compiles kernels for the GPU, was not found: `pip install nvidia-cuda-nvrtc`, \
             or set {VARIABLE} to its file or folder"
        ),
    }
}

fn place(file: &Option<PathBuf>) -> String {
    file.as_ref().map(|f| format!(" (source in {})", f.display())).unwrap_or_default()
}

impl Cubin {
    /// Machine code with the log of its compilation.
    pub fn new(bytes: Vec<u8>, log: String) -> Cubin {
        Cubin { bytes, usage: ptxas::parse(&log), log }
    }
}

/// Compiles `source` for `target` (`sm_90a`). `name` is for messages.
///
/// # Errors
/// No NVRTC, an unknown target, or an error in the source (with its log and the file that holds the source).
pub fn compile(source: &str, name: &str, target: &str, options: &Options) -> Result<Cubin, CompileError> {
    let nvrtc = Nvrtc::get()?;
    check_target(nvrtc, target)?;
    let output = nvrtc.compile(source, name, &flags(target, options), false)?;
    match output.code {
        Some(code) => Ok(Cubin::new(code, output.log)),
        None => Err(source_error(source, name, target, output.log)),
    }
}

/// NVRTC for a test that needs it: without it the test is noted as skipped, or fails if `QP_REQUIRE_NVRTC` is set.
#[doc(hidden)]
pub fn for_tests() -> Option<&'static Nvrtc> {
    match Nvrtc::get() {
        Ok(nvrtc) => Some(nvrtc),
        Err(e) if std::env::var_os("QP_REQUIRE_NVRTC").is_some() => panic!("QP_REQUIRE_NVRTC is set, but {e}"),
        Err(e) => {
            crate::skipped::note(&e.to_string());
            None
        }
    }
}

/// PTX text of `source` for `target` (`sm_90a`).
///
/// # Errors
/// As [`compile`].
pub fn compile_ptx(source: &str, name: &str, target: &str, options: &Options) -> Result<String, CompileError> {
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

fn check_target(nvrtc: &Nvrtc, target: &str) -> Result<(), CompileError> {
    if target.starts_with("sm_") && nvrtc.supports(target) {
        return Ok(());
    }
    let supported = nvrtc.archs().iter().map(|a| format!("sm_{a}")).collect();
    Err(CompileError::Target { target: target.into(), version: nvrtc.version(), supported })
}

/// NVRTC's command line for a target and options: all that its output depends on beside the source and its version.
pub fn flags(target: &str, options: &Options) -> Vec<String> {
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

fn source_error(source: &str, name: &str, target: &str, log: String) -> CompileError {
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
    CompileError::Source { name: name.into(), target: target.into(), log, file }
}
