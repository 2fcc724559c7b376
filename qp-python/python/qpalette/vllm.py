"""Checkpoints of `qp quantize` in vLLM: the quantization `qp`.

vLLM finds it by itself where this package is installed beside it (the entry point `qp` of `vllm.general_plugins`):

    vllm serve OUT --tensor-parallel-size 2

The layers of a checkpoint may have quantizers of their own, or stay as they are. Several GPUs cut matrices by rows or, of
layers that follow others, by columns; `Quantizer.cuts` says where a matrix can be cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from ._versions import need

need("qpalette.vllm", "torch", "2.4", "vllm")

import torch  # noqa: E402
from torch.nn import Parameter  # noqa: E402
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase  # noqa: E402
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.linear import (  # noqa: E402
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config  # noqa: E402
from vllm.model_executor.layers.quantization.base_config import (  # noqa: E402
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding  # noqa: E402

from . import torch as _operators  # noqa: E402, F401
from ._checkpoints import METHOD, Layer, layers  # noqa: E402
from ._native import PackedMatrix  # noqa: E402
from ._registry import register as _register  # noqa: E402

# The three parts of a merged layer of attention, as vLLM names them.
_QKV = ("q", "k", "v")
# The embedding in a checkpoint of qp, whatever the architecture.
_EMBEDDING = "model.embed_tokens"


def register() -> None:
    """The plugin: importing this module has made the quantization known."""


class _Slice(NamedTuple):
    """The part of a layer of the checkpoint that a rank computes: from one row and column up to others."""

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]


@register_quantization_config(METHOD)
class QpConfig(QuantizationConfig):
    """The quantization of a checkpoint, which its `qp.json` describes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, Layer] = {}
        # Whether the output layer is the embedding, which is quantized.
        self.tied = False

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict) -> QpConfig:
        return cls()

    def maybe_update_config(self, model_name: str, hf_config=None, revision: Optional[str] = None) -> None:
        def fetch(name: str) -> Path:
            here = Path(model_name) / name
            if here.exists():
                return here
            if Path(model_name).is_dir():
                raise ValueError(f"{here} is missing: copy the whole checkpoint again")
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(model_name, name, revision=revision))

        self.layers = layers(Path(model_name), fetch, "vLLM")
        if hf_config is not None:
            text = hf_config.get_text_config()
            if "lm_head" in self.layers and getattr(text, "tie_word_embeddings", False):
                # The output layer has a matrix of its own.
                for config in {id(hf_config): hf_config, id(text): text}.values():
                    config.tie_word_embeddings = False
            self.tied = bool(getattr(text, "tie_word_embeddings", False)) and _EMBEDDING in self.layers

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Optional[QuantizeMethodBase]:
        if isinstance(layer, LinearBase):
            names = self._parts(prefix)
            if not any(name in self.layers for name in names):
                return UnquantizedLinearMethod()
            return QpLinearMethod(self.layers, names)
        if isinstance(layer, VocabParallelEmbedding):
            if self.tied and isinstance(layer, ParallelLMHead):
                return _TiedMethod()
            # Some models do not say where their embedding is.
            name = prefix or ("" if isinstance(layer, ParallelLMHead) else _EMBEDDING)
            return QpEmbeddingMethod(self.layers, [name]) if name in self.layers else None
        if isinstance(layer, RoutedExperts):
            before = prefix.removesuffix(".routed_experts")
            if any(name.startswith(f"{before}.") for name in self.layers):
                return QpExpertsMethod(layer.moe_config, self.layers, before)
        return None

    def _parts(self, prefix: str) -> list[str]:
        """The layers of the checkpoint that make up a layer of vLLM's."""
        if prefix in self.layers:
            return [prefix]
        before, dot, last = prefix.rpartition(".")
        return [f"{before}{dot}{name}" for name in self.packed_modules_mapping.get(last, [last])]


class _Method:
    """What linear layers and embeddings share: tensors are collected as they are loaded, and cut once all are there."""

    uses_meta_device = False

    def __init__(self, found: dict[str, Layer], names: list[str]) -> None:
        self.layers, self.names = found, names

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_,
    ) -> None:
        layer.qp_loaded = {}
        layer.qp_dtype = params_dtype
        layer.qp_sizes = (input_size_per_partition, list(output_partition_sizes))
        layer.qp_device = torch.empty(0).device
        kinds = {"packed": torch.uint32, "scales": torch.bfloat16}
        if any(name not in self.layers for name in self.names):
            kinds["weight"] = params_dtype
        for kind, dtype in kinds.items():
            empty = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            empty.weight_loader = self._loader(layer, kind)
            layer.register_parameter(kind, empty)

    def _loader(self, layer: torch.nn.Module, kind: str):
        def load(param, tensor: torch.Tensor, shard=None) -> None:
            layer.qp_loaded[self._name_of(shard), kind] = tensor.detach().cpu().clone()

        return load

    def _name_of(self, shard) -> str:
        if shard is None:
            if len(self.names) != 1:
                raise ValueError(f"which of {', '.join(self.names)} is loaded is not said")
            return self.names[0]
        return self.names[_QKV.index(shard) if shard in _QKV else shard]

    def _slices(self, layer: torch.nn.Module) -> list[_Slice]:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if hasattr(layer, "qp_pieces"):
            return
        place = f"rank {layer.tp_rank} of {layer.tp_size}"
        pieces = _cut(layer, self.layers, self._slices(layer), place)
        _forget(layer, ["packed", "scales", "weight"])
        layer.qp_pieces = [_keep(layer, i, piece) for i, piece in enumerate(_joined(pieces))]

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        parts = [_product(layer, i, piece, x) for i, piece in enumerate(layer.qp_pieces)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if bias is None else y + bias


def _cut(layer: torch.nn.Module, found: dict[str, Layer], slices: list[_Slice], place: str) -> list:
    """The slices of the layers that were loaded: packed matrices, or weights of layers that stay as they are."""
    matrices: dict[str, PackedMatrix] = {}
    pieces: list = []
    for name, rows, columns in slices:
        if name not in found:
            weight = layer.qp_loaded[name, "weight"][rows[0] : rows[1], columns[0] : columns[1]]
            pieces.append(weight.to(layer.qp_dtype))
            continue
        of = found[name]
        if name not in matrices:
            words, scales = layer.qp_loaded[name, "packed"], layer.qp_loaded[name, "scales"]
            parts = words.view(torch.int32).numpy().view("uint32"), scales.float().numpy()
            matrices[name] = PackedMatrix.from_parts(of.quantizer, of.rows, of.columns, *parts)
        try:
            pieces.append(matrices[name].cut(rows=rows, columns=columns))
        except ValueError as e:
            raise ValueError(f"{name}, for {place}: {e}") from None
    return pieces


def _forget(layer: torch.nn.Module, parameters: list[str]) -> None:
    """Drops what was loaded, and the parameters through which it came."""
    del layer.qp_loaded
    for name in parameters:
        if name in layer._parameters:
            delattr(layer, name)


def _keep(layer: torch.nn.Module, i: int, piece) -> Optional[tuple]:
    """Keeps a piece as number `i` of the layer, where it computes. Gives what its operator is told; None of plain weights."""
    if isinstance(piece, torch.Tensor):
        layer.register_buffer(f"qp_weight_{i}", piece.to(layer.qp_device), persistent=False)
        return None
    layer.register_buffer(f"qp_packed_{i}", torch.from_numpy(piece.words).to(layer.qp_device), persistent=False)
    scales = torch.from_numpy(piece.scales).to(torch.bfloat16).to(layer.qp_device)
    layer.register_buffer(f"qp_scales_{i}", scales, persistent=False)
    return (_register(piece.quantizer), *piece.shape)


def _product(layer: torch.nn.Module, i: int, piece: Optional[tuple], x: torch.Tensor) -> torch.Tensor:
    """The product with what `_keep` has kept."""
    if piece is None:
        return torch.nn.functional.linear(x, getattr(layer, f"qp_weight_{i}"))
    return torch.ops.qp.linear(x, getattr(layer, f"qp_packed_{i}"), getattr(layer, f"qp_scales_{i}"), *piece)


def _joined(pieces: list) -> list:
    """Neighbours of one quantizer become one matrix, so that their product is one launch."""
    out: list = []
    for piece in pieces:
        last = out[-1] if out else None
        if isinstance(last, PackedMatrix) and isinstance(piece, PackedMatrix) and last.quantizer == piece.quantizer:
            try:
                out[-1] = PackedMatrix.stack([last, piece])
                continue
            except ValueError:
                pass
        out.append(piece)
    return out


class QpLinearMethod(_Method, LinearMethodBase):
    """Linear layers: plain, merged, cut by rows or by columns."""

    def _slices(self, layer: torch.nn.Module) -> list[_Slice]:
        inputs, sizes = layer.qp_sizes
        if isinstance(layer, RowParallelLinear):
            first = layer.tp_rank * inputs
            return [_Slice(self.names[0], (0, sizes[0]), (first, first + inputs))]
        names = self.names
        # One matrix of the checkpoint may be several of vLLM's: their rows follow one another.
        whole = len(names) == 1 and len(sizes) > 1
        before, out = 0, []
        for i, size in enumerate(sizes):
            # A replicated layer is whole on every rank.
            rank, ranks = (0, 1) if isinstance(layer, ReplicatedLinear) else (layer.tp_rank, layer.tp_size)
            replicas = getattr(layer, "num_kv_head_replicas", 1) if i > 0 else 1
            rank, ranks = rank // replicas, ranks // replicas
            first = (before if whole else 0) + rank * size
            out.append(_Slice(names[0] if whole else names[i], (first, first + size), (0, inputs)))
            before += ranks * size
        return out


class QpEmbeddingMethod(_Method, QuantizeMethodBase):
    """Embeddings and output layers, cut by rows."""

    def _slices(self, layer: torch.nn.Module) -> list[_Slice]:
        at = layer.shard_indices
        if layer.num_added_embeddings:
            raise ValueError(f"{self.names[0]}: a quantized embedding cannot get more tokens")
        rows = (at.org_vocab_start_index, at.org_vocab_end_index)
        return [_Slice(self.names[0], rows, (0, layer.embedding_dim))]

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        y = super().apply(layer, x)
        missing = layer.num_embeddings_per_partition - y.shape[-1]
        if missing:
            y = torch.nn.functional.pad(y, (0, missing))
        return y if bias is None else y + bias

    def embedding(self, layer: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        packed, scales = layer.qp_packed_0, layer.qp_scales_0
        return torch.ops.qp.embedding(tokens, packed, scales, *layer.qp_pieces[0], layer.qp_dtype)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module):
        return embed_tokens


class _TiedMethod(QuantizeMethodBase):
    """An output layer in whose place the embedding stands."""

    def create_weights(self, layer: torch.nn.Module, *_, **__) -> None:
        pass

    def apply(self, layer: torch.nn.Module, *_, **__) -> torch.Tensor:
        raise RuntimeError("the output layer is the embedding, but this model of vLLM does not tie them: run the checkpoint with qp")

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module):
        return embed_tokens


class QpExpertsMethod(FusedMoEMethodBase):
    """The experts of a mixture, each of which has matrices of its own. Their products are launches of their own."""

    # Of an expert, in the order in which they are kept: vLLM's name, and what says the name in the checkpoint.
    _KINDS = [("w1", "ckpt_gate_proj_name"), ("w3", "ckpt_up_proj_name"), ("w2", "ckpt_down_proj_name")]
    _ACTIVATIONS = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }

    def __init__(self, moe, found: dict[str, Layer], prefix: str) -> None:
        super().__init__(moe)
        self.layers, self.prefix = found, prefix

    def get_fused_moe_quant_config(self, layer):
        return None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_,
    ) -> None:
        activation = getattr(layer.activation, "value", layer.activation)
        if activation not in self._ACTIVATIONS or self.moe.has_bias:
            raise ValueError(
                f"{self.prefix}: quantized experts with biases or the activation {activation} are not run by qp's plugin for "
                "vLLM; leave the experts as they are in the plan, or run the checkpoint with qp"
            )
        layer.qp_activation = self._ACTIVATIONS[activation]
        layer.qp_loaded = {}
        layer.qp_dtype = params_dtype
        layer.qp_sizes = (hidden_size, intermediate_size_per_partition)
        layer.qp_device = torch.empty(0).device
        for kind, dtype in {"packed": torch.uint32, "scales": torch.bfloat16, "weight": params_dtype}.items():
            for of in ("w13", "w2"):
                empty = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                empty.weight_loader = self._loader(layer, kind)
                layer.register_parameter(f"{of}_{kind}", empty)

    def _name(self, layer: RoutedExperts, expert: int, shard: str) -> str:
        return f"{self.prefix}.{expert}.{getattr(layer, dict(self._KINDS)[shard])}"

    def _loader(self, layer: RoutedExperts, kind: str):
        def load(param, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int, return_success=False):
            here = layer._map_global_expert_id_to_local_expert_id(expert_id) != -1
            if here:
                layer.qp_loaded[self._name(layer, expert_id, shard_id), kind] = loaded_weight.detach().cpu().clone()
            return here if return_success else None

        return load

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if hasattr(layer, "qp_experts"):
            return
        hidden, inner = layer.qp_sizes
        rank, ranks = self.moe.tp_rank, self.moe.tp_size
        own = (rank * inner, (rank + 1) * inner)
        layer.qp_experts = {}
        loaded = 0
        for expert in range(layer.global_num_experts):
            if layer._map_global_expert_id_to_local_expert_id(expert) == -1:
                continue
            names = [self._name(layer, expert, shard) for shard, _ in self._KINDS]
            places = [(own, (0, hidden)), (own, (0, hidden)), ((0, hidden), own)]
            slices = [_Slice(name, *place) for name, place in zip(names, places)]
            gate, up, down = _cut(layer, self.layers, slices, f"rank {rank} of {ranks}")
            # Gate and up are one matrix where they can be.
            pieces = [*_joined([gate, up]), down]
            layer.qp_experts[expert] = [(loaded + i, _keep(layer, loaded + i, piece)) for i, piece in enumerate(pieces)]
            loaded += len(pieces)
        _forget(layer, [f"{of}_{kind}" for of in ("w13", "w2") for kind in ("packed", "scales", "weight")])

    def apply(self, layer: RoutedExperts, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None):
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        # What is captured in a graph runs for any choice of experts: all of them, for all tokens.
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        chosen = layer.qp_experts if captured else topk_ids.unique().tolist()
        for expert in chosen:
            if expert not in layer.qp_experts:
                continue
            weights = (topk_weights * (topk_ids == expert)).sum(-1, dtype=torch.float32)
            tokens = slice(None) if captured else (topk_ids == expert).any(-1).nonzero()[:, 0]
            of_expert, factor = x[tokens], weights[tokens, None]
            if layer.apply_router_weight_on_input:
                of_expert, factor = (of_expert * factor).to(x.dtype), 1.0
            *first, (i, last) = layer.qp_experts[expert]
            gate, up = torch.cat([_product(layer, k, piece, of_expert) for k, piece in first], -1).chunk(2, -1)
            inner = layer.qp_activation(gate) * up
            y[tokens] += _product(layer, i, last, inner) * factor
        return y.to(x.dtype)
