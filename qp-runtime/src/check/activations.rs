//! Comparing what stands around products with the CPU: preparing activations, in every spread, and choosing tokens.

use qp_codegen::kernels::Span;
use qp_codegen::kernels::argmax::{self, Argmax};
use qp_codegen::kernels::prepare::{Gate, Prepare, Spread};
use qp_codegen::kernels::sample::{self, Sample};
use qp_codegen::reference::sampling::Sampling;
use qp_codegen::reference::{self, Activation, Activations, RmsNorm, Rotator};
use qp_codegen::spec::Rotation;

use super::synthetic::Random;
use super::{Failure, compare_activations, same};
use crate::device::ops::{DeviceActivations, Faults, PrepareInputs, PrepareKernel};
use crate::device::{DeviceError, Executor, launches};
use crate::engine::sampling;

/// What the CPU makes of a preparation's inputs: `values` are read as input and, with a gated unit, as what it gates.
pub fn prepared(op: &Prepare, values: &[f32], weights: &[f32]) -> Vec<Activations> {
    let rotator = Rotator::new(op.rotation, op.columns);
    let of = |span: Span, token: u32| {
        let first = (span.first + token * span.stride) as usize;
        &values[first..first + op.columns as usize]
    };
    let one = |token| {
        let mut x = of(op.input, token).to_vec();
        if let Some(Gate { activation, up }) = op.gate {
            x.iter_mut().zip(of(up, token)).for_each(|(x, up)| *x = activation.apply(*x) * up);
        }
        if let Some(norm) = op.norm {
            x = norm.apply(&x, weights);
        }
        rotator.apply(&mut x);
        reference::quantize_activations(&x)
    };
    (0..op.batch).map(one).collect()
}

/// Compares preparations of `on` with the CPU's, of few and of many columns, small ones alone if `small`, in every spread that
/// the device can run. Gives the number of comparisons.
///
/// # Errors
/// The first difference.
pub fn preparing(on: &Executor, small: bool) -> Result<usize, Failure> {
    let blocks = |block| Rotation::Hadamard { seed: 3, block, interleave: None };
    let interleaved = |block, span| Rotation::Hadamard { seed: 3, block: Some(block), interleave: Some(span) };
    let shapes = [
        (1808, 2, true, false, interleaved(128, 1024)),
        (14_336, 1, false, true, interleaved(128, 1024)),
        (96, 2, true, false, blocks(Some(128))),
        (1100, 3, true, true, blocks(Some(128))),
        (1536, 1, false, true, blocks(Some(512))),
        (576, 2, true, false, blocks(None)),
        (4096, 5, true, false, blocks(Some(128))),
        (14_336, 2, false, true, blocks(Some(128))),
        (12_288, 1, true, true, blocks(Some(1024))),
        (28_672, 1, false, true, blocks(Some(128))),
        (18_944, 1, false, true, blocks(None)),
    ];
    let mut done = 0;
    for (columns, batch, norm, gate, rotation) in shapes {
        if small && columns > 2000 {
            continue;
        }
        let up = Span { first: columns, stride: 2 * columns };
        let op = Prepare {
            columns,
            batch,
            input: Span { first: 0, ..up },
            gate: gate.then_some(Gate { activation: Activation::GeluTanh, up }),
            norm: norm.then_some(RmsNorm { eps: 1e-5, add_one: gate }),
            rotation,
            entering: None,
        };
        let what = format!("preparing {columns} columns of {batch} token(s)");
        let mut random = Random::of(&what);
        let values = random.values(2 * (columns * batch) as usize, 3.0);
        let weights = random.values(columns as usize, 2.0);
        let expected = prepared(&op, &values, &weights);
        for spread in Spread::all(&op, &on.device()) {
            let what = format!("{what}, {spread:?}");
            let run = || {
                let mut kernel = PrepareKernel::load_as(on, &op, spread)?;
                let mut out = DeviceActivations::new(on, columns, batch)?;
                let (input, norm, mut faults) = (on.upload(&values)?, on.upload(&weights)?, on.zeroed(1)?);
                let inputs = PrepareInputs { norm: &norm, ..PrepareInputs::plain(&input) };
                // The second run finds what the first left where blocks meet.
                for _ in 0..2 {
                    kernel.launch(on, inputs, &mut out, Faults { faults: &mut faults, layer: 0 })?;
                }
                Ok::<_, DeviceError>((out, faults.to_vec()?))
            };
            let (out, faults) = run().map_err(Failure::of(&what))?;
            compare_activations(&what, &out, &expected).map_err(|e| match e {
                Ok(failure) => failure,
                Err(e) => Failure::of(&what)(e),
            })?;
            same(&format!("{what}: faults"), &faults, &[0], |v| v.cast_unsigned())?;
            done += 1;
        }
    }
    Ok(done)
}

/// Compares tokens that `on` chooses with those of the CPU. Gives the number of comparisons.
///
/// # Errors
/// The first difference.
pub fn choosing(on: &Executor, small: bool) -> Result<usize, Failure> {
    let base = Sampling { temperature: 1.0, ..Sampling::default() };
    let settings = [
        (Sampling::default(), 1.0),
        (base, 1.0),
        (Sampling { temperature: 0.6, top_k: 40, ..base }, 1.0),
        (Sampling { top_p: 0.9, ..base }, 1.0),
        (Sampling { top_k: 500, top_p: 0.95, min_p: 0.01, temperature: 1.3, ..base }, 1.2),
        (Sampling { min_p: 0.1, ..base }, 1.3),
        (Sampling::default(), 0.0),
        (Sampling { temperature: 0.6, top_p: 0.9, ..base }, 0.0),
    ];
    let mut done = 0;
    for columns in [1000usize, 128_256, 262_144] {
        if small && columns > 2000 {
            continue;
        }
        let what = format!("choosing of {columns} tokens");
        let logits = Random::of(&what).values(columns * settings.len(), 6.0);
        let rows: Vec<&[f32]> = logits.chunks_exact(columns).collect();
        let batch = rows.len() as u32;
        let span = Span::rows(columns as u32);
        let words = sample::mask_words(columns as u32) as usize;
        let seen = |i: usize| i % 7 == 2;
        let mask: Vec<u32> = (0..words * rows.len())
            .map(|i| (0..32).filter(|bit| seen(i % words * 32 + bit)).fold(0, |w, bit| w | 1 << bit))
            .collect();
        let run = || {
            let op = Argmax { columns: columns as u32, batch, logits: span };
            let argmax = on.load::<launches::Argmax<'_>>(argmax::lower(&op, &on.device()))?;
            let mut scratch = on.zeroed(op.scratch(&on.device()))?;
            let op = Sample { columns: columns as u32, batch, logits: span };
            let sample = on.load::<launches::Sample<'_>>(sample::lower(&op))?;
            let logits = on.upload(&logits)?;
            let mut best = on.zeroed(rows.len())?;
            on.launch(&argmax, launches::Argmax { logits: &logits, scratch: &mut scratch, best: &mut best })?;
            let all: Vec<u32> = (0..batch).zip(&settings).flat_map(|(r, (s, p))| s.words(*p, r)).collect();
            let (settings, mut mask, mut tokens) = (on.upload(&all)?, on.upload(&mask)?, on.zeroed(rows.len())?);
            let draws = on.upload(&(0..batch as i32).collect::<Vec<_>>())?;
            let args = launches::Sample {
                logits: &logits,
                settings: &settings,
                draws: &draws,
                seen: &mut mask,
                tokens: &mut tokens,
            };
            on.launch(&sample, args)?;
            Ok::<_, DeviceError>((best.to_vec()?, tokens.to_vec()?))
        };
        let (best, tokens) = run().map_err(Failure::of(&what))?;
        let number = |token: Option<u32>| token.map_or(-1, |t| t as i32);
        let likeliest: Vec<i32> = rows.iter().map(|row| number(sampling::argmax(row))).collect();
        same(&format!("{what}: the likeliest"), &best, &likeliest, |v| v.cast_unsigned())?;
        let drawn = rows.iter().zip(&settings).zip(0..);
        let drawn: Vec<i32> = drawn.map(|((row, (s, p)), draw)| number(s.choose(row, *p, seen, draw))).collect();
        same(&format!("{what}: drawn"), &tokens, &drawn, |v| v.cast_unsigned())?;
        done += 2;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreter_prepares_and_chooses_as_the_cpu() {
        let on = Executor::interpreter();
        assert!(preparing(&on, true).unwrap_or_else(|e| panic!("{e}")) >= 4);
        assert_eq!(choosing(&on, true).unwrap_or_else(|e| panic!("{e}")), 2);
    }
}
