//! What an engine takes of a device's memory, said before it is taken.

use std::collections::BTreeMap;
use std::fmt;

use qp_codegen::cuda::Target;
use qp_codegen::ir::Elem;
use qp_codegen::kernels::grouped::layout::Relaid;
use qp_codegen::layout::{COLUMN_PAD, Packed};

use super::layout::{Form, Layout, Stored, mixture};
use super::lower::{self, Pick, Slot, Wanted};
use super::{MOST_ROWS, most_tokens, sizes};
use crate::engine::{Error, PAGE, Room};
use crate::model::program::CacheId;

/// Left free for kernels, graphs and what the driver needs.
const RESERVE: u64 = 256 << 20;

/// Bytes that an engine takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Matrices.
    pub weights: u64,
    /// Keys and values of a page, all attentions together.
    pub page: u64,
    /// Pages.
    pub pages: u64,
    /// Pages that indices reach, at most.
    pub most_pages: u64,
    /// Values of a step's tokens, tables of angles and of pages.
    pub step: u64,
}

impl Needs {
    /// Those of an engine with `room`.
    pub fn of(layout: &Layout, room: Room) -> Needs {
        let program = &layout.program;
        let most = most_tokens(program, room);
        let mixtures = mixture::Room::of(program, sizes(most));
        let rows = |slot: &Slot| u64::from(if slot.wanted { MOST_ROWS } else { most });
        let wanted = Wanted { rows: most.min(MOST_ROWS), pick: Pick::Best };
        // Where values lie does not depend on the device.
        let launches = lower::step(layout, &Target::Sm80.device(), most, wanted).launches;
        let slots: BTreeMap<Slot, u64> =
            launches.iter().flat_map(|l| l.write).map(|s| (s, 4 * rows(&s) * u64::from(s.stride))).collect();
        let columns = layout.matrices.iter().map(|m| m.shape.cols).max().unwrap_or(1).next_multiple_of(COLUMN_PAD);
        let activations = (2 * u64::from(columns) * u64::from(most)).max(mixtures.activations as u64);
        let routes = 12 * mixtures.pairs as u64 + 16 * mixtures.units as u64;
        let angles = 8 * (room.context * program.ropes.iter().map(|r| r.frequencies.len()).sum::<usize>()) as u64;
        let table = 4 * (room.context.div_ceil(PAGE) * room.pages.min(most as usize)) as u64;
        Needs {
            weights: layout.matrices.iter().map(|m| bytes(layout, m)).sum(),
            page: (0..program.caches.len()).map(|i| u64::from(layout.cache_of(CacheId(i)).page_bytes())).sum(),
            pages: room.pages as u64,
            most_pages: (0..program.caches.len())
                .map(|i| u64::from(layout.cache_of(CacheId(i)).most_pages()))
                .min()
                .unwrap_or(u64::MAX),
            step: slots.values().sum::<u64>() + activations + routes + angles + table,
        }
    }

    /// Checks that all of it fits `free` bytes.
    ///
    /// # Errors
    /// If it does not, with the longest context that would.
    pub fn check(&self, free: u64) -> Result<(), Error> {
        let others = self.weights + self.step + RESERVE;
        if others + self.pages * self.page <= free && self.pages <= self.most_pages {
            return Ok(());
        }
        let fits = (free.saturating_sub(others) / self.page.max(1)).min(self.most_pages) * PAGE as u64;
        Err(Error::Memory { needs: *self, free, fits })
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let (weights, cache, step) = (gib(self.weights), gib(self.pages * self.page), gib(self.step));
        let tokens = self.pages * PAGE as u64;
        write!(f, "weights {weights:.2} GiB, keys and values of {tokens} tokens {cache:.2} GiB, a step {step:.2} GiB")
    }
}

/// Bytes of a matrix.
fn bytes(layout: &Layout, stored: &Stored) -> u64 {
    let len = u64::from(stored.shape.rows) * u64::from(stored.shape.cols);
    match &stored.form {
        Form::Dense(Elem::F32) => 4 * len,
        Form::Dense(_) => 2 * len,
        Form::Grouped(terms) => Relaid::new(terms, stored.shape).bytes(),
        Form::Packed(_) | Form::Shared => {
            let packed = Packed::new(&layout.specs[stored.spec], stored.shape);
            4 * packed.words() as u64 + 2 * u64::from(packed.padded_rows())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        let needs = Needs { weights: 3 << 30, page: 1 << 20, pages: 2048, most_pages: 8000, step: 1 << 28 };
        let all = (5u64 << 30) + (1 << 29);
        assert!(needs.check(all).is_ok());
        let message = needs.check(all - 1).expect_err("too much").to_string();
        assert!(message.contains("weights 3.00 GiB, keys and values of 131072 tokens 2.00 GiB"), "{message}");
        assert!(message.contains("at most 131008 tokens"), "{message}");
        // Memory enough, but more pages than an index reaches.
        let message = Needs { most_pages: 2000, ..needs }.check(all).expect_err("too many").to_string();
        assert!(message.contains("at most 128000 tokens"), "{message}");
        let message = needs.check(2 << 30).expect_err("too much").to_string();
        assert!(message.contains("no tokens"), "{message}");
    }
}
