"""The frozen base model: loaded once per process, quantized, with its tokenizer and the digest that identifies it.

    base = load_base(job.model)

A device short of memory holds the linear weights packed in NF4; one with memory to spare unpacks those same values
once. Both compute the same function of the same numbers, so both carry the same digest.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import psutil  # type: ignore[import-untyped]
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from fedtune.core.errors import ModelError
from fedtune.core.job.settings import ModelSettings
from fedtune.data.job_inputs import source_of
from fedtune.model.formats import FORMATS
from fedtune.model.packed import PackedLinear
from fedtune.model.padding_free import ATTENTION
from fedtune.model.shape import Precision

Held = Literal["packed", "dequantized"]  # format of the linear weights in memory
Network = Any  # a transformers.PreTrainedModel, whose methods carry no types

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSE_SHARE = 0.25  # share of the free memory that unpacked weights may take before "auto" packs them
_AGREEMENT = 2e-2  # relative, between two ways of computing a product in half precision
_AMPERE = (8, 0)  # the first CUDA compute capability with bf16 units


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model, ready to be adapted.

    Args:
        network: transformers causal LM, frozen and in evaluation mode; its linear layers hold the reference values.
        tokenizer: tokenizer with an end-of-sequence token and a padding token.
        digest: 64 hexadecimal digits; equal on two devices exactly when original weights and quantization are.
        name: directory or hub id from which it was loaded.
        precision: precision of the arithmetic.
        weights: format of the linear weights.
    """

    network: Network
    tokenizer: PreTrainedTokenizerBase
    digest: str
    name: str
    precision: Precision
    weights: Held

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return cast(torch.device, self.network.device)

    @property
    def head(self) -> nn.Module:
        """The layer from the last hidden state to the logits."""
        return cast(nn.Module, self.network.get_output_embeddings())


def load_base(
    settings: ModelSettings,
    *,
    weights: Literal["auto", "packed", "dequantized"] = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    device: str | torch.device | None = None,
) -> BaseModel:
    """Loads and quantizes a base model; the network is asked only where `settings.base` is a hub id.

    Args:
        weights: "packed" takes least memory, "dequantized" is fastest; "auto" unpacks where there is enough memory.
        precision: "auto" takes the fastest precision of the device, see `best_precision`.
        device: torch device; None takes the first GPU, or the CPU.

    Raises:
        ModelError: not a model directory, not a causal LM, no tokenizer, no weights, a layer that cannot be quantized,
            or contradictory settings.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = best_precision(device) if precision == "auto" else precision
    if settings.quantization == "none" and weights == "packed":
        raise ModelError("packed weights were asked for, but the base model's quantization is none")
    with quiet():
        source = source_of(settings.base)
        config = load_config(source)
        tokenizer = load_tokenizer(source)
        network = _load_network(source, config, device)
    digest = _digest(network, settings.quantization)
    _straighten(network)
    dtype, linear = DTYPES[precision], dict(linear_modules(network))
    held: Held = "dequantized"
    if form := FORMATS.get(settings.quantization):
        dense_bytes = sum(module.weight.numel() for module in linear.values()) * dtype.itemsize
        if weights == "packed" or (weights == "auto" and dense_bytes > DENSE_SHARE * _free_bytes(device)):
            held = "packed"
        place = device if form.quantizes_on(device.type) else torch.device("cpu")
        for name, module in linear.items():
            check_linear(name, module)
            packed = form.quantize(module.weight.to(place))
            if held == "packed":
                _replace(network, name, PackedLinear(packed, module.bias, dtype, form.unpack))
            else:
                module.weight = nn.Parameter(form.dequantize(packed, dtype), requires_grad=False)
        head = network.get_output_embeddings()
        head.weight.data = form.head_values(head.weight.data, dtype)
    for parameter in network.parameters():  # but not buffers: rotary frequencies and scales of scales stay float32
        # This copies, since a view would keep the whole file mapped, with the pages of weights that are already packed.
        parameter.data = parameter.data.to(dtype, copy=True)
    network.to(device)
    return BaseModel(network.eval().requires_grad_(False), tokenizer, digest, settings.base, precision, held)


def best_precision(device: torch.device) -> Precision:
    """Returns bf16 where the hardware multiplies it natively, fp16 on older GPUs, fp32 otherwise."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= _AMPERE else "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def linear_modules(network: Network) -> Iterator[tuple[str, nn.Linear]]:
    """Yields the linear layers except the head, by name: those that are quantized and that "all-linear" adapts."""
    head = network.get_output_embeddings()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


@torch.no_grad()
def check_linear(name: str, layer: nn.Linear) -> None:
    """Refuses a linear layer whose class computes something else with its weight, as some mixtures' routers do.

    Raises:
        ModelError: such a layer can neither be quantized nor adapted.
    """
    if type(layer).forward in (nn.Linear.forward, PackedLinear.forward):
        return
    rows = torch.linspace(-1.0, 1.0, 2 * layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    rows = rows.view(2, layer.in_features)
    expected = nn.functional.linear(rows, layer.weight, layer.bias)
    try:
        found = layer(rows)
        same = (found - expected).abs().max() <= _AGREEMENT * expected.abs().max()
    except Exception:  # it may want other inputs, and raise any type
        same = False
    if not same:
        raise ModelError(
            f"{name} is a {type(layer).__name__}, which is no plain linear layer; fedtune neither quantizes nor adapts "
            'it. Expected model.quantization = "none", and adapter.target_modules without it'
        )


def _options(source: str) -> dict[str, bool]:
    """Returns options of transformers that never look for a directory on a hub and never run a model's own code."""
    return {"local_files_only": Path(source).is_dir(), "trust_remote_code": False}


def load_config(source: str) -> Any:
    """Returns the transformers configuration of a causal language model.

    Raises:
        ModelError: the configuration is unreadable, or of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(source, **_options(source))
    except Exception as error:  # transformers raises many types of errors for an invalid file
        raise ModelError(f"{source}: not a readable model: {_first_line(error)}") from error
    architectures = set(config.architectures or [])
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.model_type not in causal or config.is_encoder_decoder or not architectures <= set(causal.values()):
        found = ", ".join(sorted(architectures)) or config.model_type
        raise ModelError(f"{source}: {found} is not a causal language model")
    return config


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer, with a padding token.

    Raises:
        ModelError: there is none, or it cannot end a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_options(source))
    except Exception as error:  # as above
        raise ModelError(f"{source}: no tokenizer that can be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{source}: the tokenizer has no end-of-sequence token; completions could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def _load_network(source: str, config: Any, device: torch.device) -> Network:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype="auto", output_loading_info=True, use_safetensors=True, **_options(source)
        )
    except Exception as error:  # as above
        raise ModelError(f"{source}: the model cannot be loaded: {_first_line(error)}") from error
    network, report = loaded
    if report["missing_keys"]:
        raise ModelError(f"{source}: weights are missing: {', '.join(sorted(report['missing_keys']))}")
    for name, parameter in network.named_parameters():
        if not _is_finite(parameter):
            raise ModelError(
                f"{source}: {name} has values that are NaN or infinite; expected another copy of the model"
            )
    # Some architectures choose tokens by a mask that they compute for attention of the name "sdpa" alone.
    chooses = getattr(network.config.get_text_config(), "index_topk", None)
    if device.type == "cpu" and network.config._attn_implementation == "sdpa" and not chooses:
        network.set_attn_implementation(ATTENTION)
    return network


def _is_finite(values: Tensor) -> bool:
    # A sum is faster to take, and NaN or infinite where a value is; one that overflows decides nothing.
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def _digest(network: Network, quantization: str) -> str:
    """Returns SHA-256 of the recipe, then name, dtype, shape and bytes of every original parameter, sorted by name."""
    recipe = FORMATS[quantization].recipe if quantization in FORMATS else quantization
    digest = hashlib.sha256(f"fedtune-base\n{recipe}\n".encode())
    for name, parameter in sorted(network.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _straighten(network: nn.Module) -> None:
    """Replaces the transposed layers of GPT-2 and similar models by plain linear layers of the same function."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            linear = nn.Linear(d_in, d_out, device="meta")
            linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            _replace(network, name, linear)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses progress bars and advice of the libraries while they load a model."""
    log: Any = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
