use super::*;
use crate::checkpoint::ModelId;
use safetensors::Dtype;

fn head() -> Head {
    let plan = vec![("a".to_owned(), "tcq_3 0123456789".to_owned()), ("b".to_owned(), "tcq_3 0123456789".to_owned())];
    Head::new("model".to_owned(), 100, plan, Vec::new())
}

/// Three items in two files.
fn items() -> Vec<(String, Vec<Planned>)> {
    let t = |name: &str, dtype, len| Planned { name: name.to_owned(), dtype, shape: vec![len] };
    ["a", "b", "c"]
        .map(|n| {
            (n.to_owned(), vec![t(&format!("{n}.packed"), Dtype::U32, 10), t(&format!("{n}.scales"), Dtype::BF16, 3)])
        })
        .to_vec()
}

fn begin(out: &Path, resume: bool, force: bool) -> Result<Draft, Error> {
    Draft::begin(out, &head(), items(), Begin { resume, force })
}

fn put(draft: &mut Draft, item: &str) -> Result<(), Error> {
    let byte = item.as_bytes()[0];
    draft.put(item, &[&[byte; 40], &[byte + 1; 6]], Some(0.25))
}

fn finish(mut draft: Draft) -> Result<Manifest, Error> {
    draft.put_file("config.json", b"{}")?;
    let (tool, model) = ("t".to_owned(), ModelId { sha256: "m".to_owned() });
    let (specs, layers, groups) = (Vec::new(), Vec::new(), Vec::new());
    let (tensors, files) = (Vec::new(), Vec::new());
    draft.finish(Manifest {
        format: FORMAT,
        tool,
        model,
        calibration: None,
        source: None,
        specs,
        layers,
        groups,
        tensors,
        files,
    })
}

/// Begins or continues, does what is missing, publishes.
fn complete(out: &Path, resume: bool, force: bool) -> Result<(), Error> {
    let mut draft = begin(out, resume, force)?;
    for item in ["a", "b", "c"] {
        if draft.record(item).is_none() {
            put(&mut draft, item)?;
        }
    }
    finish(draft).map(|_| ())
}

/// Names and contents of all files of a directory.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for e in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = e.file_name().into_string().unwrap();
        if e.path().is_dir() {
            all.extend(contents(&e.path()).into_iter().map(|(k, v)| (format!("{name}/{k}"), v)));
        } else {
            all.insert(name, fs::read(e.path()).unwrap());
        }
    }
    all
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn a_whole_run_leaves_the_output_alone_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("deep/out");
    complete(&out, false, false).unwrap();
    assert_eq!(names(out.parent().unwrap()), ["out"]);
    assert_eq!(
        names(&out),
        ["config.json", "qp.json", "specs", "weights-00001.safetensors", "weights-00002.safetensors"]
    );
    let bytes = fs::read(out.join("weights-00002.safetensors")).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.tensor("c.packed").unwrap().data(), [b'c'; 40]);
    assert_eq!(read.tensor("c.scales").unwrap().data(), [b'd'; 6]);
}

#[test]
fn resume_after_any_torn_journal_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    complete(&whole, false, false).unwrap();
    let out = dir.path().join("out");
    let mut draft = begin(&out, false, false).unwrap();
    put(&mut draft, "a").unwrap();
    put(&mut draft, "b").unwrap();
    let path = draft.dir().join(JOURNAL);
    drop(draft);
    let journal = fs::read(&path).unwrap();
    let ends: Vec<usize> = journal.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1).collect();
    assert_eq!(ends.len(), 3);
    for cut in 0..=journal.len() {
        fs::write(&path, &journal[..cut]).unwrap();
        let draft = begin(&out, true, false).unwrap();
        assert_eq!(draft.done(), ends[1..].iter().filter(|&&e| e <= cut).count(), "cut at {cut}");
    }
    // A flipped byte ends the journal there.
    for (i, done) in [(ends[0] + 20, 0), (ends[1] + 30, 1)] {
        let mut bad = journal.clone();
        bad[i] ^= 1;
        fs::write(&path, &bad).unwrap();
        assert_eq!(begin(&out, true, false).unwrap().done(), done);
    }
    fs::write(&path, &journal).unwrap();
    complete(&out, true, false).unwrap();
    assert_eq!(contents(&out), contents(&whole));
    assert_eq!(names(dir.path()), ["out", "whole"]);
}

#[test]
fn a_finished_item_whose_bytes_changed_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut draft = begin(&out, false, false).unwrap();
    put(&mut draft, "a").unwrap();
    put(&mut draft, "b").unwrap();
    let path = draft.dir().join("weights-00001.safetensors");
    drop(draft);
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.iter().rposition(|&b| b == b'c').expect("the scales of b");
    bytes[at] ^= 4;
    fs::write(&path, bytes).unwrap();
    let draft = begin(&out, true, false).unwrap();
    assert!(draft.record("a").is_some() && draft.record("b").is_none());
}

#[test]
fn a_full_disk_is_named_and_leaves_the_output_and_a_resumable_draft() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    complete(&whole, false, false).unwrap();
    let out = dir.path().join("out");
    complete(&out, false, false).unwrap();
    fs::write(out.join("mark"), "the old one").unwrap();
    let mut failures = 0;
    for writes in 0.. {
        fault::after(writes);
        let result = complete(&out, true, true);
        fault::after(-1);
        match result {
            Ok(()) => break,
            Err(e) => {
                assert!(e.to_string().contains("no space left on the device"), "{e}");
                assert!(e.to_string().contains("--resume"), "{e}");
                assert!(out.join("mark").exists(), "after {writes} writes");
                failures += 1;
            }
        }
    }
    assert!(failures > 5, "{failures}");
    // A file that the checkpoint did not write stays.
    fs::remove_file(out.join("mark")).unwrap();
    assert_eq!(contents(&out), contents(&whole));
    assert_eq!(names(dir.path()), ["out", "whole"]);
}

#[test]
fn killed_between_the_two_renames_it_can_be_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    complete(&out, false, false).unwrap();
    let whole = contents(&out);
    fs::write(out.join("mark"), "the old one").unwrap();
    let mut draft = begin(&out, false, true).unwrap();
    for item in ["a", "b", "c"] {
        put(&mut draft, item).unwrap();
    }
    let old = draft.dir().with_extension(format!("{}-replaced", extension(draft.dir())));
    drop(draft);
    fs::rename(&out, &old).unwrap();
    complete(&out, true, true).unwrap();
    assert_eq!(contents(&out), whole);
    assert_eq!(names(dir.path()), ["out"]);
}

#[test]
fn what_exists_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let message =
        |r: Result<Draft, Error>| r.expect_err("refused").to_string().replace(&*dir.path().to_string_lossy(), "DIR");
    complete(&out, false, false).unwrap();
    assert_eq!(
        message(begin(&out, false, false)),
        "DIR/out exists already; choose another output, or replace it with --force"
    );
    let mine = dir.path().join("mine");
    fs::create_dir(&mine).unwrap();
    drop(begin(&mine, false, false).expect("an empty directory may be filled"));
    fs::write(mine.join("thesis.txt"), "x").unwrap();
    let foreign = "exists and is not a quantized checkpoint: --force replaces checkpoints only; choose another output or remove it yourself";
    assert_eq!(message(begin(&mine, false, true)), format!("DIR/mine {foreign}"));
    assert_eq!(message(begin(&mine.join("thesis.txt"), false, true)), format!("DIR/mine/thesis.txt {foreign}"));

    // What was put beside a checkpoint's files is there after it was replaced, under another name if need be.
    fs::create_dir(out.join("notes")).unwrap();
    for name in ["README.md", "notes/a.txt"] {
        fs::write(out.join(name), name).unwrap();
    }
    complete(&out, false, true).unwrap();
    for name in ["README.md", "notes/a.txt"] {
        assert_eq!(fs::read_to_string(out.join(name)).unwrap(), name);
    }
    crate::checkpoint::Checkpoint::open(&out).unwrap();
    #[cfg(unix)]
    {
        let (link, dangling) = (dir.path().join("link"), dir.path().join("dangling"));
        std::os::unix::fs::symlink(&out, &link).unwrap();
        complete(&link, false, true).unwrap();
        assert!(link.is_symlink() && out.join("README.md").exists());
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &dangling).unwrap();
        let found = "DIR/dangling is a link to nothing: remove it, make what it names, or choose another output";
        assert_eq!(message(begin(&dangling, false, true)), found);
    }

    let other = dir.path().join("other");
    let mut draft = begin(&other, false, false).unwrap();
    put(&mut draft, "a").unwrap();
    let name = draft.dir().file_name().unwrap().to_string_lossy().into_owned();
    assert_eq!(
        message(begin(&other, true, false)),
        format!("DIR/{name}: another qp process is writing it; wait for it or stop it")
    );
    drop(draft);
    let unfinished = format!(
        "DIR/{name} holds an unfinished run (1 layers done); continue it with --resume, or discard it with --force"
    );
    assert_eq!(message(begin(&other, false, false)), unfinished);
    assert_eq!(begin(&other, true, false).unwrap().done(), 1);
    assert_eq!(begin(&other, false, true).unwrap().done(), 0);
}

#[test]
fn another_run_is_not_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut draft = begin(&out, false, false).unwrap();
    put(&mut draft, "a").unwrap();
    let name = draft.dir().file_name().unwrap().to_string_lossy().into_owned();
    drop(draft);
    let resume = |head: &Head| {
        let e = Draft::begin(&out, head, items(), Begin { resume: true, force: false }).expect_err("another run");
        let text = e.to_string();
        let text = text.split_once(&format!("{name}: ")).expect("names the draft").1;
        text.split_once("; ").expect("has a cure").0.to_owned()
    };
    let model = Head { model: "other".to_owned(), ..head() };
    assert_eq!(resume(&model), "it was begun with another model (or the model's files have changed)");
    let mut plan = head();
    plan.plan[1].1 = "tcq_4 89abcdef01".to_owned();
    assert_eq!(resume(&plan), "it was begun with another plan: `b` was tcq_3 (01234567), now it is tcq_4 (89abcdef)");
    plan.plan.pop();
    assert_eq!(resume(&plan), "it was begun with another plan: `b` was tcq_3 (01234567), now it is not quantized");
    let tool = Head { tool: "qp 9".to_owned(), ..head() };
    assert!(resume(&tool).starts_with("it was begun by qp 0"));
    // The old run is still there.
    assert_eq!(begin(&out, true, false).unwrap().done(), 1);
}
