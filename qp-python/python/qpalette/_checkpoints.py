"""What a checkpoint's manifest says of its layers, for those who load its tensors themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable, NamedTuple

from ._native import Checkpoint, Quantizer

MANIFEST = "qp.json"
METHOD = "qp"


class Layer(NamedTuple):
    """A quantized layer: out x in features, and the relative squared error that quantizing made."""

    quantizer: Quantizer
    rows: int
    columns: int
    error: float


def layers(directory: Path, fetch: Callable[[str], Path], reader: str) -> dict[str, Layer]:
    """The quantized layers by name. `fetch` gives the path of a file of the checkpoint, `reader` is who asks."""
    manifest_path = fetch(MANIFEST)
    if manifest_path.parent == directory:
        # All of it is here: whatever is damaged is found now.
        Checkpoint(directory)
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    files = {entry["name"]: entry["file"] for entry in manifest["specs"]}
    quantizers: dict[str, Quantizer] = {}
    found = {}
    for layer in manifest["layers"]:
        name, spec = layer["name"], layer["spec"]
        if layer.get("layout"):
            raise ValueError(f"layer {name} has the format {spec}, which {reader} cannot run: use qp, or quantize the model")
        if spec not in quantizers:
            quantizers[spec] = Quantizer(fetch(files[spec]), spec)
        found[name] = Layer(quantizers[spec], layer["rows"], layer["cols"], layer["error"])
    return found
