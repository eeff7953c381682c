"""Fixtures of finished runs of tiny random-weight models, made without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_helpers import MakeRun

from fedtune.core.adapter.adapter_files import save_adapter
from fedtune.core.adapter.layout import adapter_digest
from fedtune.core.job.job_file import load_job
from fedtune.model.adapted_model import adapter_layout
from fedtune.model.base_model import load_base
from fedtune.server.run_directory import RunDirectory

ROWS = [{"prompt": f"turn on the lamp in room {room}", "completion": f" lamp {room} on"} for room in range(24)]


@pytest.fixture(scope="session")
def make_run(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Gives make_run("qwen3", seed=1, ...), which makes a run directory with a random adapter.

    The same arguments give the same directory, whose content no test may change.
    """
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", seed: int = 0, quantization: str = "nf4", **settings: Any) -> Path:
        key = f"{architecture} {seed} {quantization} {sorted(settings.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp("runs") / f"run-{seed}"
            data = path.with_name("eval.jsonl")
            data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
            job = load_job(
                None,
                [
                    f'model.base="{make_model(architecture, **settings)}"',
                    f'model.quantization="{quantization}"',
                    f'data.evaluation="{data}"',
                    "data.sequence_length=64",
                    "adapter.kind=lora",
                    "adapter.rank=4",
                ],
            )
            made[key] = write_run(path, job, seed)
        return made[key]

    return make


def write_run(path: Path, job: Any, seed: int = 0) -> Path:
    base = load_base(job.model, weights="dequantized", precision="fp32", device="cpu")
    layout = adapter_layout(base, job.adapter)
    vector = (np.random.default_rng(seed).standard_normal(layout.size) * 0.05).astype(np.float32)
    directory = RunDirectory.create(path, job, base.digest)
    save_adapter(path / "adapter", layout, vector, job.model.base)
    directory.write_summary(
        {
            "status": "finished",
            "rounds": 3,
            "clients": 5,
            "base_digest": base.digest,
            "adapter_digest": adapter_digest(vector),
        }
    )
    directory.close()
    return path
