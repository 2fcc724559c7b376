"""Quantizers as a small language, compiled to kernels.

    import numpy as np, qpalette as qp

    q = qp.Quantizer.named("tcq_3")          # of the palette; or qp.Quantizer(text), qp.Quantizer(Path("mine.qspec"))
    packed = q.encode(np.random.randn(256, 512).astype(np.float32))
    error = ((packed.decode() - weights) ** 2).mean()
    qp.quantize("MODEL_DIR", "OUT", spec="tcq_3", progress=lambda done, total, layer: print(layer))

`qpalette.torch` has the same product as an operator of PyTorch, `qpalette.transformers` runs checkpoints in transformers, and
`qpalette.vllm` in vLLM.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import Iterable, Optional, Union

from . import _native, _pickles, _versions

__version__ = "0.1.0"
_versions.native(__version__, _native.__version__)
_pickles.register()

from ._native import (  # noqa: E402
    Checkpoint,
    Diagnostic,
    Format,
    PackedMatrix,
    Plan,
    Quantizer,
    SpecError,
    StoredMatrix,
    check,
    formats,
    generate,
    logits,
    palette,
    perplexity,
    quantize,
    sensitivity,
)

__all__ = [
    "Checkpoint",
    "Diagnostic",
    "Format",
    "PackedMatrix",
    "Plan",
    "Quantizer",
    "SpecError",
    "StoredMatrix",
    "__version__",
    "check",
    "formats",
    "generate",
    "logits",
    "palette",
    "perplexity",
    "plan",
    "quantize",
    "sensitivity",
]


def plan(
    sensitivity: Union[str, PathLike[str]],
    *,
    profile: Union[None, str, PathLike[str]] = None,
    quantizers: Iterable[str] = ("*",),
    bits: Optional[float] = None,
    memory: Union[None, int, str] = None,
    as_uniform: Optional[str] = None,
    tokens_per_second: Optional[float] = None,
    milliseconds: Optional[float] = None,
    lm_head: bool = False,
    embedding: bool = False,
    fusion: bool = True,
) -> Plan:
    """The best plan within budgets, as `qp plan` finds it.

    `sensitivity` is the file that `sensitivity` wrote. Of memory the budget is `bits` a weight, `memory` in bytes (or "3.5GiB"),
    or what the quantizer `as_uniform` would take on every layer; of time `tokens_per_second` or `milliseconds` a step, which need
    the `profile` that `qp profile` wrote. `quantizers` are names of the palette to choose from, with stars. Raises ValueError if
    no plan keeps within them."""
    options = [
        ("sensitivity", fspath(sensitivity)),
        ("profile", None if profile is None else fspath(profile)),
        ("quantizers", ",".join(quantizers)),
        ("bits", bits),
        ("memory", memory),
        ("as-uniform", as_uniform),
        ("tokens-per-second", tokens_per_second),
        ("milliseconds", milliseconds),
    ]
    flags = [("lm-head", lm_head), ("embedding", embedding), ("no-fusion", not fusion)]
    words = [f"--{name}={value}" for name, value in options if value is not None]
    return _native.plan(words + [f"--{name}" for name, on in flags if on])
