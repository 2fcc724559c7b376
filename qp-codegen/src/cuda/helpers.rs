//! Device functions that printed kernels call, where one expression of CUDA C++ will not do. Only those used are
//! printed, each once.

use super::print::{memory_type, vector_type};
use crate::ir::*;

/// A helper; the order is that of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Helper {
    FromF16,
    FromBf16,
    ToF16,
    ToBf16,
    RoundToI64,
    Permute,
    /// A product that stays one.
    Product,
    Halves(HalvesOp),
    /// Indices into the tables of elements and cache modes below.
    Load {
        cache: u8,
        coherent: bool,
        elem: u8,
        lanes: u8,
    },
    Store {
        elem: u8,
        lanes: u8,
    },
    Prefetch,
    CopyAsync {
        bytes: u8,
    },
    LoadMatrix {
        lanes: u8,
    },
    Mma {
        signed_a: bool,
    },
    /// `groups` accumulators of 8 columns, `steps` of 32 bytes of K.
    MmaGroup {
        signed_a: bool,
        fresh: bool,
        groups: u8,
        steps: u8,
    },
    /// Reads an accumulator of groups of warps, not before the wait for it.
    Finished,
}

const ELEMS: [Elem; 9] =
    [Elem::I8, Elem::U8, Elem::I16, Elem::U16, Elem::I32, Elem::U32, Elem::F16, Elem::BF16, Elem::F32];
const CACHES: [Cache; 3] = [Cache::Default, Cache::ReadOnly, Cache::Stream];

impl Helper {
    /// Loads that are no plain access. `coherent`: other kernels may have written the place during this launch.
    pub(super) fn load(cache: Cache, coherent: bool, elem: Elem, lanes: u32) -> Option<Helper> {
        let plain = cache == Cache::Default && (lanes == 1 || elem.bytes() == 4);
        (!plain).then(|| Helper::Load {
            cache: CACHES.iter().position(|c| *c == cache).expect("all modes are listed") as u8,
            coherent: coherent && cache != Cache::Default,
            elem: elem_index(elem),
            lanes: lanes as u8,
        })
    }

    /// Stores that are no plain access.
    pub(super) fn store(elem: Elem, lanes: u32) -> Option<Helper> {
        let plain = lanes == 1 || elem.bytes() == 4;
        (!plain).then(|| Helper::Store { elem: elem_index(elem), lanes: lanes as u8 })
    }

    /// What it is called.
    pub(super) fn name(self) -> String {
        let vector = |elem: u8, lanes: u8| match lanes {
            1 => ELEMS[elem as usize].to_string(),
            n => format!("{}x{n}", ELEMS[elem as usize]),
        };
        match self {
            Helper::FromF16 => "qp_from_f16".into(),
            Helper::FromBf16 => "qp_from_bf16".into(),
            Helper::ToF16 => "qp_to_f16".into(),
            Helper::ToBf16 => "qp_to_bf16".into(),
            Helper::RoundToI64 => "qp_round_to_i64".into(),
            Helper::Permute => "qp_permute".into(),
            Helper::Product => "qp_product".into(),
            Helper::Halves(HalvesOp::Sub) => "qp_sub_halves".into(),
            Helper::Halves(HalvesOp::Mul) => "qp_mul_halves".into(),
            Helper::Load { cache, coherent, elem, lanes } => {
                let mode = match CACHES[cache as usize] {
                    Cache::Default => "",
                    Cache::ReadOnly => "read_only_",
                    Cache::Stream => "stream_",
                };
                let coherent = if coherent { "coherent_" } else { "" };
                format!("qp_load_{mode}{coherent}{}", vector(elem, lanes))
            }
            Helper::Store { elem, lanes } => format!("qp_store_{}", vector(elem, lanes)),
            Helper::Prefetch => "qp_prefetch".into(),
            Helper::CopyAsync { bytes } => format!("qp_copy_async_{bytes}"),
            Helper::LoadMatrix { lanes } => format!("qp_load_matrix_x{lanes}"),
            Helper::Mma { signed_a: true } => "qp_mma_s8".into(),
            Helper::Mma { signed_a: false } => "qp_mma_u8".into(),
            Helper::MmaGroup { signed_a, fresh, groups, steps } => {
                let (a, fresh) = (if signed_a { "s8" } else { "u8" }, if fresh { "_fresh" } else { "" });
                format!("qp_mma_group{fresh}_{a}_n{}_k{}", u32::from(groups) * 8, u32::from(steps) * 32)
            }
            Helper::Finished => "qp_finished".into(),
        }
    }

    /// Helpers that this one calls.
    pub(super) fn needs(self) -> Option<Helper> {
        match self {
            Helper::Load { elem, .. } => match ELEMS[elem as usize] {
                Elem::F16 => Some(Helper::FromF16),
                Elem::BF16 => Some(Helper::FromBf16),
                Elem::I8 | Elem::U8 | Elem::I16 | Elem::U16 | Elem::I32 | Elem::U32 | Elem::F32 => None,
            },
            Helper::FromF16
            | Helper::FromBf16
            | Helper::ToF16
            | Helper::ToBf16
            | Helper::RoundToI64
            | Helper::Permute
            | Helper::Product
            | Helper::Halves(_)
            | Helper::Store { .. }
            | Helper::Prefetch
            | Helper::CopyAsync { .. }
            | Helper::LoadMatrix { .. }
            | Helper::Mma { .. }
            | Helper::MmaGroup { .. }
            | Helper::Finished => None,
        }
    }

    /// Its definition.
    pub(super) fn text(self) -> String {
        let (result, parameters, body) = match self {
            Helper::FromF16 => (
                "float".into(),
                "unsigned short x".into(),
                "float y;\nasm(\"cvt.f32.f16 %0, %1;\" : \"=f\"(y) : \"h\"(x));\nreturn y;".into(),
            ),
            Helper::FromBf16 => {
                ("float".into(), "unsigned short x".into(), "return __uint_as_float((unsigned)x << 16);".into())
            }
            Helper::ToF16 => (
                "unsigned short".into(),
                "float x".into(),
                "unsigned short y;\nasm(\"cvt.rn.f16.f32 %0, %1;\" : \"=h\"(y) : \"f\"(x));\nreturn y;".into(),
            ),
            Helper::ToBf16 => (
                "unsigned short".into(),
                "float x".into(),
                "unsigned short y;\nasm(\"cvt.rn.bf16.f32 %0, %1;\" : \"=h\"(y) : \"f\"(x));\nreturn y;".into(),
            ),
            Helper::RoundToI64 => {
                ("long long".into(), "float x".into(), "return x == x ? __float2ll_rn(x) : 0ll;".into())
            }
            Helper::Permute => (
                "unsigned".into(),
                "unsigned a, unsigned b, unsigned selector".into(),
                "unsigned y;\nasm(\"prmt.b32 %0, %1, %2, %3;\" : \"=r\"(y) : \"r\"(a), \"r\"(b), \"r\"(selector));\nreturn y;"
                    .into(),
            ),
            Helper::Product => (
                "unsigned".into(),
                "unsigned a, unsigned b".into(),
                "unsigned y;\nasm(\"mul.lo.u32 %0, %1, %2;\" : \"=r\"(y) : \"r\"(a), \"r\"(b));\nreturn y;".into(),
            ),
            Helper::Halves(op) => {
                let name = match op {
                    HalvesOp::Sub => "sub",
                    HalvesOp::Mul => "mul",
                };
                let body = format!(
                    "unsigned y;\nasm(\"{name}.rn.f16x2 %0, %1, %2;\" : \"=r\"(y) : \"r\"(a), \"r\"(b));\nreturn y;"
                );
                ("unsigned".into(), "unsigned a, unsigned b".into(), body)
            }
            Helper::Load { cache, coherent, elem, lanes } => {
                load(CACHES[cache as usize], coherent, ELEMS[elem as usize], lanes.into())
            }
            Helper::Store { elem, lanes } => store(ELEMS[elem as usize], lanes.into()),
            Helper::Prefetch => {
                let body = "asm volatile(\"prefetch.global.L2 [%0];\" :: \"l\"(at));";
                ("void".into(), "const void* at".into(), body.into())
            }
            Helper::CopyAsync { bytes } => {
                // Only whole 16 bytes can pass by the L1 cache.
                let level = if bytes == 16 { "cg" } else { "ca" };
                let body = format!(
                    "asm volatile(\"cp.async.{level}.shared.global [%0], [%1], {bytes};\"\n             \
                     :: \"r\"((unsigned)__cvta_generic_to_shared(to)), \"l\"(from) : \"memory\");"
                );
                ("void".into(), "void* to, const void* from".into(), body)
            }
            Helper::LoadMatrix { lanes } => {
                let components: Vec<String> = "xyzw".chars().take(lanes.into()).map(|c| format!("y.{c}")).collect();
                let places: Vec<String> = (0..lanes).map(|i| format!("%{i}")).collect();
                let outputs: Vec<String> = components.iter().map(|c| format!("\"=r\"({c})")).collect();
                let body = format!(
                    "uint{lanes} y;\nasm volatile(\"ldmatrix.sync.aligned.m8n8.x{lanes}.shared.b16 {{{}}}, [%{lanes}];\"\n             \
                     : {} : \"r\"((unsigned)__cvta_generic_to_shared(from)));\nreturn y;",
                    places.join(", "),
                    outputs.join(", "),
                );
                (format!("uint{lanes}"), "const void* from".into(), body)
            }
            Helper::Mma { signed_a } => {
                let a = if signed_a { "s8" } else { "u8" };
                let body = format!(
                    "asm volatile(\"mma.sync.aligned.m16n8k32.row.col.s32.{a}.s8.s32 \"\n             \
                     \"{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};\"\n             \
                     : \"+r\"(acc.x), \"+r\"(acc.y), \"+r\"(acc.z), \"+r\"(acc.w)\n             \
                     : \"r\"(a0), \"r\"(a1), \"r\"(a2), \"r\"(a3), \"r\"(b0), \"r\"(b1));\nreturn acc;"
                );
                let parameters = "unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, int4 acc";
                ("int4".into(), parameters.into(), body)
            }
            Helper::MmaGroup { signed_a, fresh, groups, steps } => {
                mma_group(signed_a, fresh, groups.into(), steps.into())
            }
            Helper::Finished => {
                let sums = ["x", "y", "z", "w"].map(|c| format!("\"+r\"(sum.{c})")).join(", ");
                ("int4".into(), "int4 sum".into(), format!("asm volatile(\"\" : {sums});\nreturn sum;"))
            }
        };
        let (result, parameters, body): (String, String, String) = (result, parameters, body);
        let body = body.replace('\n', "\n    ");
        format!("static __device__ __forceinline__ {result} {}({parameters}) {{\n    {body}\n}}\n", self.name())
    }
}

/// Result, parameters and body of products of warp groups.
///
/// B's descriptor holds, in units of 16 bytes: in bits 0 to 13 the address, from 16 on the distance of two units along K,
/// from 32 on that of two groups of 8 columns; zeros above: no swizzling.
fn mma_group(signed_a: bool, fresh: bool, groups: u32, steps: u32) -> (String, String, String) {
    let a = if signed_a { "s8" } else { "u8" };
    let list = |f: &dyn Fn(u32) -> String, n: u32| (0..n).map(f).collect::<Vec<_>>().join(", ");
    let sums = list(&|i| format!("%{i}"), 4 * groups);
    let mut text = vec!["wgmma.fence.sync.aligned;".to_string()];
    for step in 0..steps {
        let fragment = list(&|i| format!("%{}", 4 * (groups + step) + i), 4);
        let descriptor = 4 * (groups + steps) + step;
        text.push(format!("wgmma.mma_async.sync.aligned.m64n{}k32.s32.{a}.s8", 8 * groups));
        text.push(format!("    {{{sums}}},"));
        // Whether what the accumulators hold counts.
        let onto = u32::from(!fresh || step > 0);
        text.push(format!("    {{{fragment}}}, %{descriptor}, {onto};"));
    }
    text.push("wgmma.commit_group.sync.aligned;".into());
    let text: Vec<String> = text.iter().map(|line| format!("\"{line}\\n\"")).collect();
    // What is overwritten must not seem to be read: the assembler of CUDA 13.0 leaves products out whose accumulators, the same
    // registers, others overwrite later.
    let tie = if fresh { "=&r" } else { "+r" };
    let outputs = list(&|i| format!("\"{tie}\"(d{}.{})", i / 4, ["x", "y", "z", "w"][i as usize % 4]), 4 * groups);
    let inputs = list(&|i| format!("\"r\"(a{i})"), 4 * steps);
    let descriptors = list(&|i| format!("\"l\"(b + {i} * stride)", i = 2 * i), steps);
    let body = format!(
        "const unsigned long long b = 8ull << 32 | (stride << 16) + first;\n\
         asm volatile({}\n             : {outputs}\n             : {inputs}, {descriptors} : \"memory\");",
        text.join("\n             "),
    );
    let parameters = [
        list(&|i| format!("int4& d{i}"), groups),
        list(&|i| format!("unsigned a{i}"), 4 * steps),
        "unsigned first, unsigned stride".into(),
    ];
    ("void".into(), parameters.join(", "), body)
}

fn elem_index(elem: Elem) -> u8 {
    ELEMS.iter().position(|e| *e == elem).expect("all elements are listed") as u8
}

/// Widens one loaded element.
fn widened(elem: Elem, x: &str) -> String {
    match elem {
        Elem::F16 => format!("qp_from_f16({x})"),
        Elem::BF16 => format!("qp_from_bf16({x})"),
        Elem::I8 | Elem::U8 | Elem::I16 | Elem::U16 | Elem::I32 | Elem::U32 | Elem::F32 => x.into(),
    }
}

/// Result, parameters and body of a load.
fn load(cache: Cache, coherent: bool, elem: Elem, lanes: u32) -> (String, String, String) {
    let result = vector_type(elem.scalar(), lanes);
    let components: Vec<String> = (0..lanes).map(|i| format!("x{i}")).collect();
    let made = |parts: Vec<String>| match lanes {
        1 => format!("return {};", parts[0]),
        _ => format!("return make_{result}({});", parts.join(", ")),
    };
    let level = match cache {
        Cache::Default => {
            let ty = memory_vector(elem, lanes);
            let parts = "xyzw".chars().take(lanes as usize).map(|c| widened(elem, &format!("x.{c}"))).collect();
            let body = format!("const {ty} x = *(const {ty}*)from;\n{}", made(parts));
            return (result.into(), "const void* from".into(), body);
        }
        Cache::ReadOnly => "",
        Cache::Stream => ".L1::no_allocate.L2::256B",
    };
    let (ty, ptx, constraint) = match elem {
        Elem::I8 => ("int", "s8", "r"),
        Elem::U8 => ("unsigned", "u8", "r"),
        Elem::I16 => ("int", "s16", "r"),
        Elem::U16 => ("unsigned", "u16", "r"),
        Elem::I32 => ("int", "s32", "r"),
        Elem::U32 => ("unsigned", "u32", "r"),
        Elem::F16 | Elem::BF16 => ("unsigned short", "u16", "h"),
        Elem::F32 => ("float", "f32", "f"),
    };
    let vector = if lanes == 1 { String::new() } else { format!(".v{lanes}") };
    let places: Vec<String> = (0..lanes).map(|i| format!("%{i}")).collect();
    let places = if lanes == 1 { places[0].clone() } else { format!("{{{}}}", places.join(", ")) };
    let outputs: Vec<String> = components.iter().map(|x| format!("\"={constraint}\"({x})")).collect();
    // A streaming load is ordered: the assembler would otherwise move it behind the wait for the kernel before.
    let path = if coherent || cache == Cache::Stream { "ld.global" } else { "ld.global.nc" };
    let body = format!(
        "{ty} {};\nasm volatile(\"{path}{level}{vector}.{ptx} {places}, [%{lanes}];\"\n             \
         : {} : \"l\"(from));\n{}",
        components.join(", "),
        outputs.join(", "),
        made(components.iter().map(|x| widened(elem, x)).collect())
    );
    (result.into(), "const void* from".into(), body)
}

/// Result, parameters and body of a store of several narrow elements.
fn store(elem: Elem, lanes: u32) -> (String, String, String) {
    if let Some(half) = half_type(elem) {
        return store_halves(half, lanes);
    }
    let ty = memory_vector(elem, lanes);
    let parts: Vec<String> =
        "xyzw".chars().take(lanes as usize).map(|c| format!("({})x.{c}", memory_type(elem))).collect();
    let value = vector_type(elem.scalar(), lanes);
    ("void".into(), format!("void* to, {value} x"), format!("*({ty}*)to = make_{ty}({});", parts.join(", ")))
}

/// PTX's name of a half-precision type.
fn half_type(elem: Elem) -> Option<&'static str> {
    match elem {
        Elem::F16 => Some("f16"),
        Elem::BF16 => Some("bf16"),
        Elem::I8 | Elem::U8 | Elem::I16 | Elem::U16 | Elem::I32 | Elem::U32 | Elem::F32 => None,
    }
}

/// A store of 2 or 4 halves: one conversion makes a word of two.
fn store_halves(half: &str, lanes: u32) -> (String, String, String) {
    let convert = |word: &str, low: char, high: char| {
        format!("asm(\"cvt.rn.{half}x2.f32 %0, %1, %2;\" : \"=r\"({word}) : \"f\"(x.{high}), \"f\"(x.{low}));\n")
    };
    let body = match lanes {
        2 => format!("unsigned a;\n{}*(unsigned*)to = a;", convert("a", 'x', 'y')),
        _ => format!(
            "unsigned a, b;\n{}{}*(uint2*)to = make_uint2(a, b);",
            convert("a", 'x', 'y'),
            convert("b", 'z', 'w')
        ),
    };
    ("void".into(), format!("void* to, float{lanes} x"), body)
}

/// CUDA's vector of narrow elements.
fn memory_vector(elem: Elem, lanes: u32) -> String {
    let base = match elem {
        Elem::I8 => "char",
        Elem::U8 => "uchar",
        Elem::I16 => "short",
        Elem::U16 | Elem::F16 | Elem::BF16 => "ushort",
        Elem::I32 => "int",
        Elem::U32 => "uint",
        Elem::F32 => "float",
    };
    format!("{base}{lanes}")
}
