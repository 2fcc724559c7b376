"""The operators on a GPU: kernels of qp's compiler on PyTorch's current stream, with memory of its allocator.

Kernels are made for a quantizer, a shape, a type of activations and a number of tokens, rounded up to a power of two; they
are compiled at the first call of each, or come from qp's cache on the disk. The device `None` is the interpreter, which runs
the same launches on tensors of the CPU: tests use it.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch

from ._native import Lookup, Product
from ._registry import quantizer_of

# Most tokens of a launch.
_MOST = 2048

_products: dict[tuple, Product] = {}
_lookups: dict[tuple, Lookup] = {}
# What a call needs of its product, by all that it depends on, the number of tokens included.
_calls: dict[tuple, tuple] = {}
_scales: dict[tuple, torch.Tensor] = {}


def _rounded(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()


def _capturing(index: Optional[int]) -> bool:
    return index is not None and torch._C._cuda_isCurrentStreamCapturing()


def _refuse_capture(index: Optional[int], what: str) -> None:
    if _capturing(index):
        raise RuntimeError(
            f"the kernels of a {what} are compiled at its first call, which cannot be within a graph: "
            "run the model once with as many tokens before its graph is captured"
        )


def _find_compiler(index: Optional[int]) -> None:
    """Opens the NVRTC that PyTorch's wheel brings, so that qp finds it open; one that `QP_NVRTC` names comes first."""
    if index is None or os.environ.get("QP_NVRTC"):
        return
    packages = Path(torch.__file__).parents[1] / "nvidia"
    for library in sorted(packages.glob("*/lib/libnvrtc.so.*"), reverse=True):
        try:
            ctypes.CDLL(str(library))
            return
        except OSError:
            continue


def _product(index, spec, rows, columns, tokens, dtype, share=False) -> Product:
    key = (index, spec, rows, columns, tokens, dtype, share)
    product = _products.get(key)
    if product is None:
        _refuse_capture(index, "layer")
        _find_compiler(index)
        name = str(dtype).removeprefix("torch.")
        product = _products[key] = Product(quantizer_of(spec), rows, columns, tokens, name, index, share)
    return product


def _padded(scales: torch.Tensor, stride: int, rows: int) -> torch.Tensor:
    """A scale for each of `stride` rows: the matrix's own, or its only one, and zeros."""
    if scales.numel() == stride and scales.dtype == torch.bfloat16:
        return scales
    if scales.numel() not in (1, rows):
        raise ValueError(f"{scales.numel()} scales for {rows} rows")
    key = (scales.data_ptr(), scales.numel(), scales._version, scales.device, stride)
    padded = _scales.get(key)
    if padded is None:
        if scales.device.type == "cuda":
            _refuse_capture(scales.device.index, "matrix")
        padded = torch.zeros(stride, dtype=torch.bfloat16, device=scales.device)
        padded[:rows] = scales.to(torch.bfloat16)
        _scales[key] = padded
        weakref.finalize(scales.untyped_storage(), _scales.pop, key, None)
    return padded



def _fits(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, words: int) -> None:
    """The matrix is where the input is, and as long as its kernels take it to be."""
    if packed.nbytes != 4 * words or packed.element_size() != 4 or not packed.is_contiguous():
        raise ValueError(f"a matrix of this quantizer and shape has {words} words of 32 bits, side by side")
    device = x.get_device()
    if packed.get_device() != device or scales.get_device() != device:
        raise ValueError(f"the matrix is on {packed.device} and {scales.device}, the input on {x.device}")


def _meeting_place(size: int, x: torch.Tensor) -> Optional[torch.Tensor]:
    """Zeros for a graph that is being captured: it may run beside its stream, so it meets in memory of its own."""
    if size and _capturing(x.device.index):
        return torch.zeros(size, dtype=torch.uint8, device=x.device)
    return None


def linear(x, packed, scales, spec, rows, columns):
    """`torch.ops.qp.linear` on CUDA."""
    index = x.device.index
    # The calls below are those of the current device.
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(index):
            return run(index, torch._C._cuda_getCurrentRawStream(index), x, packed, scales, spec, rows, columns)
    return run(index, torch._C._cuda_getCurrentRawStream(index), x, packed, scales, spec, rows, columns)


def run(index, stream, x, packed, scales, spec, rows, columns):
    """The product, on a device and stream."""
    dtype = x.dtype
    if dtype == torch.float64:
        return run(index, stream, x.float(), packed, scales, spec, rows, columns).to(dtype)
    tokens = x.numel() // columns
    if tokens > _MOST:
        flat = x.reshape(-1, columns)
        parts = [run(index, stream, part, packed, scales, spec, rows, columns) for part in flat.split(_MOST)]
        return torch.cat(parts).reshape(*x.shape[:-1], rows)
    if tokens == 0:
        return x.new_empty(*x.shape[:-1], rows)
    key = (index, spec, rows, columns, tokens, dtype)
    call = _calls.get(key)
    if call is None:
        product = _product(index, spec, rows, columns, _rounded(tokens), dtype)
        words = quantizer_of(spec).packed_lengths(rows, columns)[0]
        call = (product.launch, product.scratch_bytes, product.tokens, product.stride, product.meeting_bytes, words)
        _calls[key] = call
    launch, scratch_bytes, batch, stride, meeting_bytes, words = call
    _fits(x, packed, scales, words)
    if not x.is_contiguous():
        x = x.contiguous()
    at = x.data_ptr()
    if at % 16:
        x = x.clone()
        at = x.data_ptr()
    padded = scales if scales.shape[0] == stride else _padded(scales, stride, rows)
    # `new_empty` takes a third of the time of `empty` with its keywords. (The scratch's bytes divide by four.)
    scratch = x.new_empty(scratch_bytes // x.element_size())
    y = x.new_empty((batch, stride))
    own = _meeting_place(meeting_bytes, x)
    meeting = 0 if own is None else own.data_ptr()
    launch(stream, tokens, at, packed.data_ptr(), padded.data_ptr(), y.data_ptr(), scratch.data_ptr(), meeting)
    if batch != tokens:
        y = y[:tokens]
    if stride != rows:
        y = y[:, :rows]
    return y.reshape(*x.shape[:-1], rows) if x.dim() != 2 or stride != rows else y


# For each device and stream, memory that the eager calls of layers write in, one after the other: bytes, address, and what keeps it.
_scratches: dict[tuple, tuple[int, int, Optional[torch.Tensor]]] = {}
_no_scratch = (0, 0, None)


def check(x: torch.Tensor, columns: int) -> None:
    """Activations of a matrix with so many columns."""
    if x.shape[-1] != columns:
        raise ValueError(f"the matrix has {columns} columns, x has {x.shape[-1]}")
    if not x.is_floating_point():
        raise ValueError(f"activations are floats, not {x.dtype}")


def again(calls: dict, x, packed, scales, spec, rows, columns):
    """`linear` of a layer, which keeps `calls`: what calls with inputs of a shape and type need. Calls like one before skip what was
    checked then; in eager mode that, and not the kernels, is what small layers wait for."""
    call = calls.get((x.shape, x.dtype))
    if call is None:
        check(x, columns)
        y = linear(x, packed, scales, spec, rows, columns)
        tokens = x.numel() // columns
        known = _calls.get((x.device.index, spec, rows, columns, tokens, x.dtype))
        # Calls whose results need no further work, and whose blocks meet in their stream's memory.
        if known is not None and x.dim() == 2 and known[2] == tokens and known[3] == rows == scales.shape[0]:
            # What results are like, without memory of its own.
            like = x.new_empty(1).expand(tokens, rows)
            calls[x.shape, x.dtype] = (packed, scales, x.device.index, tokens, *known[:2], like)
        return y
    same_packed, same_scales, index, tokens, launch, scratch_bytes, like = call
    at = x.data_ptr()
    if (
        packed is not same_packed
        or scales is not same_scales
        or at % 16
        or not x.is_contiguous()
        or x.get_device() != index
        or torch._C._cuda_getDevice() != index
        or torch._C._cuda_isCurrentStreamCapturing()
    ):
        return linear(x, packed, scales, spec, rows, columns)
    stream = torch._C._cuda_getCurrentRawStream(index)
    size, scratch, _ = _scratches.get((index, stream), _no_scratch)
    if size < scratch_bytes:
        memory = x.new_empty(scratch_bytes, dtype=torch.uint8)
        scratch = memory.data_ptr()
        _scratches[index, stream] = (scratch_bytes, scratch, memory)
    y = torch.empty_like(like, memory_format=torch.contiguous_format)
    launch(stream, tokens, at, packed.data_ptr(), scales.data_ptr(), y.data_ptr(), scratch, 0)
    return y


def _parts(x: torch.Tensor, columns: int) -> list[torch.Tensor]:
    """The activations of as many tokens as a launch takes, side by side and aligned."""
    if x.dtype == torch.float64:
        x = x.float()
    flat = x.reshape(-1, columns)
    parts = [part.contiguous() for part in flat.split(_MOST) if part.shape[0]]
    return [part.clone() if part.data_ptr() % 16 else part for part in parts]


def largest(x, spec, rows, columns):
    """`torch.ops.qp.largest` on CUDA."""
    with torch.cuda.device(x.device.index):
        return largest_of(x.device.index, torch._C._cuda_getCurrentRawStream(x.device.index), x, spec, rows, columns)


def largest_of(index, stream, x, spec, rows, columns):
    """The largest magnitudes of a share's activations, on a device and stream."""
    found = []
    for part in _parts(x, columns):
        tokens = part.shape[0]
        share = _share(index, spec, rows, columns, tokens, part.dtype)
        scratch = x.new_empty(share.scratch_bytes, dtype=torch.uint8)
        magnitudes = x.new_empty(share.batch, dtype=torch.float32)
        share.largest(stream, tokens, part.data_ptr(), scratch.data_ptr(), magnitudes.data_ptr())
        found.append(magnitudes[:tokens])
    return _together(found, x.new_empty(0, dtype=torch.float32)).reshape(x.shape[:-1])


class _Share(NamedTuple):
    """What calls need of the product of a share."""

    largest: Callable
    launch: Callable
    scratch_bytes: int
    scales_at: int
    batch: int
    stride: int
    meeting_bytes: int
    # Of the packed matrix.
    words: int


def _share(index, spec, rows, columns, tokens, dtype) -> _Share:
    key = (index, spec, rows, columns, tokens, dtype, True)
    share = _calls.get(key)
    if share is None:
        p = _product(index, spec, rows, columns, _rounded(tokens), dtype, True)
        words = quantizer_of(spec).packed_lengths(rows, columns)[0]
        numbers = p.scratch_bytes, p.scales_at, p.tokens, p.stride, p.meeting_bytes, words
        share = _calls[key] = _Share(p.largest, p.launch, *numbers)
    return share


def _together(parts: list[torch.Tensor], none: torch.Tensor) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else none


def totals(x, magnitudes, packed, spec, rows, columns):
    """`torch.ops.qp.totals` on CUDA."""
    index = x.device.index
    with torch.cuda.device(index):
        return totals_of(index, torch._C._cuda_getCurrentRawStream(index), x, magnitudes, packed, spec, rows, columns)


def totals_of(index, stream, x, magnitudes, packed, spec, rows, columns):
    """The totals of a share and the scales of its activations, on a device and stream."""
    magnitudes, first = magnitudes.reshape(-1), 0
    sums, scales = [], []
    for part in _parts(x, columns):
        tokens = part.shape[0]
        share = _share(index, spec, rows, columns, tokens, part.dtype)
        _fits(x, packed, magnitudes, share.words)
        scratch = x.new_empty(share.scratch_bytes, dtype=torch.uint8)
        y = x.new_empty((share.batch, share.stride, 2), dtype=torch.int32)
        given = magnitudes[first : first + tokens]
        first += tokens
        if tokens != share.batch:
            given = torch.nn.functional.pad(given, (0, share.batch - tokens))
        unused = _no_scales(x.device, share.stride)
        own = _meeting_place(share.meeting_bytes, x)
        meeting = 0 if own is None else own.data_ptr()
        share.launch(
            stream, tokens, part.data_ptr(), packed.data_ptr(), unused.data_ptr(), y.data_ptr(), scratch.data_ptr(),
            meeting, given.data_ptr(),
        )  # fmt: skip
        sums.append(y[:tokens, :rows])
        # A part of the scratch would keep all of it.
        scales.append(scratch[share.scales_at : share.scales_at + 4 * tokens].view(torch.float32).clone())
    none = x.new_empty((0, rows, 2), dtype=torch.int32), x.new_empty(0, dtype=torch.float32)
    totals = _together(sums, none[0]).contiguous().reshape(*x.shape[:-1], rows, 2)
    return totals, _together(scales, none[1]).reshape(x.shape[:-1])


_unused_scales: dict[tuple, torch.Tensor] = {}


def _no_scales(device: torch.device, stride: int) -> torch.Tensor:
    """Scales for a launch that reads them and does not use them."""
    key = (device, stride)
    if key not in _unused_scales:
        _refuse_capture(device.index, "layer")
        _unused_scales[key] = torch.zeros(stride, dtype=torch.bfloat16, device=device)
    return _unused_scales[key]


def embedding(tokens, packed, scales, spec, rows, columns, dtype):
    """`torch.ops.qp.embedding` on CUDA."""
    index = tokens.device.index
    with torch.cuda.device(index):
        stream = torch._C._cuda_getCurrentRawStream(index)
        return look_up(index, stream, tokens, packed, scales, spec, rows, columns, dtype)


def look_up(index, stream, tokens, packed, scales, spec, rows, columns, dtype):
    """Rows of the matrix, on a device and stream. A token that the matrix does not have is taken as the nearest that it has."""
    _fits(tokens, packed, scales, quantizer_of(spec).packed_lengths(rows, columns)[0])
    wanted = tokens.reshape(-1).clamp(0, rows - 1).to(torch.int32).contiguous()
    y = torch.empty((wanted.numel(), columns), dtype=torch.float32, device=tokens.device)
    for first in range(0, wanted.numel(), _MOST):
        part = wanted[first : first + _MOST]
        count = part.numel()
        key = (index, spec, rows, columns, _rounded(count))
        lookup = _lookups.get(key)
        if lookup is None:
            _refuse_capture(index, "embedding")
            _find_compiler(index)
            lookup = _lookups[key] = Lookup(quantizer_of(spec), rows, columns, _rounded(count), index)
        padded = _padded(scales, lookup.stride, rows)
        lookup.launch(stream, count, part.data_ptr(), packed.data_ptr(), padded.data_ptr(), y[first:].data_ptr())
    return y.to(dtype).reshape(*tokens.shape, columns)
