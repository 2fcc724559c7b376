"""Quantized linear layers and embeddings in PyTorch.

    import qpalette.torch as qpt

    layer = qpt.Linear.of(torch.nn.Linear(512, 256), qp.Quantizer.named("tcq_3"))
    qpt.quantize_(model, lambda name, linear: None if name == "lm_head" else "tcq_3")

The product is the operator `torch.ops.qp.linear`, on the CPU and on CUDA; it works under `torch.compile(fullgraph=True)` and
in CUDA graphs. Given the same float32 input its results are those of `PackedMatrix.linear`, to the bit, on every device and
for every number of tokens. Half-precision activations are taken as the float32 numbers that they are, and results are rounded
to their type.
"""

from __future__ import annotations

import functools
import weakref
from typing import Callable, Optional, Union

import numpy as np

from ._versions import need

need("qpalette.torch", "torch", "2.4", "torch")

import torch  # noqa: E402

from . import _cuda  # noqa: E402
from ._native import PackedMatrix, Quantizer  # noqa: E402
from ._registry import quantizer_of, register  # noqa: E402

__all__ = ["Embedding", "Linear", "SharedLinear", "quantize_"]

# The matrix that a tensor of words belongs to. Tensors are compared by identity of their memory, which lives as long as
# the finalizer has not run.
_matrices: dict[tuple, PackedMatrix] = {}


def _matrix(packed: torch.Tensor, scales: torch.Tensor, spec: str, rows: int, columns: int) -> PackedMatrix:
    key = (packed.data_ptr(), packed.numel(), packed._version, scales.data_ptr(), scales._version, spec, rows, columns)
    matrix = _matrices.get(key)
    if matrix is None:
        parts = packed.detach().numpy().view(np.uint32), scales.detach().to(torch.float32).numpy()
        matrix = PackedMatrix.from_parts(quantizer_of(spec), rows, columns, *parts)
        _matrices[key] = matrix
        weakref.finalize(packed.untyped_storage(), _matrices.pop, key, None)
    return matrix


def _linear(x, packed, scales, spec, rows, columns):
    _cuda.check(x, columns)
    flat = x.detach().reshape(-1, columns).to(torch.float32).contiguous()
    y = torch.from_numpy(_matrix(packed, scales, spec, rows, columns).linear(flat.numpy()))
    return y.reshape(*x.shape[:-1], rows).to(x.dtype)


def _linear_cuda(x, packed, scales, spec, rows, columns):
    _cuda.check(x, columns)
    return _cuda.linear(x, packed, scales, spec, rows, columns)


def _linear_fake(x, packed, scales, spec, rows, columns):
    _cuda.check(x, columns)
    return x.new_empty(*x.shape[:-1], rows)


def _embedding(tokens, packed, scales, spec, rows, columns, dtype):
    decoded = _matrix(packed, scales, spec, rows, columns).rows(tokens.reshape(-1).tolist())
    return torch.from_numpy(decoded).reshape(*tokens.shape, columns).to(dtype)


def _embedding_fake(tokens, packed, scales, spec, rows, columns, dtype):
    return tokens.new_empty(*tokens.shape, columns, dtype=dtype)


# The lowest bits of a total, which lie apart from the others; see `torch.ops.qp.totals`.
_LOW = 24


def _share(packed, spec, rows, columns):
    """A matrix of these words; its scales do not matter."""
    return _matrix(packed, _no_scales(quantizer_of(spec).packed_lengths(rows, columns)[1]), spec, rows, columns)


@functools.lru_cache(maxsize=None)
def _no_scales(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.bfloat16)


def _largest(x, packed, spec, rows, columns):
    _cuda.check(x, columns)
    flat = x.detach().reshape(-1, columns).to(torch.float32).contiguous()
    return torch.from_numpy(_share(packed, spec, rows, columns).largest(flat.numpy())).reshape(x.shape[:-1])


def _largest_cuda(x, packed, spec, rows, columns):
    _cuda.check(x, columns)
    return _cuda.largest(x, spec, rows, columns)


def _largest_fake(x, packed, spec, rows, columns):
    _cuda.check(x, columns)
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _totals(x, magnitudes, packed, spec, rows, columns):
    _cuda.check(x, columns)
    flat = x.detach().reshape(-1, columns).to(torch.float32).contiguous()
    sums, scales = _share(packed, spec, rows, columns).totals(flat.numpy(), magnitudes.reshape(-1).numpy())
    sums = torch.from_numpy(sums).reshape(*x.shape[:-1], rows)
    sums = torch.stack([sums >> _LOW, sums & ((1 << _LOW) - 1)], -1).to(torch.int32)
    return sums, torch.from_numpy(scales).reshape(x.shape[:-1])


def _totals_cuda(x, magnitudes, packed, spec, rows, columns):
    _cuda.check(x, columns)
    return _cuda.totals(x, magnitudes, packed, spec, rows, columns)


def _totals_fake(x, magnitudes, packed, spec, rows, columns):
    _cuda.check(x, columns)
    sums = x.new_empty(*x.shape[:-1], rows, 2, dtype=torch.int32)
    return sums, x.new_empty(x.shape[:-1], dtype=torch.float32)


_library = torch.library.Library("qp", "DEF")
_library.define("linear(Tensor x, Tensor packed, Tensor scales, str spec, SymInt rows, SymInt columns) -> Tensor")
_library.define(
    "embedding(Tensor tokens, Tensor packed, Tensor scales, str spec, SymInt rows, SymInt columns, ScalarType dtype)"
    " -> Tensor"
)
# What a product is where the columns of a matrix are spread over devices: the largest magnitudes of the activations of each share,
# once they are rotated; and, rounded by the largest of all shares, the totals, each as two integers (2^24 times the first, and the
# second), and the scale of each token.
_library.define("largest(Tensor x, Tensor packed, str spec, SymInt rows, SymInt columns) -> Tensor")
_library.define(
    "totals(Tensor x, Tensor magnitudes, Tensor packed, str spec, SymInt rows, SymInt columns) -> (Tensor, Tensor)"
)
for _name, _cpu, _gpu, _fake in [
    ("linear", _linear, _linear_cuda, _linear_fake),
    ("largest", _largest, _largest_cuda, _largest_fake),
    ("totals", _totals, _totals_cuda, _totals_fake),
    ("embedding", _embedding, _cuda.embedding, _embedding_fake),
]:
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _gpu, "CUDA")
    torch.library.register_fake(f"qp::{_name}", _fake, lib=_library)


class _Matrix(torch.nn.Module):
    """The tensors of a packed matrix, under the names that a checkpoint gives them."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self._describe(matrix.quantizer, *matrix.shape, matrix.error)
        self.register_buffer("packed", torch.from_numpy(matrix.words))
        self.register_buffer("scales", torch.from_numpy(matrix.scales).to(torch.bfloat16))

    def _describe(self, quantizer: Quantizer, rows: int, columns: int, error: Optional[float]) -> None:
        self.rows, self.columns = rows, columns
        # See `_cuda.again`.
        self._calls: dict = {}
        self.spec, self.name, self.error = register(quantizer), quantizer.name, error

    @classmethod
    def empty(cls, quantizer: Quantizer, rows: int, columns: int, error: Optional[float] = None, **more):
        """One whose tensors are to be loaded, on the current default device."""
        words, scales = quantizer.packed_lengths(rows, columns)
        this = cls.__new__(cls)
        torch.nn.Module.__init__(this)
        this._describe(quantizer, rows, columns, error)
        this.register_buffer("packed", torch.empty(words, dtype=torch.uint32))
        this.register_buffer("scales", torch.empty(scales, dtype=torch.bfloat16))
        this._extend(**more)
        return this

    def _extend(self) -> None:
        pass

    @property
    def quantizer(self) -> Quantizer:
        return quantizer_of(self.spec)

    def __getstate__(self) -> dict:
        # Another process may not know the digest, and has kernels of its own.
        return {**self.__dict__, "_calls": {}, "_quantizer": self.quantizer}

    def __setstate__(self, state: dict) -> None:
        register(state.pop("_quantizer"))
        super().__setstate__(state)

    def matrix(self) -> PackedMatrix:
        """The matrix, copied to the CPU."""
        words, scales = self.packed.detach().cpu().numpy(), self.scales.detach().cpu().to(torch.float32).numpy()
        return PackedMatrix.from_parts(self.quantizer, self.rows, self.columns, words, scales)

    def _apply(self, fn, recurse=True):
        # Conversions of a module's floats leave the scales alone: they are part of the matrix's bits.
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales is not None and self.scales.dtype != torch.bfloat16:
            self.scales = scales.to(self.scales.device)
        return self


def _plain(x: torch.Tensor) -> bool:
    """Whether nobody watches what is done with a tensor of a GPU: no gradients, and no modes that trace or count."""
    return (
        type(x) is torch.Tensor and x.is_cuda and not x.requires_grad and torch._C._len_torch_dispatch_stack() == 0
    )


class Linear(_Matrix):
    """A linear layer of a quantized matrix, with the bias that it had. Not trainable."""

    def __init__(self, matrix: PackedMatrix, bias: Optional[torch.Tensor] = None) -> None:
        super().__init__(matrix)
        self._extend(None if bias is None else bias.detach().clone())

    def _extend(self, bias: Optional[torch.Tensor] = None) -> None:
        self.register_buffer("bias", bias)

    @property
    def out_features(self) -> int:
        return self.rows

    @property
    def in_features(self) -> int:
        return self.columns

    @classmethod
    def of(cls, linear: torch.nn.Linear, quantizer: Quantizer) -> Linear:
        """Quantizes the weights of `linear`; the layer is where the weights were."""
        weights = linear.weight.detach().to(device="cpu", dtype=torch.float32).numpy()
        return cls(quantizer.encode(weights), linear.bias).to(linear.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not _plain(x):
            y = torch.ops.qp.linear(x, self.packed, self.scales, self.spec, self.rows, self.columns)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        # The operator without the dispatcher, which takes longer than all else that is done here.
        own = self.__dict__
        buffers = own["_buffers"]
        matrix = buffers["packed"], buffers["scales"], own["spec"], own["rows"], own["columns"]
        y = _cuda.again(own["_calls"], x, *matrix)
        bias = buffers["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.columns}, out_features={self.rows}, bias={bias}, quantizer={self.name}"


class SharedLinear(Linear):
    """A linear layer whose columns are spread over the ranks of a process group (row-parallel, as it is often called): each rank
    has a share of them, and of its inputs. `matrix` is the rank's share, `PackedMatrix.cut(columns=...)` of the whole; `bias`,
    that of the whole layer, is the same on all ranks.

    Ranks round their activations by the largest magnitude of all and sum integers, so results are those of the whole matrix on
    one device, to the bit."""

    def __init__(self, matrix: PackedMatrix, bias: Optional[torch.Tensor] = None, group=None) -> None:
        super().__init__(matrix, bias)
        self.unit, self.group = self.quantizer.total_unit, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self.packed, self.spec, self.rows, self.columns
        magnitudes = torch.ops.qp.largest(x, *matrix)
        torch.distributed.all_reduce(magnitudes, torch.distributed.ReduceOp.MAX, self.group)
        sums, scales = torch.ops.qp.totals(x, magnitudes, *matrix)
        torch.distributed.all_reduce(sums, torch.distributed.ReduceOp.SUM, self.group)
        total = sums[..., 0].to(torch.int64) * (1 << _LOW) + sums[..., 1]
        factor = scales * self.unit
        y = (total.to(torch.float32) * self.scales.to(torch.float32) * factor[..., None]).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(_Matrix):
    """An embedding of a quantized matrix: rows are decoded as they are looked up. Not trainable."""

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(matrix)
        self._extend(dtype)

    def _extend(self, dtype: torch.dtype = torch.float32) -> None:
        # Tells the type of what is looked up; it follows conversions of the module.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.ops.qp.embedding(
            tokens, self.packed, self.scales, self.spec, self.rows, self.columns, self.like.dtype
        )

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, quantizer={self.name}"


Choice = Union[str, Quantizer, Callable[[str, torch.nn.Linear], Union[None, str, Quantizer]]]


def quantize_(model: torch.nn.Module, choice: Choice) -> torch.nn.Module:
    """Replaces the linear layers of `model` by quantized ones, in place, and gives it back.

    `choice` is a quantizer or the name of one of the palette, or a function of a layer's name and the layer that gives
    one, or None for a layer that stays. (For a model of transformers, see `qpalette.transformers.quantize_`.)"""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, linear in found:
        chosen = choice(name, linear) if callable(choice) else choice
        if chosen is None:
            continue
        quantizer = Quantizer.named(chosen) if isinstance(chosen, str) else chosen
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, attribute, Linear.of(linear, quantizer))
    return model
