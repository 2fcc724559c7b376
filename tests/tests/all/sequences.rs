//! Steps of many sequences: the bits of each are those that it has alone.

use std::sync::Arc;

use qp_codegen::reader::{Book, Reader};
use qp_codegen::{formats, palette};
use qp_runtime::check::synthetic;
use qp_runtime::device::Executor;
use qp_runtime::engine::sampling::argmax;
use qp_runtime::engine::{
    Choice, Chunk, CpuEngine, CudaEngine, Engine, Error, Logits, PAGE, Precision, Room, Sampling, Wish, cut, mask_words,
};
use qp_runtime::model::{Model, Tensor, Weight, Weights};
use qp_tests::models::{RandomModel, VOCAB};

const ROOM: Room = Room { context: 100, pages: 70, cache: Precision::Bits16 };

/// A random model of an architecture, every layer quantized.
fn model(architecture: &str) -> Arc<Weights> {
    quantized(architecture, |name| Some(if name.contains("k_proj") { "fast_1.5" } else { "nuq_3" }))
}

/// A random model of an architecture, each layer by the quantizer that `choose` gives.
fn quantized(architecture: &str, choose: impl Fn(&str) -> Option<&'static str>) -> Arc<Weights> {
    let dir = tempfile::tempdir().unwrap();
    RandomModel::new(architecture).write(dir.path());
    let mut weights = Model::open(dir.path()).unwrap().weights;
    for id in weights.program.ids() {
        let layer = &mut weights[id];
        let Some(name) = choose(&layer.name) else { continue };
        let quantizer = Arc::new(synthetic::trained(palette::get(name).unwrap()));
        let shape = qp_codegen::spec::Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
        let matrix = Arc::new(synthetic::matrix(&layer.name, &quantizer, shape));
        layer.weight = Weight::Quantized { quantizer, matrix };
    }
    Arc::new(weights)
}

/// A random mixture of experts of an architecture, `chosen` of `count`.
fn mixture(
    architecture: &'static str,
    count: usize,
    chosen: usize,
    choose: impl Fn(&str) -> Option<&'static str>,
) -> Arc<Weights> {
    let shapes = synthetic::Shapes {
        hidden: 64,
        inner: 96,
        heads: 4,
        head_dim: 16,
        vocab: VOCAB,
        context: 128,
        biased: false,
        tied: false,
        experts: Some(synthetic::Mixture { architecture, count, chosen }),
    };
    let choose = |name: &str| choose(name).map(|member| synthetic::trained(palette::get(member).unwrap()));
    Arc::new(synthetic::model(&shapes, &choose).unwrap().1)
}

/// The same with the layers to which `choose` gives a format in that, of made-up bits.
fn in_formats(mut weights: Arc<Weights>, choose: impl Fn(&str) -> Option<&'static str>) -> Arc<Weights> {
    let changed = Arc::get_mut(&mut weights).unwrap();
    for id in changed.program.ids() {
        let layer = &mut changed[id];
        let Some(format) = choose(&layer.name).map(|name| formats::get(name).unwrap()) else { continue };
        let shape = qp_codegen::spec::Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
        let reader = Reader::new(&Arc::new(Book::new(format.clone())), &format.layouts[0], shape).unwrap();
        let parts = reader.made(id.0 as u64).into_iter().map(Into::into).collect();
        layer.weight = Weight::Dense(Tensor::of_format(&Arc::new(reader), parts).unwrap());
    }
    weights
}

/// The CPU's engine, and that of devices on the interpreter.
fn engines(weights: &Arc<Weights>, room: Room) -> [Box<dyn Engine>; 2] {
    let cpu = CpuEngine::new(weights.clone(), room).unwrap();
    let device = CudaEngine::new(Executor::interpreter(), weights, room).unwrap();
    [Box::new(cpu), Box::new(device)]
}

fn tokens(sequence: usize, count: usize) -> Vec<u32> {
    (0..count).map(|i| ((sequence * 31 + i * 17 + i * i) % VOCAB) as u32).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    assert!(logits.iter().all(|v| v.is_finite()));
    logits.iter().map(|v| v.to_bits()).collect()
}

/// All logits of `tokens`, computed at once in the first pages.
fn alone(engine: &mut dyn Engine, tokens: &[u32]) -> Vec<u32> {
    let mut out = Vec::new();
    engine.step(&[Chunk { tokens, position: 0, pages: &[0, 1], logits: Logits::All }], &mut out).unwrap();
    bits(&out)
}

/// Runs 33 sequences together: prompts of various lengths, cut where `first` says, then token by token. Each one's logits
/// are those of `expected`.
fn together(engine: &mut dyn Engine, all: &[Vec<u32>], expected: &[Vec<u32>], first: usize) -> Result<(), String> {
    let n = all.len();
    // Pages from both ends, so that neighbours are strangers.
    let pages: Vec<[u32; 2]> = (0..n as u32).map(|s| [s, 69 - s]).collect();
    let (mut logits, mut done) = (vec![Vec::new(); n], vec![0; n]);
    while (0..n).any(|s| done[s] < all[s].len()) {
        let (mut chunks, mut who) = (Vec::new(), Vec::new());
        for s in 0..n {
            let left = all[s].len() - done[s];
            let count = if done[s] < 2 * first { first + s } else { 1 }.min(left);
            if count > 0 {
                let tokens = &all[s][done[s]..done[s] + count];
                chunks.push(Chunk { tokens, position: done[s], pages: &pages[s], logits: Logits::All });
                who.push((s, count));
                done[s] += count;
            }
        }
        let mut out = Vec::new();
        engine.step(&chunks, &mut out).unwrap();
        let mut rows = out.chunks_exact(VOCAB);
        for (s, count) in who {
            rows.by_ref().take(count).for_each(|row| logits[s].extend(bits(row)));
        }
    }
    match (0..n).find(|&s| logits[s] != expected[s]) {
        Some(s) => Err(format!("sequence {s} is another than alone")),
        None => Ok(()),
    }
}

#[test]
fn an_answer_among_many_is_the_answer_alone() {
    for architecture in ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let mut engine = CpuEngine::new(model(architecture), ROOM).unwrap();
        let all: Vec<Vec<u32>> = (0..33).map(|s| tokens(s, 66 + s % 3)).collect();
        let expected: Vec<_> = all.iter().map(|t| alone(&mut engine, t)).collect();
        together(&mut engine, &all, &expected, 20).unwrap_or_else(|e| panic!("{architecture}: {e}"));
    }
}

#[test]
fn a_device_gives_the_bits_of_the_cpu_however_sequences_are_cut_and_mixed() {
    let (a, b) = ("nuq_3", "fast_1.5");
    let mixed = move |name: &str| {
        if ["q_proj", "v_proj", "down_proj"].iter().any(|part| name.contains(part)) {
            Some(a)
        } else {
            ["k_proj", "1.mlp.gate_proj", "lm_head"].iter().any(|part| name.contains(part)).then_some(b)
        }
    };
    for (architecture, kind, weights) in [
        ("LlamaForCausalLM", "quantized", model("LlamaForCausalLM")),
        ("LlamaForCausalLM", "mixed", quantized("LlamaForCausalLM", mixed)),
        ("LlamaForCausalLM", "unquantized", quantized("LlamaForCausalLM", |_| None)),
        ("Qwen2ForCausalLM", "quantized", model("Qwen2ForCausalLM")),
        ("Qwen2ForCausalLM", "mixed", quantized("Qwen2ForCausalLM", mixed)),
        ("Qwen2ForCausalLM", "unquantized", quantized("Qwen2ForCausalLM", |_| None)),
        ("Qwen3ForCausalLM", "quantized", model("Qwen3ForCausalLM")),
    ] {
        let count = if kind == "quantized" { 33 } else { 5 };
        mixed_and_alone(&weights, count, &format!("{architecture}, {kind}"));
    }
}

/// Some sequences together on a device, cut in two ways, give the bits that each has alone on the CPU.
fn mixed_and_alone(weights: &Arc<Weights>, count: usize, what: &str) {
    let mut cpu = CpuEngine::new(weights.clone(), ROOM).unwrap();
    let mut device = CudaEngine::new(Executor::interpreter(), weights, ROOM).unwrap();
    let all: Vec<Vec<u32>> = (0..count).map(|s| tokens(s, if s == 1 { 68 } else { 6 + s % 2 })).collect();
    let expected: Vec<_> = all.iter().map(|t| alone(&mut cpu, t)).collect();
    for first in [1, 2] {
        together(&mut device, &all, &expected, first).unwrap_or_else(|e| panic!("{what}, {first}: {e}"));
    }
}

#[test]
fn a_device_computes_mixtures_of_experts_as_the_cpu_however_sequences_are_cut_and_mixed() {
    let quantized = |name: &str| Some(if name.contains("up_proj") { "fast_1.5" } else { "nuq_3" });
    let alike = |name: &str| name.contains("experts").then_some("nuq_3");
    let some = |name: &str| ["experts.1.", "experts.4.", "2.down"].iter().any(|e| name.contains(e)).then_some("nuq_3");
    for (count, what, weights) in [
        (33, "Qwen 3, alike", mixture("Qwen3MoeForCausalLM", 9, 3, alike)),
        (5, "Qwen 3, quantized", mixture("Qwen3MoeForCausalLM", 9, 3, quantized)),
        (5, "gpt-oss, alike", mixture("GptOssForCausalLM", 5, 2, alike)),
        (5, "GLM-4.5, some quantized", mixture("Glm4MoeForCausalLM", 8, 1, some)),
        (5, "Qwen 3, unquantized", mixture("Qwen3MoeForCausalLM", 5, 5, |_| None)),
    ] {
        mixed_and_alone(&weights, count, what);
    }
}

#[test]
fn a_device_computes_experts_in_formats_as_the_cpu_however_sequences_are_cut_and_mixed() {
    let all = |format: &'static str| move |name: &str| name.contains("experts").then_some(format);
    // Gates and what they gate of several formats, some experts quantized, others neither.
    let several = |name: &str| match name {
        _ if !name.contains("experts") || name.contains("experts.0.") => None,
        _ if name.contains("experts.1.") => Some("q8_0"),
        _ if name.contains("up_proj") => Some("packed_int4_g32"),
        _ => Some("q4_0"),
    };
    let quantized = |name: &str| name.contains("experts.0.").then_some("nuq_3");
    for (count, what, weights) in [
        (33, "Qwen 3, q8_0", in_formats(mixture("Qwen3MoeForCausalLM", 9, 3, |_| None), all("q8_0"))),
        (5, "Qwen 3, several", in_formats(mixture("Qwen3MoeForCausalLM", 5, 3, quantized), several)),
        (5, "gpt-oss, mxfp4", in_formats(mixture("GptOssForCausalLM", 5, 2, |_| None), all("mxfp4"))),
        (5, "GLM-4.5, q5_1", in_formats(mixture("Glm4MoeForCausalLM", 8, 1, |_| None), all("q5_1"))),
    ] {
        mixed_and_alone(&weights, count, what);
    }
}

#[test]
fn experts_of_no_token_and_of_all_are_no_exceptions() {
    for quantizer in [Some("nuq_3"), None] {
        let mut weights = mixture("GptOssForCausalLM", 5, 2, |name| quantizer.filter(|_| name.contains("experts")));
        let changed = Arc::get_mut(&mut weights).unwrap();
        for block in 0..2 {
            let router = changed.program.named(&format!("model.layers.{block}.mlp.router")).unwrap();
            // All go through the second expert, none through the third and the last.
            changed[router].bias = Some(vec![0.1, 1e4, -1e4, 0.0, -1e4]);
        }
        mixed_and_alone(&weights, 9, "chosen by biases");
    }
}

#[test]
fn wanted_rows_and_best_tokens_are_those_of_all_logits() {
    for mut engine in engines(&model("LlamaForCausalLM"), ROOM) {
        let engine = engine.as_mut();
        let (a, b, c) = (tokens(1, 9), tokens(2, 4), tokens(3, 5));
        let [all_a, all_b] = [&a, &b].map(|t| alone(engine, t));
        let chunk = |tokens, page, logits| Chunk { tokens, position: 0, pages: page, logits };
        let chunks = [chunk(&a, &[3], Logits::Last), chunk(&c, &[4], Logits::None), chunk(&b, &[5], Logits::All)];
        let (mut out, mut best) = (Vec::new(), Vec::new());
        engine.step(&chunks, &mut out).unwrap();
        assert!(bits(&out) == [&all_a[8 * VOCAB..], &all_b].concat());
        engine.best(&chunks, &mut best).unwrap();
        let first_largest =
            |row: &[f32]| (0..VOCAB).max_by(|&i, &j| row[i].total_cmp(&row[j]).then(j.cmp(&i))).unwrap();
        let expected: Vec<u32> = out.chunks_exact(VOCAB).map(|row| first_largest(row) as u32).collect();
        assert_eq!(best, expected);
    }
}

#[test]
fn a_copied_page_goes_on_as_its_original() {
    for mut engine in engines(&model("LlamaForCausalLM"), ROOM) {
        let engine = engine.as_mut();
        let all = tokens(4, 80);
        let expected = alone(engine, &all);
        engine.copy_page(1, 33).unwrap();
        let mut out = Vec::new();
        // The rest of the second page is written anew in the copy; the first page is shared.
        for pages in [[0, 33], [0, 1]] {
            let chunk = Chunk { tokens: &all[75..], position: 75, pages: &pages, logits: Logits::All };
            engine.step(&[chunk], &mut out).unwrap();
            assert!(bits(&out) == expected[75 * VOCAB..], "{pages:?}");
        }
        assert!(matches!(engine.copy_page(0, 70), Err(Error::Page { page: 70, pages: 70 })));
    }
}

/// Two sequences that mostly go on with their likeliest tokens: what each call gives.
fn conversation(engine: &mut dyn Engine) -> Vec<u32> {
    let (a, b) = (tokens(7, 60), tokens(8, 3));
    let (pages, mut out, mut all) = ([[0, 1], [2, 3]], Vec::new(), Vec::new());
    let mut at = [a.len(), b.len()];
    fn chunk<'a>(tokens: &'a [u32], position: usize, pages: &'a [u32]) -> Chunk<'a> {
        Chunk { tokens, position, pages, logits: Logits::Last }
    }
    engine.best(&[chunk(&a, 0, &pages[0]), chunk(&b, 0, &pages[1])], &mut out).unwrap();
    for round in 0..12 {
        all.extend(&out);
        let mut next = out.clone();
        if round == 6 {
            next[0] = 7;
        }
        let both = [(0, &next[..1]), (1, &next[1..])];
        // The first sequence rests for two rounds.
        let who = if [8, 9].contains(&round) { &both[1..] } else { &both[..] };
        let chunks: Vec<Chunk<'_>> = who.iter().map(|&(s, t)| chunk(t, at[s], &pages[s])).collect();
        let mut given = Vec::new();
        if round == 3 {
            // Somebody wants logits in between, of other tokens.
            let other = [5, 6];
            engine.step(&[chunk(&other, at[0], &pages[0])], &mut Vec::new()).unwrap();
        }
        engine.best(&chunks, &mut given).unwrap();
        for (&(s, _), token) in who.iter().zip(given) {
            out[s] = token;
            at[s] += 1;
        }
    }
    all
}

#[test]
fn steps_that_are_launched_ahead_change_nothing() {
    let weights = model("LlamaForCausalLM");
    let [cpu, device] = engines(&weights, ROOM).map(|mut e| conversation(e.as_mut()));
    assert_eq!(cpu, device);
    // Numbers that are none come from a step that was launched ahead, too.
    let mut broken = (*weights).clone();
    let embedding = broken.program.named("model.embed_tokens").unwrap();
    let mut values = vec![0.5f32; broken[embedding].rows * broken[embedding].cols];
    values[9 * broken[embedding].cols] = f32::INFINITY;
    let shape = [broken[embedding].rows, broken[embedding].cols];
    broken[embedding].weight = Weight::Dense(qp_runtime::model::Tensor::from_f32(&shape, &values).unwrap());
    let broken = Arc::new(broken);
    for mut engine in engines(&broken, ROOM) {
        let mut best = |token: u32, position| {
            let (tokens, mut out) = ([token], Vec::new());
            let chunk = Chunk { tokens: &tokens, position, pages: &[0], logits: Logits::Last };
            engine.best(&[chunk], &mut out).map(|()| out[0])
        };
        let first = best(1, 0).unwrap();
        let error = best(9, 1).unwrap_err();
        assert!(
            matches!(&error, Error::NotFinite { layer } if layer.contains("model.layers.0.self_attn.q_proj")),
            "{error}"
        );
        assert_eq!(best(1, 0).unwrap(), first, "an error leaves nothing behind");
    }
}

/// Two sequences whose tokens are drawn, or are the likeliest that are not forbidden: what each call gives.
fn drawn(engine: &mut dyn Engine) -> Vec<u32> {
    let (a, b) = (tokens(5, 6), tokens(6, 9));
    let settings =
        |temperature, top_k, top_p, seed| Sampling { temperature, top_k, top_p, seed, ..Sampling::default() };
    let samplings = [settings(1.0, 40, 0.9, 3), settings(0.7, 0, 1.0, 4)];
    let (mut prompts, mut at, mut all) = ([a, b], [0, 0], Vec::new());
    for draw in 0..9 {
        let pages = [[0], [1]];
        let chunks: Vec<Chunk<'_>> = (0..2)
            .map(|s| Chunk { tokens: &prompts[s], position: at[s], pages: &pages[s], logits: Logits::Last })
            .collect();
        // The draws of the second sequence skip some.
        let choices = [0, 1].map(|s| Choice {
            sampling: if draw == 4 { Sampling::default() } else { samplings[s] },
            draw: draw + 5 * (s as u32) * (draw / 5),
        });
        let mut out = Vec::new();
        // Some steps forbid the first sequence, or both, a part of the tokens.
        let words = mask_words(engine.vocab() as u32) as usize;
        let third = vec![0x2492_4924u32.rotate_left(draw); words];
        let forbidden: [&[u32]; 2] = [if draw % 3 == 1 { &third } else { &[] }, if draw == 4 { &third } else { &[] }];
        let mut wishes = [0, 1].map(|s| Wish::Token(choices[s], forbidden[s]));
        // Some read the logits of one sequence, or of both, instead.
        let read = [draw == 2 || draw == 7, draw == 5 || draw == 7];
        (0..2).filter(|s| read[*s]).for_each(|s| wishes[s] = Wish::Logits);
        let (mut tokens, mut logits) = (Vec::new(), vec![7.0]);
        engine.answer(&chunks, &wishes, &mut tokens, &mut logits).unwrap();
        assert_eq!(logits.len(), read.iter().filter(|r| **r).count() * VOCAB);
        let (mut tokens, mut rows) = (tokens.into_iter(), logits.chunks_exact(VOCAB));
        for is_read in read {
            out.push(if is_read { argmax(rows.next().unwrap()).unwrap() } else { tokens.next().unwrap() });
        }
        all.extend(logits.iter().map(|l| l.to_bits()));
        assert_eq!(tokens.next(), None);
        for (s, (token, mask)) in out.iter().zip(forbidden).enumerate() {
            assert!(
                read[s] || mask.is_empty() || mask[*token as usize / 32] >> (token % 32) & 1 == 0,
                "{token} is forbidden"
            );
        }
        for s in 0..2 {
            at[s] += prompts[s].len();
            prompts[s] = vec![out[s]];
        }
        all.extend(out);
    }
    all
}

#[test]
fn engines_draw_the_same_tokens() {
    for quantize in [true, false] {
        let name = "LlamaForCausalLM";
        let weights = if quantize { model(name) } else { quantized(name, |_| None) };
        let [cpu, device] = engines(&weights, ROOM).map(|mut e| drawn(e.as_mut()));
        assert_eq!(cpu, device);
    }
}

/// What is made ready is what steps are made of: an engine that was warmed loads nothing more, and computes the same.
#[test]
fn a_warmed_engine_computes_the_same() {
    let weights = model("LlamaForCausalLM");
    let [mut cold, mut warm] = [(); 2].map(|()| CudaEngine::new(Executor::interpreter(), &weights, ROOM).unwrap());
    warm.warm().unwrap();
    let ready = warm.kernels();
    assert!(ready > 20, "{ready} kernels");
    assert_eq!(drawn(&mut cold), drawn(&mut warm));
    assert_eq!(warm.kernels(), ready, "a step needs kernels that were not made ready");
    assert!(cold.kernels() < ready);
}

#[test]
fn what_cannot_be_is_refused() {
    let weights = model("LlamaForCausalLM");
    let (cpu, device) = (CpuEngine::new(weights.clone(), Room::one(129)), Executor::interpreter());
    assert!(matches!(cpu, Err(Error::Positions { wanted: 129, max: 128 })));
    let device = CudaEngine::new(device, &weights, Room::one(129));
    assert!(matches!(device, Err(Error::Positions { wanted: 129, max: 128 })));
    for mut engine in engines(&weights, ROOM) {
        let mut step = |tokens: &[u32], position, pages: &[u32]| {
            engine.step(&[Chunk { tokens, position, pages, logits: Logits::Last }], &mut Vec::new()).unwrap_err()
        };
        assert!(matches!(step(&[1, 2], 99, &[0, 1]), Error::Context { wanted: 101, context: 100 }));
        assert!(matches!(step(&[1, 2], 63, &[0]), Error::Context { wanted: 65, context: PAGE }));
        assert!(matches!(step(&[256], 0, &[0]), Error::Token { token: 256, vocab: VOCAB }));
        assert!(matches!(step(&[1], 0, &[70]), Error::Page { page: 70, pages: 70 }));
    }
}

#[test]
fn steps_are_cut_and_only_last_tokens_keep_their_logits() {
    let (a, b) = (tokens(1, 7), tokens(2, 3));
    let chunks = [
        Chunk { tokens: &a, position: 5, pages: &[0], logits: Logits::Last },
        Chunk { tokens: &[], position: 0, pages: &[], logits: Logits::Last },
        Chunk { tokens: &b, position: 0, pages: &[1], logits: Logits::All },
    ];
    let shape = |rows, sequences| -> Vec<Vec<_>> {
        let steps = cut(&chunks, &|left| left.min(4), rows, sequences);
        steps.iter().map(|s| s.iter().map(|c| (c.tokens.len(), c.position, c.logits)).collect()).collect()
    };
    let (none, last, all) = (Logits::None, Logits::Last, Logits::All);
    assert_eq!(shape(9, 9), [vec![(4, 5, none)], vec![(3, 9, last), (1, 0, all)], vec![(2, 1, all)]]);
    assert_eq!(
        shape(1, 9),
        [vec![(4, 5, none)], vec![(3, 9, last)], vec![(1, 0, all)], vec![(1, 1, all)], vec![(1, 2, all)]]
    );
    assert_eq!(shape(9, 1), [vec![(4, 5, none)], vec![(3, 9, last)], vec![(3, 0, all)]]);
}
