//! Comparing products of experts with the CPU: by every kernel that computes them, in steps of few and of many tokens.

use qp_codegen::kernels::experts::group::{self, Group};
use qp_codegen::kernels::experts::{Experts, most_pairs};
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::product::Launch;
use qp_codegen::layout::Packed;
use qp_codegen::reference::{Activations, quantize_activations};
use qp_codegen::spec::{Quantizer, Shape};

use super::synthetic::{self, Random};
use super::{Failure, same_floats};
use crate::codec::{Decoder, PackedMatrix};
use crate::device::ops::{DeviceActivations, DeviceMatrix, ExpertsKernel, Pairs};
use crate::device::{DeviceError, Executor, launches};

/// Experts, and how many a token goes through.
const COUNT: u32 = 6;
const CHOSEN: u32 = 2;
/// The expert that has no matrix here.
const ABSENT: i32 = 2;
/// What stands where no product is written.
const UNTOUCHED: f32 = 0.25;

/// Compares what `on` computes for experts with matrices of `q` with the CPU's products, small ones alone if `small`: of pairs that
/// share their token's activations and of pairs with their own. Gives the number of comparisons.
///
/// # Errors
/// The first difference.
pub fn products(on: &Executor, q: &Quantizer, small: bool) -> Result<usize, Failure> {
    let (shape, steps): (_, &[u32]) = if small {
        (Shape { rows: 40, cols: 320 }, &[1, 5, 40])
    } else {
        (Shape { rows: 400, cols: 1100 }, &[1, 3, 8, 64, 700])
    };
    let name = format!("experts of {}, {} x {}", q.name, shape.rows, shape.cols);
    let has = |expert: u32| expert as i32 != ABSENT;
    let matrices: Vec<PackedMatrix> =
        (0..COUNT).filter(|e| has(*e)).map(|e| synthetic::matrix(&format!("{name} {e}"), q, shape)).collect();
    let places: Vec<i32> = (0..COUNT as i32)
        .map(|e| match e.cmp(&ABSENT) {
            std::cmp::Ordering::Less => e,
            std::cmp::Ordering::Equal => -1,
            std::cmp::Ordering::Greater => e - 1,
        })
        .collect();
    let (decoder, mut done) = (Decoder::new(q), 0);
    for &tokens in steps {
        for shared in [true, false] {
            let what = format!("{name}, {tokens} token(s)");
            let pairs = tokens * CHOSEN;
            let rows = if shared { tokens } else { pairs };
            let mut random = Random::of(&what);
            let values = random.values((rows * shape.cols) as usize, 3.0);
            let inputs: Vec<Activations> = values.chunks_exact(shape.cols as usize).map(quantize_activations).collect();
            // The last expert has no pairs, the first has many.
            let of_pair = |p: u32| if p.is_multiple_of(3) { 0 } else { (p * 7 + p / 5) % (COUNT - 1) };
            let expert_of: Vec<i32> = (0..pairs).map(|p| of_pair(p) as i32).collect();
            let most = most_pairs(tokens, CHOSEN, COUNT);
            let stride = Packed::new(q, shape).padded_rows() + 16;
            let e = Experts { count: COUNT, matrices: COUNT - 1, rows, pairs, most, stride };
            let mut expected = vec![UNTOUCHED; (pairs * stride) as usize];
            for (place, matrix) in matrices.iter().enumerate() {
                let own: Vec<usize> =
                    (0..pairs as usize).filter(|p| places[expert_of[*p] as usize] == place as i32).collect();
                let x: Vec<Activations> = own.iter().map(|p| inputs[p / (pairs / rows) as usize].clone()).collect();
                let y = decoder.linear(matrix, &x);
                for (p, y) in own.iter().zip(y.chunks_exact(shape.rows as usize)) {
                    expected[p * stride as usize..][..shape.rows as usize].copy_from_slice(y);
                }
            }
            let op = Gemv { quantizer: q, shape, batch: most, accumulate: false };
            // The best of each way of multiplying.
            let mut tried: Vec<Launch> = Vec::new();
            for launch in Launch::ranked_for_experts(&op, &e, &on.device()) {
                if !tried.iter().any(|l| l.way() == launch.way()) {
                    tried.push(launch);
                }
            }
            let parts: Vec<_> =
                matrices.iter().map(|m| (shape.rows, m.words.as_slice(), m.scales.as_slice())).collect();
            for launch in tried {
                let what = format!("{what}: product with {launch:?}");
                let run = || {
                    let matrix = DeviceMatrix::upload(on, q, shape.cols, &parts)?;
                    let x = DeviceActivations::upload(on, &inputs)?;
                    let (experts, places) = (on.upload(&expert_of)?, on.upload(&places)?);
                    let (mut sorted, mut units) = (on.zeroed(pairs as usize)?, on.zeroed(4 * e.units() as usize)?);
                    let mut y = on.upload(&vec![UNTOUCHED; expected.len()])?;
                    let mut recorder = on.record();
                    if most > 1 {
                        let kernel = group::lower(&Group { count: COUNT, pairs, most });
                        let kernel = on.load::<launches::Group<'_>>(kernel)?;
                        let args = launches::Group { experts: &experts, pairs: &mut sorted, units: &mut units };
                        recorder.launch(&kernel, args)?;
                    }
                    let units = if most > 1 { &units } else { &experts };
                    let lists = Pairs { units, pairs: &sorted, places: &places };
                    ExpertsKernel::load(on, &op, &e, &launch)?.record(&mut recorder, &matrix, &x, lists, &mut y)?;
                    recorder.finish()?.launch()?;
                    y.to_vec()
                };
                let y = run().map_err(Failure::of::<DeviceError>(&what))?;
                // Rows of padding are nobody's.
                let real = |y: &[f32]| -> Vec<f32> {
                    y.chunks_exact(stride as usize).flat_map(|row| &row[..shape.rows as usize]).copied().collect()
                };
                same_floats(&what, &real(&y), &real(&expected))?;
                done += 1;
            }
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use qp_codegen::cuda::Target;
    use qp_codegen::ir::interpret::Options;

    use super::*;

    #[test]
    fn the_interpreter_multiplies_experts_as_the_cpu() {
        // Products of warp groups are for many tokens on Hopper alone.
        for (target, name, comparisons) in [(Target::Sm90a, "nuq_3", 14), (Target::Sm80, "fast_1.5", 12)] {
            let on = Executor::interpreter_of(target, Options::default());
            let q = synthetic::trained(qp_codegen::palette::get(name).expect("in the palette"));
            assert_eq!(products(&on, &q, true).unwrap_or_else(|e| panic!("{e}")), comparisons);
        }
    }
}
