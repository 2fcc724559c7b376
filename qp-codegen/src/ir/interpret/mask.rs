//! Which threads of a cluster are active.

use super::{Fault, Stop};

#[derive(Clone)]
pub(super) struct Mask {
    /// All ones or zero for each thread.
    pub on: Vec<u32>,
    /// The range that holds the active threads.
    pub lo: usize,
    pub hi: usize,
    pub count: u32,
}

impl Mask {
    /// `None` if no thread is active.
    pub(super) fn of(on: Vec<u32>) -> Option<Mask> {
        let lo = on.iter().position(|m| *m != 0)?;
        let hi = on.iter().rposition(|m| *m != 0)? + 1;
        let count = on[lo..hi].iter().map(|m| m & 1).sum();
        Some(Mask { on, lo, hi, count })
    }

    pub(super) fn active(&self) -> impl Iterator<Item = usize> + '_ {
        (self.lo..self.hi).filter(|t| self.on[*t] != 0)
    }

    /// The active ones of the groups of `size` threads: warps, blocks, the cluster.
    ///
    /// # Errors
    /// The first group that is active in part.
    pub(super) fn groups(&self, size: usize) -> Result<impl Iterator<Item = usize> + '_, Stop> {
        let groups = self.lo / size..self.hi.div_ceil(size);
        for group in groups.clone() {
            let threads = &self.on[group * size..(group + 1) * size];
            let active: u32 = threads.iter().map(|m| m & 1).sum();
            if active != 0 && active as usize != size {
                let first = threads.iter().position(|m| *m != 0).unwrap_or(0);
                return Err(Stop::at(group * size + first, Fault::Divergent { active, all: size as u32 }));
            }
        }
        Ok(groups.filter(move |g| self.on[g * size] != 0))
    }

    /// The active warps.
    ///
    /// # Errors
    /// The first warp that is active in part.
    pub(super) fn warps(&self) -> Result<impl Iterator<Item = usize> + '_, Stop> {
        self.groups(32)
    }
}
