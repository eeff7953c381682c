"""The files of a trained adapter: a LoRA adapter that peft loads, whatever the kind of adapter that was trained.

adapter_config.json          peft's
adapter_model.safetensors    lora_A and lora_B of every module
core.safetensors             for a core adapter, the matrices R that were folded into lora_B
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedtune.core.adapter.layout import AdapterLayout, Vector
from fedtune.core.adapter.lora_layout import LoraLayout, peft_tensors
from fedtune.core.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = LoraLayout.file
_METADATA = {"format": "pt"}


def save_adapter(directory: Path, layout: AdapterLayout, vector: Vector, base: str) -> None:
    """Writes an adapter as peft does, so that `peft.PeftModel.from_pretrained(model, directory)` loads it.

    Args:
        directory: folder of the files; created if it does not exist; files in it are replaced.
        layout: layout of `vector`.
        vector: float32, (layout.size,).
        base: value of `base_model_name_or_path`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(layout.pairs(vector)), directory / ADAPTER_WEIGHTS, metadata=_METADATA)
    if layout.file != ADAPTER_WEIGHTS:
        save_file(layout.tensors(vector), directory / layout.file, metadata=_METADATA)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": layout.rank,
        "lora_alpha": layout.alpha,
        "lora_dropout": 0.0,
        "use_rslora": True,
        "bias": "none",
        "target_modules": [module.name for module in layout.modules],
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(directory: Path, layout: AdapterLayout) -> Vector:
    """Reads an adapter that `save_adapter` wrote into a flat vector.

    Raises:
        ModelError: the files are missing or broken, or names or shapes differ from the layout (all are listed).
    """
    path = directory / layout.file
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable adapter: {error}") from error
    vector = np.zeros(layout.size, dtype=np.float32)
    problems = []
    for key, place in layout.tensors(vector).items():
        tensor = tensors.pop(key, None)
        if tensor is None:
            problems.append(f"{key} is missing")
        elif tensor.shape != place.shape:
            problems.append(f"{key} has shape {tensor.shape}; expected {place.shape}")
        else:
            place[:] = tensor
    problems += [f"{key} is not part of the adapter" for key in sorted(tensors)]
    if problems:
        raise ModelError(f"{path} does not fit the model:\n  " + "\n  ".join(problems))
    return vector
