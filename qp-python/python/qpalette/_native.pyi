from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__version__: str

class SpecError(ValueError):
    """A spec with errors. Its text shows them with excerpts, `diagnostics` has them as data."""

    diagnostics: list[Diagnostic]

class Diagnostic:
    """One thing that is wrong with a spec ("error"), or odd ("warning")."""

    severity: str
    message: str
    file: Optional[str]
    line: Optional[int]
    """Counted from 1, as is `column`; None if the diagnostic is about no place."""
    column: Optional[int]
    span: Optional[tuple[int, int]]
    """First byte of the text, and one past the last."""
    hint: Optional[str]
    """What cures it."""

class Quantizer:
    """A quantizer, checked. `spec` is the text of a spec (str) or the file that holds one (Path); `name` says which
    quantizer of several is meant. Raises SpecError."""

    def __init__(self, spec: str | Path, name: Optional[str] = None) -> None: ...
    @staticmethod
    def named(name: str) -> Quantizer:
        """What a command line names: "tcq_3" of the palette, "file.qspec", or "file.qspec:member"."""

    name: str
    bits: float
    """Bits a weight, without scales and tables."""
    block: tuple[int, int]
    """Rows and columns of a block."""
    text: str
    """The canonical text, tables included: equal quantizers have equal texts."""
    digest: str
    """SHA-256 of the text, hexadecimal."""
    total_unit: float
    """What the totals of a product are multiples of, where the scales of rows and activations are 1."""
    cuts: tuple[int, Optional[int]]
    """Rows and columns at whose multiples a matrix may be cut; None where columns may not be."""
    trained: bool
    """Whether its tables are there."""
    distortion: Optional[float]
    """Mean squared error on a Gaussian source of variance 1, measured; None but for the palette."""

    def encode(self, weights: ArrayLike) -> PackedMatrix:
        """Rotates and encodes a matrix of finite numbers, rows x columns = out x in features, on all cores."""
    def explain(self, rows: int = 4096, columns: int = 4096) -> str:
        """Rate, bytes, distortion and the layout of the bits."""
    def packed_bytes(self, rows: int = 4096, columns: int = 4096) -> int:
        """Bytes of a matrix of this shape, scales included."""
    def packed_lengths(self, rows: int = 4096, columns: int = 4096) -> tuple[int, int]:
        """Words of 32 bits and scales of a matrix of this shape."""
    def emit(
        self, op: str = "product", rows: int = 4096, columns: int = 4096, batch: int = 1, target: str = "sm_90a"
    ) -> str:
        """CUDA source of a kernel: "product" with the activations of `batch` tokens (1 to 2048), or "dequantize"."""

class PackedMatrix:
    """A quantized matrix of rows x columns = out x in features."""

    @staticmethod
    def from_parts(
        quantizer: Quantizer, rows: int, columns: int, words: ArrayLike, scales: ArrayLike
    ) -> PackedMatrix:
        """What `words` and `scales` gave, put together again. Raises ValueError if their lengths do not fit."""
    shape: tuple[int, int]
    quantizer: Quantizer
    error: Optional[float]
    """Relative squared error that quantizing made, where it is known: after `encode` and of a checkpoint."""
    nbytes: int
    words: NDArray[np.uint32]
    """The windows' bits, as they lie on a device. A copy."""
    scales: NDArray[np.float32]
    """One a row, or one for all: numbers that bfloat16 holds."""

    def decode(self) -> NDArray[np.float32]:
        """The weights that it stands for, rotated back: rows x columns."""
    def linear(self, x: ArrayLike) -> NDArray[np.float32]:
        """`x @ weights.T`, tokens x rows, of tokens x columns: activations are rotated and rounded to 16 bits, sums are exact;
        the same bits as qp's engine on any device."""

    def largest(self, x: ArrayLike) -> NDArray[np.float32]:
        """Of each row of `x` (tokens x columns) the largest magnitude once it is rotated; infinite if a number is not finite."""
    def totals(self, x: ArrayLike, magnitudes: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What `linear` computes before it scales: integers, tokens x rows, and the scale of each token, whose activations are
        rounded by the larger of its own largest magnitude and the given one. Where the columns of a matrix are spread over
        several, totals of one magnitude add up to those of the whole:
        `total.astype(np.float32) * scales_of_rows * (scales_of_tokens * quantizer.total_unit)[:, None]`."""
    def rows(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Rows of what it stands for: len(tokens) x columns. Raises IndexError beyond the last."""
    def cut(
        self, *, rows: Optional[tuple[int, int]] = None, columns: Optional[tuple[int, int]] = None
    ) -> PackedMatrix:
        """The part with rows and columns from one number up to another, at multiples of `quantizer.cuts`; nothing is encoded
        again. Its quantizer is its own where columns are cut. Raises ValueError where it cannot be cut."""
    @staticmethod
    def stack(parts: Sequence[PackedMatrix]) -> PackedMatrix:
        """Matrices of one quantizer as one, each below the one before. Raises ValueError if rows are no whole tiles."""

class Format:
    """A format: a quantizer that says what a weight is. `spec` is the text of a spec (str) or the file that holds one (Path); `name`
    says which format of several is meant. Raises SpecError."""

    def __init__(self, spec: str | Path, name: Optional[str] = None) -> None: ...
    @staticmethod
    def named(name: str) -> Format:
        """What a command line names: "q4_k" of those built in, "file.qspec", or "file.qspec:member"."""

    name: str
    bits: float
    """Bits a weight, with the fields that belong to a number of weights."""
    text: str
    """The canonical text, layouts and formulas included."""
    digest: str
    """SHA-256 of what decides on the meaning of bits, hexadecimal."""
    layouts: list[str]
    """Names of its layouts."""
    unmade: Optional[str]
    """Why it cannot be made; None if it can."""

    def encode(self, weights: ArrayLike) -> StoredMatrix:
        """Makes a matrix of finite numbers, rows x columns = out x in features, on all cores. Raises ValueError if it cannot be
        made, or the matrix does not fit its layout."""
    def explain(self, rows: int = 4096, columns: int = 4096) -> str:
        """Rate, meaning, cost and layouts."""

class StoredMatrix:
    """A matrix of a format, rows x columns = out x in features: the bytes of its layout's tensors."""

    @staticmethod
    def from_tensors(
        format: Format, rows: int, columns: int, tensors: dict[str, ArrayLike], layout: Optional[str] = None
    ) -> StoredMatrix:
        """The matrix of such bytes (one number a byte), by the layout of that name, or the first. Raises ValueError if a tensor
        is missing or has another length."""
    format: Format
    layout: str
    shape: tuple[int, int]
    error: Optional[float]
    """Relative squared error, where it is known: after `encode`."""
    nbytes: int
    tensors: dict[str, NDArray[np.uint8]]
    """Bytes by the names of the layout's tensors. Copies."""

    def decode(self) -> NDArray[np.float32]:
        """The weights that it stands for: rows x columns."""
    def linear(self, x: ArrayLike) -> NDArray[np.float32]:
        """`x @ weights.T`, tokens x rows, of tokens x columns: activations are rounded to 15 bits, sums are exact; the same bits
        as qp's engine on any device. Raises ValueError where the format's products are not exact."""

class Checkpoint:
    """A directory that `quantize` wrote: its quantized layers by name. Raises ValueError if it is damaged."""

    def __init__(self, dir: str | PathLike[str]) -> None: ...
    manifest: str
    """JSON: quantizers, layers with their errors, tensors, files and their hashes."""
    layers: list[str]
    def __len__(self) -> int: ...
    def __contains__(self, layer: str) -> bool: ...
    def __getitem__(self, layer: str) -> PackedMatrix: ...
    def inspect(self) -> str:
        """JSON: layers with bits a weight, bytes and errors, and totals, as `qp inspect --json` prints it."""

class Plan:
    """Which quantizer each layer gets. A notebook shows it as a picture, `print` as a table."""

    toml: str
    """The plan file, for `quantize(..., plan=)`."""
    table: str
    svg: str
    """Layers by matrices, colour by bits."""
    bits: float
    """Bits a weight, scales included."""
    loss: float
    """Predicted loss, as `qp plan` states it: for comparing plans of one model."""
    def write(self, path: str | PathLike[str]) -> None:
        """Writes the plan file."""

class Product:
    """The kernels of a product; used by `qpalette.torch`. `device` is a GPU, or None for the interpreter."""

    def __init__(
        self,
        quantizer: Quantizer,
        rows: int,
        columns: int,
        tokens: int,
        dtype: str,
        device: Optional[int],
        share: bool = False,
    ) -> None: ...
    tokens: int
    stride: int
    scratch_bytes: int
    scales_at: int
    meeting_bytes: int
    def largest(self, stream: int, tokens: int, x: int, scratch: int, magnitudes: int) -> None: ...
    def launch(
        self,
        stream: int,
        tokens: int,
        x: int,
        words: int,
        scales: int,
        y: int,
        scratch: int,
        meeting: int,
        magnitudes: int = 0,
    ) -> None: ...

class Lookup:
    """The kernel of an embedding; used by `qpalette.torch`."""

    def __init__(self, quantizer: Quantizer, rows: int, columns: int, tokens: int, device: Optional[int]) -> None: ...
    stride: int
    def launch(self, stream: int, count: int, tokens: int, words: int, scales: int, y: int) -> None: ...

def formats() -> list[str]:
    """Names of the formats that are built in."""

def check(spec: str | Path) -> list[Diagnostic]:
    """Checks the text of a spec (str) or a file (Path): gives warnings, raises SpecError for errors."""

def plan(options: list[str]) -> Plan: ...
def seal(dir: str | PathLike[str], layers: list[tuple[str, Quantizer, int, int, float]]) -> None:
    """Makes a checkpoint of a model directory whose weight files hold `NAME.packed` and `NAME.scales` of each layer (name,
    quantizer, rows, columns, relative error): writes its specs and its manifest."""

def sensitivity(
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    sequences: int = 16,
    tokens: int = 256,
    levels: int = 4,
    draws: int = 1,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    progress: Optional[Callable[[int, int, str], Any]] = None,
) -> None:
    """Measures how much a model's predictions suffer from noise in each layer, on texts that it writes itself, and writes the
    file `out` (JSON), after every layer anew. `progress` is called with the trials done, all trials, and the layer's name.
    Ctrl-C stops after a layer; `resume` goes on."""

def palette() -> list[Quantizer]:
    """The quantizers that come along."""

def quantize(
    model: str | PathLike[str],
    out: str | PathLike[str],
    *,
    spec: Optional[str] = None,
    plan: Optional[str | PathLike[str]] = None,
    calibrate: Optional[str | PathLike[str]] = None,
    calibrate_tokens: int = 32768,
    resume: bool = False,
    force: bool = False,
    device: str = "auto",
    threads: Optional[int] = None,
    progress: Optional[Callable[[int, int, str], Any]] = None,
) -> None:
    """Quantizes a model's directory or GGUF file into the checkpoint `out`, as `qp quantize` does: with one quantizer
    (`spec`) or a plan. `calibrate` is a text file, or "self", that the rounding is fitted to. `progress` is called after
    each layer with the weights done, all weights, and the layer's name. Ctrl-C stops between layers; `resume` goes on."""

def logits(
    model: str | PathLike[str], tokens: Sequence[int], *, device: str = "auto"
) -> NDArray[np.float32]:
    """What the model predicts after each of `tokens`: tokens x vocabulary."""

def perplexity(
    model: str | PathLike[str], text: str, *, window: int = 256, limit: Optional[int] = None, device: str = "auto"
) -> float:
    """Perplexity of `text`, scored in windows of so many tokens, each on its own; `limit` takes its first tokens alone."""

def generate(
    model: str | PathLike[str],
    prompt: str,
    *,
    tokens: int = 60,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """What follows `prompt`, at most so many tokens. Equal seeds give equal texts on every device."""
