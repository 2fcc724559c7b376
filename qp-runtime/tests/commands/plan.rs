//! `qp plan` as a user sees it: output layer and embedding.

use std::path::Path;
use std::process::{Command, Output};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn qp(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qp")).current_dir(ROOT).args(args).output().unwrap()
}

/// What `qp plan` says for the bundled model, at 3.3 bits a weight.
fn plan(profile: &Path, more: &[&str]) -> String {
    let sensitivity = "benches/results/allocation/kjv-llama.sensitivity.json";
    let profile = profile.to_str().unwrap();
    let names = ["--quantizers", "tcq_3,tcq_4", "--bits", "3.3"];
    let o = qp(&[&["plan", "--sensitivity", sensitivity, "--profile", profile][..], &names, more].concat());
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}

/// The number after `name` at the beginning of a line.
fn number(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line[name.len()..].split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn output_layer_and_embedding_are_planned_for_if_asked() {
    let dir = tempfile::tempdir().unwrap();
    let profile = dir.path().join("profile.json");
    let made = ["profile", "models/kjv-llama", "--target", "sm_90a", "--quantizers", "tcq_3,tcq_4", "-o"];
    assert!(qp(&[&made[..], &[profile.to_str().unwrap()]].concat()).status.success());

    let neither = plan(&profile, &[]);
    assert!(!neither.contains("lm_head") && !neither.contains("embed_tokens"), "{neither}");
    let head = plan(&profile, &["--lm-head"]);
    assert!(head.contains("\nlm_head: tcq_4") && !head.contains("embed_tokens"), "{head}");
    // They are tied: one matrix for both, which costs more loss than the output layer alone, and the same time.
    let both = plan(&profile, &["--embedding"]);
    assert!(both.contains("\nmodel.embed_tokens: tcq_4") && !both.contains("lm_head"), "{both}");
    assert_eq!(plan(&profile, &["--embedding", "--lm-head"]), both);
    assert_eq!(number(&both, "time"), number(&head, "time"));
    assert!(number(&both, "predicted loss") > number(&head, "predicted loss"), "{both}{head}");
}

#[test]
fn a_file_without_the_embedding_says_how_to_add_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s.json");
    let text = r#"{"format":1,"model":"m","layers":[{"name":"lm_head","rows":4,"cols":2,"sensitivity":0.5}]}"#;
    std::fs::write(&file, text).unwrap();
    let o = qp(&["plan", "--sensitivity", file.to_str().unwrap(), "--embedding", "--bits", "4"]);
    let message = String::from_utf8(o.stderr).unwrap();
    assert!(message.contains("no sensitivity of the embedding: add it with `qp sensitivity --resume`"), "{message}");
}

/// Three bits of one's own: without formulas it could not be made.
const OWN: &str = "quantizer int3 {
    bits   3
    values i8
    decode w { [w] }
    field  s : f16 per 1 x 64 = (max(w) - min(w)) / 7
    field  m : f16 per 1 x 64 = min(w)
    weight e { s * e + m }
}
quantizer bare {
    bits   3
    values i8
    decode w { [w] }
    field  s : f16 per 1 x 64
    weight e { s * e }
}
quantizer four {
    window 2  vector 1  step 2  block 2 x 128
    values i8  unit 1/2
    table t[4] = [-3, -1, 1, 3]
    decode w { t[w] }
    scale row  rotate none
}
";

#[test]
fn quantizers_of_ones_own_are_planned_for_and_quantized_with() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("specs")).unwrap();
    let own = dir.path().join("specs/own.qspec");
    std::fs::write(&own, OWN).unwrap();
    let own = own.to_str().unwrap();
    let sensitivity = "benches/results/allocation/kjv-llama.sensitivity.json";
    let plan = |quantizers: &str, more: &[&str]| {
        let o = qp(&[&["plan", "--sensitivity", sensitivity, "--quantizers", quantizers][..], more].concat());
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (o.status.success(), text(o.stdout), text(o.stderr))
    };
    // All of a file; what cannot be made is named.
    let out = dir.path().join("plan.toml");
    let (ok, printed, said) = plan(&format!("{own},q4_0"), &["--bits", "3.6", "-o", out.to_str().unwrap()]);
    assert!(ok && printed.contains("int3") && printed.contains("q4_0"), "{printed}{said}");
    assert!(said.contains("left out: bare (no formula for s: import only)"), "{said}");
    // The plan finds the file from its own folder.
    let text = std::fs::read_to_string(&out).unwrap();
    assert!(text.contains("= \"specs/own.qspec:int3\"") && text.contains("= \"q4_0\""), "{text}");
    let checkpoint = dir.path().join("out");
    let made = qp(&[
        "quantize",
        "models/kjv-llama",
        "--plan",
        out.to_str().unwrap(),
        "-q",
        "-o",
        checkpoint.to_str().unwrap(),
    ]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // As much memory as one of them would take, by name and member; a quantizer of blocks with an error measured now.
    let (ok, printed, said) = plan(&format!("{own}:int3,{own}:four"), &["--as-uniform", &format!("{own}:int3")]);
    assert!(ok && printed.contains("(3.5000 bits a weight)"), "{printed}{said}");
    // A slip, and two of one name.
    let (ok, _, said) = plan("q4_z", &["--bits", "4"]);
    assert!(!ok && said.contains("`q4_z` is no quantizer of the palette and no format"), "{said}");
    let other = dir.path().join("other.qspec");
    std::fs::write(&other, OWN.replace("bits   3", "bits   4")).unwrap();
    let (ok, _, said) = plan(&format!("{own}:int3,{}:int3", other.display()), &["--bits", "4"]);
    assert!(!ok && said.contains("two of --quantizers are called `int3`, and differ"), "{said}");
    let (ok, _, said) = plan(&format!("{own}:bare"), &["--bits", "4"]);
    assert!(!ok && said.contains("nothing is left to choose from: bare (no formula for s"), "{said}");
}

#[test]
fn a_missing_plan_says_what_makes_one() {
    let o = qp(&["quantize", "models/kjv-llama", "--plan", "nowhere.toml", "-o", "nowhere"]);
    let message = String::from_utf8(o.stderr).unwrap();
    assert!(
        message.contains("cannot read the plan nowhere.toml") && message.contains("`qp plan -o FILE` writes one"),
        "{message}"
    );
}

#[test]
fn kernels_of_ones_own_formats_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own.qspec");
    std::fs::write(&own, OWN).unwrap();
    let member = format!("{}:int3,q8_0", own.display());
    let o = qp(&["check-gpu", "--interpreter", "--no-models", "--batches", "1", "--members", &member]);
    let out = String::from_utf8(o.stdout).unwrap();
    assert!(
        o.status.success() && out.contains("0 quantizers, 2 formats"),
        "{out}{}",
        String::from_utf8_lossy(&o.stderr)
    );
    let o = qp(&["bench", "distortion", &format!("{}:bare", own.display())]);
    let message = String::from_utf8(o.stderr).unwrap();
    assert!(o.stdout.is_empty() && message.contains("`bare` cannot be made: no formula for s"), "{message}");
}
