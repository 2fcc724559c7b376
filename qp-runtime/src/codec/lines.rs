//! Exact products with matrices of formats ([`qp_codegen::spec::terms`]).

use std::sync::Arc;

use qp_codegen::reader::Reader;
use qp_codegen::reference::Activations;
use qp_codegen::spec::terms::{Numbers, TILE, Terms};
use rayon::prelude::*;

use super::dense::by_token;
use super::simd::for_each_instruction_set;
use crate::memory::arena::{Arena, Piece};

/// Weights that a task multiplies, about.
const TASK: usize = 1 << 15;

/// The rows of a matrix of a format, written out: digits, in each row a plane of bytes behind the other, and the numbers of their
/// runs.
#[derive(Debug)]
pub struct Lines {
    digits: Piece<u8>,
    factors: Piece<f32>,
    slopes: Piece<i32>,
    rests: Piece<i32>,
}

/// A row of it.
#[derive(Clone, Copy)]
struct Row<'a> {
    digits: &'a [u8],
    factor: f32,
    slopes: &'a [i32],
    rests: &'a [i32],
}

/// Columns whose products are summed before they are multiplied with a slope.
fn run(terms: &Terms) -> usize {
    terms.run.unwrap_or(TILE) as usize
}

/// Bytes of the digits of a row of `cols` columns.
fn of_row(terms: &Terms, cols: usize) -> usize {
    cols * terms.planes() as usize
}

/// The slopes of a row; that of a whole row is said for each run.
fn slopes<'a>(numbers: &'a Numbers, ones: &'a [i32], terms: &Terms) -> &'a [i32] {
    if terms.run.is_some() { &numbers.slopes } else { ones }
}

impl Lines {
    /// Bytes that a `rows × cols` matrix of `reader`'s format, which must have terms, takes in an arena.
    pub fn bytes(reader: &Reader, rows: usize, cols: usize) -> usize {
        let terms = reader.terms().expect("a format with terms");
        let runs = rows * cols.div_ceil(run(terms));
        let of_runs = Arena::bytes_of::<i32>(runs);
        let rests = if terms.rest.is_some() { of_runs } else { 0 };
        Arena::bytes_of::<u8>(rows * of_row(terms, cols)) + Arena::bytes_of::<f32>(rows) + of_runs + rests
    }

    /// Those of the matrix that `reader` reads from `tensors`, which must be of a format with terms, in `arena`; `None` if they do
    /// not fit.
    pub fn new(reader: &Reader, tensors: &[&[u8]], arena: &Arc<Arena>) -> Option<Lines> {
        let terms = reader.terms().expect("a format with terms");
        let (rows, cols) = (reader.shape().rows as usize, reader.shape().cols as usize);
        let runs = cols.div_ceil(run(terms));
        let of_rest = if terms.rest.is_some() { runs } else { 0 };
        let mut out = Lines {
            digits: arena.take(rows * of_row(terms, cols))?,
            factors: arena.take(rows)?,
            slopes: arena.take(rows * runs)?,
            rests: arena.take(rows * of_rest)?,
        };
        let ones = vec![1; runs];
        let rests: Vec<&mut [i32]> = match of_rest {
            0 => (0..rows).map(|_| &mut [][..]).collect(),
            n => out.rests.chunks_exact_mut(n).collect(),
        };
        let of_rows = out.digits.par_chunks_exact_mut(of_row(terms, cols)).zip(&mut out.factors[..]);
        let of_rows = of_rows.zip(out.slopes.par_chunks_exact_mut(runs)).zip(rests);
        of_rows.enumerate().for_each_init(Numbers::default, |numbers, (row, (((digits, factor), to), rests))| {
            reader.digits(tensors, row as u32, digits);
            reader.numbers(tensors, row as u32, numbers);
            *factor = numbers.factor;
            to.copy_from_slice(slopes(numbers, &ones, terms));
            rests.copy_from_slice(&numbers.rests);
        });
        Some(out)
    }
}

/// One token's activations.
struct Input<'a> {
    q: &'a [i16],
    /// Their sums over each run.
    sums: Vec<i32>,
    scale: f32,
}

/// The product with each token's activations, tokens × rows. Every token has as many activations as the matrix columns.
/// `kept` are the matrix's [`Lines`], if they were written out; without them each row is decoded on its way.
///
/// # Panics
/// If the format has no terms.
pub fn linear(reader: &Reader, tensors: &[&[u8]], kept: Option<&Lines>, tokens: &[Activations]) -> Vec<f32> {
    let terms = reader.terms().expect("a format with terms");
    let (rows, cols) = (reader.shape().rows as usize, reader.shape().cols as usize);
    let (run, n) = (run(terms), tokens.len());
    let runs = cols.div_ceil(run);
    let inputs: Vec<Input> = tokens
        .iter()
        .map(|a| {
            assert_eq!(a.q.len(), cols, "activations of a token");
            let sums = a.q.chunks(run).map(|q| q.iter().map(|&q| i32::from(q)).sum()).collect();
            Input { q: &a.q, sums, scale: a.scale }
        })
        .collect();
    let products = |row: Row<'_>, out: &mut [f32]| {
        for (out, x) in out.iter_mut().zip(&inputs) {
            let sum = match run {
                16 => row_sum::<16>(row, x, terms),
                32 => row_sum::<32>(row, x, terms),
                64 => row_sum::<64>(row, x, terms),
                _ => row_sum::<128>(row, x, terms),
            };
            *out = sum as f32 * row.factor * x.scale;
        }
    };
    // Rows × tokens, so that the rows of tasks are apart.
    let mut by_row = vec![0f32; rows * n];
    let task = (TASK / cols.max(1)).max(1);
    let ones = vec![1; runs];
    by_row.par_chunks_mut((task * n).max(1)).enumerate().for_each_init(
        || (vec![0u8; if kept.is_some() { 0 } else { of_row(terms, cols) }], Numbers::default()),
        |(digits, numbers), (i, out)| {
            for (r, out) in out.chunks_exact_mut(n.max(1)).enumerate() {
                let row = i * task + r;
                match kept {
                    Some(kept) => {
                        let rests = kept.rests.len() / rows;
                        let row = Row {
                            digits: &kept.digits[row * of_row(terms, cols)..][..of_row(terms, cols)],
                            factor: kept.factors[row],
                            slopes: &kept.slopes[row * runs..][..runs],
                            rests: &kept.rests[row * rests..][..rests],
                        };
                        products(row, out);
                    }
                    None => {
                        reader.digits(tensors, row as u32, digits);
                        reader.numbers(tensors, row as u32, numbers);
                        let slopes = slopes(numbers, &ones, terms);
                        products(Row { digits, factor: numbers.factor, slopes, rests: &numbers.rests }, out);
                    }
                }
            }
        },
    );
    by_token(by_row, n)
}

/// A row's sum with a token's activations.
fn row_sum<const N: usize>(row: Row<'_>, x: &Input<'_>, terms: &Terms) -> i64 {
    if !terms.is_wide() {
        return sum::<N>(row.digits, x.q, &x.sums, (row.slopes, row.rests), terms.lowest);
    }
    let planes = row.digits.chunks_exact(x.q.len());
    let products =
        planes.zip(0..).map(|(digits, plane)| sum::<N>(digits, x.q, &x.sums, (row.slopes, &[]), 0) << (8 * plane));
    let offsets =
        |numbers: &[i32]| numbers.iter().zip(&x.sums).map(|(&n, &sum)| i64::from(n) * i64::from(sum)).sum::<i64>();
    products.sum::<i64>() + i64::from(terms.lowest) * offsets(row.slopes) + offsets(row.rests)
}

for_each_instruction_set! {
    /// A row's sum: over runs of `N` columns the products of integers and activations times the slope, and the activations'
    /// sum times the rest.
    fn sum[R, const N: usize](digits: &[u8], q: &[i16], sums: &[i32], numbers: (&[i32], &[i32]), lowest: i32) -> i64 {
        let (slopes, rests) = numbers;
        let mut total = 0i64;
        // Of up to 128 products below 2^8 · 2^14.
        let dot = |d: &[u8], q: &[i16]| d.iter().zip(q).fold(0i32, |s, (&d, &q)| s.wrapping_add(i32::from(d) * i32::from(q)));
        let (whole, last) = digits.as_chunks::<N>();
        let (whole_q, last_q) = q.as_chunks::<N>();
        for (((d, q), sum), slope) in whole.iter().zip(whole_q).zip(sums).zip(slopes) {
            total += i64::from(*slope) * i64::from(dot(d, q) + lowest * sum);
        }
        if !last.is_empty() {
            let k = whole.len();
            total += i64::from(slopes[k]) * i64::from(dot(last, last_q) + lowest * sums[k]);
        }
        rests.iter().zip(sums).fold(total, |total, (&rest, &sum)| total + i64::from(rest) * i64::from(sum))
    }
}

#[cfg(test)]
mod tests {
    use qp_codegen::formats;
    use qp_codegen::reader::Book;
    use qp_codegen::reference::quantize_activations;
    use qp_codegen::spec::Shape;

    use super::*;
    use crate::check::synthetic::Random;

    #[test]
    fn products_are_those_of_the_reference() {
        for (name, cols) in [
            ("gptq_int4_g128", 384),
            ("awq_int4_g32", 96),
            ("q4_k", 512),
            ("q6_k", 256),
            ("q8_0", 352),
            ("q5_1", 64),
            ("mxfp4", 160),
            ("nvfp4", 48),
            ("int8_channel", 300),
            ("iq2_xxs", 256),
            ("nf4", 192),
            ("fp4", 128),
            ("mxfp6_e3m2", 320),
            ("fp8_channel", 40),
            ("mxfp8_e4m3", 96),
        ] {
            let format = formats::get(name).unwrap();
            let shape = Shape { rows: 24, cols };
            let reader = Reader::new(&Arc::new(Book::new(format.clone())), &format.layouts[0], shape).unwrap();
            let tensors = reader.made(5);
            let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
            let mut random = Random::of(name);
            let mut token = || quantize_activations(&random.values(cols as usize, 2.0));
            let tokens = [token(), token(), token()];
            let expected = reader.product(&tensors, &tokens);
            let arena = Arena::new(Lines::bytes(&reader, 24, cols as usize)).unwrap();
            let lines = Lines::new(&reader, &tensors, &arena).unwrap();
            assert!(arena.take::<u8>(1).is_none(), "{name}: all is used");
            assert_eq!(linear(&reader, &tensors, None, &tokens), expected, "{name}");
            assert_eq!(linear(&reader, &tensors, Some(&lines), &tokens), expected, "{name}");
            assert_eq!(linear(&reader, &tensors, Some(&lines), &tokens[..1]), expected[..24], "{name}");
        }
    }
}
