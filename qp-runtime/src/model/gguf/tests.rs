//! Block types against values computed by the numpy reference of the PyPI package `gguf` 0.19.

use half::f16;
use sha2::{Digest, Sha256};

use super::types::Types;
use crate::model::tensors::{Bytes, Entry, TensorDir};

/// A block type: its number, and the weights and bytes of a block.
#[derive(Clone, Copy, Debug)]
struct Block {
    code: u32,
    weights: usize,
    bytes: usize,
}

const Q4_1: Block = Block { code: 3, weights: 32, bytes: 20 };

/// Block type; where its scales are; weights 1, len / 2 + 3 and the last of two blocks; SHA-256 of all as `f32`.
type Known = (Block, &'static [usize], [f64; 3], &'static str);

#[rustfmt::skip]
const KNOWN: [Known; 10] = [
    (Block { code: 2, weights: 32, bytes: 18 }, &[0], [0.02459716796875, 0.012298583984375, -8.75], "c26933bf4d5dce0a97b5e47154e796de0a324a503458f2c8528b6269db21d454"),
    (Block { code: 3, weights: 32, bytes: 20 }, &[0, 2], [-0.438507080078125, -0.413909912109375, -26.212890625], "bf4cdad6e456bff51038b4daae2997c66aa4bf21e90630090e5eaf82232c1874"),
    (Block { code: 6, weights: 32, bytes: 22 }, &[0], [0.17218017578125, -0.1475830078125, 5.25], "e890142fd4e798f646f53165b525fb81e8892f25763719488ab4a534b6259901"),
    (Block { code: 7, weights: 32, bytes: 24 }, &[0, 2], [-0.463104248046875, -0.217132568359375, -8.712890625], "e368c9ab3a693a5f3518facbbaa6872acf7ccb67045257435cbeacbbdee5e7d9"),
    (Block { code: 8, weights: 32, bytes: 34 }, &[0], [0.799407958984375, 0.76251220703125, -0.0], "0c3c01027543f47a54d7538bf47d400639daf633090087b5a49cc1180f2d07bb"),
    (Block { code: 10, weights: 256, bytes: 84 }, &[80, 82], [0.512298583984375, 3.17218017578125, -18.056640625], "d1c7df0c5dba5efbbc0536904a50900101b7ab69b8012032a40d057979e475a0"),
    (Block { code: 11, weights: 256, bytes: 110 }, &[108], [0.701019287109375, 1.1806640625, 162.75], "cc309b1510d784e8abc31ed486645b2a07850cb24ebf004bc1f4a764cac8249b"),
    (Block { code: 12, weights: 256, bytes: 144 }, &[0, 2], [3.2218017578125, 3.188720703125, -2.337890625], "ecfd563f637a8c79a7fc20bb6676b5c22399df4c8e9b70ffea39d4874a8ddb3c"),
    (Block { code: 13, weights: 256, bytes: 176 }, &[0, 2], [4.861328125, 25.97967529296875, -2096.419921875], "3e81a71fd189d1da9541a944c49b3c9e09e91bbbb05cb0abe9f852a81f188d4a"),
    (Block { code: 14, weights: 256, bytes: 210 }, &[208], [27.0076904296875, -28.53271484375, -1323.0], "224f7fdc43c7e815ec38cecf98eba28b43f5c397b18789e6dbd9dd79eb2ad23d"),
];

/// Two blocks of random bytes with tame scales.
fn blocks(block: Block, scales: &[usize]) -> Vec<u8> {
    let mut x = block.bytes as u32;
    let mut bytes: Vec<u8> = (0..2 * block.bytes)
        .map(|_| {
            x = x.wrapping_mul(1_103_515_245).wrapping_add(12345) & 0x7FFF_FFFF;
            (x >> 16) as u8
        })
        .collect();
    for (bytes, values) in bytes.chunks_exact_mut(block.bytes).zip([[0.0123, -0.5], [-1.75, 0.0371]]) {
        for (&at, value) in scales.iter().zip(values) {
            bytes[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        }
    }
    bytes
}

fn dir(block: Block, bytes: Vec<u8>) -> TensorDir {
    let shape = vec![2, bytes.len() / block.bytes * block.weights / 2];
    let kind = Types::default().kind(block.code, &shape).unwrap();
    let entry = Entry::new(kind, shape, Bytes::from(bytes));
    TensorDir::new("m.gguf".into(), [("t".to_owned(), entry)].into())
}

#[test]
fn blocks_hold_what_the_reference_says() {
    for (block, scales, some, sum) in KNOWN {
        let tensor = dir(block, blocks(block, scales)).tensor("t").unwrap();
        let w = tensor.to_f32();
        assert_eq!(w.len(), 2 * block.weights);
        assert_eq!([w[1], w[block.weights / 2 + 3], w[w.len() - 1]].map(f64::from), some, "{block:?}");
        let mut hash = Sha256::new();
        w.iter().for_each(|w| hash.update(w.to_le_bytes()));
        let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(found, sum, "{block:?}");
        // A part that begins and ends within blocks.
        let mut part = vec![0.0; block.weights + 3];
        tensor.read(block.weights / 2 + 1, &mut part);
        assert_eq!(part, w[block.weights / 2 + 1..][..part.len()], "{block:?}");
    }
}

#[test]
fn copies_are_halves_and_refused_where_too_large() {
    let bytes = blocks(Block { code: 3, weights: 32, bytes: 20 }, &[0, 2]);
    let source = dir(Q4_1, bytes.clone());
    let (dtype, shape, halves) = source.raw("t").unwrap();
    assert_eq!((dtype, shape), (safetensors::Dtype::F16, &[2, 32][..]));
    let weights = source.tensor("t").unwrap().to_f32();
    for (h, w) in halves.as_slice().as_chunks().0.iter().zip(weights) {
        assert_eq!(f16::from_le_bytes(*h), f16::from_f32(w));
    }
    let mut large = bytes;
    large[..2].copy_from_slice(&f16::from_f32(60000.0).to_le_bytes());
    let error = dir(Q4_1, large).raw("t").unwrap_err().to_string();
    assert!(error.starts_with("tensor 't' holds ") && error.contains("too large for F16"), "{error}");
}

#[test]
fn scales_that_are_not_finite_are_found() {
    for (block, scales, ..) in KNOWN {
        for &scale in scales {
            let mut bytes = blocks(block, scales);
            let at = block.bytes + scale;
            bytes[at..at + 2].copy_from_slice(&f16::NAN.to_le_bytes());
            let error = dir(block, bytes).tensor("t").unwrap_err().to_string();
            assert!(error.contains("values that are not finite") && error.contains("at [1, "), "{block:?}: {error}");
        }
    }
}
