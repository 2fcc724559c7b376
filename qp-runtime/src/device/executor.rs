//! One interface to the GPU and to the interpreter.

use std::marker::PhantomData;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use qp_codegen::cuda::{self, Device, Target};
use qp_codegen::ir::{Kernel, ParamKind, interpret};
use rayon::prelude::*;

use super::Gpu;
use super::args::{Arg, Element, LaunchArgs, ParamDecl, check};
use super::driver::{self, Capture, Context, Function, GraphExec, Memory, Shape};
use super::error::DeviceError;
use super::guest::Lent;
use crate::jit;

/// Runs kernels, in the order they are launched. Cheap to clone: clones are the same executor.
#[derive(Clone)]
pub struct Executor(Backend);

#[derive(Clone)]
enum Backend {
    Interpreter(Arc<interpret::Options>, Target),
    Cuda(Arc<Context>),
}

impl Executor {
    /// The CPU, lane by lane: slow, and watchful.
    pub fn interpreter() -> Executor {
        Executor::interpreter_with(interpret::Options::default())
    }

    /// The interpreter with chosen options.
    pub fn interpreter_with(options: interpret::Options) -> Executor {
        Executor::interpreter_of(Target::Sm80, options)
    }

    /// The interpreter in the place of a GPU of `target`: it runs the kernels that are made for that.
    pub fn interpreter_of(target: Target, options: interpret::Options) -> Executor {
        Executor(Backend::Interpreter(Arc::new(options), target))
    }

    /// GPU `index` (from 0).
    ///
    /// # Errors
    /// No driver, no such GPU, or one that no target fits. NVRTC is looked for too, so that a missing one is told now.
    pub fn cuda(index: usize) -> Result<Executor, DeviceError> {
        let context = Context::open(index)?;
        jit::Nvrtc::get()?;
        Ok(Executor(Backend::Cuda(context)))
    }

    /// What kernels for it should be lowered for. The interpreter runs those of any target.
    pub fn target(&self) -> Target {
        match &self.0 {
            Backend::Interpreter(_, target) => *target,
            Backend::Cuda(context) => context.target,
        }
    }

    /// The GPU; `None` for the interpreter.
    pub fn gpu(&self) -> Option<&Gpu> {
        match &self.0 {
            Backend::Interpreter(..) => None,
            Backend::Cuda(context) => Some(&context.gpu),
        }
    }

    /// The device's size, for choosing launch shapes: a typical one of the target, corrected by what the driver says.
    pub fn device(&self) -> Device {
        let typical = self.target().device();
        match self.gpu() {
            None => typical,
            Some(gpu) => Device {
                sms: gpu.sms,
                shared_per_block: gpu.shared_per_block,
                bandwidth: if gpu.bandwidth > 0 { gpu.bandwidth as f64 } else { typical.bandwidth },
                clock: if gpu.clock > 0 { gpu.clock as f64 } else { typical.clock },
                ..typical
            },
        }
    }

    /// Free and total bytes of the GPU's memory; `None` for the interpreter.
    ///
    /// # Errors
    /// A failing driver.
    pub fn free_memory(&self) -> Result<Option<(usize, usize)>, DeviceError> {
        match &self.0 {
            Backend::Interpreter(..) => Ok(None),
            Backend::Cuda(context) => context.free_memory().map(Some),
        }
    }

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// A full GPU.
    pub fn zeroed<T: Element>(&self, len: usize) -> Result<Buffer<T>, DeviceError> {
        // Kernels index elements with signed numbers of 32 bits.
        if len > i32::MAX as usize {
            return Err(DeviceError::Buffer(format!(
                "a buffer of {len} elements has more than the 2^31 - 1 of an index"
            )));
        }
        let bytes = len * size_of::<T>();
        let raw = match &self.0 {
            Backend::Interpreter(..) => RawBuffer::Host(Arc::new(RwLock::new(vec![0; bytes]))),
            Backend::Cuda(context) => RawBuffer::Cuda(Arc::new(Memory::zeroed(context, bytes)?)),
        };
        Ok(Buffer { raw, len, element: PhantomData })
    }

    /// A buffer that holds a copy of `data`.
    ///
    /// # Errors
    /// A full GPU.
    pub fn upload<T: Element>(&self, data: &[T]) -> Result<Buffer<T>, DeviceError> {
        let mut buffer = self.zeroed(data.len())?;
        buffer.write(0, data)?;
        Ok(buffer)
    }

    /// A buffer of `len` elements that repeats `data` as often as that takes.
    ///
    /// # Errors
    /// No data, a full GPU.
    pub fn repeating<T: Element>(&self, data: &[T], len: usize) -> Result<Buffer<T>, DeviceError> {
        if data.is_empty() && len > 0 {
            return Err(DeviceError::Buffer("there is nothing to repeat".to_owned()));
        }
        let mut buffer = self.zeroed(len)?;
        let mut filled = data.len().min(len);
        buffer.write(0, &data[..filled])?;
        while filled < len {
            let more = filled.min(len - filled);
            buffer.copy_within(0, filled, more)?;
            filled += more;
        }
        Ok(buffer)
    }

    /// A buffer that holds a copy of another one, which lies on this executor.
    ///
    /// # Errors
    /// A full GPU, a buffer of another device.
    pub fn copy<T: Element>(&self, of: &Buffer<T>) -> Result<Buffer<T>, DeviceError> {
        let buffer = self.zeroed(of.len)?;
        match (&buffer.raw, &of.raw) {
            (RawBuffer::Host(to), RawBuffer::Host(from)) => write_lock(to).copy_from_slice(&read_lock(from)),
            (RawBuffer::Cuda(to), RawBuffer::Cuda(from)) if Arc::ptr_eq(to.context(), from.context()) => {
                to.copy_from(from)?;
            }
            (RawBuffer::Host(_) | RawBuffer::Cuda(_), _) => {
                return Err(DeviceError::Buffer("a buffer of another device cannot be copied".to_owned()));
            }
        }
        Ok(buffer)
    }

    /// A buffer of the elements whose little-endian bytes are `bytes`, wherever those lie (in a mapped file).
    ///
    /// # Errors
    /// A full GPU; bytes that are no whole number of elements.
    pub fn upload_bytes<T: Element>(&self, bytes: &[u8]) -> Result<Buffer<T>, DeviceError> {
        if !bytes.len().is_multiple_of(size_of::<T>()) {
            return Err(DeviceError::Buffer(format!("{} bytes are no whole number of elements", bytes.len())));
        }
        let buffer = self.zeroed(bytes.len() / size_of::<T>())?;
        match &buffer.raw {
            RawBuffer::Host(host) => write_lock(host).copy_from_slice(bytes),
            RawBuffer::Cuda(memory) => memory.write(0, bytes)?,
        }
        Ok(buffer)
    }

    /// Makes `kernel` ready to be launched with an `A`.
    ///
    /// # Errors
    /// Parameters that differ from `A`'s, an invalid kernel, one that does not compile or does not fit the GPU.
    pub fn load<A: LaunchArgs>(&self, kernel: Kernel) -> Result<Loaded, DeviceError> {
        check(&kernel.name, &kernel.params, A::PARAMS)?;
        self.load_unchecked(kernel)
    }

    /// [`Executor::load`] of many kernels, compiled in parallel: the struct of each is checked at its first launch.
    ///
    /// # Errors
    /// As [`Executor::load`], for the first that fails.
    pub fn load_all(&self, kernels: Vec<Kernel>) -> Result<Vec<Loaded>, DeviceError> {
        kernels.into_par_iter().map(|k| self.load_unchecked(k)).collect()
    }

    fn load_unchecked(&self, kernel: Kernel) -> Result<Loaded, DeviceError> {
        let invalid = |e: qp_codegen::ir::Problems, name: &str| DeviceError::Kernel {
            kernel: name.into(),
            reason: e.to_string(),
        };
        match &self.0 {
            Backend::Interpreter(options, _) => {
                let name = kernel.name.clone();
                let prepared = interpret::Prepared::new(kernel).map_err(|e| invalid(e, &name))?;
                Ok(Loaded(Arc::new(Code::Interpreter { prepared, options: options.clone() })))
            }
            Backend::Cuda(context) => {
                let checked = cuda::check(&kernel, context.target).map_err(|e| invalid(e, &kernel.name))?;
                let source = cuda::print(checked);
                let cubin = jit::compile(&source, &kernel.name, context.target.nvrtc_arch(), &jit::Options::default())?;
                let shape = Shape {
                    grid: kernel.grid,
                    threads: kernel.threads,
                    shared: shared_bytes(&kernel, &self.device()),
                    dependent: kernel.dependent_launch,
                };
                let function = Function::load(context, &cubin.bytes, &kernel.name, shape)?;
                Ok(Loaded(Arc::new(Code::Cuda { kernel, function, usage: cubin.usage })))
            }
        }
    }

    /// Runs a kernel; the GPU may still be at work when this returns.
    ///
    /// # Errors
    /// Arguments that do not fit the kernel, a trap of the interpreter, a failing driver.
    pub fn launch<A: LaunchArgs>(&self, kernel: &Loaded, args: A) -> Result<(), DeviceError> {
        check(kernel.name(), &kernel.kernel().params, A::PARAMS)?;
        let args = args.args();
        kernel.fits(&args)?;
        kernel.run(&args, None)
    }

    /// A way for `len` elements from the device to the host.
    ///
    /// # Errors
    /// No memory that the device can write to.
    pub fn mail<T: Element>(&self, len: usize) -> Result<Mail<T>, DeviceError> {
        let bytes = len * size_of::<T>();
        let raw = match &self.0 {
            Backend::Interpreter(..) => RawMail::Host(vec![0; bytes]),
            Backend::Cuda(context) => RawMail::Cuda(driver::Pinned::new(context, bytes)?),
        };
        Ok(Mail { raw, len, element: PhantomData })
    }

    /// Starts a [`Graph`].
    pub fn record(&self) -> Recorder {
        Recorder { executor: self.clone(), launches: Vec::new() }
    }

    /// Waits until all that was launched is done.
    ///
    /// # Errors
    /// What went wrong in a kernel on the GPU.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        match &self.0 {
            Backend::Interpreter(..) => Ok(()),
            Backend::Cuda(context) => context.synchronize(),
        }
    }

    /// Seconds that the device spends on what `work` launches.
    ///
    /// # Errors
    /// Those of `work`, or a failing driver.
    pub fn time(&self, work: impl FnOnce() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
        match &self.0 {
            Backend::Interpreter(..) => {
                let start = Instant::now();
                work()?;
                Ok(start.elapsed().as_secs_f64())
            }
            Backend::Cuda(context) => driver::time(context, work),
        }
    }

    /// The least of [`Executor::time`] of several rounds.
    ///
    /// # Errors
    /// Those of the work.
    pub fn time_best(&self, rounds: usize, work: impl Fn() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
        (0..rounds).try_fold(f64::INFINITY, |best, _| Ok(self.time(&work)?.min(best)))
    }
}

/// `len` elements in the memory of an executor.
pub struct Buffer<T> {
    raw: RawBuffer,
    len: usize,
    element: PhantomData<T>,
}

/// Bytes of shared memory that a block is given: what its kernel needs, and more where only that keeps blocks apart
/// ([`Kernel::apart`]). In a chain of kernels the hardware puts several blocks of a grid smaller than the GPU on one SM
/// while others idle. A grid that fills all SMs evenly gains by what is to spare: blocks of the next kernel begin there.
pub(super) fn shared_bytes(kernel: &Kernel, device: &Device) -> u32 {
    let (needed, grid) = (kernel.shared_bytes(), kernel.grid[0] * kernel.grid[1]);
    if !kernel.apart || grid.is_multiple_of(device.sms) {
        return needed;
    }
    // One more than its share would not fit an SM, which adds 1 KiB to each.
    let more = grid.div_ceil(device.sms) + 1;
    let too_much = (device.shared_per_sm / more + 1).saturating_sub(1024).next_multiple_of(16);
    needed.max(too_much.min(device.shared_per_block))
}

/// A buffer's memory, shared by the [`Buffer`] and the [`Graph`]s that use it.
#[derive(Clone)]
pub enum RawBuffer {
    /// Of the interpreter.
    Host(Arc<RwLock<Vec<u8>>>),
    /// Of a GPU.
    #[expect(private_interfaces, reason = "seen only by the executor")]
    Cuda(Arc<Memory>),
}

impl<T: Element> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Where it lies: on the GPU or, of the interpreter, in this process. It does not move.
    pub(super) fn address(&self) -> u64 {
        match &self.raw {
            RawBuffer::Host(host) => write_lock(host).as_mut_ptr() as u64,
            RawBuffer::Cuda(memory) => memory.pointer(),
        }
    }

    pub(super) fn raw(&self) -> &RawBuffer {
        &self.raw
    }

    fn range(&self, what: &str, at: usize, count: usize) -> Result<usize, DeviceError> {
        if at.checked_add(count).is_none_or(|end| end > self.len) {
            return Err(DeviceError::Buffer(format!("{what} {count} elements at {at} of a buffer of {}", self.len)));
        }
        Ok(at * size_of::<T>())
    }

    /// Copies `data` to elements `at..`, after all launches before it.
    ///
    /// # Errors
    /// Data that does not fit, a failing driver.
    pub fn write(&mut self, at: usize, data: &[T]) -> Result<(), DeviceError> {
        let at = self.range("writing", at, data.len())?;
        let bytes: &[u8] = bytemuck::cast_slice(data);
        match &self.raw {
            RawBuffer::Host(host) => write_lock(host)[at..at + bytes.len()].copy_from_slice(bytes),
            RawBuffer::Cuda(memory) => memory.write(at, bytes)?,
        }
        Ok(())
    }

    /// As [`Buffer::write`], of the elements whose little-endian bytes are `bytes`, wherever those lie.
    ///
    /// # Errors
    /// Data that does not fit or is no whole number of elements, a failing driver.
    pub fn write_bytes(&mut self, at: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        if !bytes.len().is_multiple_of(size_of::<T>()) {
            return Err(DeviceError::Buffer(format!("{} bytes are no whole number of elements", bytes.len())));
        }
        let at = self.range("writing", at, bytes.len() / size_of::<T>())?;
        match &self.raw {
            RawBuffer::Host(host) => write_lock(host)[at..at + bytes.len()].copy_from_slice(bytes),
            RawBuffer::Cuda(memory) => memory.write(at, bytes)?,
        }
        Ok(())
    }

    /// Copies elements `at..` to `out`, after all launches before it.
    ///
    /// # Errors
    /// A range beyond the end, what went wrong in a kernel on the GPU.
    pub fn read(&self, at: usize, out: &mut [T]) -> Result<(), DeviceError> {
        let at = self.range("reading", at, out.len())?;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
        match &self.raw {
            RawBuffer::Host(host) => bytes.copy_from_slice(&read_lock(host)[at..at + bytes.len()]),
            RawBuffer::Cuda(memory) => memory.read(at, bytes)?,
        }
        Ok(())
    }

    /// As [`Buffer::write`], but at once, past what was launched before: for a buffer that no launch in flight uses.
    ///
    /// # Errors
    /// As [`Buffer::write`].
    pub(super) fn write_beside(&mut self, at: usize, data: &[T]) -> Result<(), DeviceError> {
        match &self.raw {
            RawBuffer::Host(_) => self.write(at, data),
            RawBuffer::Cuda(memory) => {
                let at = self.range("writing", at, data.len())?;
                memory.write_beside(at, bytemuck::cast_slice(data))
            }
        }
    }

    /// As [`Buffer::read`], but at once, past what was launched before: for a buffer that no launch in flight uses.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub(super) fn read_beside(&self, at: usize, out: &mut [T]) -> Result<(), DeviceError> {
        match &self.raw {
            RawBuffer::Host(_) => self.read(at, out),
            RawBuffer::Cuda(memory) => {
                let at = self.range("reading", at, out.len())?;
                memory.read_beside(at, bytemuck::cast_slice_mut(out))
            }
        }
    }

    /// Copies `count` elements from `from..` to `to..`, after all launches before it; the two do not overlap.
    ///
    /// # Errors
    /// Ranges beyond the end or that overlap, a failing driver.
    pub fn copy_within(&mut self, from: usize, to: usize, count: usize) -> Result<(), DeviceError> {
        if from.abs_diff(to) < count && count > 0 && from != to {
            return Err(DeviceError::Buffer(format!("copying {count} elements from {from} to {to}, which overlap")));
        }
        let bytes = count * size_of::<T>();
        let (from, to) = (self.range("copying", from, count)?, self.range("copying to", to, count)?);
        match &self.raw {
            RawBuffer::Host(host) => write_lock(host).copy_within(from..from + bytes, to),
            RawBuffer::Cuda(memory) => memory.copy_within(from, to, bytes)?,
        }
        Ok(())
    }

    /// All elements.
    ///
    /// # Errors
    /// What went wrong in a kernel on the GPU.
    pub fn to_vec(&self) -> Result<Vec<T>, DeviceError> {
        let mut out = vec![T::zeroed(); self.len];
        self.read(0, &mut out)?;
        Ok(out)
    }
}

/// `len` elements on their way from an executor to the host, which can do other things meanwhile.
pub struct Mail<T> {
    raw: RawMail,
    len: usize,
    element: PhantomData<T>,
}

enum RawMail {
    Host(Vec<u8>),
    Cuda(driver::Pinned),
}

impl<T: Element> Mail<T> {
    /// Adds the first `count` elements of `from`, as they are after all launches so far, at place `at`.
    ///
    /// # Errors
    /// More elements than there are, a buffer of another executor, a failing driver.
    pub fn add(&mut self, at: usize, from: &Buffer<T>, count: usize) -> Result<(), DeviceError> {
        from.range("sending", 0, count)?;
        if at + count > self.len {
            return Err(DeviceError::Buffer(format!("sending {count} elements to {at} of {}", self.len)));
        }
        let (at, bytes) = (at * size_of::<T>(), count * size_of::<T>());
        match (&mut self.raw, &from.raw) {
            (RawMail::Host(to), RawBuffer::Host(from)) => {
                to[at..at + bytes].copy_from_slice(&read_lock(from)[..bytes]);
                Ok(())
            }
            (RawMail::Cuda(to), RawBuffer::Cuda(from)) => to.add(at, from, bytes),
            (RawMail::Host(_) | RawMail::Cuda(_), _) => {
                Err(DeviceError::Buffer("a buffer of another device cannot be sent".to_owned()))
            }
        }
    }

    /// Says that all has been added.
    ///
    /// # Errors
    /// A failing driver.
    pub fn send(&mut self) -> Result<(), DeviceError> {
        match &mut self.raw {
            RawMail::Host(_) => Ok(()),
            RawMail::Cuda(pinned) => pinned.send(),
        }
    }

    /// The elements, once those that were sent are there.
    ///
    /// # Errors
    /// What went wrong in a kernel on the GPU.
    pub fn open(&mut self) -> Result<Vec<T>, DeviceError> {
        let bytes = match &mut self.raw {
            RawMail::Host(bytes) => bytes,
            RawMail::Cuda(pinned) => pinned.wait()?,
        };
        let mut out = vec![T::zeroed(); self.len];
        bytemuck::cast_slice_mut(&mut out).copy_from_slice(bytes);
        Ok(out)
    }
}

fn read_lock(host: &RwLock<Vec<u8>>) -> RwLockReadGuard<'_, Vec<u8>> {
    host.read().unwrap_or_else(PoisonError::into_inner)
}

fn write_lock(host: &RwLock<Vec<u8>>) -> RwLockWriteGuard<'_, Vec<u8>> {
    host.write().unwrap_or_else(PoisonError::into_inner)
}

/// A kernel ready to be launched. Cheap to clone.
#[derive(Clone)]
pub struct Loaded(Arc<Code>);

enum Code {
    Interpreter { prepared: interpret::Prepared<'static>, options: Arc<interpret::Options> },
    Cuda { kernel: Kernel, function: Function, usage: Option<jit::Usage> },
}

impl Loaded {
    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.kernel().name
    }

    /// The kernel.
    pub fn kernel(&self) -> &Kernel {
        match &*self.0 {
            Code::Interpreter { prepared, .. } => prepared.kernel(),
            Code::Cuda { kernel, .. } => kernel,
        }
    }

    /// Registers and spills, as the compiler said; `None` on the interpreter.
    pub fn usage(&self) -> Option<jit::Usage> {
        match &*self.0 {
            Code::Interpreter { .. } => None,
            Code::Cuda { usage, .. } => *usage,
        }
    }

    /// Blocks that fit on one SM at once; `None` on the interpreter.
    ///
    /// # Errors
    /// A failing driver.
    pub fn resident_blocks(&self) -> Result<Option<u32>, DeviceError> {
        match &*self.0 {
            Code::Interpreter { .. } => Ok(None),
            Code::Cuda { function, .. } => function.resident_blocks().map(Some),
        }
    }

    /// Clusters that the whole GPU runs at once; `None` on the interpreter, and of a kernel without them.
    ///
    /// # Errors
    /// A failing driver.
    pub fn resident_clusters(&self) -> Result<Option<u32>, DeviceError> {
        match &*self.0 {
            Code::Cuda { function, kernel, .. } if kernel.cluster > 1 => function.resident_clusters().map(Some),
            Code::Cuda { .. } | Code::Interpreter { .. } => Ok(None),
        }
    }

    /// Checks that no buffer is shorter than what the kernel touches.
    fn fits(&self, args: &[Arg]) -> Result<(), DeviceError> {
        let kernel = self.kernel();
        for (i, arg) in args.iter().enumerate() {
            let bytes = match arg {
                Arg::Buffer(RawBuffer::Host(host)) => read_lock(host).len(),
                Arg::Buffer(RawBuffer::Cuda(memory)) => memory.bytes(),
                Arg::I32(_) | Arg::U32(_) | Arg::F32(_) => continue,
            };
            let least = kernel.least_bytes(i);
            if (bytes as u64) < least {
                let name = &kernel.params[i].name;
                let what = format!(
                    "kernel `{}` was passed {bytes} bytes for `{name}`, of which it touches {least}",
                    kernel.name
                );
                return Err(DeviceError::Buffer(what));
            }
        }
        Ok(())
    }

    /// Runs the first `blocks` columns of the grid on memory of others, in `stream` of theirs.
    ///
    /// # Safety
    /// The arguments must be what the parameters are, as long as those blocks need and alive until the stream has passed the
    /// launch; addresses are of the GPU or, on the interpreter, of this process.
    pub(super) unsafe fn launch_lent(&self, stream: u64, blocks: u32, args: &[Lent]) -> Result<(), DeviceError> {
        match &*self.0 {
            Code::Cuda { function, .. } => {
                let word = |arg: &Lent| match *arg {
                    Lent::Memory(address, _) => address,
                    Lent::I32(x) => u64::from(x.cast_unsigned()),
                };
                let mut words: Vec<u64> = args.iter().map(word).collect();
                // SAFETY: the caller's promise.
                unsafe { function.launch_in(stream as *mut _, blocks, &mut words) }
            }
            Code::Interpreter { prepared, options } => {
                let failed = |name: &str, reason: String| DeviceError::Kernel { kernel: name.into(), reason };
                let mut kernel = prepared.kernel().clone();
                kernel.grid[0] = blocks;
                // Fewer blocks need less than the whole grid.
                kernel.params.iter_mut().for_each(|p| p.len = None);
                let name = kernel.name.clone();
                let part = interpret::Prepared::new(kernel).map_err(|e| failed(&name, e.to_string()))?;
                let mut passed: Vec<interpret::Arg<'_>> = args
                    .iter()
                    .zip(&part.kernel().params)
                    .map(|(arg, param)| match (*arg, param.kind) {
                        (Lent::I32(x), _) => interpret::Arg::I32(x),
                        // SAFETY: the caller says that the memory is there.
                        (Lent::Memory(address, bytes), ParamKind::Buffer { writable: true, .. }) => unsafe {
                            interpret::Arg::Buffer(std::slice::from_raw_parts_mut(address as *mut u8, bytes))
                        },
                        // SAFETY: as above.
                        (Lent::Memory(address, bytes), _) => unsafe {
                            interpret::Arg::ReadOnly(std::slice::from_raw_parts(address as *const u8, bytes))
                        },
                    })
                    .collect();
                part.run(&mut passed, options).map_err(|trap| failed(&name, trap.to_string()))?;
                Ok(())
            }
        }
    }

    fn run(&self, args: &[Arg], into: Option<&Capture>) -> Result<(), DeviceError> {
        match &*self.0 {
            Code::Interpreter { prepared, options } => interpret(prepared, options, args),
            Code::Cuda { kernel, function, .. } => launch(kernel, function, args, into),
        }
    }
}

/// What an argument became for the interpreter: its lock, held while the kernel runs.
enum Held<'a> {
    Read(RwLockReadGuard<'a, Vec<u8>>),
    Write(RwLockWriteGuard<'a, Vec<u8>>),
    Scalar(&'a Arg),
}

fn wrong_executor(kernel: &Kernel) -> DeviceError {
    DeviceError::Buffer(format!("kernel `{}` was passed a buffer of another device", kernel.name))
}

fn interpret(
    prepared: &interpret::Prepared<'_>,
    options: &interpret::Options,
    args: &[Arg],
) -> Result<(), DeviceError> {
    let kernel = prepared.kernel();
    let mut held = Vec::with_capacity(args.len());
    for (arg, param) in args.iter().zip(&kernel.params) {
        held.push(match (arg, param.kind) {
            (Arg::Buffer(RawBuffer::Host(host)), ParamKind::Buffer { writable: true, .. }) => {
                Held::Write(write_lock(host))
            }
            (Arg::Buffer(RawBuffer::Host(host)), _) => Held::Read(read_lock(host)),
            (Arg::Buffer(RawBuffer::Cuda(_)), _) => return Err(wrong_executor(kernel)),
            (Arg::I32(_) | Arg::U32(_) | Arg::F32(_), _) => Held::Scalar(arg),
        });
    }
    let mut passed: Vec<interpret::Arg<'_>> = held
        .iter_mut()
        .map(|h| match h {
            Held::Read(guard) => interpret::Arg::ReadOnly(guard),
            Held::Write(guard) => interpret::Arg::Buffer(guard),
            Held::Scalar(Arg::I32(x)) => interpret::Arg::I32(*x),
            Held::Scalar(Arg::U32(x)) => interpret::Arg::U32(*x),
            Held::Scalar(Arg::F32(x)) => interpret::Arg::F32(*x),
            Held::Scalar(Arg::Buffer(_)) => unreachable!("buffers are held by their locks"),
        })
        .collect();
    prepared
        .run(&mut passed, options)
        .map_err(|trap| DeviceError::Kernel { kernel: kernel.name.clone(), reason: trap.to_string() })?;
    Ok(())
}

fn launch(kernel: &Kernel, function: &Function, args: &[Arg], into: Option<&Capture>) -> Result<(), DeviceError> {
    let mut words = Vec::with_capacity(args.len());
    for arg in args {
        words.push(match arg {
            Arg::Buffer(RawBuffer::Cuda(memory)) if Arc::ptr_eq(memory.context(), function.context()) => {
                memory.pointer()
            }
            Arg::Buffer(_) => return Err(wrong_executor(kernel)),
            Arg::I32(x) => u64::from(x.cast_unsigned()),
            Arg::U32(x) => u64::from(*x),
            Arg::F32(x) => u64::from(x.to_bits()),
        });
    }
    // SAFETY: the caller has compared the arguments' kinds with the parameters. Freeing memory waits for the stream,
    // so it outlives the launch.
    unsafe { function.launch(&mut words, into) }
}

/// Collects launches for a [`Graph`].
pub struct Recorder {
    executor: Executor,
    launches: Vec<(Loaded, Vec<Arg>)>,
}

impl Recorder {
    /// Adds a launch. Nothing runs yet; scalars keep the value given here.
    ///
    /// # Errors
    /// Arguments that do not fit the kernel.
    pub fn launch<A: LaunchArgs>(&mut self, kernel: &Loaded, args: A) -> Result<(), DeviceError> {
        let params: &[ParamDecl] = A::PARAMS;
        check(kernel.name(), &kernel.kernel().params, params)?;
        let args = args.args();
        kernel.fits(&args)?;
        self.launches.push((kernel.clone(), args));
        Ok(())
    }

    /// The finished graph, which keeps its kernels and buffers alive.
    ///
    /// # Errors
    /// A failing driver.
    pub fn finish(self) -> Result<Graph, DeviceError> {
        let exec = match &self.executor.0 {
            Backend::Interpreter(..) => None,
            Backend::Cuda(context) => Some(GraphExec::capture(context, |to| {
                self.launches.iter().try_for_each(|(k, args)| k.run(args, Some(to)))
            })?),
        };
        Ok(Graph { exec, launches: self.launches })
    }
}

/// A sequence of launches that is replayed as one.
pub struct Graph {
    /// Before the launches: it must go first.
    exec: Option<GraphExec>,
    launches: Vec<(Loaded, Vec<Arg>)>,
}

impl Graph {
    /// Runs all launches, in order; the GPU may still be at work when this returns.
    ///
    /// # Errors
    /// A trap of the interpreter, a failing driver.
    pub fn launch(&self) -> Result<(), DeviceError> {
        match &self.exec {
            Some(exec) => exec.launch(),
            None => self.launches.iter().try_for_each(|(k, args)| k.run(args, None)),
        }
    }

    /// The kernels, in order.
    pub fn kernels(&self) -> impl Iterator<Item = &Loaded> {
        self.launches.iter().map(|l| &l.0)
    }
}
