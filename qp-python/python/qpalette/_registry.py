"""Quantizers by their digests: operators name them so, since a text with its tables is long."""

from __future__ import annotations

from ._native import Quantizer

_known: dict[str, Quantizer] = {}


def register(quantizer: Quantizer) -> str:
    """Makes a quantizer known to the operators, and gives what they call it."""
    digest = quantizer.digest
    _known.setdefault(digest, quantizer)
    return digest


def quantizer_of(spec: str) -> Quantizer:
    """The quantizer of a digest, or of the text of a spec."""
    found = _known.get(spec)
    if found is None:
        if len(spec) == 64 and all(c in "0123456789abcdef" for c in spec):
            raise ValueError(f"no quantizer of this process has the digest {spec}: make the layer, or load the model, first")
        found = _known[spec] = Quantizer(spec)
    return found
