//! The `qp-codegen` command: output, exit codes, and that a failure leaves files as they were.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Standard output, standard error and exit code.
fn run(args: &[&str]) -> (String, String, i32) {
    let out = Command::new(env!("CARGO_BIN_EXE_qp-codegen")).args(args).output().unwrap();
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (text(&out.stdout), text(&out.stderr), out.status.code().unwrap())
}

fn example(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/specs").join(name).display().to_string()
}

#[test]
fn check_counts_errors_and_warnings() {
    assert_eq!(run(&["check", &example("pass/minimal.qspec")]), ("ok: 1 quantizer\n".to_owned(), String::new(), 0));
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty.qspec").display().to_string();
    fs::write(&empty, "\u{feff}// nothing yet\n").unwrap();
    let (said, told, code) = run(&["check", &empty]);
    assert_eq!((said.as_str(), code), ("ok: 0 quantizers\n", 0));
    assert!(told.starts_with(&format!("warning: {empty} defines nothing; ")), "{told}");
    assert!(told.ends_with("0 errors, 1 warning\n") && told.lines().count() == 2, "{told}");
    let (_, told, code) = run(&["check", &example("pass/warnings.qspec")]);
    assert!(told.ends_with("0 errors, 6 warnings\n") && code == 0, "{told}");
    let (_, told, code) = run(&["check", &example("fail/several_errors.qspec"), &example("pass/minimal.qspec")]);
    assert!(told.ends_with("5 errors, 0 warnings\n") && code == 1, "{told}");
    let (_, told, code) = run(&["check", "nowhere.qspec"]);
    assert!(told.contains("cannot read nowhere.qspec") && code == 1, "{told}");
    let (_, told, code) = run(&["check", "--trained", &example("pass/constants.qspec")]);
    assert!(told.contains("run: qp train-codebook ") && told.contains("constants.qspec:f_a") && code == 1, "{told}");
}

/// A table is of the training that its file tells, whatever the spec says by now.
#[test]
fn check_tells_tables_of_another_training() {
    let folder = tempfile::tempdir().unwrap();
    let spec = |seed: u32| {
        format!(
            "quantizer q {{ window 2 vector 1 step 2 block 2 x 128 values i8 + 1/2 unit 1/32 table t[4] \
             trained(seed = {seed}, rounds = 3, samples = 1024) in \"q.table\" decode w {{ t[w] }} scale row rotate none }}\n"
        )
    };
    let file = folder.path().join("q.qspec").display().to_string();
    let table = "# q t\n# trained seed = 1, rounds = 3, samples = 1024\n-40\n-12\n12\n40\n";
    fs::write(folder.path().join("q.table"), table).unwrap();
    fs::write(&file, spec(1)).unwrap();
    assert_eq!(run(&["check", &file]), ("ok: 1 quantizer\n".to_owned(), String::new(), 0));
    fs::write(&file, spec(99)).unwrap();
    let (_, told, code) = run(&["check", &file]);
    assert!(told.contains("says `trained seed = 1, rounds = 3, samples = 1024`") && code == 0, "{told}");
    assert!(told.contains("qp train-codebook") && told.ends_with("0 errors, 1 warning\n"), "{told}");
    assert!(told.contains("seed = 99, rounds = 3"), "the place: {told}");
}

#[test]
fn fmt_rewrites_what_parses_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (folder.path().join("good.qspec"), folder.path().join("bad.qspec"));
    fs::write(&good, "use   \"x\" // kept\n").unwrap();
    fs::write(&bad, "use   7\n").unwrap();
    let (g, b) = (good.display().to_string(), bad.display().to_string());
    let (_, told, code) = run(&["fmt", "--check", &g]);
    assert!(told.contains("not formatted") && code == 1, "{told}");
    assert_eq!(fs::read_to_string(&good).unwrap(), "use   \"x\" // kept\n");
    let (_, told, code) = run(&["fmt", &b, &g]);
    assert!(told.contains("expected the path of a file") && code == 1, "{told}");
    assert_eq!(fs::read_to_string(&good).unwrap(), "use \"x\" // kept\n");
    assert_eq!(fs::read_to_string(&bad).unwrap(), "use   7\n");
    assert_eq!(run(&["fmt", "--check", &g]).2, 0);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left behind");
}

#[test]
#[cfg(unix)]
fn what_is_written_keeps_links_modes_and_neighbours() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (file, link, beside, args) in [
        ("a.qspec", "b.qspec", "a.qspec.new", &["fmt"][..]),
        ("a.cu", "b.cu", "a.cu.new", &["emit", "--spec", "nuq_2", "-o"]),
    ] {
        fs::write(at(file), "use   \"x\"\n").unwrap();
        fs::write(at(beside), "precious").unwrap();
        fs::set_permissions(at(file), fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(file, at(link)).unwrap();
        let link = at(link).display().to_string();
        assert_eq!(run(&[args, &[link.as_str()]].concat()).2, 0);
        assert!(Path::new(&link).is_symlink() && fs::read_to_string(at(file)).unwrap() != "use   \"x\"\n");
        assert_eq!(fs::metadata(at(file)).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(at(beside)).unwrap(), "precious");
    }
}

#[test]
fn explain_and_list_show_the_palette() {
    let (text, _, code) = run(&["explain", "htcq_2.25.qspec", "--shape", "64x256"]);
    assert!(text.starts_with("htcq_2.25\n  rate        2.25 bits a weight\n") && code == 0, "{text}");
    let (text, _, code) = run(&["list"]);
    assert!(text.lines().count() > 30 && code == 0, "{text}");
    let (text, _, code) = run(&["explain", "--canonical", &example("pass/minimal.qspec")]);
    assert!(text.starts_with("quantizer q {\n") && code == 0, "{text}");
    let (_, told, code) = run(&["explain", "tqc_2"]);
    assert_eq!((told.as_str(), code), ("error: there is no quantizer or format `tqc_2`; did you mean `tcq_2`?\n", 1));
}

#[test]
fn emit_prints_kernels_and_refuses_bad_flags() {
    for op in ["dequantize", "gemv", "rotate"] {
        let args = ["emit", "--spec", "fast_2", "--op", op, "--shape", "64x256", "--target", "sm_89"];
        let (text, told, code) = run(&args);
        assert!(text.contains("__global__") && !text.contains("#include") && code == 0, "{told}");
        let (text, _, code) = run(&[&args[..], &["--ir"]].concat());
        assert!(text.contains("kernel") && !text.contains("__global__") && code == 0, "{text}");
    }
    for bad in [["--target", "sm_75"], ["--shape", "64"], ["--batch", "2049"], ["--op", "sing"]] {
        let (_, told, code) = run(&[&["emit", "--spec", "fast_2"][..], &bad].concat());
        assert_eq!(code, 2, "{told}");
    }
    for (option, value, words) in
        [("--batch", "-1", "-1 is not in 1..=2048"), ("--shape", "-1x64", "expected rows x columns")]
    {
        let (_, told, code) = run(&["emit", "--spec", "fast_2", option, value]);
        assert!(told.contains(words) && code == 2, "{told}");
    }
    let (_, told, code) = run(&["emit", "--spec", "nothing.qspec"]);
    assert!(told.contains("cannot read nothing.qspec: there is no such file") && code == 1, "{told}");
    let (text, told, code) = run(&["emit", "--spec", "tcq_2.5.qspec", "--shape", "64x256"]);
    assert!(text.contains("__global__") && code == 0, "of the palette, from anywhere: {told}");
    let (text, told, code) = run(&["emit", "--spec", "q4_k", "--shape", "7x256"]);
    assert!(text.contains("__global__") && code == 0, "{told}");
    let (_, told, code) = run(&["emit", "--spec", "q4_k", "--shape", "7x13"]);
    assert!(told.contains("`q4_k` has no such kernel") && told.contains("13") && code == 1, "{told}");
}
