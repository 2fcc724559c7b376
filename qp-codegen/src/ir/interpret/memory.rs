//! Global buffers, and shared memory with its shadow.
//!
//! The shadow holds, for each cell (the narrowest element an array is accessed as), who wrote it last and who read it
//! since the last barrier. Time is counted in epochs: the block's goes up at every barrier, a warp's at every barrier
//! and `warp_sync`. Two accesses of different threads are ordered if a barrier lies between, or if the threads are of
//! one warp and a `warp_sync` lies between.

use std::collections::VecDeque;

use super::{Arg, Fault};
use crate::ir::*;

/// A buffer argument, or nothing where the parameter is a scalar.
pub(super) enum Buffer<'a> {
    ReadWrite(&'a mut [u8]),
    ReadOnly(&'a [u8]),
    Scalar,
}

impl<'a> Buffer<'a> {
    pub(super) fn of(arg: &'a mut Arg<'_>) -> Self {
        match arg {
            Arg::Buffer(b) => Buffer::ReadWrite(b),
            Arg::ReadOnly(b) => Buffer::ReadOnly(b),
            Arg::I32(_) | Arg::U32(_) | Arg::F32(_) => Buffer::Scalar,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Buffer::ReadWrite(b) => b,
            Buffer::ReadOnly(b) => b,
            Buffer::Scalar => &[],
        }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Buffer::ReadWrite(b) => b,
            Buffer::ReadOnly(_) | Buffer::Scalar => panic!("the validator checked that written buffers are writable"),
        }
    }
}

/// Byte offset of an access, or how it fails.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub elem: Elem,
    pub lanes: u32,
    /// Bytes from one index to the next.
    pub unit: u32,
    /// Size of the buffer or array.
    pub size: usize,
}

impl Place {
    /// Byte offset of `index`; `None` if out of bounds or misaligned.
    #[inline]
    pub(super) fn offset(self, index: u32) -> Option<usize> {
        let width = self.elem.bytes() as usize;
        let start = (index as i32 as isize).checked_mul(self.unit as isize).filter(|i| *i >= 0)? as usize;
        let bytes = width * self.lanes as usize;
        (start + bytes <= self.size && start.is_multiple_of(bytes)).then_some(start)
    }

    /// Why `offset` gave `None`.
    pub(super) fn fault(self, memory: &str, index: u32) -> Fault {
        let (memory, index, lanes) = (memory.to_owned(), i64::from(index as i32), self.lanes);
        let inside = index >= 0
            && index as u64 * u64::from(self.unit) + u64::from(lanes * self.elem.bytes()) <= self.size as u64;
        match inside {
            true => Fault::Misaligned { memory, index, lanes },
            false => Fault::OutOfBounds { memory, index, lanes, elem: self.elem, bytes: self.size as u64 },
        }
    }
}

/// A thread that stands for several.
const MANY: u16 = u16::MAX;

#[derive(Clone, Copy, PartialEq)]
enum How {
    Read,
    Write,
    Atomic,
}

/// Shadow of one cell. Block epoch 0: never.
#[derive(Clone, Copy, Default)]
struct Cell {
    write_epoch: u32,
    write_warp_epoch: u32,
    /// Fences for warp groups that the writer had made before.
    write_fences: u32,
    read_epoch: u32,
    read_warp_epoch: u32,
    writer: u16,
    /// The warp that read in `read_epoch`, or [`MANY`].
    read_warp: u16,
    /// The thread that read in `read_warp_epoch`, or [`MANY`].
    reader: u16,
    /// One more than the thread whose copy is on its way here.
    flight: u16,
    atomic: bool,
}

struct Array {
    base: usize,
    size: usize,
    /// Logarithm of a cell's bytes.
    grain: u32,
    first_cell: usize,
}

struct Copy {
    array: u32,
    offset: usize,
    len: usize,
    data: [u8; 16],
    /// Number of the group it belongs to.
    group: u32,
}

/// A thread's asynchronous copies.
#[derive(Default)]
struct Copies {
    pending: VecDeque<Copy>,
    committed: u32,
}

/// The shared memories of the blocks of the cluster that runs.
pub(super) struct Blocks {
    pub ranks: Vec<SharedMemory>,
    /// Threads of a block.
    threads: usize,
}

impl Blocks {
    pub(super) fn new(kernel: &Kernel, watch: bool) -> Self {
        let ranks = (0..kernel.cluster).map(|_| SharedMemory::new(kernel, watch)).collect();
        Blocks { ranks, threads: kernel.threads as usize }
    }

    /// Size of an array, the same in each block.
    pub(super) fn size(&self, array: u32) -> usize {
        self.ranks[0].arrays[array as usize].size
    }

    /// That of a thread of the cluster, and the thread in its block.
    #[inline]
    pub(super) fn of(&mut self, thread: usize) -> (&mut SharedMemory, usize) {
        match &mut self.ranks[..] {
            [only] => (only, thread),
            all => (&mut all[thread / self.threads], thread % self.threads),
        }
    }
}

/// The shared memory of a block.
pub(super) struct SharedMemory {
    bytes: Vec<u8>,
    arrays: Vec<Array>,
    cells: Vec<Cell>,
    watch: bool,
    epoch: u32,
    /// Epoch at the start of the block.
    start: u32,
    warp_epochs: Vec<u32>,
    copies: Vec<Copies>,
    /// The epochs of each thread's fences for warp groups in this block.
    fences: Vec<Vec<u32>>,
}

impl SharedMemory {
    pub(super) fn new(kernel: &Kernel, watch: bool) -> Self {
        let mut narrowest: Vec<u32> = vec![4; kernel.shared.len()];
        for v in &kernel.values {
            if let Op::Load { mem: Mem::Shared(i), elem, .. } = v.op {
                narrowest[i as usize] = narrowest[i as usize].min(elem.bytes());
            }
        }
        narrow_stores(&kernel.body, &mut narrowest);
        let (mut base, mut first_cell) = (0, 0);
        let arrays: Vec<Array> = kernel
            .shared
            .iter()
            .zip(narrowest)
            .map(|(s, narrow)| {
                let grain = narrow.trailing_zeros();
                let a = Array { base, size: (s.len * s.elem.bytes()) as usize, grain, first_cell };
                base += s.bytes() as usize;
                first_cell += (s.bytes() >> grain) as usize;
                a
            })
            .collect();
        SharedMemory {
            bytes: vec![0; base],
            arrays,
            cells: vec![Cell::default(); if watch { first_cell } else { 0 }],
            watch,
            epoch: 1,
            start: 1,
            warp_epochs: vec![1; (kernel.threads / 32) as usize],
            copies: (0..kernel.threads).map(|_| Copies::default()).collect(),
            fences: vec![Vec::new(); kernel.threads as usize],
        }
    }

    /// Forgets everything of the block before.
    pub(super) fn begin_block(&mut self) {
        for thread in 0..self.copies.len() {
            while let Some(c) = self.copies[thread].pending.pop_front() {
                self.set_flight(&c, 0);
            }
            self.copies[thread].committed = 0;
            self.fences[thread].clear();
        }
        self.barrier();
        self.start = self.epoch;
    }

    pub(super) fn barrier(&mut self) {
        self.epoch += 1;
        self.warp_epochs.iter_mut().for_each(|e| *e += 1);
    }

    pub(super) fn warp_sync(&mut self, warp: usize) {
        self.warp_epochs[warp] += 1;
    }

    pub(super) fn group_fence(&mut self, thread: usize) {
        self.fences[thread].push(self.epoch);
    }

    /// The bytes of an array.
    pub(super) fn array(&self, array: u32) -> &[u8] {
        let a = &self.arrays[array as usize];
        &self.bytes[a.base..a.base + a.size]
    }

    /// The bytes of an array.
    pub(super) fn array_mut(&mut self, array: u32) -> &mut [u8] {
        let a = &self.arrays[array as usize];
        &mut self.bytes[a.base..a.base + a.size]
    }

    #[inline]
    pub(super) fn note_read(&mut self, array: u32, offset: usize, len: usize, thread: usize) -> Result<(), Bad> {
        self.note(array, offset, len, thread, How::Read)
    }

    #[inline]
    pub(super) fn note_write(&mut self, array: u32, offset: usize, len: usize, thread: usize) -> Result<(), Bad> {
        self.note(array, offset, len, thread, How::Write)
    }

    pub(super) fn note_atomic(&mut self, array: u32, offset: usize, thread: usize) -> Result<(), Bad> {
        self.note(array, offset, 4, thread, How::Atomic)
    }

    #[inline]
    fn note(&mut self, array: u32, offset: usize, len: usize, thread: usize, how: How) -> Result<(), Bad> {
        if !self.watch {
            return Ok(());
        }
        let a = &self.arrays[array as usize];
        let (first, last) = (offset >> a.grain, (offset + len - 1) >> a.grain);
        let now = Now {
            epoch: self.epoch,
            start: self.start,
            warp_epoch: self.warp_epochs[thread / 32],
            fences: self.fences[thread].len() as u32,
            thread: thread as u16,
        };
        for (i, cell) in self.cells[a.first_cell + first..=a.first_cell + last].iter_mut().enumerate() {
            now.note(cell, how).map_err(|kind| Bad { byte: ((first + i) << a.grain) as u32, kind })?;
        }
        Ok(())
    }

    /// A product of warp groups reads. It must find what was written, and shown to it, before the last barrier.
    pub(super) fn note_group_read(&mut self, array: u32, offset: usize, len: usize) -> Result<(), Bad> {
        if !self.watch {
            return Ok(());
        }
        let a = &self.arrays[array as usize];
        let (first, last) = (offset >> a.grain, (offset + len - 1) >> a.grain);
        for (i, cell) in self.cells[a.first_cell + first..=a.first_cell + last].iter_mut().enumerate() {
            let fences = self.fences.get(usize::from(cell.writer));
            let shown = fences.and_then(|f| f.get(cell.write_fences as usize));
            let kind = if cell.flight != 0 {
                BadKind::InFlight(u32::from(cell.flight) - 1)
            } else if cell.write_epoch < self.start {
                BadKind::Uninitialised
            } else if cell.write_epoch == self.epoch {
                BadKind::WrittenBy(cell.writer, How::Read)
            } else if shown.is_none_or(|epoch| *epoch == self.epoch) {
                BadKind::Hidden(cell.writer)
            } else {
                cell.read_epoch = self.epoch;
                (cell.read_warp, cell.reader) = (MANY, MANY);
                continue;
            };
            return Err(Bad { byte: ((first + i) << a.grain) as u32, kind });
        }
        Ok(())
    }

    fn set_flight(&mut self, c: &Copy, flight: u16) {
        if self.watch {
            let a = &self.arrays[c.array as usize];
            let (first, last) = (c.offset >> a.grain, (c.offset + c.len - 1) >> a.grain);
            self.cells[a.first_cell + first..=a.first_cell + last].iter_mut().for_each(|cell| cell.flight = flight);
        }
    }

    /// Starts a copy; what arrives is what lies in `data` now.
    pub(super) fn start_copy(&mut self, array: u32, offset: usize, data: &[u8], thread: usize) -> Result<(), Bad> {
        // It may arrive at once: whoever used the place before must be done with it.
        self.note_write(array, offset, data.len(), thread)?;
        let mut bytes = [0; 16];
        bytes[..data.len()].copy_from_slice(data);
        let group = self.copies[thread].committed;
        let c = Copy { array, offset, len: data.len(), data: bytes, group };
        self.set_flight(&c, thread as u16 + 1);
        self.copies[thread].pending.push_back(c);
        Ok(())
    }

    pub(super) fn commit(&mut self, thread: usize) {
        self.copies[thread].committed += 1;
    }

    /// Finishes all but the thread's last `pending` groups.
    pub(super) fn wait(&mut self, pending: u32, thread: usize) {
        let done = self.copies[thread].committed.saturating_sub(pending);
        while self.copies[thread].pending.front().is_some_and(|c| c.group < done) {
            let c = self.copies[thread].pending.pop_front().expect("looked at just now");
            self.set_flight(&c, 0);
            self.array_mut(c.array)[c.offset..c.offset + c.len].copy_from_slice(&c.data[..c.len]);
            let noted = self.note_write(c.array, c.offset, c.len, thread);
            debug_assert!(noted.is_ok(), "nobody could touch it in flight");
        }
    }
}

fn narrow_stores(block: &[Stmt], narrowest: &mut [u32]) {
    for s in block {
        if let Stmt::Store { mem: Mem::Shared(i), elem, .. } = s {
            narrowest[*i as usize] = narrowest[*i as usize].min(elem.bytes());
        }
        s.nested().for_each(|b| narrow_stores(b, narrowest));
    }
}

/// A forbidden shared access.
pub(super) struct Bad {
    byte: u32,
    kind: BadKind,
}

enum BadKind {
    Uninitialised,
    InFlight(u32),
    WrittenBy(u16, How),
    ReadBy(u16, How),
    Hidden(u16),
}

impl Bad {
    pub(super) fn fault(self, memory: &str) -> Fault {
        let (memory, byte) = (memory.to_owned(), self.byte);
        let who = |t: u16| if t == MANY { "several threads".into() } else { format!("thread {t}") };
        let verb = |how| match how {
            How::Read => "read",
            How::Write => "written",
            How::Atomic => "added to",
        };
        match self.kind {
            BadKind::Uninitialised => Fault::Uninitialised { memory, byte },
            BadKind::Hidden(writer) => Fault::Hidden { memory, byte, writer: writer.into() },
            BadKind::InFlight(owner) => Fault::InFlight { memory, byte, owner },
            BadKind::WrittenBy(t, how) => {
                let what = format!("written by {}, then {} without a barrier between", who(t), verb(how));
                Fault::Race { memory, byte, what }
            }
            BadKind::ReadBy(t, how) => {
                let what = format!("read by {}, then {} without a barrier between", who(t), verb(how));
                Fault::Race { memory, byte, what }
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Now {
    epoch: u32,
    start: u32,
    warp_epoch: u32,
    fences: u32,
    thread: u16,
}

impl Now {
    #[inline]
    fn note(self, cell: &mut Cell, how: How) -> Result<(), BadKind> {
        let warp = self.thread / 32;
        if cell.flight != 0 {
            return Err(BadKind::InFlight(u32::from(cell.flight) - 1));
        }
        if how != How::Write && cell.write_epoch < self.start {
            return Err(BadKind::Uninitialised);
        }
        if cell.write_epoch == self.epoch && cell.writer != self.thread {
            let same_warp = cell.writer != MANY && cell.writer / 32 == warp;
            let ordered = same_warp && cell.write_warp_epoch < self.warp_epoch;
            let both_atomic = cell.atomic && how == How::Atomic;
            if !ordered && !both_atomic {
                return Err(BadKind::WrittenBy(cell.writer, how));
            }
        }
        if how == How::Read {
            self.note_reader(cell, warp);
            return Ok(());
        }
        if cell.read_epoch == self.epoch {
            let other =
                cell.read_warp != warp || (cell.read_warp_epoch == self.warp_epoch && cell.reader != self.thread);
            if other {
                return Err(BadKind::ReadBy(cell.reader, how));
            }
        }
        // Several atomics of one epoch: any plain access in the epoch, even by one of them, meets another's.
        let shared = how == How::Atomic && cell.atomic && cell.write_epoch == self.epoch && cell.writer != self.thread;
        cell.writer = if shared { MANY } else { self.thread };
        cell.atomic = how == How::Atomic;
        cell.write_epoch = self.epoch;
        cell.write_warp_epoch = self.warp_epoch;
        cell.write_fences = self.fences;
        Ok(())
    }

    #[inline]
    fn note_reader(self, cell: &mut Cell, warp: u16) {
        if cell.read_epoch != self.epoch {
            cell.read_epoch = self.epoch;
            (cell.read_warp, cell.read_warp_epoch, cell.reader) = (warp, self.warp_epoch, self.thread);
        } else if cell.read_warp != warp {
            (cell.read_warp, cell.reader) = (MANY, MANY);
        } else if cell.read_warp_epoch != self.warp_epoch {
            (cell.read_warp_epoch, cell.reader) = (self.warp_epoch, self.thread);
        } else if cell.reader != self.thread {
            cell.reader = MANY;
        }
    }
}
