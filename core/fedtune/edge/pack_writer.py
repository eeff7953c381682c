"""Writing edge packs, with torch, on the machine that owns the base model.

facts = write_pack(ModelSettings("/models/SmolLM2-135M"), Path("packs/SmolLM2-135M"))
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir
import torch
from safetensors.torch import save_file

from fedtune.core.adapter.layout import AdaptedModule
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import ModelSettings
from fedtune.core.protocol.model_manifest import MANIFEST, PACK_FORMAT, PACK_KIND, Manifest, list_files
from fedtune.data.examples import start_tokens
from fedtune.data.job_inputs import PACK_FACTS
from fedtune.edge.blocks import TracedBlock, block_parameters, head_function, unpacking_tables
from fedtune.edge.graph_cut import halves
from fedtune.edge.graph_export import exported
from fedtune.edge.pack_contents import FREQUENCIES
from fedtune.edge.pack_facts import BACKWARD, FORWARD, HEAD, TOKENIZER, WEIGHTS, Y_GRADIENT, PackFacts, X, Y
from fedtune.model.base_model import BaseModel, linear_modules, load_base
from fedtune.model.shape import ModelShape, shape_of

ARCHITECTURES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
OLDEST_ONNXRUNTIME = "1.19"  # the first for numpy 2; the graphs' own format needs 1.18
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on a text's length


def write_pack(settings: ModelSettings, directory: Path) -> PackFacts:
    """Loads a base model and writes its pack to a new directory, which gets its name when the pack is whole.

    Raises:
        ModelError: the base cannot be loaded, its architecture, tokenizer or quantization has no pack, or the directory
            has files already.
    """
    if settings.quantization != "nf4":
        raise ModelError(f'model.quantization = "{settings.quantization}" has no edge pack; expected "nf4"')
    if directory.exists() and any(directory.iterdir()):
        raise ModelError(f"{directory}: has files already; expected a new directory for the edge pack")
    base = load_base(settings, weights="packed", precision="fp32", device="cpu")
    check_supported(base)
    base.network.set_attn_implementation("eager")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as unfinished:
        written = Path(unfinished) / "pack"
        written.mkdir()
        facts = _write(base, written)
        written.replace(directory)
    return facts


def check_supported(base: BaseModel) -> None:
    """Checks that the graphs would compute what torch does.

    Raises:
        ModelError: another architecture, or a variant of one whose blocks differ from each other.
    """
    config = base.network.config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"{base.name}: {config.model_type} has no edge pack; expected {', '.join(ARCHITECTURES)}")
    if not base.tokenizer.is_fast:
        raise ModelError(f"{base.name}: its tokenizer has no {TOKENIZER}; expected one of the fast tokenizers")
    if getattr(config, "attention_dropout", 0.0):
        raise ModelError(f"{base.name}: an edge pack has no dropout; expected attention_dropout = 0")
    rope = config.rope_parameters["rope_type"]
    if rope not in _FIXED_ROPES:
        raise ModelError(f"{base.name}: the rope type {rope} has no edge pack; expected {', '.join(_FIXED_ROPES)}")
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ModelError(f"{base.name}: its blocks differ ({', '.join(sorted(kinds))}); expected blocks that are alike")


def _write(base: BaseModel, directory: Path) -> PackFacts:
    forward, backward = halves(exported(TracedBlock(base).step), X, Y, Y_GRADIENT)
    for graph, name in ((forward, FORWARD), (backward, BACKWARD), (exported(head_function(base)), HEAD)):
        ir.save(graph, directory / name)
    save_file({name: tensor.contiguous() for name, tensor in _tensors(base).items()}, directory / WEIGHTS)
    base.tokenizer.save_pretrained(directory)
    facts = _facts(base, directory)
    (directory / PACK_FACTS).write_bytes(msgspec.json.format(msgspec.json.encode(facts)))
    manifest = Manifest(
        kind=PACK_KIND,
        name=released_name(base.name),
        format=PACK_FORMAT,
        provenance={"base": base.name, "digest": base.digest, "architecture": facts.architecture},
        files=list_files(directory),
        start_tokens=facts.start_tokens,
    )
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest.to_json())))
    return facts


def released_name(base: str) -> str:
    """Returns the name under which the fleet's owner releases the pack of a base: the last part of its path or id."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(base).name).lstrip("._-")[:64] or "base"


def _tensors(base: BaseModel) -> dict[str, torch.Tensor]:
    """Returns all tensors of the weight file by name."""
    network, prefix = base.network.base_model, base.network.base_model_prefix
    tensors = {f"{prefix}.{name}": tensor for name, tensor in block_parameters(base).items()}
    tensors |= {f"{prefix}.norm.{name}": each.detach() for name, each in network.norm.named_parameters()}
    tensors[_embedding_name(base)] = network.get_input_embeddings().weight.detach()
    if not _tied(base):
        tensors["lm_head.weight"] = base.head.get_parameter("weight").detach()
    return {**tensors, **unpacking_tables(), FREQUENCIES: network.rotary_emb.inv_freq}


def _embedding_name(base: BaseModel) -> str:
    return f"{base.network.base_model_prefix}.embed_tokens.weight"


def _tied(base: BaseModel) -> bool:
    return base.head.get_parameter("weight") is base.network.get_input_embeddings().weight


def _facts(base: BaseModel, directory: Path) -> PackFacts:
    network, prefix = base.network.base_model, base.network.base_model_prefix
    config = base.network.config.get_text_config()
    end: Any = base.tokenizer.eos_token_id
    return PackFacts(
        architecture=config.model_type,
        base_digest=base.digest,
        onnxruntime=OLDEST_ONNXRUNTIME,
        blocks=f"{prefix}.layers",
        embedding=_embedding_name(base),
        embedding_scale=float(getattr(network.get_input_embeddings(), "embed_scale", 1.0)),
        head=_embedding_name(base) if _tied(base) else "lm_head.weight",
        norm=f"{prefix}.norm",
        rope_scale=float(network.rotary_emb.attention_scaling),
        start_tokens=tuple(start_tokens(base.tokenizer)),
        end_token=int(end),
        shape=_shape(base, directory),
    )


def _shape(base: BaseModel, directory: Path) -> ModelShape:
    """Returns the sizes of the base model, with its layers in the order of adapters, and the file that devices map."""
    linear = tuple(
        AdaptedModule(name, each.in_features, each.out_features) for name, each in linear_modules(base.network)
    )
    vocabulary = len(base.head.get_parameter("weight"))
    mapped = (directory / WEIGHTS).stat().st_size
    return replace(shape_of(ModelSettings(base.name)), linear=linear, vocabulary=vocabulary, file_bytes=mapped)
