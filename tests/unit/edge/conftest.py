"""Edge packs of the bundled base and of tiny random-weight models, each made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeModel = Callable[..., Path]
PackOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def pack_of(tmp_path_factory: pytest.TempPathFactory) -> PackOf:
    """Gives pack_of(base), which writes the pack of a base model once."""
    from fedtune.core.job.settings import ModelSettings
    from fedtune.edge.pack_writer import write_pack

    made: dict[str, Path] = {}

    def pack(base: str) -> Path:
        if base not in made:
            made[base] = tmp_path_factory.mktemp("edge") / "pack"
            write_pack(ModelSettings(base), made[base])
        return made[base]

    return pack


@pytest.fixture(scope="session")
def demo_pack(pack_of: PackOf) -> Path:
    """Gives the pack of the bundled base, which tests may read only."""
    from fedtune.core.job.settings import DEMO

    return pack_of(DEMO)


@pytest.fixture(scope="session")
def make_biased(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Gives make_biased("qwen2", ...): the model of `make_model` with random biases and norms instead of 0 and 1."""
    import torch
    from safetensors.torch import load_file, save_file

    made: dict[Path, Path] = {}

    def make(architecture: str = "llama", **settings: Any) -> Path:
        plain = make_model(architecture, **settings)
        if plain in made:
            return made[plain]
        directory = made[plain] = Path(shutil.copytree(plain, tmp_path_factory.mktemp("biased") / "model"))
        random = torch.Generator().manual_seed(1)
        tensors = load_file(directory / "model.safetensors")
        for tensor in tensors.values():
            if tensor.dim() == 1:
                tensor += 0.2 * torch.randn(tensor.shape, generator=random)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return make
