//! NVRTC, opened at run time.
//!
//! A table of its dozen functions, opened by ourselves: `docs/decisions/cuda-bindings.md` says why.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use super::CompileError;
use crate::find::{self, Candidate, Wanted};

/// The environment variable that names the library's file or folder; nothing else is searched if it is set.
pub const VARIABLE: &str = "QP_NVRTC";

const WANTED: Wanted = Wanted {
    stem: "libnvrtc.so",
    variable: VARIABLE,
    names: &["libnvrtc.so.14", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"],
};

type Program = *mut std::ffi::c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The compiler library.
pub struct Nvrtc {
    path: PathBuf,
    version: (u32, u32),
    archs: Vec<u32>,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: Size,
    log: Text,
    cubin_size: Size,
    cubin: Text,
    ptx_size: Size,
    ptx: Text,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// What NVRTC made of a source: the code, or no code after an error in the source, and its log.
pub(super) struct Output {
    /// Cubin or PTX text.
    pub code: Option<Vec<u8>>,
    /// Remarks, warnings, errors.
    pub log: String,
}

/// `NVRTC_ERROR_COMPILATION`: the source is wrong.
const COMPILATION: c_int = 6;

impl Nvrtc {
    /// The library, opened at the first call.
    ///
    /// # Errors
    /// [`CompileError::Missing`] if there is none, [`CompileError::Library`] if the one that `QP_NVRTC` names cannot be used.
    pub fn get() -> Result<&'static Nvrtc, CompileError> {
        static NVRTC: OnceLock<Result<Nvrtc, CompileError>> = OnceLock::new();
        NVRTC.get_or_init(Nvrtc::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Nvrtc, CompileError> {
        WANTED
            .open(Nvrtc::open_one)
            .map_err(|broken| broken.unwrap_or_else(|| CompileError::Missing { given: WANTED.given() }))
    }

    fn open_one(candidate: &Candidate) -> Result<Nvrtc, CompileError> {
        let path = candidate.path().to_owned();
        let fail = |e: libloading::Error| {
            // The loader's own words are in the source.
            let reason = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
            CompileError::Library { path: path.clone(), reason }
        };
        if let Candidate::File(file) = candidate {
            preload_builtins(file);
        }
        // SAFETY: NVRTC's initialisers are sound; the signatures below are those of its header since CUDA 11.2.
        unsafe {
            let library = Library::new(&path).map_err(fail)?;
            macro_rules! symbol {
                ($name:literal) => {
                    *library.get(concat!($name, "\0").as_bytes()).map_err(fail)?
                };
            }
            let get_version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = symbol!("nvrtcVersion");
            let count: unsafe extern "C" fn(*mut c_int) -> c_int = symbol!("nvrtcGetNumSupportedArchs");
            let list: unsafe extern "C" fn(*mut c_int) -> c_int = symbol!("nvrtcGetSupportedArchs");
            let (mut major, mut minor, mut n) = (0, 0, 0);
            get_version(&mut major, &mut minor);
            count(&mut n);
            let mut archs = vec![0 as c_int; n.max(0) as usize];
            list(archs.as_mut_ptr());
            let nvrtc = Nvrtc {
                path: path.clone(),
                version: (major as u32, minor as u32),
                archs: archs.iter().map(|&a| a as u32).collect(),
                create: symbol!("nvrtcCreateProgram"),
                destroy: symbol!("nvrtcDestroyProgram"),
                compile: symbol!("nvrtcCompileProgram"),
                log_size: symbol!("nvrtcGetProgramLogSize"),
                log: symbol!("nvrtcGetProgramLog"),
                cubin_size: symbol!("nvrtcGetCUBINSize"),
                cubin: symbol!("nvrtcGetCUBIN"),
                ptx_size: symbol!("nvrtcGetPTXSize"),
                ptx: symbol!("nvrtcGetPTX"),
                error_string: symbol!("nvrtcGetErrorString"),
            };
            // Kept for the life of the process: the functions are copied out of it.
            std::mem::forget(library);
            Ok(nvrtc)
        }
    }

    /// Where it was found: a path, or the bare name that the loader resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Major and minor CUDA version.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Compute capabilities it compiles for, as 10 × major + minor.
    pub fn archs(&self) -> &[u32] {
        &self.archs
    }

    /// True if it compiles for `target` (`sm_90a`, `compute_80`).
    pub fn supports(&self, target: &str) -> bool {
        let digits: String = target.chars().filter(char::is_ascii_digit).collect();
        digits.parse().is_ok_and(|n| self.archs.contains(&n))
    }

    /// Compiles; `name` appears in the log. `ptx` asks for PTX text (options must then name a `compute_` target).
    pub(super) fn compile(
        &self,
        source: &str,
        name: &str,
        options: &[String],
        ptx: bool,
    ) -> Result<Output, CompileError> {
        let nul = |_| CompileError::Nul;
        let source = CString::new(source).map_err(nul)?;
        let name = CString::new(name).map_err(nul)?;
        // From 13.0 on NVRTC keeps a cache of its own, which gives no log: register counts would be unknown.
        let own_cache = (self.version() >= (13, 0)).then_some("--no-cache");
        let options = options.iter().map(String::as_str).chain(own_cache).map(CString::new);
        let options = options.collect::<Result<Vec<_>, _>>().map_err(nul)?;
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        // SAFETY: all pointers outlive the calls; buffers have the sizes that NVRTC asks for.
        unsafe {
            let mut raw = ptr::null_mut();
            self.check(
                "nvrtcCreateProgram",
                (self.create)(&mut raw, source.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null()),
            )?;
            let program = Guard { nvrtc: self, raw };
            let status = (self.compile)(raw, pointers.len() as c_int, pointers.as_ptr());
            let log = program.text("nvrtcGetProgramLog", self.log_size, self.log).unwrap_or_default();
            let mut log = String::from_utf8_lossy(&log).into_owned();
            log.truncate(log.trim_end_matches(['\0', '\n']).len());
            if status == COMPILATION {
                return Ok(Output { code: None, log });
            }
            if status != 0 {
                return Err(CompileError::Nvrtc { call: "nvrtcCompileProgram", reason: self.reason(status), log });
            }
            let code = if ptx {
                program.text("nvrtcGetPTX", self.ptx_size, self.ptx)?
            } else {
                program.text("nvrtcGetCUBIN", self.cubin_size, self.cubin)?
            };
            Ok(Output { code: Some(code), log })
        }
    }

    fn reason(&self, status: c_int) -> String {
        // SAFETY: the function gives a static string for any number.
        let text = unsafe { (self.error_string)(status) };
        if text.is_null() {
            return format!("error {status}");
        }
        // SAFETY: as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    fn check(&self, call: &'static str, status: c_int) -> Result<(), CompileError> {
        if status == 0 {
            Ok(())
        } else {
            Err(CompileError::Nvrtc { call, reason: self.reason(status), log: String::new() })
        }
    }
}

/// A program, destroyed on every way out.
struct Guard<'a> {
    nvrtc: &'a Nvrtc,
    raw: Program,
}

impl Guard<'_> {
    /// # Safety
    /// `size` and `get` must be a pair of NVRTC functions.
    unsafe fn text(&self, call: &'static str, size: Size, get: Text) -> Result<Vec<u8>, CompileError> {
        let mut n = 0;
        // SAFETY: the program is alive and `n` a place for the size.
        self.nvrtc.check(call, unsafe { size(self.raw, &mut n) })?;
        let mut out = vec![0u8; n];
        // SAFETY: `out` has the size that was asked for.
        self.nvrtc.check(call, unsafe { get(self.raw, out.as_mut_ptr().cast()) })?;
        Ok(out)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: created by NVRTC and not destroyed before.
        unsafe { (self.nvrtc.destroy)(&mut self.raw) };
    }
}

/// NVRTC opens `libnvrtc-builtins` by its bare name, which the loader finds in a folder that is not on its path only
/// if it is in the process already.
fn preload_builtins(nvrtc: &Path) {
    let Some(file) = nvrtc.parent().and_then(|folder| find::newest_in(folder, "libnvrtc-builtins.so")) else { return };
    // SAFETY: a data library of NVRTC, without initialisers of consequence.
    if let Ok(library) = unsafe { Library::new(file) } {
        std::mem::forget(library);
    }
}
