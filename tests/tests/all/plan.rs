//! Plans: what they mean, and what is said about those that mean nothing.

use qp_codegen::spec::Shape;
use qp_runtime::plan::{Layer, Plan, Resolved};

/// Two blocks, an output layer and an embedding.
fn layers() -> Vec<Layer> {
    let layer = |name: String, rows, cols, input| {
        let by_default = name.starts_with("model.layers");
        Layer { by_default, name, shape: Shape { rows, cols }, input }
    };
    let mut all = Vec::new();
    for i in 0..2 {
        for (name, rows, cols, input) in [
            ("self_attn.q_proj", 256, 256, 0),
            ("self_attn.k_proj", 128, 256, 0),
            ("self_attn.v_proj", 128, 256, 0),
            ("self_attn.o_proj", 256, 256, 1),
            ("mlp.gate_proj", 768, 256, 2),
            ("mlp.up_proj", 768, 256, 2),
            ("mlp.down_proj", 256, 768, 3),
        ] {
            all.push(layer(format!("model.layers.{i}.{name}"), rows, cols, Some(4 * i + input)));
        }
    }
    for (name, input) in [("lm_head", Some(8)), ("model.embed_tokens", None)] {
        all.push(layer(name.to_owned(), 2048, 256, input));
    }
    all
}

/// Three quantizers in files, which a plan names by their paths.
fn specs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bits) in [("q2", 2), ("q3", 3), ("q4", 4)] {
        qp_tests::models::write_spec(dir.path(), name, bits);
    }
    std::fs::write(dir.path().join("other.qspec"), std::fs::read(dir.path().join("q2.qspec")).unwrap()).unwrap();
    let twin = std::fs::read_to_string(dir.path().join("q3.qspec")).unwrap().replace("q3", "q2");
    std::fs::write(dir.path().join("twin.qspec"), twin).unwrap();
    std::fs::write(dir.path().join("bad.qspec"), "quantizer bad {\n    window 99\n}\n").unwrap();
    dir
}

fn resolve(text: &str) -> Result<Resolved, String> {
    let dir = specs();
    let shown = |d: qp_codegen::syntax::Diagnostics| d.render(false).replace(&*dir.path().to_string_lossy(), "DIR");
    let plan = Plan::parse("plan.toml", text, dir.path().to_owned()).map_err(shown)?;
    plan.resolve(&layers()).map_err(shown)
}

/// `layer = spec` of every layer.
fn choices(text: &str) -> Vec<String> {
    let r = resolve(text).unwrap_or_else(|e| panic!("{e}"));
    let name = |s: Option<usize>| s.map_or("keep", |s| r.specs[s].name()).to_owned();
    layers().iter().zip(&r.layers).map(|(l, s)| format!("{} = {}", l.name, name(*s))).collect()
}

#[test]
fn later_rules_win_over_earlier_ones_and_over_the_default() {
    let text = r#"
        default = "./q3.qspec"
        [layers]
        "model.layers.*.mlp.*" = "./q2.qspec"
        "model.layers.1.mlp.{up,down}_proj" = "./q4.qspec"
        "model.layers.0.self_attn.o_proj" = "keep"
        "lm_head" = "./q4.qspec"
    "#;
    insta::assert_snapshot!(choices(text).join("\n"));
}

#[test]
fn the_default_leaves_the_output_layer_and_the_embedding_alone() {
    let r = resolve("default = \"./q3.qspec\"").unwrap();
    assert!(r.layers[..14].iter().all(|l| *l == Some(0)) && r.layers[14..] == [None, None]);
    assert_eq!(r.specs.len(), 1);
    let dir = specs();
    let uniform = Plan::uniform(&dir.path().join("q3.qspec").to_string_lossy()).resolve(&layers()).unwrap();
    assert_eq!(uniform, r);
}

#[test]
fn groups_are_formed_by_what_the_stars_stand_for() {
    let text = r#"
        default = "./q3.qspec"
        [[groups]]
        fuse = "model.layers.*.self_attn.{v,q,k}_proj"
        [[groups]]
        fuse = ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"]
    "#;
    assert_eq!(resolve(text).unwrap().groups, [vec![0, 1, 2], vec![7, 8, 9], vec![11, 12]]);
}

#[test]
fn options_win_over_the_plan() {
    let dir = specs();
    let mut plan = Plan::uniform("keep");
    plan.set("--embedding", "model.embed_tokens", &dir.path().join("q4.qspec").to_string_lossy());
    let r = plan.resolve(&layers()).unwrap();
    assert_eq!((r.layers[14], r.layers[15]), (None, Some(0)));
    plan.set("--lm-head", "lm_head", "tqc_4");
    let message = plan.resolve(&layers()).unwrap_err().render(false);
    assert!(message.contains("--lm-head") && message.contains("tcq_4"), "{message}");
}

#[test]
fn messages() {
    let bad = [
        "default = tcq_3",
        "default = 3\nlayer = {}\nbits = 4",
        "default = \"./q3.qspec\"\nlayers = \"./q4.qspec\"\ngroups = {}",
        "default = \"./q3.qspec\"\n[layers]\nmodel.layers.0 = \"./q4.qspec\"\n\"lm_head\" = 4\n\"a{b\" = \"./q4.qspec\"\n\"\" = \"./q4.qspec\"",
        "default = \"./q3.qspec\"\n[layers]\n\"model.layers.*.mlp.dwn_proj\" = \"./q4.qspec\"\n\"model.layers.7.mlp.up_proj\" = \"./q4.qspec\"\n\"transformer.h.0\" = \"./q4.qspec\"\n\"embed_tokens\" = \"./q4.qspec\"",
        "default = \"tqc_3\"\n[layers]\n\"lm_head\" = \"mine/none.qspec\"\n\"model.layers.0.mlp.*\" = \"bad.qspec\"",
        "default = \"other.qspec:q2\"\n[layers]\n\"lm_head\" = \"twin.qspec:q2\"\n\"model.layers.*.mlp.*\" = \"q2.qspec\"",
        "[layers]\n\"lm_head\" = \"./q4.qspec\"\n\"model.layers.0.*.*\" = \"keep\"",
        "default = \"./q3.qspec\"\n[[groups]]\nfuse = [\"model.layers.*.mlp.down_proj\", \"model.layers.*.mlp.up_proj\"]\n[[groups]]\nfuse = \"model.layers.0.mlp.up_proj\"\n[[groups]]\nfuse = \"lm_head\"\n[[groups]]\nfuse = \"x.*\"",
        "default = \"./q3.qspec\"\n[layers]\n\"model.embed_tokens\" = \"./q3.qspec\"\n[[groups]]\nfuse = [\"model.embed_tokens\", \"model.layers.0.self_attn.q_proj\"]",
        "default = \"./q3.qspec\"\n[[groups]]\nfuse = [1, \"x.*\"]\nname = \"y\"",
        "default = \"./q3.qspec\"\n[[groups]]\nfuse = \"model.layers.*.self_attn.{q,k,o}_proj\"\n[[groups]]\nfuse = [\"model.layers.0.mlp.up_proj\", \"model.layers.1.mlp.up_proj\"]",
    ];
    // The palette may grow.
    let all = format!("there is {}", qp_codegen::palette::names().join(", "));
    let message = |b: &str| resolve(b).expect_err(b).replace(&all, "there is (the palette)");
    let shown: Vec<String> = bad.iter().map(|b| format!("{b}\n--->\n{}", message(b))).collect();
    insta::assert_snapshot!(shown.join("\n=====\n\n"));
}

#[test]
fn a_pattern_of_stars_takes_no_time() {
    let plan = |pattern: &str| {
        Plan::parse("plan", &format!("default = \"tcq_3\"\n[layers]\n{pattern:?} = \"tcq_4\"\n"), Default::default())
    };
    let e = plan(&"*".repeat(5000)).unwrap_err().to_string();
    assert!(e.contains("too long"), "{e}");
    // A search that tries all ways to share the name among the stars would not end.
    let layers =
        [Layer { name: "a".repeat(2000), shape: Shape { rows: 16, cols: 128 }, by_default: true, input: None }];
    let e = plan(&format!("{}b", "*".repeat(100))).unwrap().resolve(&layers).unwrap_err().to_string();
    assert!(e.contains("matches no layer"), "{e}");
}
