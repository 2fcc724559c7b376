//! Specs, from the text to checked kernels; formatting; tables; plans.

use std::path::PathBuf;

use qp_codegen::cuda::{Target as Gpu, check, print};
use qp_codegen::ir::Elem;
use qp_codegen::kernels::dequantize::{self, Dequantize};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::product::Launch;
use qp_codegen::spec::{Quantizer, Shape, Value, load_alone, table_file};
use qp_codegen::syntax::{self, FileId};
use qp_codegen::{explain, palette};
use qp_runtime::plan::{Layer, Plan};
use qp_tests::random_specs::{Random, text_alone};

use super::Target;

pub fn targets() -> Vec<Target> {
    vec![
        Target { name: "specs", seeds: specs, words: WORDS, run: spec },
        Target { name: "random_specs", seeds: numbers, words: &[], run: random_spec },
        Target { name: "formatting", seeds: specs, words: WORDS, run: format },
        Target { name: "tables", seeds: tables, words: &["-128", "127", "32767", "#", "\n"], run: table },
        Target { name: "plans", seeds: plans, words: PLAN_WORDS, run: plan },
    ]
}

const WORDS: &[&str] = &[
    "quantizer q {",
    "family f(a) {",
    "fusion f {",
    "launch q + k",
    "use \"a\"",
    "mix(a, b)",
    "code {",
    "}",
    "{",
    "(",
    ")",
    "[",
    "]",
    ",",
    "window 16",
    "vector 2",
    "step [4, 5]",
    "block 2 x 128",
    "values i8 + 1/2",
    "values i16",
    "unit 1/32",
    "table t[256] = [",
    "table t[16] trained(seed = 1, rounds = 1, samples = 1) in \"t\"",
    "decode w {",
    "scale row",
    "scale matrix",
    "rotate none",
    "rotate hadamard(seed = 0)",
    "let a = ",
    "signs(w[0], w[1])",
    "t[w >> 3]",
    "byte(w, 1)",
    "sum_bytes(w)",
    "if ",
    "then ",
    "else ",
    "**",
    "<<",
    ">>",
    "==",
    "max(",
    "log2(",
    "0x9E3779B1",
    "1/2",
    "-",
    "~",
    "\"",
    "//",
    "///",
    "\u{feff}",
    "\u{202e}",
    "×",
];

/// The palette's texts with short tables, canonical texts, and what the random generator makes.
fn specs() -> Vec<Vec<u8>> {
    let folder = super::package();
    let mut seeds = Vec::new();
    for of in ["specs/pass", "specs/fail", "../specs"] {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(folder.join(of)).into_iter().flatten().flatten().map(|e| e.path()).collect();
        files.retain(|f| f.extension().is_some_and(|x| x == "qspec"));
        files.sort();
        seeds.extend(files.iter().filter_map(|f| std::fs::read(f).ok()));
    }
    seeds.extend(["nuq_2", "nuq_3"].iter().filter_map(|n| palette::get(n)).map(|q| q.canonical().into_bytes()));
    seeds.extend((0..20).map(|i| text_alone(&mut Random::new(i)).into_bytes()));
    seeds
}

/// A text with tables written in it, lowered and printed.
fn spec(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    match load_alone("input", &text) {
        Ok(library) => {
            let mut r = Random::new(input.len() as u64);
            library.warnings.render(false);
            library.quantizers.iter().take(2).for_each(|q| lower(q, &mut r));
            true
        }
        Err(e) => {
            // Messages are part of what must not fail.
            e.render(false);
            false
        }
    }
}

fn numbers() -> Vec<Vec<u8>> {
    (0..256u32).map(|i| i.to_le_bytes().to_vec()).collect()
}

/// A random spec of the generator, whose seed is the input.
fn random_spec(input: &[u8]) -> bool {
    let seed = input.iter().fold(input.len() as u64, |s, b| s.wrapping_mul(31).wrapping_add((*b).into()));
    let mut r = Random::new(seed);
    spec(text_alone(&mut r).as_bytes())
}

/// What a checked quantizer becomes must be valid and print, and its canonical text must mean the same.
fn lower(q: &Quantizer, r: &mut Random) {
    let shape = Shape { rows: r.within(1, 300), cols: r.within(1, 600) };
    let gpu = r.pick(&Gpu::ALL);
    let device = gpu.device();
    explain::explain(q, shape);
    if q.is_trained() {
        let again = load_alone("canonical", &q.canonical()).unwrap_or_else(|e| panic!("a canonical text: {e}"));
        assert_eq!(again.quantizers, std::slice::from_ref(q));
    }
    let op = Gemv { quantizer: q, shape, batch: r.within(1, 64), accumulate: r.once_in(2) };
    let kernels = [
        Launch::choose(&op, &device).lower(&op),
        dequantize::lower(&Dequantize { quantizer: q, shape, output: Elem::F16 }, device.sms),
    ];
    for kernel in kernels {
        print(check(&kernel, gpu).unwrap_or_else(|e| panic!("{e}")));
    }
}

fn format(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let Ok(once) = syntax::format(FileId(0), &text) else { return false };
    let twice = syntax::format(FileId(0), &once).unwrap_or_else(|_| panic!("formatted text does not parse"));
    assert_eq!(once, twice, "formatting is not stable");
    true
}

fn tables() -> Vec<Vec<u8>> {
    ["1 2 3 4\n-5 6 7 8\n", "# a table\n1\n2\n3\n4\n", ""].map(|t| t.as_bytes().to_vec()).into()
}

fn table(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let mut any = false;
    for (entries, vector) in [(1, 1), (2, 4), (4, 1), (1 << 20, 4)] {
        for value in [Value::I8, Value::I16] {
            any |= table_file::read(&text, entries, vector, value).is_ok();
        }
    }
    any
}

const PLAN_WORDS: &[&str] = &[
    "default = \"tcq_3\"",
    "[layers]",
    "[[groups]]",
    "fuse = [\"model.layers.*.self_attn.{q,k}_proj\"]",
    "\"keep\"",
    "*",
    "{a,b}",
    "\"tcq_4\"",
    "model.layers.0.mlp.down_proj",
    "= ",
    "'''",
    "\"",
    "\\u0000",
    "nuq_2",
    "none.qspec",
];

fn plans() -> Vec<Vec<u8>> {
    let texts = [
        "default = \"tcq_3\"\n",
        "default = \"nuq_3\"\n[layers]\n\"*.layers.*.mlp.{gate,up}_proj\" = \"nuq_2\"\n\"lm_head\" = \"keep\"\n\
         [[groups]]\nfuse = [\"model.layers.*.self_attn.{q,k,v}_proj\"]\n",
    ];
    texts.map(|t| t.as_bytes().to_vec()).into()
}

fn plan(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    // Files beside a plan are files: none of them here.
    let Ok(plan) = Plan::parse("input", &text, PathBuf::from("/nowhere")) else { return false };
    let names =
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    let mut layers: Vec<Layer> = (0..3)
        .flat_map(|i| names.map(|n| (format!("model.layers.{i}.{n}"), true)))
        .chain([("lm_head".to_owned(), false)])
        .map(|(name, by_default)| Layer { name, shape: Shape { rows: 64, cols: 128 }, by_default, input: Some(0) })
        .collect();
    layers[2].shape.cols = 256;
    match plan.resolve(&layers) {
        Ok(_) => true,
        Err(e) => {
            e.render(false);
            false
        }
    }
}
