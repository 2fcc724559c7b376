//! The language: the folder says what must happen to each example, and snapshots hold the exact messages.
//!
//! * `specs/pass`: loads; the snapshot holds warnings and the canonical text of what it defines.
//! * `specs/fail`: does not load; the snapshot holds the diagnostics as a user sees them.

use std::fs;
use std::path::{Path, PathBuf};

use qp_codegen::palette;
use qp_codegen::spec::{self, Quantizer, TableSource, load_str};
use qp_codegen::syntax::{self, FileId};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("specs").join(name)
}

/// The `.qspec` files of a folder, by name.
fn examples(name: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder(name)).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|x| x == "qspec"));
    files.sort();
    assert!(!files.is_empty());
    files
}

/// Messages name files by where the tests happen to lie.
fn without_place(text: &str) -> String {
    text.replace(&format!("{}/", folder("fail").display()), "").replace(&format!("{}/", folder("pass").display()), "")
}

fn name(file: &Path) -> String {
    file.file_stem().unwrap().to_string_lossy().into_owned()
}

#[test]
fn what_must_fail_fails_with_its_message() {
    for file in examples("fail") {
        let errors = spec::load_file(&file).expect_err(&name(&file));
        insta::assert_snapshot!(format!("fail__{}", name(&file)), without_place(&errors.render(false)));
    }
}

#[test]
fn what_must_pass_passes_and_means_the_same_when_canonical() {
    for file in examples("pass") {
        let library = spec::load_file(&file).unwrap_or_else(|e| panic!("{e}"));
        let mut text = without_place(&library.warnings.render(false));
        for f in &library.fusions {
            text.push_str(&format!("{f:#?}\n"));
        }
        for q in &library.quantizers {
            text.push_str(&q.canonical());
            let q = filled(q);
            let again = load_str("canonical", &q.canonical()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(again.quantizers, [q]);
        }
        for f in &library.formats {
            text.push_str(&f.canonical());
            let again = load_str("canonical", &f.canonical()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(again.formats, std::slice::from_ref(f));
        }
        insta::assert_snapshot!(format!("pass__{}", name(&file)), text);
    }
}

/// The quantizer with untrained tables filled with anything.
fn filled(q: &Quantizer) -> Quantizer {
    let mut q = q.clone();
    for c in &mut q.codes {
        let n = c.vector;
        for t in c.tables.iter_mut().filter(|t| t.values.is_empty()) {
            t.values = (0..t.entries * n).map(|i| (i % 251) as i16 - 125).collect();
            t.source = TableSource::Inline;
        }
    }
    q
}

#[test]
fn formatting_keeps_meaning_and_comments_and_is_stable() {
    for file in ["pass", "../../specs", "../../specs/formats"].into_iter().flat_map(examples) {
        let text = fs::read_to_string(&file).unwrap();
        let formatted = syntax::format(FileId(0), &text).unwrap();
        assert_eq!(syntax::format(FileId(0), &formatted).unwrap(), formatted, "{}", file.display());
        let squeeze = |t: &str| t.split_whitespace().collect::<String>();
        assert_eq!(squeeze(&formatted), squeeze(&text), "{}", file.display());
    }
}

/// Deterministic pseudo-random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

#[test]
fn mutated_texts_never_panic() {
    let mut texts: Vec<String> = Vec::new();
    for folder in ["pass", "fail", "../../specs", "../../specs/formats"] {
        texts.extend(examples(folder).iter().map(|f| fs::read_to_string(f).unwrap()));
    }
    let pieces = [
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "let ",
        "=",
        "\"",
        "//",
        "///",
        "\n",
        " ",
        "-",
        "**",
        "2 ** 126",
        "0xFFFFFFFF",
        "if ",
        "then ",
        "else ",
        "code {",
        "\u{2028}",
        "\r\n",
        "t[",
        "w",
        "signs(",
        "×",
        "é",
        "\u{0}",
        "family ",
        "quantizer ",
        "use \"x\"",
        "mix(",
        "1/0",
        "99999999999999999999999999999999999999999",
        "step",
        "decode w {",
        "<<",
        ">>",
        "~",
        "%",
        ",",
        ".",
        "0.5",
        "..",
        ":",
        "field ",
        "weight e {",
        "per 1 x 32",
        "layout l of q {",
        "function f(",
        "f(w)",
        "negate(",
        "bits ",
        " bit ",
        "[*, r]",
    ];
    let mut random = Random(1);
    for round in 0..6000 {
        let mut text = texts[random.below(texts.len())].clone();
        for _ in 0..1 + random.below(6) {
            let boundaries: Vec<usize> = text.char_indices().map(|c| c.0).chain([text.len()]).collect();
            let at = boundaries[random.below(boundaries.len())];
            match random.below(4) {
                0 => text.insert_str(at, pieces[random.below(pieces.len())]),
                1 => {
                    let later: Vec<usize> = boundaries.iter().copied().filter(|b| (at..at + 30).contains(b)).collect();
                    text.replace_range(at..later[random.below(later.len())], "");
                }
                2 => text.truncate(at),
                _ => {
                    let other = &texts[random.below(texts.len())];
                    let line = other.lines().nth(random.below(other.lines().count())).unwrap_or("").to_string();
                    text.insert_str(at, &line);
                }
            }
        }
        match load_str("mutated", &text) {
            // Whatever loads can be written and means the same again.
            Ok(library) => {
                for q in library.quantizers.iter().filter(|q| q.is_trained()) {
                    let again = load_str("canonical", &q.canonical()).unwrap_or_else(|e| panic!("{e}\n{text}"));
                    assert_eq!(again.quantizers, std::slice::from_ref(q), "round {round}\n{text}");
                }
                for f in &library.formats {
                    let again = load_str("canonical", &f.canonical()).unwrap_or_else(|e| panic!("{e}\n{text}"));
                    assert_eq!(again.formats, std::slice::from_ref(f), "round {round}\n{text}");
                }
            }
            Err(errors) => assert!(!errors.render(false).is_empty()),
        }
        if let Ok(formatted) = syntax::format(FileId(0), &text) {
            assert_eq!(syntax::format(FileId(0), &formatted).as_ref(), Ok(&formatted), "round {round}\n{text}");
        }
    }
}

#[test]
fn arguments_find_quantizers() {
    let of = |arg: &str| spec::resolve_untrained(arg).map(|q| q.name).map_err(|e| e.to_string());
    let pass = folder("pass").display().to_string();
    assert_eq!(of("tcq_2.5"), Ok("tcq_2.5".into()));
    for built_in in ["tcq_2.5.qspec", "specs/tcq_2.5.qspec"] {
        assert_eq!(of(built_in), Ok("tcq_2.5".into()), "wherever one is");
    }
    for missing in ["nowhere/tcq_2.5.qspec", "./tcq_2.5.qspec", "nowhere/q4_k.qspec", "other/specs/tcq_2.5.qspec"] {
        let e = spec::resolve_any(missing).unwrap_err().to_string();
        assert!(e.contains("cannot read") && e.contains("is named without a folder"), "{missing}: {e}");
    }
    let near = of(&format!("{pass}/minimul.qspec")).unwrap_err();
    assert!(near.contains("did you mean") && near.contains("minimal.qspec"), "{near}");
    for format in ["q4_k", "q4_k.qspec", "specs/formats/q4_k.qspec"] {
        assert_eq!(spec::resolve_any(format).unwrap().name(), "q4_k");
    }
    assert_eq!(of(&format!("{pass}/minimal.qspec")), Ok("q".into()));
    assert_eq!(of(&format!("{pass}/use.qspec:m")), Ok("m".into()));
    assert_eq!(of(&format!("{pass}/f_b.qspec")), Ok("f_b".into()), "defined by a file beside");
    assert_eq!(of("tcq_2_5"), Err("error: there is no quantizer or format `tcq_2_5`; did you mean `tcq_2.5`?".into()));
    let many = of(&format!("{pass}/use.qspec")).unwrap_err();
    assert!(many.contains("defines 3 quantizers") && many.contains("f_c, m, r"), "{many}");
    let missing = of(&format!("{pass}/minimal.qspec:z")).unwrap_err();
    assert!(missing.contains("there is no quantizer or format `z` in"), "{missing}");
    let untrained = spec::resolve(&format!("{pass}/constants.qspec:f_a")).unwrap_err().to_string();
    assert!(untrained.contains("not trained yet") && untrained.contains("qp train-codebook"), "{untrained}");
}

#[test]
fn table_files_are_read_and_renaming_keeps_the_hash() {
    let library = spec::load_file(folder("pass").join("use.qspec")).unwrap();
    let r = library.get("r").unwrap();
    assert_eq!(r.codes[0].codebook(), (-128..128).collect::<Vec<i16>>());
    let renamed = Quantizer { name: "other".into(), ..r.clone() };
    assert_eq!(renamed.hash(), r.hash());
    let mut changed = r.clone();
    changed.codes[0].tables[0].values[3] += 1;
    assert_ne!(changed.hash(), r.hash());
    assert!(palette::names().contains(&"fast_2"));
}

#[test]
fn what_is_used_twice_is_known_once() {
    load_str("twice", "use std\nuse palette\nuse std\nuse palette\n").unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn examples_of_the_reference_load() {
    let text = fs::read_to_string(folder("../../docs/language.md")).unwrap();
    let blocks: Vec<&str> = text.split("```qspec\n").skip(1).map(|b| b.split("```").next().unwrap()).collect();
    assert_eq!(blocks.len(), 5);
    for block in blocks {
        let library = load_str("language.md", block).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(library.warnings.to_string(), "");
    }
}

#[test]
fn a_text_that_stands_alone_opens_no_file() {
    let table = std::env::temp_dir().join("qp-no-such.table");
    let body = |table: &str| {
        format!(
            "quantizer q {{ window 4 vector 1 step 4 block 2 x 128 values i8 unit 1/32 {table}
             decode w {{ t[w] }} scale row rotate none }}"
        )
    };
    for table in [
        format!("table t[16] from \"{}\"", table.display()),
        "table t[16] from \"/etc/passwd\"".to_string(),
        "table t[16] trained(seed = 1, rounds = 1, samples = 1) in \"none\"".to_string(),
    ] {
        let e = spec::load_alone("a checkpoint's", &body(&table)).unwrap_err().to_string();
        assert!(e.contains("must stand alone") && !e.contains("root:"), "{e}");
    }
    let e = spec::load_alone("a checkpoint's", "use \"/etc/passwd\"").unwrap_err().to_string();
    assert!(e.contains("must stand alone"), "{e}");
}

#[test]
fn what_defines_nothing_is_told() {
    let library = load_str("empty", "// quantizer a\n").unwrap();
    assert_eq!(
        library.warnings.to_string().lines().next().unwrap().split(';').next(),
        Some("warning: empty defines nothing")
    );
}

#[test]
fn many_errors_are_few_messages() {
    let text = "quantizer a { window }\n".repeat(3000) + &"\u{1}\u{2}".repeat(5000);
    let errors = load_str("many", &text).unwrap_err();
    let shown = errors.to_string();
    assert!(shown.lines().count() < 40 && shown.contains("more of them"), "{shown}");
}

#[test]
fn libraries_are_used_by_name() {
    let library =
        load_str("test", "use palette\nquantizer m = mix(tcq_2, tcq_2.5)\n").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((library.quantizers.len(), library.quantizers[0].rate()), (1, 2.25));
    assert!(
        library.quantizers[0].is_trained() && library.files.iter().all(|f| f.ends_with("test")),
        "{:?}",
        library.files
    );
    let text = "use std\nquantizer q { bits 4 values i8 unit 1/2 decode w { [small_float(w, 2, 1)] } block 2 x 128 scale row rotate none }";
    let q = &load_str("test", text).unwrap_or_else(|e| panic!("{e}")).quantizers[0];
    let entries: Vec<i16> = (0..16)
        .flat_map(|w| {
            let mut out = [0];
            q.codes[0].entry(w, &mut out);
            out
        })
        .collect();
    assert_eq!(entries, [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]);
    // It stands alone when it is canonical.
    assert!(spec::load_alone("test", &q.canonical()).is_ok());
}

/// What `std` rounds is what half precision rounds.
#[test]
fn halves_are_those_of_half_precision() {
    let text = "use std
        quantizer round { bits 18 values i32 decode w { [round_to_half((w << 2) - w[17] * (w[0..2] + 1048575))] } weight e { e } }
        quantizer sum { bits 18 values i32 decode w { [sum_of_halves((w * 89226354 + 64248484) & 0x8fff8fff ^ 0x3b603b60)] } weight e { e } }";
    let library = load_str("test", text).unwrap_or_else(|e| panic!("{e}"));
    let (mut room, mut out) = (Default::default(), [0]);
    let mut of = |name: &str, code: u32| {
        library.format(name).unwrap().integers(code, &[], &mut room, &mut out);
        out[0]
    };
    for code in (0..1 << 18).step_by(7) {
        let number = (code << 2) as i32 - (code >> 17 & 1) as i32 * ((code & 3) as i32 + 1_048_575);
        let half = half::f16::from_f64(f64::from(number) / 32.0).to_f64() * 32.0;
        assert_eq!(of("round", code) as f64, half, "{number}");
        let h = code.wrapping_mul(89_226_354).wrapping_add(64_248_484) & 0x8fff_8fff ^ 0x3b60_3b60;
        let sum = half::f16::from_bits(h as u16) + half::f16::from_bits((h >> 16) as u16);
        assert_eq!(of("sum", code) as f64, sum.to_f64() * 8192.0, "{code:#x}");
    }
}
