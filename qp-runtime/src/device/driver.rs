//! The CUDA driver: the few calls we make, each with an error that says what it was about.
//!
//! cudarc opens `libcuda` and looks functions up at their first use, and panics where one is missing. So [`probe`]
//! asks for the library and for its version before anything else; all functions used here exist since CUDA 11.8.

use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{result, sys};
use result::DriverError;
use sys::CUdevice_attribute_enum as Attribute;
use sys::CUfunction_attribute_enum as FunctionAttribute;

use qp_codegen::cuda::Target;

use super::error::DeviceError;

/// CUDA 11.8 brought `cuLaunchKernelEx`.
const OLDEST: i32 = 11_080;
/// Before CUDA 12.3, capturing a stream with programmatic dependent launches fails.
const DEPENDENT_CAPTURE: i32 = 12_030;

/// One GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Number, from 0.
    pub index: usize,
    /// Marketing name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// What kernels for it are compiled for; `None` if it is too old (or too new) for every target.
    pub target: Option<Target>,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of shared memory that one block may use.
    pub shared_per_block: u32,
    /// Peak memory bandwidth, bytes a second, by the memory's clock and width; 0 if the driver does not say.
    pub bandwidth: u64,
    /// Highest clock of the SMs, Hz; 0 if the driver does not say.
    pub clock: u64,
}

fn fail(call: impl Into<String>) -> impl FnOnce(DriverError) -> DeviceError {
    let call = call.into();
    move |e| DeviceError::Driver { call, reason: words(e) }
}

fn words(e: DriverError) -> String {
    let text = |r: Result<&std::ffi::CStr, DriverError>| r.map(|s| s.to_string_lossy().into_owned()).ok();
    match (text(e.error_name()), text(e.error_string())) {
        (Some(name), Some(string)) => format!("{name} ({string})"),
        (Some(name), None) => name,
        (None, _) => format!("error {}", e.0 as i32),
    }
}

/// Opens and starts the driver, giving the CUDA version that it supports (`12040` for 12.4).
///
/// # Errors
/// No driver, one that is too old, or one without a GPU.
pub(super) fn probe() -> Result<i32, DeviceError> {
    /// A version, or the words of the driver for why there is none.
    enum Found {
        Nothing,
        Started(i32),
        Failed(String),
    }
    static FOUND: OnceLock<Found> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: opens the library; its initialisers are sound. `cuDriverGetVersion` needs no initialisation.
        unsafe {
            if !sys::is_culib_present() {
                return Found::Nothing;
            }
            let mut version = 0;
            if let Err(e) = sys::cuDriverGetVersion(&mut version).result() {
                return Found::Failed(words(e));
            }
            if version < OLDEST {
                return Found::Started(version);
            }
            match result::init() {
                Ok(()) => Found::Started(version),
                Err(e) => Found::Failed(words(e)),
            }
        }
    });
    match found {
        Found::Nothing => Err(DeviceError::NoDriver),
        Found::Started(v) if *v < OLDEST => Err(DeviceError::OldDriver { found: version_pair(*v) }),
        Found::Started(v) => Ok(*v),
        Found::Failed(reason) => Err(DeviceError::NoGpu { reason: reason.clone() }),
    }
}

/// `12040` → (12, 4).
pub(super) fn version_pair(version: i32) -> (u32, u32) {
    (version as u32 / 1000, version as u32 % 1000 / 10)
}

/// The GPUs of this machine.
///
/// # Errors
/// As [`probe`].
pub(super) fn gpus() -> Result<Vec<Gpu>, DeviceError> {
    probe()?;
    let count = result::device::get_count().map_err(fail("cuDeviceGetCount"))?;
    (0..count).map(|i| gpu(i as usize)).collect()
}

fn gpu(index: usize) -> Result<Gpu, DeviceError> {
    let about = |call: &str| fail(format!("{call} (GPU {index})"));
    let device = result::device::get(index as i32).map_err(about("cuDeviceGet"))?;
    let name = result::device::get_name(device).map_err(about("cuDeviceGetName"))?;
    // SAFETY: the device was given by the driver.
    let get = |a| {
        unsafe { result::device::get_attribute(device, a) }.map_err(about("cuDeviceGetAttribute")).map(|v| v as u32)
    };
    let capability = (
        get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let kilohertz = get(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0);
    let bits = get(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0);
    Ok(Gpu {
        index,
        name,
        capability,
        target: Target::of_capability(capability.0, capability.1),
        sms: get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.map_err(about("cuDeviceTotalMem"))? as u64,
        shared_per_block: get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        // Both edges of the clock move data.
        bandwidth: u64::from(kilohertz) * 1000 * 2 * u64::from(bits) / 8,
        clock: u64::from(get(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE).unwrap_or(0)) * 1000,
    })
}

/// The primary context of a GPU and the one stream that all our work goes through, in order, but for a few copies beside it.
pub(super) struct Context {
    pub gpu: Gpu,
    pub target: Target,
    pub driver: i32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// For copies that need not wait for `stream`.
    beside: sys::CUstream,
    staging: Mutex<Staging>,
}

// SAFETY: the driver's objects may be used from any thread; each use binds the context first.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub fn open(index: usize) -> Result<Arc<Context>, DeviceError> {
        let driver = probe()?;
        let count = result::device::get_count().map_err(fail("cuDeviceGetCount"))? as usize;
        if count == 0 {
            return Err(DeviceError::NoGpu { reason: "it lists none".into() });
        }
        if index >= count {
            return Err(DeviceError::NoSuchGpu { index, count });
        }
        let gpu = gpu(index)?;
        let target = gpu
            .target
            .ok_or_else(|| DeviceError::UnsupportedGpu { name: gpu.name.clone(), capability: gpu.capability })?;
        let device = result::device::get(index as i32).map_err(fail("cuDeviceGet"))?;
        // SAFETY: the device was given by the driver; what is retained here is released in `drop`.
        unsafe {
            let context = result::primary_ctx::retain(device).map_err(fail(format!("opening {}", gpu.name)))?;
            let stream = || result::stream::create(result::stream::StreamKind::NonBlocking);
            let opened = result::ctx::set_current(context).and_then(|()| Ok((stream()?, stream()?)));
            match opened {
                Ok((stream, beside)) => {
                    let staging = Mutex::default();
                    Ok(Arc::new(Context { gpu, target, driver, device, context, stream, beside, staging }))
                }
                Err(e) => {
                    let _ = result::primary_ctx::release(device);
                    Err(fail("cuStreamCreate")(e))
                }
            }
        }
    }

    /// Makes the context that of this thread.
    pub fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(fail("cuCtxSetCurrent"))
    }

    /// Waits for all work of the stream.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(fail("waiting for the GPU"))
    }

    /// Free and total bytes of memory.
    pub fn free_memory(&self) -> Result<(usize, usize), DeviceError> {
        self.bind()?;
        result::mem_get_info().map_err(fail("cuMemGetInfo"))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            // SAFETY: nothing else holds the stream: memory, modules and graphs keep the context alive.
            unsafe {
                let _ = result::stream::destroy(self.stream);
                let _ = result::stream::destroy(self.beside);
                self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).free();
                let _ = result::primary_ctx::release(self.device);
            }
        }
    }
}

/// Pinned host memory that large copies to the GPU pass through: several threads fill one half while the GPU reads the
/// other. The driver's own staging of pageable memory is one thread's.
#[derive(Default)]
enum Staging {
    /// Not needed so far.
    #[default]
    Unused,
    /// There is no pinned memory to be had.
    Refused,
    /// Two halves, each with an event that is over when the GPU has read it, and the half that is next.
    Ready([(*mut u8, sys::CUevent); 2], usize),
}

// SAFETY: the pointers are to memory and events of the driver, which are not bound to a thread; they are used under a lock.
unsafe impl Send for Staging {}

/// Bytes of each half of the pinned memory.
const STAGED: usize = 32 << 20;
/// Copies of fewer bytes are left to the driver.
const LARGE: usize = 4 << 20;
/// Threads that fill a half.
const FILLERS: usize = 4;

impl Staging {
    /// The halves, allocated when first asked for in the context that is bound to this thread.
    fn halves(&mut self) -> Option<(&[(*mut u8, sys::CUevent); 2], &mut usize)> {
        if let Staging::Unused = self {
            *self = Self::allocate().map_or(Staging::Refused, |halves| Staging::Ready(halves, 0));
        }
        match self {
            Staging::Ready(halves, next) => Some((halves, next)),
            Staging::Unused | Staging::Refused => None,
        }
    }

    fn allocate() -> Option<[(*mut u8, sys::CUevent); 2]> {
        let half = || {
            // SAFETY: freed in `free`, or here.
            let memory = unsafe { result::malloc_host(STAGED, 0) }.ok()?.cast::<u8>();
            match result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING) {
                Ok(event) => Some((memory, event)),
                Err(_) => {
                    // SAFETY: just allocated, and in no use.
                    let _ = unsafe { result::free_host(memory.cast()) };
                    None
                }
            }
        };
        let first = half()?;
        let Some(second) = half() else {
            Staging::Ready([first, first], 0).free_half(0);
            return None;
        };
        Some([first, second])
    }

    fn free_half(&mut self, i: usize) {
        if let Staging::Ready(halves, _) = self {
            // SAFETY: allocated in `allocate`; the caller says that nothing is in flight.
            unsafe {
                let _ = result::event::destroy(halves[i].1);
                let _ = result::free_host(halves[i].0.cast());
            }
        }
    }

    /// Frees the memory, of which no copy may be in flight. The context is bound to this thread.
    fn free(&mut self) {
        self.free_half(0);
        self.free_half(1);
        *self = Staging::Refused;
    }
}

/// Copies `from` to `to`, of equal length, by several threads.
fn copy_in_parallel(from: &[u8], to: &mut [u8]) {
    let part = from.len().div_ceil(FILLERS).max(1);
    // Not the threads of a pool: one that waits here, a lock in its hands, might be given work that wants the same lock.
    std::thread::scope(|scope| {
        for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}

/// Memory of a GPU.
pub(super) struct Memory {
    context: Arc<Context>,
    pointer: sys::CUdeviceptr,
    bytes: usize,
}

impl Memory {
    /// `bytes` zeros.
    pub fn zeroed(context: &Arc<Context>, bytes: usize) -> Result<Memory, DeviceError> {
        context.bind()?;
        let about = || fail(format!("allocating {bytes} bytes on {}", context.gpu.name));
        // SAFETY: the pointer is freed in `drop`; the fill is within it.
        unsafe {
            let pointer = result::malloc_sync(bytes.max(16)).map_err(about())?;
            let memory = Memory { context: context.clone(), pointer, bytes };
            result::memset_d8_async(pointer, 0, bytes.max(16), context.stream).map_err(about())?;
            Ok(memory)
        }
    }

    /// Bytes that were asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `data` to `offset` (bytes). The data may be reused at once.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), DeviceError> {
        assert!(offset + data.len() <= self.bytes, "a write within the buffer");
        if data.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        if data.len() >= LARGE {
            let mut staging = self.context.staging.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((halves, next)) = staging.halves() {
                return self.write_through(halves, next, offset, data).map_err(fail("copying to the GPU"));
            }
        }
        // SAFETY: within the allocation; pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(self.pointer + offset as u64, data, self.context.stream) }
            .map_err(fail("copying to the GPU"))
    }

    /// Copies `data`, which fits, through the pinned `halves`.
    fn write_through(
        &self,
        halves: &[(*mut u8, sys::CUevent); 2],
        next: &mut usize,
        offset: usize,
        data: &[u8],
    ) -> Result<(), DriverError> {
        for (i, part) in data.chunks(STAGED).enumerate() {
            let (memory, event) = halves[*next];
            *next = 1 - *next;
            // SAFETY: the half has `STAGED` bytes, which nobody else touches: the GPU has read them when the event is over, and
            // the caller holds the lock.
            unsafe {
                result::event::synchronize(event)?;
                let half = std::slice::from_raw_parts_mut(memory, part.len());
                copy_in_parallel(part, half);
                result::memcpy_htod_async(self.pointer + (offset + i * STAGED) as u64, half, self.context.stream)?;
                result::event::record(event, self.context.stream)?;
            }
        }
        Ok(())
    }

    /// Copies from `offset` (bytes) after all work before it.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> Result<(), DeviceError> {
        assert!(offset + data.len() <= self.bytes, "a read within the buffer");
        if data.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        // SAFETY: within the allocation; the stream is waited for before `data` is used.
        unsafe { result::memcpy_dtoh_async(data, self.pointer + offset as u64, self.context.stream) }
            .map_err(fail("copying from the GPU"))?;
        self.context.synchronize()
    }

    /// Copies `data` to `offset` (bytes) at once, whatever the stream does: what uses the memory there, the zeros that it began
    /// with included, must be over.
    pub fn write_beside(&self, offset: usize, data: &[u8]) -> Result<(), DeviceError> {
        assert!(offset + data.len() <= self.bytes, "a write within the buffer");
        if data.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        let beside = self.context.beside;
        // SAFETY: within the allocation; the copy is over before the call returns.
        unsafe {
            result::memcpy_htod_async(self.pointer + offset as u64, data, beside)
                .and_then(|()| result::stream::synchronize(beside))
        }
        .map_err(fail("copying to the GPU"))
    }

    /// Copies from `offset` (bytes) at once, whatever the stream does: what writes the memory there must be over.
    pub fn read_beside(&self, offset: usize, data: &mut [u8]) -> Result<(), DeviceError> {
        assert!(offset + data.len() <= self.bytes, "a read within the buffer");
        if data.is_empty() {
            return Ok(());
        }
        self.context.bind()?;
        let beside = self.context.beside;
        // SAFETY: within the allocation; the copy is over before the call returns.
        unsafe {
            result::memcpy_dtoh_async(data, self.pointer + offset as u64, beside)
                .and_then(|()| result::stream::synchronize(beside))
        }
        .map_err(fail("copying from the GPU"))
    }

    /// Copies all of `from`, of the same context and as long.
    pub fn copy_from(&self, from: &Memory) -> Result<(), DeviceError> {
        assert_eq!(self.bytes, from.bytes, "buffers of one length");
        self.context.bind()?;
        // SAFETY: both allocations have these bytes; freeing waits for the stream.
        unsafe { result::memcpy_dtod_async(self.pointer, from.pointer, self.bytes, self.context.stream) }
            .map_err(fail("copying within the GPU"))
    }

    /// Copies `bytes` from one offset to another; the two ranges do not overlap, or are one.
    pub fn copy_within(&self, from: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        assert!(from.max(to) + bytes <= self.bytes, "a copy within the buffer");
        if from == to || bytes == 0 {
            return Ok(());
        }
        self.context.bind()?;
        let at = |offset: usize| self.pointer + offset as u64;
        // SAFETY: both ranges lie within the allocation and apart.
        unsafe { result::memcpy_dtod_async(at(to), at(from), bytes, self.context.stream) }
            .map_err(fail("copying within the GPU"))
    }

    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

/// Memory of the host that a GPU writes to while the host does other things.
pub(super) struct Pinned {
    context: Arc<Context>,
    memory: *mut u8,
    bytes: usize,
    /// Over when all that was sent is there.
    event: sys::CUevent,
}

// SAFETY: the memory is the driver's and not bound to a thread; it is used through `&mut`.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` bytes.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Pinned, DeviceError> {
        context.bind()?;
        // SAFETY: memory and event are freed in `drop`.
        unsafe {
            let event = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING);
            let event = event.map_err(fail("cuEventCreate"))?;
            match result::malloc_host(bytes.max(1), 0) {
                Ok(memory) => {
                    let memory = memory.cast::<u8>();
                    memory.write_bytes(0, bytes.max(1));
                    Ok(Pinned { context: context.clone(), memory, bytes, event })
                }
                Err(e) => {
                    let _ = result::event::destroy(event);
                    Err(fail("cuMemHostAlloc")(e))
                }
            }
        }
    }

    /// Copies the first `bytes` of `from` to `at`, after all work before it.
    pub fn add(&mut self, at: usize, from: &Memory, bytes: usize) -> Result<(), DeviceError> {
        assert!(at + bytes <= self.bytes && bytes <= from.bytes, "a copy within both");
        self.context.bind()?;
        // SAFETY: within both allocations; the host reads the memory only after `wait`.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.memory.add(at), bytes);
            result::memcpy_dtoh_async(to, from.pointer, self.context.stream)
        }
        .map_err(fail("copying from the GPU"))
    }

    /// Says that all has been added.
    pub fn send(&mut self) -> Result<(), DeviceError> {
        self.context.bind()?;
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(self.event, self.context.stream) }.map_err(fail("cuEventRecord"))
    }

    /// The bytes, once all is there.
    pub fn wait(&mut self) -> Result<&[u8], DeviceError> {
        self.context.bind()?;
        // SAFETY: the event is alive; after it no copy to the memory is in flight.
        unsafe {
            result::event::synchronize(self.event).map_err(fail("waiting for the GPU"))?;
            Ok(std::slice::from_raw_parts(self.memory, self.bytes))
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.synchronize().is_ok() {
            // SAFETY: allocated in `new`, and no copy is in flight.
            unsafe {
                let _ = result::event::destroy(self.event);
                let _ = result::free_host(self.memory.cast());
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.context.synchronize().is_ok() {
            // SAFETY: allocated by `zeroed`, and no work that uses it is in flight.
            let _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

/// Grid, block and attributes of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub grid: [u32; 2],
    pub threads: u32,
    pub shared: u32,
    pub dependent: bool,
}

/// A loaded kernel.
pub(super) struct Function {
    context: Arc<Context>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    shape: Shape,
    name: String,
}

// SAFETY: handles of the driver, usable from any thread once the context is bound.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub fn load(context: &Arc<Context>, cubin: &[u8], name: &str, mut shape: Shape) -> Result<Function, DeviceError> {
        let allowed = context.gpu.shared_per_block;
        if shape.shared > allowed {
            return Err(DeviceError::SharedMemory { kernel: name.into(), needs: shape.shared, allowed });
        }
        shape.dependent &= context.target.has_dependent_launch() && context.driver >= DEPENDENT_CAPTURE;
        context.bind()?;
        let about = || fail(format!("loading kernel `{name}`"));
        let symbol = CString::new(name)
            .map_err(|_| DeviceError::Kernel { kernel: name.into(), reason: "a NUL in its name".into() })?;
        // SAFETY: the image is a whole cubin (checksummed or fresh from the compiler); the module is unloaded in `drop`.
        unsafe {
            let module = result::module::load_data(cubin.as_ptr().cast()).map_err(about())?;
            let function = match result::module::get_function(module, symbol) {
                Ok(f) => f,
                Err(e) => {
                    let _ = result::module::unload(module);
                    return Err(about()(e));
                }
            };
            let this = Function { context: context.clone(), module, function, shape, name: name.into() };
            if shape.shared > 48 << 10 {
                let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                result::function::set_function_attribute(function, attribute, shape.shared as i32).map_err(about())?;
            }
            Ok(this)
        }
    }

    /// Blocks that fit on one SM at once.
    pub fn resident_blocks(&self) -> Result<u32, DeviceError> {
        self.context.bind()?;
        // SAFETY: the function is loaded.
        unsafe {
            result::occupancy::max_active_block_per_multiprocessor(
                self.function,
                self.shape.threads as i32,
                self.shape.shared as usize,
            )
        }
        .map(|n| n as u32)
        .map_err(fail(format!("occupancy of kernel `{}`", self.name)))
    }

    /// Clusters that the whole GPU runs at once, of a kernel that is compiled with them.
    pub fn resident_clusters(&self) -> Result<u32, DeviceError> {
        self.context.bind()?;
        let (mut count, config) = (0, self.config(self.context.stream));
        // SAFETY: the function is loaded; count and config outlive the call.
        unsafe { sys::cuOccupancyMaxActiveClusters(&mut count, self.function, &config) }
            .result()
            .map_err(fail(format!("occupancy of kernel `{}`", self.name)))?;
        Ok(count as u32)
    }

    /// A launch without attributes.
    fn config(&self, stream: sys::CUstream) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.shape.grid[0],
            gridDimY: self.shape.grid[1],
            gridDimZ: 1,
            blockDimX: self.shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shape.shared,
            hStream: stream,
            attrs: std::ptr::null_mut(),
            numAttrs: 0,
        }
    }

    /// Puts a launch into the context's stream, or into a graph. Each word is one parameter: an address, or a scalar
    /// in its low 4 bytes.
    ///
    /// # Safety
    /// The words must be what the kernel's parameters are, and the memory alive until the stream has run it.
    pub unsafe fn launch(&self, words: &mut [u64], into: Option<&Capture>) -> Result<(), DeviceError> {
        let stream = into.map_or(self.context.stream, |c| c.0);
        // SAFETY: the caller's promise.
        unsafe { self.launch_in(stream, self.shape.grid[0], words) }
    }

    /// As [`Function::launch`], into a stream of the context that is not ours, with the first `columns` columns of the grid.
    ///
    /// # Safety
    /// As [`Function::launch`]; and `stream` must be a stream of the context.
    pub unsafe fn launch_in(&self, stream: sys::CUstream, columns: u32, words: &mut [u64]) -> Result<(), DeviceError> {
        self.context.bind()?;
        let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        // SAFETY: an attribute is plain data; zero is valid.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            attrs: &mut attribute,
            numAttrs: self.shape.dependent.into(),
            gridDimX: columns,
            ..self.config(stream)
        };
        // SAFETY: the caller vouches for the parameters; config and attribute outlive the call.
        unsafe { sys::cuLaunchKernelEx(&config, self.function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(fail(format!("launching kernel `{}`", self.name)))
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        if self.context.synchronize().is_ok() {
            // SAFETY: loaded by `load`, and no launch is in flight.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// A stream that records a graph: one of its own, so that other threads may go on using the context's.
pub(super) struct Capture(sys::CUstream);

impl Drop for Capture {
    fn drop(&mut self) {
        // SAFETY: created in `GraphExec::capture`, with its context bound to this thread.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// A graph of launches, ready to be replayed.
pub(super) struct GraphExec {
    context: Arc<Context>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

// SAFETY: used through `&mut` or under the executor's order only; handles are not bound to a thread.
unsafe impl Send for GraphExec {}

impl GraphExec {
    /// Captures what `launches` puts into the graph.
    pub fn capture(
        context: &Arc<Context>,
        launches: impl FnOnce(&Capture) -> Result<(), DeviceError>,
    ) -> Result<GraphExec, DeviceError> {
        context.bind()?;
        let capture =
            Capture(result::stream::create(result::stream::StreamKind::NonBlocking).map_err(fail("cuStreamCreate"))?);
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive; graph and exec are destroyed in `drop`.
        unsafe {
            result::stream::begin_capture(capture.0, mode).map_err(fail("cuStreamBeginCapture"))?;
            let launched = launches(&capture);
            let captured = result::stream::end_capture(capture.0).map_err(fail("cuStreamEndCapture"));
            let owned = captured.map(|graph| GraphExec { context: context.clone(), graph, exec: std::ptr::null_mut() });
            launched?;
            let mut this = owned?;
            this.exec = result::graph::instantiate(this.graph, sys::CUgraphInstantiate_flags(0))
                .map_err(fail("cuGraphInstantiateWithFlags"))?;
            result::graph::upload(this.exec, context.stream).map_err(fail("cuGraphUpload"))?;
            Ok(this)
        }
    }

    /// Puts the whole graph into the stream.
    pub fn launch(&self) -> Result<(), DeviceError> {
        self.context.bind()?;
        // SAFETY: instantiated in `capture`.
        unsafe { result::graph::launch(self.exec, self.context.stream) }.map_err(fail("cuGraphLaunch"))
    }
}

impl Drop for GraphExec {
    fn drop(&mut self) {
        if self.context.synchronize().is_ok() {
            // SAFETY: made in `capture`, and not in flight.
            unsafe {
                if !self.exec.is_null() {
                    let _ = result::graph::exec_destroy(self.exec);
                }
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}

/// Seconds that the GPU spends on what `work` puts into the stream.
pub(super) fn time(context: &Arc<Context>, work: impl FnOnce() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
    struct Event(sys::CUevent);
    impl Drop for Event {
        fn drop(&mut self) {
            // SAFETY: created below, destroyed once.
            let _ = unsafe { result::event::destroy(self.0) };
        }
    }
    context.bind()?;
    let event =
        || result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT).map(Event).map_err(fail("cuEventCreate"));
    let (start, end) = (event()?, event()?);
    // SAFETY: events and stream are alive.
    unsafe {
        result::event::record(start.0, context.stream).map_err(fail("cuEventRecord"))?;
        work()?;
        result::event::record(end.0, context.stream).map_err(fail("cuEventRecord"))?;
        result::event::synchronize(end.0).map_err(fail("waiting for the GPU"))?;
        let ms = result::event::elapsed(start.0, end.0).map_err(fail("cuEventElapsedTime"))?;
        Ok(f64::from(ms) / 1e3)
    }
}
