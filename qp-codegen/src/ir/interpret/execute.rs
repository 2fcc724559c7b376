//! Runs programs: each operation in one loop over the threads of a cluster, block after block.
//!
//! Arithmetic is computed for inactive threads too, within the range that holds the active ones; only what they would
//! trap on is masked. Memory, variables and everything between lanes touch active threads alone.

use std::mem::take;

use super::arithmetic::{dot2, dot4, halves, number, permute, round};
use super::mask::Mask;
use super::memory::{Blocks, Buffer, Place, SharedMemory};
use super::program::{Code, Instr, Program, Reg};
use super::{Arg, Fault, Options, Report, Stop, float};
use crate::ir::*;

pub(super) struct Machine<'p, 'a> {
    kernel: &'p Kernel,
    program: &'p Program,
    /// Of the cluster.
    threads: usize,
    /// Threads of a block.
    block: usize,
    pub(super) words: Vec<Vec<u32>>,
    pub(super) longs: Vec<Vec<i64>>,
    pub(super) shared: Blocks,
    buffers: Vec<Buffer<'a>>,
    pub report: Report,
}

impl<'p, 'a> Machine<'p, 'a> {
    pub(super) fn new(kernel: &'p Kernel, program: &'p Program, args: &'a mut [Arg<'_>], options: &Options) -> Self {
        let block = kernel.threads as usize;
        let threads = block * kernel.cluster as usize;
        let mut words = vec![vec![0; threads]; program.words as usize];
        let mut longs = vec![vec![0; threads]; program.longs as usize];
        for (r, x) in &program.word_constants {
            words[*r as usize].fill(*x);
        }
        for (r, x) in &program.long_constants {
            longs[*r as usize].fill(*x);
        }
        for (r, i) in &program.scalars {
            words[*r as usize].fill(match &args[*i as usize] {
                Arg::I32(x) => *x as u32,
                Arg::U32(x) => *x,
                Arg::F32(x) => x.to_bits(),
                Arg::Buffer(_) | Arg::ReadOnly(_) => {
                    unreachable!("the validator checked that the parameter is a scalar")
                }
            });
        }
        Machine {
            kernel,
            program,
            threads,
            block,
            words,
            longs,
            shared: Blocks::new(kernel, options.races),
            buffers: args.iter_mut().map(Buffer::of).collect(),
            report: Report::default(),
        }
    }

    /// Runs the cluster whose first block is `x`, `y`.
    pub(super) fn cluster(&mut self, [x, y]: [u32; 2]) -> Result<(), Stop> {
        let threads = self.kernel.threads;
        for (r, s) in &self.program.specials {
            for (t, w) in self.words[*r as usize].iter_mut().enumerate() {
                let (rank, t) = (t as u32 / threads, t as u32 % threads);
                *w = match s {
                    Special::Thread => t,
                    Special::Lane => t % 32,
                    Special::Warp => t / 32,
                    Special::BlockX => x + rank,
                    Special::BlockY => y,
                    Special::Cluster => x / self.kernel.cluster,
                    Special::Rank => rank,
                };
            }
        }
        self.shared.ranks.iter_mut().for_each(SharedMemory::begin_block);
        let all = Mask::of(vec![u32::MAX; self.threads]).expect("a cluster has threads");
        self.run(&self.program.body, &all)
    }

    fn run(&mut self, code: &[Instr], m: &Mask) -> Result<(), Stop> {
        for i in code {
            self.report.counts[i.kind as usize] += u64::from(m.count);
            match &i.code {
                // These carry the place of a nested statement already.
                Code::If { cond, then, els } => self.branch(*cond, then, els, m)?,
                Code::For { index, start, end, step, body } => {
                    self.repeat([*index, *start, *end, *step], body, m, i.at)?;
                }
                code => self.operation(code, m).map_err(|stop| Stop { at: i.at, ..stop })?,
            }
        }
        Ok(())
    }

    fn branch(&mut self, cond: Reg, then: &[Instr], els: &[Instr], m: &Mask) -> Result<(), Stop> {
        let cond = &self.words[cond as usize];
        let r = m.lo..m.hi;
        let taken: u32 = cond[r.clone()].iter().zip(&m.on[r]).map(|(c, on)| c & on).sum();
        if taken == m.count {
            return self.run(then, m);
        }
        if taken == 0 {
            return self.run(els, m);
        }
        let (mut yes, mut no) = (vec![0; self.threads], vec![0; self.threads]);
        for t in m.active() {
            *(if cond[t] != 0 { &mut yes[t] } else { &mut no[t] }) = u32::MAX;
        }
        for (on, code) in [(yes, then), (no, els)] {
            if let (Some(m), false) = (Mask::of(on), code.is_empty()) {
                self.run(code, &m)?;
            }
        }
        Ok(())
    }

    fn repeat(&mut self, regs: [Reg; 4], body: &[Instr], m: &Mask, at: u32) -> Result<(), Stop> {
        let [index, start, end, step] = regs.map(|r| r as usize);
        for t in m.active() {
            let by = self.words[step][t] as i32;
            if by <= 0 {
                return Err(Stop { at, ..Stop::at(t, Fault::Step(by)) });
            }
            self.words[index][t] = self.words[start][t];
        }
        let mut narrowed: Option<Mask> = None;
        loop {
            let m = narrowed.as_ref().unwrap_or(m);
            let r = m.lo..m.hi;
            let pairs = self.words[index][r.clone()].iter().zip(&self.words[end][r.clone()]);
            let going: u32 = pairs.zip(&m.on[r]).map(|((i, e), on)| u32::from((*i as i32) < *e as i32) & on).sum();
            if going == 0 {
                return Ok(());
            }
            if going != m.count {
                let mut on = vec![0; self.threads];
                for t in m.active().filter(|t| (self.words[index][*t] as i32) < self.words[end][*t] as i32) {
                    on[t] = u32::MAX;
                }
                narrowed = Mask::of(on);
                continue;
            }
            self.run(body, m)?;
            // Threads that have left the loop count on; nobody looks.
            let mut out = take(&mut self.words[index]);
            let r = m.lo..m.hi;
            let mut bad = 0;
            for ((i, by), on) in out[r.clone()].iter_mut().zip(&self.words[step][r.clone()]).zip(&m.on[r]) {
                let (next, wrong) = (*i as i32).overflowing_add(*by as i32);
                bad |= u32::from(wrong) & on;
                *i = next as u32;
            }
            self.words[index] = out;
            if bad != 0 {
                let by = self.words[step][m.lo] as i32;
                return Err(Stop { at, ..Stop::at(m.lo, Fault::Overflow(i32::MAX.into(), by.into())) });
            }
        }
    }

    fn operation(&mut self, code: &Code, m: &Mask) -> Result<(), Stop> {
        match code {
            Code::Unary { op, ty, d, a } => self.unary(*op, *ty, *d, *a, m)?,
            Code::Binary { op, ty, d, a, b } => self.binary(*op, *ty, [*d, *a, *b], m)?,
            Code::Compare { op, ty, d, a, b } => self.compare(*op, *ty, [*d, *a, *b], m),
            Code::Fma { d, a, b, c } => self.word3(m, [*d, *a, *b, *c], float::fma),
            Code::Select { ty, d, cond, a, b } => match ty {
                Scalar::Bool | Scalar::I32 | Scalar::U32 | Scalar::F32 => {
                    self.word3(m, [*d, *cond, *a, *b], |c, a, b| if c != 0 { a } else { b });
                }
                Scalar::I64 => {
                    for t in m.active() {
                        let from = if self.words[*cond as usize][t] != 0 { a } else { b };
                        self.longs[*d as usize][t] = self.longs[*from as usize][t];
                    }
                }
            },
            Code::Convert { from, to, d, a } => self.convert(*from, *to, *d, *a, m),
            Code::FunnelShr { d, lo, hi, shift } => self.word3(m, [*d, *lo, *hi, *shift], |lo, hi, s| {
                ((u64::from(hi) << 32 | u64::from(lo)) >> (s % 32)) as u32
            }),
            Code::Permute { d, a, b, selector } => self.word2(m, [*d, *a, *b], |a, b| permute(a, b, *selector)),
            Code::Dot4 { d, a, b, acc } => self.checked3(m, [*d, *a, *b, *acc], dot4)?,
            Code::Dot2 { d, a, b, high, acc } => {
                let from = if *high { 16 } else { 0 };
                self.checked3(m, [*d, *a, *b, *acc], |a, b, acc| dot2(a, b >> from, acc))?;
            }
            Code::Halves { op, d, a, b } => {
                let each =
                    |f: fn(f64, f64) -> f64| move |a, b| halves(a, b, 0, |a, b, _| round(f(number(a), number(b))));
                match op {
                    HalvesOp::Sub => self.word2(m, [*d, *a, *b], each(|a, b| a - b)),
                    HalvesOp::Mul => self.word2(m, [*d, *a, *b], each(|a, b| a * b)),
                }
            }
            Code::PermuteBy { d, a, b, c } => self.word3(m, [*d, *a, *b, *c], permute),
            Code::AddMin { d, a, b, c } => {
                self.word3(m, [*d, *a, *b, *c], |a, b, c| halves(a, b, c, |a, b, c| a.wrapping_add(b).min(c)))
            }
            Code::Load { mem, elem, unit, index, d } => {
                let e = (*elem, *unit);
                let half = |p: &[u8]| u16::from_le_bytes([p[0], p[1]]);
                match *elem {
                    Elem::I8 => self.load(m, *mem, e, *index, d, |p| p[0] as i8 as u32)?,
                    Elem::U8 => self.load(m, *mem, e, *index, d, |p| p[0].into())?,
                    Elem::I16 => self.load(m, *mem, e, *index, d, |p| half(p) as i16 as u32)?,
                    Elem::U16 => self.load(m, *mem, e, *index, d, |p| half(p).into())?,
                    Elem::F16 => self.load(m, *mem, e, *index, d, |p| float::from_f16(half(p)))?,
                    Elem::BF16 => self.load(m, *mem, e, *index, d, |p| float::from_bf16(half(p)))?,
                    Elem::I32 | Elem::U32 | Elem::F32 => {
                        self.load(m, *mem, e, *index, d, |p| u32::from_le_bytes([p[0], p[1], p[2], p[3]]))?;
                    }
                }
            }
            Code::LoadMatrix { mem, row, at, d } => self.load_matrix(m, *mem, [*row, *at], d)?,
            Code::Store { mem, elem, index, value } => {
                let e = *elem;
                match e {
                    Elem::I8 | Elem::U8 => self.store(m, *mem, e, *index, value, |p, x| p[0] = x as u8)?,
                    Elem::I16 | Elem::U16 => {
                        self.store(m, *mem, e, *index, value, |p, x| p.copy_from_slice(&(x as u16).to_le_bytes()))?;
                    }
                    Elem::F16 => self.store(m, *mem, e, *index, value, |p, x| {
                        p.copy_from_slice(&float::to_f16(x).to_le_bytes());
                    })?,
                    Elem::BF16 => self.store(m, *mem, e, *index, value, |p, x| {
                        p.copy_from_slice(&float::to_bf16(x).to_le_bytes());
                    })?,
                    Elem::I32 | Elem::U32 | Elem::F32 => {
                        self.store(m, *mem, e, *index, value, |p, x| p.copy_from_slice(&x.to_le_bytes()))?;
                    }
                }
            }
            Code::AtomicAdd { mem, ty, d, index, value } => self.atomic_add(m, *mem, *ty, [*d, *index, *value])?,
            Code::Shuffle { mode, d, value, arg } => {
                for warp in m.warps()? {
                    for t in warp * 32..warp * 32 + 32 {
                        let arg = self.words[*arg as usize][t];
                        let lane = match mode {
                            ShuffleMode::Index => arg % 32,
                            ShuffleMode::Xor => (t as u32 ^ arg) % 32,
                        };
                        self.words[*d as usize][t] = self.words[*value as usize][warp * 32 + lane as usize];
                    }
                }
            }
            Code::Across { op, d, value } => {
                for warp in m.warps()? {
                    let lanes = warp * 32..warp * 32 + 32;
                    let values = self.words[*value as usize][lanes.clone()].iter().copied();
                    let one = match op {
                        AcrossOp::Add => values.fold(0u32, u32::wrapping_add),
                        AcrossOp::Max => values.fold(0, u32::max),
                    };
                    self.words[*d as usize][lanes].fill(one);
                }
            }
            Code::Mma { signed_a, a, b, acc, d } => {
                for warp in m.warps()? {
                    self.mma(warp * 32, *signed_a, a, b, acc, d)?;
                }
            }
            Code::MmaGroup { signed_a, fresh, a, acc, array, first, stride } => {
                for rank in m.groups(self.block)? {
                    for group in (rank * self.block..(rank + 1) * self.block).step_by(128) {
                        if *fresh {
                            for r in acc.iter().flatten() {
                                self.words[*r as usize][group..group + 128].fill(0);
                            }
                        }
                        self.mma_group(group, *signed_a, (a, acc), (*array, *first, *stride))?;
                    }
                }
            }
            Code::Copy { ty, d, a } => match ty {
                Scalar::Bool | Scalar::I32 | Scalar::U32 | Scalar::F32 => {
                    let mut out = take(&mut self.words[*d as usize]);
                    let r = m.lo..m.hi;
                    let from = out[r.clone()].iter_mut().zip(&self.words[*a as usize][r.clone()]).zip(&m.on[r]);
                    for ((o, x), on) in from {
                        *o = (*o & !on) | (x & on);
                    }
                    self.words[*d as usize] = out;
                }
                Scalar::I64 => {
                    for t in m.active() {
                        self.longs[*d as usize][t] = self.longs[*a as usize][t];
                    }
                }
            },
            Code::If { .. } | Code::For { .. } => unreachable!("run apart"),
            Code::Barrier => {
                for rank in m.groups(self.block)? {
                    self.shared.ranks[rank].barrier();
                }
            }
            Code::ClusterBarrier => {
                for _ in m.groups(self.threads)? {
                    self.shared.ranks.iter_mut().for_each(SharedMemory::barrier);
                }
            }
            Code::WarpSync => {
                for warp in m.warps()? {
                    let (shared, first) = self.shared.of(warp * 32);
                    shared.warp_sync(first / 32);
                }
            }
            Code::AsyncCopy { dst, dst_index, src, src_index, bytes } => {
                self.async_copy(m, (*dst, *dst_index), (*src, *src_index), *bytes)?;
            }
            Code::AsyncCommit => self.each_shared(m, SharedMemory::commit),
            Code::AsyncWait { pending } => self.each_shared(m, |shared, t| shared.wait(*pending, t)),
            Code::GroupFence => self.each_shared(m, SharedMemory::group_fence),
        }
        Ok(())
    }

    /// `f` for each active thread, with its block's shared memory and its number there.
    fn each_shared(&mut self, m: &Mask, f: impl Fn(&mut SharedMemory, usize)) {
        for t in m.active() {
            let (shared, t) = self.shared.of(t);
            f(shared, t);
        }
    }

    fn place(&self, mem: Mem, elem: Elem, lanes: usize) -> Place {
        let size = match mem {
            Mem::Global(i) => {
                let bytes = self.buffers[i as usize].bytes().len();
                // What lies beyond the length that the kernel states is none of its business.
                let stated = self.kernel.params[i as usize].len.map(|_| self.kernel.least_bytes(i as usize) as usize);
                stated.map_or(bytes, |stated| stated.min(bytes))
            }
            Mem::Shared(i) => self.shared.size(i),
        };
        Place { elem, lanes: lanes as u32, unit: elem.bytes(), size }
    }

    pub(super) fn name(&self, mem: Mem) -> &str {
        self.kernel.mem(mem).0
    }

    fn load(
        &mut self,
        m: &Mask,
        mem: Mem,
        (elem, unit): (Elem, u32),
        index: Reg,
        d: &[Reg],
        read: impl Fn(&[u8]) -> u32,
    ) -> Result<(), Stop> {
        let place = Place { unit, ..self.place(mem, elem, d.len()) };
        let width = elem.bytes() as usize;
        let bytes = width * d.len();
        let mut out: Vec<Vec<u32>> = d.iter().map(|r| take(&mut self.words[*r as usize])).collect();
        for t in m.active() {
            let i = self.words[index as usize][t];
            let Some(offset) = place.offset(i) else {
                return Err(Stop::at(t, place.fault(self.name(mem), i)));
            };
            let from = match mem {
                Mem::Global(b) => self.buffers[b as usize].bytes(),
                Mem::Shared(s) => {
                    let (shared, local) = self.shared.of(t);
                    let noted = shared.note_read(s, offset, bytes, local);
                    noted.map_err(|bad| Stop::at(t, bad.fault(self.name(mem))))?;
                    self.shared.of(t).0.array(s)
                }
            };
            for (o, p) in out.iter_mut().zip(from[offset..offset + bytes].chunks_exact(width)) {
                o[t] = read(p);
            }
        }
        for (r, o) in d.iter().zip(out) {
            self.words[*r as usize] = o;
        }
        let total = bytes as u64 * u64::from(m.count);
        match mem {
            Mem::Global(_) => self.report.global_loaded += total,
            Mem::Shared(_) => self.report.shared_loaded += total,
        }
        Ok(())
    }

    fn store(
        &mut self,
        m: &Mask,
        mem: Mem,
        elem: Elem,
        index: Reg,
        value: &[Reg],
        write: impl Fn(&mut [u8], u32),
    ) -> Result<(), Stop> {
        let place = self.place(mem, elem, value.len());
        let width = elem.bytes() as usize;
        let bytes = width * value.len();
        for t in m.active() {
            let i = self.words[index as usize][t];
            let Some(offset) = place.offset(i) else {
                return Err(Stop::at(t, place.fault(self.name(mem), i)));
            };
            let to = match mem {
                Mem::Global(b) => self.buffers[b as usize].bytes_mut(),
                Mem::Shared(s) => {
                    let (shared, local) = self.shared.of(t);
                    let noted = shared.note_write(s, offset, bytes, local);
                    noted.map_err(|bad| Stop::at(t, bad.fault(self.name(mem))))?;
                    self.shared.of(t).0.array_mut(s)
                }
            };
            for (v, p) in value.iter().zip(to[offset..offset + bytes].chunks_exact_mut(width)) {
                write(p, self.words[*v as usize][t]);
            }
        }
        let total = bytes as u64 * u64::from(m.count);
        match mem {
            Mem::Global(_) => self.report.global_stored += total,
            Mem::Shared(_) => self.report.shared_stored += total,
        }
        Ok(())
    }

    fn atomic_add(&mut self, m: &Mask, mem: Mem, ty: Scalar, [d, index, value]: [Reg; 3]) -> Result<(), Stop> {
        let place = self.place(mem, Elem::U32, 1);
        for t in m.active() {
            let i = self.words[index as usize][t];
            let Some(offset) = place.offset(i) else {
                return Err(Stop::at(t, place.fault(self.name(mem), i)));
            };
            let to = match mem {
                Mem::Global(b) => self.buffers[b as usize].bytes_mut(),
                Mem::Shared(s) => {
                    let (shared, local) = self.shared.of(t);
                    let noted = shared.note_atomic(s, offset, local);
                    noted.map_err(|bad| Stop::at(t, bad.fault(self.name(mem))))?;
                    self.shared.of(t).0.array_mut(s)
                }
            };
            let cell = &mut to[offset..offset + 4];
            let old = u32::from_le_bytes([cell[0], cell[1], cell[2], cell[3]]);
            let x = self.words[value as usize][t];
            if ty == Scalar::I32 && (old as i32).checked_add(x as i32).is_none() {
                return Err(Stop::at(t, Fault::Overflow((old as i32).into(), (x as i32).into())));
            }
            cell.copy_from_slice(&old.wrapping_add(x).to_le_bytes());
            self.words[d as usize][t] = old;
        }
        let total = 4 * u64::from(m.count);
        match mem {
            Mem::Global(_) => {
                self.report.global_loaded += total;
                self.report.global_stored += total;
            }
            Mem::Shared(_) => {
                self.report.shared_loaded += total;
                self.report.shared_stored += total;
            }
        }
        Ok(())
    }

    /// Component by component: each lane's word of the row that another lane names.
    fn load_matrix(&mut self, m: &Mask, mem: Mem, [row, at]: [Reg; 2], d: &[Reg]) -> Result<(), Stop> {
        for (j, d) in d.iter().enumerate() {
            for warp in m.warps()? {
                for lane in 0..32 {
                    let named = warp * 32 + 8 * j + lane / 4;
                    let first = self.words[row as usize][named];
                    if !first.is_multiple_of(4) {
                        let place = self.place(mem, Elem::U32, 4);
                        return Err(Stop::at(named, place.fault(self.name(mem), first)));
                    }
                    self.words[at as usize][warp * 32 + lane] = first.wrapping_add(lane as u32 % 4);
                }
            }
            self.load(m, mem, (Elem::U32, 4), at, &[*d], |p| u32::from_le_bytes([p[0], p[1], p[2], p[3]]))?;
        }
        Ok(())
    }

    fn async_copy(&mut self, m: &Mask, dst: (u32, Reg), src: (u32, Reg), bytes: u32) -> Result<(), Stop> {
        let (to, from) = (Mem::Shared(dst.0), Mem::Global(src.0));
        let words = (bytes / 4) as usize;
        let (to_place, from_place) = (self.place(to, Elem::U32, words), self.place(from, Elem::U32, words));
        for t in m.active() {
            let offset = |mem: Mem, place: Place, index: Reg| {
                // Indices count copies, places count words.
                let i = self.words[index as usize][t] as i32;
                let i = i.saturating_mul(words as i32) as u32;
                place.offset(i).ok_or_else(|| Stop::at(t, place.fault(self.name(mem), i)))
            };
            let (to_offset, from_offset) = (offset(to, to_place, dst.1)?, offset(from, from_place, src.1)?);
            let data = &self.buffers[src.0 as usize].bytes()[from_offset..from_offset + bytes as usize];
            let (shared, local) = self.shared.of(t);
            let started = shared.start_copy(dst.0, to_offset, data, local);
            started.map_err(|bad| Stop::at(t, bad.fault(self.name(to))))?;
        }
        self.report.global_loaded += u64::from(bytes) * u64::from(m.count);
        self.report.shared_stored += u64::from(bytes) * u64::from(m.count);
        Ok(())
    }
}
