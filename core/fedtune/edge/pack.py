"""Edge packs as devices read them: checked against their manifest, and mapped into memory instead of read.

    pack = open_pack(Path("packs/SmolLM2-135M"))
    codes = pack.tensors["model.layers.0.self_attn.q_proj.codes"]      # uint8, backed by the file

A pack is a directory. `edge.json`, its manifest, is written last and has the SHA-256 of every other file:

    forward.onnx           one block: x -> y
    backward.onnx          one block: x and ∂L/∂y -> ∂L/∂x and the gradients of the adapter's factors
    head.onnx              final norm and language-model head: hidden states and targets -> losses and ∂L/∂hidden
    weights.safetensors    the weights of all blocks, linear ones in NF4, and the tables that unpack them
    tokenizer.json, ...    the tokenizer, as transformers saves it

All blocks of a model are alike, so one graph serves them all; weights and factors are its inputs. An adapter of either
kind is ΔW = s · B · R · A per linear layer, where R is the identity for LoRA. The manifest does not prove its own
authenticity: a device holds the base's digest against the one that its job names.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fedtune.core.adapter.core_layout import CoreLayout
from fedtune.core.adapter.layout import AdaptedModule, AdapterLayout, Vector
from fedtune.core.adapter.lora_layout import LoraLayout
from fedtune.core.bfloat16 import round_to_bfloat16
from fedtune.core.errors import ModelError
from fedtune.core.job.settings import AdapterSettings
from fedtune.core.protocol.model_manifest import FileEntry, digest_file
from fedtune.model.shape import adapted_modules

MANIFEST = "edge.json"
FORWARD = "forward.onnx"
BACKWARD = "backward.onnx"
HEAD = "head.onnx"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 4 << 20
BLOCK = 64  # numbers that share a scale
GROUP = 256  # scales that share a step
PAIRS = "nf4.pairs"
SCALE_LEVELS = "nf4.scale_levels"
FREQUENCIES = "rope.frequencies"
_REMEDY = "pull the pack again, or write it again with: fedtune edge pack BASE --out DIR"
_HEADER_LENGTH = 8
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "F32": np.dtype("<f4")}

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class PackManifest:
    """The contents of `edge.json`.

    Args:
        name: directory or hub id of the base model.
        architecture: transformers' name of the model's type, e.g. "llama".
        base_digest: the base's digest, 64 hexadecimal digits, equal to the one that torch devices compute.
        onnxruntime: the oldest version that runs the graphs.
        blocks: dotted path of the list of blocks in the base model, e.g. "model.layers".
        layers: number of blocks.
        width: d, width of the hidden states.
        vocabulary: V, number of logits.
        embedding: name of the tensor (V, d) of token embeddings.
        embedding_scale: factor of the embeddings.
        head: name of the tensor (V, d) of the language-model head; the embedding's where the two are tied.
        norm: dotted path of the final norm.
        rope_scale: factor of the rotary embedding's cosines and sines.
        start_tokens: ids of the tokens that the tokenizer puts in front of a text.
        end_token: id of the token that ends a text.
        modules: all linear layers but the head.
        files: name -> digest and size of every other file.
    """

    name: str
    architecture: str
    base_digest: str
    onnxruntime: str
    blocks: str
    layers: int
    width: int
    vocabulary: int
    embedding: str
    embedding_scale: float
    head: str
    norm: str
    rope_scale: float
    start_tokens: tuple[int, ...]
    end_token: int
    modules: tuple[AdaptedModule, ...]
    files: dict[str, FileEntry]
    schema: int = SCHEMA


@dataclass(frozen=True, eq=False)
class EdgePack:
    """A pack whose files fit its manifest.

    Args:
        tensors: the base's weights by name, read-only and mapped: uint8 codes and float32.
    """

    directory: Path
    manifest: PackManifest
    tensors: Tensors

    def block(self, layer: int) -> dict[str, npt.NDArray[Any]]:
        """Returns the tensors of one block, by their names within it."""
        prefix = f"{self.manifest.blocks}.{layer}."
        return {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}

    def weight(self, module: AdaptedModule) -> Vector:
        """Returns the unpacked weight of a linear layer: float32, (d_out, d_in), the bits that torch devices have.

        Ŵ_i = level[q_i] · (map[u_k] · t_g + m), see `fedtune.model.nf4`.
        """
        codes, scale_codes, steps, mean = (
            self.tensors[f"{module.name}.{part}"] for part in ("codes", "scale_codes", "scale_steps", "scale_mean")
        )
        levels = self.tensors[PAIRS][codes].reshape(-1, BLOCK)
        scales = self.tensors[SCALE_LEVELS][scale_codes] * np.repeat(steps, GROUP)[: len(scale_codes)] + mean
        dense = (levels * scales[:, None]).reshape(-1)[: module.d_out * module.d_in]
        return np.asarray(dense.reshape(module.d_out, module.d_in), dtype=np.float32)

    def layout(self, settings: AdapterSettings) -> AdapterLayout:
        """Returns the layout of an adapter on this base, as torch devices compute it.

        Raises:
            ModelError: a target matches no linear layer, or the rank is over the smaller side of a layer.
        """
        modules = {module.name: module for module in adapted_modules(self.manifest.modules, settings)}
        if settings.kind == "lora":
            return LoraLayout(tuple(modules.values()), settings.rank, settings.alpha)
        return CoreLayout.between(
            tuple(modules.values()),
            settings.rank,
            settings.alpha,
            lambda name: round_to_bfloat16(self.weight(modules[name])),
        )


def open_pack(directory: Path) -> EdgePack:
    """Checks every file of a pack, and maps its weights.

    Raises:
        ModelError: it is no pack, or a file is missing, cut short or changed; the message names it and the remedy.
    """
    manifest = _read_manifest(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ModelError(f"{path}: is missing from the edge pack; {_REMEDY}")
        if path.stat().st_size != entry.bytes:
            raise ModelError(f"{path}: has {path.stat().st_size} bytes; expected {entry.bytes}; {_REMEDY}")
        if digest_file(path).sha256 != entry.sha256:
            raise ModelError(f"{path}: its content differs from the manifest's digest; {_REMEDY}")
    try:
        return EdgePack(directory, manifest, map_tensors(directory / WEIGHTS))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory / WEIGHTS}: not a file of weights: {error}; {_REMEDY}") from error


def map_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Maps the tensors of a safetensors file: pages are loaded when they are first used, and may be dropped again."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = _HEADER_LENGTH + int.from_bytes(mapped[:_HEADER_LENGTH], "little")
    header = json.loads(mapped[_HEADER_LENGTH:start])
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        flat = np.frombuffer(mapped, dtype, (last - first) // dtype.itemsize, start + first)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _read_manifest(directory: Path) -> PackManifest:
    path = directory / MANIFEST
    if not path.is_file():
        raise ModelError(f"{directory}: not a whole edge pack: it has no {MANIFEST}; {_REMEDY}")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ModelError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; expected the manifest of an edge pack")
    try:
        text = path.read_bytes()
        if (schema := json.loads(text)["schema"]) != SCHEMA:
            raise ModelError(f"{path}: has schema {schema}; expected {SCHEMA}: fedtune and the pack differ in version")
        manifest = msgspec.json.decode(text, type=PackManifest)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not the manifest of an edge pack: {error}; {_REMEDY}") from error
    if not {FORWARD, BACKWARD, HEAD, WEIGHTS, TOKENIZER} <= set(manifest.files):
        raise ModelError(f"{path}: lists only a part of an edge pack's files; {_REMEDY}")
    if outside := [name for name in manifest.files if Path(name).name != name]:
        raise ModelError(f"{path}: {outside[0]!r} is not a file's name inside the directory")
    return manifest
