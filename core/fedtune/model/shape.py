"""The sizes of a base model, read from its configuration without loading weights.

    shape = shape_of(ModelSettings("demo"))

The network is built without storage (torch's meta device), so the counts are those of the real network, independent of
the names of its layers. Only `shape_of` needs torch, and imports it when it is called; plans need sizes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.core.adapter.core_layout import CoreLayout, check_rank
from fedtune.core.adapter.fixed_factors import FixedFactors
from fedtune.core.adapter.layout import AdaptedModule, AdapterKind, AdapterLayout
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import AdapterSettings, ModelSettings
from fedtune.data.job_inputs import source_of

Precision = Literal["fp32", "bf16", "fp16"]  # precision of the arithmetic
Weights = Literal["packed", "dequantized", "mapped", "unpacked"]
"""Format of the linear weights. The last two are of an edge pack: in its file, or unpacked once into memory."""
MAX_CHUNK_LOGITS = 1 << 24  # logits that exist at once: 64 MiB of float32
PACK_CHUNK_LOGITS = 1 << 22  # the same on an edge pack: 16 MiB, three times
SMALL_MODEL = 50_000_000  # parameters; smaller models run slower with threads, above all on a busy machine
_LISTED_ENDINGS = 20  # how many existing names an error lists


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, from which memory and time follow.

    Args:
        name: directory or hub id.
        linear: all linear layers except the head: those that are quantized, and that "all-linear" adapts.
        other_parameters: number of parameters of embeddings, head and norms; shared ones count once.
        layers: L, number of transformer blocks.
        width: d, width of the residual stream.
        heads: number of attention heads.
        query_width: number of heads times head width; it differs from d in some architectures.
        kv_width: width of keys, and of values.
        mlp_width: f, width of the MLP.
        gated: whether the MLP multiplies two branches of width f.
        vocabulary: V, number of logits.
        positions: longest sequence that the architecture supports.
        file_bytes: size of the weight files; 0 where they are not on this machine.
    """

    name: str
    linear: tuple[AdaptedModule, ...]
    other_parameters: int
    layers: int
    width: int
    heads: int
    query_width: int
    kv_width: int
    mlp_width: int
    gated: bool
    vocabulary: int
    positions: int
    file_bytes: int

    @property
    def linear_parameters(self) -> int:
        """N_lin, the number of parameters of all linear layers."""
        return sum(module.d_in * module.d_out for module in self.linear)

    @property
    def parameters(self) -> int:
        """N, the number of parameters; shared ones count once."""
        return self.linear_parameters + self.other_parameters

    @property
    def largest_linear(self) -> int:
        """The number of parameters of the largest linear layer."""
        return max(module.d_in * module.d_out for module in self.linear)

    def adapter_parameters(self, kind: AdapterKind, rank: int) -> int:
        """Returns P, the number of trained parameters of an adapter on all linear layers."""
        return len(self.linear) * rank**2 if kind == "core" else self.factor_parameters(rank)

    def factor_parameters(self, rank: int) -> int:
        """Returns F, the number of values of A and B on all linear layers, whether they are trained or fixed."""
        return rank * sum(module.d_in + module.d_out for module in self.linear)


def shape_of(settings: ModelSettings) -> ModelShape:
    """Returns the sizes of a base model.

    Raises:
        ModelError: not a model directory, not a causal LM, or a configuration that no network can be built from.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fedtune.model.base_model import load_config, quiet

    with quiet():
        source = source_of(settings.base)
        config = load_config(source)
        try:
            with torch.device("meta"):
                factory: Any = AutoModelForCausalLM
                network = factory.from_config(config)
        except Exception as error:  # a configuration may contradict itself in any way
            raise ModelError(f"{source}: no network can be built from its configuration: {error}") from error
    linear = tuple(_linear_modules(network))
    if not linear:
        raise ModelError(f"{source}: the network has no linear layer to adapt")
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    head_width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(text.hidden_size)
    mlp_width = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width)
    frozen = sum(parameter.numel() for parameter in network.parameters())
    return ModelShape(
        name=settings.base,
        linear=linear,
        other_parameters=frozen - sum(module.d_in * module.d_out for module in linear),
        layers=int(text.num_hidden_layers),
        width=width,
        heads=heads,
        query_width=heads * head_width,
        kv_width=kv_heads * head_width,
        mlp_width=mlp_width,
        gated=_is_gated(linear, mlp_width, int(text.num_hidden_layers)),
        vocabulary=int(text.vocab_size),
        positions=int(getattr(text, "max_position_embeddings", None) or 1 << 20),
        file_bytes=_file_bytes(Path(source)),
    )


def adapted_modules(linear: Sequence[AdaptedModule], settings: AdapterSettings) -> tuple[AdaptedModule, ...]:
    """Returns those of a base model's linear layers that an adapter is for.

    Raises:
        ModelError: a target matches no linear layer; the message lists the existing names. Or the rank of a core
            adapter is over the smaller side of a layer.
    """
    modules = linear if settings.target_modules == "all-linear" else _matching(linear, settings.target_modules)
    if settings.kind == "core":
        check_rank(modules, settings.rank)
    return tuple(modules)


def layout_of_sizes(linear: Sequence[AdaptedModule], settings: AdapterSettings) -> AdapterLayout:
    """Returns the layout of an adapter on a base's linear layers, without the fixed factors of a core adapter, whose
    values follow from the base's weights; raises as `adapted_modules` does."""
    modules = adapted_modules(linear, settings)
    if settings.kind == "core":
        return CoreLayout(modules, settings.rank, settings.alpha, FixedFactors({}))
    return LoraLayout(modules, settings.rank, settings.alpha)


def _matching(linear: Sequence[AdaptedModule], endings: Sequence[str]) -> list[AdaptedModule]:
    def ends(name: str, ending: str) -> bool:
        return name == ending or name.endswith(f".{ending}")

    unmatched = [ending for ending in endings if not any(ends(module.name, ending) for module in linear)]
    if unmatched:
        existing = list(dict.fromkeys(module.name.rpartition(".")[2] for module in linear))
        more = f" and {len(existing) - _LISTED_ENDINGS} more" if len(existing) > _LISTED_ENDINGS else ""
        raise ModelError(
            f"adapter.target_modules: {', '.join(unmatched)} matches no linear layer of the base model; "
            f"it has {', '.join(existing[:_LISTED_ENDINGS])}{more}"
        )
    return [module for module in linear if any(ends(module.name, ending) for ending in endings)]


def _linear_modules(network: Any) -> list[AdaptedModule]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = network.get_output_embeddings()
    found = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found.append(AdaptedModule(name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            found.append(AdaptedModule(name, *module.weight.shape))
    return found


def _is_gated(linear: tuple[AdaptedModule, ...], mlp_width: int, layers: int) -> bool:
    """Returns whether each block has two branches of width f, as two layers or as one of twice the width."""
    outputs = [module.d_out for module in linear if "att" not in module.name]  # q, k and v in one layer may be as wide
    return 2 * mlp_width in outputs or outputs.count(mlp_width) >= 2 * layers


def _file_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) if directory.is_dir() else 0
