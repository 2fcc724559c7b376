//! The canonical text of a quantizer and its hash.

use sha2::{Digest, Sha256};

use super::Quantizer;

/// See [`Quantizer::canonical`].
pub fn text(q: &Quantizer) -> String {
    format!("quantizer {} {{{}}}\n", q.name, body(q))
}

/// See [`Quantizer::hash`].
pub fn hash(q: &Quantizer) -> String {
    Sha256::digest(body(q)).iter().map(|b| format!("{b:02x}")).collect()
}

fn body(q: &Quantizer) -> String {
    format!("{:?}", (&q.codes, q.scale, q.rotation))
}
