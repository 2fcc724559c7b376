//! Checkpoints of a small random model: what is written is read, whatever happens in between, or it is said what is
//! wrong.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use qp_codegen::reference::rotate;
use qp_codegen::spec::Shape;
use qp_runtime::checkpoint::{Begin, Checkpoint, LayerEntry, Manifest, TensorEntry, is_checkpoint, sha256};
use qp_runtime::codec::{decode_matrix, encode_matrix};
use qp_runtime::device::Executor;
use qp_runtime::engine::{self, Logits};
use qp_runtime::model::{LayerId, Model, Weight};
use qp_runtime::plan::Plan;
use qp_runtime::quantize::calibrate::{Calibrate, Texts};
use qp_runtime::quantize::{Job, Progress, Silent};
use qp_tests::models::{RandomModel, write_spec};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};

/// A folder with a model and specs `q2` and `q3`.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new(model: &RandomModel) -> Place {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("model")).unwrap();
        model.write(&dir.path().join("model"));
        write_spec(dir.path(), "q2", 2);
        write_spec(dir.path(), "q3", 3);
        Place { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn plan(&self, text: &str) -> Plan {
        Plan::parse("plan.toml", text, self.dir.path().to_owned()).unwrap()
    }

    fn job(&self, out: &str) -> Job {
        let plan = self.plan("default = \"q2.qspec\"\n[layers]\n\"model.layers.1.mlp.*\" = \"q3.qspec\"");
        Job { shard_bytes: 150_000, ..Job::new(self.path("model"), plan, self.path(out)) }
    }

    fn quantize(&self, out: &str) -> Manifest {
        self.job(out).run(&Silent).unwrap_or_else(|e| panic!("{e}"))
    }

    /// A message without the folder's name.
    fn text(&self, e: impl ToString) -> String {
        e.to_string().replace(&*self.dir.path().to_string_lossy(), "DIR")
    }
}

fn random() -> RandomModel {
    RandomModel::new("LlamaForCausalLM")
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

/// The first failure of using the checkpoint `dir` in full: opening the model, then verifying every byte.
fn failure(dir: &Path) -> Option<String> {
    if let Err(e) = Model::open(dir) {
        return Some(format!("open: {e}"));
    }
    let checkpoint = Checkpoint::open(dir).unwrap();
    let errors = checkpoint.verify(&mut |_| ()).err()?;
    Some(errors.iter().map(|e| format!("verify: {e}")).collect::<Vec<_>>().join("\n"))
}

#[test]
fn what_is_written_is_read() {
    let model = random();
    let place = Place::new(&model);
    let manifest = place.quantize("out");
    assert!(is_checkpoint(&place.path("out")) && failure(&place.path("out")).is_none());
    let checkpoint = Checkpoint::open(&place.path("out")).unwrap();
    assert_eq!(*checkpoint.manifest(), manifest);
    assert_eq!(manifest.layers.len(), 14);
    let mut kept = 0;
    for (name, (shape, values)) in &model.tensors {
        let layer = name.strip_suffix(".weight").unwrap();
        let Some(entry) = checkpoint.layer(layer) else {
            assert_eq!(checkpoint.tensor(name).unwrap().to_f32(), *values, "{name}");
            kept += 1;
            continue;
        };
        assert!(!checkpoint.contains(name), "{name}");
        let (q, packed) = checkpoint.linear(layer).unwrap();
        assert_eq!(q.name, if name.contains("layers.1.mlp") { "q3" } else { "q2" });
        let mut rotated = values.clone();
        rotated.chunks_exact_mut(shape[1]).for_each(|row| rotate(q.rotation, row));
        let shape = Shape { rows: shape[0] as u32, cols: shape[1] as u32 };
        assert_eq!(packed, encode_matrix(&q, shape, &rotated, &|_| ()).unwrap(), "{name}");
        let decoded = decode_matrix(&q, &packed);
        let sum = |f: &dyn Fn(usize) -> f32| (0..rotated.len()).map(|i| f64::from(f(i)).powi(2)).sum::<f64>();
        let error = sum(&|i| rotated[i] - decoded[i]) / sum(&|i| rotated[i]);
        assert!((entry.error / error - 1.0).abs() < 1e-4, "{name}: {} and {error}", entry.error);
        assert!(error < if q.name == "q2" { 0.12 } else { 0.05 }, "{name}: {error}");
    }
    assert_eq!(kept, 2 + 1 + 2 * 2);
    // Files of 150 kB at most, unless one tensor is larger.
    assert!(manifest.files.iter().filter(|f| f.name.starts_with("weights")).count() > 1);
}

#[test]
fn the_plan_in_a_checkpoint_makes_the_same_checkpoint() {
    let place = Place::new(&random());
    place.quantize("out");
    let plan = Plan::read(&place.path("out/plan.toml")).unwrap();
    let job = Job { plan, ..place.job("again") };
    job.run(&Silent).unwrap();
    assert_eq!(contents(&place.path("out")), contents(&place.path("again")));
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let place = Place::new(&random());
    for threads in [1, 3] {
        Job { threads: Some(threads), ..place.job(&threads.to_string()) }.run(&Silent).unwrap();
    }
    assert_eq!(contents(&place.path("1")), contents(&place.path("3")));
}

/// Stops after some layers.
struct StopAfter {
    layers: usize,
    encoded: AtomicUsize,
}

impl Progress for StopAfter {
    fn start(&self, _: u64, _: u64, _: &Path) {}
    fn layer(&self, _: &str, _: &str) {}
    fn advance(&self, _: u64) {}
    fn finished(&self, _: &LayerEntry) -> ControlFlow<()> {
        let n = self.encoded.fetch_add(1, Ordering::Relaxed) + 1;
        if n == self.layers { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[test]
fn stopped_again_and_again_it_becomes_the_same() {
    let place = Place::new(&random());
    place.quantize("whole");
    let job = Job { begin: Begin { resume: true, force: false }, ..place.job("out") };
    let mut encoded = 0;
    for runs in 1.. {
        let stop = StopAfter { layers: 1 + runs % 3, encoded: AtomicUsize::new(0) };
        let result = job.run(&stop);
        encoded += stop.encoded.into_inner();
        match result {
            Ok(_) => break,
            Err(e) => {
                assert!(e.to_string().contains("--resume"), "{e}");
                assert!(!place.path("out").exists());
            }
        }
    }
    assert_eq!(encoded, 14, "no layer is encoded twice");
    assert_eq!(contents(&place.path("out")), contents(&place.path("whole")));
}

fn calibrated(job: Job, texts: Texts) -> Job {
    Job { calibrate: Some(Calibrate { texts, tokens: 300 }), ..job }
}

#[test]
fn calibrated_it_becomes_the_same_too() {
    let mut model = random();
    model.config["bos_token_id"] = 7.into();
    let place = Place::new(&model);
    fs::write(place.path("text"), "Now these are the generations. ".repeat(20)).unwrap();
    for (name, texts) in [("self", Texts::Own), ("file", Texts::File(place.path("text")))] {
        let job = |out: &str| calibrated(place.job(&format!("{name}-{out}")), texts.clone());
        let manifest = Job { threads: Some(3), ..job("whole") }.run(&Silent).unwrap();
        assert_eq!(manifest.calibration.map(|c| (c.texts, c.tokens)), Some((name.to_owned(), 384)));
        let resumed = Job { begin: Begin { resume: true, force: false }, threads: Some(1), ..job("out") };
        for layers in [1, 5, 3] {
            let stop = StopAfter { layers, encoded: AtomicUsize::new(0) };
            resumed.run(&stop).unwrap_err();
        }
        let plain = Job { calibrate: None, ..resumed.clone() };
        let message = place.text(plain.run(&Silent).unwrap_err());
        assert!(message.contains("it was begun calibrated with 384 tokens of"), "{message}");
        resumed.run(&Silent).unwrap();
        let bytes = |out: &str| contents(&place.path(&format!("{name}-{out}")));
        assert!(bytes("whole") == bytes("out"), "{name}");
        assert!(failure(&place.path(&format!("{name}-out"))).is_none());
    }
}

#[test]
fn inputs_that_are_zero_or_no_numbers() {
    let mut model = random();
    model.config["bos_token_id"] = 7.into();
    // What enters o is zero then: it is encoded as without calibration.
    model.tensors.get_mut("model.layers.0.self_attn.v_proj.weight").unwrap().1.fill(0.0);
    // An enormous weight, and a constant row.
    let up = &mut model.tensors.get_mut("model.layers.1.mlp.up_proj.weight").unwrap().1;
    up[..64].fill(0.25);
    up[70] = 1e12;
    let place = Place::new(&model);
    place.quantize("plain");
    calibrated(place.job("out"), Texts::Own).run(&Silent).unwrap();
    let o =
        |out: &str| Checkpoint::open(&place.path(out)).unwrap().linear("model.layers.0.self_attn.o_proj").unwrap().1;
    assert!(o("plain") == o("out"));

    // Finite itself, but no longer when it is multiplied with what is larger than one.
    model.tensors.get_mut("model.layers.0.post_attention_layernorm.weight").unwrap().1.fill(f32::MAX);
    model.write(&place.path("model"));
    let message = place.text(calibrated(place.job("bad"), Texts::File(place.path("text"))).run(&Silent).unwrap_err());
    assert!(message.starts_with("cannot read DIR/text"), "{message}");
    fs::write(place.path("text"), [b'a'; 127]).unwrap();
    let message = place.text(calibrated(place.job("bad"), Texts::File(place.path("text"))).run(&Silent).unwrap_err());
    assert!(message.contains("has 127 tokens, fewer than the 128 of one window"), "{message}");
    fs::write(place.path("text"), [b'a'; 128]).unwrap();
    let message = place.text(calibrated(place.job("bad"), Texts::File(place.path("text"))).run(&Silent).unwrap_err());
    assert!(
        message.contains("what enters layer 'model.layers.0.mlp.gate_proj' is infinite or not a number"),
        "{message}"
    );
}

#[test]
fn a_device_makes_the_same_checkpoint_interrupted_or_not() {
    let place = Place::new(&random());
    place.quantize("whole");
    let resume = Begin { resume: true, force: false };
    let on_device = Job { begin: resume, devices: vec![Executor::interpreter()], ..place.job("out") };
    let stop = |layers| StopAfter { layers, encoded: AtomicUsize::new(0) };
    on_device.run(&stop(5)).unwrap_err();
    // A part on the CPU, the rest on the device again.
    Job { devices: vec![], ..on_device.clone() }.run(&stop(3)).unwrap_err();
    on_device.run(&Silent).unwrap();
    assert_eq!(contents(&place.path("out")), contents(&place.path("whole")));
}

#[test]
fn checkpoints_of_the_first_format_still_open() {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/format-1"));
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.verify(&mut |_| ()).unwrap();
    let mut decoded = Vec::new();
    for layer in &checkpoint.manifest().layers {
        let (q, matrix) = checkpoint.linear(&layer.name).unwrap();
        decoded.extend(decode_matrix(&q, &matrix).iter().flat_map(|w| w.to_le_bytes()));
    }
    assert_eq!(sha256(&decoded), "5fd66d3e961ef8816fe5d0656ce58c06279012eebba87e95d9a36740a91b2084");
    let model = Model::open(dir).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(model.weights.layers().len(), 9);
}

#[test]
fn several_devices_make_the_same_checkpoint() {
    let place = Place::new(&random());
    place.quantize("whole");
    let devices = (0..3).map(|_| Executor::interpreter()).collect();
    Job { devices, ..place.job("out") }.run(&Silent).unwrap();
    assert_eq!(contents(&place.path("out")), contents(&place.path("whole")));
}

#[test]
fn a_changed_model_or_plan_is_not_resumed() {
    let mut model = random();
    let place = Place::new(&model);
    let resume = Begin { resume: true, force: false };
    let stop = StopAfter { layers: 3, encoded: AtomicUsize::new(0) };
    place.job("out").run(&stop).unwrap_err();
    let other = Job { begin: resume, plan: place.plan("default = \"q3.qspec\""), ..place.job("out") };
    let message = place.text(other.run(&Silent).unwrap_err());
    assert!(message.contains("another plan: `model.layers.0.mlp.down_proj` was q2 ("), "{message}");
    model.tensors.get_mut("model.norm.weight").unwrap().1[5] += 1.0;
    model.write(&place.path("model"));
    let message = place.text(Job { begin: resume, ..place.job("out") }.run(&Silent).unwrap_err());
    assert!(message.contains("it was begun with another model"), "{message}");
}

#[test]
fn element_types_of_the_model_do_not_matter() {
    let mut model = random();
    // Values that all three types hold exactly.
    model.tensors.values_mut().flat_map(|t| &mut t.1).for_each(|v| *v = (*v * 64.0).round() / 64.0);
    let place = Place::new(&model);
    place.quantize("f32");
    let packed = |out: &str| -> Vec<_> {
        let c = Checkpoint::open(&place.path(out)).unwrap();
        c.manifest().layers.iter().map(|l| (l.error.to_bits(), c.linear(&l.name).unwrap().1)).collect()
    };
    for dtype in [Dtype::F16, Dtype::BF16] {
        let bytes: Vec<Vec<u8>> = model
            .tensors
            .values()
            .map(|(_, values)| {
                let half = |v: &f32| {
                    if dtype == Dtype::F16 { f16::from_f32(*v).to_le_bytes() } else { bf16::from_f32(*v).to_le_bytes() }
                };
                values.iter().flat_map(half).collect()
            })
            .collect();
        let views =
            model.tensors.iter().zip(&bytes).map(|((name, (shape, _)), bytes)| {
                (name.as_str(), TensorView::new(dtype, shape.clone(), bytes).unwrap())
            });
        serialize_to_file(views, None, &place.path("model/model.safetensors")).unwrap();
        let out = format!("{dtype:?}");
        let manifest = place.quantize(&out);
        assert_eq!(packed(&out), packed("f32"));
        let norm = manifest.tensors.iter().find(|t| t.name == "model.norm.weight").unwrap();
        assert_eq!(norm.dtype, dtype);
    }
}

#[test]
fn an_output_layer_is_quantized_if_the_plan_names_it() {
    let mut model = random();
    let text = "default = \"q2.qspec\"\n[layers]\n\"lm_head\" = \"q3.qspec\"";
    for tied in [false, true] {
        model.config["tie_word_embeddings"] = tied.into();
        if tied {
            model.tensors.remove("lm_head.weight");
        }
        let place = Place::new(&model);
        Job { plan: place.plan(text), ..place.job("out") }.run(&Silent).unwrap();
        let read = Model::open(&place.path("out")).unwrap();
        assert!(
            matches!(&read.weights[LayerId(14)].weight, Weight::Quantized { quantizer, .. } if quantizer.name == "q3")
        );
        let embedding = read.weights[LayerId(15)].weight.dense().expect("as it was").to_f32();
        assert_eq!(embedding, model.tensors["model.embed_tokens.weight"].1);
    }
}

#[test]
fn an_embedding_is_quantized_if_the_plan_names_it() {
    let (head, embedding) = ("lm_head", "model.embed_tokens");
    // For each, the quantizers in the plan and those of the matrices that the checkpoint holds, head first.
    for (tied, planned, stored) in [
        (false, ["", "q2"], ["dense", "q2"]),
        (false, ["q3", "q3"], ["q3", "q3"]),
        (true, ["", "q2"], ["", "q2"]),
        (true, ["q3", ""], ["q3", "dense"]),
        (true, ["q3", "q3"], ["", "q3"]),
        (true, ["q3", "q2"], ["q3", "q2"]),
        (true, ["keep", "q2"], ["", "q2"]),
    ] {
        let mut model = random();
        model.config["tie_word_embeddings"] = tied.into();
        if tied {
            model.tensors.remove("lm_head.weight");
        }
        let place = Place::new(&model);
        let mut plan = place.plan("default = \"q2.qspec\"");
        for (name, spec) in [head, embedding].into_iter().zip(planned).filter(|p| !p.1.is_empty()) {
            let path = place.path(&format!("{spec}.qspec")).to_string_lossy().into_owned();
            plan.set("an option", name, if spec == "keep" { spec } else { &path });
        }
        Job { plan, ..place.job("out") }.run(&Silent).unwrap_or_else(|e| panic!("{e}"));
        assert!(failure(&place.path("out")).is_none());
        let checkpoint = Checkpoint::open(&place.path("out")).unwrap();
        let held = |name: &str| match checkpoint.layer(name) {
            Some(layer) => layer.spec.clone(),
            None => if checkpoint.contains(&format!("{name}.weight")) { "dense" } else { "" }.to_owned(),
        };
        assert_eq!([held(head), held(embedding)], stored, "tied {tied}, {planned:?}");
        let again = Job { plan: Plan::read(&place.path("out/plan.toml")).unwrap(), ..place.job("again") };
        again.run(&Silent).unwrap();
        assert_eq!(contents(&place.path("out")), contents(&place.path("again")));

        // One matrix in memory if one is stored, and the same logits on every engine.
        let weights = Model::open(&place.path("out")).unwrap().weights;
        assert_eq!(weights[LayerId(14)].weight.is(&weights[LayerId(15)].weight), stored[0].is_empty());
        let mut device = engine::open(Some(&Executor::interpreter()), &Arc::new(weights.clone()), 8).unwrap();
        let mut cpu = engine::open(None, &Arc::new(weights), 8).unwrap();
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for tokens in [&[1, 255, 7][..], &[0]] {
            device.forward(tokens, Logits::All, &mut a).unwrap();
            cpu.forward(tokens, Logits::All, &mut b).unwrap();
            assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "tied {tied}, {planned:?}");
        }
    }
}

#[test]
fn an_output_layer_is_calibrated_and_an_embedding_is_not() {
    let mut model = random();
    model.config["bos_token_id"] = 7.into();
    let head = "default = \"q2.qspec\"\n[layers]\n\"lm_head\" = \"q2.qspec\"";
    let both = head.replace("lm_head", "{lm_head,model.embed_tokens}");
    for (tied, text, name, fitted) in [
        (false, head, "lm_head", true),
        (true, head, "lm_head", true),
        (false, &both, "lm_head", true),
        (false, &both, "model.embed_tokens", false),
        (true, &both, "model.embed_tokens", false),
    ] {
        model.config["tie_word_embeddings"] = tied.into();
        let place = Place::new(&model);
        // Two blocks side by side, so that one can make good what the other does.
        let spec = fs::read_to_string(place.path("q2.qspec")).unwrap().replace("2 x 128", "8 x 32");
        fs::write(place.path("q2.qspec"), spec).unwrap();
        Job { plan: place.plan(text), ..place.job("plain") }.run(&Silent).unwrap();
        calibrated(Job { plan: place.plan(text), ..place.job("out") }, Texts::Own).run(&Silent).unwrap();
        let packed = |out: &str| Checkpoint::open(&place.path(out)).unwrap().linear(name).unwrap().1;
        assert_eq!(packed("plain") != packed("out"), fitted, "tied {tied}, {name}");
    }
}

#[test]
fn groups_and_kept_layers_are_in_the_manifest() {
    let place = Place::new(&random());
    let text = "default = \"q2.qspec\"\n[layers]\n\"model.layers.0.mlp.down_proj\" = \"keep\"\n[[groups]]\nfuse = \"model.layers.*.mlp.{up,gate}_proj\"";
    let job = Job { plan: place.plan(text), ..place.job("out") };
    let manifest = job.run(&Silent).unwrap();
    let group = |i| ["gate", "up"].map(|n| format!("model.layers.{i}.mlp.{n}_proj")).to_vec();
    assert_eq!(manifest.groups, [group(0), group(1)]);
    assert_eq!(manifest.layers.len(), 13);
    let read = Model::open(&place.path("out")).unwrap();
    let kept = &read.weights[LayerId(6)].weight;
    assert!(matches!(kept, Weight::Dense(_)));
    let again = Job { plan: Plan::read(&place.path("out/plan.toml")).unwrap(), ..place.job("again") };
    again.run(&Silent).unwrap();
    assert_eq!(contents(&place.path("out")), contents(&place.path("again")));
}

#[test]
fn rows_of_zeros_stay_zeros() {
    let mut model = random();
    let q = "model.layers.0.self_attn.q_proj.weight";
    model.tensors.get_mut(q).unwrap().1[64..128].fill(0.0);
    model.tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap().1.fill(0.0);
    let place = Place::new(&model);
    let manifest = place.quantize("out");
    let error = |name: &str| manifest.layers.iter().find(|l| l.name.ends_with(name)).unwrap().error;
    assert_eq!(error("0.mlp.up_proj"), 0.0);
    assert!(error("0.self_attn.q_proj") > 0.01);
    let (q, packed) = Checkpoint::open(&place.path("out")).unwrap().linear("model.layers.0.self_attn.q_proj").unwrap();
    let decoded = decode_matrix(&q, &packed);
    assert!(decoded[64..128].iter().all(|v| *v == 0.0) && decoded[..64].iter().all(|v| *v != 0.0));
}

#[test]
fn models_that_cannot_be_quantized() {
    let message = |change: &dyn Fn(&mut RandomModel)| {
        let mut model = random();
        change(&mut model);
        let place = Place::new(&model);
        let e = place.text(place.job("out").run(&Silent).unwrap_err());
        assert!(!place.path("out").exists());
        e
    };
    let k = "model.layers.1.self_attn.k_proj.weight";
    let mut all = vec![
        message(&|m| m.tensors.get_mut(k).unwrap().1[64 * 3 + 7] = f32::NAN),
        message(&|m| m.tensors.get_mut(k).unwrap().1[200..203].fill(f32::NEG_INFINITY)),
        message(&|m| m.tensors.get_mut(k).unwrap().1[192..256].fill(f32::MAX)),
        message(&|m| drop(m.tensors.remove(k))),
        message(&|m| m.tensors.get_mut(k).unwrap().0 = vec![64, 16]),
        message(&|m| m.tensors.get_mut(k).unwrap().0 = vec![16 * 64]),
    ];
    let place = Place::new(&random());
    place.quantize("out");
    let job = Job { model: place.path("out"), ..place.job("twice") };
    all.push(place.text(job.run(&Silent).unwrap_err()));
    let job = Job { model: place.path("none"), ..place.job("twice") };
    all.push(place.text(job.run(&Silent).unwrap_err()));
    insta::assert_snapshot!(all.join("\n\n"));
}

#[test]
fn every_damage_is_found_and_named() {
    let place = Place::new(&random());
    place.quantize("out");
    let out = place.path("out");
    let files = contents(&out);
    let mut lines = Vec::new();
    let mut note = |what: String| {
        let found = failure(&out).unwrap_or_else(|| panic!("{what}: not found"));
        // Where half of a manifest ends depends on the digits of errors.
        let found = found.split_once(" while parsing ").filter(|_| what.ends_with("qp.json")).map_or(&*found, |f| f.0);
        lines.push(format!("{what}\n{}", place.text(found)));
    };
    for (name, bytes) in &files {
        let path = out.join(name);
        fs::remove_file(&path).unwrap();
        note(format!("delete {name}"));
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        note(format!("first half of {name}"));
        fs::write(&path, [bytes.as_slice(), b"\n"].concat()).unwrap();
        note(format!("one byte more in {name}"));
        // The middle, and in weight files the length of the header, the header, its padding and the first tensor.
        let name_of_rows = bytes.windows(6).position(|w| w == b"\"rows\"");
        let mut places = vec![("the middle", name_of_rows.unwrap_or(bytes.len() / 2) + 1)];
        if name.starts_with("weights") {
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            places.extend([
                ("the header's length", 0),
                ("the header", 40),
                ("the header's padding", header - 1),
                ("the first tensor", header),
            ]);
        }
        for (what, at) in places {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            note(format!("flip a bit of {what} of {name}"));
        }
        fs::write(&path, bytes).unwrap();
    }
    assert!(failure(&out).is_none());
    insta::assert_snapshot!(lines.join("\n\n"));
}

#[test]
fn no_flipped_byte_passes_or_panics() {
    let place = Place::new(&random());
    place.quantize("out");
    let out = place.path("out");
    for (name, bytes) in contents(&out) {
        for at in (0..bytes.len()).step_by(bytes.len() / 40 + 1).chain([bytes.len() - 1]) {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(out.join(&name), bad).unwrap();
            assert!(failure(&out).is_some(), "byte {at} of {name}");
        }
        fs::write(out.join(&name), bytes).unwrap();
    }
}

#[test]
fn manifests_that_contradict_themselves_or_the_files() {
    let place = Place::new(&random());
    place.quantize("out");
    let out = place.path("out");
    let path = out.join("qp.json");
    let text = fs::read_to_string(&path).unwrap();
    let good = Manifest::from_text(&path, &text).unwrap();
    let mut all = Vec::new();
    let mut note = |what: &str, text: String| {
        fs::write(&path, text).unwrap();
        let found = failure(&out).unwrap_or_else(|| panic!("{what}: not found"));
        all.push(format!("{what}\n{}", place.text(found)));
    };
    note("another version", text.replace("\"format\": 1", "\"format\": 2"));
    note("no version", text.replace("\"format\": 1,", ""));
    note("not JSON", text.replace("\"format\"", "format"));
    note("edited", text.replace("\"rows\": 32", "\"rows\": 48"));
    note("no seal", format!("{}\n}}\n", text.rsplit_once(",\n").unwrap().0));
    // Sealed again by somebody who knows how.
    let mut sealed = |what: &str, change: &dyn Fn(&mut Manifest)| {
        let mut m = good.clone();
        change(&mut m);
        note(what, m.to_text());
    };
    sealed("a layer of another shape", &|m| m.layers[0].rows = 48);
    sealed("a layer of another spec", &|m| m.layers[0].spec = "q3".to_owned());
    sealed("a layer of no spec", &|m| m.layers[0].spec = "q9".to_owned());
    sealed("a layer less", &|m| drop(m.layers.remove(0)));
    sealed("a tensor more", &|m| m.tensors.push(TensorEntry { name: "ghost".to_owned(), ..m.tensors[0].clone() }));
    sealed("a tensor of another type", &|m| m.tensors[0].dtype = Dtype::F16);
    sealed("a file outside", &|m| m.files[0].name = "../config.json".to_owned());
    sealed("a spec of another name", &|m| m.specs[0].name = "q9".to_owned());
    sealed("a spec of another hash", &|m| m.specs[0].hash = m.specs[1].hash.clone());
    fs::write(&path, &text).unwrap();
    assert!(failure(&out).is_none());
    // Hashes depend on the canonical text, whose form may grow.
    let shown = good.specs.iter().fold(all.join("\n\n"), |s, e| s.replace(&e.hash, &format!("HASH-OF-{}", e.name)));
    insta::assert_snapshot!(shown);
}
