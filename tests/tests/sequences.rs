//! Steps of many sequences: the bits of each are those that it has alone.

use std::sync::Arc;

use qp_codegen::palette;
use qp_runtime::check::synthetic;
use qp_runtime::engine::{Chunk, CpuEngine, Engine, Error, Logits, PAGE, Room, cut};
use qp_runtime::model::{Model, Weight, Weights};
use qp_tests::models::{RandomModel, VOCAB};

const ROOM: Room = Room { context: 100, pages: 70 };

/// A random model of an architecture, every layer quantized: products are exact, so that nothing depends on how many
/// tokens are computed together.
fn model(architecture: &str) -> Arc<Weights> {
    let dir = tempfile::tempdir().unwrap();
    RandomModel::new(architecture).write(dir.path());
    let mut weights = Model::open(dir.path()).unwrap().weights;
    let quantizers = ["nuq_3", "fast_1.5"].map(|n| Arc::new(synthetic::trained(palette::get(n).unwrap())));
    for id in weights.program.ids() {
        let layer = &mut weights[id];
        let quantizer = quantizers[usize::from(layer.name.contains("k_proj"))].clone();
        let shape = qp_codegen::spec::Shape { rows: layer.rows as u32, cols: layer.cols as u32 };
        let matrix = Arc::new(synthetic::matrix(&layer.name, &quantizer, shape));
        layer.weight = Weight::Quantized { quantizer, matrix };
    }
    Arc::new(weights)
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

#[test]
fn an_answer_among_many_is_the_answer_alone() {
    for architecture in ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let weights = model(architecture);
        let mut engine = CpuEngine::new(weights, ROOM).unwrap();
        let all: Vec<Vec<u32>> = (0..33).map(|s| tokens(s, 66 + s % 3)).collect();
        let expected: Vec<_> = all.iter().map(|t| alone(&mut engine, t)).collect();
        // Pages from both ends, so that neighbours are strangers.
        let pages: Vec<[u32; 2]> = (0..33).map(|s| [s, 69 - s]).collect();
        let mut logits = vec![Vec::new(); 33];
        // Prompts of various lengths together, cut in two places, then token by token.
        let mut done = [0; 33];
        while (0..33).any(|s| done[s] < all[s].len()) {
            let mut chunks = Vec::new();
            let mut who = Vec::new();
            for s in 0..33 {
                let left = all[s].len() - done[s];
                let n = if done[s] < 40 { 20 + s } else { 1 }.min(left);
                if n > 0 {
                    let tokens = &all[s][done[s]..done[s] + n];
                    chunks.push(Chunk { tokens, position: done[s], pages: &pages[s], logits: Logits::All });
                    who.push((s, n));
                    done[s] += n;
                }
            }
            let mut out = Vec::new();
            engine.step(&chunks, &mut out).unwrap();
            let mut rows = out.chunks_exact(VOCAB);
            for (s, n) in who {
                rows.by_ref().take(n).for_each(|row| logits[s].extend(bits(row)));
            }
        }
        for s in 0..33 {
            assert!(logits[s] == expected[s], "{architecture}: sequence {s}");
        }
    }
}

#[test]
fn wanted_rows_and_best_tokens_are_those_of_all_logits() {
    let mut engine = CpuEngine::new(model("LlamaForCausalLM"), ROOM).unwrap();
    let (a, b, c) = (tokens(1, 9), tokens(2, 4), tokens(3, 5));
    let [all_a, all_b] = [&a, &b].map(|t| alone(&mut engine, t));
    let chunk = |tokens, page, logits| Chunk { tokens, position: 0, pages: page, logits };
    let chunks = [chunk(&a, &[3], Logits::Last), chunk(&c, &[4], Logits::None), chunk(&b, &[5], Logits::All)];
    let (mut out, mut best) = (Vec::new(), Vec::new());
    engine.step(&chunks, &mut out).unwrap();
    assert!(bits(&out) == [&all_a[8 * VOCAB..], &all_b].concat());
    engine.best(&chunks, &mut best).unwrap();
    let first_largest = |row: &[f32]| (0..VOCAB).max_by(|&i, &j| row[i].total_cmp(&row[j]).then(j.cmp(&i))).unwrap();
    let expected: Vec<u32> = out.chunks_exact(VOCAB).map(|row| first_largest(row) as u32).collect();
    assert_eq!(best, expected);
}

#[test]
fn a_copied_page_goes_on_as_its_original() {
    let mut engine = CpuEngine::new(model("LlamaForCausalLM"), ROOM).unwrap();
    let all = tokens(4, 80);
    let expected = alone(&mut engine, &all);
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

#[test]
fn what_cannot_be_is_refused() {
    let weights = model("LlamaForCausalLM");
    assert!(matches!(CpuEngine::new(weights.clone(), Room::one(129)), Err(Error::Positions { wanted: 129, max: 128 })));
    let mut engine = CpuEngine::new(weights, ROOM).unwrap();
    let mut step = |tokens: &[u32], position, pages: &[u32]| {
        engine.step(&[Chunk { tokens, position, pages, logits: Logits::Last }], &mut Vec::new()).unwrap_err()
    };
    assert!(matches!(step(&[1, 2], 99, &[0, 1]), Error::Context { wanted: 101, context: 100 }));
    assert!(matches!(step(&[1, 2], 63, &[0]), Error::Context { wanted: 65, context: PAGE }));
    assert!(matches!(step(&[256], 0, &[0]), Error::Token { token: 256, vocab: VOCAB }));
    assert!(matches!(step(&[1], 0, &[70]), Error::Page { page: 70, pages: 70 }));
}

#[test]
fn steps_are_cut_and_only_last_tokens_keep_their_logits() {
    let (a, b) = (tokens(1, 7), tokens(2, 3));
    let chunks = [
        Chunk { tokens: &a, position: 5, pages: &[0], logits: Logits::Last },
        Chunk { tokens: &[], position: 0, pages: &[], logits: Logits::Last },
        Chunk { tokens: &b, position: 0, pages: &[1], logits: Logits::All },
    ];
    let steps = cut(&chunks, 4);
    let shape: Vec<Vec<_>> =
        steps.iter().map(|s| s.iter().map(|c| (c.tokens.len(), c.position, c.logits)).collect()).collect();
    let (none, last, all) = (Logits::None, Logits::Last, Logits::All);
    assert_eq!(shape, [vec![(4, 5, none)], vec![(3, 9, last), (1, 0, all)], vec![(2, 1, all)]]);
}
