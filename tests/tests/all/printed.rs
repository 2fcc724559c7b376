//! Printed source means what the interpreter does: random programs are compiled by the system's C++ compiler, with a few
//! lines that stand in for CUDA, and must give the same bytes. Skipped where there is no `c++`.

use std::cell::Cell;
use std::fmt::Write as _;
use std::process::Command;

use qp_codegen::cuda::{self, Target};
use qp_codegen::ir::interpret::{Arg, Options, run};
use qp_codegen::ir::{Builder, Cache, Elem, Kernel, Mem, Scalar, Special, V, Var};

const THREADS: u32 = 64;
/// Results of each thread.
const SLOTS: i32 = 24;
const INPUT: u32 = 256;

/// What CUDA brings along, for one thread at a time.
const STAND_IN: &str = r#"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define VECTOR(T, N) struct N##2 { T x, y; }; struct N##4 { T x, y, z, w; }; \
    static N##2 make_##N##2(T x, T y) { return {x, y}; } static N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR(int, int) VECTOR(unsigned, uint) VECTOR(float, float)
static struct { unsigned x, y; } threadIdx, blockIdx;
template <class T> static T min(T a, T b) { return a < b ? a : b; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static float __fsqrt_rn(float a) { return sqrtf(a); }
static float __int2float_rn(int a) { return (float)a; }
static float __uint2float_rn(unsigned a) { return (float)a; }
static float __ll2float_rn(long long a) { return (float)a; }
static unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) {
    return (unsigned)(((unsigned long long)hi << 32 | lo) >> (s & 31));
}
static unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    unsigned long long x = (unsigned long long)b << 32 | a;
    unsigned y = 0;
    for (int i = 0; i < 4; ++i) y |= (unsigned)(x >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
    return y;
}
static unsigned __viaddmin_u16x2(unsigned a, unsigned b, unsigned c) {
    const unsigned low = (a + b) & 0xffff, high = ((a >> 16) + (b >> 16)) & 0xffff;
    return min(low, c & 0xffff) | min(high, c >> 16) << 16;
}
static int __dp2a_lo(int a, int b, int c) {
    return c + (short)a * (signed char)b + (short)(a >> 16) * (signed char)(b >> 8);
}
static int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, b >> 16, c); }
static int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
    return c;
}
"#;

struct Random(Cell<u64>);

impl Random {
    fn below(&self, n: usize) -> usize {
        self.0.set(self.0.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
        (self.0.get() >> 33) as usize % n
    }

    fn pick<T: Copy>(&self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// Values in sight; what a nested block makes is forgotten after it.
#[derive(Clone)]
struct Sight<'b> {
    /// Within ±1023.
    ints: Vec<V<'b>>,
    words: Vec<V<'b>>,
    floats: Vec<V<'b>>,
    vectors: Vec<V<'b>>,
}

struct Writer<'b> {
    b: &'b Builder,
    r: Random,
    input: Mem,
    output: Mem,
    /// Variables of each kind.
    int: Var,
    word: Var,
    float: Var,
    vector: Var,
    /// Next result, and the first of the thread's.
    slot: Cell<i32>,
    first: V<'b>,
}

impl<'b> Writer<'b> {
    fn int(&self, s: &Sight<'b>, depth: u32) -> V<'b> {
        if depth == 0 {
            return match self.r.below(6) {
                0 => self.b.i32(self.r.below(2047) as i32 - 1023),
                1 => self.b.get(self.int),
                _ => self.r.pick(&s.ints),
            };
        }
        let (x, y) = (self.int(s, depth - 1), self.int(s, self.r.below(depth as usize) as u32));
        match self.r.below(13) {
            0 => x + y,
            1 => x - y,
            2 if depth == 1 => x * y,
            3 => x & y,
            4 => x | y,
            5 => x ^ y,
            6 => x.min(y),
            7 => -x,
            8 => (x >> (y & 7)).max(y),
            9 => x / ((y & 15) + 1) - (y & 1023) % ((x & 31) + 1),
            10 => x.lt(y).select(x, y - 1),
            11 => !x,
            _ => self.truth(s).select(x, y),
        }
    }

    fn small(&self, s: &Sight<'b>) -> V<'b> {
        let x = self.int(s, 2);
        (x & 1023) - 512
    }

    fn word(&self, s: &Sight<'b>, depth: u32) -> V<'b> {
        if depth == 0 {
            return match self.r.below(6) {
                0 => self.b.u32(self.r.below(1 << 31) as u32),
                1 => self.b.get(self.word),
                2 => self.r.pick(&s.ints).bits(Scalar::U32),
                3 => self.r.pick(&s.vectors).lane(self.r.below(4) as u32),
                _ => self.r.pick(&s.words),
            };
        }
        let (x, y) = (self.word(s, depth - 1), self.word(s, self.r.below(depth as usize) as u32));
        match self.r.below(16) {
            0 => x + y,
            1 => x - y,
            14 => x.add_min(y, self.r.pick(&s.words)),
            2 => x * y,
            3 => x & y,
            4 => x | y,
            5 => x ^ y,
            6 => x << (y & 31),
            7 => x >> (y & 31),
            8 => x / (y | 1) + x % (y | 3),
            9 => x.permute(y, 0x6253),
            10 => x.funnel_shr(y, x),
            11 => (x & 0x0f0f_0f0f).dot4(y, self.r.pick(&s.ints)).bits(Scalar::U32),
            12 => (x & 0x0fff_0fff).dot2(y, true, self.r.pick(&s.ints)).bits(Scalar::U32),
            13 => (((x.to(Scalar::I64) << 7) - y.to(Scalar::I64) * 3) >> 5).to(Scalar::U32),
            _ => self.truth(s).select(x, y),
        }
    }

    fn float(&self, s: &Sight<'b>, depth: u32) -> V<'b> {
        if depth == 0 {
            return match self.r.below(6) {
                0 => self.b.f32((self.r.below(4000) as f32 - 2000.0) * 0.37),
                1 => self.b.get(self.float),
                2 => self.r.pick(&s.ints).to(Scalar::F32),
                3 => self.r.pick(&s.words).to(Scalar::F32),
                _ => self.r.pick(&s.floats),
            };
        }
        let (x, y) = (self.float(s, depth - 1), self.float(s, self.r.below(depth as usize) as u32));
        match self.r.below(9) {
            0 => x + y,
            1 => x - y,
            2 => x * y,
            3 => x / (y.abs() + 1.0),
            4 => x.fma(y, -x),
            5 => x.min(y),
            6 => x.abs().sqrt(),
            7 => -x,
            _ => self.truth(s).select(x, y),
        }
    }

    fn truth(&self, s: &Sight<'b>) -> V<'b> {
        let x = self.r.pick(&s.ints).lt(self.r.pick(&s.ints));
        let y = self.r.pick(&s.words).ge(self.r.pick(&s.words));
        match self.r.below(6) {
            0 => x & y,
            1 => x | y & !x,
            2 => x ^ y,
            3 => !(x | y),
            4 => self.r.pick(&s.floats).le(self.r.pick(&s.floats)),
            _ => y,
        }
    }

    fn result(&self, v: V<'b>, elem: Elem) {
        let slot = self.slot.get();
        if slot < SLOTS {
            self.b.store(self.output, self.first + slot, v, elem);
            self.slot.set(slot + 1);
        }
    }

    fn block(&self, mut s: Sight<'b>, depth: u32) {
        let b = self.b;
        for _ in 0..3 + self.r.below(5) {
            match self.r.below(if depth == 0 { 9 } else { 12 }) {
                0 => {
                    let v = self.small(&s);
                    s.ints.push(v);
                }
                1 => {
                    let v = self.word(&s, 3);
                    s.words.push(v);
                }
                2 => {
                    let v = self.float(&s, 3);
                    s.floats.push(v);
                }
                3 => {
                    let i = self.r.pick(&s.words);
                    let at = (i & 63).to(Scalar::I32) * 4;
                    s.vectors.push(b.load_as(self.input, at, Elem::U32, 4, Cache::Default));
                }
                4 => {
                    let (x, y) = (self.r.pick(&s.vectors), self.r.pick(&s.vectors));
                    let v = self.r.pick(&[x + y * x, x ^ !y, b.get(self.vector) - x]);
                    b.set(self.vector, v);
                    s.vectors.push(b.get(self.vector));
                }
                5 => {
                    let v = self.small(&s);
                    b.set(self.int, v);
                }
                6 => {
                    let (v, old) = (self.word(&s, 2), b.get(self.word));
                    b.set(self.word, v);
                    // Read before, used after.
                    s.words.push(old);
                    let v = old + b.get(self.word);
                    self.result(v, Elem::U32);
                }
                7 => {
                    let v = self.float(&s, 2);
                    b.set(self.float, v);
                }
                8 => {
                    let v = self.word(&s, 1) + self.int(&s, 2).bits(Scalar::U32);
                    self.result(v, Elem::U32);
                }
                9 => {
                    let c = self.truth(&s);
                    b.if_else(c, || self.block(s.clone(), depth - 1), || self.block(s.clone(), depth - 1));
                }
                _ => {
                    let (end, step) = (self.r.pick(&s.ints) & 3, 1 + self.r.below(2) as i32);
                    b.for_(0, end, step, |i| {
                        let mut inner = s.clone();
                        inner.ints.push(i);
                        self.block(inner, depth - 1);
                    });
                }
            }
        }
    }
}

fn program(seed: u64) -> Kernel {
    let b = Builder::new(&format!("program_{seed}"), [2, 1], THREADS);
    let input = b.buffer("x", Elem::U32, false);
    let output = b.buffer("y", Elem::U32, true);
    let gain = b.scalar("gain", Scalar::F32);
    let thread = b.special(Special::Thread);
    let at = b.special(Special::BlockX) * THREADS as i32 + thread;
    let word = b.load(input, at, Elem::U32);
    let vector = b.load_as(input, thread * 4, Elem::U32, 4, Cache::Default);
    let w = Writer {
        b: &b,
        r: Random(Cell::new(seed)),
        input,
        output,
        int: b.var(thread),
        word: b.var(word),
        float: b.var(gain),
        vector: b.var(vector),
        slot: Cell::new(0),
        first: at * SLOTS,
    };
    let sight = Sight { ints: vec![thread, at], words: vec![word], floats: vec![gain], vectors: vec![vector] };
    w.block(sight, 3);
    // All that is left in variables.
    let rest = [b.get(w.int).bits(Scalar::U32), b.get(w.word), b.get(w.vector).lane(3)];
    w.slot.set(w.slot.get().min(SLOTS - 4));
    for v in rest {
        w.result(v, Elem::U32);
    }
    let float = b.get(w.float);
    // NaNs have other bits on other machines.
    let float = float.eq(float).select(float, 0.0);
    b.store(output, w.first + (SLOTS - 1), float, Elem::F32);
    b.finish()
}

fn print_module(kernels: &[&Kernel]) -> String {
    cuda::print_module(
        &kernels.iter().map(|k| cuda::check(k, Target::Sm80).unwrap_or_else(|e| panic!("{e}"))).collect::<Vec<_>>(),
    )
}

#[test]
fn printed_programs_mean_what_the_interpreter_does() {
    if Command::new("c++").arg("--version").output().is_err() {
        qp_codegen::skipped::note("there is no C++ compiler (c++)");
        return;
    }
    let kernels: Vec<Kernel> = (0..60).map(program).collect();
    let input: Vec<u8> = {
        let r = Random(Cell::new(99));
        (0..INPUT).flat_map(|_| (r.below(1 << 31) as u32).wrapping_mul(3).to_le_bytes()).collect()
    };
    let mut expect = Vec::new();
    for k in &kernels {
        let mut out = vec![0; (2 * THREADS) as usize * SLOTS as usize * 4];
        let mut args = [Arg::ReadOnly(&input), Arg::Buffer(&mut out), Arg::F32(1.25)];
        run(k, &mut args, &Options::default()).unwrap_or_else(|t| panic!("{t}\n{k}"));
        expect.extend(out);
    }

    let mut source = STAND_IN.to_owned() + &print_module(&kernels.iter().collect::<Vec<_>>());
    let words: Vec<String> =
        input.chunks(4).map(|b| format!("{}u", u32::from_le_bytes(b.try_into().unwrap()))).collect();
    writeln!(source, "alignas(16) static const unsigned x[] = {{{}}};", words.join(", ")).unwrap();
    writeln!(source, "static unsigned y[{}];\nint main() {{", expect.len() / 4 / kernels.len()).unwrap();
    for k in &kernels {
        write!(
            source,
            "    memset(y, 0, sizeof y);\n    for (blockIdx.x = 0; blockIdx.x < 2; ++blockIdx.x)\n        \
             for (threadIdx.x = 0; threadIdx.x < {THREADS}; ++threadIdx.x) {}(x, y, 1.25f);\n    \
             fwrite(y, sizeof y, 1, stdout);\n",
            k.name
        )
        .unwrap();
    }
    source += "}\n";

    let folder = tempfile::tempdir().unwrap();
    let (file, binary) = (folder.path().join("programs.cpp"), folder.path().join("programs"));
    std::fs::write(&file, &source).unwrap();
    let options = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv"];
    let built = Command::new("c++").args(options).arg(&file).arg("-o").arg(&binary).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let got = Command::new(&binary).output().unwrap();
    assert!(got.status.success());
    let size = expect.len() / kernels.len();
    for ((k, got), want) in kernels.iter().zip(got.stdout.chunks(size)).zip(expect.chunks(size)) {
        let differs = got.iter().zip(want).position(|(a, b)| a != b);
        if let Some(at) = differs {
            let (thread, slot) = (at / 4 / SLOTS as usize, at / 4 % SLOTS as usize);
            panic!("thread {thread}, result {slot} differs in\n{k}\n{}", print_module(&[k]));
        }
    }
    assert_eq!(got.stdout.len(), expect.len());
    assert!(expect.iter().any(|b| *b != 0));
}
