//! Exact products with matrices of formats ([`qp_codegen::spec::terms`]).

use std::sync::OnceLock;

use half::f16;
use qp_codegen::reader::{Integers, Reader};
use qp_codegen::reference::Activations;
use qp_codegen::spec::format::{Weight, WeightOp};
use qp_codegen::spec::terms::{Kept, Terms};

use super::strips::{Digits, Form, Inputs, Product, ROWS, Runs, Scratch, Source, StripMut, products};

/// A matrix of a format whose products are exact.
#[derive(Clone, Debug)]
pub struct Lines<'a> {
    reader: &'a Reader,
    tensors: Vec<&'a [u8]>,
    /// Made when they are asked for.
    integers: OnceLock<Integers<'a>>,
}

impl<'a> Lines<'a> {
    /// The matrix that `reader` reads from `tensors`.
    ///
    /// # Panics
    /// If the format has no terms.
    pub fn new(reader: &'a Reader, tensors: Vec<&'a [u8]>) -> Lines<'a> {
        assert!(reader.terms().is_some(), "a format with terms");
        Lines { reader, tensors, integers: OnceLock::new() }
    }

    /// The form of the matrices that `reader` reads; `None` if the format has no terms.
    pub fn form(reader: &Reader) -> Option<Form> {
        let terms = reader.terms()?;
        Some(Form {
            rows: reader.shape().rows as usize,
            columns: reader.shape().cols as usize,
            digits: match terms.bits {
                ..=4 => Digits::Four,
                5..=8 => Digits::Eight,
                9..=16 => Digits::Sixteen,
                _ => Digits::TwentyFour,
            },
            lowest: terms.lowest,
            times: terms.times,
            runs: terms.run.map(|columns| Runs {
                columns: columns as usize,
                rests: terms.of_rests().is_some(),
                wide: terms.is_wide(),
                // The integers of halves are made by the row's factor alone.
                halves: !terms.own
                    && half(terms, &terms.slope).is_some()
                    && terms.zero.is_none()
                    && terms.rest.as_ref().is_none_or(|rest| half(terms, rest).is_some()),
            }),
            half_offset: false,
            unit: 1.0,
        })
    }

    /// The product with each token's activations, tokens × rows. Every token has as many activations as the matrix columns.
    pub fn product(&self, tokens: &[Activations]) -> Vec<f32> {
        let inputs = Inputs::new(tokens.to_vec(), self.reader.shape().cols as usize);
        products(&[Product { source: self, kept: None, inputs: &inputs }]).remove(0)
    }
}

/// The field that slopes, or rests, are, if they are one whose numbers half precision holds.
fn half(terms: &Terms, weight: &Weight) -> Option<usize> {
    match weight.ops[..] {
        [WeightOp::Field(f)] if Kept::of(terms.fields[f].1.ty) == Kept::F16 => Some(f),
        _ => None,
    }
}

impl Source for Lines<'_> {
    fn form(&self) -> Form {
        Lines::form(self.reader).expect("looked at by new")
    }

    fn write(&self, strip: usize, scratch: &mut Scratch, to: &mut StripMut<'_>) {
        let (shape, form, terms) = (self.reader.shape(), self.form(), self.reader.terms().expect("looked at by new"));
        let (columns, planes) = (shape.cols as usize, terms.planes() as usize);
        let integers = self.integers.get_or_init(|| self.reader.integers(&self.tensors));
        let rows = strip * ROWS..(shape.rows as usize).min((strip + 1) * ROWS);
        let count = rows.len();
        scratch.digits.resize(columns * planes * count, 0);
        integers.digits(rows.start as u32, &mut scratch.digits);
        for (i, row) in rows.enumerate() {
            // Lowest bytes come first here, highest in a strip.
            for plane in 0..planes {
                to.put(i, planes - 1 - plane, &scratch.digits[(plane * count + i) * columns..][..columns]);
            }
            let numbers = &mut scratch.numbers;
            let Some(Runs { columns: of_run, halves: true, .. }) = form.runs else {
                integers.numbers(row as u32, numbers);
                to.put_factor(i, numbers.factor);
                if form.runs.is_some() {
                    to.put_runs(i, &numbers.slopes, &numbers.rests);
                }
                continue;
            };
            let of = |weight| match half(terms, weight) {
                Some(field) => integers.kept(field, row as u32, of_run as u32),
                None => Vec::new(),
            };
            let (slopes, rests) = (of(&terms.slope), terms.rest.as_ref().map_or_else(Vec::new, of));
            terms.numbers(shape.cols, &slopes, &rests, numbers);
            to.put_factor(i, numbers.factor);
            let halves = |x: &[f32]| x.iter().map(|x| f16::from_f32(*x).to_bits()).collect::<Vec<_>>();
            to.put_halves(i, &halves(&slopes), &halves(&rests));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use qp_codegen::formats;
    use qp_codegen::reader::Book;
    use qp_codegen::reference::quantize_activations;
    use qp_codegen::spec::Shape;

    use super::*;
    use crate::check::synthetic::Random;
    use crate::codec::Strips;
    use crate::memory::arena::Arena;

    #[test]
    fn products_are_those_of_the_reference() {
        for (name, cols) in [
            ("gptq_int4_g128", 384),
            ("awq_int4_g32", 96),
            ("q4_1", 352),
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
            ("exl3_mul1_3", 256),
            ("exl3_mcg_2", 128),
            ("iq1_m", 256),
            ("iq3_xxs", 256),
            ("nf4_double", 192),
            ("fp4_double", 64),
            ("aqlm_2x8", 96),
            ("aqlm_1x16", 64),
            ("higgs_4", 1024),
            ("e8p", 128),
            ("qtip_1mad_2", 64),
            ("qtip_3inst_3", 64),
            ("qtip_hyb_4", 64),
            ("qpalette_tcq_1.5", 64),
        ] {
            let format = formats::get(name).unwrap();
            let rows = match &format.trellis {
                Some(_) if name.starts_with("exl3") => 128,
                Some(_) => 32,
                None if format.output.is_empty() => 24,
                None => 16,
            };
            let shape = Shape { rows, cols };
            let reader = Reader::new(&Arc::new(Book::new(format.clone())), &format.layouts[0], shape).unwrap();
            let tensors = reader.made(5);
            let tensors: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
            let mut random = Random::of(name);
            let mut token = || quantize_activations(&random.values(cols as usize, 2.0));
            let tokens: Vec<Activations> = (0..7).map(|_| token()).collect();
            let expected = reader.product(&tensors, &tokens);
            let lines = Lines::new(&reader, tensors);
            let arena = Arena::new(Lines::form(&reader).unwrap().bytes()).unwrap();
            let kept = Strips::new(&lines, &arena).unwrap();
            assert!(arena.take::<u8>(1).is_none(), "{name}: all is used");
            assert_eq!(lines.product(&tokens), expected, "{name}");
            for n in [7, 3, 1, 0] {
                let inputs = Inputs::new(tokens[..n].to_vec(), cols as usize);
                let product = Product { source: &lines, kept: Some(&kept), inputs: &inputs };
                assert_eq!(products::<f32>(&[product]), [&expected[..rows as usize * n]], "{name}");
            }
        }
    }
}
