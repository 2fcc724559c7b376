"""Quantizers as a small language, compiled to kernels.

    import numpy as np, qpalette as qp

    q = qp.Quantizer.named("tcq_3")          # of the palette; or qp.Quantizer(text), qp.Quantizer(Path("mine.qspec"))
    packed = q.encode(np.random.randn(256, 512).astype(np.float32))
    error = ((packed.decode() - weights) ** 2).mean()
    qp.quantize("MODEL_DIR", "OUT", spec="tcq_3", progress=lambda done, total, layer: print(layer))

`qpalette.torch` has the same product as an operator of PyTorch.
"""

from ._native import (
    Checkpoint,
    Diagnostic,
    PackedMatrix,
    Quantizer,
    SpecError,
    __version__,
    check,
    generate,
    palette,
    perplexity,
    quantize,
)

__all__ = [
    "Checkpoint",
    "Diagnostic",
    "PackedMatrix",
    "Quantizer",
    "SpecError",
    "__version__",
    "check",
    "generate",
    "palette",
    "perplexity",
    "quantize",
]
