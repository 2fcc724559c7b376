//! `docs/tutorial.md`: its files, its commands and what they print.

use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A part of the page between fences.
struct Fence<'a> {
    /// What follows the opening fence.
    info: &'a str,
    text: &'a str,
}

fn fences(page: &str) -> Vec<Fence<'_>> {
    // Text and fences take turns.
    let parts = page.split("```").skip(1).step_by(2);
    parts
        .map(|part| part.split_once('\n').expect("a fence of several lines"))
        .map(|(info, text)| Fence { info, text })
        .collect()
}

/// A program of this build.
fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_qp")).with_file_name(name);
    assert!(path.exists(), "{name} is built by `cargo test --workspace`");
    path
}

/// Runs a line of the page, which must succeed. Gives what it prints.
fn run(line: &str, folder: &Path) -> String {
    let command = line.split('#').next().expect("the first part").trim();
    // Words are apart by spaces, but for those in double quotes.
    let words: Vec<&str> = command
        .split('"')
        .enumerate()
        .flat_map(|(i, part)| if i % 2 == 1 { vec![part] } else { part.split_whitespace().collect() })
        .collect();
    let o = Command::new(program(words[0])).args(&words[1..]).current_dir(folder).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
    assert!(o.status.success(), "{command}:\n{out}{err}");
    out.into_owned()
}

#[cfg(unix)]
#[test]
fn every_command_of_the_tutorial_runs() {
    let page = std::fs::read_to_string(Path::new(ROOT).join("docs/tutorial.md")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::os::unix::fs::symlink(Path::new(ROOT).canonicalize().unwrap().join("models"), folder.join("models")).unwrap();
    let (mut printed, mut commands) = (String::new(), 0);
    for Fence { info, text } in fences(&page) {
        match info.split_once('=') {
            Some(("text file", name)) => std::fs::write(folder.join(name), text).unwrap(),
            _ if info == "sh" => {
                printed = text.lines().map(|line| run(line, folder)).collect();
                commands += text.lines().count();
            }
            _ if info == "sh gpu" => qp_codegen::skipped::note("the tutorial's measurement needs a GPU"),
            _ if info == "output" => {
                for line in text.lines() {
                    assert!(printed.contains(line), "`{line}` is not in:\n{printed}");
                }
            }
            _ => panic!("a fence of an unknown kind: {info}"),
        }
    }
    assert!(commands > 10, "{commands} commands");
}
