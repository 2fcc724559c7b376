//! The text form of the IR, for people: `{kernel}` prints one statement a line, values as `%0`, variables as `$0`.

use std::fmt::{self, Display, Formatter};

use super::*;

/// One statement in text form, without what is nested in it; traps and problems quote it.
pub fn statement(kernel: &Kernel, s: &Stmt) -> String {
    let value = |v: Val| ValText(kernel, v);
    let var = |v: Var| VarText(kernel, v);
    let mem = |m: Mem| MemText(kernel, m);
    match s {
        Stmt::Let(v) => format!("{}: {} = {}", value(*v), kernel.value(*v).ty, operation(kernel, *v)),
        Stmt::Set(x, v) => format!("set {} = {}", var(*x), value(*v)),
        Stmt::Store { mem: m, index, value: v, elem } => {
            format!("store {}[{}] as {elem} = {}", mem(*m), value(*index), value(*v))
        }
        Stmt::If { cond, .. } => format!("if {}", value(*cond)),
        Stmt::For { index, start, end, step, unroll, body: _ } => format!(
            "for {} in {}..{} step {}{}",
            value(*index),
            value(*start),
            value(*end),
            value(*step),
            if *unroll { " unrolled" } else { "" }
        ),
        Stmt::Barrier => "barrier".into(),
        Stmt::ClusterBarrier => "cluster_barrier".into(),
        Stmt::WarpSync => "warp_sync".into(),
        Stmt::Fence => "fence".into(),
        Stmt::Prefetch { src, index } => format!("prefetch {}[{}]", mem(Mem::Global(*src)), value(*index)),
        Stmt::AsyncCopy { dst, dst_index, src, src_index, bytes } => format!(
            "async_copy {}[{}] = {}[{}] bytes {bytes}",
            mem(Mem::Shared(*dst)),
            value(*dst_index),
            mem(Mem::Global(*src)),
            value(*src_index)
        ),
        Stmt::AsyncCommit => "async_commit".into(),
        Stmt::AsyncWait { pending } => format!("async_wait {pending}"),
        Stmt::GroupFence => "group_fence".into(),
        Stmt::GroupWait { pending } => format!("group_wait {pending}"),
        Stmt::MmaGroup { signed_a, fresh, a, acc, mem: m, first, stride } => format!(
            "mma_group_{}8s8 [{}] by {}[{} + {stride} u + n] {} [{}]",
            if *signed_a { "s" } else { "u" },
            a.iter().map(|a| list(kernel, a)).collect::<Vec<_>>().join(", "),
            mem(Mem::Shared(*m)),
            value(*first),
            if *fresh { "into" } else { "onto" },
            acc.iter().map(|x| var(*x).to_string()).collect::<Vec<_>>().join(", ")
        ),
        Stmt::GridWait => "grid_wait".into(),
        Stmt::GridLaunch => "grid_launch".into(),
        Stmt::Comment(text) => text.lines().map(|l| format!("; {l}")).collect::<Vec<_>>().join("\n"),
    }
}

/// A value's operation in text form.
fn operation(kernel: &Kernel, v: Val) -> String {
    let value = |v: &Val| ValText(kernel, *v);
    match &kernel.value(v).op {
        Op::Const(c) => match c {
            Const::Bool(x) => format!("{x}"),
            Const::I32(x) => format!("{x}"),
            Const::U32(x) => format!("{x:#x}"),
            Const::I64(x) => format!("{x}"),
            Const::F32(x) => format!("{x:?}"),
        },
        Op::Param(i) => format!("param {}", kernel.params.get(*i as usize).map_or("?", |p| &p.name)),
        Op::Special(s) => match s {
            Special::Thread => "thread".into(),
            Special::Lane => "lane".into(),
            Special::Warp => "warp".into(),
            Special::BlockX => "block.x".into(),
            Special::BlockY => "block.y".into(),
            Special::Cluster => "cluster".into(),
            Special::Rank => "rank".into(),
        },
        Op::LoopIndex => "loop index".into(),
        Op::Get(x) => format!("get {}", VarText(kernel, *x)),
        Op::Unary(op, a) => format!("{} {}", format!("{op:?}").to_lowercase(), value(a)),
        Op::Binary(op, a, b) => format!("{} {}, {}", format!("{op:?}").to_lowercase(), value(a), value(b)),
        Op::Compare(op, a, b) => format!("{} {}, {}", format!("{op:?}").to_lowercase(), value(a), value(b)),
        Op::Fma(a, b, c) => format!("fma {}, {}, {}", value(a), value(b), value(c)),
        Op::Select(c, a, b) => format!("select {} ? {} : {}", value(c), value(a), value(b)),
        Op::Convert(_, a) => format!("convert {}", value(a)),
        Op::Bitcast(_, a) => format!("bitcast {}", value(a)),
        Op::FunnelShr { lo, hi, shift } => format!("funnel_shr {}:{} by {}", value(hi), value(lo), value(shift)),
        Op::Permute { a, b, selector } => format!("permute {}:{} by {selector:#06x}", value(b), value(a)),
        Op::Dot2 { a, b, high, acc } => {
            let half = if *high { "high" } else { "low" };
            format!("dot2 {}, {half} {} onto {}", value(a), value(b), value(acc))
        }
        Op::Dot4 { a, b, acc } => format!("dot4 {}, {} onto {}", value(a), value(b), value(acc)),
        Op::Halves(op, a, b) => {
            format!("{}_halves {}, {}", format!("{op:?}").to_lowercase(), value(a), value(b))
        }
        Op::PermuteBy(a, b, c) => format!("permute {}:{} by {}", value(b), value(a), value(c)),
        Op::AddMin(a, b, c) => format!("add_min {}, {}, {}", value(a), value(b), value(c)),
        Op::Vector(parts) => format!("vector {}", list(kernel, parts)),
        Op::Extract(a, i) => format!("extract {}.{i}", value(a)),
        Op::Load { mem, index, elem, lanes, cache } => format!(
            "load {}[{}{}] as {elem}{}{}",
            MemText(kernel, *mem),
            value(index),
            if kernel.values.get(index.0 as usize).is_some_and(|v| v.ty == Type::U32) { " bytes" } else { "" },
            if *lanes == 1 { String::new() } else { format!("x{lanes}") },
            match cache {
                Cache::Default => "",
                Cache::ReadOnly => " read_only",
                Cache::Stream => " stream",
            }
        ),
        Op::LoadMatrix { mem, row, lanes } => {
            format!("load_matrix {}[{}] x{lanes}", MemText(kernel, *mem), value(row))
        }
        Op::AtomicAdd { mem, index, value: v } => {
            format!("atomic_add {}[{}] += {}", MemText(kernel, *mem), value(index), value(v))
        }
        Op::Shuffle { mode, value: v, arg } => match mode {
            ShuffleMode::Index => format!("shuffle {} from {}", value(v), value(arg)),
            ShuffleMode::Xor => format!("shuffle {} xor {}", value(v), value(arg)),
        },
        Op::Across(AcrossOp::Add, v) => format!("sum_across {}", value(v)),
        Op::Across(AcrossOp::Max, v) => format!("max_across {}", value(v)),
        Op::MmaI8 { signed_a, a, b, acc } => format!(
            "mma_{}8s8 {} by {} onto {}",
            if *signed_a { "s" } else { "u" },
            list(kernel, a),
            list(kernel, b),
            value(acc)
        ),
    }
}

fn list(kernel: &Kernel, parts: &[Val]) -> String {
    let parts: Vec<String> = parts.iter().map(|v| ValText(kernel, *v).to_string()).collect();
    format!("[{}]", parts.join(", "))
}

struct ValText<'k>(&'k Kernel, Val);

impl Display for ValText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.1.0)?;
        match self.0.values.get(self.1.0 as usize).and_then(|v| v.name.as_ref()) {
            Some(name) => write!(f, ".{name}"),
            None => Ok(()),
        }
    }
}

struct VarText<'k>(&'k Kernel, Var);

impl Display for VarText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "${}", self.1.0)?;
        match self.0.vars.get(self.1.0 as usize).and_then(|v| v.name.as_ref()) {
            Some(name) => write!(f, ".{name}"),
            None => Ok(()),
        }
    }
}

/// Total even on what the validator refuses: problems are quoted with it.
struct MemText<'k>(&'k Kernel, Mem);

impl Display for MemText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let name = match self.1 {
            Mem::Global(i) => self.0.params.get(i as usize).map(|p| &p.name),
            Mem::Shared(i) => self.0.shared.get(i as usize).map(|s| &s.name),
        };
        f.write_str(name.map_or("?", |n| n))
    }
}

impl Display for Scalar {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scalar::Bool => "bool",
            Scalar::I32 => "i32",
            Scalar::U32 => "u32",
            Scalar::I64 => "i64",
            Scalar::F32 => "f32",
        })
    }
}

impl Display for Type {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.lanes {
            1 => write!(f, "{}", self.scalar),
            n => write!(f, "{}x{n}", self.scalar),
        }
    }
}

impl Display for Elem {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Elem::I8 => "i8",
            Elem::U8 => "u8",
            Elem::I16 => "i16",
            Elem::U16 => "u16",
            Elem::I32 => "i32",
            Elem::U32 => "u32",
            Elem::F16 => "f16",
            Elem::BF16 => "bf16",
            Elem::F32 => "f32",
        })
    }
}

impl Display for Kernel {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for line in self.doc.lines() {
            writeln!(f, "{}", format!("; {line}").trim_end())?;
        }
        writeln!(f, "kernel {}", self.name)?;
        let [x, y] = self.grid;
        writeln!(f, "  grid {x} x {y}, threads {}, min_blocks {}", self.threads, self.min_blocks)?;
        if self.cluster > 1 {
            writeln!(f, "  cluster {}", self.cluster)?;
        }
        if self.dependent_launch {
            writeln!(f, "  dependent_launch")?;
        }
        if self.apart {
            writeln!(f, "  apart")?;
        }
        for p in &self.params {
            match p.kind {
                ParamKind::Buffer { elem, writable } => {
                    writeln!(f, "  buffer {}: {elem}{}", p.name, if writable { " writable" } else { "" })?;
                }
                ParamKind::Scalar(ty) => writeln!(f, "  scalar {}: {ty}", p.name)?,
            }
        }
        for s in &self.shared {
            writeln!(f, "  shared {}: {} x {}", s.name, s.elem, s.len)?;
        }
        for (i, v) in self.vars.iter().enumerate() {
            writeln!(f, "  var {}: {}", VarText(self, Var(i as u32)), v.ty)?;
        }
        writeln!(f, "{{")?;
        block(f, self, &self.body, 1)?;
        writeln!(f, "}}")
    }
}

fn block(f: &mut Formatter<'_>, kernel: &Kernel, stmts: &[Stmt], depth: usize) -> fmt::Result {
    let pad = "  ".repeat(depth);
    for s in stmts {
        let text = statement(kernel, s).replace('\n', &format!("\n{pad}"));
        write!(f, "{pad}{text}")?;
        match s {
            Stmt::If { cond: _, then, els } => {
                writeln!(f, " {{")?;
                block(f, kernel, then, depth + 1)?;
                if !els.is_empty() {
                    writeln!(f, "{pad}}} else {{")?;
                    block(f, kernel, els, depth + 1)?;
                }
                writeln!(f, "{pad}}}")?;
            }
            Stmt::For { body, .. } => {
                writeln!(f, " {{")?;
                block(f, kernel, body, depth + 1)?;
                writeln!(f, "{pad}}}")?;
            }
            Stmt::Let(_)
            | Stmt::Set(..)
            | Stmt::Store { .. }
            | Stmt::Barrier
            | Stmt::ClusterBarrier
            | Stmt::WarpSync
            | Stmt::Fence
            | Stmt::Prefetch { .. }
            | Stmt::AsyncCopy { .. }
            | Stmt::AsyncCommit
            | Stmt::AsyncWait { .. }
            | Stmt::GroupFence
            | Stmt::GroupWait { .. }
            | Stmt::MmaGroup { .. }
            | Stmt::GridWait
            | Stmt::GridLaunch
            | Stmt::Comment(_) => writeln!(f)?,
        }
    }
    Ok(())
}
