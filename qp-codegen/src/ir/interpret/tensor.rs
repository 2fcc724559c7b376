//! Products on tensor cores: of a warp, and of groups of four.

use super::execute::Machine;
use super::memory::Place;
use super::program::Reg;
use super::{Fault, Stop};
use crate::ir::*;

/// Bytes of K that a product takes.
const K: usize = 32;
/// Some rows or columns, each of [`K`] bytes; sixteen bits, so that the CPU multiplies and adds pairs in one instruction.
type Bytes<const N: usize> = [[i16; K]; N];

impl Machine<'_, '_> {
    /// One warp's `mma.m16n8k32`, whose first thread is `first`.
    pub(super) fn mma(
        &mut self,
        first: usize,
        signed_a: bool,
        a: &[Reg; 4],
        b: &[Reg; 2],
        acc: &[Reg; 4],
        d: &[Reg; 4],
    ) -> Result<(), Stop> {
        let rows = self.fragment(first, signed_a, a);
        let mut columns: Bytes<8> = [[0; K]; 8];
        for lane in 0..32 {
            let (group, four) = (lane / 4, lane % 4 * 4);
            for (i, r) in b.iter().enumerate() {
                let bytes = self.words[*r as usize][first + lane].to_le_bytes();
                for (x, byte) in columns[group][four + 16 * i..][..4].iter_mut().zip(bytes) {
                    *x = (byte as i8).into();
                }
            }
        }
        self.accumulate(first, &rows, &columns, acc, d)
    }

    /// Products of four warps, whose first thread is `first`; `b`: array, first cell, cells from one 16 bytes of K to the
    /// next.
    pub(super) fn mma_group(
        &mut self,
        first: usize,
        signed_a: bool,
        (a, acc): (&[[Reg; 4]], &[[Reg; 4]]),
        (array, cell, stride): (u32, Reg, u32),
    ) -> Result<(), Stop> {
        let cells = &self.words[cell as usize][first..first + 128];
        let cell = cells[0];
        if let Some(other) = cells.iter().position(|c| *c != cell) {
            return Err(Stop::at(first + other, Fault::Parted));
        }
        let place = Place { elem: Elem::U32, lanes: 4, unit: 16, size: self.shared.size(array) };
        for (step, a) in a.iter().enumerate() {
            let mut columns = vec![[0; K]; acc.len() * 8];
            for (n, column) in columns.iter_mut().enumerate() {
                for (half, bytes) in column.chunks_exact_mut(16).enumerate() {
                    let index = cell.wrapping_add((2 * step + half) as u32 * stride + n as u32);
                    let mem = Mem::Shared(array);
                    let at = place.offset(index);
                    let at = at.ok_or_else(|| Stop::at(first, place.fault(self.name(mem), index)))?;
                    let (shared, _) = self.shared.of(first);
                    let noted = shared.note_group_read(array, at, 16);
                    noted.map_err(|bad| Stop::at(first, bad.fault(self.name(mem))))?;
                    for (x, byte) in bytes.iter_mut().zip(&self.shared.of(first).0.array(array)[at..at + 16]) {
                        *x = (*byte as i8).into();
                    }
                }
            }
            self.report.shared_loaded += columns.len() as u64 * K as u64;
            for warp in (first..first + 128).step_by(32) {
                let rows = self.fragment(warp, signed_a, a);
                for (acc, columns) in acc.iter().zip(columns.as_chunks().0) {
                    self.accumulate(warp, &rows, columns, acc, acc)?;
                }
            }
        }
        Ok(())
    }

    /// The rows of A that a warp holds.
    fn fragment(&self, first: usize, signed: bool, a: &[Reg; 4]) -> Bytes<16> {
        let mut rows = [[0; K]; 16];
        for lane in 0..32 {
            let (group, four) = (lane / 4, lane % 4 * 4);
            for (i, r) in a.iter().enumerate() {
                let bytes = self.words[*r as usize][first + lane].to_le_bytes();
                // Registers 0 and 2 hold row `group`, 1 and 3 row `group + 8`; 2 and 3 the upper columns.
                let row = &mut rows[group + 8 * (i % 2)][four + 16 * (i / 2)..][..4];
                for (x, byte) in row.iter_mut().zip(bytes) {
                    *x = if signed { (byte as i8).into() } else { byte.into() };
                }
            }
        }
        rows
    }

    /// `d = acc + rows · columns` in a warp's accumulators.
    fn accumulate(
        &mut self,
        first: usize,
        rows: &Bytes<16>,
        columns: &Bytes<8>,
        acc: &[Reg; 4],
        d: &[Reg; 4],
    ) -> Result<(), Stop> {
        let mut products = [[0i32; 8]; 16];
        for (row, out) in rows.iter().zip(&mut products) {
            for (column, out) in columns.iter().zip(out) {
                *out = row.iter().zip(column).map(|(x, y)| i32::from(*x) * i32::from(*y)).sum();
            }
        }
        for lane in 0..32 {
            let (group, two) = (lane / 4, lane % 4 * 2);
            for i in 0..4 {
                let dot = products[group + 8 * (i / 2)][two + i % 2];
                let old = self.words[acc[i] as usize][first + lane] as i32;
                let Some(x) = old.checked_add(dot) else {
                    return Err(Stop::at(first + lane, Fault::Overflow(old.into(), dot.into())));
                };
                self.words[d[i] as usize][first + lane] = x as u32;
            }
        }
        Ok(())
    }
}
