//! What kernels are compiled for, and what such a GPU can do.

use std::fmt;
use std::str::FromStr;

use crate::ir::MAX_CLUSTER;

/// A GPU architecture that code is generated for.
///
/// ```
/// use qp_codegen::cuda::Target;
///
/// let t: Target = "sm_90a".parse().unwrap();
/// assert_eq!(t.nvrtc_arch(), "sm_90a");
/// assert!(t.has_dependent_launch());
/// assert!("sm_75".parse::<Target>().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// Ampere, data centre (A100).
    Sm80,
    /// Ampere, desktop (RTX 30, A10).
    Sm86,
    /// Ada (RTX 40, L4, L40).
    Sm89,
    /// Hopper (H100, H200) with its own features.
    Sm90a,
    /// Blackwell, data centre (B200).
    Sm100,
    /// Blackwell, desktop (RTX 50).
    Sm120,
}

/// Size of a typical GPU of a target: what lowerings use to choose launch shapes. A measured device replaces it where
/// one is at hand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Device {
    /// The model the numbers are of.
    pub name: &'static str,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Bytes of shared memory one block may use (opt-in maximum).
    pub shared_per_block: u32,
    /// Bytes of shared memory of one SM (each resident block takes 1 KiB beyond its own).
    pub shared_per_sm: u32,
    /// 32-bit registers of one SM.
    pub registers_per_sm: u32,
    /// Resident threads of one SM.
    pub threads_per_sm: u32,
    /// Resident blocks of one SM.
    pub blocks_per_sm: u32,
    /// Most blocks of a cluster; 1: no clusters.
    pub cluster: u32,
    /// Bytes of L2 cache.
    pub l2_bytes: u64,
    /// Peak memory bandwidth, bytes a second.
    pub bandwidth: f64,
    /// Highest clock of the SMs, Hz.
    pub clock: f64,
    /// Products of signed bytes that the tensor cores of one SM sum in a cycle through `mma.sync`, which on Hopper and
    /// later reaches less than all of their rate.
    pub int8_products: f64,
    /// The same through Hopper's products of warp groups (`wgmma`); 0 where there are none.
    pub group_products: f64,
}

/// A name that is no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown target `{0}`; known are sm_80, sm_86, sm_89, sm_90a, sm_100 and sm_120")]
pub struct UnknownTarget(pub String);

impl Target {
    /// Every target, oldest first.
    pub const ALL: [Target; 6] =
        [Target::Sm80, Target::Sm86, Target::Sm89, Target::Sm90a, Target::Sm100, Target::Sm120];

    /// Its name, as written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Target::Sm80 => "sm_80",
            Target::Sm86 => "sm_86",
            Target::Sm89 => "sm_89",
            Target::Sm90a => "sm_90a",
            Target::Sm100 => "sm_100",
            Target::Sm120 => "sm_120",
        }
    }

    /// What NVRTC's `--gpu-architecture` takes to make a cubin.
    pub fn nvrtc_arch(self) -> &'static str {
        self.name()
    }

    /// Compute capability: major and minor.
    pub fn capability(self) -> (u32, u32) {
        match self {
            Target::Sm80 => (8, 0),
            Target::Sm86 => (8, 6),
            Target::Sm89 => (8, 9),
            Target::Sm90a => (9, 0),
            Target::Sm100 => (10, 0),
            Target::Sm120 => (12, 0),
        }
    }

    /// The newest target whose cubins run on a GPU of compute capability `major.minor`: the same major and no larger a
    /// minor (and for Hopper's own features exactly 9.0). `None` for GPUs older than Ampere or not yet known.
    pub fn of_capability(major: u32, minor: u32) -> Option<Target> {
        Target::ALL.into_iter().rev().find(|t| {
            let (x, y) = t.capability();
            x == major && y <= minor && (*t != Target::Sm90a || minor == 0)
        })
    }

    /// Size of a typical GPU.
    pub fn device(self) -> Device {
        const KIB: u32 = 1 << 10;
        const MIB: u64 = 1 << 20;
        let large = Device {
            name: "A100",
            sms: 108,
            shared_per_block: 163 * KIB,
            shared_per_sm: 164 * KIB,
            registers_per_sm: 65536,
            threads_per_sm: 2048,
            blocks_per_sm: 32,
            cluster: 1,
            l2_bytes: 40 * MIB,
            bandwidth: 2.039e12,
            clock: 1.41e9,
            int8_products: 2048.0,
            group_products: 0.0,
        };
        let small = Device {
            name: "RTX 3090",
            sms: 82,
            shared_per_block: 99 * KIB,
            shared_per_sm: 100 * KIB,
            registers_per_sm: 65536,
            threads_per_sm: 1536,
            blocks_per_sm: 16,
            cluster: 1,
            l2_bytes: 6 * MIB,
            bandwidth: 0.936e12,
            clock: 1.70e9,
            int8_products: 1024.0,
            group_products: 0.0,
        };
        let hopper = Device {
            name: "H100 SXM",
            sms: 132,
            shared_per_block: 227 * KIB,
            shared_per_sm: 228 * KIB,
            cluster: MAX_CLUSTER,
            l2_bytes: 50 * MIB,
            bandwidth: 3.35e12,
            clock: 1.98e9,
            int8_products: 2600.0,
            group_products: 4096.0,
            ..large
        };
        match self {
            Target::Sm80 => large,
            Target::Sm86 => small,
            Target::Sm89 => Device {
                name: "RTX 4090",
                sms: 128,
                blocks_per_sm: 24,
                l2_bytes: 72 * MIB,
                bandwidth: 1.008e12,
                clock: 2.52e9,
                ..small
            },
            Target::Sm90a => hopper,
            Target::Sm100 => {
                let (name, sms, l2_bytes) = ("B200", 148, 126 * MIB);
                let (bandwidth, clock) = (8.0e12, 1.965e9);
                let (int8_products, group_products) = (2048.0, 0.0);
                Device { name, sms, l2_bytes, bandwidth, clock, int8_products, group_products, ..hopper }
            }
            Target::Sm120 => Device {
                name: "RTX 5090",
                sms: 170,
                blocks_per_sm: 24,
                cluster: MAX_CLUSTER,
                l2_bytes: 96 * MIB,
                bandwidth: 1.792e12,
                clock: 2.41e9,
                ..small
            },
        }
    }

    /// Programmatic dependent launch (`griddepcontrol`).
    pub fn has_dependent_launch(self) -> bool {
        self >= Target::Sm90a
    }

    /// Bulk asynchronous copies with memory barriers (`cp.async.bulk`).
    pub fn has_bulk_copy(self) -> bool {
        self >= Target::Sm90a
    }

    /// Clusters of blocks, with a barrier of their own.
    pub fn has_clusters(self) -> bool {
        self.device().cluster > 1
    }

    /// Hopper's products of warp groups (`wgmma`).
    pub fn has_wgmma(self) -> bool {
        self.device().group_products > 0.0
    }

    /// Blocks of `threads` threads, `registers` a thread and `shared` bytes a block that fit on one SM at once; 0 if
    /// one does not fit.
    ///
    /// ```
    /// use qp_codegen::cuda::Target;
    ///
    /// assert_eq!(Target::Sm90a.resident_blocks(512, 64, 100 << 10), 2);
    /// assert_eq!(Target::Sm86.resident_blocks(512, 64, 100 << 10), 0);
    /// ```
    pub fn resident_blocks(self, threads: u32, registers: u32, shared: u32) -> u32 {
        let d = self.device();
        if threads == 0 || shared > d.shared_per_block {
            return 0;
        }
        let warps = threads.div_ceil(32);
        // Registers are given to a warp in units of 256, eight to a lane.
        let by_registers = d.registers_per_sm / (warps * 32 * registers.max(1).next_multiple_of(8));
        let by_shared = d.shared_per_sm / (shared + 1024);
        (d.threads_per_sm / (warps * 32)).min(by_registers).min(by_shared).min(d.blocks_per_sm)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Target {
    type Err = UnknownTarget;

    /// Takes the names of [`Target::name`], and `sm_90` for `sm_90a`.
    fn from_str(s: &str) -> Result<Self, UnknownTarget> {
        if s == "sm_90" {
            return Ok(Target::Sm90a);
        }
        Target::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| UnknownTarget(s.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for t in Target::ALL {
            assert_eq!(t.name().parse(), Ok(t));
            let (major, minor) = t.capability();
            assert_eq!(Target::of_capability(major, minor), Some(t));
        }
        let error = "sm_70".parse::<Target>().unwrap_err().to_string();
        assert!(error.contains("sm_70") && error.contains("sm_90a"), "{error}");
    }

    #[test]
    fn a_device_gets_the_newest_target_that_runs_on_it() {
        assert_eq!(Target::of_capability(8, 7), Some(Target::Sm86));
        assert_eq!(Target::of_capability(10, 3), Some(Target::Sm100));
        assert_eq!(Target::of_capability(12, 1), Some(Target::Sm120));
        assert_eq!(Target::of_capability(7, 5), None);
        assert_eq!(Target::of_capability(13, 0), None);
    }
}
