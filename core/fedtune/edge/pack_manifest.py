"""The manifest of an edge pack, `edge.json`, which is written last.

    manifest = read_manifest(Path("packs/SmolLM2-135M"))
    manifest.shape.layers

It has the sizes of the base model, from which a device plans without its weights, and the SHA-256 of every other file:

    forward.onnx           one block: x -> y
    backward.onnx          one block: x and ∂L/∂y -> ∂L/∂x and the gradients of the adapter's factors
    head.onnx              final norm and language-model head: hidden states and targets -> losses and ∂L/∂hidden
    weights.safetensors    the weights of all blocks, linear ones in NF4, and the tables that unpack them
    tokenizer.json, ...    the tokenizer, as transformers saves it

The manifest does not prove its own authenticity: a device holds the base's digest against the one that its job names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedtune.core.errors import ModelError
from fedtune.core.protocol.model_manifest import FileEntry
from fedtune.data.job_inputs import PACK_MANIFEST
from fedtune.model.shape import ModelShape

FORWARD = "forward.onnx"
BACKWARD = "backward.onnx"
HEAD = "head.onnx"
GRAPHS = (FORWARD, BACKWARD, HEAD)
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 4 << 20
REMEDY = "pull the pack again, or write it again with: fedtune edge pack BASE --out DIR"


@dataclass(frozen=True)
class PackManifest:
    """The contents of `edge.json`.

    Args:
        architecture: transformers' name of the model's type, e.g. "llama".
        base_digest: the base's digest, 64 hexadecimal digits, equal to the one that torch devices compute.
        onnxruntime: the oldest version that runs the graphs.
        blocks: dotted path of the list of blocks in the base model, e.g. "model.layers".
        embedding: name of the tensor (V, d) of token embeddings.
        embedding_scale: factor of the embeddings.
        head: name of the tensor (V, d) of the language-model head; the embedding's where the two are tied.
        norm: dotted path of the final norm.
        rope_scale: factor of the rotary embedding's cosines and sines.
        start_tokens: ids of the tokens that the tokenizer puts in front of a text.
        end_token: id of the token that ends a text.
        shape: sizes of the base model, with its directory or hub id, and the bytes of the weight file.
        files: name -> digest and size of every other file.
    """

    architecture: str
    base_digest: str
    onnxruntime: str
    blocks: str
    embedding: str
    embedding_scale: float
    head: str
    norm: str
    rope_scale: float
    start_tokens: tuple[int, ...]
    end_token: int
    shape: ModelShape
    files: dict[str, FileEntry]
    schema: int = SCHEMA


def read_manifest(directory: Path) -> PackManifest:
    """Reads a pack's manifest, and none of the other files.

    Raises:
        ModelError: it is no pack, or another version's; the message names the file and the remedy.
    """
    path = directory / PACK_MANIFEST
    if not path.is_file():
        raise ModelError(f"{directory}: not a whole edge pack: it has no {PACK_MANIFEST}; {REMEDY}")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ModelError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; expected the manifest of an edge pack")
    try:
        text = path.read_bytes()
        if (schema := json.loads(text)["schema"]) != SCHEMA:
            raise ModelError(f"{path}: has schema {schema}; expected {SCHEMA}: fedtune and the pack differ in version")
        manifest = msgspec.json.decode(text, type=PackManifest)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not the manifest of an edge pack: {error}; {REMEDY}") from error
    if not {*GRAPHS, WEIGHTS, TOKENIZER} <= set(manifest.files):
        raise ModelError(f"{path}: lists only a part of an edge pack's files; {REMEDY}")
    if outside := [name for name in manifest.files if Path(name).name != name]:
        raise ModelError(f"{path}: {outside[0]!r} is not a file's name inside the directory")
    return manifest
