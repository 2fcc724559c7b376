//! What can go wrong between a kernel and a device.

use crate::jit::JitError;
use crate::jit::launches::UnknownChoice;

use super::args::Mismatch;

/// Why a device cannot be opened or a kernel not run.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// `libcuda` cannot be opened.
    #[error("no CUDA driver (libcuda.so.1) was found: install NVIDIA's driver, or run on the CPU")]
    NoDriver,
    /// A driver that lacks functions we need.
    #[error("the CUDA driver supports CUDA {}.{}, but 11.8 or later is needed: update NVIDIA's driver", found.0, found.1)]
    OldDriver {
        /// Major and minor version of CUDA that it supports.
        found: (u32, u32),
    },
    /// The driver stands but offers no GPU.
    #[error("the CUDA driver is there but no GPU: {reason}")]
    NoGpu {
        /// The driver's words.
        reason: String,
    },
    /// No GPU of that number.
    #[error("there is no GPU {index}; this machine has {count} (numbered from 0)")]
    NoSuchGpu {
        /// Asked for.
        index: usize,
        /// GPUs present.
        count: usize,
    },
    /// A GPU that no target fits.
    #[error("{name} has compute capability {}.{}; kernels are generated for 8.0 to 12.x (sm_80 to sm_120)", capability.0, capability.1)]
    UnsupportedGpu {
        /// Marketing name.
        name: String,
        /// Major and minor.
        capability: (u32, u32),
    },
    /// A call of the driver failed.
    #[error("{call}: {reason}{}", hint(reason))]
    Driver {
        /// The function, and what it was about.
        call: String,
        /// The driver's words.
        reason: String,
    },
    /// No machine code.
    #[error(transparent)]
    Jit(#[from] JitError),
    /// A kernel's parameters are not those of the struct that launches it.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// A kernel that the validator or the interpreter refuses.
    #[error("kernel `{kernel}`: {reason}")]
    Kernel {
        /// Its name.
        kernel: String,
        /// What is wrong.
        reason: String,
    },
    /// A wish about launches that is none.
    #[error(transparent)]
    Launches(#[from] UnknownChoice),
    /// More shared memory than a block of this GPU may have.
    #[error("kernel `{kernel}` needs {needs} bytes of shared memory a block; this GPU allows {allowed}")]
    SharedMemory {
        /// Its name.
        kernel: String,
        /// Bytes.
        needs: u32,
        /// Bytes.
        allowed: u32,
    },
    /// A buffer of another executor, or a length that does not fit.
    #[error("{0}")]
    Buffer(String),
}

fn hint(reason: &str) -> &'static str {
    if reason.contains("OUT_OF_MEMORY") {
        ". The GPU's memory is full: close other programs, or choose a quantizer of fewer bits"
    } else if reason.contains("INVALID_IMAGE") || reason.contains("NO_BINARY_FOR_GPU") || reason.contains("UNSUPPORTED")
    {
        ". The driver may be older than NVRTC: update the driver, or install NVRTC of the driver's CUDA version"
    } else {
        ""
    }
}
