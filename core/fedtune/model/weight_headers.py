"""The linear layers of a base model by the headers of its weight files: a mistake is found before torch is imported.

    linear = linear_layers(Path("models/SmolLM2-135M"))    # None where the files do not tell for certain

`fedtune.model.shape` builds the network, and knows every architecture; that takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedtune.core.adapter.layout import AdaptedModule

# Whose weights have, in the file, the names and shapes of the network's layers.
_ARCHITECTURES = frozenset({"gemma", "llama", "mistral", "phi3", "qwen2", "qwen3"})
_MOST_CONFIG_BYTES = 1 << 20


def linear_layers(directory: Path) -> tuple[AdaptedModule, ...] | None:
    """Returns the linear layers but the head; None for another architecture, or files that loading will refuse."""
    try:
        with (directory / "config.json").open("rb") as file:
            config = json.loads(file.read(_MOST_CONFIG_BYTES))
        if config["model_type"] not in _ARCHITECTURES:
            return None
        found = [module for path in directory.glob("*.safetensors") for module in _matrices(path, config["vocab_size"])]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return tuple(found) or None


def _matrices(path: Path, vocabulary: int) -> list[AdaptedModule]:
    found = []
    with safe_open(path, framework="numpy") as weights:
        for name in weights.keys():  # noqa: SIM118  # it is no dictionary
            shape = weights.get_slice(name).get_shape()
            if name.endswith(".weight") and len(shape) == 2 and shape[0] != vocabulary:
                found.append(AdaptedModule(name.removesuffix(".weight"), shape[1], shape[0]))
    return found
