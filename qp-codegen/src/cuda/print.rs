//! Kernel IR → CUDA C++ that includes nothing and is a function of kernel and target alone.
//!
//! Every float operation is an intrinsic with explicit rounding, so that nothing is contracted; signed arithmetic is
//! plain `int` (its overflow is undefined in the IR too), which lets the compiler fold addresses. Shared memory is one
//! dynamic array with constant offsets.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::fold::{self, Form, Plan};
use super::helpers::Helper;
use super::names::Names;
use super::{Checked, Target};
use crate::ir::*;

/// Width that comments are wrapped to.
const WIDTH: usize = 110;

/// The CUDA source of one kernel for the target that it was checked for.
pub fn print(kernel: Checked<'_>) -> String {
    print_module(&[kernel])
}

/// The CUDA source of several kernels, to be compiled in one go.
///
/// # Panics
/// If their names are not different, their targets not the same, or there is none.
pub fn print_module(kernels: &[Checked<'_>]) -> String {
    let target = kernels[0].target();
    let names: BTreeSet<&str> = kernels.iter().map(|k| k.kernel().name.as_str()).collect();
    assert!(names.len() == kernels.len() && kernels.iter().all(|k| k.target() == target), "kernels of one program");
    let mut helpers = BTreeSet::new();
    let texts: Vec<String> = kernels.iter().map(|k| Printer::new(k.kernel(), target, &mut helpers).kernel()).collect();
    let needed: Vec<Helper> = helpers.iter().filter_map(|h| h.needs()).collect();
    helpers.extend(needed);
    let mut out = format!("// For {target}.\n");
    for h in helpers {
        write!(out, "\n{}", h.text()).expect("writing to a string");
    }
    for text in texts {
        write!(out, "\n{text}").expect("writing to a string");
    }
    out
}

/// C++ type of an element in memory.
pub(super) fn memory_type(elem: Elem) -> &'static str {
    match elem {
        Elem::I8 => "signed char",
        Elem::U8 => "unsigned char",
        Elem::I16 => "short",
        Elem::U16 | Elem::F16 | Elem::BF16 => "unsigned short",
        Elem::I32 => "int",
        Elem::U32 => "unsigned",
        Elem::F32 => "float",
    }
}

/// C++ type of a value.
pub(super) fn vector_type(scalar: Scalar, lanes: u32) -> &'static str {
    match (scalar, lanes) {
        (Scalar::Bool, _) => "bool",
        (Scalar::I64, _) => "long long",
        (Scalar::I32, 1) => "int",
        (Scalar::I32, 2) => "int2",
        (Scalar::I32, _) => "int4",
        (Scalar::U32, 1) => "unsigned",
        (Scalar::U32, 2) => "uint2",
        (Scalar::U32, _) => "uint4",
        (Scalar::F32, 1) => "float",
        (Scalar::F32, 2) => "float2",
        (Scalar::F32, _) => "float4",
    }
}

fn type_of(ty: Type) -> &'static str {
    vector_type(ty.scalar, ty.lanes)
}

const COMPONENTS: [&str; 4] = ["x", "y", "z", "w"];

/// How tightly an expression binds, loosest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Binds {
    Choice,
    Logic,
    Bits,
    Compare,
    Shift,
    Sum,
    Product,
    Unary,
    Atom,
}

/// A printed expression.
struct Expr {
    text: String,
    binds: Binds,
}

impl Expr {
    fn atom(text: impl Into<String>) -> Expr {
        Expr { text: text.into(), binds: Binds::Atom }
    }

    /// As an operand that must bind at least as tightly as `least`.
    fn within(self, least: Binds) -> String {
        if self.binds >= least { self.text } else { format!("({})", self.text) }
    }
}

struct Printer<'k, 'h> {
    kernel: &'k Kernel,
    target: Target,
    helpers: &'h mut BTreeSet<Helper>,
    plan: Plan,
    names: Names,
    /// Names of values, variables, parameters and shared arrays.
    values: Vec<Option<String>>,
    vars: Vec<String>,
    params: Vec<String>,
    shared: Vec<String>,
    declared: Vec<bool>,
    /// Variables that products of warp groups add to.
    accumulators: BTreeSet<Var>,
    /// A grid wait is behind us.
    waited: bool,
    out: String,
    depth: usize,
}

impl<'k, 'h> Printer<'k, 'h> {
    fn new(kernel: &'k Kernel, target: Target, helpers: &'h mut BTreeSet<Helper>) -> Self {
        let mut names = Names::default();
        names.wish(&kernel.name);
        for s in SPECIALS {
            names.wish(special_name(s));
        }
        let params = kernel.params.iter().map(|p| names.wish(&p.name)).collect();
        let shared = kernel.shared.iter().map(|s| names.wish(&s.name)).collect();
        let vars = kernel.vars.iter().map(|v| match &v.name {
            Some(name) => names.wish(name),
            None => names.number("r"),
        });
        let vars = vars.collect();
        Printer {
            kernel,
            target,
            helpers,
            plan: fold::plan(kernel),
            names,
            values: vec![None; kernel.values.len()],
            vars,
            params,
            shared,
            declared: vec![false; kernel.vars.len()],
            accumulators: accumulators(&kernel.body),
            waited: false,
            out: String::new(),
            depth: 0,
        }
    }

    fn kernel(mut self) -> String {
        let k = self.kernel;
        for line in k.doc.lines() {
            self.comment(line);
        }
        let [x, y] = k.grid;
        self.line(&format!("// Grid {x} x {y}, {} threads, {} bytes of shared memory.", k.threads, k.shared_bytes()));
        let cluster = match k.cluster {
            1 => String::new(),
            n => format!("__cluster_dims__({n}, 1, 1) "),
        };
        let dependent = k.dependent_launch && self.target.has_dependent_launch();
        let waits = dependent && contains_wait(&k.body);
        self.line(&format!(
            "extern \"C\" __global__ void {cluster}__launch_bounds__({}, {}) {}(",
            k.threads,
            k.min_blocks.max(1),
            k.name
        ));
        for (i, p) in k.params.iter().enumerate() {
            let ty = match p.kind {
                ParamKind::Scalar(s) => format!("{} ", vector_type(s, 1)),
                ParamKind::Buffer { elem, writable: true } => format!("{}* ", memory_type(elem)),
                // `__restrict__` lets the compiler read early, but before the wait the kernel before may still write.
                ParamKind::Buffer { elem, .. } if waits => format!("const {}* ", memory_type(elem)),
                ParamKind::Buffer { elem, .. } => format!("const {}* __restrict__ ", memory_type(elem)),
            };
            let end = if i + 1 < k.params.len() { "," } else { ") {" };
            self.out += &format!("    {ty}{}{end}\n", self.params[i]);
        }
        if k.params.is_empty() {
            self.line(") {");
        }
        self.depth = 1;
        if !k.shared.is_empty() {
            self.line("extern __shared__ __align__(16) unsigned char smem[];");
        }
        for (i, s) in k.shared.iter().enumerate() {
            let ty = memory_type(s.elem);
            let (name, offset) = (&self.shared[i], k.shared_offset(i as u32));
            let line = format!("{ty}* const {name} = ({ty}*)(smem + {offset});  // {}", s.len);
            self.line(&line);
        }
        for s in SPECIALS {
            if k.values.iter().zip(&self.plan.uses).any(|(v, n)| v.op == Op::Special(s) && *n > 0) {
                let from = match s {
                    Special::Thread => "(int)threadIdx.x".into(),
                    Special::Lane => "(int)(threadIdx.x & 31u)".into(),
                    Special::Warp => "(int)(threadIdx.x >> 5)".into(),
                    Special::BlockX => "(int)blockIdx.x".into(),
                    Special::BlockY => "(int)blockIdx.y".into(),
                    Special::Cluster => format!("(int)(blockIdx.x / {}u)", k.cluster),
                    Special::Rank => format!("(int)(blockIdx.x % {}u)", k.cluster),
                };
                self.line(&format!("const int {} = {from};", special_name(s)));
            }
        }
        for (i, v) in k.vars.iter().enumerate() {
            if !self.plan.declared_at_set[i] {
                self.declared[i] = true;
                let line = format!("{} {};", type_of(v.ty), self.vars[i]);
                self.line(&line);
            }
        }
        self.block(&k.body);
        self.depth = 0;
        self.line("}");
        self.out
    }

    fn line(&mut self, text: &str) {
        for _ in 0..self.depth {
            self.out += "    ";
        }
        self.out += text;
        self.out.push('\n');
    }

    /// A comment, wrapped.
    fn comment(&mut self, text: &str) {
        let mut line = String::from("//");
        // A backslash at the end would swallow the next line.
        for word in text.trim_end_matches('\\').split_whitespace() {
            if line.len() + 1 + word.len() + 4 * self.depth > WIDTH && line.len() > 2 {
                self.line(line.trim_end_matches('\\'));
                line = "//".into();
            }
            line.push(' ');
            line += word;
        }
        self.line(&line);
    }

    fn block(&mut self, stmts: &[Stmt]) {
        for s in stmts {
            self.statement(s);
        }
    }

    fn nested(&mut self, stmts: &[Stmt]) {
        self.names.open();
        self.depth += 1;
        self.block(stmts);
        self.depth -= 1;
        self.names.close();
    }

    fn statement(&mut self, s: &Stmt) {
        match s {
            Stmt::Let(v) => self.define(*v),
            Stmt::Set(x, v) => {
                let i = x.0 as usize;
                let value = self.expr(*v).text;
                let ty = if self.declared[i] { String::new() } else { format!("{} ", type_of(self.kernel.vars[i].ty)) };
                self.declared[i] = true;
                let line = format!("{ty}{} = {value};", self.vars[i]);
                self.line(&line);
            }
            Stmt::Store { mem, index, value, elem } => {
                let lanes = self.kernel.value(*value).ty.lanes;
                let x = self.expr(*value);
                let line = match Helper::store(*elem, lanes) {
                    Some(h) => format!("{}({}, {});", self.helper(h), self.address(*mem, *index, *elem), x.text),
                    None if lanes > 1 => {
                        let ty = vector_type(elem.scalar(), lanes);
                        format!("*({ty}*)({}) = {};", self.address(*mem, *index, *elem), x.text)
                    }
                    None => {
                        let narrow = match elem {
                            Elem::I8 | Elem::U8 | Elem::I16 | Elem::U16 => {
                                format!("({}){}", memory_type(*elem), x.within(Binds::Unary))
                            }
                            Elem::F16 => format!("{}({})", self.helper(Helper::ToF16), x.text),
                            Elem::BF16 => format!("{}({})", self.helper(Helper::ToBf16), x.text),
                            Elem::I32 | Elem::U32 | Elem::F32 => x.text,
                        };
                        format!("{} = {narrow};", self.element(*mem, *index, *elem, false))
                    }
                };
                self.line(&line);
            }
            Stmt::If { cond, then, els } => {
                let line = format!("if ({}) {{", self.expr(*cond).text);
                self.line(&line);
                self.nested(then);
                if !els.is_empty() {
                    self.line("} else {");
                    self.nested(els);
                }
                self.line("}");
            }
            Stmt::For { index, start, end, step, unroll, body } => {
                let start = self.expr(*start).text;
                let end = self.expr(*end).within(Binds::Shift);
                let step = self.expr(*step).text;
                self.line(if *unroll { "#pragma unroll" } else { "#pragma unroll 1" });
                self.names.open();
                let i = match &self.kernel.value(*index).name {
                    Some(name) => self.names.wish(name),
                    None => self.names.wish("i"),
                };
                self.values[index.0 as usize] = Some(i.clone());
                let next = if step == "1" { format!("++{i}") } else { format!("{i} += {step}") };
                self.line(&format!("for (int {i} = {start}; {i} < {end}; {next}) {{"));
                self.nested(body);
                self.line("}");
                self.names.close();
            }
            Stmt::Barrier => self.line("__syncthreads();"),
            Stmt::ClusterBarrier => {
                self.line("asm volatile(\"barrier.cluster.arrive.release.aligned;\" ::: \"memory\");");
                self.line("asm volatile(\"barrier.cluster.wait.acquire.aligned;\" ::: \"memory\");");
            }
            Stmt::WarpSync => self.line("__syncwarp();"),
            Stmt::Fence => self.line("__threadfence();"),
            Stmt::Prefetch { src, index } => {
                let h = self.helper(Helper::Prefetch);
                let index = self.expr(*index).within(Binds::Product);
                let line = format!("{h}((const unsigned*){} + {index});", self.params[*src as usize]);
                self.line(&line);
            }
            Stmt::AsyncCopy { dst, dst_index, src, src_index, bytes } => {
                let h = self.helper(Helper::CopyAsync { bytes: *bytes as u8 });
                let scaled = |index: Expr| format!("{} * {bytes}", index.within(Binds::Product));
                let to = scaled(self.expr(*dst_index));
                let from = scaled(self.expr(*src_index));
                let dst = &self.shared[*dst as usize];
                let src = &self.params[*src as usize];
                let line =
                    format!("{h}((unsigned char*){dst} + {to}, (const unsigned char*){src} + (long long){from});");
                self.line(&line);
            }
            Stmt::AsyncCommit => self.line("asm volatile(\"cp.async.commit_group;\" ::: \"memory\");"),
            Stmt::AsyncWait { pending } => {
                self.line(&format!("asm volatile(\"cp.async.wait_group {pending};\" ::: \"memory\");"));
            }
            Stmt::GroupFence => self.line("asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\");"),
            Stmt::GroupWait { pending } => {
                self.line(&format!("asm volatile(\"wgmma.wait_group.sync.aligned {pending};\" ::: \"memory\");"));
            }
            Stmt::MmaGroup { signed_a, fresh, a, acc, mem, first, stride } => {
                let (groups, steps) = (acc.len() as u8, a.len() as u8);
                let h = self.helper(Helper::MmaGroup { signed_a: *signed_a, fresh: *fresh, groups, steps });
                let mut args: Vec<String> = acc.iter().map(|x| self.vars[x.0 as usize].clone()).collect();
                args.extend(a.iter().flatten().map(|v| self.expr(*v).text).collect::<Vec<_>>());
                let (from, mem) = (self.expr(*first).within(Binds::Product), &self.shared[*mem as usize]);
                let first = format!("((unsigned)__cvta_generic_to_shared({mem}) >> 4) + {from}");
                self.line(&format!("{h}({}, {first}, {stride}u);", args.join(", ")));
            }
            Stmt::GridWait => {
                self.grid_control("wait");
                self.waited = self.kernel.dependent_launch;
            }
            Stmt::GridLaunch => self.grid_control("launch_dependents"),
            Stmt::Comment(text) => text.lines().for_each(|l| self.comment(l)),
        }
    }

    fn grid_control(&mut self, what: &str) {
        if self.kernel.dependent_launch && self.target.has_dependent_launch() {
            self.line(&format!("asm volatile(\"griddepcontrol.{what};\" ::: \"memory\");"));
        } else {
            self.line(&format!("// griddepcontrol.{what}: not here."));
        }
    }

    fn helper(&mut self, h: Helper) -> String {
        self.helpers.insert(h);
        h.name()
    }

    /// What is multiplied with a power of two, and that, of a word that is shifted right then. The compiler would make a shift and
    /// a mask of both, two operations of the pipe that is first full, in place of one of it and a product.
    fn power(&self, op: BinaryOp, a: Val) -> Option<(Val, u32)> {
        let value = self.kernel.value(a);
        match value.op {
            Op::Binary(BinaryOp::Mul, x, by) if op == BinaryOp::Shr && value.ty == Type::U32 => {
                match self.kernel.value(by).op {
                    Op::Const(Const::U32(by)) if by.is_power_of_two() && self.values[a.0 as usize].is_none() => {
                        Some((x, by))
                    }
                    _ => None,
                }
            }
            _ => None,
        }
    }

    fn define(&mut self, v: Val) {
        let Value { op, ty, name } = self.kernel.value(v);
        if self.plan.form[v.0 as usize] != Form::Named {
            return;
        }
        let text = self.operation(op, *ty).text;
        if self.plan.uses[v.0 as usize] == 0 {
            return self.line(&format!("{text};"));
        }
        let name = match (name, op) {
            (Some(name), _) => self.names.wish(name),
            (None, Op::Load { mem, .. }) => {
                let prefix = format!("{}_", self.kernel.mem(*mem).0);
                self.names.number(&prefix)
            }
            (None, _) => self.names.number("v"),
        };
        self.line(&format!("const {} {name} = {text};", type_of(*ty)));
        self.values[v.0 as usize] = Some(name);
    }

    /// A value where it is used: its name, or its expression.
    fn expr(&mut self, v: Val) -> Expr {
        if let Some(name) = &self.values[v.0 as usize] {
            return Expr::atom(name.clone());
        }
        let Value { op, ty, name: _ } = self.kernel.value(v);
        self.operation(op, *ty)
    }

    fn args(&mut self, function: &str, args: &[Val]) -> Expr {
        let args: Vec<String> = args.iter().map(|a| self.expr(*a).text).collect();
        Expr::atom(format!("{function}({})", args.join(", ")))
    }

    fn cast(&mut self, ty: &str, a: Val) -> Expr {
        let a = self.expr(a).within(Binds::Unary);
        Expr { text: format!("({ty}){a}"), binds: Binds::Unary }
    }

    fn operation(&mut self, op: &Op, ty: Type) -> Expr {
        match op {
            Op::Const(c) => constant(*c),
            Op::Param(i) => Expr::atom(self.params[*i as usize].clone()),
            Op::Special(s) => Expr::atom(special_name(*s)),
            Op::LoopIndex => unreachable!("the validator refuses a `Let` of a loop index"),
            Op::Get(x) => {
                let var = self.vars[x.0 as usize].clone();
                if self.accumulators.contains(x) {
                    // To the compiler, the sums are there when the products have been started.
                    return Expr::atom(format!("{}({var})", self.helper(Helper::Finished)));
                }
                Expr::atom(var)
            }
            Op::Unary(op, a) => {
                let a = self.expr(*a);
                by_component(ty, &[a], |ops| unary(*op, ty.scalar, ops.remove(0)))
            }
            Op::Binary(op, a, b) => {
                let a = match self.power(*op, *a) {
                    Some((x, power)) => {
                        let (name, x) = (self.helper(Helper::Product), self.expr(x).text);
                        Expr::atom(format!("{name}({x}, {power}u)"))
                    }
                    None => self.expr(*a),
                };
                let b = self.expr(*b);
                by_component(ty, &[a, b], |ops| {
                    let a = ops.remove(0);
                    binary(*op, ty.scalar, a, ops.remove(0))
                })
            }
            Op::Compare(op, a, b) => {
                let sign = match op {
                    CompareOp::Eq => "==",
                    CompareOp::Ne => "!=",
                    CompareOp::Lt => "<",
                    CompareOp::Le => "<=",
                    CompareOp::Gt => ">",
                    CompareOp::Ge => ">=",
                };
                let (a, b) = (self.expr(*a).within(Binds::Shift), self.expr(*b).within(Binds::Shift));
                Expr { text: format!("{a} {sign} {b}"), binds: Binds::Compare }
            }
            Op::Fma(a, b, c) => {
                let ops = [self.expr(*a), self.expr(*b), self.expr(*c)];
                by_component(ty, &ops, |ops| {
                    Expr::atom(format!("__fmaf_rn({}, {}, {})", ops[0].text, ops[1].text, ops[2].text))
                })
            }
            Op::Select(c, a, b) => {
                let [c, a, b] = [c, a, b].map(|v| self.expr(*v).within(Binds::Logic));
                Expr { text: format!("{c} ? {a} : {b}"), binds: Binds::Choice }
            }
            Op::Convert(to, a) => self.convert(*to, *a),
            Op::Bitcast(to, a) => match (self.kernel.value(*a).ty.scalar, to) {
                (Scalar::F32, Scalar::I32) => self.args("__float_as_int", &[*a]),
                (Scalar::F32, Scalar::U32) => self.args("__float_as_uint", &[*a]),
                (Scalar::I32, Scalar::F32) => self.args("__int_as_float", &[*a]),
                (Scalar::U32, Scalar::F32) => self.args("__uint_as_float", &[*a]),
                (from, to) if from == *to => self.expr(*a),
                (_, to) => self.cast(vector_type(*to, 1), *a),
            },
            Op::FunnelShr { lo, hi, shift } => self.args("__funnelshift_r", &[*lo, *hi, *shift]),
            Op::Permute { a, b, selector } => {
                // `__byte_perm` has no sign replication.
                let name = if selector & 0x8888 == 0 { "__byte_perm".into() } else { self.helper(Helper::Permute) };
                let (a, b) = (self.expr(*a).text, self.expr(*b).text);
                Expr::atom(format!("{name}({a}, {b}, {selector:#06x}u)"))
            }
            Op::Dot4 { a, b, acc } => {
                let (a, b, acc) = (self.cast("int", *a).text, self.cast("int", *b).text, self.expr(*acc).text);
                Expr::atom(format!("__dp4a({a}, {b}, {acc})"))
            }
            Op::Dot2 { a, b, high, acc } => {
                let name = if *high { "__dp2a_hi" } else { "__dp2a_lo" };
                let (a, b, acc) = (self.cast("int", *a).text, self.cast("int", *b).text, self.expr(*acc).text);
                Expr::atom(format!("{name}({a}, {b}, {acc})"))
            }
            Op::Halves(op, a, b) => {
                let name = self.helper(Helper::Halves(*op));
                self.args(&name, &[*a, *b])
            }
            Op::PermuteBy(a, b, c) => {
                let h = self.helper(Helper::Permute);
                self.args(&h, &[*a, *b, *c])
            }
            Op::AddMin(a, b, c) => self.args("__viaddmin_u16x2", &[*a, *b, *c]),
            Op::Vector(parts) => self.args(&format!("make_{}", type_of(ty)), parts),
            Op::Extract(a, i) => {
                let a = self.expr(*a).within(Binds::Atom);
                Expr::atom(format!("{a}.{}", COMPONENTS[*i as usize]))
            }
            Op::Load { mem, index, elem, lanes, cache } => self.load(*mem, *index, *elem, *lanes, *cache),
            Op::LoadMatrix { mem, row, lanes } => {
                let name = self.helper(Helper::LoadMatrix { lanes: *lanes as u8 });
                let from = self.address(*mem, *row, Elem::U32);
                Expr::atom(format!("{name}({from})"))
            }
            Op::AtomicAdd { mem, index, value } => {
                let elem = if ty.scalar == Scalar::I32 { Elem::I32 } else { Elem::U32 };
                let (to, x) = (self.address(*mem, *index, elem), self.expr(*value).text);
                Expr::atom(format!("atomicAdd({to}, {x})"))
            }
            Op::Shuffle { mode, value, arg } => {
                let name = match mode {
                    ShuffleMode::Index => "__shfl_sync",
                    ShuffleMode::Xor => "__shfl_xor_sync",
                };
                let (value, arg) = (self.expr(*value).text, self.expr(*arg).text);
                Expr::atom(format!("{name}(0xffffffffu, {value}, {arg})"))
            }
            Op::Across(op, value) => {
                let name = match op {
                    AcrossOp::Add => "__reduce_add_sync",
                    AcrossOp::Max => "__reduce_max_sync",
                };
                Expr::atom(format!("{name}(0xffffffffu, {})", self.expr(*value).text))
            }
            Op::MmaI8 { signed_a, a, b, acc } => {
                let name = self.helper(Helper::Mma { signed_a: *signed_a });
                let args: Vec<Val> = a.iter().chain(b).chain([acc]).copied().collect();
                self.args(&name, &args)
            }
        }
    }

    fn convert(&mut self, to: Scalar, a: Val) -> Expr {
        let from = self.kernel.value(a).ty.scalar;
        match (from, to) {
            (Scalar::F32, Scalar::I32) => self.args("__float2int_rn", &[a]),
            (Scalar::F32, Scalar::U32) => self.args("__float2uint_rn", &[a]),
            (Scalar::F32, Scalar::I64) => {
                let name = self.helper(Helper::RoundToI64);
                self.args(&name, &[a])
            }
            (Scalar::I32, Scalar::F32) => self.args("__int2float_rn", &[a]),
            (Scalar::U32 | Scalar::Bool, Scalar::F32) => self.args("__uint2float_rn", &[a]),
            (Scalar::I64, Scalar::F32) => self.args("__ll2float_rn", &[a]),
            (from, to) if from == to => self.expr(a),
            (Scalar::Bool | Scalar::I32 | Scalar::U32 | Scalar::I64 | Scalar::F32, to) => {
                self.cast(vector_type(to, 1), a)
            }
        }
    }

    fn load(&mut self, mem: Mem, index: Val, elem: Elem, lanes: u32, cache: Cache) -> Expr {
        // What the kernel before has written while this one was running is not read-only to the hardware.
        let cache = if self.waited && cache == Cache::ReadOnly { Cache::Default } else { cache };
        if let Some(h) = Helper::load(cache, self.waited, elem, lanes) {
            let name = self.helper(h);
            let from = self.address(mem, index, elem);
            return Expr::atom(format!("{name}({from})"));
        }
        if lanes > 1 {
            let ty = vector_type(elem.scalar(), lanes);
            let from = self.address(mem, index, elem);
            return Expr { text: format!("*(const {ty}*)({from})"), binds: Binds::Unary };
        }
        let x = if self.kernel.value(index).ty == Type::U32 {
            let text = format!("*(const {}*)({})", memory_type(elem), self.address(mem, index, elem));
            Expr { text, binds: Binds::Unary }
        } else {
            Expr::atom(self.element(mem, index, elem, true))
        };
        match elem {
            Elem::F16 => Expr::atom(format!("{}({})", self.helper(Helper::FromF16), x.text)),
            Elem::BF16 => Expr::atom(format!("{}({})", self.helper(Helper::FromBf16), x.text)),
            Elem::I8 | Elem::U8 | Elem::I16 | Elem::U16 | Elem::I32 | Elem::U32 | Elem::F32 => x,
        }
    }

    fn name_of(&self, mem: Mem) -> &str {
        match mem {
            Mem::Global(i) => &self.params[i as usize],
            Mem::Shared(i) => &self.shared[i as usize],
        }
    }

    /// A pointer to `elem`s, as an operand that binds tightly.
    fn base(&self, mem: Mem, elem: Elem, read: bool) -> String {
        let name = self.name_of(mem);
        let ty = memory_type(elem);
        if memory_type(self.kernel.mem(mem).1) == ty {
            return name.into();
        }
        format!("(({}{ty}*){name})", if read { "const " } else { "" })
    }

    /// One element as an expression that can be read and, unless `read`, written.
    fn element(&mut self, mem: Mem, index: Val, elem: Elem, read: bool) -> String {
        format!("{}[{}]", self.base(mem, elem, read), self.expr(index).text)
    }

    /// The address of an element.
    fn address(&mut self, mem: Mem, index: Val, elem: Elem) -> String {
        if self.kernel.value(index).ty == Type::U32 {
            let index = self.expr(index).within(Binds::Product);
            return format!("(const char*){} + {index}", self.name_of(mem));
        }
        let writable = match mem {
            Mem::Shared(_) => true,
            Mem::Global(i) => matches!(self.kernel.params[i as usize].kind, ParamKind::Buffer { writable: true, .. }),
        };
        format!("{} + {}", self.base(mem, elem, !writable), self.expr(index).within(Binds::Product))
    }
}

const SPECIALS: [Special; 7] =
    [Special::Thread, Special::Lane, Special::Warp, Special::BlockX, Special::BlockY, Special::Cluster, Special::Rank];

fn special_name(s: Special) -> &'static str {
    match s {
        Special::Thread => "thread",
        Special::Lane => "lane",
        Special::Warp => "warp",
        Special::BlockX => "block_x",
        Special::BlockY => "block_y",
        Special::Cluster => "cluster",
        Special::Rank => "rank",
    }
}

/// The variables that products of warp groups add to.
fn accumulators(stmts: &[Stmt]) -> BTreeSet<Var> {
    let own = |s: &Stmt| match s {
        Stmt::MmaGroup { acc, .. } => acc.clone(),
        _ => Vec::new(),
    };
    stmts.iter().flat_map(|s| s.nested().flat_map(|b| accumulators(b)).chain(own(s))).collect()
}

fn contains_wait(block: &[Stmt]) -> bool {
    block.iter().any(|s| *s == Stmt::GridWait || s.nested().any(|b| contains_wait(b)))
}

/// Prints an operation of scalars once, or once for each component of named vectors.
fn by_component(ty: Type, operands: &[Expr], f: impl Fn(&mut Vec<Expr>) -> Expr) -> Expr {
    let part = |c: Option<&str>| {
        let parts = operands.iter().map(|e| match c {
            None => Expr { text: e.text.clone(), binds: e.binds },
            Some(c) => Expr::atom(format!("{}.{c}", e.text)),
        });
        f(&mut parts.collect())
    };
    if ty.lanes == 1 {
        return part(None);
    }
    let parts: Vec<String> = COMPONENTS[..ty.lanes as usize].iter().map(|c| part(Some(c)).text).collect();
    Expr::atom(format!("make_{}({})", type_of(ty), parts.join(", ")))
}

fn unary(op: UnaryOp, ty: Scalar, a: Expr) -> Expr {
    let prefix = |sign: &str, a: Expr| Expr { text: format!("{sign}{}", a.within(Binds::Atom)), binds: Binds::Unary };
    match op {
        UnaryOp::Neg => prefix("-", a),
        UnaryOp::Not if ty == Scalar::Bool => prefix("!", a),
        UnaryOp::Not => prefix("~", a),
        UnaryOp::Abs if ty == Scalar::F32 => Expr::atom(format!("fabsf({})", a.text)),
        UnaryOp::Abs if ty == Scalar::I64 => Expr::atom(format!("llabs({})", a.text)),
        UnaryOp::Abs => Expr::atom(format!("abs({})", a.text)),
        UnaryOp::Sqrt => Expr::atom(format!("__fsqrt_rn({})", a.text)),
    }
}

fn binary(op: BinaryOp, ty: Scalar, a: Expr, b: Expr) -> Expr {
    let call = |name: &str, a: Expr, b: Expr| Expr::atom(format!("{name}({}, {})", a.text, b.text));
    // Left operands of one's own level need no brackets.
    let infix = |sign: &str, binds: Binds, a: Expr, b: Expr| {
        let tighter = match binds {
            Binds::Sum => Binds::Product,
            Binds::Product => Binds::Unary,
            // Mixed with others these are hard to read without.
            _ => Binds::Unary,
        };
        let left = match binds {
            Binds::Sum | Binds::Product => binds,
            _ => Binds::Unary,
        };
        Expr { text: format!("{} {sign} {}", a.within(left), b.within(tighter)), binds }
    };
    let float = ty == Scalar::F32;
    let logic = ty == Scalar::Bool;
    match op {
        BinaryOp::Add if float => call("__fadd_rn", a, b),
        BinaryOp::Sub if float => call("__fsub_rn", a, b),
        BinaryOp::Mul if float => call("__fmul_rn", a, b),
        BinaryOp::Div if float => call("__fdiv_rn", a, b),
        BinaryOp::Min if float => call("fminf", a, b),
        BinaryOp::Max if float => call("fmaxf", a, b),
        BinaryOp::And if logic => infix("&&", Binds::Logic, a, b),
        BinaryOp::Or if logic => infix("||", Binds::Logic, a, b),
        BinaryOp::Xor if logic => infix("!=", Binds::Compare, a, b),
        BinaryOp::Add => infix("+", Binds::Sum, a, b),
        BinaryOp::Sub => infix("-", Binds::Sum, a, b),
        BinaryOp::Mul => infix("*", Binds::Product, a, b),
        BinaryOp::Div => infix("/", Binds::Product, a, b),
        BinaryOp::Rem => infix("%", Binds::Product, a, b),
        BinaryOp::And => infix("&", Binds::Bits, a, b),
        BinaryOp::Or => infix("|", Binds::Bits, a, b),
        BinaryOp::Xor => infix("^", Binds::Bits, a, b),
        BinaryOp::Shl => infix("<<", Binds::Shift, a, b),
        BinaryOp::Shr => infix(">>", Binds::Shift, a, b),
        BinaryOp::Min => call("min", a, b),
        BinaryOp::Max => call("max", a, b),
    }
}

fn constant(c: Const) -> Expr {
    let signed = |text: String| {
        let binds = if text.starts_with('-') { Binds::Unary } else { Binds::Atom };
        Expr { text, binds }
    };
    match c {
        Const::Bool(x) => Expr::atom(x.to_string()),
        // The literal 2147483648 is no `int`.
        Const::I32(i32::MIN) => Expr::atom("(-2147483647 - 1)"),
        Const::I32(x) => signed(x.to_string()),
        Const::U32(x) if x < 1 << 16 => Expr::atom(format!("{x}u")),
        Const::U32(x) => Expr::atom(format!("{x:#x}u")),
        Const::I64(i64::MIN) => Expr::atom("(-9223372036854775807ll - 1)"),
        Const::I64(x) => signed(format!("{x}ll")),
        Const::F32(x) => signed(float(x)),
    }
}

/// A float literal of exactly this value: decimal where that is short, else hexadecimal.
fn float(x: f32) -> String {
    if !x.is_finite() {
        return format!("__uint_as_float({:#010x}u)", x.to_bits());
    }
    let decimal = format!("{x:?}f");
    let exact =
        x == 0.0 || (x.abs() < 1e6 && x.abs() > 1e-3 && decimal.len() <= 8 && f64::from(x).to_string().len() <= 8);
    if exact {
        return decimal;
    }
    let bits = x.to_bits();
    let (sign, exponent, fraction) = (if bits >> 31 == 1 { "-" } else { "" }, bits >> 23 & 255, bits & 0x7f_ffff);
    let (lead, exponent) = if exponent == 0 { (0, -126) } else { (1, exponent as i32 - 127) };
    let digits = format!("{:06x}", fraction << 1);
    let digits = digits.trim_end_matches('0');
    let point = if digits.is_empty() { "" } else { "." };
    format!("{sign}0x{lead}{point}{digits}p{exponent}f")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn float_literals_are_exact() {
        assert_eq!(float(0.5), "0.5f");
        assert_eq!(float(-0.0), "-0.0f");
        assert_eq!(float(16256.0), "16256.0f");
        assert_eq!(float(0.1), "0x1.99999ap-4f");
        assert_eq!(float(f32::from_bits(1)), "0x0.000002p-126f");
        assert_eq!(float(-f32::MAX), "-0x1.fffffep127f");
        assert_eq!(float(f32::INFINITY), "__uint_as_float(0x7f800000u)");
    }
}
