//! Codes fitted to what enters a layer: errors of columns that have codes are made good by those that have none yet
//! ([`crate::codec::feedback`]). Fields are those of the weights by themselves.

use qp_codegen::reader::Reader;
use qp_codegen::spec::Shape;
use rayon::prelude::*;

use super::{EncodeError, FormatEncoder, Made, Matrix, Segment};
use crate::codec::feedback::{Feedback, Pieces};

/// Columns whose errors are passed on together to all behind them; within them, each is passed on at once.
const COLUMNS: usize = 128;
/// Most weights of a code.
const VECTOR: usize = 16;

impl FormatEncoder {
    /// How a matrix is cut: what belongs to one code has its codes together.
    pub fn pieces(&self) -> Pieces {
        let vector = self.points.vector();
        Pieces::of_columns(COLUMNS.next_multiple_of(vector), vector)
    }

    /// As [`FormatEncoder::encode`], but with codes whose errors matter least for the inputs whose Hessian `feedback` was made
    /// of, for [`FormatEncoder::pieces`].
    ///
    /// # Errors
    /// A weight that is not finite.
    pub fn encode_for(
        &self,
        reader: &Reader,
        weights: &[f32],
        feedback: &Feedback,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<Vec<u8>>, EncodeError> {
        let made = self.make_for(reader.shape(), weights, feedback)?;
        progress(weights.len() as u64);
        self.written(reader, &made)
    }

    /// As [`FormatEncoder::encode_for`], without a layout.
    ///
    /// # Errors
    /// A weight that is not finite.
    pub fn make_for(&self, shape: Shape, weights: &[f32], feedback: &Feedback) -> Result<Made, EncodeError> {
        let made = self.make(shape, weights)?;
        let matrix = Matrix { encoder: self, shape, weights, fields: made.fields };
        let (cols, vector) = (shape.cols as usize, self.points.vector());
        let mut codes = made.codes;
        let mut errors = vec![0f32; weights.len()];
        for first in (0..cols).step_by(feedback.pieces().width()) {
            let width = feedback.pieces().width().min(cols - first);
            let mut targets: Vec<f32> =
                weights.chunks_exact(cols).flat_map(|row| &row[first..first + width]).copied().collect();
            feedback.from_before(first, width, &errors, &mut targets);
            let rows = targets.par_chunks_exact_mut(width).zip(errors.par_chunks_exact_mut(cols));
            let rows = rows.zip(codes.par_chunks_exact_mut(cols / vector)).enumerate();
            rows.for_each(|(row, ((targets, errors), codes))| {
                let place = Segment { row: row as u32, cols: first as u32..(first + width) as u32 };
                matrix.fit(&place, feedback, targets, &mut errors[first..], &mut codes[first / vector..]);
            });
        }
        Ok(Made { codes, fields: matrix.fields, errors: made.errors })
    }
}

impl Matrix<'_> {
    /// Finds the codes of a row's columns, whose wanted values are `targets`, and their errors; each code's error changes the
    /// targets behind it.
    fn fit(&self, place: &Segment, feedback: &Feedback, targets: &mut [f32], errors: &mut [f32], codes: &mut [u32]) {
        let (first, points) = (place.cols.start as usize, &self.encoder.points);
        let vector = points.vector();
        let (mut at, mut nodes) = (0, Vec::new());
        self.runs(place, |weights, values| {
            let line @ [a, b] = self.encoder.line(values, &mut nodes);
            for weights in weights.chunks_exact(vector) {
                let mut decoded = [0f32; VECTOR];
                let (here, behind) = targets[at..].split_at_mut(vector);
                points.nearest(here, line, |i, e| decoded[i] = (a * e + b) as f32, |code| codes[at / vector] = code);
                for (i, (weight, decoded)) in weights.iter().zip(decoded).enumerate() {
                    let error = weight - decoded;
                    errors[at + i] = error;
                    let factors = &feedback.within(first, at + i)[at + vector..];
                    behind.iter_mut().zip(factors).for_each(|(target, factor)| *target += error * factor);
                }
                at += vector;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use qp_codegen::formats;
    use rayon::ThreadPoolBuilder;

    use super::*;
    use crate::codec::Gaussian;
    use crate::codec::feedback::Hessian;

    /// Σ (x · (w − ŵ))² over rows and inputs.
    fn loss(errors: &[f32], inputs: &[f32], cols: usize) -> f64 {
        let product = |e: &[f32], x: &[f32]| e.iter().zip(x).map(|(e, x)| f64::from(e * x)).sum::<f64>().powi(2);
        let rows = errors.chunks_exact(cols);
        rows.map(|e| inputs.chunks_exact(cols).map(|x| product(e, x)).sum::<f64>()).sum()
    }

    #[test]
    fn codes_are_fitted_to_correlated_inputs() {
        let shape = Shape { rows: 32, cols: 384 };
        let cols = shape.cols as usize;
        let weights = Gaussian::new(3).samples(shape.len() as usize);
        // Inputs that lie near a subspace of a few dimensions.
        let (basis, mut random) = (Gaussian::new(4).samples(24 * cols), Gaussian::new(5));
        let inputs: Vec<f32> = (0..512)
            .flat_map(|_| {
                let (of, noise) = (random.samples(24), random.samples(cols));
                let along = |c: usize| of.iter().enumerate().map(|(i, a)| a * basis[i * cols + c]).sum::<f32>();
                (0..cols).map(|c| along(c) + 0.3 * noise[c]).collect::<Vec<_>>()
            })
            .collect();
        let mut hessian = Hessian::new(cols);
        hessian.add(&inputs);
        for name in ["q4_0", "gptq_int3_g128", "nf4", "int8_channel"] {
            let format = formats::get(name).unwrap();
            let encoder = FormatEncoder::new(format).unwrap();
            let reader = encoder.reader(shape).unwrap();
            let feedback = Feedback::new(&hessian, &encoder.pieces()).unwrap();
            let of = |tensors: &[Vec<u8>]| {
                let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
                let mut decoded = vec![0.0; weights.len()];
                reader.read_rows(&tensors, 0, &mut decoded);
                let errors: Vec<f32> = weights.iter().zip(&decoded).map(|(w, d)| w - d).collect();
                loss(&errors, &inputs, shape.cols as usize)
            };
            let plain = of(&encoder.encode(&reader, &weights, &|_| ()).unwrap());
            let fitted = encoder.encode_for(&reader, &weights, &feedback, &|_| ()).unwrap();
            assert!(of(&fitted) < 0.6 * plain, "{name}: {} of {plain}", of(&fitted));
            // Threads change nothing.
            let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            assert!(pool.install(|| encoder.encode_for(&reader, &weights, &feedback, &|_| ()).unwrap()) == fitted);
        }
    }
}
