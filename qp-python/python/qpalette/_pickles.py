"""Quantizers and matrices through pickle and copy: as what they are made from."""

from __future__ import annotations

import copyreg

from ._native import PackedMatrix, Quantizer


def _quantizer(quantizer: Quantizer) -> tuple:
    return Quantizer, (quantizer.text,)


def _matrix(matrix: PackedMatrix) -> tuple:
    return PackedMatrix.from_parts, (matrix.quantizer, *matrix.shape, matrix.words, matrix.scales)


def register() -> None:
    copyreg.pickle(Quantizer, _quantizer)
    copyreg.pickle(PackedMatrix, _matrix)
