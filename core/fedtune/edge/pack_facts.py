"""The facts of an edge pack, `edge.json`: its base model, and its sizes, from which a device plans without its weights.

    facts = read_facts(Path("packs/SmolLM2-135M"))
    facts.shape.layers

Beside it are:

    forward.onnx           one block: x -> y, and the values that its gradients need
    backward.onnx          one block: x, these values and ∂L/∂y -> ∂L/∂x and the gradients of the adapter's factors
    head.onnx              final norm and language-model head: hidden states and targets -> losses and ∂L/∂hidden
    weights.safetensors    the weights of all blocks, linear ones in NF4, and the tables that unpack them
    tokenizer.json, ...    the tokenizer, as transformers saves it
    fedtune.json           the manifest, with the SHA-256 of every other file, as exported models have one; written last

No file proves its own authenticity: the fleet's owner signs the manifest's digest of a pack that devices pull.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedtune.core.errors import ExportError, ModelError
from fedtune.core.protocol.model_manifest import verify_sizes
from fedtune.data.job_inputs import PACK_FACTS
from fedtune.model.shape import ModelShape

FORWARD = "forward.onnx"
BACKWARD = "backward.onnx"
HEAD = "head.onnx"
GRAPHS = (FORWARD, BACKWARD, HEAD)
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
X, Y, Y_GRADIENT = "x", "y", "y_gradient"  # a block's input and output in its graphs, and the output's gradient
SCHEMA = 4
_MAX_BYTES = 4 << 20
REMEDY = "pull the pack again, or write it again with: fedtune edge pack BASE --out DIR"


@dataclass(frozen=True)
class PackFacts:
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
    schema: int = SCHEMA


def read_facts(directory: Path) -> PackFacts:
    """Reads a pack's facts, and of the other files only whether they are there in their whole length.

    Raises:
        ModelError: it is no pack, not a whole one, or another version's; the message names the file and the remedy.
    """
    path = directory / PACK_FACTS
    if not path.is_file():
        raise ModelError(f"{directory}: not a whole edge pack: it has no {PACK_FACTS}; {REMEDY}")
    if path.stat().st_size > _MAX_BYTES:
        raise ModelError(f"{path}: larger than {_MAX_BYTES} bytes; expected the facts of an edge pack")
    try:
        text = path.read_bytes()
        if (schema := json.loads(text)["schema"]) != SCHEMA:
            raise ModelError(f"{path}: has schema {schema}; expected {SCHEMA}: fedtune and the pack differ in version")
        facts = msgspec.json.decode(text, type=PackFacts)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not the facts of an edge pack: {error}; {REMEDY}") from error
    try:
        verify_sizes(directory)
    except ExportError as error:
        raise ModelError(f"{error}; {REMEDY}") from error
    return facts
