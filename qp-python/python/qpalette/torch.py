"""Quantized linear layers in PyTorch, on the CPU.

    import qpalette.torch as qpt

    layer = qpt.Linear.of(torch.nn.Linear(512, 256), qp.Quantizer.named("tcq_3"))
    qpt.quantize_(model, lambda name, linear: None if name == "lm_head" else "tcq_3")

The product is the operator `torch.ops.qp.linear`; it works under `torch.compile(fullgraph=True)`. Its results are those of
`PackedMatrix.linear`, to the bit, given the same float32 input. There is no CUDA implementation yet: qp's own engine runs
models on a GPU.
"""

from __future__ import annotations

import weakref
from typing import Callable, Optional, Union

import numpy as np

try:
    import torch
except ImportError as e:
    raise ImportError("qpalette.torch needs PyTorch: pip install 'qpalette[torch]'") from e

from ._native import PackedMatrix, Quantizer

# The matrix that a tensor of words belongs to. Tensors are compared by identity of their memory, which lives as long as
# the finalizer has not run.
_matrices: dict[tuple, PackedMatrix] = {}


def _key(words: torch.Tensor, spec: str) -> tuple:
    return (words.data_ptr(), words.numel(), words._version, spec)


def _matrix(words: torch.Tensor, scales: torch.Tensor, spec: str, rows: int, columns: int) -> PackedMatrix:
    key = _key(words, spec)
    matrix = _matrices.get(key)
    if matrix is None:
        parts = words.detach().numpy().view(np.uint32), scales.detach().to(torch.float32).numpy()
        matrix = PackedMatrix.from_parts(Quantizer(spec), rows, columns, *parts)
        _matrices[key] = matrix
        weakref.finalize(words.untyped_storage(), _matrices.pop, key, None)
    return matrix


@torch.library.custom_op("qp::linear", mutates_args=(), device_types="cpu")
def _linear(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, spec: str, rows: int, columns: int
) -> torch.Tensor:
    if x.shape[-1] != columns:
        raise ValueError(f"the matrix has {columns} columns, x has {x.shape[-1]}")
    matrix = _matrix(words, scales, spec, rows, columns)
    flat = x.detach().reshape(-1, columns).to(torch.float32).contiguous().numpy()
    y = torch.from_numpy(matrix.linear(flat))
    return y.reshape(*x.shape[:-1], rows).to(x.dtype)


@_linear.register_fake
def _(x, words, scales, spec, rows, columns):
    torch._check(x.shape[-1] == columns, lambda: f"the matrix has {columns} columns, x has {x.shape[-1]}")
    return x.new_empty(*x.shape[:-1], rows)


class Linear(torch.nn.Module):
    """A linear layer of a quantized matrix, with the bias that it had. Not trainable."""

    def __init__(self, matrix: PackedMatrix, bias: Optional[torch.Tensor] = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.spec = matrix.quantizer.text
        self.name = matrix.quantizer.name
        # Tensors of bits: conversions of the module's floats leave them alone.
        self.register_buffer("words", torch.from_numpy(matrix.words.view(np.int32)))
        self.register_buffer("scales", torch.from_numpy(matrix.scales).to(torch.bfloat16))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def of(cls, linear: torch.nn.Linear, quantizer: Quantizer) -> Linear:
        """Quantizes the weights of `linear`."""
        weights = linear.weight.detach().to(device="cpu", dtype=torch.float32).numpy()
        return cls(quantizer.encode(weights), linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.qp.linear(x, self.words, self.scales, self.spec, self.out_features, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, quantizer={self.name}"


Choice = Union[str, Quantizer, Callable[[str, torch.nn.Linear], Union[None, str, Quantizer]]]


def quantize_(model: torch.nn.Module, choice: Choice) -> torch.nn.Module:
    """Replaces the linear layers of `model` by quantized ones, in place, and gives it back.

    `choice` is a quantizer or the name of one of the palette, or a function of a layer's name and the layer that gives
    one, or None for a layer that stays."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, linear in found:
        chosen = choice(name, linear) if callable(choice) else choice
        if chosen is None:
            continue
        quantizer = Quantizer.named(chosen) if isinstance(chosen, str) else chosen
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, attribute, Linear.of(linear, quantizer))
    return model
