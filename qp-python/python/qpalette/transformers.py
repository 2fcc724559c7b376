"""Checkpoints of `qp quantize` in transformers, and models quantized there.

    import qpalette.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("OUT")     # a directory that `qp quantize` wrote

    model = AutoModelForCausalLM.from_pretrained("MODEL", quantization_config=qpalette.transformers.QpConfig("tcq_3"))
    model.save_pretrained("OUT")                            # a checkpoint, for qp too

Importing this module makes the quantization method `qp` known to transformers.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Callable, Optional, Union

from ._versions import need

need("qpalette.transformers", "transformers", "4.52", "transformers")

import torch  # noqa: E402
from transformers import quantizers as _quantizers  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils import cached_file  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

from . import torch as qpt  # noqa: E402
from ._checkpoints import METHOD, Layer, layers  # noqa: E402
from ._native import Quantizer, seal  # noqa: E402

__all__ = ["QpConfig", "QpQuantizer", "quantize_"]

Choice = Union[str, Quantizer, Callable[[str, torch.nn.Linear], Union[None, str, Quantizer]]]


@_quantizers.auto.register_quantization_config(METHOD)
class QpConfig(QuantizationConfigMixin):
    """How a model is quantized as it is loaded: `quantizer` is one of the palette, a `Quantizer`, or a function of a layer's
    name and the layer that gives one, or None for a layer that stays. `lm_head` is the output layer's quantizer; without it
    the output layer stays. For a checkpoint nothing is said here: its `qp.json` says it."""

    def __init__(
        self, quantizer: Optional[Choice] = None, *, lm_head: Union[None, str, Quantizer] = None, **others
    ) -> None:
        others.pop("quant_method", None)
        if others:
            raise ValueError(f"quantization_config of qp has no {', '.join(others)}")
        self.quant_method = METHOD
        self._quantizer, self._lm_head = quantizer, lm_head

    def to_dict(self) -> dict:
        return {"quant_method": METHOD}

    def __iter__(self):
        yield from self.to_dict().items()


@_quantizers.auto.register_quantizer(METHOD)
class QpQuantizer(HfQuantizer):
    """Puts `qpalette.torch`'s layers in the place of a model's."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        if not self.pre_quantized:
            if self.quantization_config._quantizer is None:
                raise ValueError("say how the model is quantized: QpConfig('tcq_3'), or a function of a layer's name")
            return
        place = model.config.name_or_path
        if checkpoint_files:
            directory = Path(checkpoint_files[0]).parent
        else:
            directory = Path(place)

        def fetch(name: str) -> Path:
            here = directory / name
            if here.exists():
                return here
            found = None if directory.is_dir() and str(directory) == place else cached_file(place, name)
            if found is None:
                raise ValueError(f"{here} is missing: copy the whole checkpoint again")
            return Path(found)

        _replace(model, layers(Path(place), fetch, "transformers"))

    def _process_model_after_weight_loading(self, model, **_):
        if not self.pre_quantized:
            config = self.quantization_config
            _quantize(model, config._quantizer, config._lm_head)
        _attach(model)
        return model

    # The names that older and newer releases of transformers ask for.
    def is_serializable(self, *_, **__) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Tied(torch.nn.Module):
    """An output layer whose matrix is the quantized embedding's."""

    def __init__(self, embedding: qpt.Embedding) -> None:
        super().__init__()
        # In a tuple: its tensors are the embedding's, and saved once.
        self._of = (embedding,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self._of[0]
        return torch.ops.qp.linear(x, e.packed, e.scales, e.spec, e.rows, e.columns)

    def extra_repr(self) -> str:
        return f"the embedding's matrix, quantizer={self._of[0].name}"


def _name_of(model, module) -> Optional[str]:
    return next((name for name, m in model.named_modules() if m is module), None)


def _put(model, name: str, module: torch.nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, attribute, module)


def _untie(model) -> None:
    """Tells transformers that no tensors are tied."""
    model._tied_weights_keys = None
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def _replace(model, found: dict[str, Layer]) -> None:
    """Puts empty layers of these quantizers into the model, for their tensors to be loaded."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    input_name, output_name = _name_of(model, inputs), outputs is not None and _name_of(model, outputs)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    for name, layer in found.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"layer {name} of the checkpoint is none of {type(model).__name__}'s: "
                "this release of transformers builds the model from other layers; run the checkpoint with qp"
            ) from None
        shape = (layer.rows, layer.columns)
        with torch.device("meta"):
            if type(old) is torch.nn.Linear:
                fits = tuple(old.weight.shape) == shape
                bias = None if old.bias is None else torch.empty(layer.rows, dtype=old.bias.dtype)
                new = qpt.Linear.empty(layer.quantizer, *shape, layer.error, bias=bias)
            elif type(old) is torch.nn.Embedding:
                fits = tuple(old.weight.shape) == shape
                new = qpt.Embedding.empty(layer.quantizer, *shape, layer.error, dtype=old.weight.dtype)
            else:
                raise ValueError(
                    f"layer {name} is a {type(old).__name__} in transformers, which cannot be quantized there: "
                    f'leave it as it is ("{name}" = "keep" in the plan), or run the checkpoint with qp'
                )
        if not fits:
            raise ValueError(f"layer {name} is {tuple(old.weight.shape)} in transformers, {shape} in the checkpoint")
        _put(model, name, new)
        if isinstance(new, qpt.Embedding):
            # Nothing is loaded into it.
            new.like = torch.empty(0, dtype=old.weight.dtype)
    if input_name in found and tied and output_name and output_name not in found:
        _put(model, output_name, _Tied(model.get_submodule(input_name)))
    if tied and (input_name in found or output_name in found):
        _untie(model)


def _quantize(model, choice: Choice, lm_head: Union[None, str, Quantizer]) -> None:
    outputs = model.get_output_embeddings()
    output_name = outputs is not None and _name_of(model, outputs)

    def chosen(name, linear):
        if name == output_name:
            return lm_head
        return choice(name, linear) if callable(choice) else choice

    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    qpt.quantize_(model, chosen)
    if lm_head is not None and tied:
        _untie(model)


def quantize_(model, choice: Choice, *, lm_head: Union[None, str, Quantizer] = None):
    """Quantizes a loaded model of transformers in place, as `QpConfig` says, and gives it back: `save_pretrained` then writes
    a checkpoint."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantized already")
    quantizer = QpQuantizer(QpConfig(choice, lm_head=lm_head), pre_quantized=False)
    quantizer._process_model_after_weight_loading(model)
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = METHOD
    model.config.quantization_config = quantizer.quantization_config
    return model


def _attach(model) -> None:
    """Lets `save_pretrained` write the manifest too."""
    save = model.save_pretrained

    @functools.wraps(save)
    def save_pretrained(save_directory, *args, **kwargs):
        directory = Path(save_directory)
        # A manifest of what was there before would be of other tensors.
        (directory / "qp.json").unlink(missing_ok=True)
        result = save(save_directory, *args, **kwargs)
        found = []
        for name, module in model.named_modules():
            if isinstance(module, qpt._Matrix):
                if module.error is None:
                    raise ValueError(f"the error of {name} is not known: set its attribute `error` before the model is saved")
                found.append((name, module.quantizer, module.rows, module.columns, module.error))
        seal(directory, found)
        return result

    model.save_pretrained = save_pretrained
