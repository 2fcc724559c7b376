//! Products of half-precision matrices by cuBLAS, opened at run time: for so many tokens at once that tensor cores, not
//! memory, are the limit.
//!
//! A table of its six functions, opened by ourselves as NVRTC is (`docs/decisions/cuda-bindings.md`). On the
//! interpreter the same products are computed by a plain loop, so that what is built on them can be tested without a GPU.

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use half::f16;
use libloading::Library;
use qp_codegen::find::{self, Candidate, Wanted};
use qp_codegen::ir::Elem;
use rayon::prelude::*;

use super::driver::{Context, Memory};
use super::executor::RawBuffer;
use super::{Buffer, DeviceError, Element, Executor};
use crate::jit::Nvrtc;

/// The environment variable that names the library's file or folder; nothing else is searched if it is set.
pub const VARIABLE: &str = "QP_CUBLAS";

const WANTED: Wanted = Wanted {
    stem: "libcublas.so",
    variable: VARIABLE,
    names: &["libcublas.so.14", "libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so"],
};

/// Why cuBLAS cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CublasError {
    /// No library.
    #[error("{}", missing(given))]
    Missing {
        /// `QP_CUBLAS`, if set.
        given: Option<PathBuf>,
    },
    /// A file that is no usable cuBLAS.
    #[error("{} cannot be used as cuBLAS: {reason}; set {VARIABLE} to the file or folder of another", path.display())]
    Library {
        /// The file.
        path: PathBuf,
        /// The loader's words.
        reason: String,
    },
    /// A call failed.
    #[error("{call} of {}: {reason}", path.display())]
    Call {
        /// The function, and what it was about.
        call: String,
        /// The library.
        path: PathBuf,
        /// Its status, in words.
        reason: String,
    },
}

fn missing(given: &Option<PathBuf>) -> String {
    match given {
        Some(path) => format!("no libcublas at {VARIABLE}={}", path.display()),
        None => format!(
            "cuBLAS (libcublas.so), which multiplies matrices in half precision, was not found: `pip install \
             nvidia-cublas` (`nvidia-cublas-cu12` for a driver of CUDA 12), or set {VARIABLE} to its file or folder"
        ),
    }
}

/// A product `y[token, row] = Σ W[row, column] · x[token, column]` (or `+=`), everything row-major: `W` is rows × columns,
/// `x` tokens × columns, both in half precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HalfProduct {
    /// Rows of the matrix: outputs.
    pub rows: u32,
    /// Its columns: inputs.
    pub cols: u32,
    /// Tokens.
    pub tokens: u32,
    /// From one token's outputs to the next; at least `rows`.
    pub stride: u32,
    /// Add to the outputs instead of overwriting them.
    pub accumulate: bool,
}

/// The arguments of a BLAS for [`HalfProduct`]: `C = op(A) · op(B) + beta · C`, of `m × k` and `k × n`.
///
/// A BLAS is column-major, where what we call row-major with `c` columns is the transpose with leading dimension `c`:
///
/// * `A = W`: lies there as columns × rows, so it is transposed back;
/// * `B = x`: lies there as columns × tokens, which is what the product takes;
/// * `C = y`: lies there as rows × tokens, its leading dimension the distance between tokens.
#[derive(Clone, Copy, Debug)]
struct Arguments {
    transpose_a: bool,
    transpose_b: bool,
    m: u32,
    n: u32,
    k: u32,
    lda: u32,
    ldb: u32,
    ldc: u32,
    beta: f32,
}

impl HalfProduct {
    fn arguments(&self) -> Arguments {
        Arguments {
            transpose_a: true,
            transpose_b: false,
            m: self.rows,
            n: self.tokens,
            k: self.cols,
            lda: self.cols,
            ldb: self.cols,
            ldc: self.stride,
            beta: if self.accumulate { 1.0 } else { 0.0 },
        }
    }

    /// Elements that `W`, `x` and `y` have at least.
    fn lengths(&self) -> [usize; 3] {
        let [rows, cols, tokens, stride] = [self.rows, self.cols, self.tokens, self.stride].map(|n| n as usize);
        [rows * cols, tokens * cols, tokens.saturating_sub(1) * stride + rows]
    }
}

/// What multiplies matrices in half precision on an executor. Cheap to clone: clones are the same.
#[derive(Clone)]
pub struct Blas(Backend);

#[derive(Clone)]
enum Backend {
    Host,
    Cuda(Arc<Mutex<Cublas>>),
}

impl Blas {
    /// cuBLAS for the executor's GPU, or a plain loop for the interpreter.
    ///
    /// # Errors
    /// No library, or one that does not go with the driver.
    pub fn open(on: &Executor) -> Result<Blas, DeviceError> {
        Ok(Blas(match on.context() {
            None => Backend::Host,
            Some(context) => Backend::Cuda(Arc::new(Mutex::new(Cublas::open(context)?))),
        }))
    }

    /// Its name, version and place.
    pub fn describe(&self) -> String {
        match &self.0 {
            Backend::Host => "a plain loop on the CPU".to_owned(),
            Backend::Cuda(cublas) => {
                let Functions { path, version, .. } = &lock(cublas).functions;
                let (major, minor, patch) = (version / 10_000, version / 100 % 100, version % 100);
                format!("cuBLAS {major}.{minor}.{patch} from {}", path.display())
            }
        }
    }

    /// Puts the product into the executor's stream: sums are single precision, outputs `f32` or `f16`.
    ///
    /// # Errors
    /// Buffers that are too short, of another device or of another element type, a failing library.
    pub fn launch<T: Element>(
        &self,
        op: &HalfProduct,
        weights: &Buffer<f16>,
        x: &Buffer<f16>,
        y: &mut Buffer<T>,
    ) -> Result<(), DeviceError> {
        let lengths = [weights.len(), x.len(), y.len()];
        if op.stride < op.rows || lengths.iter().zip(op.lengths()).any(|(have, needed)| *have < needed) {
            return Err(DeviceError::Buffer(format!("{op:?} does not fit buffers of {lengths:?} elements")));
        }
        self.run(op, [weights.raw(), x.raw(), y.raw()], T::ELEM)
    }

    fn run(&self, op: &HalfProduct, buffers: [&RawBuffer; 3], output: Elem) -> Result<(), DeviceError> {
        if !matches!(output, Elem::F32 | Elem::F16) {
            return Err(DeviceError::Buffer(format!("products in half precision have no output of {output:?}")));
        }
        match (&self.0, buffers) {
            (Backend::Host, [RawBuffer::Host(weights), RawBuffer::Host(x), RawBuffer::Host(y)]) => {
                on_host(op, weights, x, y, output);
                Ok(())
            }
            (Backend::Cuda(cublas), [RawBuffer::Cuda(weights), RawBuffer::Cuda(x), RawBuffer::Cuda(y)]) => {
                lock(cublas).launch(op, weights, x, y, output)
            }
            (Backend::Host | Backend::Cuda(_), _) => Err(other_device()),
        }
    }
}

fn lock(cublas: &Mutex<Cublas>) -> std::sync::MutexGuard<'_, Cublas> {
    cublas.lock().unwrap_or_else(PoisonError::into_inner)
}

fn other_device() -> DeviceError {
    DeviceError::Buffer("a product in half precision was passed a buffer of another device".to_owned())
}

/// The product as a loop: each output a sum in the order of columns.
fn on_host(op: &HalfProduct, weights: &RwLock<Vec<u8>>, x: &RwLock<Vec<u8>>, y: &RwLock<Vec<u8>>, output: Elem) {
    let floats = |of: &RwLock<Vec<u8>>, len: usize| -> Vec<f32> {
        let bytes = of.read().unwrap_or_else(PoisonError::into_inner);
        bytes[..2 * len].chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    };
    let [weights_len, x_len, _] = op.lengths();
    let (weights, x) = (floats(weights, weights_len), floats(x, x_len));
    let (rows, cols) = (op.rows as usize, op.cols as usize);
    let size = output.bytes() as usize;
    let mut y = y.write().unwrap_or_else(PoisonError::into_inner);
    let tokens = y.par_chunks_mut(op.stride as usize * size).zip(x.par_chunks_exact(cols));
    tokens.for_each(|(y, x)| {
        for (y, w) in y.chunks_exact_mut(size).take(rows).zip(weights.chunks_exact(cols)) {
            let sum = w.iter().zip(x).fold(0f32, |sum, (w, x)| sum + w * x);
            match y {
                [a, b] => {
                    let before = if op.accumulate { f16::from_le_bytes([*a, *b]).to_f32() } else { 0.0 };
                    [*a, *b] = f16::from_f32(before + sum).to_le_bytes();
                }
                [a, b, c, d] => {
                    let before = if op.accumulate { f32::from_le_bytes([*a, *b, *c, *d]) } else { 0.0 };
                    [*a, *b, *c, *d] = (before + sum).to_le_bytes();
                }
                _ => unreachable!("outputs of two or four bytes"),
            }
        }
    });
}

type Handle = *mut c_void;
type Status = c_int;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> Status;

/// `CUBLAS_OP_N`, `CUBLAS_OP_T`.
const OP: [c_int; 2] = [0, 1];
/// `CUDA_R_32F`.
const R_32F: c_int = 0;
/// `CUDA_R_16F`.
const R_16F: c_int = 2;
/// `CUBLAS_COMPUTE_32F`: products of halves on tensor cores, summed in single precision.
const COMPUTE_32F: c_int = 68;
/// `CUBLAS_GEMM_DEFAULT`.
const DEFAULT_ALGORITHM: c_int = -1;
/// Memory that the library may work in, as much as PyTorch gives it on the newest GPUs. Its own default is less on some.
const WORKSPACE: usize = 32 << 20;

/// The library's functions; the signatures are those of its header since CUDA 11.
struct Functions {
    path: PathBuf,
    version: u32,
    create: unsafe extern "C" fn(*mut Handle) -> Status,
    destroy: unsafe extern "C" fn(Handle) -> Status,
    get_version: unsafe extern "C" fn(Handle, *mut c_int) -> Status,
    set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> Status,
    set_workspace: unsafe extern "C" fn(Handle, *mut c_void, usize) -> Status,
    gemm_ex: GemmEx,
}

impl Functions {
    fn open(path: &Path) -> Result<Functions, CublasError> {
        let fail = |e: libloading::Error| {
            // The loader's own words are in the source.
            let reason = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
            CublasError::Library { path: path.to_owned(), reason }
        };
        // SAFETY: cuBLAS's initialisers are sound; the signatures are those of its header. It finds `libcublasLt`, which it
        // needs, in its own folder by itself.
        unsafe {
            let library = Library::new(path).map_err(fail)?;
            macro_rules! symbol {
                ($name:literal) => {
                    *library.get(concat!($name, "\0").as_bytes()).map_err(fail)?
                };
            }
            let functions = Functions {
                path: path.to_owned(),
                version: 0,
                create: symbol!("cublasCreate_v2"),
                destroy: symbol!("cublasDestroy_v2"),
                get_version: symbol!("cublasGetVersion_v2"),
                set_stream: symbol!("cublasSetStream_v2"),
                set_workspace: symbol!("cublasSetWorkspace_v2"),
                gemm_ex: symbol!("cublasGemmEx"),
            };
            // Kept for the life of the process: the functions are copied out of it.
            std::mem::forget(library);
            Ok(functions)
        }
    }

    fn check(&self, call: impl Into<String>, status: Status) -> Result<(), CublasError> {
        if status == 0 {
            return Ok(());
        }
        Err(CublasError::Call { call: call.into(), path: self.path.clone(), reason: words(status) })
    }
}

/// A status of cuBLAS, in words.
fn words(status: Status) -> String {
    let (name, cure) = match status {
        1 => (
            "CUBLAS_STATUS_NOT_INITIALIZED",
            " (the driver may be older than this cuBLAS: update the driver, or install cuBLAS of its CUDA version)",
        ),
        3 => ("CUBLAS_STATUS_ALLOC_FAILED", " (the GPU's memory is full: close other programs)"),
        7 => ("CUBLAS_STATUS_INVALID_VALUE", ""),
        8 => ("CUBLAS_STATUS_ARCH_MISMATCH", " (this cuBLAS does not know the GPU: install another version)"),
        11 => ("CUBLAS_STATUS_MAPPING_ERROR", ""),
        13 => ("CUBLAS_STATUS_EXECUTION_FAILED", ""),
        14 => ("CUBLAS_STATUS_INTERNAL_ERROR", ""),
        15 => ("CUBLAS_STATUS_NOT_SUPPORTED", ""),
        16 => ("CUBLAS_STATUS_LICENSE_ERROR", ""),
        _ => return format!("status {status}"),
    };
    format!("{name}{cure}")
}

/// A handle of cuBLAS, working on the one stream of its context.
struct Cublas {
    functions: Functions,
    handle: Handle,
    workspace: Memory,
}

// SAFETY: a handle may be used from any thread, one at a time (it is behind a lock), once the context is bound.
unsafe impl Send for Cublas {}

impl Cublas {
    fn open(context: &Arc<Context>) -> Result<Cublas, DeviceError> {
        context.bind()?;
        let workspace = Memory::zeroed(context, WORKSPACE)?;
        // A library that opens but does not go with the driver is passed over like one that is not there, but told of.
        let mut failed = None;
        let mut create = |candidate: &Candidate| {
            let functions = Functions::open(candidate.path())?;
            let mut handle = ptr::null_mut();
            // SAFETY: a context is bound to this thread; the handle is destroyed in `drop`.
            let status = unsafe { (functions.create)(&mut handle) };
            let checked = functions.check("cublasCreate", status);
            checked.inspect_err(|e| failed = failed.take().or(Some(e.clone())))?;
            Ok((functions, handle))
        };
        let beside = beside_nvrtc().and_then(|candidate| create(&candidate).ok());
        let found = beside.map_or_else(|| WANTED.open(&mut create), Ok);
        let (functions, handle) = found.map_err(|broken| {
            let broken: Option<CublasError> = broken;
            failed.or(broken).unwrap_or_else(|| CublasError::Missing { given: WANTED.given() })
        })?;
        let mut this = Cublas { functions, handle, workspace };
        let mut version = 0;
        let Functions { get_version, set_stream, set_workspace, .. } = this.functions;
        let (stream, memory) = (context.stream(), this.workspace.pointer() as *mut c_void);
        // SAFETY: the handle is alive; stream and memory live as long as it does. A change of the stream would take the
        // workspace away, so that comes second.
        unsafe {
            this.functions.check("cublasGetVersion", get_version(handle, &mut version))?;
            this.functions.check("cublasSetStream", set_stream(handle, stream))?;
            this.functions.check("cublasSetWorkspace", set_workspace(handle, memory, WORKSPACE))?;
        }
        this.functions.version = version.unsigned_abs();
        Ok(this)
    }

    fn launch(
        &self,
        op: &HalfProduct,
        weights: &Memory,
        x: &Memory,
        y: &Memory,
        output: Elem,
    ) -> Result<(), DeviceError> {
        let context = self.workspace.context();
        if ![weights, x, y].iter().all(|m| Arc::ptr_eq(m.context(), context)) {
            return Err(other_device());
        }
        context.bind()?;
        let Arguments { transpose_a, transpose_b, m, n, k, lda, ldb, ldc, beta } = op.arguments();
        let alpha = 1f32;
        let c_type = if output == Elem::F16 { R_16F } else { R_32F };
        // SAFETY: the matrices lie within their memory (`HalfProduct::lengths`, checked by the caller), which outlives the
        // work, since freeing waits for the stream; factors are read before the call returns.
        let status = unsafe {
            (self.functions.gemm_ex)(
                self.handle,
                OP[usize::from(transpose_a)],
                OP[usize::from(transpose_b)],
                m as c_int,
                n as c_int,
                k as c_int,
                ptr::from_ref(&alpha).cast(),
                weights.pointer() as *const c_void,
                R_16F,
                lda as c_int,
                x.pointer() as *const c_void,
                R_16F,
                ldb as c_int,
                ptr::from_ref(&beta).cast(),
                y.pointer() as *mut c_void,
                c_type,
                ldc as c_int,
                COMPUTE_32F,
                DEFAULT_ALGORITHM,
            )
        };
        Ok(self.functions.check(format!("cublasGemmEx ({op:?})"), status)?)
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        if self.workspace.context().synchronize().is_ok() {
            // SAFETY: created in `open`, and no work of it is in flight.
            let _ = unsafe { (self.functions.destroy)(self.handle) };
        }
    }
}

/// The library in the folder of the compiler that is used, which goes with the same driver, unless the user names another.
fn beside_nvrtc() -> Option<Candidate> {
    if WANTED.given().is_some() {
        return None;
    }
    let folder = Nvrtc::get().ok()?.path().parent()?;
    find::newest_in(folder, WANTED.stem).map(Candidate::File)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_library_and_one_without_its_functions() {
        let Err(CublasError::Library { path, .. }) = Functions::open(Path::new("/no/libcublas.so.13")) else {
            panic!("there is no such file");
        };
        let e = CublasError::Library { path, reason: "it is not there".to_owned() }.to_string();
        assert!(e.starts_with("/no/libcublas.so.13 cannot be used as cuBLAS") && e.contains(VARIABLE), "{e}");
        let Err(CublasError::Library { reason, .. }) = Functions::open(Path::new("libc.so.6")) else {
            panic!("the C library multiplies no matrices");
        };
        assert!(reason.contains("cublasCreate_v2"), "{reason}");
    }

    #[test]
    fn a_missing_library_is_told_with_the_cure() {
        let e = CublasError::Missing { given: None }.to_string();
        assert!(e.contains("pip install nvidia-cublas") && e.contains(VARIABLE), "{e}");
        let e = CublasError::Missing { given: Some("/some/folder".into()) }.to_string();
        assert_eq!(e, "no libcublas at QP_CUBLAS=/some/folder");
        assert!(words(1).contains("update the driver"));
        assert_eq!(words(99), "status 99");
    }

    /// `C = op(A)·op(B) + beta·C` as the standard defines it: column-major.
    fn gemm(args: &Arguments, a: &[f32], b: &[f32], c: &mut [f32]) {
        let at =
            |transposed: bool, i: u32, j: u32, ld: u32| (if transposed { j + i * ld } else { i + j * ld }) as usize;
        for i in 0..args.m {
            for j in 0..args.n {
                let term = |p| a[at(args.transpose_a, i, p, args.lda)] * b[at(args.transpose_b, p, j, args.ldb)];
                let c = &mut c[at(false, i, j, args.ldc)];
                *c = (0..args.k).map(term).sum::<f32>() + args.beta * *c;
            }
        }
    }

    #[test]
    fn arguments_mean_what_the_loop_computes() {
        let on = Executor::interpreter();
        let blas = Blas::open(&on).unwrap();
        for (accumulate, stride) in [(false, 5), (true, 8)] {
            let op = HalfProduct { rows: 5, cols: 3, tokens: 4, stride, accumulate };
            let values = |n: usize| (0..n).map(|i| (i * 7 % 11) as f32 - 5.0).collect::<Vec<_>>();
            let (w, x) = (values(15), values(12));
            let mut expected = vec![0.5f32; 4 * stride as usize];
            let halves = |v: &[f32]| on.upload(&v.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>()).unwrap();
            let mut y = on.upload(&expected).unwrap();
            blas.launch(&op, &halves(&w), &halves(&x), &mut y).unwrap();
            let mut y16 = halves(&expected);
            blas.launch(&op, &halves(&w), &halves(&x), &mut y16).unwrap();
            gemm(&op.arguments(), &w, &x, &mut expected);
            assert_eq!(y.to_vec().unwrap(), expected);
            assert_eq!(y16.to_vec().unwrap(), expected.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let on = Executor::interpreter();
        let blas = Blas::open(&on).unwrap();
        let (w, x) = (on.zeroed(15).unwrap(), on.zeroed(12).unwrap());
        let op = HalfProduct { rows: 5, cols: 3, tokens: 4, stride: 5, accumulate: false };
        let short = blas.launch(&op, &w, &x, &mut on.zeroed::<f32>(19).unwrap()).unwrap_err().to_string();
        assert!(short.contains("does not fit buffers of [15, 12, 19] elements"), "{short}");
        let narrow = HalfProduct { stride: 4, ..op };
        assert!(blas.launch(&narrow, &w, &x, &mut on.zeroed::<f32>(20).unwrap()).is_err());
        assert!(blas.launch(&op, &w, &x, &mut on.zeroed::<i32>(20).unwrap()).is_err());
    }
}
