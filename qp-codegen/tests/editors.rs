//! The tree-sitter grammar of `editors/` reads all specs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use qp_codegen::skipped;

/// The `.qspec` files of a folder.
fn specs(folder: &Path, out: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    out.extend(entries.filter(|p| p.extension().is_some_and(|x| x == "qspec")));
}

#[test]
fn the_tree_sitter_grammar_reads_all_specs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    let grammar = root.join("editors/tree-sitter-qspec");
    let own = grammar.join("node_modules/.bin/tree-sitter");
    let program = if own.exists() { own } else { "tree-sitter".into() };
    if !Command::new(&program).arg("--version").output().is_ok_and(|o| o.status.success()) {
        return skipped::note("no tree-sitter");
    }
    // The parser is made in a folder of its own.
    let folder = tempfile::tempdir().unwrap();
    for file in ["grammar.js", "tree-sitter.json", "package.json"] {
        fs::copy(grammar.join(file), folder.path().join(file)).unwrap();
    }
    fs::create_dir(folder.path().join("queries")).unwrap();
    fs::copy(grammar.join("queries/highlights.scm"), folder.path().join("queries/highlights.scm")).unwrap();
    let mut files = Vec::new();
    for specs_of in ["specs", "specs/formats", "tests/specs/pass"] {
        specs(&root.join(specs_of), &mut files);
    }
    assert!(files.len() > 30);
    let run = |args: &[&str], files: &[PathBuf]| {
        let out = Command::new(&program).args(args).args(files).current_dir(folder.path()).output().unwrap();
        let text = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
        assert!(out.status.success() && !text.contains("(ERROR"), "{args:?}: {text}");
        text
    };
    run(&["generate"], &[]);
    run(&["parse", "--quiet"], &files);
    // The query fits the grammar, and colours something.
    assert!(run(&["query", "queries/highlights.scm"], &files[..1]).contains("keyword"));
}
