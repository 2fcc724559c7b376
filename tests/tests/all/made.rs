//! Models quantized with formats: as a plan says, run, verified and refused.

use std::path::Path;

use qp_runtime::checkpoint::Checkpoint;
use qp_runtime::import::export;
use qp_runtime::model::Model;
use qp_runtime::plan::Plan;
use qp_runtime::quantize::calibrate::{Calibrate, Texts};
use qp_runtime::quantize::{Job, Silent};
use qp_tests::models::{RandomModel, logits, write_spec};

/// A plan of two formats, one without a layout of its own, and a quantizer.
const PLAN: &str = r#"
default = "q8_0"
[layers]
"model.layers.0.mlp.*" = "own.qspec"
"model.layers.1.mlp.down_proj" = "small.qspec"
"model.embed_tokens" = "q8_0"
"#;

/// Eight bits with a scale for a row.
const OWN: &str = "quantizer own {
    bits   8
    values i8
    decode w { [(w ^ 128) - 128] }
    field  s : bf16 per row = absmax(w) / 127
    weight e { e * s }
}";

fn write(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    RandomModel::new("LlamaForCausalLM").write(dir);
    std::fs::write(dir.join("own.qspec"), OWN).unwrap();
    write_spec(dir, "small", 6);
}

#[test]
fn a_plan_may_mix_formats_and_quantizers() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write(&model);
    let plan = Plan::parse("plan", PLAN, model.clone()).unwrap();
    let out = dir.path().join("out");
    let manifest = Job::new(&model, plan.clone(), &out).run(&Silent).unwrap();
    let specs: Vec<&str> = manifest.specs.iter().map(|s| s.name.as_str()).collect();
    assert_eq!((manifest.format, specs), (2, vec!["own", "q8_0", "small"]));
    let layout = |name: &str| {
        let layer = manifest.layers.iter().find(|l| l.name == name).unwrap();
        assert!(layer.error > 0.0 && layer.error < 0.05, "{layer:?}");
        layer.layout.clone()
    };
    assert_eq!(layout("model.layers.0.mlp.up_proj").as_deref(), Some("plain"));
    assert_eq!(layout("model.layers.1.self_attn.q_proj").as_deref(), Some("gguf"));
    assert_eq!(layout("model.layers.1.mlp.down_proj"), None);
    Checkpoint::open(&out).unwrap().verify(&mut |_| ()).unwrap();
    // Its predictions are nearly the model's.
    let (found, expected) = (logits(Model::open(&out).unwrap()), logits(Model::open(&model).unwrap()));
    let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
    let off = squares(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
    assert!(off > 0.0 && off < 0.05 * squares(&mut expected.iter().copied()), "{off}");
    // The same plan makes the same checkpoint, and it is no import.
    let again = dir.path().join("again");
    let mut job = Job::new(&model, plan, &again);
    job.threads = Some(3);
    assert_eq!(job.run(&Silent).unwrap(), manifest);
    let error = export(&out, &dir.path().join("back"), false, &mut |_, _, _| ()).unwrap_err().to_string();
    assert!(error.contains("was not imported"), "{error}");
}

#[test]
fn what_no_format_can_do_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write(&model);
    let out = dir.path().join("out");
    let refused = |plan: Plan| {
        let error = Job::new(&model, plan, &out).run(&Silent).unwrap_err().to_string();
        assert!(!out.exists());
        error
    };
    let error = refused(Plan::uniform("q4_k"));
    assert!(error.contains("as q4_k: ") && error.contains("which is no whole number"), "{error}");
    let error = refused(Plan::uniform("iq2_xxs"));
    assert!(error.contains("`iq2_xxs` cannot be made: no formula for "), "{error}");
    let fused =
        "default = \"q8_0\"\n[[groups]]\nfuse = [\"model.layers.0.mlp.gate_proj\", \"model.layers.0.mlp.up_proj\"]";
    let error = refused(Plan::parse("plan", fused, model.clone()).unwrap());
    assert!(
        error.contains("`model.layers.0.mlp.gate_proj` has the format `q8_0`, which has launches of its own"),
        "{error}"
    );
}

#[test]
fn codes_are_fitted_to_texts_with_the_same_fields() {
    let dir = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv-llama");
    let made = |name: &str, calibrate: bool, threads: Option<usize>| {
        let out = dir.path().join(name);
        let mut job = Job::new(&model, Plan::uniform("gptq_int3_g128"), &out);
        job.calibrate = calibrate.then_some(Calibrate { texts: Texts::Own, tokens: 1024 });
        job.threads = threads;
        job.run(&Silent).unwrap();
        out
    };
    let (plain, fitted) = (made("plain", false, None), made("fitted", true, None));
    let tensor = |dir: &Path, name: &str| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        checkpoint.bytes(&format!("model.layers.3.mlp.up_proj.{name}")).unwrap().as_slice().to_vec()
    };
    assert!(tensor(&plain, "scales") == tensor(&fitted, "scales"));
    assert!(tensor(&plain, "qweight") != tensor(&fitted, "qweight"));
    let expected = logits(Model::open(&model).unwrap());
    let off = |dir: &Path| {
        let found = logits(Model::open(dir).unwrap());
        found.iter().zip(&expected).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    };
    assert!(off(&fitted) < 0.8 * off(&plain), "{} of {}", off(&fitted), off(&plain));
    // Threads change nothing.
    let again = made("again", true, Some(1));
    assert!(tensor(&again, "qweight") == tensor(&fitted, "qweight"));
}

#[test]
fn what_would_not_be_finite_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write(&model);
    for (name, fields, weight) in [
        ("nan", "field s : f32 per 1 x 32 = absmax(w) / 7", "s * (e - 8) / (s - s)"),
        ("steep", "field s : f32 per 1 x 32 = 10 ** 30 * absmax(w)", "s * (e - 8) * s"),
    ] {
        let path = dir.path().join(format!("{name}.qspec"));
        let text =
            format!("quantizer {name} {{ bits 4 values i8 decode w {{ [w] }} {fields} weight e {{ {weight} }} }}");
        std::fs::write(&path, text).unwrap();
        let out = dir.path().join("out");
        let error =
            Job::new(&model, Plan::uniform(&path.display().to_string()), &out).run(&Silent).unwrap_err().to_string();
        assert!(error.starts_with("layer 'model.layers.0.") && error.contains("are not finite"), "{error}");
        assert!(!out.exists());
    }
}
